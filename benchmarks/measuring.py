"""What all benchmarks share: figures with their bounds, the table, and the dated record in RESULTS.md."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow", "opencv-python-headless")
QUIET_CORES = 0.3  # kept busy by other programs: less is quiet
HEADINGS = ("what", "unit", "min", "median", "max", "runs", "warm-up", "bound")

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# Before torch is loaded: spinning threads cost 30 times where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Figure:
    """Some runs of one measurement."""

    name: str
    unit: str
    values: tuple[float, ...]
    num_warm_up: int = 0  # runs before them that do not count
    at_most: float | None = None  # what the median is held to
    at_least: float | None = None

    @property
    def bound(self) -> str:
        """What the median is held to, and whether it holds."""
        median = statistics.median(self.values)
        if self.at_most is not None:
            return f"< {self.at_most:g}: {'holds' if median < self.at_most else 'FAILS'}"
        if self.at_least is not None:
            return f">= {self.at_least:g}: {'holds' if median >= self.at_least else 'FAILS'}"
        return ""

    def row(self) -> tuple[str, ...]:
        """Return the figure as the table shows it."""
        low, middle, high = min(self.values), statistics.median(self.values), max(self.values)
        numbers = [number_text(value) for value in (low, middle, high)]
        return (self.name, self.unit, *numbers, str(len(self.values)), str(self.num_warm_up), self.bound)


def number_text(value: float) -> str:
    """Return a number with three digits that count, whole from 1000 on."""
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def timed(work: Callable[[], object], *, runs: int, warm_up: int = 0) -> tuple[float, ...]:
    """Return the seconds that each of `runs` calls of work took, after warm_up calls that do not count."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small run, to see that the benchmark still works")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--device", metavar="TEXT", help="how the record calls the machine; default: cores and kind")
    parser.add_argument("--note", metavar="TEXT", help="a sentence for the record")
    return parser


def conclude(arguments: argparse.Namespace, figures: Sequence[Figure], load_before: float) -> None:
    """Print the table and, where asked for, append it to the results.

    Args:
        arguments: of a parser from make_parser.
        figures: the rows.
        load_before: of the machine, before the measurements: their own work does not count.
    """
    table = as_table([HEADINGS, *(figure.row() for figure in figures)])
    print(table)
    if arguments.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n## {datetime.date.today()} {Path(sys.argv[0]).stem}\n\n")
            file.write(f"{circumstances(arguments, load_before)}\n\n{table}\n")
        print(f"recorded in {RESULTS.relative_to(ROOT).as_posix()}")


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table whose columns line up; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def circumstances(arguments: argparse.Namespace, load_before: float) -> str:
    """Return what a reader must know to repeat the measurement."""
    options = [word for word in sys.argv[1:] if word != "--record"]
    for name in ("--device", "--note"):
        if name in options:
            del options[options.index(name) : options.index(name) + 2]
    lines = {
        "device": arguments.device or f"{os.cpu_count()} cores, {platform.machine()} CPU",
        "load before": f"{load_before:.1f}",
        "versions": versions(),
        "commit": commit(),
        "command": f"`{shlex.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *options])}`",
    }
    if arguments.note:
        lines["note"] = arguments.note
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def load() -> float:
    """Return how many programs wanted a core in the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def busy_s() -> float:
    """Return the seconds that all programs have kept the cores busy since the machine started; 0 but on Linux."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, interrupt, soft_interrupt = map(int, words[1:8])
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience_s: float) -> None:
    """Return once other programs leave the cores alone for 2 s, or after patience_s."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(2)
        if busy_s() - before < 2 * QUIET_CORES:
            return


def versions() -> str:
    """Return the versions of Python and of the packages that count."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} none")
    return ", ".join(found)


def commit() -> str:
    """Return the short name of the commit, and whether files that are in it have changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "library", "networks", "tools", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
