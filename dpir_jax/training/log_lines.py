"""The lines of `metrics.jsonl`, read and checked: a JSON object each, of a step and finite numbers."""

import json
from pathlib import Path
from typing import Any

from dpir_jax.errors import InputError

LARGEST = 1e300  # sums of numbers below it are finite too
WAY_OUT = "mend or remove the line to use the others"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines as objects with a whole number `step`; all other values are numbers or None (not finite).

    A last line that was cut short, by a kill or because it is being written just now, is left out.

    Raises:
      InputError: the file cannot be read, or any other line is not like that.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break  # nothing, or cut short: a line that was written to its end is followed by another piece
            raise InputError(f"{path}, line {number}, is not JSON; {WAY_OUT}") from error
        if fault := _fault(row):
            raise InputError(f"{path}, line {number}, {fault}; {WAY_OUT}")
        rows.append(row)
    return rows


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "is not a JSON object"
    if not _is_number(row.get("step")) or not isinstance(row["step"], int):
        return "has no whole number as its step"
    for name, value in row.items():
        if value is not None and not _is_number(value):
            return f"has a {name} that is neither a finite number nor null"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
