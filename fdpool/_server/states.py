"""The life of one server worker, as a table State x Event in which every cell is decided.

Pure. `_server.plan` feeds it events; `docs/design.md` shows the same table. Not to be taken for `_slots`: that is a
pool's slot, which has one worker after another; this is one worker, which lives once.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """What a server worker is about."""

    BOOTING = "booting"  # asked for; it has not said that it serves
    STANDING_BY = "standing by"  # its application is loaded, and it waits to be called to serve
    SERVING = "serving"
    DRAINING = "draining"  # takes nothing new, and finishes what it has
    ENDING = "ending"  # to be killed, or being killed
    GONE = "gone"


class Event(Enum):
    """What can happen to it."""

    READIED = "readied"  # it said that it serves
    STOOD_BY = "stood by"  # it said that it stands by
    CALLED = "called"  # it is to serve
    DISMISSED = "dismissed"  # it is not wanted any more
    OVERDUE = "overdue"  # it has taken longer than it may: to boot, to drain, or for a request
    EXITED = "exited"  # it is dead, or done, for whatever reason


ILLEGAL = None  # the caller has lost track; raises

# One row a state; the columns are READIED, STOOD_BY, CALLED, DISMISSED, OVERDUE, EXITED. Two cells deserve a word: a
# worker that is dismissed while it boots has nothing to finish, so it is ended; and to come to serve, one that stood by
# has to boot what it has not yet.
_S = State
_ROWS: dict[State, tuple[State | None, ...]] = {
    _S.BOOTING: (_S.SERVING, _S.STANDING_BY, _S.BOOTING, _S.ENDING, _S.ENDING, _S.GONE),
    _S.STANDING_BY: (_S.SERVING, _S.STANDING_BY, _S.BOOTING, _S.DRAINING, _S.ENDING, _S.GONE),
    _S.SERVING: (_S.SERVING, _S.SERVING, _S.SERVING, _S.DRAINING, _S.ENDING, _S.GONE),
    _S.DRAINING: (_S.DRAINING, _S.DRAINING, _S.DRAINING, _S.DRAINING, _S.ENDING, _S.GONE),
    _S.ENDING: (_S.ENDING, _S.ENDING, _S.ENDING, _S.ENDING, _S.ENDING, _S.GONE),
    _S.GONE: (ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL, ILLEGAL),
}
TABLE: dict[tuple[State, Event], State | None] = {
    (state, event): following for state, row in _ROWS.items() for event, following in zip(Event, row)
}


def step(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        RuntimeError: the table has no such cell: a defect of the caller, never of a worker.
    """
    following = TABLE[state, event]
    if following is ILLEGAL:
        raise RuntimeError(f"a server worker cannot be {event.value} while it is {state.value}")
    return following
