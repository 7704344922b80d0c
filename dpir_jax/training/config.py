"""Recipes: `configs/NAME.py[:stage]` files of ml_collections, with typed overrides, checked before anything runs.

A recipe is a file with `get_config(stage=...) -> ConfigDict`. Its top-level fields are those of `TrainConfig` and:

    task_type   "module:Class", a `dpir_jax.training.task.Task`, built by `Class.from_config(config.task)`
    task        the sub-config for it
    data        sub-config: the fields of `dpir_jax.data.pipeline.DataConfig` (batch and seed come from the top level)
    validation  optional; as `data`, its first batch is what the preview sheet shows
    data_type   optional; "module:function" that makes other batches: `function(batch=..., seed=..., **fields)`; with
                several processes also `places`: the samples of each batch, of all its places, that this one makes
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dpir_jax.data.pipeline import DataConfig, make_dataset
from dpir_jax.errors import InputError
from dpir_jax.models.layers import REMAT
from dpir_jax.parallel.mesh import MeshConfig
from dpir_jax.parallel.sharding import PRESETS

SUB_CONFIGS = ("task", "data", "validation")
TYPES = ("task_type", "data_type")
CHOICES = {
    "optimizer": ("adamw", "adafactor", "muon"),
    "schedule": ("constant", "cosine"),
    "remat": tuple(REMAT),
    "frozen_dtype": ("float32", "bfloat16"),
    "frozen_sharding": ("sharded", "replicated"),
    "sharding": (*PRESETS, "auto"),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Steps are optimizer steps; `batch` is the global number of samples of one.

    What is cut, and over which devices, is `sharding` and `mesh` (docs/sharding.md); neither changes a result.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 0
    optimizer: str = "adamw"  # or "adafactor", "muon"; see `state.optimizer`
    schedule: str = "constant"  # or "cosine"
    decay_steps: int = 0  # length of the cosine at the end; 0: everything after the warm-up
    end_lr: float = 0.0  # where the cosine ends
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0  # None: no clipping
    adversary_learning_rate: float | None = None  # None: the same
    ema_decay: float = 0.999  # of the step count's ramp min(ema_decay, (1 + t) / (10 + t))
    checkpoint_every: int = 1000
    keep: int = 2  # checkpoints
    preview_every: int = 1000  # 0: never
    log_every: int = 50
    profile_at: int = 0  # trace three steps from this one on into WORKDIR/profile; 0: never
    time_limit_minutes: float | None = None  # save and stop after this long; run again to go on
    accumulate: int = 1  # parts of the batch that are computed one after another
    remat: str = "none"  # what the backward pass finds stored: or "dots", "full", "offload"; see `layers.use_remat`
    unroll: bool = False  # blocks without a loop: faster on a CPU, slower to compile; see `layers.use_unrolled_blocks`
    frozen_dtype: str = "float32"  # or "bfloat16"
    frozen_sharding: str = "sharded"  # as the parameters are; or "replicated"
    sharding: str = "fsdp"  # or "dp", "zero1", "fsdp_tp", "fsdp_cp"; "auto" picks one of these and the mesh
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        """Raises `InputError` that names the first setting out of range or in contradiction to another."""
        for name, value in dataclasses.asdict(self).items():
            self._need(not isinstance(value, float) or math.isfinite(value), name, "a finite number")
        for name in ("steps", "batch", "checkpoint_every", "keep", "log_every", "accumulate"):
            self._need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("warmup_steps", "decay_steps", "preview_every", "profile_at", "seed", "end_lr", "weight_decay"):
            self._need(getattr(self, name) >= 0, name, "at least 0")
        for name in ("learning_rate", "eps", "clip_norm", "adversary_learning_rate", "time_limit_minutes"):
            self._need(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        for name in ("b1", "b2", "ema_decay"):
            self._need(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        for name, choices in CHOICES.items():
            self._need(getattr(self, name) in choices, name, " or ".join(map(repr, choices)))
        self._need(self.batch % self.accumulate == 0, "accumulate", f"a divisor of batch ({self.batch})")
        if self.sharding == "auto" and self.mesh != MeshConfig():
            raise InputError(
                "config.sharding is 'auto', which makes the mesh too; leave config.mesh out of the recipe, or set "
                "config.mesh.data to -1 and its other axes to 1"
            )
        self._need(self.warmup_steps <= self.steps, "warmup_steps", f"at most steps ({self.steps})")
        self._need(self.end_lr <= self.learning_rate, "end_lr", f"at most learning_rate ({self.learning_rate})")
        left = self.steps - self.warmup_steps
        self._need(self.decay_steps <= left, "decay_steps", f"at most steps - warmup_steps ({left})")
        if self.schedule == "constant":
            self._need(not self.decay_steps, "decay_steps", "0 when schedule is 'constant'")
            self._need(not self.end_lr, "end_lr", "0 when schedule is 'constant'")

    def _need(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(f"config.{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def decay_start(self) -> int:
        """The first step whose learning rate is on the cosine (`steps` when there is none)."""
        if self.schedule == "constant":
            return self.steps
        return self.steps - self.decay_steps if self.decay_steps else self.warmup_steps


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe: what to train with, and the sub-configs for those who build from them."""

    train: TrainConfig
    task: ConfigDict
    data: ConfigDict
    task_type: str
    data_type: str | None = None
    validation: ConfigDict | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives an equal recipe back."""
        subs = {name: getattr(self, name).to_dict() for name in SUB_CONFIGS if getattr(self, name) is not None}
        kinds = {name: getattr(self, name) for name in TYPES if getattr(self, name) is not None}
        return json.loads(json.dumps(dataclasses.asdict(self.train) | kinds | subs))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Recipe":
        """The recipe that `to_json` wrote."""
        return _recipe(ConfigDict(value))

    def build_task(self) -> Any:
        """The task, a `dpir_jax.training.task.Task`; `InputError` if it cuts other crops than the data are made for."""
        task = _resolve(self.task_type, "task_type").from_config(self.task.to_dict())
        for name, section in (("data", self.data), ("validation", self.validation or {})):
            for setting in ("local_crop", "region"):
                cut, made = getattr(task, setting, None), section.get("local_crop")
                if cut is not None and made is not None and cut != made:
                    raise InputError(
                        f"config.task.{setting} is {cut}, config.{name}.local_crop is {made}; they must be the same"
                    )
        return task

    def build_data(self, places: Sequence[int] | None = None) -> Any:
        """The training batches: an endless iterator that can tell and take its position (`loop.Batches`).

        `places`: which samples of each batch are wanted (`parallel.sharding.process_places`); None: all.
        """
        return self._batches("data", places)

    def build_validation(self, places: Sequence[int] | None = None) -> Any | None:
        """The batches whose first one is shown on the preview sheet; None: the recipe names none."""
        return None if self.validation is None else self._batches("validation", places)

    def _batches(self, name: str, places: Sequence[int] | None) -> Any:
        settings = {"batch": self.train.batch, "seed": self.train.seed} | getattr(self, name).to_dict()
        if places is not None and len(places) == settings["batch"]:
            places = None
        if self.data_type and places is not None:
            settings |= {"places": tuple(places)}
        make = _resolve(self.data_type, "data_type") if self.data_type else DataConfig
        try:
            inspect.signature(make).bind(**settings)
        except TypeError as error:
            raise InputError(f"config.{name} does not fit {make.__name__}: {error}") from error
        if self.data_type:
            return make(**settings)
        return make_dataset(make(**settings), places=places)


def load_recipe(spec: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads `configs/NAME.py` or `configs/NAME.py:stage` and applies `--config.field=value` overrides.

    Raises:
      InputError: no such file or stage, an unknown setting, a value of the wrong type, or settings in contradiction.
    """
    path, _, stage = spec.partition(":")
    config = _run_recipe(Path(path), stage or None)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not name.startswith("--config."):
            raise InputError(f"there is no option {name}; settings of the recipe are --config.FIELD=VALUE")
        if not equals:
            raise InputError(f"{override}: expected --config.FIELD=VALUE")
        _override(config, name.removeprefix("--config."), text)
    return _recipe(config)


