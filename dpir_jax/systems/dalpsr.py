"""DaLPSR (arXiv 2406.16477): Stable Diffusion 2 with a ControlNet, told how a photo is degraded and what is in it.

    c_sem = text(caption),  c_deg = text("Deblur with sigma 0.5~0.75, Denoise with ...")     one frozen text tower
    r     = image encoder(x_lq)                                                              tokens of the photo itself
    u     = ControlNet(z_t, t, c_sem, hint(x_lq), r)                                         caption -> ControlNet
    out   = UNet(z_t, t, c_deg, u)                                                           degradation -> UNet

Which text goes where is the paper's figure; `routing` has two others. What `out` is, and on which path z_t lies, is the
`objective`: noise or velocity on DDPM's, or the velocity of a rectified flow. Sampling along DDPM's path starts at
the low-quality latent, noised to the last training level (SeeSR, arXiv 2311.16518).

With a rectified flow two more switches, as in `systems.dpir`: `flow="residual"` lets the flow run on what the photo's
encoder (E, or a degradation-robust E_dr) left undone, the UNet looking at its latent, noised by as much as that errs;
`prediction="x0"` reads the network's output as z_0 itself. A system whose UNet's last layer is zero
(`models.layers.silence`) then returns what that encoder sees, D(E(x_lq)), exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.errors import InputError, check_choices
from dpir_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from dpir_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig, clip_preprocess
from dpir_jax.models.controlnet import ControlNet, ControlNetConfig
from dpir_jax.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig, PatchEncoder
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.ram import RAM, RAMConfig, ram_preprocess
from dpir_jax.models.unet import UNet, UNetConfig
from dpir_jax.systems.dpir import MIN_SIGMA, Constant

POSITIVE = "clean, high-resolution, 8k"  # SeeSR's additions
NEGATIVE = "dotted, noise, blur, lowres, smooth"


@dataclasses.dataclass(frozen=True)
class DaLPSRConfig:
    """Networks of the system and how they are joined.

    Attributes:
      autoencoder: E and D. `robust_encoder`: E_dr for the low-quality photo; None: E.
      unet, controlnet: either may have image attention (`image_context_dim`), on the tokens of `image_encoder`.
      text: the tower of both texts.
      image_encoder: of the low-quality photo, RAM or DAPE as in SeeSR, or a CLIP vision tower; None without.
      image_view: whether it looks at the whole photo (SeeSR) or at the tile.
      routing: "split" (caption to the ControlNet, degradation to the UNet), "both" (both texts to both) or "caption"
        (SeeSR: the caption to both, no degradation prompt).
      objective: "epsilon" or "velocity" on DDPM's path, or "flow".
      flow, prediction: of the objective "flow", see above.
      start: along DDPM's path from the noised low-quality latent ("lq") or from "noise".
      types, intervals: of the degradation prompt, see `systems.irpad`.
      caption_windows: rows of the text tower that a caption may fill.
      added_prompt: put behind every caption. `negative_prompt`: the unconditional text, unless one is given.
      tile: side in latent cells.
    """

    autoencoder: AutoencoderConfig | PatchAutoencoderConfig
    unet: UNetConfig
    controlnet: ControlNetConfig
    text: CLIPTextConfig
    robust_encoder: PatchAutoencoderConfig | None = None
    image_encoder: RAMConfig | CLIPVisionConfig | None = None
    image_view: Literal["photo", "tile"] = "photo"
    routing: Literal["split", "both", "caption"] = "split"
    objective: Literal["epsilon", "velocity", "flow"] = "epsilon"
    flow: Literal["latent", "residual"] = "latent"
    prediction: Literal["velocity", "x0"] = "velocity"
    start: Literal["lq", "noise"] = "lq"
    types: tuple[str, ...] = ("blur", "noise", "jpeg")
    intervals: int = 4
    caption_windows: int = 4
    added_prompt: str = POSITIVE
    negative_prompt: str = NEGATIVE
    tile: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        if self.objective != "flow" and (self.flow, self.prediction) != ("latent", "velocity"):
            raise InputError(f"flow {self.flow!r} and prediction {self.prediction!r} need the objective 'flow'")
        if self.autoencoder.latent_channels != self.unet.in_channels:
            raise InputError(f"autoencoder.latent_channels must be unet.in_channels ({self.unet.in_channels})")
        if self.controlnet.spatial_factor != self.latent_factor:
            raise InputError(
                f"controlnet.hint_channels reduces {self.controlnet.spatial_factor} times, the autoencoder "
                f"{self.latent_factor} times"
            )
        for name, net in (("unet", self.unet), ("controlnet.unet", self.controlnet.unet)):
            if net.context_dim != self.text.width:
                raise InputError(f"{name}.context_dim is {net.context_dim}, but text.width {self.text.width}")
            if net.image_context_dim not in (None, self.image_width):
                raise InputError(
                    f"{name}.image_context_dim is {net.image_context_dim}; image_encoder gives {self.image_width}"
                )
        if self.caption_windows < 1:
            raise InputError(f"caption_windows is {self.caption_windows}; it must be at least 1")
        if self.tile % self.tile_multiple:
            raise InputError(f"tile is {self.tile}; it must be a multiple of {self.tile_multiple}")

    @classmethod
    def sd2(cls) -> "DaLPSRConfig":
        """The paper's figure on Stable Diffusion 2 base: frozen UNet, image tokens (DAPE's) to the ControlNet alone."""
        return cls(
            autoencoder=AutoencoderConfig.sd2(),
            unet=UNetConfig.sd2(),
            controlnet=ControlNetConfig.seesr(),
            text=CLIPTextConfig.sd2(),
            image_encoder=RAMConfig.dape(),
        )

    @classmethod
    def seesr(cls) -> "DaLPSRConfig":
        """SeeSR: image tokens and the caption to both networks."""
        return dataclasses.replace(cls.sd2(), unet=UNetConfig.seesr(), routing="caption")

    @classmethod
    def nano(cls) -> "DaLPSRConfig":
        """The embedded model: dpir-nano's autoencoder, the rest small and trained together; as in the paper no E_dr."""
        unet = UNetConfig.nano()
        return cls(
            autoencoder=PatchAutoencoderConfig.nano(),
            unet=unet,
            controlnet=ControlNetConfig(dataclasses.replace(unet, image_context_dim=64), hint_channels=(8, 16, 32)),
            text=CLIPTextConfig.nano(),
            image_encoder=CLIPVisionConfig.nano(),
            image_view="tile",
            objective="flow",
            flow="residual",
            prediction="x0",
            caption_windows=1,
            added_prompt="",
            negative_prompt="",
            tile=32,
        )

    @classmethod
    def tiny(cls) -> "DaLPSRConfig":
        """For tests: the nano system at the smallest size."""
        unet = dataclasses.replace(UNetConfig.tiny(), image_context_dim=None, context_dim=24)
        return cls(
            autoencoder=PatchAutoencoderConfig(latent_channels=4),
            robust_encoder=PatchAutoencoderConfig(latent_channels=4, widths=(8, 8), depths=(1, 1)),
            unet=unet,
            controlnet=ControlNetConfig(dataclasses.replace(unet, image_context_dim=24), hint_channels=(4, 6, 6)),
            text=dataclasses.replace(CLIPTextConfig.tiny(), max_length=16, vocabulary=40, end_token=2),
            image_encoder=CLIPVisionConfig.tiny(),
            image_view="tile",
            objective="flow",
            flow="residual",
            prediction="x0",
            caption_windows=2,
            added_prompt="",
            negative_prompt="",
            tile=8,
        )

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell."""
        return self.autoencoder.spatial_factor

    @property
    def tile_multiple(self) -> int:
        """What a tile's side in latent cells must divide by: the UNet halves it this often."""
        return 2 ** (len(self.unet.block_out_channels) - 1)

    @property
    def image_width(self) -> int | None:
        """Width of the image tokens."""
        if self.image_encoder is None:
            return None
        return self.image_encoder.embed_width if isinstance(self.image_encoder, RAMConfig) else self.image_encoder.width

    @property
    def image_size(self) -> int | None:
        """Side in pixels of what the image encoder sees."""
        encoder = self.image_encoder
        return encoder and (encoder.swin.image_size if isinstance(encoder, RAMConfig) else encoder.image_size)

    @property
    def reads_degradation(self) -> bool:
        """Whether a degradation prompt goes anywhere."""
        return self.routing != "caption"

    @property
    def schedule(self) -> DDPMSchedule | None:
        """DDPM's, for its objectives."""
        return None if self.objective == "flow" else DDPMSchedule(self.objective)


