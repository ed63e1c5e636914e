"""What a server's log says of a worker's death (W3)."""

from __future__ import annotations

import signal
from concurrent.futures import Future

import pytest

from fdpool import PoolBroken, WorkerLost
from fdpool._server.link import reason_of


def lost(message: str = "", **fields: object) -> WorkerLost:
    return WorkerLost(message, 7, 0, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lost(signal=signal.SIGKILL), "it was killed by SIGKILL"),
        (
            lost("was killed by SIGKILL (by the kernel's out-of-memory killer, as", signal=signal.SIGKILL),
            "it was killed by SIGKILL by the kernel's out-of-memory killer, as its control group counts",
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
    assert reason_of(done) == reason


def test_what_a_worker_returns_is_why_it_has_ended() -> None:
    done: Future[str] = Future()
    done.set_result("drained")
    assert reason_of(done) == "drained"
    cancelled: Future[str] = Future()
    cancelled.cancel()
    assert reason_of(cancelled) == "it was not started any more"
