"""Can the input keep up? Images per second from every kind of source, and the share of a step's time spent waiting.

    python benchmarks/input_wait.py [--photos FOLDER] [--crop 512] [--batch 8] [--step-seconds 1 0.1] [--workers 0]

The photos are packed as `dpir pack` does; text embeddings of T5-XXL's size (256 tokens of 4096 numbers, random) are
stored as `dpir precompute` does. "alone": as fast as batches come. "waiting": a device that is busy for `step-seconds`
per batch, simulated by a timer so that it takes nothing from the input's cores; the training loop's own clock tells
which share of the time it had no batch to work on. The batches prepared beforehand are taken out first: on these a
source that is a little too slow would live for longer than is measured.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

import dpir_jax
from dpir_jax.data.dpir_photos import build
from dpir_jax.data.embeddings import Meta, stored_form, write_shard
from dpir_jax.data.pipeline import BatchIterator, DataConfig, make_dataset
from dpir_jax.data.records import PhotoRecords
from dpir_jax.files import write_json
from dpir_jax.training.clock import StepClock

TOKENS = (256, 4096)
WARM_UP = 2  # batches
SETTLE = 5  # steps, in which a source that is fast enough fills its buffer again


def store_text(records: PhotoRecords, folder: Path, form: str) -> None:
    """Random embeddings in the shape of T5-XXL's."""
    meta = Meta(len(records), records.fingerprint(), "random", ("text",), form, shard=len(records))
    write_json(folder / "meta.json", dataclasses.asdict(meta))
    rng = np.random.default_rng(0)
    texts = (stored_form(rng.standard_normal(TOKENS, np.float32), form) for _ in range(len(records)))
    write_shard(meta.path(folder, 0), texts)


def alone(batches: BatchIterator, seconds: float) -> tuple[float, float]:
    """(images per second, CPU milliseconds per image) of this process; with workers theirs are not seen."""
    for _ in range(WARM_UP):
        next(batches)
    start, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)["hq"])
    return images / (time.perf_counter() - start), 1e3 * (time.process_time() - cpu) / images


def waiting(batches: BatchIterator, step_seconds: float, seconds: float) -> float:
    """Share of the time in which the simulated device had no batch, from steps of `step_seconds` for `seconds`."""
    clock = StepClock()
    before = jax.block_until_ready
    jax.block_until_ready = lambda event: event.wait()  # the clock waits for a timer in the place of a device
    try:
        for _ in range(batches.batches.config.prefetch + WARM_UP):
            next(batches)
        for step in range(SETTLE + max(SETTLE, round(seconds / step_seconds))):
            if step == SETTLE:
                clock.read()
            done = threading.Event()
            threading.Timer(step_seconds, done.set).start()
            clock.handed(done)
            with clock.fetching():
                next(batches)
            done.wait()
        return clock.read()["data_wait"]
    finally:
        clock.close()
        jax.block_until_ready = before


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path(dpir_jax.__file__).parent / "demo_photos" / "hq")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure each source for, alone and waiting")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # the builder says what it does
            built = str(build(arguments.photos, folder))
        sizes = {"local_crop": arguments.crop, "global_crop": arguments.crop, "batch": arguments.batch}
        common = {**sizes, "workers": arguments.workers, "scale_jitter_prob": 0.3}
        records = PhotoRecords(built, min_side=arguments.crop)
        for form in ("int8", "bfloat16"):
            store_text(records, Path(folder) / form, form)
        cases = {
            "folder, decoded photos cached": DataConfig((str(arguments.photos),), **common),
            "folder, no cache": DataConfig((str(arguments.photos),), cache_mb=0, **common),
            "records": DataConfig((), records=(built,), **common),
        }
        for form in ("int8", "bfloat16"):
            stored = (str(Path(folder) / form),)
            cases[f"records and text in {form}"] = DataConfig((), records=(built,), embeddings=stored, **common)
        sides = np.array([[records.facts(i)[name] for name in ("height", "width")] for i in range(len(records))])
        print(f"{len(records)} photos of {np.prod(sides, 1).mean() / 1e6:.1f} megapixels on average, crops of "
              f"{arguments.crop}, batch {arguments.batch}, {arguments.workers or 'no'} worker processes, "
              f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}.\n")  # fmt: skip
        steps = "".join(f" share of the time waiting, steps of {seconds:g} s |" for seconds in arguments.step_seconds)
        print(f"| source | images/s alone | CPU ms per image |{steps}")
        print("|---" * (3 + len(arguments.step_seconds)) + "|")
        for title, config in cases.items():
            rate, cpu = alone(make_dataset(config), arguments.seconds)
            shares = [waiting(make_dataset(config), seconds, arguments.seconds) for seconds in arguments.step_seconds]
            print(
                f"| {title} | {rate:.1f} | {cpu:.1f} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True
            )


if __name__ == "__main__":
    main()
