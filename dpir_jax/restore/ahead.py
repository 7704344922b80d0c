"""A step of sampling compiled ahead of time: whether a system can restore photos on a chip that is not there, how fast.

The program is the restorer's own step on a group of tiles, with shapes in place of arrays, in bfloat16. Restoring takes
one chip, more chips restore more photos, so nothing is sent. Counted are the networks that sampling needs, prompts and
controls; guidance takes a step twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.platform import use_platform
from dpir_jax.models.precision import BFLOAT16
from dpir_jax.parallel.compiled import Program, report
from dpir_jax.parallel.mesh import make_mesh
from dpir_jax.parallel.sharding import replicated
from dpir_jax.parallel.topologies import Topology, devices
from dpir_jax.restore import restorer
from dpir_jax.restore.dalpsr import RestoringDaLPSR, dalpsr_defaults, scene_shapes
from dpir_jax.restore.dpir import RestoringDPIR, Scene
from dpir_jax.restore.settings import Defaults
from dpir_jax.restore.system import Frozen, System
from dpir_jax.systems.dalpsr import DaLPSR, DaLPSRConfig
from dpir_jax.systems.dpir import DPIR, DPIRConfig

TILES = 4  # that the restorer takes at a time on an accelerator


def compile_sampling(
    config: DPIRConfig | DaLPSRConfig, defaults: Defaults, topology: Topology, tiles: int = TILES
) -> dict[str, Any]:
    """Compiles a step for one chip of a slice; the report, as JSON values (docs/scaling.md explains it).

    Args:
      config: the system.
      defaults: its own settings for restoring: steps, guidance, sampler.
      topology: the slice.
      tiles: at a time, each of the system's own size.

    Raises:
      InputError: libtpu is missing, or the system has no such sampler.
    """
    if tiles < 1:
        raise InputError(f"the batch per chip is {tiles}; it must be at least 1")
    with use_platform("tpu"):
        program = abstract_sampling(config, defaults, devices(topology)[0], tiles)
        found, _ = report(program, topology.chip)
    return {"fits": found["fits"], "topology": str(topology), "name": topology.name, "steps": defaults.steps} | found


def abstract_sampling(
    config: DPIRConfig | DaLPSRConfig, defaults: Defaults, device: jax.Device, tiles: int = TILES
) -> Program:
    """The step on a device, which may be one of a topology; it runs `steps` times, or twice as often under guidance."""
    mesh = make_mesh(devices=[device])
    place, schedule = replicated(mesh), None
    if isinstance(config, DPIRConfig):
        system = RestoringDPIR(_shapes(DPIR, config, place, ("mmdit",)))
        scene: Any = Scene(
            *(jnp.zeros((0, width)) for width in (config.clip_tokens.width, config.clip_embed.projection)), None, None
        )
    else:
        system = RestoringDaLPSR(_shapes(DaLPSR, config, place, ("unet", "controlnet")), None, None)
        scene = scene_shapes(system.dalpsr)
        defaults, schedule = dalpsr_defaults(config, defaults, None)
    frozen, prompts = Frozen.of(system), _placed(_prompts(system, scene, tiles), place)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
    z = jax.ShapeDtypeStruct((tiles, system.tile, system.tile, system.channels), jnp.float32, sharding=place)
    conditions = (z, prompts, scalar, scalar)
    if isinstance(schedule, DDPMSchedule):
        row = jax.eval_shape(lambda: jax.tree.map(lambda column: column[0], schedule.table(defaults.sampler, 1)))
        function, arguments = restorer._estimate, (schedule, frozen, z, _placed(row, place), *conditions)
    else:
        function, arguments = restorer._velocity, (frozen, z, scalar, *conditions)
    kinds = {"parameters": frozen.leaves, "batch": (z, z, prompts)}
    turns = 1 if defaults.guidance == 1 else 2
    return Program(function, arguments, kinds, mesh, "dp", tiles, defaults.steps * turns)


def _shapes(kind: type, config: Any, place: NamedSharding, names: tuple[str, ...]) -> Any:
    """A system in shapes; the networks of these names, and what belongs to none, have a place."""
    system = nnx.eval_shape(lambda: kind(config, rngs=Keys(0), precision=BFLOAT16))
    for name in (*names, "residual_scale"):
        setattr(system, name, _placed(getattr(system, name), place))
    return system


def _placed(tree: Any, place: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def _prompts(system: System, scene: Any, tiles: int) -> tuple[Any, Any]:
    """Shapes of the conditions and controls of tiles."""
    side = system.tile * system.latent_factor
    pixels = jax.ShapeDtypeStruct((tiles, side, side, 3), jnp.float32)
    latent = jax.ShapeDtypeStruct((tiles, system.tile, system.tile, system.channels), jnp.float32)
    conditions = jax.eval_shape(lambda system, *given: system.condition(*given), system, scene, pixels)
    return conditions, jax.eval_shape(lambda system, latent: system.control(latent), system, latent)
