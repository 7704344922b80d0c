"""The toy recipe with a task that can be compiled without weights."""

from ml_collections import ConfigDict

from tests.toy_recipe import get_config as toy


def get_config() -> ConfigDict:
    config = toy()
    config.task_type = "tests.test_ahead:TracedToyTask"
    config.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return config
