"""What a task may take, in time and memory: notices when it has taken more, and has its worker ended.

Nobody tells the client when a task begins: the board says it when somebody looks. A task that may run for a
second, and has not begun at some moment, cannot be overdue before a second after that. So one look a slot at the
right moment is enough, and a task with a limit costs no message more than any other.

All of it runs with the client's lock held.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from ._clock import CLOCK
from ._dispatch import Action
from ._tasks import CutShort
from .errors import TaskTerminated, TaskTimeout

if TYPE_CHECKING:
    from ._client import Client
    from ._options import TaskOptions

#: How often the memory of a worker is looked at whose task has a limit of it. A look takes 0.1 to 0.3 ms, more if it
#: has descendants; at 8 GiB/s a task gets 400 MiB between two.
_MEMORY_LOOK_S = 0.05
#: How long a task that is to end may take from the moment when its worker should be dead, before the client itself
#: kills it: the supervisor is stopped, or has much to do.
_OVERDUE_S = 5.0
#: How often, and how many seconds apart, it is then looked whether the supervisor has reported that worker's death,
#: before it is given up: it is stopped for good, say. Looks are counted, as this process may have been stopped together
#: with it, and both go on now.
_SILENT_LOOKS = 10
_SILENT_LOOK_S = 1.0
#: When a task is first interrupted again. Python heeds a signal that comes just before a system call that blocks only
#: after that call: so it was in 8 of 3,000 tasks that were about to read.
_SIGNAL_AGAIN_S = 0.02
#: How often a task is looked at that is not to begin, and cannot be taken back just now.
_STUBBORN_LOOK_S = 0.1
#: The same for one that is to be stopped as it begins.
_STOP_LOOK_S = 0.01
#: As many tasks that are done may be kept in any case: to sort out those that are not takes a while.
_FEW = 100


class Limits:
    """Of all tasks of `client`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._dispatcher = client.dispatcher
        self._tasks = client.tasks
        self._looks: dict[int, float] = {}  # slot -> when to look at what it runs
        # A heap of tasks that must have begun by some moment, and within how many seconds; some are done meanwhile.
        self._waiting: list[tuple[float, int, float]] = []
        self._timers: list[tuple[float, int, Callable[..., Sequence[Action]], tuple[Any, ...]]] = []
        self._count = itertools.count()

    # -- what is to be noticed -----------------------------------------------------------------------------

    def next_look(self) -> float | None:
        """When `look` is due next, or None."""
        if not self._looks and not self._waiting and not self._timers:
            return None
        return min([*self._looks.values(), *(heap[0][0] for heap in (self._waiting, self._timers) if heap)])

    def at(self, moment: float, event: Callable[..., Sequence[Action]], *arguments: Any) -> None:
        """Have an event handled at some moment."""
        heapq.heappush(self._timers, (moment, next(self._count), event, arguments))
        self._client.wake()

    def submitted(self, task: int, queue_timeout: float) -> Sequence[Action]:
        """Event: the task must begin within so many seconds from now."""
        waiting = self._waiting
        while waiting and waiting[0][1] not in self._tasks:
            heapq.heappop(waiting)
        if len(waiting) > 2 * len(self._tasks) + _FEW:
            # Behind one that is not done: those that are would stay until their time is over.
            waiting[:] = [entry for entry in waiting if entry[1] in self._tasks]
            heapq.heapify(waiting)
        due = (CLOCK.monotonic() + queue_timeout, task, queue_timeout)
        heapq.heappush(waiting, due)
        if waiting[0] is due:
            self._client.wake()
        return ()

    def sent(self, slot: int, options: TaskOptions) -> None:
        """A task with limits has been put in the slot's inbox; it may have ended by now."""
        moment = CLOCK.monotonic() + (_MEMORY_LOOK_S if options.timeout is None else options.timeout)
        if options.max_memory is not None:
            moment = min(moment, CLOCK.monotonic() + _MEMORY_LOOK_S)
        if moment < self._looks.get(slot, moment + 1):
            self._looks[slot] = moment
            self._client.wake()

    # -- noticing ------------------------------------------------------------------------------------------

    def look(self) -> Sequence[Action]:
        """Event: something is due."""
        now = CLOCK.monotonic()
        # Each an event of its own: what one decides is done before the next looks.
        leave = self._client.critical.leave
        while self._timers and self._timers[0][0] <= now:
            _, _, event, arguments = heapq.heappop(self._timers)
            leave((event, arguments))
        while self._waiting and (self._waiting[0][0] <= now or self._waiting[0][1] not in self._tasks):
            _, task, seconds = heapq.heappop(self._waiting)
            leave((self._give_up_waiting, (task, seconds)))
        for slot in [slot for slot, moment in self._looks.items() if moment <= now]:
            del self._looks[slot]
            leave((self._look_at, (slot,)))
        return ()

    def _give_up_waiting(self, task: int, seconds: float) -> Sequence[Action]:
        """Event: the task must have begun by now. One that is to be tried again has."""
        record = self._tasks.get(task)
        if record is None or record.attempts or self._client.is_begun(task):
            return ()
        if self._client.take_out(task):
            error = TaskTimeout(
                f"{record.label} had not begun {seconds:g} seconds after it was submitted (queue_timeout): it was "
                "taken out of the queue, and has not run",
                seconds,
            )
            error.may_have_run = False
            self._client.fail(task, error)
        elif self._dispatcher.slot_of(task) is not None:  # it cannot be taken back just now
            self.at(CLOCK.monotonic() + _STUBBORN_LOOK_S, self._give_up_waiting, task, seconds)
        return ()

    def _look_at(self, slot: int) -> Sequence[Action]:
        """Event: end the slot's task if it has taken too much, and work out when to look again."""
        now = CLOCK.monotonic()
        limited = {
            task: record
            for task in self._dispatcher.given(slot)
            if (record := self._tasks.get(task)) is not None
            and record.options is not None
            and record.options.is_watched
            and record.cut_short is None
        }
        running, began = self._client.running(slot)
        moments = []
        for task, record in limited.items():
            options = record.options
            assert options is not None
            if options.timeout is not None:
                overdue_at = (began if task == running else now) + options.timeout
                if task == running and overdue_at <= now:
                    # Again soon: it may just have ended, and the next one, which nobody looks after, have begun.
                    self._looks[slot] = now + _MEMORY_LOOK_S
                    return self.cut_short(slot, task, CutShort.TIMED_OUT)
                moments.append(overdue_at)
            if options.max_memory is not None:
                if task == running:
                    used = self._client.links[slot].memory_bytes()
                    if used > options.max_memory:
                        record.used_memory = used
                        self._looks[slot] = now + _MEMORY_LOOK_S
                        return self.cut_short(slot, task, CutShort.TOOK_TOO_MUCH)
                moments.append(now + _MEMORY_LOOK_S)
        if moments:
            self._looks[slot] = min(moments)
        return ()

    # -- ending --------------------------------------------------------------------------------------------

    def stop(self, task: int) -> Sequence[Action]:
        """Event: the worker that runs the task, or is about to, is to stop it."""
        slot = self._dispatcher.slot_of(task)
        if slot is None:
            return ()
        if not self._client.is_begun(task) and self._client.take_out(task):
            self._client.fail(task, CancelledError())
        elif not self._leave_word(slot, task):
            self.at(CLOCK.monotonic() + _STOP_LOOK_S, self.stop, task)
        return ()

    def terminate(self, task: int, grace_s: float) -> None:
        """Have a running task interrupted; and if that does not end it within `grace_s`, its worker ended."""
        if self._dispatcher.slot_of(task) is not None:
            self._interrupt(task)
            self.at(CLOCK.monotonic() + grace_s, self._end_stubborn, task)

    def _interrupt(self, task: int) -> Sequence[Action]:
        """Event: a task is to be interrupted, as soon as it has begun."""
        slot = self._dispatcher.slot_of(task)
        if slot is None:
            return ()
        if self._leave_word(slot, task):
            self.at(CLOCK.monotonic() + _SIGNAL_AGAIN_S, self._interrupt_again, slot, task, _SIGNAL_AGAIN_S)
        else:
            self.at(CLOCK.monotonic() + _STOP_LOOK_S, self._interrupt, task)
        return ()

    def _leave_word(self, slot: int, task: int) -> bool:
        """Tell the slot's worker to stop the task; False if that is to be done again, as it has not begun, or nobody
        has said yet which worker it is.

        There is one word for that. The task that runs takes it; one that has not begun waits until no other needs it.
        """
        board = self._client.board
        assert board is not None
        if board.begun(slot) == task:
            board.ask_to_stop(slot, task)
            return self._client.links[slot].wake_worker()
        if self._client.is_begun(task):
            return True  # it has ended, and the one that runs may need the word
        if board.asked_to_stop(slot) not in self._dispatcher.given(slot):
            board.ask_to_stop(slot, task)
        return False

    def _interrupt_again(self, slot: int, task: int, pause_s: float) -> Sequence[Action]:
        """Event: a task that was interrupted `pause_s` or more ago may run still. It is interrupted once, though: that
        a signal comes again means nothing to one that has heeded it."""
        if self._client.running(slot)[0] == task:
            self._client.links[slot].wake_worker()
            self.at(CLOCK.monotonic() + 2 * pause_s, self._interrupt_again, slot, task, 2 * pause_s)
        return ()

    def _end_stubborn(self, task: int) -> Sequence[Action]:
        """Event: a task that was interrupted has had its time. Or it was not in a task's code just then: it had been
        received and not begun, and may be in another place now."""
        slot = self._dispatcher.slot_of(task)
        if slot is not None and self._client.running(slot)[0] == task:
            return self.cut_short(slot, task, CutShort.TERMINATED)
        if self._client.take_out(task):
            self._client.fail(task, TaskTerminated("before it had begun"))
        elif self._dispatcher.slot_of(task) is not None:
            self.at(CLOCK.monotonic() + _STUBBORN_LOOK_S, self._end_stubborn, task)
        return ()

    def cut_short(self, slot: int, task: int, why: CutShort) -> Sequence[Action]:
        """End the slot's worker for the sake of the task that it runs; nothing if it does not run that any more.

        What else it was given goes to others first: so nothing but this task can be lost.
        """
        record = self._tasks.get(task)
        if record is None:
            return ()
        runs, others = self._client.inboxes.pin(slot, task)
        if not runs:
            return self._dispatcher.taken_back(slot, others)
        record.cut_short = why
        grace_s = record.grace_s
        self._client.end_worker(slot, grace_s, stacks=why is not CutShort.TERMINATED)
        generation = self._dispatcher.generation(slot)
        self.at(CLOCK.monotonic() + grace_s + _OVERDUE_S, self._kill, slot, generation, task)
        return self._dispatcher.doomed(slot, others)

    def _kill(self, slot: int, generation: int, task: int) -> Sequence[Action]:
        """Event: a worker that should be dead is not, as far as the supervisor says."""
        if self._is_still_in(slot, generation, task):
            self._client.links[slot].signal_tree()
            self.at(CLOCK.monotonic() + _SILENT_LOOK_S, self._await_report, slot, generation, task, 1)
        return ()

    def _await_report(self, slot: int, generation: int, task: int, looks: int) -> Sequence[Action]:
        """Event: the death of a worker that was killed from here should have been reported by now.

        Settled without that, the slot would get a worker more from a supervisor that goes on some day, or never gets
        one. So the supervisor is ended, and what it was to do is done by its successor, if there is to be one.
        """
        if not self._is_still_in(slot, generation, task):
            return ()
        link = self._client.links[slot]
        if looks >= _SILENT_LOOKS and link.has_died():
            who = "a worker" if link.pid is None else f"worker {link.pid}"
            self._client.supervision.give_up(
                f"it had not reported the death of {who}, and may have been stopped"
            )
            return ()
        self.at(CLOCK.monotonic() + _SILENT_LOOK_S, self._await_report, slot, generation, task, looks + 1)
        return ()

    def _is_still_in(self, slot: int, generation: int, task: int) -> bool:
        """True if the task is with that very worker; the next one may be at its next attempt."""
        return self._dispatcher.generation(slot) == generation and self._dispatcher.slot_of(task) == slot
