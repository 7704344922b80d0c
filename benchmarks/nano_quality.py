"""Quality on the validation photos: 512 crops, x4, light and heavy recipe, fixed seeds, by the `dpir` commands.

    python benchmarks/nano_quality.py --photos ../shared/photos/val --out runs/quality
    python benchmarks/nano_quality.py ... --encoder control=runs/control/model --steps 1 4 10 --json table.json

Prints mean PSNR-Y, LPIPS-alex, DISTS and NIQE per model, number of steps and severity, and the ratios to bicubic. An
`--encoder` is a model folder of stage 1, E_dr alone: it is measured as a system whose DiT is all zeros, which returns
D(E_dr(x)) exactly.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image

from dpir_jax import model_folder
from dpir_jax.models.layers import Keys
from dpir_jax.systems.dpir import DPIR, DPIRConfig
from dpir_jax.systems.dpir_folder import save_dpir

SEVERITIES = {"light": "light", "heavy": "realesrgan"}
METRICS = "psnr_y,lpips_alex,dists,niqe"


def splits(entries: list[str]) -> list[tuple[str, str, str]]:
    """`LABEL=REST` taken apart."""
    return [entry.rpartition("=") for entry in entries]


def dpir(*arguments: object, check: bool = True) -> None:
    """Runs one `dpir` command; a failure ends the benchmark, unless it need not `check`."""
    subprocess.run([sys.executable, "-m", "dpir_jax", *map(str, arguments)], check=check, stdout=subprocess.DEVNULL)


def bicubic(source: Path, out: Path, scale: int) -> None:
    """The baseline: Pillow's bicubic."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.png")):
        with Image.open(path) as photo:
            size = (photo.width * scale, photo.height * scale)
            photo.resize(size, Image.Resampling.BICUBIC).save(out / path.name)


def make_pairs(photos: Path, out: Path, recipe: str, crop: int = 512) -> None:
    """Pairs of the photos that are large enough, with seed 0, unless they are there; without any the benchmark ends."""
    if (out / "parameters.json").exists():
        return
    settings = ("--out", out, "--recipe", recipe, "--crop", crop, "--seed", 0)
    dpir("degrade", photos, *settings, check=False)  # names the photos that are too small
    if not (out / "parameters.json").exists():
        raise SystemExit(f"no pairs could be made of {photos}")


def measure(restored: Path, reference: Path) -> dict[str, float]:
    """Means of `dpir evaluate`."""
    report = restored.with_suffix(".json")
    dpir("evaluate", "--restored", restored, "--reference", reference, "--metrics", METRICS, "--json", report)
    return json.loads(report.read_text())["mean"]


def encoder_as_system(folder: Path, out: Path) -> Path:
    """A model folder whose DiT is zero around the encoder of `folder`."""
    system = nnx.eval_shape(lambda: DPIR(DPIRConfig.nano(), rngs=Keys(0)))
    system = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), system)
    system.residual_scale[...] = jnp.ones_like(system.residual_scale[...])  # a flow needs one to divide by
    for name in ("autoencoder", "robust_encoder"):
        setattr(system, name, model_folder.load_network(folder, name, getattr(system, name)))
    return save_dpir(out, system, description="E_dr alone", restore={"steps": 1}, dtype=jnp.float16)


def main() -> None:
    """Makes the pairs, restores them, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("../shared/photos/val"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--model", nargs="*", default=["dpir-nano"], metavar="[LABEL=]NAME|DIR")
    parser.add_argument("--encoder", nargs="*", default=[], metavar="LABEL=DIR")
    parser.add_argument("--steps", nargs="*", type=int, default=[1, 4, 10])
    parser.add_argument("--color", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    models = [(label or Path(model).name, model, arguments.steps) for label, _, model in splits(arguments.model)]
    for label, _, folder in splits(arguments.encoder):
        models.append((label, encoder_as_system(Path(folder), arguments.out / f"{label}_as_system"), [1]))

    rows = []
    for severity, recipe in SEVERITIES.items():
        pairs = arguments.out / severity
        make_pairs(arguments.photos, pairs, recipe)
        bicubic(pairs / "lq", arguments.out / f"{severity}_bicubic", 4)
        base = measure(arguments.out / f"{severity}_bicubic", pairs / "hq")
        rows.append({"severity": severity, "model": "bicubic", "steps": None} | base)
        for label, model, all_steps in models:
            for steps in all_steps:
                out = arguments.out / f"{severity}_{label}_{steps}"
                color = ["--color", arguments.color] if arguments.color else []
                dpir("restore", pairs / "lq", "--out", out, "--model", model, "--steps", steps, *color)
                found = measure(out, pairs / "hq")
                ratios = {f"{name}_ratio": found[name] / base[name] for name in ("lpips_alex", "dists")}
                rows.append({"severity": severity, "model": label, "steps": steps} | found | ratios)

    print("| severity | model | steps | PSNR-Y | LPIPS-alex | DISTS | NIQE | LPIPS / bicubic | DISTS / bicubic |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratios = [f"{row[name]:.3f}" if name in row else "" for name in ("lpips_alex_ratio", "dists_ratio")]
        numbers = [f"{row['psnr_y']:.2f}", f"{row['lpips_alex']:.3f}", f"{row['dists']:.3f}", f"{row['niqe']:.2f}"]
        print("| " + " | ".join([row["severity"], row["model"], str(row["steps"] or ""), *numbers, *ratios]) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
