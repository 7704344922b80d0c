"""IRPAD, the image-restoration prompt alignment decoder of DaLPSR (arXiv 2406.16477): which prompt fits a photo?

    tokens   E = encoder(crop) of every crop of the photo, side by side
    queries  Q = relu(W prompt_embed), one per candidate prompt
    decoder  N x [cross-attention -> feed forward], no self-attention among prompts: RAM's tagging head
    logits   fc(h), one per prompt

The candidates are either one phrase per type and interval, with a softmax within each type, or every combination as a
whole sentence, with one softmax (the paper's figure allows both). Crops are taken at the photo's own resolution, for
resizing destroys what there is to read.

Two encoders. `SwinConfig`: RAM's Swin-L, frozen, as in the paper's figure. `StatisticsConfig`: ours, small, one token
per crop whose corner lies on the photo's 8x8 JPEG grid: a perceptron on what is known to tell degradations apart,

    of the DCT coefficients c of each 8x8 block, averaged over the crop:  log(1 + |c|);  whether c is zero;  a comb
        1 - 8 t^2 for a range of periods p, t being c / p less its nearest whole number: 1 where p is a quantisation
        step;  log E c^2, over all blocks and over the quarter with the most detail, where blur bends the spectrum
    of the chroma planes:  log(1 + |c|)
    of the luma's differences d over 1 to 8 pixels, first and second:  log E|d|, log (E d^4)^(1/4): the width of edges
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dpir_jax.errors import InputError
from dpir_jax.models.layers import dense, scan_blocks, stack
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.ram import HeadLayer, ram_preprocess
from dpir_jax.models.swin import Swin, SwinConfig

BLOCK = 8  # of a JPEG file
LAGS = (1, 2, 3, 4, 6, 8)  # pixels, of the differences
_LUMA = (0.299, 0.587, 0.114)
_BLUE = (-0.168736, -0.331264, 0.5)
_RED = (0.5, -0.418688, -0.081312)


@dataclasses.dataclass(frozen=True)
class StatisticsConfig:
    """Sizes of the small encoder.

    Attributes:
      crop: side of a crop in pixels, a multiple of 8, at least 16.
      periods: of the comb, per DCT coefficient.
      width: of the perceptron's hidden layers.
    """

    crop: int = 64
    periods: int = 10
    width: int = 192

    def __post_init__(self) -> None:
        if self.crop < 2 * BLOCK or self.crop % BLOCK:
            raise InputError(f"crop is {self.crop}; it must be a multiple of {BLOCK}, at least {2 * BLOCK}")

    @property
    def features(self) -> int:
        """How many statistics there are of a crop."""
        return BLOCK**2 * (self.periods + 6) + 8 * len(LAGS)


@dataclasses.dataclass(frozen=True)
class IRPADConfig:
    """Sizes of IRPAD; the decoder's defaults are RAM's head.

    Attributes:
      encoder: a `StatisticsConfig`, or a `SwinConfig` for RAM's.
      types: of degradation, by name and in the order of the prompt.
      intervals: of the severity [0, 1], per type.
      candidates: "phrases" (types x intervals) or "sentences" (intervals ** types).
      looks: crops per photo.
      embed_width: of image tokens and prompt embeddings.
      head_width, head_heads, head_mlp_width, head_layers: of the decoder.
    """

    encoder: StatisticsConfig | SwinConfig = dataclasses.field(default_factory=StatisticsConfig)
    types: tuple[str, ...] = ("blur", "noise", "jpeg")
    intervals: int = 4
    candidates: Literal["phrases", "sentences"] = "phrases"
    looks: int = 32
    embed_width: int = 512
    head_width: int = 768
    head_heads: int = 4
    head_mlp_width: int = 3072
    head_layers: int = 2

    lora_rank = 0  # `HeadLayer` is RAM's, which may be adapted

    def __post_init__(self) -> None:
        if self.candidates not in ("phrases", "sentences"):
            raise InputError(f"candidates is {self.candidates!r}; it must be 'phrases' or 'sentences'")
        for name, least in (("intervals", 2), ("looks", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.types or len(set(self.types)) != len(self.types):
            raise InputError(f"types is {self.types}; it must name each type of degradation once")
        if self.head_width % self.head_heads:
            raise InputError(f"head_heads {self.head_heads} do not divide head_width {self.head_width}")

    @property
    def crop(self) -> int:
        """Side of a crop in pixels."""
        return self.encoder.crop if isinstance(self.encoder, StatisticsConfig) else self.encoder.image_size

    @property
    def prompts(self) -> int:
        """How many candidates."""
        return len(self.types) * self.intervals if self.candidates == "phrases" else self.intervals ** len(self.types)

    @classmethod
    def nano(cls) -> "IRPADConfig":
        """The embedded model's."""
        return cls(embed_width=128, head_width=96, head_mlp_width=192)

    @classmethod
    def ram(cls) -> "IRPADConfig":
        """The paper's, as far as it is known: RAM's Swin-L at 384 pixels and RAM's head."""
        return cls(SwinConfig.large_384(), looks=4)

    @classmethod
    def tiny(cls) -> "IRPADConfig":
        """For tests."""
        encoder = StatisticsConfig(crop=16, periods=2, width=8)
        return cls(encoder, looks=4, embed_width=8, head_width=8, head_heads=2, head_mlp_width=8)


