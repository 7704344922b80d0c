"""DPIR's branch for a transformer that has none: where training from SD3 starts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert_weights.engine import export
from convert_weights.families import Family
from convert_weights.readers import Slot, Source
from dpir_jax.errors import InputError
from dpir_jax.models.layers import Keys
from dpir_jax.models.mmdit import LQBranch, LQBranchConfig


class Extended(Source):
    """A source with tensors that no file holds."""

    def __init__(self, source: Source, tensors: Mapping[str, np.ndarray]):
        made = {key: Slot(Path(), 0, tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        super().__init__(source.name, source.slots | made, source.config, source.metadata)
        self._source, self._tensors = source, dict(tensors)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors[key] if key in self._tensors else self._source[key]


def with_new_branch(source: Source, family: Family, seed: int = 0) -> Source:
    """SD3's transformer with an untrained branch: torch's own initial numbers, as in the published code.

    Raises:
      InputError: there is a branch already.
    """
    config = family.configure(source)
    if config.lq_branch is not None:
        raise InputError(f"{source.name} has control_conv already; leave --new-branch out")
    config = dataclasses.replace(config, lq_branch=LQBranchConfig())
    rules = [
        dataclasses.replace(rule, target=rule.target.removeprefix("lq_branch."))
        for rule in family.rules(config)
        if rule.target and rule.target.startswith("lq_branch.")
    ]
    return Extended(source, export(LQBranch(config, rngs=Keys(seed)), rules))
