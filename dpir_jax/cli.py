"""The `dpir` command: one thin function per verb, no logic of its own."""

import argparse
import contextlib
import functools
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpir_jax.errors import InputError
from dpir_jax.files import check_file, refuse_url

if TYPE_CHECKING:
    from dpir_jax.models.irpad import IRPAD
    from dpir_jax.parallel.topologies import Topology
    from dpir_jax.restore.job import Item
    from dpir_jax.restore.restorer import Progress
    from dpir_jax.training.config import Recipe


FILES = ("json", "confusion")  # options that name a file to write


def quiet_libtpu() -> None:
    """Where the TPU's driver is installed (to compile with) but there is no TPU, keeps it from saying so at length."""
    if importlib.util.find_spec("libtpu"):
        from dpir_jax.parallel.topologies import expect_no_chips

        expect_no_chips()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. Bad input prints one line and returns 2."""
    parser = argparse.ArgumentParser(
        prog="dpir", description="Restore degraded photographs with diffusion models, in JAX."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _add_restore,
        _add_degrade,
        _add_evaluate,
        _add_degradation,
        _add_caption,
        _add_train,
        _add_runs,
        _add_pack,
        _add_precompute,
        _add_compile,
        _add_export,
        _add_convert,
        _add_models,
    ):
        add(verbs)
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:  # a command of its own, with all that follows
        return _convert(argv[1:])
    arguments, extra = parser.parse_known_args(argv)
    if extra and arguments.verb not in ("train", "compile"):  # these pass --config.field=value on to the recipe
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.extra = extra
    quiet_libtpu()
    try:
        _check_outputs(arguments)
        return arguments.run(arguments) or 0
    except (InputError, KeyboardInterrupt) as error:
        return _report(error)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses, before any work, places that results cannot be written to."""
    for name in ("workdir", "out", "prompt_cache", *FILES):
        if path := getattr(arguments, name, None):
            refuse_url(f"--{name.replace('_', '-')}", path)
            if name in FILES:
                check_file(f"--{name}", path)


def _report(error: BaseException) -> int:
    """Prints why a verb ended, if anybody listens still; returns the exit status."""
    if isinstance(error, InputError):
        status, words = 2, f"dpir: error: {error}"
    elif isinstance(error, KeyboardInterrupt):
        status, words = 130, "dpir: interrupted"
    else:
        status, words = 1, "".join(traceback.format_exception(error)).rstrip()
    with contextlib.suppress(OSError):  # one of several processes has to leave, heard or not
        print(words, file=sys.stderr)
    return status


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
    verb.add_argument("--sampler", metavar="NAME", help="euler, or ddpm, ddim, dpm++, unipc; default: the model's")
    verb.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what is to be seen, for models with a text encoder; default: NAME.txt beside the photo, if it is there",
    )
    verb.add_argument("--negative-prompt", metavar="TEXT", help="what is not to be seen")
    verb.add_argument(
        "--degradation-prompt",
        metavar="TEXT",
        help="how the photo is degraded, for dalpsr models; default: what the model reads off it",
    )
    verb.add_argument(
        "--fidelity", type=float, default=0.0, metavar="F", help="0 (free, default) to 1 (near the input)"
    )
    verb.add_argument(
        "--tile", type=int, metavar="N", help="side of a tile in pixels of the output; default: the model's"
    )
    verb.add_argument("--color", choices=("wavelet", "adain", "none"), help="colour correction; default: the model's")
    verb.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else bfloat16")
    verb.add_argument(
        "--stage-loading",
        choices=("auto", "always", "never"),
        default="auto",
        help="have only the networks of the stage at hand in memory; default: for models over half of the memory",
    )
    verb.add_argument("--text", choices=("auto", "none"), default="auto", help="none: without the text encoder")
    verb.add_argument("--prompt-cache", metavar="DIR", help="keep encoded prompts here and use them again")
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
        "sampler",
        "seed",
        "prompt",
        "negative_prompt",
        "degradation_prompt",
        "fidelity",
        "tile",
        "color",
    )
    settings = Settings(**{name: getattr(arguments, name) for name in (*names, "max_megapixels")})
    items = plan_job(arguments.photos, arguments.out)
    restorer = load(
        arguments.model,
        dtype=arguments.dtype,
        tile=settings.tile,
        stage_loading=arguments.stage_loading,
        text=arguments.text != "none",
        prompt_cache=arguments.prompt_cache,
    )
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
        help="realesrgan (heavy, default), light, first_order (one blur, noise and JPEG) or native (same, not resized)",
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


