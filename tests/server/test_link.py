"""What a server's log says of a worker's death (W3)."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from fdpool import PoolBroken, WorkerLost
from fdpool._server.link import End, WorkerLink, end_of, in_one_line
from fdpool.errors import RemoteTraceback


def lost(message: str = "", **fields: object) -> WorkerLost:
    return WorkerLost(message, 7, 0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lost(signal=signal.SIGKILL), "it was killed by SIGKILL"),
        (
            lost(
                "f(1): its worker was killed by SIGKILL (perhaps by the kernel's out-of-memory killer: a reason)",
                signal=signal.SIGKILL,
            ),
            "it was killed by SIGKILL, perhaps by the kernel's out-of-memory killer: a reason",
        ),
        (lost(signal=signal.SIGRTMIN + 3), "it was killed by signal 37"),
        (lost(exit_code=3), "it exited with code 3"),
        (
            lost(exit_code=1, stderr="one\nlast words\n"),
            "it exited with code 1; the last that it wrote to stderr: last words",
        ),
        (PoolBroken("the supervisor is gone"), "PoolBroken: the supervisor is gone"),
    ],
)
def test_a_death_is_told_in_words_of_a_server(error: Exception, reason: str) -> None:
    done: Future[str] = Future()
    done.set_exception(error)
    assert end_of(done).why == reason
    assert end_of(done).unasked


def test_what_a_worker_returns_is_why_it_has_ended() -> None:
    done: Future[str] = Future()
    done.set_result("drained")
    assert end_of(done) == End("drained")
    cancelled: Future[str] = Future()
    cancelled.cancel()
    assert end_of(cancelled) == End("it was not started any more")


def test_what_it_was_killed_for_is_one_line_and_the_rest_is_kept_beside_it() -> None:
    done: Future[str] = Future()
    done.set_exception(lost("a text about tasks\nin lines", signal=signal.SIGSEGV, stderr="one\ntwo\n"))
    assert end_of(done) == End(
        "it was killed by SIGSEGV; the last that it wrote to stderr: two", True, "", "one\ntwo\n"
    )
    raised: Future[str] = Future()
    error = ValueError("one\ntwo")
    error.__cause__ = RemoteTraceback("where it was\n")
    raised.set_exception(error)
    assert end_of(raised) == End("ValueError: one ...", True, "where it was")


def test_one_that_goes_at_sigterm_has_gone_as_it_was_asked_to() -> None:
    done: Future[str] = Future()
    done.set_exception(lost(signal=signal.SIGTERM))
    assert not end_of(done).unasked


def test_a_line_is_not_too_long() -> None:
    assert in_one_line(" short ") == "short"
    assert len(in_one_line("x" * 10_000)) < 600


def test_a_worker_is_known_also_where_there_is_no_room_for_its_pidfd() -> None:
    """T3: or nobody could end it."""
    with contextlib.closing(WorkerLink(1, 0, 1)) as link:
        with open("/dev/null") as file:
            link._theirs.send_with_fds({"say": "hello", "pid": 4711}, [file.fileno()])
        link._theirs.send({"say": "ready"})
        with no_room_for_descriptors():
            assert link.receive() == {"say": "hello", "pid": 4711}
        assert (link.pid, link.pidfd) == (4711, None)
        assert link.receive() == {"say": "ready"}
        link.pid = None


@contextlib.contextmanager
def no_room_for_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
