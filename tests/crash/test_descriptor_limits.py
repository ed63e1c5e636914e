"""A client at its limit of open files, at each step of a start: a clear error, and nothing left."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import fdpool
from fdpool import wire
from fdpool._links import SlotLink
from tests.chaos.disorder import limit_with_room, room_for
from tests.contract.helpers import (
    count_and_note,
    count_descriptors,
    hoard_when_told,
    sleep_with,
    square,
    touch_and_wait,
    wait_at,
)
from tests.process_state import open_descriptors, wait_until


@pytest.mark.parametrize("room", [1, 4, 6, 7, 8, 9, 10, 13, 14, 17])
def test_a_client_without_descriptors_breaks_with_a_reason_or_works(room: int) -> None:
    with fdpool.Pool(1) as pool:
        pool.submit(square, 1).result()  # whatever is imported late is, now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    outcomes: list[object] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(room), hard))
    try:
        pool = fdpool.Pool(2)
        futures = []
        for number in range(3):
            try:
                futures.append(pool.submit(square, number))
            except fdpool.PoolBroken as error:
                outcomes.append(str(error))
        wait(futures, timeout=20)
        for future in futures:
            try:
                outcomes.append(future.result(0))
            except fdpool.PoolBroken as error:
                outcomes.append(str(error))
        pool.shutdown()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(outcomes) == 3
    for outcome in outcomes:
        if isinstance(outcome, str):
            assert os.strerror(errno.EMFILE) in outcome or "limit of open files" in outcome, outcome
            assert "defect" not in outcome
            assert "interrupted" not in outcome


class _NoRoomAtFirst:
    """An epoll of which somebody else has taken the last place (epoll_ctl(2), ENOSPC)."""

    def __init__(self, epoll: Any) -> None:
        self._epoll = epoll
        self._refuses = True

    def register(self, *what: Any) -> None:
        if self._refuses:
            self._refuses = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(*what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_a_worker_whose_answers_cannot_be_watched_is_not_started_before_they_can(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    with fdpool.Pool(2) as pool:
        long = pool.submit(wait_at, str(tmp_path / "gate"))
        wait_until((tmp_path / "gate.begun").exists)
        wait_until(lambda: not pool._client.links[0].starting)  # its pidfd may come after its first task
        receiver = pool._client.receiver
        receiver._inner = _NoRoomAtFirst(receiver._inner)
        before = open_descriptors()
        assert pool.submit(square, 3).result(timeout=20) == 9
        assert len(open_descriptors()) <= len(before) + 3  # a pair of sockets, and a pidfd
        (tmp_path / "gate").write_text("")
        long.result(timeout=20)


def test_a_client_without_room_for_a_pidfd_hears_of_a_new_worker_all_the_same() -> None:
    """T3: a worker's start is reported with a descriptor, which the pool can do without."""
    with fdpool.Pool(2) as pool:
        gate, release = os.pipe()
        with open(gate, "rb", buffering=0) as end:
            held = pool.submit(end.__class__.read, end)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        control = pool._client.control
        assert control is not None
        os.kill(control.pid, signal.SIGSTOP)
        second = pool.submit(square, 3)
        # Both workers are asked for, by whoever had the lock.
        wait_until(lambda: len(pool._client.links) == 2 and not control.socket.backlog)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(0), hard))
            os.kill(control.pid, signal.SIGCONT)
            assert second.result(20) == 9
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(release)
        assert held.result(20) == b""
        assert len(pool.worker_pids()) == 2


