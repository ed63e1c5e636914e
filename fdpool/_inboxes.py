"""What lies in the slots' inboxes: putting tasks in, taking them back, and recalling what a worker has received.

All of it runs with the client's lock held, and never waits. What is sent together is looked after: if one task takes
long, its neighbours' answers are fetched from the board, and what has not begun is taken away while a worker is idle.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from . import _budget, _dispatch, _messages, wire
from ._answers import lost_descriptors
from ._board import SETTLE_S, Board
from ._broken import PoolBroken
from ._clock import CLOCK
from ._dispatch import Action
from ._messages import HEADER_BYTES, MAX_DATAGRAM
from ._slots import State
from ._tasks import ChunkFuture
from .errors import WireError
from .fds import SCM_MAX_FD, OwnedFds, close_all
from .payload import Payload

if TYPE_CHECKING:
    from ._client import Client

#: How often the pump looks after tasks that were sent together: whether one of them takes long, and holds up others.
_LOOK_S = 0.004

#: Pause before the kernel is asked again to take a message, where nothing of ours is in its way.
RETRY_S = 0.01


class Inboxes:
    """All inboxes of `client`.

    Attributes:
        looks_at: when `look_after` is due, or None.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks = client.tasks
        self._links = client.links
        self._dispatcher = client.dispatcher
        # Slots that were sent a chunk, or several tasks as one message or while others were idle, and what their worker
        # had begun (the task, and the item of a chunk) when last looked at.
        self._batched: dict[int, tuple[int, int]] = {}
        self.looks_at: float | None = None
        # Slots that may have been given descriptors of which no copy was kept.
        self._carrying: set[int] = set()
        # What the workers of slots will say that they have not begun, as is known already.
        self._recalled: dict[int, set[int]] = {}

    @property
    def _board(self) -> Board:
        board = self._client.board
        assert board is not None
        return board

    def forget(self, slot: int) -> None:
        """The slot's worker is dead."""
        self._batched.pop(slot, None)
        self._recalled.pop(slot, None)

    def fetch(self, slot: int, task: int) -> Sequence[Action]:
        """Take `task` out of the slot's inbox, or from the worker that has received it, if it has not begun.

        Then it is forgotten by the dispatcher; its future has its payload again.
        """
        found, is_all = self.emptied(slot)
        if is_all and task not in found:
            found = self._recall(slot, found) + found
        return self._dispatcher.taken_back(slot, found, dropping=[task] if task in found else [])

    def send(self, action: _dispatch.SendTasks) -> Sequence[Action]:
        slot, tasks = action
        if self._dispatcher.slot_of(tasks[0]) != slot:
            return ()  # no worker could be asked for, just before
        if len(tasks) > 1:
            return self._send_batch(slot, tasks)
        task = tasks[0]
        record = self._tasks.get(task)
        if record is None or record.call is None:  # failed meanwhile
            return self._dispatcher.finished(slot, tasks)
        call = record.call
        body, flags = call.body, 0
        numbers: Sequence[int] = ()
        if call.fds is not None:
            numbers = call.fds.numbers
            flags = _messages.SPILLED if call.spilled else 0
        parts: tuple[bytes, ...]
        if type(record) is ChunkFuture:
            span = _messages.SPAN.pack(record.start, record.stop)
            size = len(span) + len(body)
            parts = (_messages.pack_header(_messages.CHUNK, task, size, len(numbers), flags), span, body)
            self.watch(slot)
        else:
            parts = (_messages.pack_header(_messages.TASK, task, len(body), len(numbers), flags), body)
        try:
            sent = wire.try_send(self._links[slot].mine, parts, numbers)
        except OSError as error:
            if error.errno not in _messages.MAY_YET_LAND:
                self._client.fail(task, error)
                return self._dispatcher.finished(slot, tasks)
            sent = False
        if not sent:
            return self._inbox_full(slot, tasks)
        if self._dispatcher.piles(slot):
            self.watch(slot)
        if record.options is not None and record.options.is_watched:
            self._client.limits.sent(slot, record.options)
        if numbers and call.carries_fds and not record.may_retry:
            # A copy kept here would hide from a reader that the task has closed its end.
            record.call = None
            self._carrying.add(slot)
            call.close()
        return ()

    def _send_batch(self, slot: int, tasks: Sequence[int]) -> Sequence[Action]:
        """Several small tasks without descriptors as one message."""
        parts: list[bytes] = [b""]
        gone: list[int] = []
        for task in tasks:
            record = self._tasks.get(task)
            if record is None or record.call is None:
                gone.append(task)
                continue
            body = record.call.body
            parts += (_messages.pack_header(_messages.TASK, task, len(body)), body)
        parts[0] = _messages.pack_header(_messages.TASKS, tasks[0], sum(map(len, parts)))
        try:
            sent = wire.try_send(self._links[slot].mine, parts)
        except OSError as error:
            if error.errno not in _messages.MAY_YET_LAND:
                for task in tasks:
                    self._client.fail(task, error)
                return self._dispatcher.finished(slot, tasks)
            sent = False
        if not sent:
            return self._inbox_full(slot, tasks)
        self.watch(slot)
        return self._dispatcher.finished(slot, gone) if gone else ()

    def _inbox_full(self, slot: int, tasks: Sequence[int]) -> Sequence[Action]:
        self._client.wake()  # the pump must learn of the new deadline
        return self._dispatcher.inbox_full(slot, tasks, CLOCK.monotonic() + RETRY_S)

    def receive(self, slot: int) -> list[int]:
        """Take the datagrams out of the slot's inbox; returns their tasks, which have their payloads again.

        Nothing, if there is no room here for all descriptors in there: the kernel would drop them.
        """
        return self.emptied(slot)[0]

    def emptied(self, slot: int, partly: bool = False) -> tuple[list[int], bool]:
        """As `receive`, and whether that is all that was in there.

        Args:
            partly: better the oldest tasks than none. Where these cannot go to another worker, they are sent behind the
                others again.
        """
        found: list[int] = []
        needed = self._room_needed(slot, partly) if slot in self._carrying else 0
        if needed and not _budget.has_room_for(needed):
            return found, False
        # The room may go all the same, as another thread opens files.
        take = wire.try_take if needed else wire.try_receive
        while True:
            try:
                received = take(self._links[slot].theirs, MAX_DATAGRAM, SCM_MAX_FD)
            except OSError as error:
                if error.errno not in _budget.FULL:
                    raise
                return found, False
            if received is None:
                self._carrying.discard(slot)
                return found, True
            try:
                header = _messages.unpack_header(received.data)
                calls = _messages.split(received.data) if header.kind == _messages.TASKS else []
            except WireError:
                close_all(received.fds)  # no message of ours: as in the worker
                continue
            if header.kind == _messages.TASKS:
                close_all(received.fds)
                found += [task for _, task, _ in calls if task in self._tasks]
                continue
            if header.kind == _messages.LEAVE:
                # It is to hear that all the same, if it lives: it would wait for ever, and nobody be given its slot.
                generation = self._dispatcher.generation(slot)
                self._client.critical.leave((self._client.tell_to_leave, (slot, generation)))
            record = self._tasks.get(header.task)
            if record is None or header.kind not in (_messages.TASK, _messages.CHUNK):
                close_all(received.fds)
                continue
            found.append(header.task)
            if record.call is not None:
                close_all(received.fds)  # a copy of the file that the kept payload has
                continue
            record.call = Payload(received.data[HEADER_BYTES:], OwnedFds(received.fds), header.spilled)
            if len(received.fds) != header.fd_count:
                self._client.fail(
                    header.task, lost_descriptors(header.fd_count, len(received.fds), "this process")
                )
            elif partly and needed and not _budget.has_room_for(needed):
                return found, False

    def left_in(self, slot: int) -> list[int]:
        """The tasks of what lies in the inbox of a dead worker, which stays there.

        Raises:
            OSError: this kernel cannot tell.
        """
        return [task for data in self._look_into(slot) for task in _messages.tasks_in(data)]

    def _room_needed(self, slot: int, partly: bool) -> int:
        """How many descriptors must find room here, for the slot's inbox to be emptied; `partly`, for each message: the
        next is received beside what was seen of one that the worker has just received.
        """
        try:
            counts = [_messages.unpack_header(data).fd_count for data in self._look_into(slot)]
        except OSError:
            return 2 * SCM_MAX_FD if partly else 1  # nobody can tell
        return 2 * max(counts, default=0) if partly else sum(counts)

    def _look_into(self, slot: int) -> list[bytes]:
        """The messages in the slot's inbox, which stay there."""
        messages = wire.peek_all(self._links[slot].theirs, MAX_DATAGRAM)
        return list(filter(_messages.is_sound, messages))  # the others are none of ours: as in the worker

    def received_not_begun(self, slot: int, unread: Sequence[int]) -> list[int]:
        """What a dead worker had received, but not begun, and can be sent again; its inbox held `unread`."""
        begun = self._board.begun(slot)
        received = [task for task in self._dispatcher.given(slot) if task not in unread and task != begun]
        return [
            task
            for task in received
            if (record := self._tasks.get(task)) is not None and record.call is not None
        ]

    def look_after(self) -> Sequence[Action]:
        """Event: it is time to see whether a task holds up others that travelled with it.

        Its neighbours' answers are fetched from the board, and what has not begun is taken back if a worker is idle.
        """
        actions: list[Action] = []
        for slot, before in list(self._batched.items()):
            given = self._dispatcher.given(slot)
            begun = self._board.begun(slot)
            now = (begun, self._board.claimed(slot))
            state = self._dispatcher.state(slot)
            if given and state in (State.STARTING, State.COOLING):
                continue  # it begins with what is in its inbox already
            if not given or state not in (State.READY, State.LEAVING):
                del self._batched[slot]
            elif now != before or begun not in given:
                self._batched[slot] = now
            elif type(chunk := self._tasks.get(begun)) is ChunkFuture:
                if self._dispatcher.has_idle and chunk.stop - self._board.claimed(slot) > 0:
                    actions += self._part_running(slot, begun, chunk)
            else:
                self._client.receiver.take_log(slot, self._board)
                if self._dispatcher.has_idle:
                    inbox, is_all = self.emptied(slot, partly=True)
                    # Else nobody can tell what lies in there from what was received.
                    received = self._recall(slot, inbox) if is_all else []
                    if received or inbox:
                        actions += self._dispatcher.stalled(slot, received + inbox)
        self.looks_at = CLOCK.monotonic() + _LOOK_S if self._batched else None
        return actions

    def watch(self, slot: int) -> None:
        """Look after what the slot was given together, or will find in its inbox."""
        self._batched.setdefault(slot, (0, 0))
        if self.looks_at is None:
            self.looks_at = CLOCK.monotonic() + _LOOK_S
            self._client.wake()

    def _recall(self, slot: int, inbox: Sequence[int]) -> list[int]:
        """What the slot's worker has received and not begun, and will not begin, as its running task takes long.

        Args:
            inbox: what was taken out of its inbox just now.
        """
        given = [
            task
            for task in self._dispatcher.given(slot)
            if task not in inbox
            # What carries descriptors is not: see `Worker._may_begin`.
            and (record := self._tasks.get(task)) is not None
            and (call := record.call) is not None
            and call.fds is None
        ]
        begun = self._board.begun(slot)
        if slot not in self._batched or begun not in given[:-1]:
            return []
        self._board.recall(slot, begun)
        time.sleep(SETTLE_S)
        if self._board.begun(slot) != begun:
            return []  # it has gone on, and may or may not have seen this; if it has, it says so
        free = given[given.index(begun) + 1 :]
        self._recalled.setdefault(slot, set()).update(free)
        return free

    def pin(self, slot: int, task: int) -> tuple[bool, list[int]]:
        """Make sure that the slot's worker runs `task`, and will begin nothing behind it.

        Returns whether it does, and what it has not begun of what it was given, to be told to the dispatcher. What no
        room is here for stays in its inbox, for its successor.
        """
        others, is_all = self.emptied(slot)
        if not is_all:
            self._board.end_after(slot, task)
        self._board.recall(slot, task)
        time.sleep(SETTLE_S)
        # One that has ended its task says so before it receives the next: that one would have descriptors that
        # nobody else has.
        if self._board.running(slot)[0] != task:
            return False, others
        if not is_all:
            return True, others  # nobody can tell what it has received from what lies in there
        given = self._dispatcher.given(slot)
        behind = given[given.index(task) + 1 :] if task in given else []
        free = [each for each in behind if each not in others]
        self._recalled.setdefault(slot, set()).update(free)
        return True, free + others

    def returned(self, slot: int, tasks: Sequence[int]) -> Sequence[Action]:
        """Event: the slot's worker says that it has not begun these, and will not."""
        known = self._recalled.get(slot, set())
        # Those that were known to be free are somewhere else already, or here again; and what the board says has begun,
        # or what carries descriptors, no worker returns: to send that again would run it twice, or lose it.
        begun = self._board.begun(slot)
        fresh = [
            task
            for task in tasks
            if task not in known
            and task != begun
            and self._dispatcher.slot_of(task) == slot
            and ((record := self._tasks.get(task)) is None or record.call is not None)
        ]
        known.difference_update(tasks)
        return self._dispatcher.taken_back(slot, fresh)

    def _part_running(self, slot: int, task: int, chunk: ChunkFuture) -> Sequence[Action]:
        """Take what a chunk's worker has not begun away from it, as one of its items takes long."""
        self._board.recall(slot, task)
        time.sleep(SETTLE_S)
        with self._client.receiver.undisturbed:  # or it may be parted there, as its worker has answered
            claimed = self._board.claimed(slot)
            if self._board.begun(slot) != task or not chunk.start <= claimed < chunk.stop:
                return ()
            parts = chunk.part(claimed, 2)
            tasks = self.enter_parts(parts, chunk.label)
        self.queue_first(tasks)
        return self._dispatcher.assign()

    def enter_parts(self, chunks: Sequence[ChunkFuture], label: str) -> list[int]:
        """Make tasks of parts of a chunk; from any thread, while the chunk itself is still one. `chunk_cut` or
        `queue_first` is to follow."""
        tasks = []
        for chunk in chunks:
            chunk._client = self._client
            chunk._task = self._client.new_id()
            chunk.label = label
            self._tasks[chunk._task] = chunk
            tasks.append(chunk._task)
        return tasks

    def chunk_cut(self, slot: int, task: int, parts: Sequence[int]) -> Sequence[Action]:
        """Event: the slot's worker has answered a chunk, but for these parts of it."""
        self.queue_first(parts)
        return self._dispatcher.finished(slot, (task,))

    def queue_first(self, tasks: Sequence[int]) -> None:
        """Have parts of a chunk run before all others, if anything is run any more."""
        sound = []
        for task in tasks:
            record = self._tasks.get(task)
            if record is None:
                continue  # cancelled
            if self._client.life.dropping or (type(record) is ChunkFuture and record.abandoned):
                self._client.fail(task, CancelledError())
            elif not self._client.life.runs_tasks:
                self._client.fail(task, self._client.life.broken_error())
            elif record.call is None:
                self._client.fail(
                    task, PoolBroken("no descriptor is left for the rest of a map's items (RLIMIT_NOFILE)")
                )
            else:
                sound.append(task)
        self._dispatcher.put_first(sound)
