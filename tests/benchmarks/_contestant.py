"""One side of one measure, in a process of its own: `python -m tests.benchmarks._contestant`, run by the driver.

It reads a line of JSON from one descriptor and answers by one on another: "ready" once it is set up, the outcome of
a round for each "round", and its end for "stop".
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback

from . import measures
from ._cpu import Meter
from ._measure import Round, Settings

MOST_SAMPLES = 2000


def run_round(one_round: Round) -> dict[str, object]:
    """Run a round; its cost a unit in wall time and in CPU of the whole tree."""
    gc.collect()
    with Meter() as meter:
        outcome = one_round()
    return {
        "value": meter.wall_s / outcome.count if outcome.value is None else outcome.value,
        "cpu": meter.cpu_s / outcome.count if outcome.cpu_s is None else outcome.cpu_s,
        "samples": list(outcome.samples)[:MOST_SAMPLES],
    }


def main() -> None:
    commands = open(int(sys.argv[1]), closefd=False)
    answers = open(int(sys.argv[2]), "w", closefd=False)
    for fd in (int(sys.argv[1]), int(sys.argv[2])):
        os.set_inheritable(fd, False)

    def say(**answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    order = json.loads(commands.readline())
    measure = next(each for each in measures.of(order["family"]) if each.name == order["measure"])
    try:
        with measure.sides[order["side"]](Settings(**order["settings"])) as one_round:
            say(ready=True)
            for line in commands:
                if json.loads(line) == "stop":
                    break
                say(**run_round(one_round))
        say(stopped=True)
    except BaseException:
        say(error=traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