@pytest.fixture
def little_room() -> Iterator[int]:
    """A limit of open files that leaves this process some sixty."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = limit_with_room(60)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_submits_more_descriptors_than_there_is_room_for_waits(little_room: int) -> None:
    with fdpool.Pool(2) as pool, open(os.devnull) as null:
        futures = [pool.submit(count_descriptors, [fdpool.Fd(null) for _ in range(5)]) for _ in range(300)]
        assert [future.result(timeout=60) for future in futures] == [5] * 300
        with open(os.devnull):
            pass  # there is room for the rest of the program


def test_descriptors_that_were_let_go_just_after_none_was_left_are_found(
    little_room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fdpool.Pool(1) as pool, open(os.devnull) as null:
        pool.submit(len, "").result()
        held = []

        def look_too_late(label: str) -> bool:
            while held:
                os.close(held.pop())
            return False

        monkeypatch.setattr(pool._client, "wait_for_descriptors", look_too_late)
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(null.fileno()))
        assert pool.submit(count_descriptors, [fdpool.Fd(null)] * 5).result(timeout=20) == 5


def test_a_queue_full_of_descriptors_that_does_not_move_is_an_error_that_names_the_limit(
    little_room: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fdpool._client._ROOM_S", 0.3)
    os.mkfifo(tmp_path / "gate")
    with fdpool.Pool(1) as pool, open(os.devnull) as null:
        running = pool.submit(wait_at, str(tmp_path / "gate"))
        wait_until(running.running)
        queued = []
        with pytest.raises(fdpool.DescriptorsExhausted, match=r"RLIMIT_NOFILE.*Raise the limit") as caught:
            for _ in range(300):
                future = pool.submit(count_descriptors, [fdpool.Fd(null) for _ in range(5)])
                queued += [future]
        assert caught.value.errno == errno.EMFILE
        assert not caught.value.may_have_run
        assert len(queued) > 2
        (tmp_path / "gate").open("wb").close()
        assert [future.result(timeout=20) for future in queued] == [5] * len(queued)


def test_where_only_what_is_kept_for_the_program_is_left_the_error_says_how_many_are_free(
    little_room: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fdpool._client._ROOM_S", 0.1)
    kept = min(64, little_room // 8)
    reading, writing = os.pipe()
    with (
        fdpool.Pool(1) as pool,
        open(os.devnull) as null,
        open(reading) as gate,
        contextlib.ExitStack() as own,
    ):
        with open(writing, "w"):
            # As it may be tried again, what it carries is kept.
            view = pool.with_options(retries=1)
            running = view.submit(touch_and_wait, str(tmp_path / "begun"), gate)
            wait_until((tmp_path / "begun").exists)
            while own.enter_context(open(os.dup(null.fileno()))).fileno() < little_room - kept - 1:
                pass
            with pytest.raises(fdpool.DescriptorsExhausted, match="save [0-9]+ that are kept") as caught:
                pool.submit(count_descriptors, [fdpool.Fd(null)])
        found = re.search(
            r"save (\d+) that are kept .* 1 tasks that wait, or may be tried again, hold", str(caught.value)
        )
        assert found
        assert 0 < int(found[1]) < kept
        running.result(timeout=20)


def test_a_callback_that_finds_no_room_gets_the_error_at_once(little_room: int, tmp_path: Path) -> None:
    """It runs in the pool's own thread, where nothing would move if it waited."""
    found: list[BaseException | int] = []
    gate = tmp_path / "gate"

    with fdpool.Pool(1) as pool, open(os.devnull) as null:

        def submit_many(_: object) -> None:
            try:
                for _ in range(300):
                    pool.submit(count_descriptors, [fdpool.Fd(null) for _ in range(5)])
            except BaseException as error:
                found.append(error)
            else:
                found.append(0)

        # One that was done already would have it called in this thread.
        pool.submit(wait_until, gate.exists).add_done_callback(submit_many)
        gate.touch()
        wait_until(lambda: found, limit_s=20)
    assert isinstance(found[0], fdpool.DescriptorsExhausted)


@pytest.mark.parametrize("workers", [1, 2])
def test_more_descriptors_than_there_can_be_here_are_left_to_a_dead_workers_successor(
    workers: int, little_room: int, tmp_path: Path
) -> None:
    """T3: an inbox may hold more of them than its client may ever have open."""
    noted = tmp_path / "noted"
    with fdpool.Pool(workers) as pool, open(os.devnull) as null:
        running = [pool.submit(time.sleep, 1000) for _ in range(workers)]
        wait_until(lambda: all(future.running() for future in running))
        files = [fdpool.Fd(null) for _ in range(5)]
        behind = [pool.submit(count_and_note, files, noted, number) for number in range(14 * workers)]
        for pid in pool.worker_pids():
            os.kill(pid, signal.SIGKILL)
        assert [future.result(timeout=20) for future in behind] == [5] * len(behind)
        for future in running:
            assert isinstance(future.exception(timeout=20), fdpool.WorkerLost)
    assert sorted(map(int, noted.read_text().split())) == list(range(len(behind)))


def test_what_is_left_to_a_successor_is_so_again_and_has_its_limits(little_room: int) -> None:
    with fdpool.Pool(1) as pool, open(os.devnull) as null:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        files = [fdpool.Fd(null) for _ in range(5)]
        late = pool.with_options(timeout=0.5, grace=0).submit(sleep_with, files, 1000)
        second = pool.submit(sleep_with, files, 1000)
        behind = [pool.submit(count_descriptors, files) for _ in range(12)]
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        assert isinstance(late.exception(timeout=20), fdpool.TaskTimeout)
        wait_until(second.running)
        assert not behind[-1].done()
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        assert isinstance(second.exception(timeout=20), fdpool.WorkerLost)
        assert [future.result(timeout=20) for future in behind] == [5] * 12
        assert pool.stats().lost_workers == 3


