"""The kind of hardware that a network is traced for, where its arithmetic depends on it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def use_platform(name: str) -> Iterator[None]:
    """Says that what is traced inside is compiled for `name` ("cpu", "gpu", "tpu"), not for JAX's default device."""
    token = _traced_for.set(name)
    try:
        yield
    finally:
        _traced_for.reset(token)


def current_platform() -> str:
    """ "cpu", "gpu" or "tpu": the one of `use_platform`, else that of JAX's default device."""
    device = jax.config.jax_default_device  # a device, the name of a platform, or None: then the first of all devices
    return _traced_for.get() or getattr(device, "platform", device) or jax.default_backend()