# --- degradation -----------------------------------------------------------------------------------------------------


def _add_degradation(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "degradation",
        help="say how photos are degraded",
        description="Prints the degradation prompt of each photo. With --evaluate the photos are taken for good ones: "
        "they are degraded by a recipe, and what is read is compared with what was done.",
    )
    verb.set_defaults(run=_degradation)
    verb.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    verb.add_argument(
        "--model", default="irpad-nano", metavar="NAME|DIR", help="see `dpir models`; default %(default)s"
    )
    verb.add_argument("--json", metavar="FILE", help="also write everything, with all probabilities, to FILE")
    verb.add_argument("--evaluate", metavar="RECIPE,...", help="of native, kernels, realesrgan, light, first_order")
    verb.add_argument("--crop", type=int, default=320, metavar="N", help="evaluate: central NxN pixels; default 320")
    verb.add_argument("--draws", type=int, default=16, metavar="N", help="evaluate: times per photo; default 16")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="evaluate: of everything random; default 0")
    verb.add_argument(
        "--jpeg-table", default="published", metavar="NAME", help="evaluate: published, standard, libjpeg"
    )
    verb.add_argument("--confusion", metavar="FILE", help="evaluate: the confusion matrices as a picture")


def _degradation(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dpir_jax import load_irpad
    from dpir_jax.files import write_json
    from dpir_jax.images import find_photos

    photos, reader = find_photos(arguments.photos), load_irpad(arguments.model)
    bar = functools.partial(tqdm, disable=None)
    if arguments.evaluate:
        return _evaluate_degradation(arguments, reader.network, photos, bar)
    records, failed = [], 0
    for photo in bar(photos, unit="photo"):
        try:
            reading = reader.read(photo)
        except InputError as error:
            failed += 1
            tqdm.write(f"dpir: error: {error}", file=sys.stderr)
        else:
            records.append({"file": str(photo)} | reading.record())
            tqdm.write(f"{photo}: {reading.prompt}")
    if arguments.json:
        write_json(arguments.json, records)
    if failed and len(photos) > 1:
        print(f"dpir: {failed} of {len(photos)} photos could not be read", file=sys.stderr)
    return 2 if failed else 0


def _evaluate_degradation(
    arguments: argparse.Namespace, network: "IRPAD", photos: list[Path], bar: "Callable[..., Iterable]"
) -> int:
    from dpir_jax.files import write_json
    from dpir_jax.training import irpad_evaluation as evaluation

    recipes = {name: evaluation.recipe_named(name, arguments.jpeg_table) for name in arguments.evaluate.split(",")}
    settings = {name: getattr(arguments, name) for name in ("crop", "draws", "seed")}
    scores = {
        name: evaluation.evaluate(
            network, photos, recipe, progress=functools.partial(bar, desc=name, unit="batch"), **settings
        ).scores()
        for name, recipe in recipes.items()
    }
    types = network.config.types
    print(evaluation.table(scores, types))
    if arguments.json:
        write_json(arguments.json, settings | {"jpeg_table": arguments.jpeg_table, "recipes": scores})
    if arguments.confusion:
        evaluation.write_confusion(arguments.confusion, scores[next(iter(scores))], types)
    return 0


# --- caption ---------------------------------------------------------------------------------------------------------


def _add_caption(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "caption",
        help="describe photos in words",
        description="Writes NAME.txt beside each photo: what LLaVA says of it, told RAM's tags. `restore` and `train` "
        "read it. Photos that have one are passed over.",
    )
    verb.set_defaults(run=_caption)
    verb.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    verb.add_argument("--model", required=True, metavar="DIR", help="model folder with LLaVA and its tokenizer")
    verb.add_argument("--tagger", metavar="DIR", help="model folder with RAM and its tags; default: in --model")
    verb.add_argument(
        "--instruction", default="tags", metavar="NAME", help="tags (default), tags-short, detailed or summary"
    )
    verb.add_argument("--batch", type=int, default=1, metavar="N", help="photos at a time; default %(default)s")
    verb.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of a caption; default %(default)s")
    verb.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the likeliest word"
    )
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest words only")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default %(default)s")
    verb.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default %(default)s")
    verb.add_argument("--overwrite", action="store_true", help="describe again what has a caption")