# --- the small encoder -----------------------------------------------------------------------------------------------


def dct_matrix() -> np.ndarray:
    """The orthonormal DCT-II of a whole block, `[64 pixels, 64 coefficients]`, both row by row."""
    frequency = np.arange(BLOCK)[:, None]
    scale = np.where(frequency == 0, BLOCK**-0.5, (2 / BLOCK) ** 0.5)
    axis = scale * np.cos((2 * np.arange(BLOCK) + 1) * frequency * np.pi / (2 * BLOCK))
    return np.kron(axis, axis).T.astype(np.float32)


def comb_periods(count: int) -> np.ndarray:
    """`[64, count]` periods in 8-bit levels: they span the steps of JPEG's tables, which grow with the frequency."""
    growth = 1 + 0.36 * np.add.outer(np.arange(BLOCK), np.arange(BLOCK)).reshape(-1, 1)
    return (np.geomspace(1.2, 30.0, count) * growth).astype(np.float32)


def coefficients(plane: Float[Array, "B S S"]) -> Float[Array, "B n 64"]:
    """The DCT of every 8x8 block."""
    blocks = rearrange(plane, "b (h p) (w q) -> b (h w) (p q)", p=BLOCK, q=BLOCK)
    return jnp.matmul(blocks, dct_matrix(), precision=jax.lax.Precision.HIGHEST)


