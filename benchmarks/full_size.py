"""DPIR at the published size on this machine: memory and seconds per stage of `dpir restore`, with random weights.

    python benchmarks/full_size.py --folder DIR [--steps 2] [--json FILE] [--markdown FILE]

Writes a model folder as large as the published system (transformer, autoencoder, E_dr, ViT-B/32, OpenCLIP bigG and
T5-XXL in bfloat16: 18 GB; kept in DIR and used again), then restores one photo of 512x512 pixels by the command three
times: with a prompt, again with the encoded prompt from its cache, and without T5. What the pictures show is noise;
what is measured does not depend on the values of the weights. Ends with status 1 if more memory was used than LIMIT.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from PIL import Image
from tqdm import tqdm

from convert_weights.engine import leaves
from convert_weights.writer import SafetensorsWriter
from dpir_jax.errors import InputError
from dpir_jax.files import write_json, write_text
from dpir_jax.model_folder import new_folder
from dpir_jax.models.layers import Keys
from dpir_jax.systems.config_json import to_json
from dpir_jax.systems.dpir import DPIR, DPIRConfig

PHOTO = sorted((Path(__file__).parent.parent / "dpir_jax" / "demo_photos" / "lq").glob("*.*"))[0]
SIDE = 512
PROMPT = "a boat in the harbour"
POOL = 1 << 22  # numbers that are drawn; every array is a stretch of them, from a place of its own, repeated
LIMIT = 13e9  # bytes in memory that the project allows itself


def write_model(out: Path) -> None:
    """The model folder, array by array: memory holds one row of one array."""
    config = DPIRConfig.sd3_medium()
    networks = {
        name: leaves(network) for name, network in nnx.eval_shape(lambda: DPIR(config, rngs=Keys(0))).networks().items()
    }
    size = 2 * sum(math.prod(leaf.shape) for network in networks.values() for leaf in network.values())
    if (free := shutil.disk_usage(out.parent).free) < size + 2e9:
        raise InputError(f"{out.parent} has {free / 1e9:.0f} GB left; the model needs {size / 1e9:.0f}")
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
    dtype = np.dtype(ml_dtypes.bfloat16)
    with new_folder(out) as folder, tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        for name, network in networks.items():
            arrays = {path: (leaf.shape, dtype) for path, leaf in network.items()}
            with SafetensorsWriter(folder / f"{name}.safetensors", arrays) as writer:
                for path, leaf in network.items():
                    numbers = _numbers(path, leaf.shape, pool).astype(dtype)
                    rows = range(leaf.shape[0]) if len(leaf.shape) > 2 else [None]
                    for row in rows:
                        shape = leaf.shape if row is None else leaf.shape[1:]
                        start = zlib.crc32(f"{name}.{path}.{row}".encode()) % POOL
                        writer.write(path, np.resize(np.roll(numbers, -start), shape), row)
                    bar.update(2 * math.prod(leaf.shape))
        _write_tokenizer(folder / "tokenizer")
        restore = {"steps": 28, "guidance": 1.0, "color": "wavelet", "shift": 3.0, "published": True}
        about = {"system": "dpir", "description": "random weights of the published size", "restore": restore}
        write_json(folder / "config.json", about | {"config": to_json(config)})


def _numbers(path: str, shape: tuple[int, ...], pool: np.ndarray) -> np.ndarray:
    """Of a size that keeps activations near 1: norms at 1, kernels by their inputs."""
    if path.endswith("scale"):
        return 1 + 0.02 * pool
    if path.endswith("kernel"):
        stacked = "blocks." in path or "runs." in path or "rest." in path
        return pool / math.sqrt(math.prod(shape[stacked:-1]))
    return 0.02 * pool


def _write_tokenizer(folder: Path) -> None:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [(f"▁{word}", -2.0) for word in PROMPT.split()]
    T5Tokenizer(vocab=special + list(dict.fromkeys(words)) + letters, extra_ids=0).save_pretrained(folder)


def restore(model: Path, photo: Path, out: Path, steps: int, text: dict) -> dict:
    """One run of the command: seconds per stage and the peak of memory."""
    options = {"--model": model, "--out": out, "--scale": 1, "--tile": SIDE, "--steps": steps, "--dtype": "bfloat16"}
    words = [str(word) for option in (options | text).items() for word in option]
    start, before = time.perf_counter(), _cpu_seconds()
    subprocess.run([sys.executable, "-m", "dpir_jax", "restore", str(photo), *words], check=True)
    process = {"process": round(time.perf_counter() - start, 1), "of a core": round(_cpu_seconds() - before, 1)}
    run = json.loads((out / f"{photo.stem}.json").read_text())
    return {"seconds": run["seconds"] | process, "peak_bytes": run["peak_memory"]["host_bytes"]}


def _cpu_seconds() -> float:
    """Of all processes that have ended: unlike the clock's, hardly more where others want the cores too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def page(runs: dict[str, dict], steps: int) -> str:
    """The table."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run["seconds"]))
    head = ["stage, seconds", *runs]
    rows = [[name, *(f"{run['seconds'].get(name, 0):.1f}" for run in runs.values())] for name in names]
    rows.append(["peak memory of the process, GB", *(f"{run['peak_bytes'] / 1e9:.2f}" for run in runs.values())])
    lines = [
        f"`python benchmarks/full_size.py`, {time.strftime('%Y-%m-%d')}: one photo of {SIDE}x{SIDE}, {steps} steps,",
        f"bfloat16 weights, jax {jax.__version__}, {_machine()}, load average {os.getloadavg()[2]:.1f}.",
        "",
        *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]),
    ]
    return "\n".join(lines) + "\n"


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{cores} core{'s' * (cores != 1)} of {name}, {memory / 1e9:.0f} GB of memory, no accelerator"


def main() -> int:
    """Writes, restores, reports; 1 if more memory was used than allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the model, 18 GB; used again if it is there")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table as a page")
    arguments = parser.parse_args()
    model = arguments.folder / "dpir-full-size-random"
    if not (model / "manifest.json").is_file():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_model(model)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"wrote {model}; peak memory {peak / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        photo = folder / "photo.png"
        Image.open(PHOTO).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(photo)
        prompt = {"--prompt": PROMPT, "--prompt-cache": folder / "cache"}
        texts = {"with a prompt": prompt, "again, prompts from the cache": prompt, "`--text none`": {"--text": "none"}}
        runs = {
            name: restore(model, photo, folder / str(number), arguments.steps, text)
            for number, (name, text) in enumerate(texts.items())
        }
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # up to the very end, unlike the record's
    table = page(runs, arguments.steps)
    print(table)
    if arguments.json:
        write_json(arguments.json, runs)
    if arguments.markdown:
        write_text(arguments.markdown, table)
    return int(max(peak, *(run["peak_bytes"] for run in runs.values())) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
