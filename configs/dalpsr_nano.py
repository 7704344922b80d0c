"""dalpsr-nano: DaLPSR at a small size, trained from nothing on two CPU cores, UNet and ControlNet together.

    dpir train  --config configs/dalpsr_nano.py:distil --workdir runs/distil \\
        --config.task.init_from=benchmarks/dpir_nano_control --config.task.teacher=benchmarks/dpir_nano_control
    dpir export --workdir runs/distil --out runs/distil/model
    dpir train  --config configs/dalpsr_nano.py --workdir runs/dalpsr --config.task.init_from=runs/distil/model
    dpir export --workdir runs/dalpsr --out runs/dalpsr-nano

`init_from` first gives the autoencoder. At the start the system is D(E(x)), the photo as it came: the last layer is
zero and the flow runs on the residual. UNet and ControlNet then learn what a trained E_dr makes of the photo
(`teacher`): no picture is decoded and the target has no chance in it, so a fraction of the steps will do. The picture
losses come afterwards; they need the VGG16 weights (docs/metrics.md). Degradation prompts are oracle ones, worded
from the drawn degradation and dropped one time in ten, so that the UNet learns to believe them. The recipe
`first_order` is the one of which the prompt is the whole truth. It is not settled yet: docs/dalpsr_nano.md says what
came of it.
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
    config.warmup_steps = 100
    config.ema_decay = 0.998
    config.schedule, config.end_lr = "cosine", 1e-5
    config.batch, config.steps, config.learning_rate, config.decay_steps = 3, 2500, 5e-4, 2000
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 500, 500, 2

    picture = ConfigDict({"l1": 3.0, "lpips": 1.0, "dists": 2.0, "adversarial": 0.0, "grid": 10.0, "specks": 5.0})
    picture.crop, picture.stages = 80, 4
    picture.weights = config_dict.placeholder(str)
    config.task_type = "dpir_jax.training.dalpsr_task:DaLPSRTask"
    config.task = ConfigDict({"system": "nano", "train": "joint", "picture": picture})
    config.task.recipes = ("first_order", "light", "realesrgan")
    config.task.init_from, config.task.teacher = config_dict.placeholder(str), config_dict.placeholder(str)
    config.task.degradation, config.task.captions = "oracle", "attributes"
    config.task.types, config.task.intervals = ("blur", "noise", "jpeg"), 4
    config.task.irpad = config_dict.placeholder(str)
    config.task.predicted_share = 0.3  # of degradation "mix"
    config.task.caption_dropout, config.task.degradation_dropout = 0.5, 0.1
    config.task.flow_weight, config.task.start_share = 0.1, 0.8
    config.task.local_crop, config.task.crops = 128, 3
    config.task.description = "DaLPSR at a small size, for photos x4 on a CPU"
    config.task.restore = {"steps": 1, "guidance": 1.0}
    config.task.reader = "irpad-nano"
    config.data = ConfigDict({"local_crop": 128, "global_crop": 320})
    if stage == "distil":
        config.warmup_steps, config.learning_rate, config.ema_decay = 30, 1e-3, 0.99
        config.task.picture, config.task.flow_weight = None, 1.0
        config.task.local_crop = config.data.local_crop = 96
        config.task.crops = 5
    config.data.folders = config.task.photos = FieldReference(PHOTOS)
    config.data.by_area, config.data.flips, config.data.rotations = True, True, True
    config.data.scale_jitter_prob = 0.3
    return config
