"""The command: `python -m convert_weights`, also `dpir convert`."""

import argparse
import contextlib
import dataclasses
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert_weights import lora
from convert_weights.branch import with_new_branch
from convert_weights.conversion import TYPES, Conversion, prepare, verify, write, write_torch
from convert_weights.families import CONFIGS, FAMILIES, Family, encoder_only, of_network, parts, recognise
from convert_weights.readers import PIPELINE, SUFFIXES, Source, locate, open_source
from convert_weights.writer import Mapped
from dpir_jax.errors import InputError
from dpir_jax.files import read_json, refuse_url, write_json
from dpir_jax.model_folder import new_folder, read_config
from dpir_jax.model_folder import verify as verify_sums
from dpir_jax.systems.config_json import from_json, to_json
from dpir_jax.systems.dalpsr import DaLPSRConfig, makers
from dpir_jax.systems.dpir import DPIRConfig
from dpir_jax.systems.tokenizers import hugging_face_tokenizer

CLASSES = (  # of diffusers pipelines, those that have a family
    *("SD3Transformer2DModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"),
    *("CLIPVisionModelWithProjection", "T5EncoderModel", "UNet2DConditionModel", "ControlNetModel"),
)
ADAPTED = ("mmdit", "ram")  # networks that take a LoRA
NO_NETWORKS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")
ROLES = {  # networks of DPIR and DaLPSR: kind of network and folder in a pipeline
    "transformer": ("mmdit", "transformer"),
    "vae": ("autoencoder", "vae"),
    "robust_vae": ("autoencoder", "vae"),
    "clip_tokens": ("clip_vision", "image_encoder"),
    "clip_embed": ("clip_vision", "image_encoder"),
    "t5": ("t5", "text_encoder_3"),
    "unet": ("unet", "unet"),
    "controlnet": ("controlnet", "controlnet"),
    "text_encoder": ("clip_text", "text_encoder"),
    "ram": ("ram", "ram"),
}
NAMES = {"transformer": "mmdit", "vae": "autoencoder", "robust_vae": "robust_encoder", "ram": "image_encoder"}
OBJECTIVES = {"epsilon": "epsilon", "v_prediction": "velocity"}