def block_statistics(c: Float[Array, "B n 64"], periods: int) -> Float[Array, "B F"]:
    """Of the coefficients of a crop's luma, in 8-bit levels: 64 (periods + 4) numbers of the order of 1."""
    ratio = c[..., None] * (1 / comb_periods(periods))
    comb = 1 - 8 * jnp.square(ratio - jnp.round(ratio))  # a cosine would take ten times as long
    energy = jnp.square(c)
    detail = energy[..., 1:].sum(-1)
    richest = jax.lax.top_k(detail, max(c.shape[1] // 4, 1))[1]
    rich = jnp.take_along_axis(energy, richest[..., None], 1)
    parts = (
        jnp.log1p(jnp.abs(c)).mean(1) / 2 - 1,
        jnp.exp(-2 * energy).mean(1),
        rearrange(comb.mean(1), "b c p -> b (c p)"),
        jnp.log(energy.mean(1) + 0.1) / 4 - 0.5,
        jnp.log(rich.mean(1) + 0.1) / 4 - 1,
    )
    return jnp.concatenate(parts, -1)


def difference_statistics(luma: Float[Array, "B S S"]) -> Float[Array, "B F"]:
    """First and second differences of a luma plane in 8-bit levels along both axes: 8 numbers per lag."""
    out = []
    for axis in (1, 2):
        for lag in LAGS:
            line = jnp.moveaxis(luma, axis, 1)
            first = line[:, lag:] - line[:, :-lag]
            second = first[:, lag:] - first[:, :-lag]
            for difference in (first, second) if 2 * lag < luma.shape[1] else (first, first):
                square = jnp.square(difference)
                out.append(jnp.log(jnp.abs(difference).mean((1, 2)) + 0.1) / 2 - 0.5)
                out.append(jnp.log(jnp.square(square).mean((1, 2)) + 0.1) / 8 - 0.5)
    return jnp.stack(out, -1)


class StatisticsEncoder(nnx.Module):
    """Crops on the JPEG grid -> one token each."""

    def __init__(self, config: StatisticsConfig, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        make = {"rngs": rngs, "precision": precision}
        self.config = config
        self.fc1 = dense(config.features, config.width, "cf", **make)
        self.fc2 = dense(config.width, config.width, "df", **make)
        self.fc3 = dense(config.width, width, "fc", **make)

    def statistics(self, crops: Float[Array, "B S S 3"]) -> Float[Array, "B F"]:
        """What the perceptron reads."""
        ycc = jnp.matmul(crops * 255, np.array([_LUMA, _BLUE, _RED], np.float32).T, precision=jax.lax.Precision.HIGHEST)
        luma, *chroma = jnp.moveaxis(ycc, -1, 0)
        chroma = [jnp.log1p(jnp.abs(coefficients(plane))).mean(1) / 2 - 0.5 for plane in chroma]
        luma = luma - 128
        blocks = block_statistics(coefficients(luma), self.config.periods)
        return jnp.concatenate([blocks, *chroma, difference_statistics(luma)], -1)

    def read(self, statistics: Float[Array, "*B F"]) -> Float[Array, "*B E"]:
        """The perceptron alone."""
        x = nnx.silu(self.fc1(statistics))
        return self.fc3(x + nnx.silu(self.fc2(x)))

    def __call__(self, crops: Float[Array, "B S S 3"]) -> Float[Array, "B 1 E"]:
        """Crops in [0, 1]."""
        return self.read(jax.lax.stop_gradient(self.statistics(crops)))[:, None]


class SwinEncoder(nnx.Module):
    """RAM's image encoder: Swin and projection, the mean token first."""

    def __init__(self, config: SwinConfig, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.visual_encoder = Swin(config, rngs=rngs, precision=precision)
        self.image_proj = dense(config.widths[-1], width, "dc", rngs=rngs, precision=precision)

    def __call__(self, crops: Float[Array, "B S S 3"]) -> Float[Array, "B T E"]:
        """Crops in [0, 1] of the encoder's own size."""
        return self.image_proj(self.visual_encoder(ram_preprocess(crops, crops.shape[1]))).astype(jnp.float32)


# --- the decoder -----------------------------------------------------------------------------------------------------


class IRPAD(nnx.Module):
    """Crops of a photo -> a logit per candidate prompt."""

    def __init__(self, config: IRPADConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        make = {"rngs": rngs, "precision": precision}
        width, normal = config.embed_width, nnx.initializers.normal(1.0)
        self.config = config
        kind = StatisticsEncoder if isinstance(config.encoder, StatisticsConfig) else SwinEncoder
        self.encoder = kind(config.encoder, width, **make)
        self.prompt_embed = nnx.Param(normal(rngs.params(), (config.prompts, width), precision.param_dtype), axes="vc")
        self.wordvec_proj = dense(width, config.head_width, "cd", **make)
        self.blocks = stack(lambda r: HeadLayer(config, rngs=r, precision=precision), config.head_layers, rngs)
        zeros = nnx.initializers.zeros_init()  # at first all prompts fit equally
        self.fc = dense(config.head_width, 1, "d_", init=zeros, **make)
        self.gauge = dense(width, len(config.types), "c_", init=zeros, **make)

    def tokens(self, crops: Float[Array, "B N S S 3"]) -> Float[Array, "B T E"]:
        """Image tokens of all crops of each photo; crops in [0, 1]."""
        tokens = self.encoder(crops.reshape(-1, *crops.shape[2:]))
        return tokens.reshape(len(crops), -1, tokens.shape[-1])

    def logits(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B Q"]:
        """One per candidate prompt; float32."""
        queries = jax.nn.relu(self.wordvec_proj(self.prompt_embed[...]))
        h = jnp.broadcast_to(queries, (len(tokens), *queries.shape))
        h = scan_blocks(self.blocks, h, lambda block, h: block(h, tokens))
        return self.fc(h)[..., 0].astype(jnp.float32)

    def severities(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B types"]:
        """An estimate of each severity, about [0, 1], from the mean token: a second target in training."""
        return self.gauge(tokens.mean(1)).astype(jnp.float32)

    def log_probabilities(self, logits: Float[Array, "B Q"]) -> Float[Array, "B types intervals"]:
        """Of the intervals of each type, in either form of candidates."""
        types, intervals = len(self.config.types), self.config.intervals
        if self.config.candidates == "phrases":
            return jax.nn.log_softmax(logits.reshape(-1, types, intervals))
        joint = jax.nn.log_softmax(logits).reshape(-1, *[intervals] * types)
        axes = set(range(1, types + 1))
        marginals = [jax.nn.logsumexp(joint, tuple(axes - {axis})) for axis in sorted(axes)]
        return jnp.stack(marginals, 1)

    def __call__(self, crops: Float[Array, "B N S S 3"]) -> Float[Array, "B types intervals"]:
        """Probabilities of the intervals of each type, for the crops of each photo, in [0, 1]."""
        return jnp.exp(self.log_probabilities(self.logits(self.tokens(crops))))
