"""DaLPSR at the published size: Stable Diffusion 2 base, a ControlNet that starts as its copy, DAPE as image encoder.

    dpir train  --config configs/dalpsr_sd2.py --workdir runs/dalpsr --config.task.init_from=models/sd2_dape
    dpir export --workdir runs/dalpsr --out models/dalpsr

`init_from`: one model folder with `unet`, `autoencoder`, `text_encoder`, `image_encoder` (RAM with DAPE's LoRA,
`configs/dape.py`) and `tokenizer/`; with a `controlnet` in it (SeeSR's, say) training starts from that one. Photos with
captions beside them (`dpir caption`); `--config.data.tokenizer` is the folder's `tokenizer`. `dalpsr_sd2.py:seesr` is
SeeSR's variant: caption and image tokens to both networks, the UNet's image attention trained, no degradation prompt.

Frozen: UNet, autoencoder, text tower, RAM. Trained: ControlNet and the LoRA of the image encoder (the paper's figure).
What the paper (arXiv 2406.16477) leaves open is marked OPEN, with the source of the number here. Never run here: there
was no accelerator to run it on.
"""

from ml_collections import ConfigDict, config_dict


def get_config(stage: str = "split") -> ConfigDict:
    """The recipe; `stage`: "split" (the paper's figure), "both" or "seesr"."""
    if stage not in ("split", "both", "seesr"):
        raise ValueError(f"stage is {stage!r}; it must be split, both or seesr")
    config = ConfigDict()
    config.seed = 0
    config.b1, config.b2, config.eps, config.weight_decay = 0.9, 0.999, 1e-8, 1e-2  # OPEN: SeeSR's code
    config.clip_norm, config.learning_rate, config.schedule = 1.0, 5e-5, "constant"  # OPEN: SeeSR's code
    config.batch, config.steps = 32, 100_000  # OPEN: SeeSR's author, issue 12
    config.ema_decay = 0.999  # OPEN
    config.log_every, config.preview_every, config.checkpoint_every, config.keep = 50, 1000, 1000, 3
    config.mesh = ConfigDict({"data": -1, "fsdp": -1})
    config.remat, config.frozen_dtype = "full", "bfloat16"

    config.task_type = "dpir_jax.training.dalpsr_task:DaLPSRTask"
    config.task = ConfigDict({"system": "seesr" if stage == "seesr" else "sd2", "train": "control", "mixed": True})
    config.task.in_turn = True
    config.task.objective = "epsilon"  # OPEN: SeeSR's; "velocity" for SD 2.1-v, "flow" for conditional flow matching
    config.task.routing = {"split": "split", "both": "both", "seesr": "caption"}[stage]
    config.task.init_from = config_dict.placeholder(str)
    config.task.recipes = ("realesrgan",)  # SeeSR's ranges
    config.task.local_crop = 512
    config.task.degradation = "oracle"  # OPEN: or "mix" with IRPAD's words
    config.task.predicted_share = 0.3
    config.task.irpad = config_dict.placeholder(str)
    config.task.types, config.task.intervals = ("blur", "noise", "jpeg"), 4
    config.task.captions = "files"
    config.task.caption_dropout, config.task.degradation_dropout = 0.5, 0.1  # SeeSR's null_text_ratio; OPEN
    config.task.preview_steps = 20
    config.task.description = "DaLPSR on Stable Diffusion 2 base"
    config.task.restore = {"steps": 50, "guidance": 5.5, "sampler": "ddpm", "color": "adain"}  # OPEN: SeeSR's
    config.task.reader = config_dict.placeholder(str)

    config.data_type = "dpir_jax.training.dalpsr_task:captioned"
    config.data = ConfigDict({"folders": ("photos",), "local_crop": 512, "global_crop": 512})
    config.data.tokenizer, config.data.rows, config.data.length = "models/sd2_dape/tokenizer", 4, 77
    config.data.workers = 8
    return config
