"""A setting with a few values takes no others, whatever config it is in."""

import dataclasses
import typing

import jax
import pytest

from dpir_jax.degradation import Recipe
from dpir_jax.diffusion.ddpm import DDPMSchedule
from dpir_jax.diffusion.schedule import draw_time
from dpir_jax.errors import InputError
from dpir_jax.models.irpad import IRPADConfig
from dpir_jax.restore.settings import Defaults
from dpir_jax.systems.dalpsr import DaLPSRConfig
from dpir_jax.systems.dpir import DPIRConfig
from dpir_jax.training.dalpsr_task import DaLPSRTask
from dpir_jax.training.dape_task import DAPETask
from dpir_jax.training.dpir_tasks import DiTTask, EncoderTask, PictureLoss
from dpir_jax.training.irpad_task import IRPADTask

TASKS = EncoderTask(), DiTTask(), DaLPSRTask(), DAPETask(init_from="ram"), IRPADTask()
PARTS = DDPMSchedule(), Defaults(), IRPADConfig(), Recipe.light(), DPIRConfig.tiny(), DaLPSRConfig.tiny()


@pytest.mark.parametrize(
    ("config", "prefix"),
    [*((task, "task.") for task in TASKS), (PictureLoss(), "task.picture."), *((part, "") for part in PARTS)],
    ids=lambda value: type(value).__name__,
)
def test_a_misspelt_choice_is_an_error(config, prefix):
    choices = [
        *(name for name in ("system",) if hasattr(config, name)),
        *(f.name for f in dataclasses.fields(config) if typing.get_origin(f.type) is typing.Literal),
    ]
    assert choices
    for name in choices:
        with pytest.raises(InputError, match=f"^{prefix}{name} is 'velocty'; it must be one of "):
            dataclasses.replace(config, **{name: "velocty"})


def test_a_misspelt_draw_of_time_is_an_error():
    with pytest.raises(InputError, match="draw is 'nrml'; it must be one of logit_normal, uniform, mode"):
        draw_time(jax.random.key(0), (2,), "nrml")
