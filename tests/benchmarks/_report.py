"""Tables, for the terminal and for docs/benchmarks.md."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import _http_load
from ._measure import Goal
from ._results import MeasureResult, Spread
from .peers import LABELS

PACKAGES = (
    *("fdpool", "loky", "pebble", "mpire", "joblib", "numpy", "psutil", "cloudpickle"),
    *("gunicorn", "uvicorn", "uvicorn-worker", "uvloop", "httptools", "waitress"),
)


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": versions,
        "client": _http_load.client(),
    }


def described(about: dict[str, Any]) -> str:
    """A line that says what `machine` returns."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    client = f"; servers loaded by {about['client']}" if "client" in about else ""
    return (
        f"{about['processor']}, {about['cpus']} CPUs, {about['memory_gib']} GiB; {about['system']}; "
        f"{about['python']}; {versions}{client}."
    )


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    virtual = " (virtual)" if "hypervisor" in Path("/proc/cpuinfo").read_text() else ""
    return (names[0].strip() if names else platform.machine()) + virtual


def label(result: MeasureResult, side: str) -> str:
    return result.labels.get(side) or LABELS.get(side, side)


def figure(value: float) -> str:
    """Three digits."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def times(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{figure(spread.median)}× ({figure(spread.low)}–{figure(spread.high)})"


def goal_text(result: MeasureResult, goal: Goal) -> str:
    if goal.limit is not None:
        return f"≤ {figure(goal.limit)} {result.unit}"
    assert goal.ratio is not None
    return f"≥ {figure(goal.ratio)}×"


def verdict(result: MeasureResult, side: str) -> str:
    """The goals that fdpool has against `side`, or by itself, each with whether it is reached."""
    against = [goal for goal in result.goals if (goal.rival or "fdpool") == side]
    return ", ".join(f"{goal_text(result, goal)} {_mark(result, goal)}" for goal in against)


def table(result: MeasureResult) -> str:
    """One measure in Markdown: a row for each side."""
    for side in result.sides.values():
        side.settle()
    latency = any(side.p99 is not None for side in result.sides.values())
    timed = result.unit in ("µs", "ms")
    uses_cpu = any(side.cpu > 0 for side in result.sides.values())
    head = ["", result.unit, *(["p50", "p99"] if latency else [])]
    head += [f"CPU {result.unit if timed else 'µs'}"] if uses_cpu else []
    head += ["fdpool is ahead by", *(["and in CPU by"] if uses_cpu else []), "goal"]
    rows = []
    for name, side in result.sides.items():
        row = [label(result, name), figure(result.value(name))]
        if latency:
            row += ["" if point is None else figure(point * result.scale) for point in (side.p50, side.p99)]
        row += [figure(side.cpu * (result.scale if timed else 1e6))] if uses_cpu else []
        own = name == "fdpool"
        row.append("" if own else times(result.ratio(name)))
        row += ["" if own else times(result.ratio(name, "cpus"))] if uses_cpu else []
        row.append(verdict(result, name))
        rows.append(row)
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 2) + ["---"]), *map(_line, rows)]
    lines += [f"\n{label(result, side)}: {why}." for side, why in result.notes.items()]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def goals_table(results: Iterable[MeasureResult]) -> str:
    """Every goal, and what was reached."""
    lines = [
        _line(["measure", "against", "goal", "reached", ""]),
        _line(["---", "---", "---:", "---:", "---"]),
    ]
    for result in results:
        for goal in result.goals:
            spread, _ = result.reached(goal)
            against = label(result, goal.rival) if goal.rival else "(by itself)"
            if goal.rival:
                reached = times(spread)
            else:
                reached = "–" if spread is None else f"{figure(result.value('fdpool'))} {result.unit}"
            mark = _mark(result, goal)
            lines.append(
                _line([f"[{result.name}](#{result.name})", against, goal_text(result, goal), reached, mark])
            )
    return "\n".join(lines) + "\n"


def _mark(result: MeasureResult, goal: Goal) -> str:
    _, verdict = result.reached(goal)
    return "**no**" if verdict == "no" else verdict


def markdown(results: Sequence[MeasureResult]) -> str:
    """All that is generated in docs/benchmarks.md."""
    machines = list(dict.fromkeys(result.machine for result in results))
    parts = ["## The goals\n", goals_table(results)]
    if len(machines) == 1:
        parts += ["## Machine\n", f"{machines[0]}\n"]
    else:
        parts += ["## Machines\n", *(f"{number}. {each}" for number, each in enumerate(machines, 1)), ""]
    family = ""
    for result in results:
        if result.family != family:
            family = result.family
            parts.append(f"## {family}\n")
        rounds = max((len(side.values) for side in result.sides.values()), default=0)
        where = f" on machine {machines.index(result.machine) + 1}" if len(machines) > 1 else ""
        parts.append(f"### {result.name}\n\n{result.title}. {rounds} rounds{where}.\n")
        parts.append(table(result))
    return "\n".join(parts)


BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def update(page: Path, generated: str) -> None:
    """Put what is generated between the marks of `page`."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{generated}\n{END}{rest.split(END)[1]}")
