"""DPIR at the published size: SD3-medium, ViT-B/32, OpenCLIP bigG, T5-XXL; two stages on a mesh of accelerators.

    python -m convert_weights ...              the published networks as a model folder (docs/weights.md)
    dpir train  --config configs/dpir_sd3_medium.py:encoder --workdir runs/encoder \\
        --config.task.init_from=models/sd3
    dpir export --workdir runs/encoder --out runs/encoder/model
    dpir train  --config configs/dpir_sd3_medium.py:dit --workdir runs/dit \\
        --config.task.init_from=models/sd3 --config.task.encoder_from=runs/encoder/model
    dpir compile --config configs/dpir_sd3_medium.py --topology v5p-8 --batch-per-chip 32      docs/scaling.md

What the paper (arXiv 2504.17825) and the authors' code leave open is marked OPEN, with the source of the number here.
Never run here: there was no accelerator to run it on.
"""

from ml_collections import ConfigDict, config_dict


def get_config(stage: str = "dit") -> ConfigDict:
    """The recipe of one stage: encoder or dit."""
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.999, 1e-8, 1e-4  # code: AdamW's arguments
    config.clip_norm = 1.0  # code
    config.warmup_steps, config.schedule = 500, "constant"  # code
    config.ema_decay = 0.9999  # code offers EMA, default off; OPEN: the decay
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 1000, 1000, 3
    config.mesh = ConfigDict({"data": -1, "fsdp": -1})
    if stage == "encoder":
        config.task_type = "dpir_jax.training.dpir_tasks:EncoderTask"
        picture = ConfigDict({"l1": 1.0, "lpips": 1.0, "adversarial": 0.1, "crop": 0, "stages": 5})  # OPEN: the weights
        config.learning_rate = 1e-5  # OPEN
        config.batch, config.steps = 64, 50_000  # OPEN
        crop = global_crop = 512  # OPEN: 512 is the code's default resolution
    elif stage == "dit":
        config.task_type = "dpir_jax.training.dpir_tasks:DiTTask"
        picture = None  # the published loss alone
        config.learning_rate = 1e-4  # code: the script's default; OPEN: what the paper used (relatives: 1e-5 to 5e-5)
        config.batch, config.steps = 256, 150_000  # OPEN
        crop, global_crop = 512, 1024  # OPEN: 512 as above; the code's global tile is 1024
    else:
        raise ValueError(f"stage is {stage!r}; it must be encoder or dit")
    task = {"system": "sd3_medium", "recipes": ("realesrgan",)}  # the paper names Real-ESRGAN; OPEN: its parameters
    config.task = ConfigDict(task)
    config.task.init_from = config_dict.placeholder(str)
    if picture is not None:
        config.task.picture = picture
        config.task.picture.weights = config_dict.placeholder(str)
    if stage == "dit":
        config.task.local_crop = crop
        config.task.loss_kind, config.task.time, config.task.shift = "x0", "logit_normal", 3.0  # code
        config.task.prompt_dropout = 0.464  # code
        # float32 masters, bfloat16 compute; only blocks' inputs are stored; T5's tokens come with the photos
        config.task.mixed, config.task.in_turn, config.task.text = True, True, "stored"
        config.task.encoder_from = config_dict.placeholder(str)
        config.task.stored_latents = False
        config.remat, config.frozen_dtype = "full", "bfloat16"
        config.task.restore = {"steps": 28, "guidance": 1.0, "color": "wavelet"}  # code
    config.data = ConfigDict({"folders": ("photos",), "local_crop": crop, "global_crop": global_crop})
    config.data.records, config.data.weights = (), ()  # docs/data.md: built data sets, stored text, text in the step
    config.data.embeddings, config.data.tokenizer = (), config_dict.placeholder(str)
    config.data.workers = 8
    return config
