"""Items of a map that travel together: run one by one, and cut short where they take long.

Runs in: a worker. What became of each item is its own affair, as if it had come alone. After `BUDGET_S` the worker
returns what it has and hands the rest back, so that idle workers can share it; later, if it has other work waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from . import payload
from ._clock import CLOCK
from .payload import Payload

T = TypeVar("T")

#: How long a worker runs items of one chunk, so that idle ones can share the rest. Each cut costs 80 microseconds.
BUDGET_S = 0.006
#: How long it does so while there is more for it to do: what idle workers want is taken from that. What comes behind
#: the chunk waits so long. 20,000 items of 20 microseconds take 4 % longer without it.
_BUDGET_WITH_MORE_S = 0.024
#: How long a slice may take that is claimed, and begun, as one. Items of 100 microseconds and more are claimed singly.
_SLICE_S = 200e-6
_LONGEST_SLICE = 128  # an item that does nothing costs 0.28 microseconds by 32, 0.14 by 128, 0.12 by 512
#: How long results are kept for each other. Each message wakes the client, on a processor that a worker could have:
#: 20,000 items of 20 microseconds take 4 % longer with 3 ms, and no less time with 12 or 50.
_FLUSH_S = 0.006

#: Types whose instances cannot change: it makes no difference whether items or results share one.
_PLAIN = frozenset((int, float, complex, bool, str, bytes, type(None)))


def is_plain(values: Sequence[Any]) -> bool:
    """True if these are instances of a few types that cannot change, or tuples of such."""
    if type(values) is range:
        return True
    kinds = list(map(type, values))
    if not kinds or (kinds[0] in _PLAIN and kinds.count(kinds[0]) == len(kinds)):
        return True  # 26 nanoseconds a value; by way of a set it is 60
    others = set(kinds) - _PLAIN
    if not others:
        return True
    return others == {tuple} and is_plain(
        [each for value in values if type(value) is tuple for each in value]
    )


class Guard(Protocol):
    """What a worker knows of the user code that it runs.

    Attributes:
        in_task: it runs: Ctrl-C may be raised in it.
        items: what it runs on next. A child that it forks exhausts this, as it must not go on with them.
    """

    in_task: bool
    items: Iterator[Any]

    def leave_if_forked(self, error: BaseException | None = None) -> None:
        """End this process if it is a child that user code forked: it must not go on as a worker."""


class Raised:
    """Stands in a list of results for one that is none: the item failed.

    Attributes:
        failure: the body of a `payload.dumps_failure`.
    """

    __slots__ = ("failure",)

    def __init__(self, failure: bytes) -> None:
        self.failure = failure

    def __reduce__(self) -> tuple[Any, ...]:
        return Raised, (self.failure,)

    def error(self) -> BaseException:
        """The exception."""
        return payload.loads_failure(self.failure, [], False)


def raised(error: BaseException) -> Raised:
    """What stands for an item that failed with `error`, whose frames are cleared."""
    # In band, and without descriptors, as it travels among others.
    return Raised(payload.dumps_failure(error, spill_bytes=1 << 62, max_fds=0).body)


def run(
    fn: Callable[..., Any],
    items: Sequence[Any],
    star: bool,
    start: int,
    stop: int,
    claim: Callable[[int, int], bool],
    guard: Guard,
    flush: Callable[[list[Any], bool], None],
    has_more: Callable[[], bool],
) -> int:
    """Run `items` from `start` on, `stop` at most, or as far as time and `claim` allow; returns how far.

    Args:
        star: each item is a tuple of arguments.
        claim: told of the range that is begun next; False if it must not be.
        guard: told where user code begins and ends.
        flush: sends results, and whether some are `Raised`. Takes what is not plain data at once, as the function may
            return the same object again, and change it.
        has_more: whether there is something to do behind this chunk.
    """
    clock = CLOCK.monotonic
    results: list[Any] = []
    flushed = began = first = clock()
    ends = first + BUDGET_S
    base = index = start  # of the first of `results`, and of what comes next
    step, longest = 1, _LONGEST_SLICE
    mixed = False
    while index < stop:
        end = min(index + step, stop)
        if not claim(index, end):
            break
        began = clock()
        seen = len(results)
        while index < end:
            guard.items = part = iter(items[index:end])
            calls = itertools.starmap(fn, part) if star else map(fn, part)
            try:
                guard.in_task = True
                # In C; what came before an error stays, as each is appended when it comes.
                results.extend(calls)
                if base + len(results) < end:  # it is the function that has raised StopIteration
                    raise StopIteration
                guard.in_task = False
            except BaseException as error:
                guard.in_task = False
                guard.leave_if_forked(error)
                if base + len(results) < end:  # else it is a Ctrl-C that came too late
                    results.append(raised(error))
                    mixed = True
            index = base + len(results)
            guard.leave_if_forked()
        now = clock()
        if not mixed and not is_plain(results[seen:]):
            step = longest = 1
        elif now - began > _SLICE_S:
            step = 1
        elif now - began < _SLICE_S / 2 and step < longest:
            step *= 2
        if mixed or longest == 1 or now - flushed > _FLUSH_S:
            flush(results, mixed)
            results, mixed, base, flushed = [], False, index, now
        if now > ends:
            if now > first + _BUDGET_WITH_MORE_S or not has_more():
                break
            ends = now + BUDGET_S
    guard.items = iter(())
    if results:
        flush(results, mixed)
    return index


def answers(results: list[Any], mixed: bool) -> Iterator[tuple[int, Payload]]:
    """The payloads of lists of results, with how many are in each: one, unless some do not go together. Those
    where some are `Raised` are tuples.

    A result that cannot be sent stands there as an error, and so are more descriptors than a message holds parted.
    """
    try:
        whole = payload.dumps_result(tuple(results) if mixed else results)
    except BaseException as error:
        if len(results) == 1:
            yield 1, payload.dumps_result((raised(error),))
            return
    else:
        yield len(results), whole
        return
    half = len(results) // 2
    yield from answers(results[:half], mixed)
    yield from answers(results[half:], mixed)


def run_together(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    """Runs in: a worker. Several items of a map as one task, which fails as one."""
    return [fn(*item) for item in chunk]
