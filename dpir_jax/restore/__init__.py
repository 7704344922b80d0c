"""Photos in, photos out: sampling in tiles, colour, the run record."""

from dpir_jax.restore.restorer import Restorer, Result, Settings, load

__all__ = ["Restorer", "Result", "Settings", "load"]
