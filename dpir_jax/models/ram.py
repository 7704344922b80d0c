"""RAM and RAM++, which name what is in a picture, and DAPE, RAM adapted to degraded pictures.

    tokens   E = P swin(pixels), the mean token first
    queries  Q = relu(W label_embed), one per tag
    head     twice: h <- LN(h + attention(h, E));  h <- LN(h + W2 gelu(W1 h)).  No self-attention among tags
    tag      on where sigmoid(fc h) is above its threshold

RAM++ has several descriptions per tag and weighs them anew for every picture, with c = E_0 / |E_0| and temperature tau:

    label = sum_j softmax_j(exp(tau) c . d_j) d_j

DAPE (SeeSR, arXiv 2311.16518, section 3.2) is RAM with LoRA on queries and values of the Swin and on queries and keys
of the head, trained so that a degraded picture looks like its original. Sources: Zhang et al., arXiv 2306.03514; Huang
et al., arXiv 2310.15200; xinyu1205/recognize-anything (Apache-2.0); cswry/SeeSR (Apache-2.0).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.attention import attention
from dpir_jax.models.layers import Keys, dense, layer_norm, scan_blocks, stack
from dpir_jax.models.lora import LoRA, merge
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.swin import Swin, SwinConfig

Queries = Float[Array, "B Q D"]

HEAD_EPSILON = 1e-12
THRESHOLD = 0.68  # where a tag has none of its own
MEAN = (0.485, 0.456, 0.406)  # of the RGB pixels
DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class RAMConfig:
    """Sizes of a tagger; the defaults are RAM's.

    Attributes:
      swin: of the image encoder.
      tags: how many.
      descriptions: per tag; more than one means RAM++'s weighing.
      embed_width: of image tokens and label embeddings (CLIP's).
      head_width, head_heads, head_mlp_width, head_layers: of the head.
      lora_rank: of the adaptation, of Swin and head alike; 0 for none.
    """

    swin: SwinConfig = dataclasses.field(default_factory=SwinConfig)
    tags: int = 4585
    descriptions: int = 1
    embed_width: int = 512
    head_width: int = 768
    head_heads: int = 4
    head_mlp_width: int = 3072
    head_layers: int = 2
    lora_rank: int = 0

    def __post_init__(self) -> None:
        if self.head_width % self.head_heads:
            raise InputError(f"head_heads {self.head_heads} do not divide head_width {self.head_width}")
        if self.swin.lora_rank != self.lora_rank:
            raise InputError(f"lora_rank {self.lora_rank} differs from the Swin's {self.swin.lora_rank}")

    @classmethod
    def ram(cls) -> "RAMConfig":
        """RAM with Swin-L at 384 pixels: 4585 tags."""
        return cls()

    @classmethod
    def ram_plus(cls) -> "RAMConfig":
        """RAM++ with Swin-L at 384 pixels: 51 descriptions of each of 4585 tags."""
        return cls(descriptions=51)

    @classmethod
    def dape(cls) -> "RAMConfig":
        """SeeSR's DAPE: RAM with LoRA of rank 8."""
        return cls.ram().adapted(8)

    @classmethod
    def tiny(cls) -> "RAMConfig":
        """For tests."""
        return cls(SwinConfig.tiny(), tags=5, embed_width=12, head_width=16, head_mlp_width=24)

    def adapted(self, rank: int) -> "RAMConfig":
        """The same with LoRA of this rank; 0 takes it away."""
        return dataclasses.replace(self, swin=dataclasses.replace(self.swin, lora_rank=rank), lora_rank=rank)


class HeadLayer(nnx.Module):
    """Attention of tags to image tokens, MLP; both post-norm."""

    def __init__(self, config: RAMConfig, *, rngs: nnx.Rngs, precision: Precision) -> None:
        width, embed, make = config.head_width, config.embed_width, {"rngs": rngs, "precision": precision}
        self.heads = config.head_heads
        self.to_q = dense(width, width, "dh", **make)
        self.to_k = dense(embed, width, "ch", **make)
        self.to_v = dense(embed, width, "ch", **make)
        rank = config.lora_rank
        self.to_q_lora = LoRA(width, width, rank, **make) if rank else None
        self.to_k_lora = LoRA(embed, width, rank, **make) if rank else None
        self.to_out = dense(width, width, "hd", **make)
        self.norm1 = layer_norm(width, epsilon=HEAD_EPSILON, **make)
        self.fc1 = dense(width, config.head_mlp_width, "df", **make)
        self.fc2 = dense(config.head_mlp_width, width, "fd", **make)
        self.norm2 = layer_norm(width, epsilon=HEAD_EPSILON, **make)

    def __call__(self, h: Queries, tokens: Float[Array, "B T E"]) -> Queries:
        q, k, v = self.to_q(h), self.to_k(tokens), self.to_v(tokens)
        if self.to_q_lora is not None:
            q, k = q + self.to_q_lora(h), k + self.to_k_lora(tokens)
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (q, k, v))
        h = self.norm1(h + self.to_out(attention(q, k, v).reshape(h.shape))).astype(h.dtype)
        return self.norm2(h + self.fc2(jax.nn.gelu(self.fc1(h), approximate=False))).astype(h.dtype)


