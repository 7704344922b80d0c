"""Runs the speed benchmarks and writes what they print into one page: `python benchmarks/page.py docs/performance.md`.

Each benchmark also runs alone. `--only` replaces the sections named and keeps the others as they are on the page.
"""

import argparse
import datetime
import platform
import re
import subprocess
import sys
from pathlib import Path

from dpir_jax.files import write_text

HERE = Path(__file__).parent
SECTIONS = {
    "versus_torch": "Beside PyTorch",
    "degradation": "Degradation",
    "input_wait": "Input",
}
HEAD = """# Speed

Written by `make bench` (`python benchmarks/page.py docs/performance.md`); each section says when and where it was
measured. What accelerators can do with these networks is in docs/scaling.md.
"""


def machine() -> str:
    """The processor's name and its widest vectors: two machines of one name can differ by twice the speed."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*: (.+)", text)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    vectors = next((width for flag, width in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in text), None)
    return f"{name}, {vectors}" if vectors else name


def section(name: str) -> str:
    """Runs a benchmark; a failure ends the page."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    today = datetime.datetime.now(datetime.UTC).date()
    return f"## {SECTIONS[name]}\n\n`python benchmarks/{name}.py`, {today}, {machine()}\n\n{done.stdout.strip()}\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FILE.md")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    old = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else ""
    kept = {part.splitlines()[0]: f"## {part.strip()}\n" for part in re.split(r"^## ", old, flags=re.M)[1:]}
    for name in arguments.only:
        print(f"== benchmarks/{name}.py", flush=True)
        kept[SECTIONS[name]] = section(name)
        page = [HEAD, *(kept[title] for title in SECTIONS.values() if title in kept)]
        write_text(arguments.out, "\n".join(page))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