def test_where_a_kernel_does_not_tell_what_an_inbox_holds_a_dead_worker_waits_for_room(
    little_room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        asked.set()
        raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    taken: list[int] = []
    asked = threading.Event()
    monkeypatch.setattr("fdpool.wire.peek_all", cannot)
    with fdpool.Pool(1) as pool, open(os.devnull) as null:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        behind = pool.submit(count_descriptors, [fdpool.Fd(null) for _ in range(5)])
        [worker] = pool.worker_pids()
        fill(taken)
        os.kill(worker, signal.SIGKILL)
        wait_until(asked.is_set)
        fdpool.fds.close_all(taken)
        assert behind.result(timeout=20) == 5


def test_what_is_left_to_a_successor_goes_to_others_if_that_has_much_to_do(
    little_room: int, tmp_path: Path
) -> None:
    with fdpool.Pool(2) as pool, open(os.devnull) as null:
        gate = tmp_path / "gate"
        running = [pool.submit(wait_until, gate.exists) for _ in range(2)]
        wait_until(lambda: all(future.running() for future in running))
        # Else one would be given more than the other.
        wait_until(lambda: [worker.state for worker in pool.stats().workers] == ["ready"] * 2)
        files = [fdpool.Fd(null) for _ in range(5)]
        long = pool.submit(sleep_with, files, 1000)
        behind = [pool.submit(count_descriptors, files) for _ in range(27)]
        wait_until(lambda: all(each.call is None for each in behind))  # they are in the inboxes
        slot = pool._client.dispatcher.slot_of(long._task)
        assert slot is not None
        assert len(pool._client.dispatcher.given(slot)) == 15
        link = pool._client.links[slot]
        wait_until(lambda: link.pid is not None)  # its report may come after its first task
        assert link.pid is not None
        os.kill(link.pid, signal.SIGKILL)
        wait_until(long.running)
        assert sum(future.done() for future in running) == 1  # with the worker that was killed
        gate.touch()
        assert [future.result(timeout=20) for future in behind] == [5] * 27
        pool.kill_workers()


def test_a_worker_is_killed_where_no_descriptor_is_left_to_look_for_what_is_below_it() -> None:
    with fdpool.Pool(1) as pool:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        link = pool._client.links[0]
        wait_until(lambda: link.pid is not None)  # its report may come after its first task has begun
        with room_for(0):
            link.signal_tree()
        assert isinstance(running.exception(timeout=20), fdpool.WorkerLost)


def test_the_memory_of_a_task_is_looked_at_again_where_no_descriptor_was_left_to_look_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3."""
    looks = []
    memory_bytes = SlotLink.memory_bytes
    monkeypatch.setattr(SlotLink, "memory_bytes", lambda link: looks.append(link) or memory_bytes(link))
    gate = tmp_path / "gate"
    with fdpool.Pool(1) as pool:
        running = pool.with_options(max_memory=200 << 20, grace=0).submit(hoard_when_told, str(gate))
        wait_until(lambda: looks and pool._client.links[0].pid is not None)
        with contextlib.ExitStack() as short:
            with pool._client.critical:  # so in the midst of no look, which may have one of its own open
                short.enter_context(room_for(0))
            seen = len(looks)
            wait_until(lambda: len(looks) > seen + 1 or running.done())
        gate.touch()
        assert isinstance(running.exception(timeout=20), fdpool.MemoryLimitExceeded)
        assert pool.submit(square, 3).result(timeout=20) == 9


@contextmanager
def unseen_worker(missing: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlotLink]:
    """What is held of a worker at which nobody can look, for want of a descriptor, or of what looks, too."""
    link = SlotLink(0)
    link.pid = os.getpid()
    monkeypatch.setitem(sys.modules, "psutil", psutil if missing == "descriptor" else None)
    with room_for(0):
        yield link
    link.pid = None
    link.close()


@pytest.mark.parametrize("missing", ["descriptor", "module"])
def test_what_a_worker_holds_is_nothing_where_nobody_can_look(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3: what looks may not be loaded yet, and it takes descriptors to load it."""
    with unseen_worker(missing, monkeypatch) as link:
        assert link.memory_bytes() == 0


@pytest.mark.parametrize("missing", ["descriptor", "module"])
def test_a_worker_is_not_taken_to_be_dead_where_nobody_can_look(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T3, without pidfds: whoever asks looks again."""
    with unseen_worker(missing, monkeypatch) as link:
        assert not link.has_died()


@pytest.mark.parametrize("room", [20, 80])
def test_a_message_that_is_received_in_place_of_one_that_was_seen_loses_no_descriptor(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the worker receives that in the same moment; the client has the descriptors of both open then."""
    with fdpool.Pool(1) as pool, open(os.devnull) as null:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        client = pool._client
        pool.submit(count_descriptors, [fdpool.Fd(null)])
        many = pool.submit(count_descriptors, [fdpool.Fd(null) for _ in range(20)])
        inbox = client.links[0].theirs
        try_receive = wire.try_receive

        def too_late(sock: socket.socket, *arguments: int) -> wire.Received | None:
            if sock is inbox:  # and no answer, which the pump receives
                monkeypatch.setattr(wire, "try_receive", try_receive)
                fdpool.fds.close_all(socket.recv_fds(inbox, 1 << 16, 1)[1])
            return try_receive(sock, *arguments)

        monkeypatch.setattr(wire, "try_receive", too_late)
        with room_for(room), client.critical:
            client.critical.handle_posted()  # the pump may have left it to who comes next, as it had the lock
            found, _ = client.inboxes.emptied(0, partly=True)
        assert found == ([many._task] if room == 80 else [])
        call = many.call
        assert room == 20 or (call is not None and call.fds is not None and len(call.fds.numbers) == 20)
        pool.kill_workers()


def fill(taken: list[int]) -> None:
    """Open as many descriptors as can be."""
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(2))


def test_an_inbox_is_not_emptied_where_there_is_no_room_and_no_task_loses_its_descriptors(
    little_room: int,
) -> None:
    taken: list[int] = []
    with fdpool.Pool(1) as pool, open(os.devnull) as null:
        running = pool.submit(time.sleep, 1000)
        wait_until(running.running)
        behind = [pool.submit(count_descriptors, [fdpool.Fd(null) for _ in range(5)]) for _ in range(3)]
        [worker] = pool.worker_pids()
        wait_until(lambda: all(each.call is None for each in behind))  # they are in the inbox
        fill(taken)
        assert not behind[0].cancel()
        fdpool.fds.close_all([taken.pop() for _ in range(5)])
        assert not behind[0].cancel()  # there is room for itself, but not for all
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: pool.stats().lost_workers == 1)
        fdpool.fds.close_all(taken)
        assert [future.result(timeout=20) for future in behind] == [5] * 3


