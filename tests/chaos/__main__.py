"""The command: see the package."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from .run import Chaos


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument(
        "--no-thief", dest="thief", action="store_false", help="leave the client its descriptors"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    chaos = Chaos(
        options.seed,
        seconds=options.minutes * 60,
        workers=options.workers,
        threads=options.threads,
        thief=options.thief,
    )
    wrong = chaos.run()
    print(
        f"seed {options.seed}: {sum(chaos.done.values())} tasks in {time.monotonic() - begun:.1f} s, "
        f"{_words(chaos.disturbed)}; lost {dict(chaos.failed)}, {len(wrong)} wrong; {dict(chaos.done)}"
    )
    for line in wrong[:20]:
        print("  " + line)
    return 1 if wrong else 0


def _words(disturbed: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{what} {whom}: {count}" for (what, whom), count in sorted(disturbed.items()))


if __name__ == "__main__":
    sys.exit(main())
