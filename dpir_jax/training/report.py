"""What a run tells: its numbers in a few lines, and its curves in one picture, from what it logged.

runs/dit  DiTTask, 4000 of 4000 steps, done
  loss       0.2143 at the end, lowest 0.2090 at step 3850, 1.0312 at the start   ▇▅▃▂▂▁▁▁
  speed      2.41 s a step to completion, 3.32 images/s, waiting for data 0.4 %, for the host 1.2 %
  ...
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from dpir_jax.errors import InputError
from dpir_jax.files import atomic_path, read_json, write_json
from dpir_jax.training.log_lines import read_lines
from dpir_jax.training.time_bins import BY_TIME

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
BARS = "▁▂▃▄▅▆▇█"
NOT_CURVES = ("step", "start", "finite", "seconds")
COLOURS = ((31, 90, 165), (200, 80, 30), (40, 130, 70), (130, 60, 150), (120, 120, 20), (190, 30, 90))
PANEL = (460, 220)  # pixels of one curve
MARGIN = (56, 26, 12, 22)  # left, top, right, bottom of the axes in a panel


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it was logged.

    Attributes:
      workdir: its folder.
      config: the recipe as JSON, empty if the run wrote none.
      curves: metric -> `[N, 2]` steps and values; values that were not finite are left out.
      summary: JSON values; numbers that the run did not log are absent.
    """

    workdir: Path
    config: Mapping[str, Any]
    curves: Mapping[str, Float[np.ndarray, "N 2"]]
    summary: dict[str, Any]


def find_runs(folder: str | Path) -> list[Path]:
    """The folder if it is a run, else the runs directly inside it, sorted.

    Raises:
      InputError: there are none.
    """
    folder = Path(folder)
    if (folder / METRICS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if not found:
        raise InputError(f"{folder} holds no training run: there is no {METRICS} in it")
    return found


def read_run(workdir: str | Path) -> Run:
    """Reads `metrics.jsonl`, and of `config.json` and `summary.json` what is there.

    Raises:
      InputError: there is no log, it has no line, or one of the files is not as a run writes it.
    """
    workdir = Path(workdir)
    rows = read_lines(workdir / METRICS)
    if not rows:
        raise InputError(
            f"{workdir / METRICS} has no line yet; a run writes one every config.log_every steps, and "
            "with every checkpoint"
        )
    run = _run(workdir, rows)
    ended = _read_object(workdir / SUMMARY, reason=str)
    if ended.get("step") == run.summary["step"]:
        run.summary["reason"] = ended.get("reason")  # of an older stop, if the run has gone on since
    return run


def write_summary(workdir: Path, reason: str) -> None:
    """Writes `summary.json`, unless the run stopped before its first line; `reason`: why it stopped."""
    if rows := read_lines(workdir / METRICS):
        write_json(workdir / SUMMARY, _run(workdir, rows).summary | {"reason": reason})


def _run(workdir: Path, rows: Sequence[Mapping[str, Any]]) -> Run:
    config = _read_object(workdir / "config.json", task_type=str, steps=int, batch=int)
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    curves = {
        name: np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float).reshape(-1, 2)
        for name in names
    }
    return Run(workdir, config, curves, _summary(rows, curves, config))


def _read_object(path: Path, **kinds: type) -> dict[str, Any]:
    """A JSON object, empty if there is no such file; `kinds`: what some of its values must be, where they are there."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object; mend it, or remove it to read the run without it")
    for name, kind in kinds.items():
        if name in found and (not isinstance(found[name], kind) or isinstance(found[name], bool)):
            wanted = "text" if kind is str else "a whole number"
            raise InputError(f"{path}: {name} is {found[name]!r}; it must be {wanted}, as the run wrote it")
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def _summary(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {"task": config.get("task_type", "").partition(":")[2], "step": rows[-1]["step"]}
    found |= {name: config[name] for name in ("steps", "batch") if name in config}
    if "batch" in config:
        found["images"] = rows[-1]["step"] * config["batch"]
    found["seconds"] = _seconds(rows)
    loss = curves.get("loss", np.zeros((0, 2)))
    if len(loss):
        lowest = loss[np.argmin(loss[:, 1])]
        last = loss[-max(len(loss) // 10, 1) :, 1].mean()  # of the last tenth of the lines
        found["loss"] = {"first": loss[0, 1], "last": last, "lowest": lowest[1], "lowest_step": int(lowest[0])}
    for name in ("step_seconds", "images_per_second", "data_wait", "host_wait", "flop_utilization", "grad_norm"):
        if len(values := curves.get(name, ())):
            found[name] = float(np.median(values[:, 1]))
    if len(values := curves.get("memory_gb", ())):
        found["memory_gb"] = float(values[:, 1].max())
    found["loss_by_time"] = {
        name.partition(BY_TIME)[2]: float(values[-max(len(values) // 10, 1) :, 1].mean())
        for name, values in sorted(curves.items())
        if BY_TIME in name and len(values)
    }
    found["finite"] = all(row.get("finite", 1) == 1 and row.get("loss", 0) is not None for row in rows)
    return found


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Time spent on these lines, over all starts of the run: the clock of each begins at zero.

    Older logs do not mark their starts; there a start shows only by a clock that is behind the one before.
    """
    total = previous = 0.0
    start = None
    for row in rows:
        if (now := row.get("seconds")) is None:
            continue
        goes_on = row.get("start") == start and now >= previous
        total += now - previous if goes_on else now
        previous, start = now, row.get("start")
    return total


