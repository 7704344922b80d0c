"""IRPAD at the published size: RAM's frozen Swin-L at 384 pixels, RAM's tagging head as the alignment decoder.

    dpir train  --config configs/irpad_ram.py --workdir runs/irpad_ram --config.task.init_from=models/ram
    dpir export --workdir runs/irpad_ram --out models/irpad-ram

`models/ram` is a model folder with RAM's network (docs/weights.md). The paper (arXiv 2406.16477) names neither the
encoder nor any number of its training: what is reconstructed from its figure and its relatives is marked OPEN.
Never run here at this size.
"""

from ml_collections import ConfigDict, config_dict


def get_config(stage: str | None = None) -> ConfigDict:
    """The recipe; `:sentences` has one query per whole sentence (64) instead of one per phrase (12)."""
    if stage not in (None, "sentences"):
        raise ValueError(f"stage is {stage!r}; it must be sentences, or left out")
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.999, 1e-8, 0.05  # RAM's weight decay
    config.clip_norm = 1.0
    config.learning_rate, config.warmup_steps = 1e-4, 3000  # OPEN: RAM's
    config.schedule, config.end_lr = "cosine", 5e-7
    config.batch, config.steps = 128, 50_000  # OPEN
    config.ema_decay = 0.9999
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 0, 1000, 3
    config.mesh = ConfigDict({"data": -1, "fsdp": -1})
    config.task_type = "dpir_jax.training.irpad_task:IRPADTask"
    config.task = ConfigDict({"system": "ram", "candidates": stage or "phrases"})
    config.task.types, config.task.intervals = ("blur", "noise", "jpeg"), 4
    config.task.region = 768  # OPEN: four crops of 384
    config.task.second_count = 64  # OPEN: half of the batch degraded twice, as the system's own training photos are
    config.task.scale = 4
    config.task.init_from = config_dict.placeholder(str)
    config.task.description = "IRPAD with RAM's image encoder"
    config.data = ConfigDict({"folders": ("photos",), "local_crop": 768, "global_crop": 1536})
    config.data.workers = 8
    return config
