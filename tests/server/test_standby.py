"""Workers that stand by: loaded, called as one that serves is lost, and nobody until then (S3, S8)."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fdpool.server import Server, ServerWorker
from tests.process_state import wait_until
from tests.server.applications import asgi, echo_pid, wsgi
from tests.server.helpers import ANY_PORT, Load, ask, get, pids, records

APPS = [
    pytest.param(echo_pid, None, lambda server: ask(server)[0], id="function"),
    pytest.param(asgi, "uvicorn", lambda server: int(get(server)[1]), id="asgi"),
    pytest.param(wsgi, "waitress", lambda server: int(get(server)[1]), id="wsgi"),
]
DISPATCHES = ["shared", "handoff"]


def waiting(server: Server) -> list[int]:
    """Pids of those that stand by."""
    return [each.pid for each in server.stats().workers if each.state == "standing by" and each.pid]


def is_as_wanted(server: Server, serving: int, standby: int = 1) -> bool:
    states = [each.state for each in server.stats().workers]
    return sorted(states) == ["serving"] * serving + ["standing by"] * standby


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(("app", "needs", "answer"), APPS)
def test_one_that_stands_by_takes_the_place_of_one_that_is_killed(
    app: Any, needs: str | None, answer: Any, dispatch: Any
) -> None:
    """Again and again, from slot to slot."""
    if needs is not None:
        pytest.importorskip(needs)
    with Server(app, ANY_PORT, workers=1, standby=1, dispatch=dispatch) as server:
        for _ in range(3):
            wait_until(lambda: is_as_wanted(server, 1))
            [serves], [stands_by] = pids(server), waiting(server)
            assert {answer(server) for _ in range(10)} == {serves}
            os.kill(serves, signal.SIGKILL)
            wait_until(lambda stands_by=stands_by: pids(server) == [stands_by])  # type: ignore[misc]
            assert answer(server) == stands_by


def test_many_that_are_killed_at_once_are_replaced_by_those_that_stand_by_and_then_by_others() -> None:
    with Server(echo_pid, ANY_PORT, workers=4, standby=2) as server:
        wait_until(lambda: is_as_wanted(server, 4, 2))
        standby = set(waiting(server))
        with Load(lambda: ask(server)) as load:
            victims = set(pids(server))
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            wait_until(lambda: is_as_wanted(server, 4, 2) and victims.isdisjoint(pids(server)))
            assert standby <= set(pids(server))
            failed = len(load.failed)
            load.go_on(20)
        assert len(load.failed) == failed <= 3


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_reload_loses_nothing_and_leaves_nobody_of_old_code(dispatch: Any, tmp_path: Path) -> None:
    """S1: and each has called its hooks, who never served, too."""

    def note(kind: str, worker: ServerWorker) -> None:
        (tmp_path / f"{kind} {worker.generation} {worker.pid}").touch()

    def noted(kind: str) -> int:
        return len([*tmp_path.glob(f"{kind} *")])

    hooks = {"on_worker_start": partial(note, "start"), "on_worker_exit": partial(note, "exit")}
    with Server(echo_pid, ANY_PORT, workers=2, standby=1, dispatch=dispatch, **hooks) as server:
        wait_until(lambda: is_as_wanted(server, 2))
        with Load(lambda: ask(server)) as load:
            assert server.reload().result(60) == 2
            load.go_on()
        assert load.failed == []
        wait_until(lambda: is_as_wanted(server, 2))
        assert {each.generation for each in server.stats().workers} == {2}
        assert noted("start 1") == noted("exit 1") == noted("start 2") == 3
    assert noted("exit 2") == 3


def test_more_workers_are_those_that_stand_by_and_fewer_leave_as_many() -> None:
    with Server(echo_pid, ANY_PORT, workers=1, standby=1) as server, Load(lambda: ask(server)) as load:
        for wanted in (2, 4, 1, 2):
            [standby] = (wait_until(lambda: waiting(server)), waiting(server))[1]
            more = wanted > len(pids(server))
            server.scale(wanted)
            wait_until(lambda wanted=wanted: is_as_wanted(server, wanted))  # type: ignore[misc]
            assert (standby in pids(server)) == more
        load.go_on()
    assert load.failed == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_ends_as_it_stands_by_is_replaced(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    with records(caplog) as logged, Server(echo_pid, ANY_PORT, workers=1, standby=1) as server:
        wait_until(lambda: is_as_wanted(server, 1))
        [serves], [stands_by] = pids(server), waiting(server)
        os.kill(stands_by, number)
        wait_until(lambda: is_as_wanted(server, 1) and waiting(server) != [stands_by])
        assert pids(server) == [serves]
    assert len(logged("worker_stands_by")) == 2
    assert logged("worker_failed") == []


def hold_boot(folder: Path, worker: ServerWorker) -> None:
    """A hook: all but the first wait until they may."""
    if worker.slot:
        (folder / "boots").touch()
        wait_until((folder / "may").exists)


def test_one_that_is_called_while_it_boots_does_not_stand_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = partial(hold_boot, tmp_path)
    with (
        records(caplog) as logged,
        Server(echo_pid, ANY_PORT, workers=1, standby=1, on_worker_start=hook) as server,
    ):
        wait_until((tmp_path / "boots").exists)
        [boots] = [each.slot for each in server.stats().workers if each.state == "booting"]
        server.scale(2)
        wait_until(lambda: server.stats().wanted == 2)
        (tmp_path / "may").touch()
        wait_until(lambda: is_as_wanted(server, 2))
        assert {each.slot for each in server.stats().workers if each.state == "serving"} == {0, boots}
        assert [each.slot for each in logged("worker_stands_by")] == [2]


def serve_if_told(folder: Path, listeners: Any, worker: ServerWorker) -> None:
    """An application that accepts for itself, and fails as the folder says."""
    if (folder / "fail").exists():
        raise ValueError("it cannot serve")
    worker.ready()
    worker.wait_drain()
    worker.closed()


def test_one_that_cannot_serve_as_it_is_called_has_failed_to_boot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = partial(serve_if_told, tmp_path)
    with (
        records(caplog) as logged,
        Server(app, ANY_PORT, interface="listeners", workers=1, standby=1) as server,
    ):
        wait_until(lambda: is_as_wanted(server, 1))
        (tmp_path / "fail").touch()
        os.kill(pids(server)[0], signal.SIGKILL)
        wait_until(lambda: bool(logged("worker_failed")))
        (tmp_path / "fail").unlink()
        wait_until(lambda: is_as_wanted(server, 1))
        assert logged("worker_failed")[0].reason == "ValueError: it cannot serve"


def test_a_stopped_server_ends_who_stands_by() -> None:
    """Whether it has come that far or not; the leak check sees whether anything is left."""
    for moment in range(5):
        server = Server(echo_pid, ANY_PORT, workers=1, standby=2)
        server.start()
        if moment == 4:
            wait_until(lambda server=server: is_as_wanted(server, 1, 2))  # type: ignore[misc]
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"standby": -1}, ValueError),
        ({"standby": True}, TypeError),
        ({"standby": 1.0}, TypeError),
        ({"standby": 1, "dispatch": "reuseport"}, ValueError),
    ],
)
def test_numbers_of_no_use_are_refused(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Server(echo_pid, ANY_PORT, **options)


def test_they_count_among_the_most_workers() -> None:
    from fdpool import ServerFailed

    with pytest.raises(ServerFailed, match="512 workers at most, not 513"):
        Server(echo_pid, ANY_PORT, workers=500, standby=13).start()
    with Server(echo_pid, ANY_PORT, workers=1, standby=1) as server:
        with pytest.raises(ServerFailed, match="512 workers at most, not 513"):
            server.scale(512)


def test_one_that_is_stopped_as_it_stands_by_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """W5: before it is needed."""
    monkeypatch.setattr("fdpool._server.watch._MOST_STOPPED_S", 0.2)
    with Server(echo_pid, ANY_PORT, workers=1, standby=1) as server:
        wait_until(lambda: is_as_wanted(server, 1))
        [stopped] = waiting(server)
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: is_as_wanted(server, 1) and waiting(server) != [stopped])
