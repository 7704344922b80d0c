"""What a degradation may do: ranges and probabilities, and the published sets of them."""

import dataclasses

from dpir_jax.degradation.jpeg import Table
from dpir_jax.errors import InputError, check_choices

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blur, resize, noise, JPEG: ranges are uniform. Defaults are the first stage of Real-ESRGAN x4plus."""

    blur_prob: float = 1.0
    kernel_sizes: tuple[int, int] = (7, 21)  # odd sides of a kernel, uniform
    sinc_prob: float = 0.1  # of a blur: a sinc kernel; else one of `kernel_probs`
    kernel_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # Gaussian, generalised, plateau: iso, aniso
    sigma: Range = (0.2, 3.0)  # pixels
    beta_generalized: Range = (0.5, 4.0)  # half of the draws lie below 1, half above
    beta_plateau: Range = (1.0, 2.0)
    resize_probs: tuple[float, float, float] = (0.2, 0.7, 0.1)  # enlarge, shrink, keep
    resize_range: Range = (0.15, 1.5)
    gaussian_prob: float = 0.5  # else Poisson
    gaussian_sigma: Range = (1.0, 30.0)  # of 255
    poisson_scale: Range = (0.05, 3.0)
    grey_prob: float = 0.4
    jpeg_quality: Range = (30.0, 95.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One degradation model. Build one with a named constructor; change fields with `dataclasses.replace`.

    Attributes:
      first: the first stage, or None for a first-order model.
      second: the stage that ends at the low resolution; its resize factors are relative to it.
      final_sinc_prob: probability that the last filter is a sinc (else nothing).
      scale: the high resolution over the low one.
      usm: whether the picture is sharpened before it is degraded (the pair's target may be `sharpen(hq)` too).
      jpeg_table: "published", "standard" or "libjpeg"; see `dpir_jax.degradation.jpeg`.
    """

    first: Stage | None
    second: Stage
    final_sinc_prob: float = 0.8
    scale: int = 4
    usm: bool = True
    jpeg_table: Table = "published"

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise InputError(f"scale must be at least 1, not {self.scale}")
        check_choices(self)

    @property
    def keeps_size(self) -> bool:
        """Whether no step can change the size, so that no resampling need be compiled."""
        return self.first is None and self.scale == 1 and self.second.resize_range == (1.0, 1.0)

    @classmethod
    def realesrgan(cls, **changes: object) -> "Recipe":
        """Real-ESRGAN x4plus (`train_realesrgan_x4plus.yml`), the heavy one; OSEDiff, HYPIR and SeeSR use it too."""
        second = Stage(
            blur_prob=0.8,
            sigma=(0.2, 1.5),
            resize_probs=(0.3, 0.4, 0.3),
            resize_range=(0.3, 1.2),
            gaussian_sigma=(1.0, 25.0),
            poisson_scale=(0.05, 2.5),
        )
        return dataclasses.replace(cls(Stage(), second), **changes)

    @classmethod
    def light(cls, **changes: object) -> "Recipe":
        """StableSR's milder ranges; PASD uses them with the kernels of `realesrgan`."""
        beta = {"beta_generalized": (0.5, 2.0), "beta_plateau": (1.0, 1.5)}
        first = Stage(
            sigma=(0.2, 1.5),
            resize_range=(0.3, 1.5),
            gaussian_sigma=(1.0, 15.0),
            poisson_scale=(0.05, 2.0),
            jpeg_quality=(60.0, 95.0),
            **beta,
        )
        second = Stage(
            blur_prob=0.5,
            sigma=(0.2, 1.0),
            resize_probs=(0.3, 0.4, 0.3),
            resize_range=(0.6, 1.2),
            gaussian_sigma=(1.0, 12.0),
            poisson_scale=(0.05, 1.0),
            jpeg_quality=(60.0, 100.0),
            **beta,
        )
        return dataclasses.replace(cls(first, second), **changes)

    @classmethod
    def first_order(cls, **changes: object) -> "Recipe":
        """Blur, downsampling, noise, JPEG, once each, with the ranges of Real-ESRGAN's first stage.

        The drawn strengths are then the whole truth about a picture, which is what a severity label needs.
        """
        stage = Stage(resize_probs=(0.0, 0.0, 1.0))
        return dataclasses.replace(cls(None, stage, final_sinc_prob=0.0, usm=False), **changes)

    @classmethod
    def native(cls, **changes: object) -> "Recipe":
        """A round Gaussian blur, Gaussian noise, JPEG, at the photo's own resolution, each over its full range.

        Kernels are always large enough for their sigma, so that the three drawn strengths alone decide.
        """
        stage = Stage(
            sinc_prob=0.0,
            kernel_probs=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            kernel_sizes=(21, 21),
            resize_probs=(0.0, 0.0, 1.0),
            resize_range=(1.0, 1.0),
            gaussian_prob=1.0,
        )
        return dataclasses.replace(cls(None, stage, final_sinc_prob=0.0, usm=False, scale=1), **changes)

    @classmethod
    def named(cls, name: str, **changes: object) -> "Recipe":
        """The recipe of that name, `InputError` if there is none."""
        makers = {
            "realesrgan": cls.realesrgan,
            "light": cls.light,
            "first_order": cls.first_order,
            "native": cls.native,
        }
        if name not in makers:
            raise InputError(f"unknown recipe {name!r}; choose one of {', '.join(makers)}")
        return makers[name](**changes)