def _run_recipe(path: Path, stage: str | None) -> ConfigDict:
    if not path.is_file():
        raise InputError(f"there is no recipe {path}")
    spec = importlib.util.spec_from_file_location(f"dpir_recipe_{path.stem}", path)
    if spec is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} is not a recipe: it has no get_config()")
    try:
        return module.get_config(stage) if stage else module.get_config()
    except ValueError as error:  # how a recipe says that it has no such stage
        raise InputError(f"{path}: {error}") from error


def _resolve(target: str, setting: str) -> Any:
    """Imports "module:name". `InputError` names the setting that held it."""
    module, colon, name = target.partition(":")
    if not colon:
        raise InputError(f"config.{setting} is {target!r}; expected 'module:name'")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise InputError(f"config.{setting} is {target!r}, which cannot be imported: {error}") from error


def _fields(kind: type) -> dict[str, Any]:
    """Field name -> annotated type of a config dataclass."""
    return typing.get_type_hints(kind)


def _recipe(config: ConfigDict) -> Recipe:
    for name in ("task_type", "task", "data"):
        if config.get(name) is None:
            raise InputError(f"the recipe has no config.{name}")
    subs = {name: _tuples(config[name]) for name in SUB_CONFIGS if config.get(name) is not None}
    kinds = {name: config[name] for name in TYPES if config.get(name) is not None}
    settings = {name: value for name, value in config.items() if name not in SUB_CONFIGS + TYPES}
    return Recipe(train=_build(TrainConfig, settings), **subs, **kinds)


