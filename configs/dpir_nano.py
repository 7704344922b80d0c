"""dpir-nano: the embedded DPIR model, trained on two CPU cores in four stages.

    dpir train  --config configs/dpir_nano.py:latent --workdir runs/latent         E_dr by the latents of good pictures
    dpir export --workdir runs/latent --out runs/latent/model
    dpir train  --config configs/dpir_nano.py:encoder --workdir runs/encoder       E_dr by decoded pictures
        --config.task.init_from=runs/latent/model
    dpir export --workdir runs/encoder --out runs/encoder/model
    dpir train  --config configs/dpir_nano.py:flow --workdir runs/flow             the DiT by the published loss
        --config.task.init_from=runs/encoder/model
    dpir export --workdir runs/flow --out runs/flow/model
    dpir train  --config configs/dpir_nano.py:dit --workdir runs/dit               both together by decoded pictures
        --config.task.init_from=runs/flow/model
    dpir export --workdir runs/dit --out runs/dpir-nano

    dpir train  --config configs/dpir_nano.py:control --config.task.init_from=runs/encoder/model ...
        E_dr trained on alone by the picture losses of stage `dit`: what the whole has to beat in the same time. Stage
        `dit` of the embedded model began with such an E_dr (`--config.task.encoder_from=runs/control/model`)

(Each command on one line.) Data: folders of photographs (`--config.data.folders='("photos/train", "more")'`). The
perceptual losses need the VGG16 weights (`--config.task.picture.weights=FOLDER`; docs/metrics.md says where they come
from). Expected scores, and how the embedded weights came about: dpir_jax/pretrained/dpir-nano/README.md.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

PHOTOS = ("../shared/photos/train",)


def get_config(stage: str = "encoder") -> ConfigDict:
    """The recipe of one stage: latent, encoder, flow, dit or control."""
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.99, 1e-8, 1e-4
    config.clip_norm = 1.0
    config.warmup_steps = 100
    config.ema_decay = 0.998
    config.schedule, config.end_lr = "cosine", 1e-5
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 1000, 500, 2

    picture = ConfigDict({"l1": 2.0, "lpips": 1.0, "dists": 1.0, "adversarial": 0.0, "grid": 10.0, "specks": 5.0})
    picture.crop, picture.stages = 80, 4
    picture.weights = config_dict.placeholder(str)
    config.task = ConfigDict({"system": "nano", "recipes": ("realesrgan", "light"), "picture": picture})
    config.task.init_from = config_dict.placeholder(str)
    config.task.local_crop, config.task.crops = 128, 4
    if stage in ("latent", "encoder", "control"):
        config.task_type = "dpir_jax.training.dpir_tasks:EncoderTask"
    elif stage in ("flow", "dit"):
        config.task_type = "dpir_jax.training.dpir_tasks:DiTTask"
        config.task.prompt_dropout = 0.1
        config.task.train_prompts = True
        config.task.description = "DPIR at a small size, for photos x4 on a CPU"
        config.task.restore = {"steps": 1, "guidance": 1.0}
    else:
        raise ValueError(f"stage is {stage!r}; it must be latent, encoder, flow, dit or control")
    if stage in ("latent", "flow"):  # nothing decoded: two to four times as many crops a second
        config.task.picture = None
        config.batch, config.steps, config.learning_rate, config.decay_steps = 4, 5000, 1e-3, 2000
    elif stage == "encoder":
        config.batch, config.steps, config.learning_rate, config.decay_steps = 2, 5000, 3e-4, 2000
    else:
        picture.l1, picture.dists = 3.0, 2.0
        config.batch, config.steps, config.learning_rate, config.decay_steps = 2, 2500, 3e-4, 2000
    if stage == "dit":
        config.task.flow_weight = 0.1
        config.task.start_share, config.task.rollout_share = 0.85, 0.0
        config.task.encoder_from = config_dict.placeholder(str)
        config.task.silent_start, config.task.train_encoder = True, True
    config.data = ConfigDict({"local_crop": 128, "global_crop": 320})
    config.data.folders = config.task.photos = FieldReference(PHOTOS)
    config.data.by_area, config.data.flips, config.data.rotations = True, True, True
    config.data.scale_jitter_prob = 0.3
    return config
