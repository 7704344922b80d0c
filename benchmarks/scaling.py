"""What a training step needs and how fast it can be on TPU slices: compiles each ahead of time, writes docs/scaling.md.

    python benchmarks/scaling.py [--results runs/scaling] [--only v5p-8] [--full-effort] [--page-only]

Needs libtpu (`pip install 'dpir-jax[tpu]'`) and no TPU. A row that is already there for the same program is passed
over, so that the command can be stopped and started again; after a change in how programs are read
(`dpir_jax/parallel`) remove the results. A row is minutes of compilation; each is a process of its own, `dpir compile`.
"""

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from page import machine

from dpir_jax.models.platform import use_platform
from dpir_jax.parallel.topologies import devices, parse_topology
from dpir_jax.training.ahead import abstract_step, with_batch
from dpir_jax.training.config import load_recipe

ROOT = Path(__file__).parent.parent
GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step: its recipe, the task, overrides of it, and the batch per chip of each generation."""

    name: str
    config: str
    task: str
    overrides: tuple[str, ...]
    batches: dict[str, int]


SIDE = "--config.task.local_crop={0} --config.data.local_crop={0} --config.data.global_crop=1024"
DPIR = "configs/dpir_sd3_medium.py:dit", "dpir_tasks"
DALPSR = "configs/dalpsr_sd2.py", "dalpsr_task"
CASES = (
    Case("DPIR 512", *DPIR, tuple(SIDE.format(512).split()), {"v5p": 32, "v5e": 8, "v6e": 16}),
    Case("DPIR 1024", *DPIR, tuple(SIDE.format(1024).split()), {"v5p": 8, "v5e": 1, "v6e": 4}),
    Case("DaLPSR 512", *DALPSR, (), {"v5p": 32, "v5e": 8, "v6e": 16}),
)
SLICES = ("v5p-8", "v5e-16", "v5e-256", "v6e-16", "v5p-128", "v6e-256")


def program(case: Case, name: str) -> str:
    """A short checksum of the program that is compiled, and of its compiler."""
    topology = parse_topology(name)
    recipe = load_recipe(str(ROOT / case.config), case.overrides)
    recipe = with_batch(recipe, case.batches[topology.generation], topology.chips)
    step = abstract_step(recipe, devices(topology), topology.chip.memory)
    with use_platform("tpu"):
        text = step.function.trace(*step.arguments).lower().as_text()
    return hashlib.sha256(f"{importlib.metadata.version('libtpu')} {text}".encode()).hexdigest()[:12]


def row_file(results: Path, case: Case, name: str) -> Path:
    """Where a row is kept."""
    return results / f"{case.name.lower().replace(' ', '_')}_{name}.json"


def measure(results: Path, case: Case, name: str, full_effort: bool = False) -> None:
    """Compiles one row, unless it is there; a row of full effort stands for one of less."""
    out, batch, key = row_file(results, case, name), case.batches[name.partition("-")[0]], program(case, name)
    found = json.loads(out.read_text()) if out.is_file() else {}
    enough = not full_effort or not found.get("effort")
    if enough and found.get("program") == key:
        print(f"{case.name} on {name}: is there")
        return
    print(f"{case.name} on {name}, {batch} images a chip ...", flush=True)
    raw = out.with_suffix(".raw.json")
    command = [sys.executable, "-m", "dpir_jax", "compile", "--config", case.config, "--topology", name]
    command += ["--batch-per-chip", str(batch), "--json", str(raw), *case.overrides]
    command += ["--full-effort"] * full_effort
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode not in (0, 1) or not raw.is_file():
        raise SystemExit(f"{case.name} on {name} could not be compiled")
    facts = {"case": case.name, "program": key, "date": str(datetime.date.today()), "cores": os.cpu_count()}
    facts |= {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    facts["machine"] = machine()
    raw.write_text(json.dumps(facts | json.loads(raw.read_text()), indent=2) + "\n")
    raw.replace(out)


def rows(results: Path) -> list[dict]:
    """The rows that are there."""
    paths = [row_file(results, case, name) for case in CASES for name in SLICES]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def table(found: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| step | slice | images a chip | fits | GiB a chip: state + frozen + activations + program | GB sent a chip: "
        "all-gather + reduce-scatter + all-reduce + rest | TFLOP a chip | ms: compute, memory, network | bound | "
        "images/s a chip | compile s (CPU s) | made |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, found)])


def line(row: dict) -> str:
    """One row."""
    memory, sent, top = row["memory_per_chip"], row.get("collectives_per_chip", {}), row.get("roofline")
    state = sum(memory[kind] for kind in ("parameters", "optimizer", "ema"))
    spare = (memory["available"] - memory["total"]) / GIB
    fits = f"{spare:.1f} GiB spare" if row["fits"] else f"no, {-spare:.1f} GiB over"
    kinds = [memory.get(kind) for kind in ("frozen", "activations", "program")]
    parts = " + ".join("?" if kind is None else f"{kind / GIB:.2f}" for kind in (state, *kinds))
    moved = [sent.get(kind, 0) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    moved.append(sent.get("total", 0) - sum(moved))
    return " | ".join(
        (
            f"| {row['case']}",
            f"{row['name']} ({row['chips']} chips, {row['sharding']})",
            f"{row['batch_per_chip']:g}",
            fits,
            f"{memory['total'] / GIB:.2f} of {memory['available'] / GIB:.2f}: {parts}",
            f"{sent['total'] / GB:.1f}: " + " + ".join(f"{part / GB:.1f}" for part in moved) if sent else "?",
            f"{row['flops_per_chip'] / 1e12:.0f}",
            ", ".join(f"{1e3 * top[kind]:.0f}" for kind in ("compute", "memory", "network")) if top else "?",
            top["bound"] if top else "?",
            f"{top['images_per_second_per_chip']:.1f}" if top else "?",
            f"{row['seconds']['compile']:.0f} ({row['seconds']['cpu']:.0f}{'' if row['effort'] else ', full effort'})",
            f"{row['date']}, {row['program']} |",
        )
    )


def page(results: Path) -> str:
    """docs/scaling.md."""
    found = rows(results)
    machines = sorted({f"{row['machine']}, {row['cores']} cores, libtpu {row['libtpu']}" for row in found})
    text = (Path(__file__).parent / "scaling.md").read_text(encoding="utf-8")
    return text.replace("TABLE\n", table(found) + "\n").replace("MACHINES", "; ".join(machines) or "no machine yet")


def main() -> None:
    """Measures what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "scaling", help="one JSON file per row")
    parser.add_argument("--only", action="append", metavar="SLICE", help="these slices alone; may be repeated")
    parser.add_argument("--case", action="append", metavar="NAME", help="these steps alone; may be repeated")
    parser.add_argument("--full-effort", action="store_true", help="compile with `dpir compile --full-effort`")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    arguments.results.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        for name in SLICES:
            wanted = name in (arguments.only or SLICES) and case.name in (arguments.case or [case.name])
            if wanted and not arguments.page_only:
                measure(arguments.results, case, name, arguments.full_effort)
                (ROOT / "docs" / "scaling.md").write_text(page(arguments.results), encoding="utf-8")
    (ROOT / "docs" / "scaling.md").write_text(page(arguments.results), encoding="utf-8")


if __name__ == "__main__":
    main()