def main(argv: Sequence[str] | None = None, prog: str = "python -m convert_weights") -> int:
    """Runs the command; returns the exit status. Bad input prints one line and returns 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    systems = {"dpir": (_dpir_parser, _dpir), "dalpsr": (_dalpsr_parser, _dalpsr)}
    if argv and argv[0] in systems:
        parser, run = systems[argv[0]]
        arguments = parser(f"{prog} {argv[0]}").parse_args(argv[1:])
    else:
        arguments = _parser(prog).parse_args(argv)
        run = _to_torch if arguments.to_torch else _convert
    try:
        refuse_url("OUT", arguments.out)
        with _stoppable():
            run(arguments)
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A polite kill is an interrupt, so that the half-written folder goes too."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: leave signals alone
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Turns PyTorch weights into a model folder, or back with --to-torch. "
        f"`{prog} dpir --help`, `{prog} dalpsr --help`: a whole system out of its parts.",
    )
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE + "; with --to-torch: a model folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write; a model folder there is replaced")
    parser.add_argument("--family", default="auto", choices=("auto", *FAMILIES), help="default: by keys and shapes")
    parser.add_argument("--to-torch", action="store_true", help="from a model folder to PyTorch's layout")
    parser.add_argument(
        "--layout",
        default="diffusers",
        choices=("diffusers", "original"),
        help="with --to-torch: folders for from_pretrained (default), or single files in the original layout",
    )
    parser.add_argument("--lora-keep", action="store_true", help="keep DAPE as layers of their own instead")
    _common(parser)
    return parser


def _dpir_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Makes a DPIR model folder, for `dpir restore --model OUT`, out of its parts."
    )
    parser.add_argument("out", metavar="OUT", help="the model folder to write")
    parser.add_argument("--pipeline", metavar="SOURCE", help="an SD3 pipeline: vae, t5 and tokenizer where not named")
    parser.add_argument("--transformer", metavar="SOURCE", required=True, help="DPIR's: SD3 and control_conv")
    parser.add_argument("--new-branch", action="store_true", help="give SD3's own transformer an untrained branch")
    parser.add_argument("--vae", metavar="SOURCE", help="SD3's autoencoder")
    parser.add_argument("--robust-vae", metavar="SOURCE", required=True, help="DPIR's fine-tuned autoencoder")
    parser.add_argument("--clip-tokens", metavar="SOURCE", required=True, help="CLIP ViT-B/32")
    parser.add_argument("--clip-embed", metavar="SOURCE", required=True, help="OpenCLIP ViT-bigG/14")
    parser.add_argument("--t5", metavar="SOURCE", help="T5 v1.1 XXL")
    parser.add_argument("--tokenizer", metavar="DIR", help="the folder of T5's tokenizer")
    parser.add_argument("--text", choices=("t5", "none"), default="t5", help="none: without text encoder, no prompts")
    _common(parser)
    return parser


def _dalpsr_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Makes a DaLPSR model folder out of its parts: for `dpir restore --model OUT`, or without "
        "--controlnet for training to start from (configs/dalpsr_sd2.py). DAPE is kept beside RAM.",
    )
    parser.add_argument("out", metavar="OUT", help="the model folder to write")
    parser.add_argument("--pipeline", metavar="SOURCE", help="Stable Diffusion 2: whatever is not named")
    parser.add_argument("--unet", metavar="SOURCE", help="SeeSR's, say")
    parser.add_argument("--controlnet", metavar="SOURCE", help="without it the folder can only be trained from")
    parser.add_argument("--vae", metavar="SOURCE", help="Stable Diffusion's autoencoder")
    parser.add_argument("--text-encoder", metavar="SOURCE", help="OpenCLIP ViT-H/14's text tower")
    parser.add_argument("--ram", metavar="SOURCE", help="the image encoder, with --lora DAPE.pth; default: none")
    parser.add_argument("--tokenizer", metavar="DIR", help="the folder of the text tower's tokenizer")
    parser.add_argument(
        "--routing",
        choices=("split", "both", "caption"),
        help="caption to the ControlNet and degradation to the UNet, both to both, or SeeSR's: the caption to both; "
        "default: split, caption for a UNet with image attention",
    )
    parser.add_argument(
        "--objective", choices=("epsilon", "velocity"), help="what the UNet predicts; default: as the pipeline says"
    )
    parser.add_argument(
        "--irpad", default="irpad-nano", metavar="NAME|DIR", help="what reads the degradation; default %(default)s"
    )
    _common(parser)
    return parser


_SOURCE = (
    "a file (.safetensors, .pth, .ckpt, .bin), an index of shards, a folder with weights, a diffusers pipeline, "
    "or hf:OWNER/NAME[/FOLDER] to fetch it from Hugging Face"
)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=tuple(TYPES), help="what to store floats as; default: as they are")
    parser.add_argument("--variant", metavar="NAME", help="of diffusers files, such as fp16")
    parser.add_argument("--lora", metavar="SOURCE", help="merge this LoRA into the transformer, or DAPE into RAM")
    parser.add_argument("--lora-scale", type=float, default=1.0, metavar="S", help="default %(default)g")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; read headers only")
    parser.add_argument("--verify", action="store_true", help="read all back and compare it bit for bit")


# --- from PyTorch ----------------------------------------------------------------------------------------------------


def _convert(arguments: argparse.Namespace) -> None:
    conversions: list[Conversion] = []
    for source in _networks(arguments.source, arguments.variant):
        for family in recognise(source, arguments.family):
            taken = sum(other.name.startswith(family.network) for other in conversions)
            name = f"{family.network}_{taken + 1}" if taken else family.network
            conversions.append(_prepare(arguments, name, source, family, arguments.lora_keep))
    if arguments.lora and not any(conversion.family.network in ADAPTED for conversion in conversions):
        raise InputError(f"a LoRA goes into a transformer or RAM, and {arguments.source} holds none")
    tokenizer = None
    if any(conversion.family.network == "llava" for conversion in conversions):  # captions need the one beside it
        folder = locate(arguments.source, variant=arguments.variant)
        tokenizer = folder if (folder / "tokenizer_config.json").is_file() else None
    _write(arguments, conversions, _listed(conversions), tokenizer)


def _listed(conversions: Sequence[Conversion]) -> dict[str, Any]:
    networks = {c.name: {"family": c.family.name, "config": to_json(c.config)} for c in conversions}
    return {"system": "networks", "networks": networks}


def _networks(where: str, variant: str | None) -> list[Source]:
    """The networks in a source: one, those of a single file, or those of a pipeline folder."""
    path = locate(where, variant=variant)
    if not (path / PIPELINE).is_file():
        return parts(open_source(where, variant=variant))
    entries = read_json(path / PIPELINE).items()
    kinds = {name: value[1] for name, value in entries if isinstance(value, list) and len(value) == 2 and value[1]}
    for name, kind in kinds.items():
        if kind not in CLASSES and not kind.endswith(NO_NETWORKS):
            print(f"{name}: left out, {kind} is of no known family")
    names = [name for name, kind in kinds.items() if kind in CLASSES]
    return [part for name in names for part in parts(open_source(where, subfolder=name, variant=variant))]


def _prepare(
    arguments: argparse.Namespace, name: str, source: Source, family: Family, keep: bool = False
) -> Conversion:
    """`keep`: a LoRA beside the weights instead of in them."""
    if keep and (family.network != "ram" or not arguments.lora or arguments.lora_scale != 1):
        raise InputError("--lora-keep goes with --lora DAPE.pth for RAM, and without --lora-scale")
    if arguments.lora and family.network in ADAPTED:
        adapter = open_source(arguments.lora)
        source = lora.beside(source, adapter) if keep else lora.merge(source, family, adapter, arguments.lora_scale)
    return prepare(name, source, family, arguments.dtype)


def _write(
    arguments: argparse.Namespace,
    conversions: Sequence[Conversion],
    config: dict[str, Any],
    tokenizer: Path | None = None,
) -> None:
    for conversion in conversions:
        print(conversion.summary)
    if arguments.dry_run:
        return
    total = sum(conversion.nbytes for conversion in conversions)
    with new_folder(arguments.out) as folder:
        for conversion in conversions:
            with _bar(conversion.nbytes, conversion.name) as bar:
                notes = write(conversion, folder, bar.update)
            for note in notes:
                print(f"{conversion.name}: note: {note}")
        if tokenizer:
            weights = shutil.ignore_patterns(*(f"*{suffix}" for suffix in (*SUFFIXES, ".index.json")))
            shutil.copytree(tokenizer, folder / "tokenizer", ignore=weights)
        write_json(folder / "config.json", config)
        if arguments.verify:
            for conversion in conversions:
                with _bar(conversion.nbytes, f"{conversion.name}, verifying") as bar:
                    verify(conversion, folder / f"{conversion.name}.safetensors", bar.update)
                print(f"{conversion.name}: verified, every tensor comes back bit for bit")
    print(f"wrote {arguments.out}, {total / 1e9:.2f} GB read")


def _bar(size: int, name: str) -> tqdm:
    return tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None)


# --- DPIR ------------------------------------------------------------------------------------------------------------


def _dpir(arguments: argparse.Namespace) -> None:
    wanted = ["transformer", "vae", "robust_vae", "clip_tokens", "clip_embed"] + ["t5"] * (arguments.text == "t5")
    found = {role: _role(arguments, role) for role in wanted}
    transformer = found["transformer"].config
    if transformer.lq_branch is None:
        name = found["transformer"].source.name
        raise InputError(f"{name} has no control_conv: it is SD3's transformer, not DPIR's; to train it: --new-branch")
    vae = found["vae"].config
    config = DPIRConfig(
        autoencoder=vae,
        robust_encoder=found["robust_vae"].config,
        mmdit=transformer,
        clip_tokens=found["clip_tokens"].config,
        clip_embed=found["clip_embed"].config,
        t5=found["t5"].config if "t5" in found else None,
        tile=transformer.sample_size,
        global_tile=transformer.sample_size * vae.spatial_factor,
        global_overlap=transformer.sample_size * vae.spatial_factor // 16,
    )
    document = {
        "system": "dpir",
        "description": "DPIR, converted from PyTorch weights",
        "config": to_json(config),
        "restore": {"steps": 28, "guidance": 1.0, "color": "wavelet", "shift": 3.0, "published": True},
    }
    tokenizer = None
    if config.t5:
        tokenizer = _tokenizer(arguments, config.t5.vocabulary, "tokenizer_3", "T5", ", or --text none")
    _write(arguments, list(found.values()), document, tokenizer)


# --- DaLPSR ----------------------------------------------------------------------------------------------------------


def _dalpsr(arguments: argparse.Namespace) -> None:
    wanted = ["unet", "vae", "text_encoder"] + [name for name in ("controlnet", "ram") if getattr(arguments, name)]
    conversions = {NAMES.get(role, role): _role(arguments, role) for role in wanted}
    if arguments.lora and "image_encoder" not in conversions:
        raise InputError("--lora is DAPE's and goes into RAM; --ram is needed")
    configs = {name: conversion.config for name, conversion in conversions.items()}
    text = configs.pop("text_encoder")
    tokenizer = _tokenizer(arguments, text.vocabulary, "tokenizer", "text tower")
    if "controlnet" not in configs:
        _write(arguments, list(conversions.values()), _listed(list(conversions.values())), tokenizer)
        print("without a ControlNet this model restores nothing yet: train one (configs/dalpsr_sd2.py)")
        return
    looking = configs["unet"].image_context_dim is not None
    config = DaLPSRConfig(
        **configs,
        text=text,
        routing=arguments.routing or ("caption" if looking else "split"),
        objective=_objective(arguments),
    )
    document = {
        "system": "dalpsr",
        "description": "DaLPSR, converted from PyTorch weights",
        "config": to_json(config),
        "irpad": arguments.irpad if config.reads_degradation else None,
        "restore": {"steps": 50, "guidance": 5.5, "sampler": "ddpm", "color": "adain"},  # SeeSR's
    }
    _write(arguments, list(conversions.values()), document, tokenizer)


def _objective(arguments: argparse.Namespace) -> str:
    if arguments.objective or arguments.pipeline is None:
        return arguments.objective or "epsilon"
    path = locate(arguments.pipeline, "scheduler") / "scheduler_config.json"
    kind = read_json(path).get("prediction_type", "epsilon")
    if kind not in OBJECTIVES:
        raise InputError(f"{path} has the prediction_type {kind!r}; only {' and '.join(OBJECTIVES)} are known")
    return OBJECTIVES[kind]


# --- both ------------------------------------------------------------------------------------------------------------


def _role(arguments: argparse.Namespace, role: str) -> Conversion:
    network, subfolder = ROLES[role]
    where = getattr(arguments, role)
    option = f"--{role.replace('_', '-')}"
    if where is None:
        if arguments.pipeline is None:
            raise InputError(f"{option} is needed, or --pipeline" + (", or --text none" if role == "t5" else ""))
        source = open_source(arguments.pipeline, subfolder=subfolder, variant=arguments.variant)
    elif (locate(where, variant=arguments.variant) / PIPELINE).is_file():
        source = open_source(where, subfolder=subfolder, variant=arguments.variant)
    else:
        source = open_source(where, variant=arguments.variant)
    found = [(part, family) for part in parts(source) for family in _known(part) if family.network == network]
    if len(found) != 1:
        raise InputError(
            f"{option} {where or arguments.pipeline} holds {len(found) or 'no'} {network} networks, not one"
        )
    part, family = found[0]
    if role == "transformer" and arguments.new_branch:
        part = with_new_branch(part, family)
    keep = role == "ram" and arguments.lora is not None and arguments.lora_scale == 1
    family = encoder_only(family) if role == "robust_vae" else family
    return _prepare(arguments, NAMES.get(role, role), part, family, keep)


def _known(source: Source) -> list[Family]:
    return [family for family in FAMILIES.values() if any(mark in source for mark in family.marks)]


def _tokenizer(arguments: argparse.Namespace, vocabulary: int, subfolder: str, owner: str, other: str = "") -> Path:
    if arguments.tokenizer is None and arguments.pipeline is None:
        raise InputError(f"--tokenizer is needed, or --pipeline{other}")
    folder = locate(arguments.tokenizer) if arguments.tokenizer else locate(arguments.pipeline, subfolder)
    if not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} is not the folder of a tokenizer: it has no tokenizer_config.json")
    if len(hugging_face_tokenizer(str(folder))) > vocabulary:
        raise InputError(f"the tokenizer in {folder} is not this {owner}'s: it knows more than {vocabulary} tokens")
    return folder


# --- to PyTorch ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Network:
    name: str
    torch_name: str
    family: Family
    config: Any
    arrays: Mapping[str, np.ndarray]


def _to_torch(arguments: argparse.Namespace) -> None:
    for name in ("dtype", "lora", "variant"):
        if getattr(arguments, name):
            raise InputError(f"--{name} goes with the way from PyTorch, not with --to-torch")
    folder = Path(arguments.source)
    config = read_config(folder)
    if not arguments.dry_run:
        verify_sums(folder)
    networks = _stored_networks(folder, config, arguments.layout)
    for network in networks:
        print(f"{network.name}: {network.family.name}, to {network.torch_name}")
    if arguments.dry_run:
        return
    with new_folder(arguments.out) as out:
        for network in networks:
            original = network.family.layout == "original"
            alone = len(networks) == 1 and not original
            place = out if alone else out / f"{network.torch_name}{'.safetensors' if original else ''}"
            size = sum(array.nbytes for array in network.arrays.values())
            with _bar(size, network.torch_name) as bar:
                write_torch(network.family, network.config, network.arrays, place, bar.update)
            if arguments.verify:
                _verify_torch(network, place)
        if (folder / "tokenizer").is_dir():  # T5's has its place in an SD3 pipeline
            shutil.copytree(folder / "tokenizer", out / ("tokenizer_3" if config["system"] == "dpir" else "tokenizer"))
    print(f"wrote {arguments.out}")


def _verify_torch(network: _Network, place: Path) -> None:
    """The written checkpoint, read as anyone's, must hold our arrays."""
    source = open_source(place)
    back = prepare(network.name, parts(source)[0], network.family)
    for path, pieces in back.plan.pieces.items():
        for piece in pieces:
            ours = network.arrays[path] if piece.layer is None else network.arrays[path][piece.layer]
            if piece.rule.read(back.source[piece.key]).astype(ours.dtype).tobytes() != ours.tobytes():
                raise InputError(f"{piece.key} does not hold {path} bit for bit")
    print(f"{network.name}: verified, every array comes back bit for bit")


