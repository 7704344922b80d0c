"""DAPE: RAM's Swin-L adapted to degraded photographs by LoRA, the image encoder of SeeSR and of our DaLPSR.

    dpir train  --config configs/dape.py --workdir runs/dape --config.task.init_from=models/ram
    dpir export --workdir runs/dape --out models/dape

Every number is that of SeeSR's published options (`dape.yaml`), but for what is marked OPEN. Never run here: there was
neither an accelerator nor RAM's weights.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()
    config.seed = 0
    config.learning_rate, config.weight_decay = 1e-4, 0.0
    config.schedule, config.steps, config.decay_steps = "cosine", 40_000, 20_000  # published: halved at 20 k and 30 k
    config.batch = 64  # 8 on each of 8 devices
    config.clip_norm = None
    config.ema_decay = 0.999  # OPEN
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 0, 1000, 2
    config.mesh = ConfigDict({"data": -1})
    config.task_type = "dpir_jax.training.dape_task:DAPETask"
    config.task = ConfigDict({"system": "ram", "rank": 8, "recipe": "realesrgan", "scale": 4})
    config.task.init_from = config_dict.placeholder(str)
    config.data = ConfigDict({"folders": ("photos",), "local_crop": 512, "global_crop": 512, "workers": 8})
    return config
