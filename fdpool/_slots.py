"""The life of one slot, as a table State x Event in which every cell is decided.

Pure: no process, socket or clock in it. `_dispatch` feeds it events and asks it for the time; the
tests walk every cell, and `docs/design.md` shows the same table.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What a slot holds just now."""

    VACANT = "vacant"  # no worker; one may be started at once
    COOLING = "cooling"  # no worker, and none before `not_before`: the last one died while it booted
    STARTING = "starting"  # a worker was asked for, and has not said that it is ready
    READY = "ready"  # its worker takes tasks
    LEAVING = "leaving"  # its worker was told to go
    CLOSED = "closed"  # the pool is over


# Before Python 3.12 a member is found by way of a function of its class, in 90 ns; a name of the module in 5.
VACANT, COOLING, STARTING, READY, LEAVING, CLOSED = State


class Event(Enum):
    """What can happen to a slot."""

    WANTED = "wanted"  # the dispatcher wants a worker here
    READIED = "readied"  # the worker said that it is ready
    DISMISSED = "dismissed"  # the worker is told to go when its inbox is done
    EXITED = "exited"  # the worker died, for whatever reason
    COOLED = "cooled"  # the back-off is over
    CLOSED = "closed"  # the pool is over, whatever the slot holds


ILLEGAL = None  # the caller has lost track; raises

# One row a state; the columns are WANTED, READIED, DISMISSED, EXITED, COOLED, CLOSED. Three cells deserve
# a word: READIED where no worker starts is a stray datagram (say, of a task's forked child) and changes
# nothing; a death while STARTING is a failed boot and must cool; CLOSED never leads anywhere else.
_ROWS: dict[State, tuple[State | None, ...]] = {
    VACANT: (STARTING, VACANT, VACANT, ILLEGAL, ILLEGAL, CLOSED),
    COOLING: (ILLEGAL, COOLING, VACANT, ILLEGAL, VACANT, CLOSED),
    STARTING: (ILLEGAL, READY, LEAVING, COOLING, ILLEGAL, CLOSED),
    READY: (ILLEGAL, READY, LEAVING, VACANT, ILLEGAL, CLOSED),
    LEAVING: (ILLEGAL, LEAVING, LEAVING, VACANT, ILLEGAL, CLOSED),
    CLOSED: (CLOSED, CLOSED, CLOSED, CLOSED, CLOSED, CLOSED),
}
TABLE: dict[tuple[State, Event], State | None] = {
    (state, event): following for state, row in _ROWS.items() for event, following in zip(Event, row)
}

#: A number of failed boots after which the pause is the longest.
LATER = 16

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 1.0


def boot_pause_s(failures: int) -> float:
    """Seconds to wait after `failures` failed boots in a row: 0.01, doubling, at most 1."""
    return min(_FIRST_PAUSE_S * 2.0 ** (min(failures, LATER) - 1), _LONGEST_PAUSE_S)


class Slot:
    """One slot's state, and the number of workers that it has had.

    Attributes:
        generation: counts the workers started here; 1 for the first.
        not_before: clock value before which no worker starts; only meaningful while COOLING.
    """

    __slots__ = ("generation", "not_before", "number", "state")

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = VACANT
        self.generation = 0
        self.not_before = 0.0

    def step(self, event: Event) -> State:
        """Apply `event`; returns the new state.

        Raises:
            RuntimeError: the table has no such cell: a defect of the caller, never of a worker.
        """
        following = TABLE[self.state, event]
        if following is ILLEGAL:
            raise RuntimeError(f"slot {self.number} cannot be {event.value} while it is {self.state.value}")
        if self.state is VACANT and following is STARTING:
            self.generation += 1
        self.state = following
        return following

    def exited(self, now: float, failures: int) -> State:
        """The worker died; `failures` counts failed boots in a row and sets the length of a pause."""
        if self.step(Event.EXITED) is COOLING:
            self.not_before = now + boot_pause_s(failures)
        return self.state
