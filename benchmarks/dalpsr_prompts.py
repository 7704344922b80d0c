"""Does the degradation prompt matter? The same photos under what IRPAD reads off them, and under other prompts.

    python benchmarks/dalpsr_prompts.py --photos ../shared/photos/val --model dalpsr-nano --out runs/prompts

predicted   IRPAD's words for the photo            least   0~0.25 of everything
wrong       the same with every interval two       most    0.75~1 of everything
            further on, of four                    none    no words

Prints mean PSNR-Y, LPIPS-alex and DISTS per recipe and prompt, and how often the predicted prompt beats the wrong one.
Needs the weights of DISTS (docs/metrics.md).
"""

import argparse
import json
import re
from pathlib import Path

from nano_quality import make_pairs, measure

import dpir_jax

INTERVALS = ("0~0.25", "0.25~0.5", "0.5~0.75", "0.75~1")
KINDS = ("predicted", "wrong", "least", "most", "none")


def other(prompt: str, further: int) -> str:
    """The prompt with every interval `further` places on, in a circle."""
    place = {interval: i for i, interval in enumerate(INTERVALS)}
    return re.sub(r"[0-9.]+~[0-9.]+", lambda found: INTERVALS[(place[found[0]] + further) % 4], prompt)


def prompts(predicted: str) -> dict[str, str]:
    """Every kind of prompt for a photo."""
    least, most = (re.sub(r"[0-9.]+~[0-9.]+", INTERVALS[end], predicted) for end in (0, -1))
    return dict(zip(KINDS, (predicted, other(predicted, 2), least, most, "")))


def main() -> None:
    """Makes the pairs, restores them, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("../shared/photos/val"))
    parser.add_argument("--out", type=Path, default=Path("runs/prompts"))
    parser.add_argument("--model", default="dalpsr-nano", metavar="NAME|DIR")
    parser.add_argument("--recipes", nargs="*", default=["first_order", "light", "realesrgan"])
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    restorer, rows = dpir_jax.load(arguments.model), []

    print("| recipe | prompt | PSNR-Y | LPIPS-alex | DISTS |\n|---|---|---|---|---|")
    for recipe in arguments.recipes:
        pairs = arguments.out / recipe
        make_pairs(arguments.photos, pairs, recipe, arguments.crop)
        for index, photo in enumerate(sorted((pairs / "lq").glob("*.png"))):
            options = {"scale": 4, "steps": arguments.steps, "index": index}
            predicted = restorer(photo, **options)
            said = prompts(predicted.record["degradation_prompt"])
            for kind in KINDS:
                same = kind == "predicted"
                result = predicted if same else restorer(photo, degradation_prompt=said[kind], **options)
                result.save(arguments.out / f"{recipe}_{kind}" / photo.name)
        scores = {}
        for kind in KINDS:
            mean = measure(arguments.out / f"{recipe}_{kind}", pairs / "hq")
            rows.append({"recipe": recipe, "prompt": kind} | mean)
            scores[kind] = json.loads((arguments.out / f"{recipe}_{kind}.json").read_text())["photos"]
            print(f"| {recipe} | {kind} | {mean['psnr_y']:.3f} | {mean['lpips_alex']:.4f} | {mean['dists']:.4f} |")
        better = [a["lpips_alex"] < b["lpips_alex"] for a, b in zip(scores["predicted"], scores["wrong"])]
        print(f"LPIPS is lower under the predicted prompt than under the wrong one for {sum(better)} of {len(better)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