def _stored_networks(folder: Path, config: dict[str, Any], layout: str) -> list[_Network]:
    if config.get("system") == "networks":
        configs = {name: from_json(entry["config"], CONFIGS) for name, entry in config["networks"].items()}
        return [_network(folder, name, settings, layout) for name, settings in configs.items()]
    settings = from_json(config.get("config"), CONFIGS)
    if isinstance(settings, DaLPSRConfig):
        return [
            _network(folder, name, settings.text if name == "text_encoder" else getattr(settings, name), layout)
            for name in makers(settings)
        ]
    if not isinstance(settings, DPIRConfig):
        raise InputError(f"{folder / 'config.json'} describes the system {config.get('system')!r}, which is not known")
    names = ["mmdit", "autoencoder", "robust_encoder", "clip_tokens", "clip_embed"] + ["t5"] * (settings.t5 is not None)
    return [_network(folder, name, getattr(settings, name), layout) for name in names]


def _network(folder: Path, name: str, config: Any, layout: str) -> _Network:
    family = of_network(type(config), layout)
    if family is None:
        raise InputError(f"{name} is a {type(config).__name__.removesuffix('Config')}, which PyTorch has no layout for")
    arrays = Mapped(open_source(folder / f"{name}.safetensors").slots)
    torch_name = family.torch_name if name.startswith(family.network) else name
    suffix = name.removeprefix(family.network) if name.startswith(family.network) else ""
    if name == "robust_encoder":  # PyTorch wants a whole autoencoder: E_dr with the decoder that it was trained for
        arrays = {f"encoder.{path}": array for path, array in arrays.items()}
        whole = Mapped(open_source(folder / "autoencoder.safetensors").slots)
        arrays |= {path: array for path, array in whole.items() if path.startswith("decoder.")}
        torch_name = "robust_vae"
    return _Network(name, torch_name + suffix, family, config, arrays)
