"""The picture: for each measure how far fdpool is ahead of each side, on a logarithmic scale, and the goals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._report import figure, label
from ._results import MeasureResult

COLOURS = {
    "ppe": "#1f6fb4",
    "ppe-forkserver": "#7fb3dd",
    "mp": "#d9662b",
    "mp-forkserver": "#f0ad85",
    "loky": "#2f8f5b",
    "pebble": "#8a63b0",
    "mpire": "#b5942c",
    "joblib": "#c4517e",
}
BARE = "#555555"  # what is no peer: the kernel, a shell, the ideal, fdpool in another way
NAMES = {
    "ppe": "ProcessPoolExecutor",
    "ppe-forkserver": "ProcessPoolExecutor, forkserver",
    "mp": "multiprocessing.Pool",
    "mp-forkserver": "multiprocessing.Pool, forkserver",
    "loky": "loky",
    "pebble": "Pebble",
    "mpire": "mpire",
    "joblib": "joblib",
}


def draw(results: Sequence[MeasureResult], path: Path) -> None:
    """Write the picture of all ratios there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if _rivals(result)]
    columns = _halves(shown)
    longest = max(sum(map(_height, column)) for column in columns)
    figure_, axes = pyplot.subplots(
        1, len(columns), figsize=(8 * len(columns), 1.6 + 0.16 * longest), sharex=True, squeeze=False
    )
    for axis, column in zip(axes[0], columns):
        _column(axis, column, longest)
    seen = {name for result in shown for name in _rivals(result)}
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=colour) for name, colour in COLOURS.items() if name in seen
    ]
    labels = [NAMES[name] for name in COLOURS if name in seen]
    handles += [
        pyplot.Rectangle((0, 0), 1, 1, color=BARE),
        pyplot.Line2D([], [], color="black", marker="|", linestyle="", markersize=9, markeredgewidth=2),
    ]
    labels += ["others, named at the bar", "goal"]
    figure_.legend(handles, labels, loc="upper center", ncols=5, frameon=False, fontsize=9)
    figure_.supxlabel(
        "times what fdpool takes, in the same round (right of 1×: fdpool is ahead)", fontsize=10
    )
    figure_.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure_.get_figheight()))
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def _rivals(result: MeasureResult) -> list[str]:
    return [name for name in result.sides if name != "fdpool" and result.ratio(name)]


def _height(result: MeasureResult) -> int:
    """Lines that a measure takes: its title, its bars, and a gap."""
    return len(_rivals(result)) + 2


def _halves(results: Sequence[MeasureResult]) -> list[list[MeasureResult]]:
    """Two columns of about one height; one for a few measures."""
    if len(results) < 4:
        return [list(results)]
    total, sofar = sum(map(_height, results)), 0
    left: list[MeasureResult] = []
    for result in results:
        if sofar + _height(result) / 2 > total / 2:
            break
        sofar += _height(result)
        left.append(result)
    return [left, list(results[len(left) :])]


def _column(axis: Any, results: Sequence[MeasureResult], lines: int) -> None:
    """Groups of bars that start at 1×, to the right where fdpool is ahead, to the left where it is behind."""
    axis.set_xscale("log")
    y = 0.0
    for result in results:
        text = f"{result.title.replace('`', '')}"
        limits = [f"goal ≤ {figure(goal.limit)}" for goal in result.goals if goal.limit is not None]
        text += f"   [fdpool {figure(result.value('fdpool'))} {result.unit}{''.join(', ' + each for each in limits)}]"
        axis.text(
            0,
            -y,
            text,
            transform=axis.get_yaxis_transform(),
            fontsize=8,
            fontweight="bold",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
        y += 1
        for name in _rivals(result):
            _bar(axis, result, name, -y)
            y += 1
        y += 1
    axis.axvline(1, color="black", linewidth=1)
    axis.set_ylim(-lines, 1)
    axis.set_yticks([])
    axis.xaxis.set_major_formatter(lambda value, _position: f"{value:g}×")
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("left", "right", "top"):
        axis.spines[side].set_visible(False)


def _bar(axis: Any, result: MeasureResult, name: str, y: float) -> None:
    spread = result.ratio(name)
    assert spread is not None
    colour = COLOURS.get(name, BARE)
    axis.barh(y, spread.median - 1, left=1, height=0.8, color=colour)
    axis.plot([spread.low, spread.high], [y, y], color="black", linewidth=0.8, alpha=0.6)
    end = max(spread.high, 1.0)
    words = f"{figure(spread.median)}×" + (
        "" if name in COLOURS else f"  {label(result, name).replace('`', '')}"
    )
    for goal in result.goals:
        if goal.rival == name and goal.ratio is not None:
            axis.plot([goal.ratio], [y], color="black", marker="|", markersize=9, markeredgewidth=2)
            if goal.ratio / 3 < end < goal.ratio * 1.1:  # no room between the bar's end and the mark
                end = goal.ratio
    axis.annotate(words, (end, y), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
