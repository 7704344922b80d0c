"""The recipe of the toy task: `tests/toy_recipe.py`, `:gan`."""

from ml_collections import ConfigDict


def get_config(stage=None):
    if stage not in (None, "gan"):
        raise ValueError(f"there is no stage {stage!r}; there is gan")
    return ConfigDict(
        {
            "steps": 6,
            "batch": 8,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "log_every": 1,
            "checkpoint_every": 3,
            "preview_every": 0,
            "task_type": "tests.toy_task:ToyTask",
            "task": {"width": 16, "adversarial": stage == "gan"},
            "data_type": "tests.toy_task:counter",
            "data": {"size": 8, "poison_at": -1},
        }
    )
