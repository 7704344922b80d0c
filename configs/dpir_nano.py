"""dpir-nano: the embedded DPIR model, trained on two CPU cores in three stages.

    dpir train  --config configs/dpir_nano.py:decoder --workdir runs/nano_decoder
    dpir export --workdir runs/nano_decoder --out runs/nano_decoder/model
    dpir train  --config configs/dpir_nano.py:encoder --workdir runs/nano_encoder \\
        --config.task.init_from=runs/nano_decoder/model
    dpir export --workdir runs/nano_encoder --out runs/nano_encoder/model
    dpir train  --config configs/dpir_nano.py:dit --workdir runs/nano_dit \\
        --config.task.init_from=runs/nano_encoder/model
    dpir export --workdir runs/nano_dit --out runs/dpir-nano

    dpir train  --config configs/dpir_nano.py:control ...      E_dr trained on for as long as the DiT: the control

Data: a folder of photographs (`--config.data.folders='["photos/train"]'`). The perceptual loss needs the VGG16 weights
(docs/weights.md says where they come from). Expected scores: dpir_jax/pretrained/dpir-nano/README.md.
"""

from ml_collections import ConfigDict, config_dict

PHOTOS = ("../shared/photos/train",)


def get_config(stage: str = "encoder") -> ConfigDict:
    """The recipe of one stage: decoder, latent, encoder, flow, dit or control."""
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.99, 1e-8, 1e-4
    config.clip_norm = 1.0
    config.warmup_steps = 100
    config.ema_decay = 0.998
    config.schedule = "cosine"
    config.end_lr = 1e-5
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 1000, 500, 2

    picture = ConfigDict({"l1": 5.0, "lpips": 1.0, "dists": 1.0, "adversarial": 0.0, "phase": 40.0})
    picture.crop, picture.stages = 48, 4
    picture.weights = config_dict.placeholder(str)
    config.task = ConfigDict({"system": "nano", "picture": picture})
    crop = global_crop = 96
    if stage == "decoder":
        config.task_type = "dpir_jax.training.dpir_tasks:DecoderTask"
        picture.l1, picture.adversarial = 3.0, 0.05
        config.batch, config.steps, config.learning_rate, config.decay_steps = 8, 2000, 1e-3, 800
    elif stage in ("latent", "encoder", "control"):
        config.task_type = "dpir_jax.training.dpir_tasks:EncoderTask"
        config.task.recipes = ("realesrgan", "light")
        config.task.init_from = config_dict.placeholder(str)
        config.task.local_crop, config.task.crops = 128, 4
        config.batch, config.steps, config.learning_rate, config.decay_steps = 4, 5000, 1e-3, 2000
        crop, global_crop = 128, 320
        if stage == "latent":  # without the decoder: twice as many crops a second
            config.task.picture = None
        elif stage == "control":
            picture.adversarial = 0.1
            config.steps, config.learning_rate, config.decay_steps = 4500, 3e-4, 1500
    elif stage in ("flow", "dit"):
        config.task_type = "dpir_jax.training.dpir_tasks:DiTTask"
        config.task.recipes = ("realesrgan", "light")
        config.task.init_from = config_dict.placeholder(str)
        config.task.local_crop, config.task.crops = 128, 4
        config.task.prompt_dropout = 0.1
        config.task.train_prompts = True
        config.task.description = "DPIR at a small size, for photos x4 on a CPU"
        config.task.restore = {"steps": 4, "guidance": 1.0}
        crop, global_crop = 128, 320
        if stage == "flow":  # the published loss alone: four times as many crops a second
            config.task.picture = None
            config.batch, config.steps, config.learning_rate = 4, 4000, 1e-3
            config.schedule, config.end_lr = "constant", 0.0
        else:
            picture.adversarial = 0.1  # Real-ESRGAN's weight beside L1 and a perceptual loss of weight 1
            config.task.flow_weight = 0.1
            config.task.start_share, config.task.rollout_share = 0.3, 0.4
            config.batch, config.steps, config.learning_rate, config.decay_steps = 2, 4000, 5e-4, 800
    else:
        raise ValueError(f"stage is {stage!r}; it must be decoder, latent, encoder, flow, dit or control")
    config.task.photos = PHOTOS
    config.data = ConfigDict({"folders": PHOTOS, "local_crop": crop, "global_crop": global_crop})
    config.data.by_area, config.data.flips, config.data.rotations = True, True, True
    config.data.scale_jitter_prob = 0.3
    return config
