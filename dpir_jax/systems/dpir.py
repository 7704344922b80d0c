"""DPIR (arXiv 2504.17825): an SD3 MMDiT that restores a photo under two prompts, its looks and its words.

    z_lq   = E_dr(x_lq)                                           degradation-robust encoder
    c_dual, c_pool                                                `systems.prompts`, from x_lq or from D(z_lq)
    z_t    = (1 - sigma) z_0 + sigma eps                          rectified flow
    v      = DiT(z_t, 1000 sigma, c_dual, c_pool, LQ branch(z_lq))
    x_hat  = D(z_0)

Two switches extend the published system; both default to it.

* `flow="residual"`: the flow runs on what E_dr left undone, r_0 = (z_hq - z_lq) / kappa with kappa its measured RMS per
  channel, so that z_0 = z_lq + kappa r_0. Sampling then starts at E_dr's quality.
* `prediction="x0"`: the network's output F is read as z_0 itself, v = (z_t - F) / sigma. With a zero-initialised last
  layer and the residual flow the untrained system returns D(z_lq) exactly.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dpir_jax.errors import InputError, check_choices
from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Encoder
from dpir_jax.models.clip import CLIPVision, CLIPVisionConfig
from dpir_jax.models.layers import dense, layer_norm
from dpir_jax.models.mmdit import MMDiT, MMDiTConfig
from dpir_jax.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig, PatchEncoder
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.t5 import T5Config, T5Encoder
from dpir_jax.systems import prompts

MIN_SIGMA = 1e-3  # below the last non-zero sigma of every schedule (0.00893); keeps v = (z - F) / sigma finite


@dataclasses.dataclass(frozen=True)
class DPIRConfig:
    """Networks of the system and how they are joined. The pooled width is that of E1's tokens plus E2's embedding."""

    autoencoder: AutoencoderConfig | PatchAutoencoderConfig
    robust_encoder: AutoencoderConfig | PatchAutoencoderConfig
    mmdit: MMDiTConfig
    clip_tokens: CLIPVisionConfig
    clip_embed: CLIPVisionConfig
    t5: T5Config | None = None
    visual_tokens: int = 77
    text_tokens: int = 256
    visual_mlp: bool = False
    prompt_source: Literal["lq", "restored"] = "lq"
    flow: Literal["latent", "residual"] = "latent"
    prediction: Literal["velocity", "x0"] = "velocity"
    tile: int = 128
    global_tile: int = 1024
    global_overlap: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        pooled = self.clip_tokens.width + self.clip_embed.projection
        if pooled != self.mmdit.pooled_dim:
            raise InputError(f"mmdit.pooled_dim is {self.mmdit.pooled_dim}, but the two CLIP encoders give {pooled}")
        if self.mmdit.context_dim < pooled:
            raise InputError(f"mmdit.context_dim is {self.mmdit.context_dim}, narrower than a visual token ({pooled})")
        if self.t5 is not None and self.t5.width > self.mmdit.context_dim:
            raise InputError(f"t5.width is {self.t5.width}, over mmdit.context_dim ({self.mmdit.context_dim})")
        for name in ("autoencoder", "robust_encoder"):
            if getattr(self, name).latent_channels != self.mmdit.in_channels:
                raise InputError(f"{name}.latent_channels must be mmdit.in_channels ({self.mmdit.in_channels})")
        if type(self.autoencoder) is not type(self.robust_encoder):
            raise InputError("autoencoder and robust_encoder must be of one kind")
        if self.mmdit.lq_branch is None:
            raise InputError("mmdit.lq_branch is None; DPIR needs the LQ branch")
        if self.tile % self.mmdit.patch_size:
            raise InputError(
                f"tile is {self.tile}; it must be a multiple of mmdit.patch_size ({self.mmdit.patch_size})"
            )

    @classmethod
    def sd3_medium(cls) -> "DPIRConfig":
        """The published system: SD3-medium, ViT-B/32 and OpenCLIP bigG, T5-XXL."""
        return cls(
            autoencoder=AutoencoderConfig.sd3(),
            robust_encoder=AutoencoderConfig.sd3(),
            mmdit=MMDiTConfig.dpir(),
            clip_tokens=CLIPVisionConfig.vit_b32(),
            clip_embed=CLIPVisionConfig.openclip_bigg14(),
            t5=T5Config.xxl(),
        )

    @classmethod
    def nano(cls) -> "DPIRConfig":
        """The embedded model: no text encoder, all else at a small size."""
        return cls(
            autoencoder=PatchAutoencoderConfig.nano(),
            robust_encoder=PatchAutoencoderConfig.nano_robust(),
            mmdit=MMDiTConfig.nano(),
            clip_tokens=CLIPVisionConfig.nano(),
            clip_embed=CLIPVisionConfig.nano(),
            visual_tokens=72,
            text_tokens=0,
            flow="residual",
            prediction="x0",
            tile=32,
            global_tile=512,
            global_overlap=32,
        )

    @classmethod
    def tiny(cls) -> "DPIRConfig":
        """For tests: the nano system at the smallest size, with a text encoder and the MLP."""
        clip = CLIPVisionConfig.tiny()
        pooled = clip.width + clip.projection
        return cls(
            autoencoder=PatchAutoencoderConfig(latent_channels=4),
            robust_encoder=PatchAutoencoderConfig(latent_channels=4, widths=(8, 8), depths=(1, 1)),
            mmdit=dataclasses.replace(MMDiTConfig.tiny(), pooled_dim=pooled, context_dim=pooled + 2),
            clip_tokens=clip,
            clip_embed=clip,
            t5=T5Config.tiny(),
            visual_tokens=7,
            text_tokens=5,
            visual_mlp=True,
            flow="residual",
            prediction="x0",
            tile=8,
            global_tile=64,
            global_overlap=16,
        )

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell."""
        return self.autoencoder.spatial_factor


