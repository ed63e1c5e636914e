"""Measure fdpool, its peers and the bare kernel in turn: `python -m tests.benchmarks [MEASURE ...]`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fdpool

from . import _driver, _plot, _report, measures, peers
from ._results import MeasureResult


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help="all, if none is named")
    parser.add_argument("--list", action="store_true", help="show the measures, and run none")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, small sizes, and the standard library's pools"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every measure")
    parser.add_argument(
        "--peers", metavar="A,B", help="only these; fdpool and the bare kernel are always there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all rounds")
    parser.add_argument("--add", action="store_true", help="keep what FILE of --json has of other measures")
    parser.add_argument("--load", type=Path, metavar="FILE", help="measure nothing: show what --json saved")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE.md", help="put the tables between the marks of a page"
    )
    given = parser.parse_args()
    known = {measure.name for measure in measures.every()}
    if unknown := set(given.measures) - known:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}; --list shows them")
    usual = peers.STANDARD if given.quick else peers.PEERS
    given.peers = {"fdpool", "fdpool-fork", *(given.peers.split(",") if given.peers else usual)}
    if unknown := given.peers - set(peers.PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(peers.PEERS)}")
    return given


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measured(given: argparse.Namespace) -> Iterator[MeasureResult]:
    """Run what was asked for; each result as soon as it is there."""
    if given.quick:
        say("quick: sizes are smaller than the titles say")
    for measure in measures.every():
        if given.measures and measure.name not in given.measures:
            continue
        if measure.needs is not None and not hasattr(fdpool.Pool, measure.needs):
            say(f"{measure.name} is skipped: there is no Pool.{measure.needs}")
            continue
        begun = time.monotonic()
        result = _driver.run(measure, given.peers, given.rounds, given.quick, say)
        say(f"{measure.name} took {time.monotonic() - begun:.1f} s")
        yield result


def load(file: Path) -> dict[str, MeasureResult]:
    """What --json saved, by name. How it is summed up is no part of that: it is as the measure says now."""
    saved = json.loads(file.read_text())
    results = {each["name"]: MeasureResult.from_json(each) for each in saved["measures"]}
    for measure in measures.every():
        if measure.name in results:
            results[measure.name].mean = measure.mean
    return results


def save(file: Path, about: dict[str, Any], results: Iterable[MeasureResult]) -> None:
    file.write_text(json.dumps({"machine": about, "measures": [each.as_json() for each in results]}) + "\n")


def in_order(results: dict[str, MeasureResult]) -> list[MeasureResult]:
    return [results[measure.name] for measure in measures.every() if measure.name in results]


def main() -> int:
    given = options()
    # So that the contestants and their files go as well.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    if given.list:
        for measure in measures.every():
            print(f"{measure.name:16} {measure.title}  [{', '.join(measure.sides)}]")
        return 0
    results: dict[str, MeasureResult] = {}
    if given.load:
        results = load(given.load)
    else:
        about = _report.machine()
        if given.add and given.json and given.json.exists():
            results = load(given.json)
        for result in measured(given):
            result.machine = _report.described(about)
            results[result.name] = result
            if given.json:  # each time: a run takes long, and may be interrupted
                save(given.json, about, in_order(results))
            if not given.markdown:
                print(f"\n{result.name}: {result.title}\n\n{_report.table(result)}", flush=True)
    found = in_order(results)
    print(_report.markdown(found) if given.markdown else _report.goals_table(found))
    if given.update:
        _report.update(given.update, _report.markdown(found))
    if given.plot:
        _plot.draw(found, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
