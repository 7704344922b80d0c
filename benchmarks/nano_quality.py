"""Quality of models on the validation photos: 512 crops, x4, light and heavy recipe, fixed seeds, by the `dpir` commands.

    python benchmarks/nano_quality.py --photos ../shared/photos/val --out runs/quality
    python benchmarks/nano_quality.py ... --model E_dr=runs/control --steps 1 4 10 --json table.json

Prints mean PSNR-Y, LPIPS-alex, DISTS and NIQE per model, number of steps and severity, and the ratios to bicubic.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

SEVERITIES = {"light": "light", "heavy": "realesrgan"}
METRICS = "psnr_y,lpips_alex,dists,niqe"


def dpir(*arguments: object) -> None:
    """Runs one `dpir` command; a failure ends the benchmark."""
    subprocess.run([sys.executable, "-m", "dpir_jax", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def bicubic(source: Path, out: Path, scale: int) -> None:
    """The baseline: Pillow's bicubic."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.png")):
        with Image.open(path) as photo:
            size = (photo.width * scale, photo.height * scale)
            photo.resize(size, Image.Resampling.BICUBIC).save(out / path.name)


def measure(restored: Path, reference: Path) -> dict[str, float]:
    """Means of `dpir evaluate`."""
    report = restored.with_suffix(".json")
    dpir("evaluate", "--restored", restored, "--reference", reference, "--metrics", METRICS, "--json", report)
    return json.loads(report.read_text())["mean"]


def main() -> None:
    """Makes the pairs, restores them, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("../shared/photos/val"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--model", nargs="*", default=["dpir-nano"], metavar="[LABEL=]NAME|DIR")
    parser.add_argument("--steps", nargs="*", type=int, default=[1, 4, 10])
    parser.add_argument("--color", default=None)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    rows = []
    for severity, recipe in SEVERITIES.items():
        pairs = arguments.out / severity
        if not (pairs / "parameters.json").exists():
            dpir("degrade", arguments.photos, "--out", pairs, "--recipe", recipe, "--crop", 512, "--seed", 0)
        bicubic(pairs / "lq", arguments.out / f"{severity}_bicubic", 4)
        base = measure(arguments.out / f"{severity}_bicubic", pairs / "hq")
        rows.append({"severity": severity, "model": "bicubic", "steps": None} | base)
        for entry in arguments.model:
            label, _, model = entry.rpartition("=")
            for steps in arguments.steps:
                out = arguments.out / f"{severity}_{label or Path(model).name}_{steps}"
                color = ["--color", arguments.color] if arguments.color else []
                dpir("restore", pairs / "lq", "--out", out, "--model", model, "--steps", steps, *color)
                found = measure(out, pairs / "hq")
                ratios = {f"{name}_ratio": found[name] / base[name] for name in ("lpips_alex", "dists")}
                rows.append({"severity": severity, "model": label or model, "steps": steps} | found | ratios)

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
