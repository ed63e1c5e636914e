"""Which descriptor a program finds under which number: a plan of file actions, pure.

The kernel's dup2(2) overwrites its target, and leaves a descriptor that is already in its place
close-on-exec. So the moves are put in an order in which nothing is overwritten that is still needed;
cycles, of which a descriptor that stays where it is makes the shortest, go by way of a number that nobody
wants (M33, M36).
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple, Union


class Dup(NamedTuple):
    """dup2(source, target); the target survives exec."""

    source: int
    target: int


class Close(NamedTuple):
    """close(fd)."""

    fd: int


Action = Union[Dup, Close]


def plan(wanted: Mapping[int, int], strays: Iterable[int] = (), reserved: Iterable[int] = ()) -> list[Action]:
    """The actions after which each number of `wanted` is the descriptor it maps to, and survives exec.

    Args:
        wanted: number in the program -> a descriptor that is open now; in any arrangement.
        strays: descriptors that would survive exec, but are not for the program: closed, unless wanted there.
        reserved: numbers that no action may touch; none of them may be in `wanted`.

    The plan holds for dup2 as POSIX has it, where equal numbers are no action at all.
    """
    closing = set(strays).difference(wanted, reserved)
    if wanted.keys().isdisjoint(wanted.values()):  # nearly always: nothing is overwritten that is needed
        actions: list[Action] = [Dup(source, target) for target, source in wanted.items()]
    else:
        actions = _moves(wanted, reserved, closing)
    return actions + [Close(fd) for fd in sorted(closing)]


def _moves(wanted: Mapping[int, int], reserved: Iterable[int], closing: set[int]) -> list[Action]:
    """The duplications, in such an order; what they leave open by the way is added to `closing`."""
    pending = dict(wanted)
    uses = Counter(pending.values())
    scratch = free_number({*wanted, *wanted.values(), *reserved})
    actions: list[Action] = []
    # Invariant: a number in `ready` is wanted, and nobody pending needs what lies there now.
    ready = [target for target in pending if not uses[target]]
    while pending:
        while ready:
            target = ready.pop()
            source = pending.pop(target)
            actions.append(Dup(source, target))
            uses[source] -= 1
            if not uses[source] and source in pending:
                ready.append(source)
        if pending:
            # Each of the rest is wanted by exactly one other of the rest: cycles. Open one.
            target = next(iter(pending))
            actions.append(Dup(target, scratch))
            closing.add(scratch)
            heir = next(number for number, source in pending.items() if source == target)
            pending[heir] = scratch
            uses[target], uses[scratch] = 0, 1
            ready.append(target)
    return actions


def free_number(taken: Container[int]) -> int:
    """The lowest number above the standard streams that is not taken."""
    number = 3
    while number in taken:
        number += 1
    return number


def check_targets(numbers: Iterable[object], taken: Mapping[int, str], limit: int) -> None:
    """Refuse what no program can have under such a number.

    Args:
        numbers: what was asked for.
        taken: numbers that are given in another way, and the name of it.
        limit: the first number that cannot be (RLIMIT_NOFILE).

    Raises:
        TypeError: a number is no `int`.
        ValueError: it is negative, above the limit, or given twice.
    """
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"a descriptor's number in the program is an int, not {number!r}")
        if number < 0:
            raise ValueError(f"a descriptor's number in the program cannot be negative, and {number} is")
        if number in taken:
            raise ValueError(f"number {number} is given twice: in fds, and as {taken[number]}")
        if number >= limit:
            raise ValueError(
                f"number {number} is beyond what a process may have here: below {limit} (RLIMIT_NOFILE)"
            )
