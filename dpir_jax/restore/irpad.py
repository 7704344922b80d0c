"""Reading a photo's degradation: `dpir_jax.load_irpad("irpad-nano").read("photo.jpg").prompt`."""

from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from dpir_jax.models.irpad import IRPAD
from dpir_jax.pretrained import find_model
from dpir_jax.restore import compilation_cache
from dpir_jax.restore.sources import PhotoLike, as_photo
from dpir_jax.systems.irpad import Degradation, photo_looks, read_irpad

DEFAULT = "irpad-nano"


class DegradationReader:
    """IRPAD, ready to read photos. Every photo is seen through crops of one shape, so nothing compiles per photo."""

    def __init__(self, network: IRPAD) -> None:
        self.network, self.config = network, network.config

    def probabilities(self, looks: Float[np.ndarray, "B N S S 3"]) -> Float[np.ndarray, "B types intervals"]:
        """Of each interval of each type, for the looks (`systems.irpad.photo_looks`) at some regions."""
        return np.asarray(_probabilities(self.network, looks))

    def read(self, photo: PhotoLike) -> Degradation:
        """How a photo is degraded: a file, a PIL picture, or an array `[H, W, 3]`, uint8 or in [0, 1].

        Raises:
          InputError: not a photo, unreadable, too small or too large.
        """
        pixels = as_photo(photo).pixels
        regions = photo_looks(pixels, self.config.crop, self.config.looks)
        read = [self.probabilities(looks[None])[0] for looks in regions]
        return Degradation.of(self.config, np.mean(read, 0))


@jax.jit
def _probabilities(network: IRPAD, looks: Float[Array, "B N S S 3"]) -> Float[Array, "B types intervals"]:
    return network(looks)


def load_irpad(name_or_folder: str | Path = DEFAULT) -> DegradationReader:
    """An embedded IRPAD, or that of a model folder.

    Raises:
      InputError: there is no such model, it is damaged, or it is another system.
    """
    compilation_cache.enable()
    return DegradationReader(read_irpad(find_model(name_or_folder)))