def _caption(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dpir_jax.captions.captioner import questioned, read_captioner
    from dpir_jax.captions.job import caption_photos, photos_to_caption
    from dpir_jax.models.llama import Decoding

    decoding = Decoding(arguments.max_tokens, arguments.temperature, arguments.top_p)
    questioned(arguments.instruction)
    photos = photos_to_caption(arguments.photos)
    captioner = read_captioner(arguments.model, arguments.tagger, dtype=arguments.dtype)
    options = {"instruction": arguments.instruction, "decoding": decoding, "seed": arguments.seed}
    describe = functools.partial(captioner, **options)
    failed = 0
    with tqdm(total=len(photos), unit="photo", disable=None) as bar:
        for outcome in caption_photos(describe, photos, batch=arguments.batch, overwrite=arguments.overwrite):
            bar.update()
            if outcome.error:
                failed += 1
                tqdm.write(f"dpir: error: {outcome.error}", file=sys.stderr)
            else:
                tqdm.write(f"{outcome.photo}: {outcome.caption or 'has a caption'}")
    if failed and len(photos) > 1:
        print(f"dpir: {failed} of {len(photos)} photos could not be described", file=sys.stderr)
    return 2 if failed else 0


# --- train -----------------------------------------------------------------------------------------------------------


def _add_train(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "train",
        help="train a model by a recipe",
        usage="dpir train --config FILE[:STAGE] --workdir DIR [--distributed [WHERE]] [--config.FIELD=VALUE ...]",
        description="Train by a recipe. The same command again goes on where the run was stopped or killed.",
        allow_abbrev=False,
    )
    verb.add_argument(
        "--config", required=True, metavar="FILE[:STAGE]", help="the recipe, e.g. configs/dpir_nano.py:dit"
    )
    verb.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run keeps checkpoints, logs and previews"
    )
    verb.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="WHERE",
        help="one of several processes: auto (the default; TPU pods, Slurm, Open MPI) or HOST:PORT/INDEX/COUNT",
    )
    verb.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from dpir_jax.parallel import processes
    from dpir_jax.training.config import load_recipe

    recipe, workdir = load_recipe(arguments.config, arguments.extra), Path(arguments.workdir)
    _make_workdir(workdir)
    if not arguments.distributed:
        return _train_here(recipe, workdir)
    processes.start(arguments.distributed)
    try:
        return _train_here(recipe, workdir)
    except BaseException as error:
        processes.leave(_report(error))


