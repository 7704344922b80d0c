"""`make demo`: restores the photos that ship with the package, measures them, leaves pictures to look at."""

import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dpir_jax.cli import quiet_libtpu
from dpir_jax.errors import InputError
from dpir_jax.files import write_text
from dpir_jax.images import contact_sheet, find_photos, read_pixels, to_float, write_png

PHOTOS = Path(__file__).parent / "demo_photos"
OUT = Path("demo_out")


def run(out: Path = OUT) -> str:
    """Restores every photo of `demo_photos/lq`; returns the table that it also writes.

    `out` gets NAME.png and NAME.json for each photo, `comparison.png` (input by bicubic, restored, original) and
    `table.txt`.
    """
    from dpir_jax import load
    from dpir_jax.metrics import METRICS
    from dpir_jax.restore import Settings
    from dpir_jax.restore.job import plan_job, run_job

    restorer = load("dpir-nano")
    items = plan_job([PHOTOS / "lq"], out)
    rows, lines = [], []
    measures = [METRICS[name].load(None) for name in ("lpips_alex", "psnr_y")]
    bar = tqdm(total=len(items), unit="photo", disable=None)
    for outcome in run_job(restorer, items, out, Settings(), overwrite=True):
        if outcome.error:
            raise InputError(outcome.error)
        name, result = outcome.item.photo.stem, outcome.result
        original = read_pixels(PHOTOS / "hq" / f"{name}.png")
        rows.append((result.before, result.pixels, original))
        pair = [
            [float(measure(to_float(picture)[None], to_float(original)[None])[0]) for measure in measures]
            for picture in (result.before, result.pixels)
        ]
        lines.append((name, *np.ravel(pair), result.record["seconds"]["total"]))
        bar.update()
    bar.close()
    write_png(out / "comparison.png", contact_sheet(rows, ("bicubic", "dpir-nano", "original"), cell=384))
    mean = ("mean", *np.mean([line[1:] for line in lines], axis=0))
    table = [
        "                 LPIPS (lower is better)    PSNR-Y, dB",
        "photo            bicubic  dpir-nano    bicubic  dpir-nano  seconds",
    ]
    table += [
        f"{name:<15}  {lpips_0:7.3f}  {lpips_1:9.3f}    {psnr_0:7.2f}  {psnr_1:9.2f}  {seconds:7.1f}"
        for name, lpips_0, psnr_0, lpips_1, psnr_1, seconds in (*lines, mean)
    ]
    text = "\n".join(table) + "\n"
    write_text(out / "table.txt", text)
    return text


def main() -> int:
    """Prints the table and where the pictures are."""
    started = time.monotonic()
    quiet_libtpu()
    try:
        table = run()
    except InputError as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return 2
    photos = len(find_photos(PHOTOS / "lq"))
    sys.stdout.write(f"\n{table}\n{photos} photos restored in {time.monotonic() - started:.0f} s.\n")
    sys.stdout.write(f"Look at {OUT / 'comparison.png'}; the restored photos and their run records are beside it.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
