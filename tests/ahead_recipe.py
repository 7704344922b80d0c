"""The toy recipe with a task that can be compiled without weights; `:dpir` is DPIR's second stage at its smallest."""

from ml_collections import ConfigDict

from tests.toy_recipe import get_config as toy


def get_config(stage: str | None = None) -> ConfigDict:
    config = toy()
    config.task_type = "tests.test_ahead:TracedToyTask"
    config.mesh = ConfigDict({"data": 1, "fsdp": -1})
    if stage == "dpir":
        config.task_type = "dpir_jax.training.dpir_tasks:DiTTask"
        config.task = ConfigDict({"system": "tiny"})
    return config
