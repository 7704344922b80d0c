"""dalpsr-nano: DaLPSR at a small size, trained from nothing on one CPU core, UNet and ControlNet together.

    dpir train  --config configs/dalpsr_nano.py:distil --workdir runs/distil \\
        --config.task.init_from=benchmarks/dpir_nano_control --config.task.teacher=benchmarks/dpir_nano_control
    dpir export --workdir runs/distil --out runs/distil/model
    dpir train  --config configs/dalpsr_nano.py --workdir runs/dalpsr --config.task.init_from=runs/distil/model \\
        --config.task.teacher=benchmarks/dpir_nano_control
    dpir export --workdir runs/dalpsr --out runs/dalpsr-nano

`init_from` first gives the autoencoder. At the start the system is D(E(x)), the photo as it came: the last layer is
zero and the flow runs on the residual. UNet and ControlNet then learn what a trained E_dr makes of the photo
(`teacher`): no picture is decoded and the target has no chance in it, so a fraction of the steps will do.

The second stage teaches the words. Half of them are IRPAD's own, as they will be when photos are restored; the rest are
worded from the drawn degradation. Some photos are told of strengths that they do not have, and the target follows the
words (`claims`; the head of `dpir_jax/training/dalpsr_task.py`). Only the recipe `first_order` has one stage, of which
the words are the whole truth. docs/dalpsr_nano.md says what was tried.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

PHOTOS = ("../shared/photos/train",)


def get_config(stage: str | None = None) -> ConfigDict:
    """The recipe; `:distil` is its first stage."""
    if stage not in (None, "distil"):
        raise ValueError(f"stage is {stage!r}; it must be distil, or left out")
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.99, 1e-8, 1e-4
    config.clip_norm = 1.0
    config.ema_decay = 0.99
    config.learning_rate, config.schedule, config.end_lr = 1e-3, "cosine", 0.0
    config.batch, config.steps, config.warmup_steps, config.decay_steps = 4, 2000, 30, 1000
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 20, 500, 100, 2

    config.task_type = "dpir_jax.training.dalpsr_task:DaLPSRTask"
    config.task = ConfigDict({"system": "nano", "train": "joint"})
    config.task.recipes = ("first_order", "first_order", "light", "realesrgan")
    config.task.init_from, config.task.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    config.task.degradation, config.task.captions = "mix", "attributes"
    config.task.types, config.task.intervals = ("blur", "noise", "jpeg"), 4
    config.task.irpad, config.task.predicted_share = "irpad-nano", 0.5
    config.task.claims = 0.6
    config.task.caption_dropout, config.task.degradation_dropout = 0.5, 0.1
    config.task.start_share = 0.8
    config.task.local_crop, config.task.crops = 96, 4
    config.task.description = "DaLPSR at a small size, for photos x4 on a CPU"
    config.task.restore = {"steps": 1, "guidance": 1.0}
    config.task.reader = "irpad-nano"
    config.data = ConfigDict({"local_crop": 96, "global_crop": 320})
    if stage == "distil":
        config.batch, config.steps, config.schedule, config.decay_steps = 3, 1000, "constant", 0
        config.task.recipes, config.task.crops = ("first_order", "light", "realesrgan"), 5
        config.task.degradation, config.task.irpad, config.task.claims = "oracle", None, 0.0
    config.data.folders = config.task.photos = FieldReference(PHOTOS)
    config.data.by_area, config.data.flips, config.data.rotations = True, True, True
    config.data.scale_jitter_prob = 0.3
    return config