def test_a_pool_that_finds_no_room_for_another_worker_does_with_those_it_has(little_room: int) -> None:
    with fdpool.Pool(20) as pool, open(os.devnull) as null:
        assert pool.submit(square, 2).result(timeout=20) == 4
        taken = [os.dup(null.fileno()) for _ in range(little_room - 6 - len(open_descriptors()))]
        try:
            assert [future.result(timeout=60) for future in [pool.submit(square, n) for n in range(50)]] == [
                n * n for n in range(50)
            ]
            assert 1 <= len(pool.worker_pids()) < 20
        finally:
            for fd in taken:
                os.close(fd)


def test_a_pool_whose_only_worker_dies_while_there_is_no_room_goes_on_when_there_is() -> None:
    """T3."""
    with fdpool.Pool(1) as pool:
        pool.submit(square, 1).result(timeout=20)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(0), hard))
        try:
            os.kill(pool.worker_pids()[0], signal.SIGKILL)
            wait_until(lambda: pool.stats().lost_workers == 1)
            taken = []
            with pytest.raises(OSError, match="Too many open files"):
                while True:  # what the dead one has left free
                    taken += [os.dup(0)]
            future = pool.submit(square, 2)
            wait_until(lambda: pool._client._short_since is not None)
            fdpool.fds.close_all(taken)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert future.result(timeout=20) == 4


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_supervisor_without_descriptors_starts_workers_all_the_same(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3: they have those that they close."""
    (tmp_path / "leaves_no_room.py").write_text(
        f"""
from fdpool._supervisor import Supervisor
from tests.chaos.disorder import room_for
start = Supervisor._start_worker
def start_without_room(*arguments):
    with room_for({room}):
        start(*arguments)
Supervisor._start_worker = start_without_room
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    with fdpool.Pool(1, preload=["leaves_no_room"]) as pool:
        assert pool.submit(square, 3).result(timeout=20) == 9
        assert isinstance(pool.submit(os._exit, 3).exception(timeout=20), fdpool.WorkerLost)
        assert pool.submit(square, 3).result(timeout=20) == 9