class Prompt(NamedTuple):
    """What the networks look at beside the latent: text tokens of the UNet and of the ControlNet `[B, L, D]`, and image
    tokens `[B, M, I]` or None."""

    unet: Array
    control: Array
    image: Array | None


Maker = Callable[[nnx.Rngs], nnx.Module]


def makers(config: DaLPSRConfig, precision: Precision = FLOAT32) -> dict[str, Maker]:
    """How each network is made, by its name in the system and in the model folder."""

    def maker(kind: type, settings: object) -> Maker:
        return lambda rngs: kind(settings, rngs=rngs, precision=precision)

    small = isinstance(config.autoencoder, PatchAutoencoderConfig)
    found = {
        "autoencoder": maker(PatchAutoencoder if small else Autoencoder, config.autoencoder),
        "unet": maker(UNet, config.unet),
        "controlnet": maker(ControlNet, config.controlnet),
        "text_encoder": maker(CLIPText, config.text),
    }
    if config.robust_encoder is not None:
        found["robust_encoder"] = maker(PatchEncoder, config.robust_encoder)
    if config.image_encoder is not None:
        kind = RAM if isinstance(config.image_encoder, RAMConfig) else CLIPVision
        found["image_encoder"] = maker(kind, config.image_encoder)
    return found


class DaLPSR(nnx.Module):
    """All networks of the system. The methods are pure, take fixed shapes and can be jitted one by one."""

    def __init__(
        self,
        config: DaLPSRConfig,
        *,
        rngs: nnx.Rngs | None = None,
        precision: Precision = FLOAT32,
        networks: Mapping[str, nnx.Module] | None = None,
    ) -> None:
        """Makes the networks with `rngs` and `precision`, or takes `networks`, by their names in `makers`."""
        self.config = config
        for name, make in makers(config, precision).items():
            setattr(self, name, make(rngs) if networks is None else networks[name])
        self.residual_scale = Constant(jnp.ones(config.unet.in_channels), axes="_")

    # --- pictures and latents ----------------------------------------------------------------------------------------

    def encode_hq(self, image: Float[Array, "B H W 3"], key: jax.Array | None = None) -> Float[Array, "B h w C"]:
        """Scaled latent of a good picture in [0, 1]: a sample with a key, else the mode."""
        return self.scaled(*self.autoencoder.encode(2 * image - 1), key)

    def encode_lq(self, image: Float[Array, "B H W 3"], key: jax.Array | None = None) -> Float[Array, "B h w C"]:
        """Scaled latent of a bad picture in [0, 1] at the target size, by E_dr where there is one."""
        robust = self.config.robust_encoder is not None
        return self.scaled(*(self.robust_encoder if robust else self.autoencoder.encode)(2 * image - 1), key)

    def encode_pair(
        self, lq: Float[Array, "B H W 3"], hq: Float[Array, "B H W 3"], key: jax.Array | None = None
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """`encode_lq(lq)` and `encode_hq(hq, key)`. Where one encoder does both it runs as a loop, compiled once."""
        if self.config.robust_encoder is not None:
            return self.encode_lq(lq), self.encode_hq(hq, key)
        means, logvars = jax.lax.map(lambda image: self.autoencoder.encode(2 * image - 1), jnp.stack([lq, hq]))
        return self.scaled(means[0], logvars[0], None), self.scaled(means[1], logvars[1], key)

    def scaled(
        self, mean: Float[Array, "B h w C"], logvar: Float[Array, "B h w C"], key: jax.Array | None = None
    ) -> Float[Array, "B h w C"]:
        """The scaled latent of an encoder's output: a sample with a key, else the mode."""
        latent = mean if key is None else mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape, mean.dtype)
        return (latent - self.config.autoencoder.shift_factor) * self.config.autoencoder.scaling_factor

    def decode(self, latent: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Picture in about [0, 1] (not clipped) of a scaled latent."""
        config = self.config.autoencoder
        return self.autoencoder.decode(latent / config.scaling_factor + config.shift_factor) / 2 + 0.5

    def to_flow(self, latent: Float[Array, "B h w C"], lq_latent: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """The variable that is diffused: the latent itself, or the scaled residual of E_dr's."""
        return latent if self.config.flow == "latent" else (latent - lq_latent) / self.residual_scale[...]

    def from_flow(
        self, z: Float[Array, "B h w C"], lq_latent: Float[Array, "B h w C"] | None
    ) -> Float[Array, "B h w C"]:
        """The latent of a clean diffused variable: the inverse of `to_flow`."""
        return z if self.config.flow == "latent" else lq_latent + z * self.residual_scale[...]

    # --- what the networks look at -----------------------------------------------------------------------------------

    def read(self, token_ids: Int[Array, "B W L"]) -> Float[Array, "B W*L D"]:
        """The states of all rows of each text, side by side."""
        batch, rows, length = token_ids.shape
        states = self.text_encoder(token_ids.reshape(-1, length)).last_hidden_state
        return states.reshape(batch, rows * length, -1)

    def route(
        self, caption: Float[Array, "B L D"], degradation: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B N D"]]:
        """Text tokens for the UNet and for the ControlNet."""
        if self.config.routing == "split":
            return degradation, caption
        if self.config.routing == "caption":
            return caption, caption
        both = jnp.concatenate([caption, degradation], axis=1)
        return both, both

    def look(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B M I"] | None:
        """Image tokens of low-quality pictures in [0, 1]; None without an image encoder."""
        config = self.config.image_encoder
        if config is None:
            return None
        if isinstance(config, RAMConfig):
            return self.image_encoder.embed(ram_preprocess(image, config.swin.image_size))
        return self.image_encoder(clip_preprocess(image, config.image_size))[0]

    # --- prediction --------------------------------------------------------------------------------------------------

    def output(
        self,
        z: Float[Array, "B h w C"],
        timestep: Num[Array, "B"],
        prompt: Prompt,
        hint: Float[Array, "B h w D"],
    ) -> Float[Array, "B h w C"]:
        """What the UNet says under its ControlNet; `hint`: `self.controlnet.hint(x_lq)`, once per picture."""

        def image(config: UNetConfig) -> Array | None:
            return None if config.image_context_dim is None else prompt.image

        sizes = self.config.controlnet.unet, self.config.unet
        control = self.controlnet(z, timestep, prompt.control, hint, image(sizes[0]))
        return self.unet(z, timestep, prompt.unet, image(sizes[1]), control)

    def predict(
        self,
        z: Float[Array, "B h w C"],
        sigma: Float[Array, "B"],
        prompt: Prompt,
        hint: Float[Array, "B h w D"],
        lq_latent: Float[Array, "B h w C"] | None,
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        """Along the flow: velocity dz/dsigma and the estimate of z_0, one from the other by z_0 = z - sigma v.

        `lq_latent`: of the photo, for a residual flow.
        """
        output = self.output(self.from_flow(z, lq_latent), 1000 * sigma, prompt, hint)
        sigma = jnp.maximum(sigma, MIN_SIGMA)[:, None, None, None]
        if self.config.prediction == "velocity":
            return output, z - sigma * output
        return (z - output) / sigma, output

    # --- on disk -----------------------------------------------------------------------------------------------------

    def networks(self) -> dict[str, nnx.Module]:
        """The networks by the names of their files in a model folder."""
        return {name: getattr(self, name) for name in makers(self.config)}
