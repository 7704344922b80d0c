"""Orbax checkpoints of a run: atomic, written in the background, read back only by the run that they belong to."""

import base64
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dpir_jax.errors import InputError
from dpir_jax.training.config import Recipe
from dpir_jax.training.state import TrainState, fingerprint

FREE = (
    *("checkpoint_every", "keep", "preview_every", "log_every", "profile_at", "time_limit_minutes", "validation"),
    *("mesh", "sharding", "frozen_sharding", "remat", "unroll"),
)
FREE_DATA = ("workers", "threads", "prefetch", "cache_mb")  # these and the settings above change nothing but rounding
SAVED = (
    "step",
    "finite",
    "params",
    "ema",
    "optimizer",
    "adversary",
    "adversary_optimizer",
)  # frozen: `task.init` makes it


class Checkpoints:
    """The newest `keep` checkpoints under `folder`. A context manager: leaving it waits for the last write, unless an
    error ends one of several processes.

    With `keep` None they are only read, and the folder stays as it is: a run may be writing to it.

    A checkpoint holds the trained part of the state, and as JSON the recipe, the data position and what the state's
    arrays look like. A checkpoint is a folder named by its step; until it is complete it has another name.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self._folder, self._keep = Path(folder).absolute(), keep
        self._frozen: str | None = None

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        """Opened when it is first needed: it makes the folder."""
        policy, writes = ocp.training.preservation_policies.LatestN(self._keep), self._keep is not None
        return ocp.training.Checkpointer(self._folder, preservation_policy=policy, cleanup_tmp_directories=writes)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the processes write together: to wait for one that is gone, or waits for this one, has no end
        if "_checkpointer" in self.__dict__:
            with self._writable():
                self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, of those that were there at the start or `reload`."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def reload(self) -> None:
        """Looks again which checkpoints there are: another process may write them."""
        self._checkpointer.reload()

    def recipe(self) -> Recipe:
        """The recipe of the newest checkpoint."""
        return Recipe.from_json(self._about()["recipe"])

    def check(self, recipe: Recipe) -> None:
        """Raises `InputError` if there are checkpoints of a run that this recipe does not go on with."""
        if self._folder.is_dir() and self.latest is not None:
            self._check_recipe(self._about()["recipe"], recipe.to_json())

    def save(self, step: int, state: TrainState, recipe: Recipe, position: Any) -> None:
        """Starts to write; returns when the state may be donated. `position`: the data iterator's, JSON or bytes."""
        about = {
            "recipe": recipe.to_json(),
            "position": _encode(position),
            "arrays": _describe(state),
            "frozen": self._fingerprint(state),
        }
        with self._writable():  # also when the write before this one has failed
            self._checkpointer.save_checkpointables_async(
                step, {"state": _flat(state)}, custom_metadata=about, force=True
            )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._writable():
            self._checkpointer.wait()

    def restore(self, state: TrainState, recipe: Recipe) -> tuple[TrainState, Any]:
        """The newest state, placed like `state`, and the data position. Of `state` only the frozen arrays live on: the
        others are freed first, because devices that hold one state need not hold two.

        Raises:
          InputError: the checkpoint is of another recipe, network or frozen weights, or is damaged.
        """
        about = self._about()
        self._check_recipe(about["recipe"], recipe.to_json())
        _check_arrays(about["arrays"], _describe(state))
        if about["frozen"] != self._fingerprint(state):
            raise InputError(
                f"{self._checkpointer.directory}: the run was trained beside other frozen weights than these; "
                "start it from the folder that it began with, or take another --workdir"
            )
        leaves = _flat(state)
        abstract = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in leaves.items()}
        for leaf in leaves.values():
            leaf.delete()
        with self._readable():
            values = self._checkpointer.load_checkpointables(self.latest, {"state": abstract})["state"]
        tree = {name: getattr(state, name) for name in SAVED}
        names, structure = list(leaves), jax.tree.structure(tree)
        restored = jax.tree.unflatten(structure, [values[name] for name in names])
        return TrainState(**restored, frozen=state.frozen), _decode(about["position"])

    def _fingerprint(self, state: TrainState) -> str:
        self._frozen = self._frozen or fingerprint(state.frozen)  # frozen weights do not change within a run
        return self._frozen

    def _about(self) -> dict[str, Any]:
        with self._readable():
            return self._checkpointer.checkpointables_metadata(self.latest).custom_metadata

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            folder = self._checkpointer.directory / str(self.latest)
            if not folder.is_dir():
                raise InputError(
                    f"the run removed the checkpoint {folder} while it was being read; try again, or let the run keep "
                    "more of them (config.keep)"
                ) from error
            raise InputError(
                f"the checkpoint {folder} cannot be read; remove it to go on from the one before"
            ) from error

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write a checkpoint to {self._checkpointer.directory}: {error}") from error

    def _check_recipe(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """The settings may differ that change no step done so far: `FREE`, `FREE_DATA`, and while the learning rate has
        not begun to fall in either recipe, where it does and the run ends."""
        old = Recipe.from_json(old).to_json()  # settings that are newer than the checkpoint have their defaults
        old_train, new_train = Recipe.from_json(old).train, Recipe.from_json(new).train
        done = self.latest
        same_so_far = done <= min(old_train.decay_start, new_train.decay_start)
        free = FREE + (("steps", "schedule", "decay_steps", "end_lr") if same_so_far else ())
        for sub in (old, new):
            sub["data"] = {name: value for name, value in sub["data"].items() if name not in FREE_DATA}
        for name in sorted(set(old) | set(new)):
            if name not in free and old.get(name) != new.get(name):
                field, before, now = _first_difference(name, old.get(name), new.get(name))
                raise InputError(
                    f"config.{field} is {now!r}, but the run in {self._checkpointer.directory.parent} "
                    f"has {before!r} at step {done}; use its setting or another --workdir"
                )


def _flat(state: TrainState) -> dict[str, jax.Array]:
    tree = {name: getattr(state, name) for name in SAVED}
    return {
        jax.tree_util.keystr(path, simple=True, separator=":"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(state: TrainState) -> dict[str, list]:
    return {name: [str(leaf.dtype), *leaf.shape] for name, leaf in _flat(state).items()}


def _check_arrays(old: dict[str, list], new: dict[str, list]) -> None:
    for name in sorted(set(old) | set(new)):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if before != now:
            raise InputError(
                f"the checkpoint is of another network: {name} is {before} there and {now} here; "
                "train the network that it is of, or take another --workdir"
            )


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                return _first_difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, old, new


def _encode(position: Any) -> Any:
    return {"bytes": base64.b64encode(position).decode()} if isinstance(position, bytes) else {"json": position}


def _decode(position: Any) -> Any:
    return base64.b64decode(position["bytes"]) if "bytes" in position else position["json"]
