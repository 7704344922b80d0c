"""irpad-nano: the embedded IRPAD, which reads blur, noise and JPEG compression off a photo.

    dpir train  --config configs/irpad_nano.py --workdir runs/irpad_nano
    dpir export --workdir runs/irpad_nano --out runs/irpad-nano
    dpir degradation photos/val --model runs/irpad-nano --evaluate native,kernels
    dpir degradation photos/val --model runs/irpad-nano --evaluate realesrgan --crop 512

The first command begins with drawing the statistics of degraded photos into `runs/irpad_statistics`.
Data: a folder of photographs (`--config.data.folders='["photos/train"]'`), used where they measure 512x512 or more.
Expected scores: dpir_jax/pretrained/irpad-nano/README.md.
"""

from ml_collections import ConfigDict, FieldReference

PHOTOS = ("../shared/photos/train",)


def get_config(stage: str | None = None) -> ConfigDict:
    """The recipe; it has no stages."""
    if stage is not None:
        raise ValueError(f"stage is {stage!r}; this recipe has none")
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.99, 1e-8, 0.2
    config.clip_norm = 1.0
    config.batch, config.steps, config.learning_rate = 128, 5000, 1e-3
    config.warmup_steps, config.schedule, config.end_lr = 100, "cosine", 1e-5
    config.ema_decay = 0.99
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 0, 250, 2
    config.task_type = "dpir_jax.training.irpad_task:IRPADTask"
    config.task = ConfigDict({"system": "nano", "candidates": "phrases", "intervals": 4})
    config.task.hold_out = False  # True: to see whether the types are read independently
    config.task.description = "IRPAD at a small size: blur, noise and JPEG compression of a photo, in words"
    config.data_type = "dpir_jax.training.irpad_statistics:batches"
    config.data = ConfigDict({"folders": PHOTOS, "once": 24000, "twice": 9600})
    config.data.types = config.task.types = FieldReference(("blur", "noise", "jpeg"))
    config.data.cache = config.task.statistics = FieldReference("runs/irpad_statistics")
    config.data.tables = ("published", "libjpeg")
    return config
