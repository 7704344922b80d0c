"""The page for those who come from the authors' code names settings that are there, with the defaults that it says."""

import dataclasses
import re
from pathlib import Path

import pytest

from convert_weights.command import main as convert
from dpir_jax import cli
from dpir_jax.training.config import TrainConfig, load_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "from_pytorch.md").read_text()
RECIPE = load_recipe(str(ROOT / "configs" / "dpir_sd3_medium.py"))
DEFAULTS = {  # of the authors' parser, where the page says that ours are the same
    "learning_rate": 1e-4,
    "clip_norm": 1.0,
    "schedule": "constant",
    "warmup_steps": 500,
    "b1": 0.9,
    "b2": 0.999,
    "weight_decay": 1e-4,
    "eps": 1e-8,
    "task.prompt_dropout": 0.464,
    "data.local_crop": 512,
    "task.local_crop": 512,
    "data.global_crop": 1024,
}


def rows(section: str) -> list[tuple[str, str]]:
    """Theirs and ours, line by line."""
    part = PAGE.split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    return [(theirs, ours) for theirs, ours in cells]


def named(text: str, pattern: str) -> set[str]:
    return {name for code in re.findall("`([^`]+)`", text) for name in re.findall(pattern, code)}


def setting(name: str):
    """The recipe's value."""
    group, _, field = name.rpartition(".")
    return getattr(getattr(RECIPE, group), field) if group else getattr(RECIPE.train, name)


def test_every_setting_of_the_training_table_exists():
    names = set().union(*(named(ours, r"^((?:task\.|data\.)?[a-z_0-9]+)(?:=.*)?$") for _, ours in rows("Training")))
    fields = {field.name for field in dataclasses.fields(TrainConfig)} | {"validation"}
    values = {"logit_normal"}  # not settings
    assert len(names) > 30
    for name in names - values - fields:
        assert setting(name) is not None or name == "task.init_from", name


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_same_defaults(name):
    assert setting(name) == DEFAULTS[name]
    assert any(name in named(ours, r"^[a-z_0-9.]+$") for _, ours in rows("Training"))


def test_every_option_of_the_restoring_table_exists(capsys):
    for command in (lambda: cli.main(["restore", "--help"]), lambda: convert(["dpir", "--help"])):
        with pytest.raises(SystemExit):
            command()
    helps = capsys.readouterr().out
    options = set().union(*(named(ours, r"--[a-z-]+") for _, ours in rows("Restoring")))
    assert len(options) > 10
    assert not {option for option in options if option not in helps}