def _make_workdir(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next(filter(os.path.isfile, (workdir, *workdir.parents)), None)
        why = f"{file} is a file" if file else f"it cannot be made ({error.strerror or error})"
        raise InputError(f"--workdir {workdir}: {why}; choose a folder, or a place for a new one") from error


def _train_here(recipe: "Recipe", workdir: Path) -> int:
    from dpir_jax.parallel import processes
    from dpir_jax.training.loop import train
    from dpir_jax.training.report import SUMMARY, format_summary, read_run

    outcome = train(recipe, workdir)
    if processes.is_first() and (workdir / SUMMARY).is_file():
        print(format_summary(read_run(workdir)))
    print(f"{outcome.reason} at step {outcome.step} of {recipe.train.steps}; the run is in {workdir}")
    if outcome.step < recipe.train.steps:
        print("the same command goes on from here")
    return 128 + outcome.signal if outcome.signal else 0


# --- runs ------------------------------------------------------------------------------------------------------------


def _add_runs(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "runs",
        help="what a training run tells: a summary and its curves",
        description="Prints the summary of a run, finished or not, and draws its curves to WORKDIR/curves.png.",
    )
    verb.add_argument("workdir", metavar="WORKDIR", help="the run, or a folder of runs")
    verb.add_argument("--json", metavar="FILE", help="also write the summary to FILE")
    verb.set_defaults(run=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    from dpir_jax.files import write_json
    from dpir_jax.training.report import draw_curves, find_runs, format_summary, read_run

    summaries, status = {}, 0
    for workdir in find_runs(arguments.workdir):
        try:
            run = read_run(workdir)
            summaries[str(workdir)] = run.summary
            print(format_summary(run))
            print(f"  curves     {draw_curves(run, workdir / 'curves.png')}\n")
        except InputError as error:
            status = _report(error)
    if arguments.json and summaries:
        write_json(arguments.json, summaries)
    return status


# --- pack ------------------------------------------------------------------------------------------------------------


def _add_pack(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "pack",
        help="turn a photo collection into a data set for large runs",
        description="Builds the TFDS data set dpir_photos in ArrayRecord files: photos, captions, sizes, licences and "
        "sources, for data.records of a recipe. Needs the extra [tfds].",
    )
    verb.add_argument("photos", metavar="PHOTOS", help="the folder of photos, searched recursively")
    verb.add_argument("--out", required=True, metavar="DIR", help="where data sets are kept")
    verb.add_argument("--beam", metavar="FLAGS", help='build by Apache Beam, e.g. --beam="--runner=DirectRunner"')
    verb.set_defaults(run=_pack)


def _pack(arguments: argparse.Namespace) -> int:
    try:
        from dpir_jax.data.dpir_photos import build
    except ModuleNotFoundError as error:
        raise InputError(f"dpir pack needs {error.name}: pip install 'dpir-jax[tfds]'") from error
    from dpir_jax.data.records import PhotoRecords

    built = build(arguments.photos, arguments.out, beam=arguments.beam and arguments.beam.split())
    count = len(PhotoRecords(built)) if any(built.glob("*-train.*")) else 0
    print(f"{count} photo{'s' * (count != 1)} to train on in {built}")
    return 0


# --- precompute ------------------------------------------------------------------------------------------------------


def _add_precompute(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "precompute",
        help="store what frozen networks make of every photo",
        description="Computes text embeddings, latents and CLIP embeddings once, for training with data.embeddings. "
        "The same command again goes on where it was stopped.",
    )
    verb.add_argument("photos", nargs="+", metavar="PHOTOS", help="one built data set, or folders of photos")
    verb.add_argument("--model", required=True, metavar="DIR", help="the model folder")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder for the arrays")
    verb.add_argument(
        "--arrays", default="text", metavar="NAME,...", help="of text, moments, clip_tokens, clip_embed; default text"
    )
    verb.add_argument("--form", default="int8", help="of the text: int8 (default) or bfloat16")
    verb.add_argument(
        "--crop", type=int, default=512, metavar="N", help="as data.global_crop of the training; default %(default)s"
    )
    verb.add_argument("--shard", type=int, default=1024, metavar="N", help="photos per file; default %(default)s")
    verb.add_argument("--batch", type=int, default=16, metavar="N", help="photos at once; default %(default)s")
    verb.add_argument(
        "--process",
        default="0/1",
        metavar="I/N",
        help="this is process I of N that share the work; default %(default)s",
    )
    verb.set_defaults(run=_precompute)


def _precompute(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from dpir_jax.precompute import open_photos, precompute
    from dpir_jax.restore import compilation_cache

    compilation_cache.enable()
    index, _, count = arguments.process.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--process is {arguments.process}; it must be I/N with I from 0 to N - 1")
    photos = open_photos(arguments.photos, arguments.crop)
    names = ("model", "out", "form", "crop", "shard", "batch")
    settings = {name: getattr(arguments, name) for name in names} | {"arrays": arguments.arrays.split(",")}
    with tqdm(total=len(photos), unit="photo", disable=None) as bar:
        processes = {"process_index": int(index), "process_count": int(count)}
        summary = precompute(photos, **settings, **processes, progress=bar.update)
    size = "" if summary.bytes_per_photo is None else f", {summary.bytes_per_photo / 1e3:.1f} kB a photo"
    print(f"{summary.written} files written, {summary.found} found{size}")
    if summary.relative_error is not None:
        print(f"the stored text is within {summary.relative_error:.2%} of the computed one (RMS)")
    return 0


# --- compile ---------------------------------------------------------------------------------------------------------


def _add_compile(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser(
        "compile",
        help="compile a training or sampling step for TPUs that are not there: does it fit, how fast can it be",
        usage="dpir compile --config FILE[:STAGE] [--topology NAME] [--batch-per-chip N] [--config.FIELD=VALUE ...]",
        description="Compiles the recipe's training step ahead of time and says what it needs: memory by kind, bytes "
        "sent, FLOPs, the shortest time that a step can take. Without a topology, or on a machine that has it, the "
        "step is also run and timed, and always compiled as for a run.",
        allow_abbrev=False,
    )
    verb.set_defaults(run=_compile)
    verb.add_argument("--config", required=True, metavar="FILE[:STAGE]", help="the recipe")
    verb.add_argument("--topology", metavar="NAME", help="v5e-16, v5p-128, v6e-256, v5p:4x4x4; default: what is here")
    verb.add_argument(
        "--batch-per-chip",
        type=int,
        metavar="N",
        help="images; default: the recipe's batch, divided; with --sampling 4 tiles",
    )
    kind = verb.add_mutually_exclusive_group()
    kind.add_argument("--sampling", action="store_true", help="a step of restoring instead, on one chip")
    kind.add_argument(
        "--search",
        action="store_true",
        help="find the best preset with its mesh and their largest batch, in place of those of the recipe; "
        "--batch-per-chip is where it begins",
    )
    verb.add_argument(
        "--full-effort",
        action="store_true",
        help="for a topology that is not here: let the compiler do all it does for a run. Takes four times as long; "
        "what the answers differ by is in docs/scaling.md",
    )
    verb.add_argument("--json", metavar="FILE", help="also write everything to FILE; of a search all that was tried")


def _compile(arguments: argparse.Namespace) -> int:
    from dpir_jax.files import write_json
    from dpir_jax.parallel.compiled import describe

    result = _compiled(arguments)
    print(describe(result))
    if arguments.json:
        write_json(arguments.json, result)
    return 0 if result["fits"] else 1


def _compiled(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from dpir_jax.parallel.topologies import parse_topology, quickly
    from dpir_jax.training import ahead
    from dpir_jax.training.config import load_recipe

    topology = parse_topology(arguments.topology) if arguments.topology else None
    recipe = load_recipe(arguments.config, arguments.extra)
    for option in ("search", "sampling"):
        if getattr(arguments, option) and topology is None:
            raise InputError(f"--{option} needs a --topology to compile for")
    fixed = [each for each in arguments.extra if each.startswith(("--config.mesh", "--config.sharding"))]
    if arguments.search and fixed:
        raise InputError(f"--search tries presets and meshes itself; leave {fixed[0]} out, or --search")
    training = not (arguments.search or arguments.sampling)
    if training and (topology is None or ahead.is_here(topology)):
        return ahead.measure(recipe, arguments.batch_per_chip)
    with contextlib.nullcontext() if arguments.full_effort else quickly():
        if arguments.sampling:
            return _compile_sampling(recipe, topology, arguments.batch_per_chip)
        if arguments.search:
            return _search(recipe, topology, arguments.batch_per_chip)
        return ahead.compile_for(recipe, topology, arguments.batch_per_chip)


def _search(recipe: "Recipe", topology: "Topology", batch_per_chip: int | None) -> Mapping[str, Any]:
    from dpir_jax.parallel.compiled import describe
    from dpir_jax.training import ahead

    tried = []
    for result in ahead.search(recipe, topology, batch_per_chip):
        tried.append(result)
        print(describe(result), end="\n\n", flush=True)
    if (result := ahead.best(tried)) is None:
        print("nothing fits")
        return {**ahead.least(tried), "tried": tried}
    most = ahead.largest(tried, result)["batch_per_chip"]
    print(f"most images per second (the largest batch that fits there is of {most:g} images a chip):")
    return {**result, "largest_batch_per_chip": most, "tried": tried}


def _compile_sampling(recipe: "Recipe", topology: "Topology", tiles: int | None) -> dict[str, Any]:
    from dpir_jax.restore.ahead import TILES, compile_sampling
    from dpir_jax.restore.models import model_settings

    task = recipe.build_task()
    if not hasattr(task, "restore"):
        raise InputError(f"{recipe.task_type} makes no system that restores photos; --sampling needs one")
    defaults, _ = model_settings(Path("config.task"), dict(task.restore))
    return compile_sampling(task.config, defaults, topology, TILES if tiles is None else tiles)


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
    from dpir_jax.pretrained import EMBEDDED
    from dpir_jax.restore.models import embedded_models

    models = embedded_models()
    for info in models:
        print(f"{info.name}  {info.bytes / 1e6:.1f} MB  sha256 {info.sha256[:16]}  {info.description or ''}".rstrip())
    if not models:
        print(f"no models in {EMBEDDED}; `--model` also takes a model folder")
    return 0
