"""How many workers there are, and for how long: the least number, those that idle, those that are old.

All of it runs with the client's lock held. An idle pool that has no more workers than it must have is not woken.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ._clock import CLOCK
from ._dispatch import Action
from ._slots import State

if TYPE_CHECKING:
    from ._client import Client

_LOOKS = 4  # in the time after which an idle worker goes: so it goes a quarter of it late at most
_SPREAD = 0.1  # of a worker's age, so that those that were started together do not go together
_LEAVE_S = 5.0  # how long one that leaves by itself may take for its exit handlers and threads


class Staff(NamedTuple):
    """What was asked for.

    Attributes:
        min_workers: so many are there from the first task on, busy or not.
        idle_timeout: seconds after which one beyond these goes that has nothing to do; None for never.
        max_age: seconds after which one goes, when it has done what it runs; None for never.
    """

    min_workers: int = 0
    idle_timeout: float | None = None
    max_age: float | None = None


class Staffing:
    """Of `client`."""

    def __init__(self, client: "Client", staff: Staff) -> None:
        self._client = client
        self._dispatcher = client.dispatcher
        self._staff = staff
        self._looking = False
        # slot -> the generation of its worker, and when that is too old
        self._old_at: dict[int, tuple[int, float]] = {}
        self._timed: set[int] = set()  # slots that a timer looks at
        self._idle_since: dict[
            int, tuple[int, float]
        ] = {}  # slot -> how much its worker had done, and since when

    def readied(self, slot: int) -> None:
        """A worker takes tasks from now on."""
        staff = self._staff
        if staff.max_age is not None:
            age = staff.max_age * random.uniform(1 - _SPREAD, 1)
            generation = self._dispatcher.generation(slot)
            moment = CLOCK.monotonic() + age
            self._old_at[slot] = generation, moment
            if slot not in self._timed:
                self._timed.add(slot)
                self._client.limits.at(moment, self._look_at_age, slot)
        if staff.idle_timeout is not None and not self._looking:
            self._look_later(staff.idle_timeout)

    def going(self, slot: int) -> Sequence[Action]:
        """Event: the slot's worker takes no more tasks, and is about to end."""
        state, generation = self._dispatcher.state(slot), self._dispatcher.generation(slot)
        if state in (State.READY, State.LEAVING):
            self._client.limits.at(CLOCK.monotonic() + _LEAVE_S, self._end_lingering, slot, generation)
        if state is not State.READY:
            return ()
        self._client.recycled += 1
        return self._dispatcher.doomed(slot, self._client.inboxes.receive(slot))

    def _end_lingering(self, slot: int, generation: int) -> Sequence[Action]:
        """Event: a worker that leaves has had its time; a thread of a task's does not end, perhaps."""
        state = self._dispatcher.state(slot)
        if self._dispatcher.generation(slot) == generation and state is State.LEAVING:
            self._client.end_worker(slot, 1.0)
        return ()

    def _look_at_age(self, slot: int) -> Sequence[Action]:
        """Event: a worker of the slot would be too old now, perhaps not the one that it has.

        One timer a slot, not a worker: of short-lived ones, millions would be kept until their age is over. It comes in
        time for any later one, as their ages differ by less than the spread.
        """
        generation, moment = self._old_at[slot]
        if moment > CLOCK.monotonic():
            self._client.limits.at(moment, self._look_at_age, slot)
            return ()
        self._timed.discard(slot)
        return self._retire(slot, generation)

    def _retire(self, slot: int, generation: int) -> Sequence[Action]:
        """Event: a worker is to go when it has done what it runs, and to be replaced when that is needed."""
        if self._dispatcher.generation(slot) != generation or self._dispatcher.state(slot) is not State.READY:
            return ()
        self._client.recycled += 1
        return self._dispatcher.retired(slot, generation, self._client.inboxes.receive(slot))

    def _look_later(self, idle_timeout: float) -> None:
        self._looking = True
        self._client.limits.at(CLOCK.monotonic() + idle_timeout / _LOOKS, self._look)

    def _look(self) -> Sequence[Action]:
        """Event: see who has had nothing to do, and let those go that are too many."""
        idle_timeout = self._staff.idle_timeout
        assert idle_timeout is not None
        now = CLOCK.monotonic()
        before, self._idle_since = self._idle_since, {}
        actions: list[Action] = []
        count = self._dispatcher.live
        for slot in self._dispatcher.idle_slots():
            done = self._dispatcher.worked(slot)
            since = before[slot][1] if slot in before and before[slot][0] == done else now
            if now - since >= idle_timeout and count > self._staff.min_workers:
                count -= 1
                actions += self._retire(slot, self._dispatcher.generation(slot))
            else:
                self._idle_since[slot] = done, since
        self._looking = False
        if count > self._staff.min_workers:
            self._look_later(idle_timeout)
        return actions