class Condition(NamedTuple):
    """The dual prompt: `context` [B, V + T, W] and `pooled` [B, P]. Zeros in both are the null prompt."""

    context: jax.Array
    pooled: jax.Array

    def null(self) -> "Condition":
        """The published unconditional prompt."""
        return Condition(jnp.zeros_like(self.context), jnp.zeros_like(self.pooled))


class Constant(nnx.Variable):
    """A measured array that travels with the weights and is never trained."""


class VisualMLP(nnx.Module):
    """The MLP that the paper's figure 4 draws after the visual tokens; its shape is our guess. Starts as identity."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, precision: Precision) -> None:
        self.norm = layer_norm(width, rngs=rngs, epsilon=1e-6, precision=precision)
        self.up = dense(width, 4 * width, "df", rngs=rngs, precision=precision)
        zeros = nnx.initializers.zeros_init()
        self.down = dense(4 * width, width, "fd", rngs=rngs, precision=precision, init=zeros)

    def __call__(self, tokens: Float[Array, "B V P"]) -> Float[Array, "B V P"]:
        return tokens + self.down(jax.nn.gelu(self.up(self.norm(tokens))))


class DPIR(nnx.Module):
    """All networks of the system. The methods are pure, take fixed shapes and can be jitted one by one."""

    def __init__(self, config: DPIRConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32) -> None:
        self.config = config
        if isinstance(config.autoencoder, PatchAutoencoderConfig):
            self.autoencoder = PatchAutoencoder(config.autoencoder, rngs=rngs, precision=precision)
            self.robust_encoder = PatchEncoder(config.robust_encoder, rngs=rngs, precision=precision)
        else:
            self.autoencoder = Autoencoder(config.autoencoder, rngs=rngs, precision=precision)
            self.robust_encoder = Encoder(config.robust_encoder, rngs=rngs, precision=precision)
        self.mmdit = MMDiT(config.mmdit, rngs=rngs, precision=precision)
        self.clip_tokens = CLIPVision(config.clip_tokens, rngs=rngs, precision=precision)
        self.clip_embed = CLIPVision(config.clip_embed, rngs=rngs, precision=precision)
        if config.t5 is not None:
            self.t5 = T5Encoder(config.t5, rngs=rngs, precision=precision)
        if config.visual_mlp:
            self.visual_mlp = VisualMLP(config.mmdit.pooled_dim, rngs=rngs, precision=precision)
        self.residual_scale = Constant(jnp.ones(config.mmdit.in_channels), axes="_")

    # --- pictures and latents ----------------------------------------------------------------------------------------

    def encode_hq(self, image: Float[Array, "B H W 3"], key: jax.Array | None = None) -> Float[Array, "B h w C"]:
        """Scaled latent of a good picture in [0, 1], by the original encoder: a sample with a key, else the mode."""
        return self.scaled(*self.autoencoder.encode(2 * image - 1), key)

    def encode_lq(self, image: Float[Array, "B H W 3"], key: jax.Array | None = None) -> Float[Array, "B h w C"]:
        """Scaled latent of a bad picture in [0, 1] at the target size, by E_dr."""
        return self.scaled(*self.robust_encoder(2 * image - 1), key)

    def encode_pair(
        self, lq: Float[Array, "B H W 3"], hq: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """`encode_lq(lq)` and `encode_hq(hq, key)`. Two encoders of one kind run as a loop, and are compiled once."""
        if not isinstance(self.config.autoencoder, AutoencoderConfig):
            return self.encode_lq(lq), self.encode_hq(hq, key)
        both = jax.tree.map(lambda *weights: jnp.stack(weights), self.robust_encoder, self.autoencoder.encoder)
        means, logvars = jax.lax.map(lambda pair: pair[0](2 * pair[1] - 1), (both, jnp.stack([lq, hq])))
        return self.scaled(means[0], logvars[0], None), self.scaled(means[1], logvars[1], key)

    def scaled(
        self, mean: Float[Array, "B h w C"], logvar: Float[Array, "B h w C"], key: jax.Array | None = None
    ) -> Float[Array, "B h w C"]:
        """Scaled latent of an encoder's mean and log-variance: a sample with a key, else the mode."""
        latent = mean if key is None else mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        return (latent - self.config.autoencoder.shift_factor) * self.config.autoencoder.scaling_factor

    def decode(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Picture in about [0, 1] (not clipped) of a scaled latent."""
        config = self.config.autoencoder
        return self.autoencoder.decode(latent / config.scaling_factor + config.shift_factor) / 2 + 0.5

    # --- prompts -----------------------------------------------------------------------------------------------------

    def local_view(self, pixels: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B L C1"], Float[Array, "B C2"]]:
        """E1's tokens and E2's embedding of local patches, normalised by `clip_preprocess`."""
        return self.clip_tokens(pixels)[0], self.clip_embed(pixels)[1]

    def global_view(self, pixels: Float[Array, "B S S 3"]) -> tuple[Float[Array, "B C1"], Float[Array, "B C2"]]:
        """E1's class token and E2's embedding of global tiles, normalised by `clip_preprocess`."""
        return self.clip_tokens(pixels)[0][:, 0], self.clip_embed(pixels)[1]

    def views(
        self, local: Float[Array, "B S S 3"], tile: Float[Array, "B S S 3"]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """`local_view(local)`, and `global_view` of one tile for each ([B, 1, C]); every tower runs once, over both."""
        count = len(local)
        pixels = jnp.stack([local, tile], 1).reshape(2 * count, *local.shape[1:])  # on a mesh no sample moves
        tokens, embeds = self.clip_tokens(pixels)[0], self.clip_embed(pixels)[1]
        tokens, embeds = (x.reshape(count, 2, *x.shape[1:]) for x in (tokens, embeds))
        return (tokens[:, 0], embeds[:, 0]), (tokens[:, 1:, 0], embeds[:, 1:])

    def text_tokens(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """T5 tokens; padding takes part, as published (no mask).

        Raises:
          InputError: the model has no text encoder.
        """
        if self.config.t5 is None:
            raise InputError("this model has no text encoder, so it takes no prompt")
        return self.t5(ids)

    def visual(
        self,
        local: tuple[Float[Array, "B L C1"], Float[Array, "B C2"]],
        tiles: tuple[Float[Array, "B N C1"], Float[Array, "B N C2"]],
    ) -> tuple[Float[Array, "B V P"], Float[Array, "B P"]]:
        """Visual tokens and c_pool from a local view and the views of N global tiles."""
        visual = prompts.visual_prompt(local[0], *tiles, self.config.visual_tokens)
        return (self.visual_mlp(visual) if self.config.visual_mlp else visual), prompts.pooled_prompt(*local)

    def condition(
        self, visual: Float[Array, "B V P"], pooled: Float[Array, "B P"], text: Float[Array, "B T D"] | None = None
    ) -> Condition:
        """Joins the visual and the text part."""
        config = self.config
        return Condition(prompts.dual_prompt(visual, text, config.mmdit.context_dim, config.text_tokens), pooled)

    # --- the flow ----------------------------------------------------------------------------------------------------

    def to_flow(self, latent: Float[Array, "B h w C"], lq_latent: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The variable that flows: the latent itself, or the scaled residual of E_dr's."""
        return latent if self.config.flow == "latent" else (latent - lq_latent) / self.residual_scale[...]

    def from_flow(self, z: Float[Array, "B h w C"], lq_latent: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The latent of a flow variable at sigma 0: the inverse of `to_flow`."""
        return z if self.config.flow == "latent" else lq_latent + z * self.residual_scale[...]

    def control(self, lq_latent: Float[Array, "B h w C"]) -> Float[Array, "B N D"]:
        """The LQ branch's tokens; they do not depend on the time, so once per photo."""
        return self.mmdit.lq_branch(lq_latent)

    def velocity(
        self,
        z: Float[Array, "B h w C"],
        sigma: Float[Array, "B"],
        condition: Condition,
        control: Float[Array, "B N D"],
    ) -> Float[Array, "B h w C"]:
        """dz/dsigma at `sigma` in (0, 1]."""
        return self.predict(z, sigma, condition, control)[0]

    def predict(
        self,
        z: Float[Array, "B h w C"],
        sigma: Float[Array, "B"],
        condition: Condition,
        control: Float[Array, "B N D"],
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Velocity and the estimate of z_0, one from the other by z_0 = z - sigma v."""
        output = self.mmdit(z, 1000 * sigma, condition.context, condition.pooled, control).astype(jnp.float32)
        sigma = jnp.maximum(sigma, MIN_SIGMA)[:, None, None, None]
        if self.config.prediction == "velocity":
            return output, z - sigma * output
        return (z - output) / sigma, output

    # --- on disk -----------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nnx.Module]:
        """The networks by the names of their files in a model folder."""
        names = ["autoencoder", "robust_encoder", "mmdit", "clip_tokens", "clip_embed"]
        names += ["t5"] * (self.config.t5 is not None) + ["visual_mlp"] * self.config.visual_mlp
        return {name: getattr(self, name) for name in names}
