"""What a user can set for a photo, checked."""

import dataclasses
import math

from dpir_jax.diffusion.schedule import MAX_STEPS
from dpir_jax.errors import InputError, check_choices
from dpir_jax.restore.color import METHODS, Method

MAX_MEGAPIXELS = 100.0


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a model does when it is not told otherwise; `config.json` holds a model's own under "restore".

    These are the published script's.
    """

    steps: int = 28
    guidance: float = 1.0
    color: Method = "wavelet"
    sampler: str = "euler"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a photo is restored.

    Attributes:
      scale: output size over input size; may be fractional. 4 if neither it nor `long_side` is given.
      long_side: the output's longer side in pixels, instead of `scale`.
      steps: sampling steps; None: the model's default.
      guidance: classifier-free guidance, 1 is none; None: the model's default.
      sampler: one that the model has; None: the model's default.
      seed: of the noise.
      prompt, negative_prompt: words for what is to be seen and what is not, for models with a text encoder.
      degradation_prompt: words for how the photo is degraded, for models that take them; None: what the model reads
        off the photo.
      fidelity: 0 restores freely, 1 holds on to the low-quality photo most (restoration guidance).
      tile: side of a tile in pixels of the output; None: the model's.
      color: colour correction; None: the model's default.
      max_megapixels: largest output allowed.
    """

    scale: float | None = None
    long_side: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    seed: int = 0
    prompt: str | None = None
    negative_prompt: str | None = None
    degradation_prompt: str | None = None
    fidelity: float = 0.0
    tile: int | None = None
    color: Method | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, words: str) -> None:
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {words}")

        def number(value: float | None) -> float:  # of the right kind and finite, or one that no check lets through
            ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            return value if ok else -1

        if self.scale is not None and self.long_side is not None:
            raise InputError("scale and long_side exclude each other; give one of them")
        require(self.scale is None or number(self.scale) > 0, "scale", "a number above 0")
        require(
            self.long_side is None or (_whole(self.long_side) and self.long_side >= 1), "long_side", "at least 1 pixel"
        )
        steps_fit = self.steps is None or (_whole(self.steps) and 1 <= self.steps <= MAX_STEPS)
        require(steps_fit, "steps", f"a whole number from 1 to {MAX_STEPS}")
        require(self.guidance is None or number(self.guidance) >= 0, "guidance", "a number of at least 0")
        require(_whole(self.seed) and 0 <= self.seed < 2**32, "seed", "a whole number from 0 to 4294967295")
        require(0 <= number(self.fidelity) <= 1, "fidelity", "between 0 and 1")
        require(self.tile is None or (_whole(self.tile) and self.tile >= 1), "tile", "at least 1 pixel")
        require(self.color in (None, *METHODS), "color", f"one of {', '.join(METHODS)}")
        require(number(self.max_megapixels) > 0, "max_megapixels", "a number above 0")

    def resolved(self, defaults: Defaults) -> "Settings":
        """With the model's defaults in the place of None."""
        filled = {name: value for name, value in dataclasses.asdict(defaults).items() if getattr(self, name) is None}
        if self.scale is None and self.long_side is None:
            filled["scale"] = 4.0
        return dataclasses.replace(self, **filled)

    def output_size(self, height: int, width: int, name: str) -> tuple[int, int]:
        """(height, width) of the output for a photo, called `name` in the error if that is too large."""
        scale = self.scale if self.long_side is None else self.long_side / max(height, width)
        tall, wide = (max(1, round(side * scale)) for side in (height, width))
        if tall * wide > self.max_megapixels * 1e6:
            raise InputError(
                f"{name} would become {wide}x{tall}, more than {self.max_megapixels:g} megapixels; "
                "choose a smaller scale or long side, or a higher limit"
            )
        return tall, wide


def _whole(value: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
