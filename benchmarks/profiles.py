"""Where one run's time goes, by kind of work: ours from JAX's profiler, PyTorch's from its own. For versus_torch.py."""

import collections
import functools
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("products", "convolutions", "attention", "copies", "rest")
CONTAINERS = ("while", "call", "conditional")  # their contents have events of their own
COPIES = re.compile("copy|slice|transpose|concatenate|wrapped_broadcast")

Seconds = dict[str, float]


def fastest_product(size: int = 2048) -> float:
    """GFLOP/s of NumPy's product of square matrices: a ceiling for what matrix products can do on this machine."""
    import numpy as np

    a = np.random.default_rng(0).standard_normal((size, size), np.float32)

    def once() -> float:
        begin = time.perf_counter()
        a @ a
        return time.perf_counter() - begin

    return 2 * size**3 / min(once() for _ in range(10)) / 1e9


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def of_torch(run: Callable[[], Any]) -> Seconds:
    """Seconds of each kind; operators have the thread to themselves."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    found = dict.fromkeys(KINDS, 0.0)
    for event in profile.key_averages():
        found[_torch_kind(event.key)] += event.self_cpu_time_total / 1e6
    return found


def _torch_kind(name: str) -> str:
    operator = name.removeprefix("aten::")
    if "scaled_dot_product" in operator:
        return "attention"
    if "conv" in operator:
        return "convolutions"
    if operator in ("mm", "addmm", "bmm", "baddbmm"):
        return "products"
    return "copies" if operator in ("copy_", "clone", "cat", "contiguous", "zero_", "fill_") else "rest"


# --- ours ------------------------------------------------------------------------------------------------------------


def of_jax(run: Callable[[], Any], program: str) -> Seconds:
    """Seconds of each kind, from the events of one run and the text of its compiled program.

    At times several instructions run at once, on different threads. Such time belongs to the kind that comes first in
    `KINDS`: what runs beside a product and ends before it costs nothing.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        spans = _spans(jax.profiler.ProfileData.from_file(str(file)))
    kind = functools.cache(functools.partial(_kind, _instructions(program)))
    return _shares([(begin, end, kind(name)) for begin, end, name in spans])


def _spans(profile: Any) -> list[tuple[float, float, str]]:
    """(begin, end, instruction). One that hands its work to other threads ends with an event of its own."""
    begun, ended = {}, {}
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name.startswith("end: "):
                    ended[stats["_c"]] = event.start_ns
                elif "hlo_op" in stats and not event.name.startswith(CONTAINERS):
                    begun[stats["_p"]] = (event.start_ns, event.start_ns + event.duration_ns, event.name)
    return [(begin, max(end, ended.get(key, end)), name) for key, (begin, end, name) in begun.items()]


def _shares(spans: list[tuple[float, float, str]]) -> Seconds:
    """Seconds of each kind, from (begin, end, kind) in ns."""
    turns = sorted(turn for begin, end, kind in spans for turn in ((begin, 1, kind), (end, -1, kind)))
    found, running, before = dict.fromkeys(KINDS, 0.0), collections.Counter(), 0.0
    for moment, change, kind in turns:
        if first := next((kind for kind in KINDS if running[kind]), None):
            found[first] += (moment - before) / 1e9
        running[kind] += change
        before = moment
    return found


def _instructions(program: str) -> dict[str, tuple[str, str]]:
    """name -> (operation, where it comes from); a fusion is what its last instruction is."""
    found, roots, calls, computation = {}, {}, {}, ""
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line):
            computation = head[1]
        elif entry := re.match(r"\s+(ROOT )?%([\w.-]+) = (?:\([^=]*\)|\S+) ([\w-]+)\(", line):
            root, name, operation = entry.groups()
            origin = re.search(r'op_name="([^"]*)"', line)
            found[name] = (operation, origin[1] if origin else "")
            if root:
                roots[computation] = name
            if called := re.search(r"(?:calls|to_apply)=%([\w.-]+)", line):
                calls[name] = called[1]
    for name, called in calls.items():
        operation, origin = found[name]
        inner = found.get(roots.get(called, ""), ("", ""))
        found[name] = (inner[0] if operation in ("fusion", "call") else operation, origin or inner[1])
    return found


def _kind(instructions: dict[str, tuple[str, str]], name: str) -> str:
    operation, origin = instructions.get(name, ("", ""))
    for scope, kind in (("attention", "attention"), ("convolution", "convolutions")):
        if re.search(rf"\b{scope}\b", origin):
            return kind
    if operation == "dot":
        return "products"
    return "copies" if COPIES.search(name) else "rest"
