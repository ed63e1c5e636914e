"""The command: see the package."""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports fdpool, which atheris may have to see imported
    from .targets import Target

_BATCH = 500  # inputs between two looks at a live target


class FromBytes(random.Random):
    """Dice that fall as the bytes say, for a fuzzer that is guided by coverage; zeros after their end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = int.from_bytes(data, "little")

    def getrandbits(self, count: int) -> int:
        found = self._data & ((1 << count) - 1)
        self._data >>= count
        return found

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def fuzz(kind: type[Target], count: int, seed: int) -> None:
    """Feed `count` inputs to one target; the number in an error, with the seed, repeats it."""
    dice = random.Random(f"{seed} {kind.__name__}")
    number = 0
    begun = time.monotonic()
    with kind() as target:
        try:
            for number in range(1, count + 1):
                target.feed(dice)
                if number % _BATCH == 0:
                    target.check()
            target.check()
        except BaseException as error:
            error.args = (f"{kind.__name__}, seed {seed}, by input {number}: {error}",)
            raise
    print(f"{kind.__name__:8} {count} inputs in {time.monotonic() - begun:.1f} s, seed {seed}", flush=True)


def guided(kind: type[Target], runs: int) -> None:
    """Let atheris choose the inputs of a pure target."""
    import atheris

    def once(data: bytes) -> None:
        target.feed(FromBytes(data))

    with kind() as target:
        atheris.Setup([sys.argv[0], f"-runs={runs}"], once)
        atheris.Fuzz()


def instrumented() -> AbstractContextManager[object]:
    """Within, what of fdpool is imported tells atheris of its branches. No other module does: to go through all that
    are loaded takes minutes, before the first input."""
    import atheris

    manager: AbstractContextManager[object] = atheris.instrument_imports(include=["fdpool"])
    return manager


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each target")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--target", action="append", help="default: all")
    parser.add_argument(
        "--atheris", action="store_true", help="let atheris choose; one target, and a pure one"
    )
    options = parser.parse_args()
    with instrumented() if options.atheris else nullcontext():
        from .targets import LIVE, PURE
    names = {kind.__name__.lower(): kind for kind in (*PURE, *LIVE)}
    if unknown := set(options.target or ()) - set(names):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    if options.atheris:
        if len(options.target or ()) != 1 or names[options.target[0]] not in PURE:
            parser.error(
                "--atheris takes one --target of " + ", ".join(kind.__name__.lower() for kind in PURE)
            )
        guided(names[options.target[0]], options.inputs)
    for name in options.target or names:
        fuzz(names[name], options.inputs, options.seed)


if __name__ == "__main__":
    main()
