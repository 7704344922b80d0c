"""ControlNet: a copy of a UNet's trunk that sees a picture and adds to the UNet's states.

    hint     picture -> convolutions, halving -> features as large as the latent, added to conv_in(latent)
    output   one 1x1 convolution per state of the trunk, zero at first: beside a trained UNet an untrained ControlNet
             changes nothing

Zhang et al., arXiv 2302.05543, section 3; layout and semantics of `ControlNetModel` of diffusers (Apache-2.0) and, with
image attention, of cswry/SeeSR.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from dpir_jax.errors import InputError
from dpir_jax.models.layers import conv, torch_uniform
from dpir_jax.models.precision import FLOAT32, Precision
from dpir_jax.models.unet import Control, Trunk, UNet, UNetConfig

zero = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """`unet`: sizes of the trunk; `hint_channels`: widths of the hint's convolutions, which halve between them."""

    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self) -> None:
        if not self.hint_channels:
            raise InputError("hint_channels needs at least one width")

    @property
    def spatial_factor(self) -> int:
        """Pixels of the picture per latent cell."""
        return 2 ** (len(self.hint_channels) - 1)

    @classmethod
    def sd2(cls) -> "ControlNetConfig":
        """For Stable Diffusion 2: 364 M parameters."""
        return cls()

    @classmethod
    def seesr(cls) -> "ControlNetConfig":
        """SeeSR's, with image attention: 489 M parameters."""
        return cls(UNetConfig.seesr())

    @classmethod
    def tiny(cls) -> "ControlNetConfig":
        """For tests."""
        return cls(UNetConfig.tiny(), hint_channels=(4, 6))


class Hint(nnx.Module):
    """The picture at the latent's resolution; does not see the time, so it is computed once per photo."""

    def __init__(self, config: ControlNetConfig, *, rngs: nnx.Rngs, precision: Precision, silent: bool) -> None:
        widths, make = config.hint_channels, {"rngs": rngs, "precision": precision}
        self.conv_in = conv(3, widths[0], 3, padding=1, **make)
        self.same = nnx.List(conv(width, width, 3, padding=1, **make) for width in widths[:-1])
        self.down = nnx.List(conv(i, o, 3, stride=2, padding=1, **make) for i, o in itertools.pairwise(widths))
        init = zero if silent else torch_uniform
        self.conv_out = conv(widths[-1], config.unet.block_out_channels[0], 3, padding=1, init=init, **make)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        x = jax.nn.silu(self.conv_in(image))
        for same, down in zip(self.same, self.down):
            x = jax.nn.silu(down(jax.nn.silu(same(x))))
        return self.conv_out(x)


class ControlNet(nnx.Module):
    """`hint = net.hint(image)` once, then `net(latent, timestep, context, hint)` at every step."""

    def __init__(
        self, config: ControlNetConfig, *, rngs: nnx.Rngs, precision: Precision = FLOAT32, silent: bool = True
    ) -> None:
        """`silent`: the zeros. A UNet that starts from nothing too has nothing to protect and learns sooner without."""
        make, init = {"rngs": rngs, "precision": precision}, zero if silent else torch_uniform
        self.config = config
        self.trunk = Trunk(config.unet, **make)
        self.hint = Hint(config, silent=silent, **make)
        self.out = nnx.List(conv(width, width, 1, init=init, **make) for width in config.unet.skip_channels)
        width = config.unet.block_out_channels[-1]
        self.middle_out = conv(width, width, 1, init=init, **make)

    def __call__(
        self,
        latent: Float[Array, "B h w C"],
        timestep: Num[Array, " B"],
        context: Float[Array, "B L J"],
        hint: Float[Array, "B h w D"],
        image_context: Float[Array, "B M I"] | None = None,
    ) -> Control:
        """What to add to a UNet's states.

        Args:
          latent: the noised, scaled latent.
          timestep: in [0, 1000).
          context: text tokens; not necessarily the UNet's.
          hint: `self.hint(image)`, the image RGB in [0, 1] and `config.spatial_factor` times as large as the latent.
          image_context: image tokens, for a network with image attention.

        Raises:
          InputError: hint and latent differ in size, or image attention without `image_context`.
        """
        if hint.shape[1:3] != latent.shape[1:3]:
            raise InputError(
                f"the hint has {hint.shape[1]}x{hint.shape[2]} cells, the latent {latent.shape[1]}x{latent.shape[2]}; "
                f"the picture must be {self.config.spatial_factor} times as large as the latent"
            )
        conditions = self.trunk.conditions(timestep, context, image_context)
        states = self.trunk(self.trunk.conv_in(latent) + hint, conditions)
        skips = tuple(out(state) for out, state in zip(self.out, states.skips, strict=True))
        return Control(skips, self.middle_out(states.middle))


def guess_strengths(control: Control) -> Float[np.ndarray, " n+1"]:
    """Guess mode's strengths for `Control.scaled`: from 0.1 at the first state to 1 in the middle, even in the log."""
    return np.logspace(-1, 0, len(control.skips) + 1, dtype=np.float32)


def start_from(control: ControlNet, unet: UNet) -> ControlNet:
    """The ControlNet with a copy of the UNet's trunk, as training starts; image attention that the UNet lacks stays.

    Raises:
      InputError: the trunks differ in size.
    """
    graphdef, state = nnx.split(control)
    flat = nnx.to_flat_state(state)
    wanted = {path: variable.get_value().shape for path, variable in flat}
    theirs = {("trunk", *path): variable for path, variable in nnx.to_flat_state(nnx.state(unet.trunk))}
    if any(wanted.get(path) != variable.get_value().shape for path, variable in theirs.items()):
        raise InputError("the ControlNet and the UNet differ in the sizes of their trunks")
    copied = [(path, v.replace(jnp.copy(theirs[path].get_value())) if path in theirs else v) for path, v in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(copied))