def _build(kind: type, values: Any, prefix: str = "config.") -> Any:
    """A config dataclass from a mapping; every value is checked against the field's annotation."""
    types_of = _fields(kind)
    if not hasattr(values, "items"):
        raise InputError(f"{prefix.rstrip('.')} is {values!r}; expected settings {', '.join(types_of)}")
    known = {}
    for name, value in values.items():
        if name not in types_of:
            raise InputError(f"{prefix}{name} is not a setting; there are {', '.join(types_of)}")
        if dataclasses.is_dataclass(types_of[name]):
            known[name] = _build(types_of[name], value, f"{prefix}{name}.")
        elif not _fits(value, types_of[name]):
            raise InputError(f"{prefix}{name} is {value!r}; expected {_spell(types_of[name])}")
        else:
            known[name] = float(value) if float in _members(types_of[name]) and value is not None else value
    try:
        inspect.signature(kind).bind(**known)
    except TypeError as error:
        raise InputError(f"the recipe is not complete: {error}") from error
    return kind(**known)


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    members = _members(annotation)
    if isinstance(value, bool):
        return bool in members
    return type(value) in members or (isinstance(value, int) and float in members)


def _spell(annotation: Any) -> str:
    return " or ".join("none" if kind is types.NoneType else kind.__name__ for kind in _members(annotation))


def _override(config: ConfigDict, dotted: str, text: str) -> None:
    """Sets one field. Its type is that of the dataclass field, or in a sub-config that of the recipe's own value."""
    *parents, name = dotted.split(".")
    kind: type | None = TrainConfig
    for depth, parent in enumerate(parents):
        kind = _fields(kind).get(parent) if kind else None
        if parent not in config and kind is not None:
            config[parent] = ConfigDict()
        if not isinstance(config.get(parent), ConfigDict):
            raise InputError(f"--config.{dotted}: there is no config.{'.'.join(parents[: depth + 1])}")
        config = config[parent]
    if kind is not None and dataclasses.is_dataclass(kind) and name in _fields(kind):
        expected = _fields(kind)[name]
    elif name in config and not isinstance(config[name], ConfigDict):
        kind_of = config.get_type(name)  # also that of a placeholder, whose value is None
        expected = kind_of if config[name] is not None or kind_of is types.NoneType else kind_of | None
    elif name in config and text.lower() == "none":  # a whole section is left out
        expected = types.NoneType
    elif name in config:
        raise InputError(f"--config.{dotted}={text}: a section; none leaves it out, or set {', '.join(config[name])}")
    else:
        known = sorted({*config, *(_fields(kind) if kind is not None and dataclasses.is_dataclass(kind) else ())})
        close = difflib.get_close_matches(name, known, n=1)
        there = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise InputError(f"--config.{dotted}: the recipe has no such setting; {there}")
    try:
        value = _parse(text, _members(expected))
    except (ValueError, SyntaxError) as error:
        raise InputError(f"--config.{dotted}={text}: expected {_spell(expected)}") from error
    with config.ignore_type():
        config[name] = value


def _parse(text: str, kinds: tuple[Any, ...]) -> Any:
    if types.NoneType in kinds:
        if text.lower() == "none":
            return None
        if kinds == (types.NoneType,):  # a sub-config's None says nothing about the type
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError):
                return text
    kind = kinds[0]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _fail(text)
    if kind in (tuple, list):
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, (tuple, list)) else _fail(text)
    if kind in (int, float, str):
        return kind(text)
    return _fail(text)


def _fail(text: str) -> Any:
    raise ValueError(text)


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down, so that a recipe and its JSON copy build the same things."""
    if isinstance(value, ConfigDict):
        return ConfigDict({name: _tuples(member) for name, member in value.items()})
    return tuple(_tuples(member) for member in value) if isinstance(value, (list, tuple)) else value
