"""What a run leaves behind for eyes: `metrics.jsonl`, TensorBoard events, a progress bar, preview sheets."""

import json
import math
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dpir_jax.files import atomic_path, write_text
from dpir_jax.training.log_lines import read_lines


class RunLog:
    """Writes under `workdir` from step `start` on; what an earlier run logged after that step is dropped first."""

    def __init__(self, workdir: Path, *, start: int, steps: int, batch: int, progress: bool = True) -> None:
        self._path = workdir / "metrics.jsonl"
        truncate(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else None)
        self._batch, self._start = batch, start
        self._bar = tqdm(
            total=steps * batch,
            initial=start * batch,
            unit="image",
            unit_scale=True,
            disable=not progress,
            mininterval=1 if sys.stderr.isatty() else 60,  # a log file does not need a line a second
            dynamic_ncols=True,
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()

    def advance(self) -> None:
        """One step more on the progress bar."""
        self._bar.update(self._batch)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line and one point per metric. JSON has no NaN: such a value is written as null.

        `start` tells the lines of one start of the run from those of another, which has none left after the same step.
        """
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "start": self._start} | line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix_str(f"step {step}, loss {metrics['loss']:.4g}", refresh=False)


class NoLog:
    """What a process has in place of a `RunLog` that is not the one to write it."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        pass

    def advance(self) -> None:
        """Nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""


def truncate(path: Path, step: int) -> None:
    """Drops the lines after `step`, and a last line that was cut short.

    Raises:
      InputError: another line is broken; the file stays as it is.
    """
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= step]
        write_text(path, "".join(kept))


def write_sheet(path: Path, rows: np.ndarray) -> None:
    """Writes pictures `[rows, H, W, 3]` in [0, 1], one under the other, as PNG."""
    rows = np.asarray(rows, np.float32)
    sheet = rows.reshape(-1, *rows.shape[2:])
    pixels = np.round(np.clip(np.nan_to_num(sheet), 0, 1) * 255).astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
