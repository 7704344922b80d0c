"""From a training checkpoint to a model folder."""

from pathlib import Path

from dpir_jax.errors import InputError
from dpir_jax.parallel.mesh import MeshConfig, make_mesh
from dpir_jax.training.checkpoints import Checkpoints
from dpir_jax.training.state import init_state


def export(workdir: Path, out: Path, *, raw: bool = False) -> int:
    """Writes the newest checkpoint of `workdir` as a model folder `out`; returns its step.

    The averaged weights are exported, or with `raw` those of the last step.

    Raises:
      InputError: there is no checkpoint, or it does not fit the task.
    """
    folder = Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no training run: there is no folder {folder}")
    with Checkpoints(folder) as checkpoints:
        if checkpoints.latest is None:
            raise InputError(f"the training run in {workdir} has no checkpoint yet")
        recipe = checkpoints.recipe()
        task = recipe.build_task()
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1))  # the state need not fit on one device
        state, networks, _ = init_state(task, recipe.train, mesh)
        checkpoints.reload()  # the run may have gone on meanwhile, and have removed what was the newest
        step = checkpoints.latest
        state, _ = checkpoints.restore(state, recipe)
    weights = state.params if raw else {k: v.astype(state.params[k].dtype) for k, v in state.ema.items()}
    task.export(networks.merge(weights, state.adversary, state.frozen), Path(out))
    return step