class RAM(nnx.Module):
    """The tagger: `net.embed(pixels)` for the diffusion model, `net.logits(embeds)` for the tags."""

    def __init__(self, config: RAMConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.config, self.dtype = config, precision.dtype
        self.visual_encoder = Swin(config.swin, **make)
        self.image_proj = dense(config.swin.widths[-1], config.embed_width, "dc", **make)
        normal, shape = nnx.initializers.normal(0.02), (config.tags * config.descriptions, config.embed_width)
        self.label_embed = nnx.Param(normal(rngs.params(), shape, precision.param_dtype), axes="vc")
        if config.descriptions > 1:
            self.reweight_scale = nnx.Param(jnp.full((), jnp.log(1 / 0.07), precision.param_dtype), axes="")
        self.wordvec_proj = dense(config.embed_width, config.head_width, "cd", **make)
        self.blocks = stack(lambda r: HeadLayer(config, rngs=r, precision=precision), config.head_layers, rngs)
        self.fc = dense(config.head_width, 1, "d_", **make)

    def embed(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B T E"]:
        """Pixels from `ram_preprocess` -> image tokens, the mean first, float32: the image context of SeeSR."""
        return self.image_proj(self.visual_encoder(pixels)).astype(jnp.float32)

    def labels(self, embeds: Float[Array, "B T E"]) -> Float[Array, "B or 1 Q E"]:
        """One embedding per tag; RAM++ weighs the descriptions of each by the picture, in float32."""
        table = self.label_embed[...].astype(jnp.float32)
        if self.config.descriptions == 1:
            return table[None]
        table = table.reshape(self.config.tags, self.config.descriptions, -1)
        c = embeds[:, 0] / jnp.linalg.norm(embeds[:, 0], axis=-1, keepdims=True)
        scale = jnp.exp(self.reweight_scale[...].astype(jnp.float32))
        weight = jax.nn.softmax(scale * jnp.einsum("be,tde->btd", c, table), axis=-1)
        return jnp.einsum("btd,tde->bte", weight, table)

    def queries(self, labels: Float[Array, "B or 1 Q E"]) -> Float[Array, "B or 1 Q D"]:
        """What the head starts from, for labels of any number."""
        return jax.nn.relu(self.wordvec_proj(labels))

    def logits(
        self, embeds: Float[Array, "B T E"], labels: Float[Array, "B or 1 Q E"] | None = None
    ) -> Float[Array, "B Q"]:
        """One logit per tag, or per each of other `labels` (text embeddings of CLIP ViT-B/16); float32."""
        queries = self.queries(self.labels(embeds) if labels is None else labels)
        h = jnp.broadcast_to(queries, (len(embeds), *queries.shape[1:]))
        h = scan_blocks(self.blocks, h, lambda block, h: block(h, embeds))
        return self.fc(h)[..., 0].astype(jnp.float32)

    def __call__(self, pixels: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B T E"], Float[Array, "B Q"]]:
        """Image tokens and logits."""
        embeds = self.embed(pixels)
        return embeds, self.logits(embeds)

    def merged(self) -> "RAM":
        """The same network with its adaptation in the kernels."""
        plain = nnx.eval_shape(lambda: RAM(self.config.adapted(0), rngs=Keys(0)))
        return merge(self, plain)


def ram_preprocess(images: Float[Array, "B H W 3"], size: int = 384) -> Float[Array, "B S S 3"]:
    """RGB in [0, 1] -> resized (antialiased, bilinear, aspect not kept, as published) and normalised pixels."""
    images = jax.image.resize(images, (len(images), size, size, 3), "linear", precision=jax.lax.Precision.HIGHEST)
    return (images - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)


# --- losses ----------------------------------------------------------------------------------------------------------


def asymmetric_loss(
    logits: Float[Array, "B Q"],
    targets: Float[Array, "B Q"],
    *,
    gamma_negative: float = 7.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
    epsilon: float = 1e-8,
    focus_gradient: bool = False,
) -> Float[Array, ""]:
    """Tagging loss (Ridnik et al., arXiv 2009.14119), summed: easy negatives are shifted away and damped.

    With p = sigmoid(logit), p' = min(1 - p + clip, 1) and p_t the probability of the truth (p or p'):
    -sum [y log p + (1 - y) log p'] (1 - p_t)^gamma. The defaults are RAM's tagging; RAM++'s alignment has
    `gamma_negative` 4.

    Args:
      logits: one per tag.
      targets: 1 for the tags that are there.
      gamma_negative: of the damping where a tag is not there.
      gamma_positive: and where it is.
      clip: the shift.
      epsilon: below which a probability is cut before its logarithm.
      focus_gradient: lets the gradient through the damping.
    """
    p = jax.nn.sigmoid(logits.astype(jnp.float32))
    absent = jnp.minimum(1 - p + clip, 1) if clip > 0 else 1 - p
    log = lambda x: jnp.log(jnp.maximum(x, epsilon))  # noqa: E731
    loss = targets * log(p) + (1 - targets) * log(absent)
    gamma = gamma_positive * targets + gamma_negative * (1 - targets)
    focus = (1 - (p * targets + absent * (1 - targets))) ** gamma
    return -(loss * (focus if focus_gradient else jax.lax.stop_gradient(focus))).sum()


def dape_losses(
    embeds: Float[Array, "B T E"],
    logits: Float[Array, "B Q"],
    clean_embeds: Float[Array, "B T E"],
    clean_logits: Float[Array, "B Q"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """DAPE's two losses, of equal weight: tokens of the degraded picture against those of the original (mean square),
    and its tags against the original's probabilities (mean cross-entropy, on float32 probabilities as published: where
    one of them is 0 its logarithm is -100, without gradient)."""
    embeds, clean_embeds = embeds.astype(jnp.float32), jax.lax.stop_gradient(clean_embeds)
    p, soft = (jax.nn.sigmoid(x.astype(jnp.float32)) for x in (logits, jax.lax.stop_gradient(clean_logits)))
    log = lambda x: jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -100.0)  # noqa: E731
    entropy = -(soft * log(p) + (1 - soft) * log(1 - p)).mean()
    return jnp.square(embeds - clean_embeds).mean(), entropy


def distillation_loss(embeds: Float[Array, "B T E"], clip_embeds: Float[Array, "B E"]) -> Float[Array, ""]:
    """RAM's pull of the mean token towards CLIP's image embedding: mean absolute difference."""
    return jnp.abs(embeds[:, 0] - clip_embeds).mean()
