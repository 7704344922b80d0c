"""The `dpir` command: one thin function per verb, no logic of its own."""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpir_jax.errors import InputError

if TYPE_CHECKING:
    from dpir_jax.restore.job import Item
    from dpir_jax.restore.restorer import Progress


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. Bad input prints one line and returns 2."""
    parser = argparse.ArgumentParser(
        prog="dpir", description="Restore degraded photographs with diffusion models, in JAX."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_restore, _add_degrade, _add_evaluate, _add_train, _add_export, _add_convert, _add_models):
        add(verbs)
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:  # a command of its own, with all that follows
        return _convert(argv[1:])
    arguments, extra = parser.parse_known_args(argv)
    if extra and arguments.verb != "train":  # `train` passes --config.field=value on to the recipe
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.extra = extra
    try:
        return arguments.run(arguments) or 0
    except InputError as error:
        print(f"dpir: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpir: interrupted", file=sys.stderr)
        return 130


# --- restore ---------------------------------------------------------------------------------------------------------


def _add_restore(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "restore",
        help="restore photos",
        description="Restores photos: NAME.png and NAME.json, the run record, for each. Photos that are already there, "
        "made from the same file by the same model with the same settings, are passed over.",
    )
    verb.set_defaults(run=_restore)
    verb.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder for the restored photos")
    verb.add_argument("--model", default="dpir-nano", metavar="NAME|DIR", help="see `dpir models`; default %(default)s")
    size = verb.add_mutually_exclusive_group()
    size.add_argument("--scale", type=float, metavar="X", help="output over input size, may be fractional; default 4")
    size.add_argument("--long-side", type=int, metavar="N", help="the output's longer side in pixels")
    verb.add_argument("--steps", type=int, metavar="N", help="sampling steps; default: the model's")
    verb.add_argument(
        "--guidance", type=float, metavar="G", help="classifier-free guidance, 1 is none; default: the model's"
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise; default %(default)s")
    verb.add_argument("--prompt", metavar="TEXT", help="what is to be seen, for models with a text encoder")
    verb.add_argument("--negative-prompt", metavar="TEXT", help="what is not to be seen")
    verb.add_argument(
        "--fidelity", type=float, default=0.0, metavar="F", help="0 (free, default) to 1 (near the input)"
    )
    verb.add_argument(
        "--tile", type=int, metavar="N", help="side of a tile in pixels of the output; default: the model's"
    )
    verb.add_argument("--color", choices=("wavelet", "adain", "none"), help="colour correction; default: the model's")
    verb.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else bfloat16")
    verb.add_argument(
        "--max-megapixels", type=float, default=100.0, metavar="N", help="largest output; default %(default)g"
    )
    verb.add_argument(
        "--compare", action="store_true", help="also write NAME_compare.png: before and after side by side"
    )
    verb.add_argument("--overwrite", action="store_true", help="restore again what is already there")


def _restore(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dpir_jax import load
    from dpir_jax.restore import Settings
    from dpir_jax.restore.job import plan_job, run_job

    names = (
        "scale",
        "long_side",
        "steps",
        "guidance",
        "seed",
        "prompt",
        "negative_prompt",
        "fidelity",
        "tile",
        "color",
    )
    settings = Settings(**{name: getattr(arguments, name) for name in (*names, "max_megapixels")})
    items = plan_job(arguments.photos, arguments.out)
    restorer = load(arguments.model, dtype=arguments.dtype, tile=settings.tile)
    failed = 0
    with tqdm(total=len(items), unit="photo", disable=None) as bar:

        def progress(item: "Item") -> "Progress":
            def show(stage: str, done: int, total: int) -> None:
                bar.n = round(items.index(item) + done / total, 2)
                bar.set_postfix_str(f"{item.photo.name}: {stage}")

            return show

        switches = {"compare": arguments.compare, "overwrite": arguments.overwrite}
        for number, outcome in enumerate(
            run_job(restorer, items, arguments.out, settings, progress=progress, **switches)
        ):
            bar.n = number + 1
            bar.refresh()
            target = outcome.item.output(Path(arguments.out), ".png")
            if outcome.error:
                failed += 1
                tqdm.write(f"dpir: error: {outcome.error}", file=sys.stderr)
            elif outcome.result is None:
                tqdm.write(f"{outcome.item.photo}: {target} is up to date")
            else:
                run = outcome.result.record
                size, seconds = run["output"], run["seconds"]["total"]
                tqdm.write(f"{outcome.item.photo} -> {target} ({size['width']}x{size['height']}, {seconds:.1f} s)")
    if failed and len(items) > 1:
        print(f"dpir: {failed} of {len(items)} photos could not be restored", file=sys.stderr)
    return 2 if failed else 0


# --- degrade ---------------------------------------------------------------------------------------------------------


def _add_degrade(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("degrade", help="make low-quality pairs from good photos")
    verb.set_defaults(run=_degrade)
    verb.add_argument("photos", metavar="HQ_FOLDER", help="good photos, searched recursively")
    verb.add_argument("--out", required=True, metavar="DIR", help="for lq/, hq/ and parameters.json")
    verb.add_argument(
        "--recipe",
        default="realesrgan",
        metavar="NAME",
        help="realesrgan (heavy, default), light or first_order (one blur, noise and JPEG)",
    )
    verb.add_argument("--scale", type=int, default=4, metavar="N", help="high over low resolution; default %(default)s")
    verb.add_argument("--crop", type=int, metavar="N", help="use the central NxN pixels; default: the whole photo")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random; default %(default)s")


def _degrade(arguments: argparse.Namespace) -> int:
    from dpir_jax.data.pairs import degrade_folder
    from dpir_jax.degradation import Recipe

    recipe = Recipe.named(arguments.recipe, scale=arguments.scale)
    settings = {"recipe": recipe, "crop": arguments.crop, "seed": arguments.seed}
    report = degrade_folder(arguments.photos, arguments.out, progress=True, **settings)
    for sentence in report.failed:
        print(f"dpir: error: {sentence}", file=sys.stderr)
    print(f"{len(report.written)} pairs in {arguments.out}")
    return 2 if report.failed else 0


# --- evaluate --------------------------------------------------------------------------------------------------------


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("evaluate", help="measure restored photos")
    verb.add_argument("--restored", required=True, metavar="DIR", help="the photos to measure")
    verb.add_argument("--reference", metavar="DIR", help="the true photos: same names (any suffix), same sizes")
    verb.add_argument(
        "--metrics",
        metavar="NAME,...",
        help="of psnr_y, psnr_y_crop4, psnr_rgb, ssim_y, ssim_y_crop4, ssim_rgb, ssim_y_round_relu, lpips_alex, "
        "lpips_vgg, dists, niqe (default: psnr_y,ssim_y,lpips_alex,dists,niqe where reference and weights are there)",
    )
    verb.add_argument("--weights", metavar="DIR", help="folder of the VGG16 weights (default: $DPIR_WEIGHTS)")
    verb.add_argument("--json", metavar="FILE", help="also write everything to FILE")
    verb.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dpir_jax.files import write_json
    from dpir_jax.metrics import evaluate_folders, format_table
    from dpir_jax.restore import compilation_cache

    compilation_cache.enable()
    names = arguments.metrics and [name.strip() for name in arguments.metrics.split(",")]
    bar = functools.partial(tqdm, unit="photo", disable=None)
    result = evaluate_folders(arguments.restored, arguments.reference, names, weights=arguments.weights, progress=bar)
    print(format_table(result))
    for note in result["notes"]:
        print(note)
    if arguments.json:
        write_json(arguments.json, result)
    for problem in result["problems"]:
        print(f"dpir: error: {problem['error']}", file=sys.stderr)
    return 2 if result["problems"] else 0


# --- train -----------------------------------------------------------------------------------------------------------


def _add_train(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "train",
        help="train a model by a recipe",
        usage="dpir train --config FILE[:STAGE] --workdir DIR [--config.FIELD=VALUE ...]",
        description="Train by a recipe. The same command again goes on where the run was stopped or killed.",
        allow_abbrev=False,
    )
    verb.add_argument(
        "--config", required=True, metavar="FILE[:STAGE]", help="the recipe, e.g. configs/dpir_nano.py:dit"
    )
    verb.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run keeps checkpoints, logs and previews"
    )
    verb.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from dpir_jax.training.config import load_recipe
    from dpir_jax.training.loop import train

    recipe, workdir = load_recipe(arguments.config, arguments.extra), Path(arguments.workdir)
    outcome = train(recipe, workdir)
    print(f"{outcome.reason} at step {outcome.step} of {recipe.train.steps}; the run is in {workdir}")
    if outcome.step < recipe.train.steps:
        print("the same command goes on from here")
    return 128 + outcome.signal if outcome.signal else 0


# --- export ----------------------------------------------------------------------------------------------------------


def _add_export(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("export", help="turn a training checkpoint into a model folder")
    verb.add_argument("--workdir", required=True, metavar="DIR", help="the run")
    verb.add_argument("--out", required=True, metavar="MODEL_DIR", help="the model folder to write")
    verb.add_argument("--raw", action="store_true", help="the weights of the last step instead of their average")
    verb.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from dpir_jax.training.export import export

    step = export(Path(arguments.workdir), Path(arguments.out), raw=arguments.raw)
    print(f"wrote step {step} of {arguments.workdir} to {arguments.out}")
    return 0


# --- convert ---------------------------------------------------------------------------------------------------------


def _add_convert(verbs: argparse._SubParsersAction) -> None:
    verbs.add_parser("convert", help="turn PyTorch weights into a model folder, or back; = python -m convert_weights")


def _convert(argv: Sequence[str]) -> int:
    from convert_weights.command import main as convert

    return convert(argv, prog="dpir convert")


# --- models ----------------------------------------------------------------------------------------------------------


def _add_models(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("models", help="list the models that `--model` knows")
    verb.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    from dpir_jax.restore.models import EMBEDDED, embedded_models

    models = embedded_models()
    for info in models:
        print(f"{info.name}  {info.bytes / 1e6:.1f} MB  sha256 {info.sha256[:16]}  {info.description or ''}".rstrip())
    if not models:
        print(f"no models in {EMBEDDED}; `--model` also takes a model folder")
    return 0
