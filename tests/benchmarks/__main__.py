"""Measure fdpool, its peers and the bare kernel in turn: `python -m tests.benchmarks [MEASURE ...]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

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
    known = {measure.name for measure in measures.ALL}
    if unknown := set(given.measures) - known:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}; --list shows them")
    usual = peers.STANDARD if given.quick else peers.PEERS
    given.peers = {"fdpool", "fdpool-fork", *(given.peers.split(",") if given.peers else usual)}
    if unknown := given.peers - set(peers.PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(peers.PEERS)}")
    return given


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measured(given: argparse.Namespace) -> list[MeasureResult]:
    """Run what was asked for."""
    results = []
    if given.quick:
        say("quick: sizes are smaller than the titles say")
    for measure in measures.ALL:
        if given.measures and measure.name not in given.measures:
            continue
        if measure.needs is not None and not hasattr(fdpool.Pool, measure.needs):
            say(f"{measure.name} is skipped: there is no Pool.{measure.needs}")
            continue
        begun = time.monotonic()
        result = _driver.run(measure, given.peers, given.rounds, given.quick, say)
        results.append(result)
        say(f"{measure.name} took {time.monotonic() - begun:.1f} s")
        if not given.markdown:
            print(f"\n{measure.name}: {measure.title}\n\n{_report.table(result)}", flush=True)
    return results


def main() -> int:
    given = options()
    if given.list:
        for measure in measures.ALL:
            print(f"{measure.name:16} {measure.title}  [{', '.join(measure.sides)}]")
        return 0
    saved = None
    if given.load or (given.add and given.json and given.json.exists()):
        saved = json.loads((given.load or given.json).read_text())
    if given.load:
        about, results = saved["machine"], [MeasureResult.from_json(each) for each in saved["measures"]]
    else:
        about, results = _report.machine(), measured(given)
        if saved:
            fresh = {result.name: result for result in results}
            fresh = {each["name"]: MeasureResult.from_json(each) for each in saved["measures"]} | fresh
            results = [fresh[measure.name] for measure in measures.ALL if measure.name in fresh]
        if given.json:
            kept = {"machine": about, "measures": [result.as_json() for result in results]}
            given.json.write_text(json.dumps(kept, indent=1) + "\n")
    if given.markdown:
        print(_report.markdown(results, about))
    else:
        print(_report.goals_table(results))
    if given.update:
        _report.update(given.update, _report.markdown(results, about))
    if given.plot:
        _plot.draw(results, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
