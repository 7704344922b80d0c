"""Networks for tests: filled with random numbers without compiling their initialisers, and counted without arrays."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert_weights.engine import Rule, leaves, torch_pieces
from dpir_jax.models.attention import use_attention_backend
from dpir_jax.models.layers import Keys
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig, makers


def random_network(make: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """`make()` with every float drawn from N(0, 0.1) around 0, or around 1 where it is the scale of a norm."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = float("scale" in jax.tree_util.keystr(path))
        return jnp.asarray(centre + 0.1 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, nnx.eval_shape(make))


def random_dalpsr(config: DaLPSRConfig, seed: int = 0) -> DaLPSR:
    """A DaLPSR with random networks; made one by one, as tracing grows with the square of the number of parameters."""
    parts = {
        name: random_network(lambda make=make: make(Keys(0)), seed + i)
        for i, (name, make) in enumerate(makers(config).items())
    }
    return DaLPSR(config, networks=parts)


def parameter_count(make: Callable[[], nnx.Module]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in leaves(nnx.eval_shape(make)).values())


def published_keys(make: Callable[[], nnx.Module], rules: Iterable[Rule]) -> tuple[str, ...]:
    """The PyTorch keys that a table wants for a network."""
    return tuple(torch_pieces(leaves(nnx.eval_shape(make)), rules))


def check_axes(make: Callable[[], nnx.Module]) -> None:
    """Every parameter has one axis letter per dimension; stacked ones have the layer in front."""
    for path, variable in nnx.to_flat_state(nnx.state(nnx.eval_shape(make))):
        stacked = len(variable.get_value().shape) - len(variable.get_metadata()["axes"])
        assert stacked == int(not {"blocks", "rest"}.isdisjoint(path)), path


def assert_same_tensors(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert value.dtype == expected[key].dtype
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def quick_jit(function: Callable) -> Callable:
    """`jax.jit` for a network of many different layers that runs once or twice: compiles in half the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def with_plain_attention(check: Callable) -> Callable:
    """`check` with the reference backend: a loop over heads in each of many places compiles slowly."""

    @functools.wraps(check)
    def run(*args: object) -> None:
        with use_attention_backend("xla"):
            check(*args)

    return run