def format_summary(run: Run) -> str:
    """The run in a few lines."""
    found = run.summary
    of = f" of {found['steps']}" if "steps" in found else ""
    ended = f", {found['reason']}" if found.get("reason") else ""
    lines = [f"{run.workdir}  {found['task'] or 'run'}, {found['step']}{of} steps{ended}"]

    def line(title: str, text: str) -> None:
        lines.append(f"  {title:<10} {text}")

    if "loss" in found:
        loss = found["loss"]
        text = f"{loss['last']:.4g} at the end, lowest {loss['lowest']:.4g} at step {loss['lowest_step']}, "
        line("loss", text + f"{loss['first']:.4g} at the start  {sparkline(run.curves['loss'][:, 1])}")
    if found["loss_by_time"]:
        line("by time", ", ".join(f"{part} {value:.4g}" for part, value in found["loss_by_time"].items()))
    speeds = {
        "step_seconds": "{:.3g} s a step to completion",
        "images_per_second": "{:.3g} images/s",
        "flop_utilization": "{:.1%} of the peak",
    }
    if texts := [text.format(found[name]) for name, text in speeds.items() if name in found]:
        line("speed", ", ".join(texts))
    waits = {"data_wait": "{:.1%} of the time for data", "host_wait": "{:.1%} for the host"}
    if texts := [text.format(found[name]) for name, text in waits.items() if name in found]:
        line("waiting", ", ".join(texts))
    if "memory_gb" in found:
        line("memory", f"{found['memory_gb']:.2f} GB at most")
    if "grad_norm" in found:
        line("gradient", f"norm {found['grad_norm']:.3g} (median)")
    images = f", {found['images']:,} images" if "images" in found else ""
    line("time", f"{_duration(found['seconds'])}{images}")
    if not found["finite"]:
        line("NOT FINITE", "the loss or a gradient became NaN or infinite")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def sparkline(values: Iterable[float], width: int = 24) -> str:
    """A curve in one line of text, each character the mean of a stretch."""
    values = np.asarray(list(values), float)
    if not len(values):
        return ""
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    low, high = means.min(), means.max()
    heights = (means - low) / (high - low) if high > low else np.zeros_like(means)
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)


# --- picture ---------------------------------------------------------------------------------------------------------


def draw_curves(run: Run, path: Path, columns: int = 3) -> Path:
    """Draws every curve of a run into one PNG; the losses by time share a panel. Positive curves that span more than a
    factor of 30 have a logarithmic axis.

    Raises:
      InputError: the run logged no number that makes a curve, or `path` cannot be written.
    """
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, curve in sorted(run.curves.items(), key=lambda item: item[0] != "loss"):  # it comes first
        if name not in NOT_CURVES and len(curve):
            title, _, part = name.partition(BY_TIME)
            panels.setdefault(f"{title} by time" if part else name, {})[part or name] = curve
    if not panels:
        raise InputError(f"{run.workdir / METRICS} has no curve to draw: it holds steps without a finite number")
    width, height = PANEL
    rows = math.ceil(len(panels) / columns)
    picture = Image.new("RGB", (width * min(columns, len(panels)), height * rows), "white")
    for place, (title, curves) in enumerate(panels.items()):
        picture.paste(_panel(title, curves), (place % columns * width, place // columns * height))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
    return path


def _panel(title: str, curves: Mapping[str, np.ndarray]) -> Image.Image:
    (width, height), (left, top, right, bottom) = PANEL, MARGIN
    image = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    every = np.concatenate(list(curves.values()))
    (first, low), (last, high) = every.min(0), every.max(0)
    logarithmic = low > 0 and high > 30 * low

    def scale(value: float | np.ndarray) -> float | np.ndarray:
        return np.log(value) if logarithmic else value

    span_x, span_y = max(last - first, 1e-9), scale(high) - scale(low)

    def points(curve: np.ndarray) -> list[tuple[float, float]]:
        x = left + (curve[:, 0] - first) / span_x * (width - left - right)
        share = (scale(curve[:, 1]) - scale(low)) / span_y if span_y > 0 else np.full(len(curve), 0.5)
        return list(zip(x, height - bottom - share * (height - top - bottom)))

    draw.rectangle((left, top, width - right, height - bottom), outline=(200, 200, 200))
    draw.text((left, 6), title + (" (log)" if logarithmic else ""), fill="black", font=font)
    draw.text((left - 4, top), f"{high:.3g}", fill=(90, 90, 90), font=font, anchor="rt")
    draw.text((left - 4, height - bottom), f"{low:.3g}", fill=(90, 90, 90), font=font, anchor="rb")
    draw.text((left, height - bottom + 4), f"{first:.0f}", fill=(90, 90, 90), font=font)
    draw.text((width - right, height - bottom + 4), f"{last:.0f}", fill=(90, 90, 90), font=font, anchor="ra")
    for number, (name, curve) in enumerate(sorted(curves.items())):
        colour = COLOURS[number % len(COLOURS)]
        if len(curve) == 1:
            ((x, y),) = points(curve)
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        else:
            draw.line(points(curve), fill=colour, width=2)
        if len(curves) > 1:
            draw.text((width - right - 4, top + 4 + 14 * number), name, fill=colour, font=font, anchor="ra")
    return image
