"""What root is exempt from: the limit on descriptors in flight, which a user shares with all of his processes (T5, T6).

The test process forks, and the child becomes another user: after an exec that one might not be allowed to read the
interpreter. So the pools in it are forked, too.
"""

from __future__ import annotations

import concurrent.futures as cf
import errno
import faulthandler
import importlib
import os
import pkgutil
import resource
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fdpool
from fdpool import _inboxes, wire
from tests.process_state import open_descriptors, wait_until

# What is imported late must be there before: its file may be unreadable then.
for _module in pkgutil.iter_modules(fdpool.__path__, "fdpool."):
    if not _module.name.startswith(
        ("fdpool._fixtures", "fdpool.pytest", "fdpool.__main__", "fdpool._server")
    ):
        importlib.import_module(_module.name)
for _name in ("cloudpickle", "psutil", "encodings.ascii", "faulthandler", "traceback"):
    importlib.import_module(_name)

_LIMIT_S = 30
LIMIT = 64
PER_TASK = 5


def as_user(uid: int, act: Callable[[], None]) -> None:
    """Run `act` in a forked child that is `uid`, with few descriptors; fail with what it raises."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of earlier tests
        pid = os.fork()
    if pid == 0:
        said = "it has ended itself"
        faulthandler.dump_traceback_later(_LIMIT_S, file=write, exit=True)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            act()
            said = "done"
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(write, said.encode()[-60_000:])
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as end:
        said = end.read()
    os.waitpid(pid, 0)
    assert said == "done", said


class Refusals:
    """Counts how often the kernel said ETOOMANYREFS to the pool's client."""

    def __init__(self) -> None:
        self.count = 0
        self._send = wire.try_send
        wire.try_send = self._try_send

    def _try_send(self, *args: Any) -> bool:
        try:
            return self._send(*args)
        except OSError as error:
            self.count += error.errno == errno.ETOOMANYREFS
            raise


def read_all(*files: Any) -> list[bytes]:
    """The task: what each of its pipes says."""
    return [os.read(file.fileno(), 10) for file in files]


def open_some(count: int) -> list[Any]:
    """A task with descriptors in its result."""
    return [open(os.devnull, "rb", buffering=0) for _ in range(count)]


def submit_with_pipes(pool: fdpool.Pool, number: int, count: int = PER_TASK) -> Future[list[bytes]]:
    ends = [os.pipe() for _ in range(count)]
    for _, write in ends:
        os.write(write, b"%d" % number)
        os.close(write)
    files = [open(read, "rb", buffering=0) for read, _ in ends]
    try:
        return pool.submit(read_all, *files)
    finally:
        for file in files:
            file.close()


@pytest.fixture
def uid(as_other_uid: int) -> int:
    """One of this process's own: what all processes of a user have in flight counts together, in whatever test."""
    return as_other_uid - 1 - os.getpid() % 5000


@contextmanager
def held_worker(pool: fdpool.Pool) -> Iterator[None]:
    """Its one worker is busy meanwhile, and so reads nothing."""
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as gate:
        held = pool.submit(_read_gate, gate)
    wait_until(held.running)
    wait_until(lambda: pool._client.board is not None and pool._client.board.begun(0))
    try:
        yield
    finally:
        os.close(write)
        held.result(20)


def _read_gate(gate: Any) -> bytes:
    found: bytes = gate.read(1)
    return found


@contextmanager
def filled_by_another(count: int) -> Iterator[None]:
    """Another process of the same user has so many descriptors in flight: no more are taken from anybody of that user.

    (The kernel looks at how many there are before it adds a message's own.)
    """
    ready_read, ready_write = os.pipe()
    stop_read, stop_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(stop_write)
        first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for _ in range(count // 10):
            socket.send_fds(first, [b"x"], [ready_write] * 10)
        os.write(ready_write, b"r")
        os.read(stop_read, 1)
        second.close()
        os._exit(0)
    os.close(ready_write)
    os.close(stop_read)
    os.read(ready_read, 1)
    os.close(ready_read)
    try:
        yield
    finally:
        os.close(stop_write)
        os.waitpid(pid, 0)


def test_tasks_wait_while_too_many_descriptors_are_in_flight(uid: int) -> None:
    """T5: what the kernel does not take stays queued, in order, and is sent once the worker has read."""

    def act() -> None:
        refusals = Refusals()
        with fdpool.Pool(1, start_method="fork") as pool:
            # Before there are ends of pipes that it would inherit.
            assert pool.submit(abs, -1).result(20) == 1
            link = pool._client.links[0]
            wait_until(lambda: link._pidfd is not None)  # it may come after the answer
            before = len(open_descriptors())
            with held_worker(pool):
                futures = [submit_with_pipes(pool, number) for number in range(16)]
                wait_until(lambda: refusals.count > 0)  # the limit is met, in here or by the pump
                assert not any(future.done() for future in futures)
            for number, future in enumerate(futures):
                assert future.result(20) == [b"%d" % number] * PER_TASK
            wait_until(lambda: len(open_descriptors()) <= before)

    as_user(uid, act)


def test_a_task_waits_while_another_process_of_the_user_fills_the_kernel(uid: int) -> None:
    """T6: nothing of the pool's own is in the way, so the kernel is asked again and again; or its time is up."""

    def act() -> None:
        refusals = Refusals()
        with fdpool.Pool(1, start_method="fork") as pool:
            assert pool.submit(abs, -1).result(20) == 1
            with filled_by_another(70):
                hasty = pool.with_options(queue_timeout=0.2)
                timed = submit_with_pipes(hasty, 1, 10)
                error = timed.exception(20)
                assert isinstance(error, fdpool.TaskTimeout)
                assert error.may_have_run is False
                waiting = submit_with_pipes(pool, 2, 10)
                seen = refusals.count
                wait_until(lambda: refusals.count > seen + 2)
                assert not waiting.done()
            assert waiting.result(20) == [b"2"] * 10

    as_user(uid, act)


def test_a_result_waits_while_another_process_of_the_user_fills_the_kernel(uid: int) -> None:
    """T6, the other way."""

    def act() -> None:
        with fdpool.Pool(1, start_method="fork") as pool:
            assert pool.submit(abs, -1).result(20) == 1
            with filled_by_another(70):
                future = pool.submit(open_some, 10)
                wait_until(
                    lambda: pool._client.board is not None and pool._client.board.begun(0) == future._task
                )
                with pytest.raises(cf.TimeoutError):
                    future.result(3 * _inboxes.RETRY_S)
            files = future.result(20)
            assert len(files) == 10
            for file in files:
                file.close()

    as_user(uid, act)


def test_a_program_finds_its_folder_also_where_that_of_the_pool_is_closed_to_its_user(
    uid: int, tmp_path: Path
) -> None:
    """As of a daemon that was started in root's home, and has given up its rights since."""

    def act() -> None:
        with fdpool.Pool(1, start_method="fork") as pool:
            done = pool.run(["/bin/pwd"], cwd="/", umask=0o77, capture_output=True).result(20)
            assert done.stdout == b"/\n"
            assert pool.submit(os.getcwd).result(20) == str(tmp_path)

    tmp_path.chmod(0o700)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        as_user(uid, act)
    finally:
        os.chdir(before)
