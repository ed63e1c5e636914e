"""Loads a real `fdpool serve` and does things to it meanwhile, counting what becomes of every request.

Each scenario is told whether it has cost more than it may: nothing for a reload, a change of the number of workers and
an upgrade; for a killed worker what it had begun, and what it had just taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ._scenarios import SCENARIOS, play, taken_by
from ._served import served


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument(
        "--scenario",
        action="append",
        choices=SCENARIOS,
        metavar="NAME",
        help=f"one of {', '.join(SCENARIOS)} (all)",
    )
    parser.add_argument("--app", choices=("handler", "asgi", "wsgi"), default="handler", help="(handler)")
    parser.add_argument(
        "--dispatch", choices=("shared", "handoff", "reuseport"), default="shared", help="(shared)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(2)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each worker (1)")
    parser.add_argument("--rps", type=float, default=300.0, metavar="R", help="requests a second (300)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="of each scenario, about (10)"
    )
    parser.add_argument(
        "--times", type=int, default=10, metavar="N", help="how often it is reloaded, and so on (10)"
    )
    parser.add_argument(
        "--keep-alive", type=float, default=0.5, metavar="SHARE", help="of the requests (0.5)"
    )
    parser.add_argument("--work-ms", type=int, default=2, metavar="MS", help="that each request takes (2)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of all that is random (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    parser.add_argument("--log", action="store_true", help="print the end of the server's log, too")
    return parser.parse_args()


def main() -> int:
    given = options()
    arguments = ["--bind", "127.0.0.1:0", "--workers", str(given.workers), "--dispatch", given.dispatch]
    arguments += ["--threads", str(given.threads), f"tests.load.app:{given.app}"]
    good = True
    with ExitStack() as stack:
        ledger = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "begun"
        server = stack.enter_context(served(*arguments, env={"TEST_LOAD_LEDGER": str(ledger)}))
        for name in given.scenario or SCENARIOS:
            verdict = play(
                name,
                server,
                rps=given.rps,
                seconds=given.seconds,
                seed=given.seed,
                times=given.times,
                keep_alive=given.keep_alive,
                work_ms=given.work_ms,
                ledger=None if given.app == "handler" else ledger,
                taken=taken_by(given.app, given.threads, given.dispatch),
            )
            good = good and verdict.is_good
            said = verdict.as_json()
            if given.json:
                print(json.dumps(said), flush=True)
            else:
                print("  ".join(f"{key}={value}" for key, value in said.items()), flush=True)
        if given.log:
            print(server.tail(), file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
