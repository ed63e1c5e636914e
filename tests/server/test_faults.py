"""What goes wrong with workers, clients and limits, and what it costs: S8, S9, S10, S14, T3, P1, W1, W2, W3, W5."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import itertools
import json
import logging
import os
import re
import resource
import select
import signal
import socket
import socketserver
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import ForkedPool, NotPicklable, ServerFailed, current_worker
from fdpool._serve import log
from fdpool._server import accept, watch
from fdpool._server import worker as server_worker
from fdpool._server.doors import HandedOver, Listening
from fdpool._server.handoff import Handoff
from fdpool._server.turns import Turns
from fdpool.server import Server, ServerWorker
from tests.process_state import seconds_until_gone, wait_until
from tests.server.applications import (
    asgi,
    asgi_answering,
    asgi_forks,
    asgi_forks_and_says_so,
    echo_pid,
    fail_or_pid,
    forks,
    have_log_raise,
    hold_loop,
    keep_echoing,
    note_and_echo,
    pid_and_stay,
    slow_or_pid,
    slow_then_pid,
    wsgi,
    wsgi_forks,
    wsgi_slow_or_pid,
)
from tests.server.helpers import (
    ANY_PORT,
    LOOPS,
    KeptAlive,
    Load,
    ask,
    connect,
    get,
    is_over,
    pids,
    read_all,
    records,
    reset,
    workers,
)
from tests.server.programs import ask_port, port_in, program

DISPATCHES = ["shared", "handoff"]


# -- workers that die ------------------------------------------------------------------------------------


def test_a_killed_worker_costs_the_one_connection_that_it_was_serving() -> None:
    """S8: those in its queue, their requests sent already, are served by the next one."""
    with Server(slow_or_pid, ANY_PORT, workers=1, dispatch="handoff") as server:
        [victim] = pids(server)
        with connect(server) as slow:
            slow.sendall(b"slow")
            wait_until(lambda: server.stats().workers[0].in_flight == 1)
            waiting = [connect(server) for _ in range(10)]
            for client in waiting:
                client.sendall(b"x")
            os.kill(victim, signal.SIGKILL)
            answers = [int(read_all(client)) for client in waiting]
            assert is_over(slow)  # it had begun: nobody can tell how far it has got
        for client in waiting:
            client.close()
        assert set(answers) == set(pids(server)) != {victim}


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_death_is_seen_to_before_the_worker_s_supervisor_tells_of_it(dispatch: str) -> None:
    """S8: it has other things to do, perhaps; here, none at all."""
    with Server(fail_or_pid, ANY_PORT, workers=2, dispatch=dispatch) as server:
        victim, other = pids(server)
        supervisor = psutil.Process(victim).parent()
        supervisor.suspend()
        try:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in [each.pid for each in server.stats().workers])
            assert {ask(server)[0] for _ in range(10)} == {other}
            assert server.stats().started == 3  # another one is asked for already
        finally:
            supervisor.resume()
        wait_until(lambda: len(pids(server)) == 2)


def test_how_a_worker_died_is_said_where_the_server_ends_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    """S8: the server knows that it is dead, and not yet how."""
    with records(caplog) as logged, Server(fail_or_pid, ANY_PORT, workers=1) as server:
        [victim] = pids(server)
        supervisor = psutil.Process(victim).parent()
        supervisor.suspend()
        try:
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in [each.pid for each in server.stats().workers])
            stopping = threading.Thread(target=server.stop, args=(0,))
            stopping.start()
            wait_until(lambda: logged("stopping"))
        finally:
            supervisor.resume()
        stopping.join()
    assert "SIGKILL" in next(each for each in logged("worker_exited") if each.worker_pid == victim).reason


def test_what_a_dead_worker_has_not_taken_is_served_as_soon_as_the_server_has_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T3: the server is at its limit of descriptors as it is to empty that worker's inbox."""
    has_room = iter([False] * 5)
    take_back = Handoff._take_back

    def take_back_if_room(handoff: Handoff, seat: Any) -> bool:
        return next(has_room, True) and take_back(handoff, seat)

    with Server(slow_or_pid, ANY_PORT, workers=2, dispatch="handoff") as server:
        with connect(server) as slow, connect(server) as slow_too:
            for client in (slow, slow_too):
                client.sendall(b"slow")
            wait_until(lambda: all(worker.in_flight == 1 for worker in server.stats().workers))
            waiting = [connect(server) for _ in range(4)]
            for client in waiting:
                client.sendall(b"x")
            monkeypatch.setattr(Handoff, "_take_back", take_back_if_room)
            for victim in pids(server):
                os.kill(victim, signal.SIGKILL)
            answers = [int(read_all(client)) for client in waiting]
        for client in waiting:
            client.close()
        # It is handed connections a moment before it counts as one that serves.
        wait_until(lambda: set(answers) <= set(pids(server)))
    assert next(has_room, None) is None


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("dispatch", "before", "path"),
    [("handoff", 0, ""), ("handoff", 500, "/quick"), ("shared", 30, "/compute"), ("shared", 30, "/wait")],
)
def test_a_killed_event_loop_costs_what_it_had_begun_and_none_that_waits(
    loop: str, dispatch: Any, before: int, path: str, tmp_path: Path
) -> None:
    """S8: those that its worker has not begun are served by the next one; where it is handed them also if requests were
    quick until now, and where workers share listeners if they kept the loop for long."""
    pytest.importorskip("uvicorn")
    begun = tmp_path / "begun"
    for file in (begun, tmp_path / "first", tmp_path / "rest"):
        file.touch()
    options = {"loop": loop}
    with (
        Server(
            asgi_answering(partial(hold_loop, tmp_path)),
            ANY_PORT,
            workers=1,
            dispatch=dispatch,
            options=options,
        ) as server,
        contextlib.ExitStack() as clients,
    ):
        [victim] = pids(server)
        if before:
            with Load(lambda: get(server, path), clients=8) as load:
                load.go_on(before)
            assert not load.failed
            begun.write_text("")
        clients.enter_context(connect(server)).sendall(b"GET /first HTTP/1.0\r\n\r\n")
        wait_until(lambda: begun.read_text() == "first\n")
        waiting = [clients.enter_context(connect(server)) for _ in range(30)]
        for client in waiting:
            client.sendall(b"GET /rest HTTP/1.0\r\n\r\n")
        (tmp_path / "first").unlink()
        wait_until(lambda: begun.read_text() == "first\nrest\n")
        os.kill(victim, signal.SIGKILL)
        (tmp_path / "rest").unlink()
        assert sum(is_over(client) for client in waiting) == 1


@pytest.mark.parametrize(("app", "needs"), [(asgi, "uvicorn"), (wsgi, "waitress")])
def test_a_client_that_has_said_nothing_loses_nothing_by_the_end_of_workers(app: Any, needs: str) -> None:
    """S8: as long as there is nothing to read, the server keeps its connection."""
    pytest.importorskip(needs)
    with (
        Server(app, ANY_PORT, workers=1, dispatch="handoff") as server,
        contextlib.ExitStack() as clients,
    ):
        silent = [clients.enter_context(connect(server)) for _ in range(3)]
        get(server)  # so they are accepted
        [victim] = pids(server)
        os.kill(victim, signal.SIGKILL)
        silent[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"200 OK" in read_all(silent[0])
        assert server.reload().result(60) == 2
        [reloaded] = pids(server)
        silent[1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"%d" % reloaded in read_all(silent[1])
        silent[2].close()
        assert int(get(server)[1]) == reloaded


@pytest.mark.parametrize(("app", "needs"), [(asgi, "uvicorn"), (wsgi, "waitress")])
def test_silent_clients_that_speak_as_others_come_in_their_place_are_answered(
    app: Any, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is given up as another comes may speak in that very turn."""
    pytest.importorskip(needs)
    monkeypatch.setattr("fdpool._server.silence._MOST", 4)
    with (
        Server(app, ANY_PORT, workers=1, dispatch="handoff") as server,
        contextlib.ExitStack() as clients,
    ):
        silent = [clients.enter_context(connect(server)) for _ in range(4)]
        for _ in range(300):
            silent.append(clients.enter_context(connect(server)))
            with silent.pop(0) as oldest:
                oldest.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert b"200 OK" in read_all(oldest)


@pytest.mark.parametrize(("app", "needs"), [(asgi, "uvicorn"), (wsgi, "waitress")])
def test_as_a_server_ends_the_silent_are_closed(app: Any, needs: str) -> None:
    """S2: as idle ones are."""
    pytest.importorskip(needs)
    with Server(app, ANY_PORT, workers=1, dispatch="handoff") as server, connect(server) as silent:
        get(server)
        server.stop(wait=False)
        assert is_over(silent)
        assert server.wait(30)


@pytest.mark.parametrize(("app", "needs"), [(asgi, "uvicorn"), (wsgi, "waitress")])
def test_of_too_many_silent_clients_a_worker_has_those_that_were_silent_longest(
    app: Any, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(needs)
    monkeypatch.setattr("fdpool._server.silence._MOST", 2)
    with (
        Server(app, ANY_PORT, workers=1, dispatch="handoff") as server,
        contextlib.ExitStack() as clients,
    ):
        silent = [clients.enter_context(connect(server)) for _ in range(5)]
        [victim] = pids(server)
        [seat] = server._loop.handoff._seats.values()  # type: ignore[union-attr]
        wait_until(lambda: seat.laden()[1:3] == (0, 3))  # none waits, three are open
        os.kill(victim, signal.SIGKILL)
        assert [is_over(client) for client in silent[:3]] == [True] * 3
        for client in silent[3:]:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"200 OK" in read_all(client)


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
def test_a_worker_whose_threads_are_all_busy_leaves_connections_to_others(dispatch: Any) -> None:
    """S8: what its death costs is what its threads are running."""
    pytest.importorskip("waitress")
    request = b"GET /%s HTTP/1.0\r\n\r\n"
    with (
        Server(wsgi_slow_or_pid, ANY_PORT, workers=1, threads=2, dispatch=dispatch) as server,
        contextlib.ExitStack() as clients,
    ):
        [victim] = pids(server)
        for busy in (1, 2):
            clients.enter_context(connect(server)).sendall(request % b"slow")
            wait_until(lambda busy=busy: server.stats().workers[0].in_flight == busy)  # type: ignore[misc]
        waiting = [clients.enter_context(connect(server)) for _ in range(10)]
        for client in waiting:
            client.sendall(request % b"")
        os.kill(victim, signal.SIGKILL)
        assert all(b"200 OK" in read_all(client) for client in waiting)


@pytest.mark.parametrize("free", ["its own", "the other's"])
def test_a_connection_handed_to_a_worker_whose_threads_are_busy_has_the_first_that_is_free(
    free: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no use to another that is as busy; and a worker that is only busy is not passed over as it gets free."""
    pytest.importorskip("waitress")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/slow":
            wait_until((tmp_path / str(os.getpid())).exists, 60)
        return wsgi(environ, start_response)

    with (
        Server(app, ANY_PORT, workers=2, threads=2, dispatch="handoff") as server,
        contextlib.ExitStack() as clients,
    ):
        handoff = server._loop.handoff  # type: ignore[union-attr]
        assert handoff is not None
        for busy in range(1, 5):
            clients.enter_context(connect(server)).sendall(b"GET /slow HTTP/1.0\r\n\r\n")
            wait_until(lambda busy=busy: sum(each.in_flight for each in workers(server)) == busy)  # type: ignore[misc]
        monkeypatch.setattr("fdpool._server.handoff._SLOW_S", 600.0)
        taken_back = handoff.taken_back
        looks: list[object] = []
        look = handoff._look
        monkeypatch.setattr(handoff, "_look", lambda: [look(), looks.append(None)])
        client = clients.enter_context(connect(server))
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        wait_until(lambda: any(seat.has_waiting for seat in handoff._seats.values()))
        looks.clear()
        wait_until(lambda: len(looks) >= 4)
        assert handoff.taken_back == taken_back
        waits_at = {seat.has_waiting: seat.link.pid for seat in handoff._seats.values()}
        first = waits_at[free == "its own"]
        if free == "its own":  # on a busy machine it may be free, and late for its inbox: another promise
            monkeypatch.setattr(handoff, "_look", lambda: None)
        (tmp_path / str(first)).touch()
        assert read_all(client).endswith(b"%d" % first)
        for each in pids(server):
            (tmp_path / str(each)).touch()
        seen: set[int] = set()
        wait_until(lambda: seen.add(int(get(server)[1])) or len(seen) == 2)  # type: ignore[func-returns-value]


def once(folder: Path, name: str) -> bool:
    """True for the first who asks, in whatever process."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_raised_as_a_connection_is_taken_costs_no_other(
    dispatch: Any, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an application's signal handler, say."""
    pytest.importorskip("waitress")
    door = Listening if dispatch == "shared" else HandedOver
    take = door.take

    def take_or_fail(self: Any, fileno: int) -> socket.socket | None:
        if once(tmp_path, "failed"):
            raise RuntimeError("an alarm rings late")
        return take(self, fileno)

    monkeypatch.setattr(door, "take", take_or_fail)
    options = {"threads": threads, "dispatch": dispatch, "start_method": "fork"}
    with Server(wsgi, ANY_PORT, workers=1, **options) as server:
        [pid] = pids(server)
        assert [int(get(server)[1]) for _ in range(3)] == [pid] * 3
    assert (tmp_path / "failed").exists()


def test_a_worker_that_never_says_hello_is_ended_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4: it is stopped before that, say; others serve meanwhile, and go on."""
    say_hello = server_worker._say_hello

    def say_hello_or_hang(stream: Any) -> None:
        if once(tmp_path, "first"):
            pass
        elif once(tmp_path, "hung"):
            (tmp_path / "hung").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        say_hello(stream)

    monkeypatch.setattr(server_worker, "_say_hello", say_hello_or_hang)
    with Server(echo_pid, ANY_PORT, workers=2, boot_timeout=1.5, start_method="fork") as server:
        hung = int((tmp_path / "hung").read_text())
        assert len(pids(server)) == 2
        wait_until(lambda: not psutil.pid_exists(hung))
        assert hung not in pids(server)


def test_a_supervisor_that_stands_still_costs_no_successor_and_not_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W4: whoever is to come next comes of another one."""
    with Server(echo_pid, ANY_PORT, workers=2, boot_timeout=1.0, grace=3) as server:
        victim, other = pids(server)
        psutil.Process(victim).parent().suspend()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len({*pids(server)} - {victim}) == 2)
        assert other in pids(server)
        ask(server)


def test_the_pools_of_generations_that_are_over_are_not_kept() -> None:
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        for _ in range(4):
            server.reload().result(60)
            wait_until(lambda: len(workers(server)) == 1)
        assert len(server._loop._pools._closing) <= 2  # type: ignore[union-attr]


def test_a_worker_that_uvicorn_ends_is_replaced_before_it_has_finished() -> None:
    """`limit_max_requests`: it accepts nothing any more, and what it runs may take long."""
    pytest.importorskip("uvicorn")
    options = {"limit_max_requests": 2}
    with (
        Server(asgi, ANY_PORT, workers=1, options=options) as server,
        connect(server) as slow,
    ):
        slow.sendall(b"GET /sleep/20 HTTP/1.0\r\n\r\n")
        wait_until(lambda: workers(server)[0].in_flight == 1)
        [first] = pids(server)
        begun = time.monotonic()
        answered = first
        while answered == first:
            with contextlib.suppress(ConnectionError):  # uvicorn cuts off what is idle as it ends
                answered = int(get(server, timeout=10)[1])
        assert time.monotonic() - begun < 10
        server.stop(0)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("threads", [1, 4])
def test_many_clients_that_keep_their_connections_keep_nobody_out(dispatch: Any, threads: int) -> None:
    """waitress's own limit is a hundred, and an idle one counts for two minutes."""
    pytest.importorskip("waitress")
    with (
        Server(wsgi, ANY_PORT, workers=1, threads=threads, dispatch=dispatch) as server,
        contextlib.ExitStack() as clients,
    ):
        kept = [clients.enter_context(KeptAlive(server)) for _ in range(150)]
        assert all(client() for client in kept)
        assert get(server)[0] == 200


def test_requests_that_are_cut_off_as_their_grace_is_over_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("waitress")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        wait_until((tmp_path / "never").exists, 60)
        return wsgi(environ, start_response)

    with records(caplog) as logged, Server(app, ANY_PORT, workers=1, threads=2, grace=0.3) as server:
        with connect(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            wait_until(lambda: workers(server)[0].in_flight == 1)
            server.stop()
    [exited] = logged("worker_exited")
    assert exited.levelname == "WARNING"
    assert exited.getMessage().endswith("1 running request(s) cut off")


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_connections_that_come_while_all_threads_are_busy_are_served_as_one_gets_free(dispatch: Any) -> None:
    pytest.importorskip("waitress")
    with (
        Server(wsgi, ANY_PORT, workers=1, threads=3, dispatch=dispatch) as server,
        Load(lambda: get(server), clients=12) as load,
        Load(lambda: garbage(server), clients=2) as refused,
    ):
        load.go_on(200)
        refused.go_on(25)
    assert load.failed == refused.failed == []


def garbage(server: Server) -> bytes:
    with connect(server) as client:
        client.sendall(b"garbage\r\n\r\n")
        return read_all(client)[:12]


def test_connections_that_are_kept_and_leave_no_thread_free_keep_nobody_else_waiting() -> None:
    pytest.importorskip("waitress")
    stop = threading.Event()

    def ask_again_and_again(connection: http.client.HTTPConnection) -> None:
        while not stop.is_set():
            connection.request("GET", "/sleep/0.01")
            connection.getresponse().read()

    with (
        Server(wsgi, ANY_PORT, workers=1, threads=2) as server,
        contextlib.ExitStack() as clients,
        ThreadPoolExecutor(6) as threads,
    ):
        connections = [http.client.HTTPConnection(*server.sockets[0].getsockname()) for _ in range(6)]
        for connection in connections:
            clients.enter_context(contextlib.closing(connection))
            connection.connect()
            connection.request("GET", "/")
            connection.getresponse().read()
        asking = [threads.submit(ask_again_and_again, connection) for connection in connections]
        try:
            for _ in range(5):
                assert get(server)[0] == 200
        finally:
            stop.set()
        assert [each.result() for each in asking] == [None] * 6


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_workers_killed_under_load_cost_no_connection_that_they_had_not_begun(
    dispatch: Any, tmp_path: Path
) -> None:
    """S8: one connection at a time is in a worker's hands, so each death costs one at most."""
    noted = tmp_path / "noted"
    noted.touch()
    lost: list[int] = []

    def request() -> None:
        with connect(server) as client:
            client.sendall(b"hello")
            if is_over(client):
                lost.append(client.getsockname()[1])
            elif read_all(client) != b"ello":
                raise AssertionError("an answer was cut off")

    def kill_one_that_runs_a_request() -> int | None:
        for worker in workers(server):
            if worker.in_flight and worker.pid is not None:
                os.kill(worker.pid, signal.SIGKILL)
                return worker.pid
        return None

    kills = 3
    with Server(partial(note_and_echo, noted), ANY_PORT, workers=2, dispatch=dispatch) as server:
        with Load(request, clients=4) as load:
            for _ in range(kills):
                load.go_on(4)
                while (victim := kill_one_that_runs_a_request()) is None:
                    load.go_on(1)
                    assert not load.failed
                wait_until(lambda gone=victim: gone not in pids(server) and len(pids(server)) == 2)  # type: ignore[misc]
        assert not load.failed
        assert len(lost) <= kills
        # A kill may find a worker between accept(2) and the application's first line, though hardly ever.
        assert len(set(lost) - set(map(int, noted.read_text().split()))) <= 1


@pytest.mark.parametrize("unwatched", [1, 2])
def test_a_server_that_cannot_watch_one_more_descriptor_starts_that_worker_later(
    unwatched: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S9: `epoll_ctl` fails with ENOSPC or ENOMEM, for a worker's inbox or its control link."""
    watch = Turns.watch
    with records(caplog) as logged, Server(echo_pid, ANY_PORT, workers=1, dispatch="handoff") as server:
        ahead = itertools.count(1)

        def watch_if_room(turns: Turns, source: Any, action: Any) -> None:
            if source not in server.sockets and next(ahead) == unwatched:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            watch(turns, source, action)

        monkeypatch.setattr(Turns, "watch", watch_if_room)
        [before] = pids(server)
        os.kill(before, signal.SIGKILL)
        assert ask(server)[0] != before
        assert "No space left" in logged("worker_failed")[0].reason


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, signal.SIGQUIT, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE]
)
def test_a_worker_that_is_ended_by_a_signal_is_replaced(number: int) -> None:
    """W1; SIGPIPE is ignored, as Python has it."""
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        [before] = pids(server)
        os.kill(before, number)
        if number == signal.SIGPIPE:
            assert ask(server)[0] == before
        else:
            wait_until(lambda: pids(server) not in ([before], []))
            assert ask(server)[0] != before


def test_a_worker_that_is_sent_sigterm_finishes_and_has_a_successor_first(tmp_path: Path) -> None:
    """W1."""
    gate = tmp_path / "gate"
    with Server(waiting_for(gate, "handler"), ANY_PORT, workers=1) as server:
        [before] = pids(server)
        with connect(server) as client:
            client.sendall(b"x")
            wait_until(lambda: server.stats().workers[0].in_flight)
            os.kill(before, signal.SIGTERM)
            wait_until(lambda: pids(server) not in ([before], []))
            gate.touch()
            assert int(read_all(client)) == before


ENDING = [signal.SIGQUIT, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]


@pytest.mark.parametrize("number", [*ENDING, signal.SIGTERM])
def test_a_worker_that_is_sent_a_signal_while_it_boots_is_replaced(number: int, tmp_path: Path) -> None:
    """W1: at once, or after SIGTERM when it has come to serve and its successor does."""

    def hold_the_first_but_one(worker: ServerWorker) -> None:
        if worker.slot == 1 and not (tmp_path / "boots").exists():
            (tmp_path / "pid").write_text(str(worker.pid))
            (tmp_path / "pid").rename(tmp_path / "boots")
            while not (tmp_path / "go").exists():
                time.sleep(0.01)

    with Server(echo_pid, ANY_PORT, workers=1, on_worker_start=hold_the_first_but_one) as server:
        [other] = pids(server)
        server.scale(2)
        wait_until((tmp_path / "boots").exists)
        booting = int((tmp_path / "boots").read_text())
        os.kill(booting, number)
        if number == signal.SIGTERM:
            assert psutil.pid_exists(booting)
            (tmp_path / "go").touch()
        wait_until(lambda: not psutil.pid_exists(booting))
        wait_until(lambda: len(pids(server)) == len(server.stats().workers) == 2)
        assert other in pids(server)
        assert booting not in pids(server)


def waiting_for(gate: Path, kind: str) -> Any:
    """An application that answers with its worker's pid when the file `gate` is there."""

    def wait_for_gate() -> None:
        while not gate.exists():
            time.sleep(0.01)

    def serve_connection(connection: socket.socket, _: object) -> None:
        connection.recv(100)
        wait_for_gate()
        connection.sendall(b"%d" % os.getpid())

    async def serve_asgi(scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "http" and not gate.exists():  # noqa: ASYNC110, ASYNC240 - it is the test's
            await asyncio.sleep(0.01)
        await asgi(scope, receive, send)

    def serve_wsgi(environ: Any, start_response: Any) -> list[bytes]:
        wait_for_gate()
        return wsgi(environ, start_response)

    return {"handler": serve_connection, "asgi": serve_asgi, "wsgi": serve_wsgi}[kind]


@contextlib.contextmanager
def draining(app: Any, threads: int | None) -> Iterator[tuple[Server, int, socket.socket]]:
    """A server with a worker that drains, and the client of the request that this one runs."""
    with Server(app, ANY_PORT, workers=1, threads=threads, grace=60) as server:
        [old] = pids(server)
        with connect(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            wait_until(lambda: server.stats().workers[0].in_flight)
            assert server.reload().result(60) == 2
            after = pids(server)
            yield server, old, client
            wait_until(lambda: len(server.stats().workers) == 1)
            assert pids(server) == after
            assert server.stats().started == 2
        server.stop(0)


KINDS = [("handler", 1), ("handler", 2), ("asgi", None), ("wsgi", 1), ("wsgi", 2)]


@pytest.mark.parametrize(
    ("kind", "threads", "number"),
    [*(("handler", 1, number) for number in ENDING), *((*kind, signal.SIGINT) for kind in KINDS[1:])],
)
def test_a_worker_that_is_ended_by_a_signal_while_it_drains_is_gone_with_what_it_ran(
    kind: str, threads: int | None, number: int, tmp_path: Path
) -> None:
    """W1: and its successor is there already. SIGINT is told the application as Python does, so that HTTP may have an
    answer of that: 500."""
    need(kind)
    with draining(waiting_for(tmp_path / "never", kind), threads) as (_, old, client):
        os.kill(old, number)
        wait_until(lambda: not psutil.pid_exists(old))
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = read_all(client)
        assert answer == b"" or (number == signal.SIGINT and b" 500 " in answer)


@pytest.mark.parametrize(("kind", "threads"), KINDS)
def test_a_worker_that_is_sent_sigterm_while_it_drains_finishes(
    kind: str, threads: int | None, tmp_path: Path
) -> None:
    """W1: it is about to go."""
    need(kind)
    with draining(waiting_for(tmp_path / "gate", kind), threads) as (_, old, client):
        os.kill(old, signal.SIGTERM)
        (tmp_path / "gate").touch()
        assert b"%d" % old in read_all(client)


HARMLESS = [[signal.SIGPIPE], [signal.SIGUSR1], [signal.SIGSTOP, signal.SIGCONT]]


@pytest.mark.parametrize("numbers", HARMLESS)
@pytest.mark.parametrize(("kind", "threads"), KINDS)
def test_a_worker_that_drains_finishes_whatever_it_is_told_that_does_not_end_it(
    kind: str, threads: int | None, numbers: list[int], tmp_path: Path
) -> None:
    """W1."""
    need(kind)
    with draining(waiting_for(tmp_path / "gate", kind), threads) as (_, old, client):
        for number in numbers:
            os.kill(old, number)
        (tmp_path / "gate").touch()
        assert b"%d" % old in read_all(client)


@pytest.mark.parametrize("numbers", HARMLESS)
def test_a_worker_that_boots_comes_to_serve_whatever_it_is_told_that_does_not_end_it(
    numbers: list[int], tmp_path: Path
) -> None:
    """W1."""

    def hold(worker: ServerWorker) -> None:
        if worker.generation == 2:
            (tmp_path / "pid").write_text(str(worker.pid))
            (tmp_path / "pid").rename(tmp_path / "boots")
            while not (tmp_path / "go").exists():
                time.sleep(0.01)

    with Server(echo_pid, ANY_PORT, workers=1, on_worker_start=hold) as server:
        reloading = server.reload()
        wait_until((tmp_path / "boots").exists)
        booting = int((tmp_path / "boots").read_text())
        for number in numbers:
            os.kill(booting, number)
        (tmp_path / "go").touch()
        assert reloading.result(60) == 2
        assert pids(server) == [booting]


def need(kind: str) -> None:
    if kind in ("asgi", "wsgi"):
        pytest.importorskip("uvicorn" if kind == "asgi" else "waitress")


def test_a_worker_that_is_to_be_replaced_before_it_serves_is(tmp_path: Path) -> None:
    def retire(worker: ServerWorker) -> None:
        if not (tmp_path / "first").exists():
            (tmp_path / "first").write_text(str(worker.pid))
            worker.retire("it is the first")

    with Server(echo_pid, ANY_PORT, workers=1, on_worker_start=retire) as server:
        first = int((tmp_path / "first").read_text())
        wait_until(lambda: pids(server) not in ([first], []))


def test_a_worker_that_is_stopped_and_goes_on_has_lost_nothing() -> None:
    """W1."""
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        [pid] = pids(server)
        os.kill(pid, signal.SIGSTOP)
        with connect(server) as client:
            client.sendall(b"x")
            os.kill(pid, signal.SIGCONT)
            assert read_all(client) == b"%d x" % pid


def test_a_stopped_worker_is_killed_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """W5."""
    with records(caplog) as logged, Server(echo_pid, ANY_PORT, workers=1, request_timeout=0.5) as server:
        [before] = pids(server)
        os.kill(before, signal.SIGSTOP)
        # The next one's request may take its time, on a busy machine.
        wait_until(lambda: server.stats().started == 2)
        server._loop._watch._request_timeout_s = 60.0  # type: ignore[union-attr]
        assert ask(server)[0] != before
        # Its stacks are waited for, and the next one serves already.
        wait_until(lambda: logged("worker_killed"))
        assert "SIGSTOP" in logged("worker_killed")[0].reason


def test_connections_handed_to_a_stopped_worker_go_to_another() -> None:
    """W5."""
    with Server(echo_pid, ANY_PORT, workers=2, dispatch="handoff") as server:
        stopped, other = pids(server)
        os.kill(stopped, signal.SIGSTOP)
        assert {ask(server)[0] for _ in range(4)} == {other}
        os.kill(stopped, signal.SIGCONT)


def test_a_connection_is_handed_to_the_worker_that_has_the_fewest_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a busy machine a worker may be late for its inbox: what is taken back from there is another promise.
    monkeypatch.setattr("fdpool._server.handoff._LOOK_S", 600.0)
    with Server(pid_and_stay, ANY_PORT, workers=2, threads=4, dispatch="handoff") as server:
        loop = server._loop
        assert loop is not None
        assert loop.handoff is not None
        links = list(loop.crew.links.values())

        def open_at(pid: int) -> int:
            return sum(link.load()[1] for link in links if link.pid == pid)

        with contextlib.ExitStack() as clients:
            held: dict[int, list[socket.socket]] = {pid: [] for pid in pids(server)}
            for _ in range(4):
                client = clients.enter_context(connect(server))
                held[int(client.recv(20))].append(client)
            busy, idle = held
            assert len(held[busy]) == len(held[idle]) == 2
            for client in held[idle]:
                client.close()
            wait_until(lambda: open_at(idle) == 0)
            assert open_at(busy) == 2
            assert [int(clients.enter_context(connect(server)).recv(20)) for _ in range(2)] == [idle, idle]
        wait_until(lambda: loop.handoff.handed == 6)  # counted after it was sent
        assert loop.handoff.taken_back == 0


def test_a_worker_that_was_stopped_is_handed_connections_again_if_nobody_else_is_left() -> None:
    with Server(echo_pid, ANY_PORT, workers=2, dispatch="handoff") as server:
        first = workers(server)[0].pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        try:
            handoff = server._loop.handoff  # type: ignore[union-attr]
            while not handoff.taken_back:  # type: ignore[union-attr]
                ask(server)
            server.scale(1)
            wait_until(lambda: [each.slot for each in workers(server)] == [0])
        finally:
            os.kill(first, signal.SIGCONT)
        assert ask(server)[0] == first


def test_handing_a_connection_over_is_no_occasion_to_look_at_every_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is to be done is worked out when something has happened to the plan, or its time has come."""
    # On a busy machine a worker may be late for its inbox: not to be passed over for that until all are answered.
    monkeypatch.setattr("fdpool._server.handoff._SLOW_S", 0.0)
    with Server(echo_pid, ANY_PORT, workers=2, dispatch="handoff") as server:
        plan = server._loop._plan  # type: ignore[union-attr]
        ticks: list[float] = []
        tick = plan.tick
        monkeypatch.setattr(plan, "tick", lambda now: [ticks.append(now), tick(now)][1])
        assert len({ask(server)[0] for _ in range(50)}) == 2
        assert len(ticks) < 25  # of the time that this takes, and not of each


def assert_failing_requests_concern_no_other(server: Server) -> None:
    """Its application raises at once for /raise, and for /late as its answer has begun."""
    [before] = pids(server)
    for _ in range(2):
        assert get(server, "/raise")[0] == 500
        with pytest.raises(http.client.IncompleteRead) as cut:
            get(server, "/late")
        assert cut.value.partial == b"begun"
        assert int(get(server)[1]) == before


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_wsgi_application_that_raises_fails_its_own_request_only(
    error: type[BaseException], threads: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """P1, for requests."""
    pytest.importorskip("waitress")

    def late() -> Iterator[bytes]:
        yield b"begun"
        raise error("of the application")

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/raise":
            raise error("of the application")
        if environ["PATH_INFO"] == "/late":
            start_response("200 OK", [("Content-Length", "1000")])
            return late()
        return wsgi(environ, start_response)

    with Server(app, ANY_PORT, workers=1, threads=threads) as server:
        assert_failing_requests_concern_no_other(server)
    assert f"{error.__name__}: of the application" in capfd.readouterr().err


@pytest.mark.parametrize("request_timeout", [None, 60])
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_asgi_application_that_raises_fails_its_own_request_only(
    error: type[BaseException], request_timeout: float | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """P1, for requests: none of them ends the event loop."""
    pytest.importorskip("uvicorn")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if path == "/raise":
            raise error("of the application")
        if path == "/late":
            length = [(b"content-length", b"1000")]
            await send({"type": "http.response.start", "status": 200, "headers": length})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            raise error("of the application")
        await asgi(scope, receive, send)

    with Server(app, ANY_PORT, workers=1, request_timeout=request_timeout) as server:
        assert_failing_requests_concern_no_other(server)
        wait_until(lambda: server.stats().workers[0].requests == 6)
    assert f"{error.__name__}: of the application" in capfd.readouterr().err


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_request_that_waitress_cannot_parse_costs_its_connection_only(
    threads: int, dispatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """P1: of this one its parser raises, with the first of what a client sends or later."""
    pytest.importorskip("waitress")
    with Server(wsgi, ANY_PORT, workers=1, threads=threads, dispatch=dispatch) as server:
        [before] = pids(server)
        for asks_before in (False, True):
            with connect(server) as client:
                if asks_before:
                    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    answer = b""
                    while not answer.endswith(b"%d" % before):
                        answer += client.recv(1000)
                client.sendall(b"GET http://[/ HTTP/1.1\r\nHost: x\r\n\r\n")
                assert read_all(client) == b""
            assert int(get(server)[1]) == before
    assert capfd.readouterr().err.count("ValueError") == 2


def test_an_error_as_a_handed_connection_is_taken_costs_that_one_only(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """P1, where it is nobody's request yet."""
    pytest.importorskip("waitress")

    def fail_once(_: ServerWorker) -> None:
        from waitress.channel import HTTPChannel

        begin = HTTPChannel.__init__

        def failing(self: Any, *args: Any, **options: Any) -> None:
            HTTPChannel.__init__ = begin
            raise ValueError("no channel")

        HTTPChannel.__init__ = failing

    with Server(
        wsgi, ANY_PORT, workers=1, threads=2, dispatch="handoff", on_worker_start=fail_once
    ) as server:
        [before] = pids(server)
        with connect(server) as client:
            client.sendall(b"G")
            assert is_over(client)
        assert int(get(server)[1]) == before
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert "ValueError: no channel" in said


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
def test_a_handler_that_fails_costs_its_connection_only(
    dispatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """P1, for requests."""

    def handle(connection: socket.socket, _: object) -> None:
        what = connection.recv(100)
        if what == b"raise":
            raise ValueError("from the handler")
        if what == b"exit":
            os._exit(7)
        connection.sendall(b"0 ok")

    with Server(handle, ANY_PORT, workers=2, dispatch=dispatch) as server:
        for bad in (b"raise", b"exit", b"raise"):
            with connect(server) as client:
                client.sendall(bad)
                assert is_over(client)
            assert ask(server, b"good") == (0, b"ok")
        wait_until(lambda: len(pids(server)) == 2)
    assert "from the handler" in capfd.readouterr().err


@pytest.mark.parametrize("threads", [1, 2])
def test_a_handler_that_exits_costs_its_connection_only(
    threads: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """P1, for requests: neither their thread nor their worker."""

    def handle(connection: socket.socket, _: object) -> None:
        what = connection.recv(100)
        if what == b"exit":
            raise SystemExit(0)
        if what == b"cancelled":
            raise asyncio.CancelledError
        connection.sendall(b"%d ok" % os.getpid())

    with Server(handle, ANY_PORT, workers=1, threads=threads) as server:
        [before] = pids(server)
        for bad in (b"exit", b"cancelled", b"exit"):
            with connect(server) as client:
                client.sendall(bad)
                assert is_over(client)
        assert ask(server, b"good") == (before, b"ok")
    assert capfd.readouterr().err.count("a connection's handler failed") == 3


class Forks(socketserver.BaseRequestHandler):
    """Its child comes back."""

    def handle(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
            child = os.fork()
        if child:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.request.sendall(b"0 %d" % code)


@pytest.mark.parametrize(
    ("app", "threads"),
    [
        (forks, 1),
        (forks, 2),
        (Forks, 1),
        (wsgi_forks, 1),
        (wsgi_forks, 2),
        (asgi_forks, None),
        (asgi_forks_and_says_so, None),
    ],
)
def test_a_child_that_a_request_has_forked_does_not_go_on_as_a_worker(app: Any, threads: int | None) -> None:
    """It would serve, and nobody would know of it. The request waits for its end."""
    if app not in (forks, Forks):
        pytest.importorskip("waitress" if app is wsgi_forks else "uvicorn")
    with Server(app, ANY_PORT, workers=1, threads=threads) as server:
        answer = ask(server, b"")[1] if app in (forks, Forks) else get(server)[1]
        assert answer.split()[-1] == b"1"
        wait_until(lambda: server.stats().workers[0].in_flight == 0)
        assert server.stats().workers[0].requests == 1


def wsgi_forks_as_another_thread_counts(environ: Any, start_response: Any) -> list[bytes]:
    """Answer with how a child has ended that raises, and in which nobody lets go of the dispatcher's lock."""
    lock = environ["waitress.client_disconnected"].__self__.server.task_dispatcher.lock
    lock.acquire()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads
        child = os.fork()
    if child == 0:
        raise ValueError
    lock.release()
    try:
        wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG))
    except AssertionError:
        os.kill(child, signal.SIGKILL)
    body = b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def test_a_child_that_a_request_has_forked_waits_for_no_thread_that_it_does_not_have() -> None:
    """It would stay for ever, with the client's connection."""
    pytest.importorskip("waitress")
    with Server(wsgi_forks_as_another_thread_counts, ANY_PORT, workers=1, threads=2) as server:
        assert get(server)[1] == b"1"


def test_a_worker_that_dies_of_a_fault_leaves_its_stacks_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """W3."""

    def fault(connection: socket.socket, _: object) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    with records(caplog) as logged, Server(fault, ANY_PORT, workers=1) as server:
        with connect(server) as client:
            assert is_over(client)
        wait_until(lambda: logged("worker_exited"))
        [exited] = logged("worker_exited")
        assert exited.reason == "it was killed by SIGSEGV"
        assert exited.levelname == "WARNING"
        assert "in fault" in exited.stacks
        assert exited.stacks in exited.getMessage()
        assert exited.lost == 1


def test_a_worker_that_is_killed_while_it_drains_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with records(caplog) as logged, Server(slow_or_pid, ANY_PORT, workers=1) as server:
        [pid] = pids(server)
        with connect(server) as client:
            client.sendall(b"slow")
            wait_until(lambda: server.stats().workers[0].in_flight)
            server.reload().result(30)
            os.kill(pid, signal.SIGKILL)
            assert is_over(client)
        wait_until(lambda: logged("worker_exited"))
        [exited] = logged("worker_exited")
        assert (exited.reason, exited.levelname) == ("it was killed by SIGKILL", "WARNING")
        assert exited.lost == 1


def test_an_application_that_fails_as_it_serves_is_logged_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def serve(listeners: list[socket.socket], worker: ServerWorker) -> None:
        worker.ready()
        select.select(listeners, [], [])
        listeners[0].accept()[0].close()
        raise ValueError("out of paper\nand of ink")

    with records(caplog) as logged, Server(serve, ANY_PORT, workers=1) as server:
        with connect(server) as client:
            assert is_over(client)
        wait_until(lambda: logged("worker_exited"))
        exited = logged("worker_exited")[0]
        assert exited.reason == "ValueError: out of paper ..."
        assert "in serve" in exited.traceback
        assert "and of ink" in exited.getMessage()
        server.stop(0)  # the next one may serve already, and heeds no drain


def test_an_application_that_returns_is_started_again_but_not_at_full_speed() -> None:
    """S4, after boot."""

    def serve(listeners: list[socket.socket]) -> None:
        return

    server = Server(serve, ANY_PORT, workers=1)
    server.start()
    wait_until(lambda: server.stats().started >= 4)
    assert server.stats().started < 10
    server.stop(0)


def test_what_cannot_travel_is_refused_at_once() -> None:
    lock = __import__("threading").Lock()

    def handle(connection: socket.socket, _: object) -> None:
        lock.acquire()

    with pytest.raises(NotPicklable, match="lock"):
        Server(handle, ANY_PORT)


def test_workers_have_usual_signals_whatever_the_program_has_done_to_its_own(tmp_path: Path) -> None:
    """W2: SIGCHLD ignored and SIGTERM blocked would cost exit codes, and programs that can be ended."""
    body = """
    import signal, subprocess
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGCHLD])

    def handle(connection, address):
        connection.recv(10)
        code = subprocess.run(["sh", "-c", "exit 5"]).returncode
        connection.sendall(b"%d %d" % (code, len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))))

    sys.exit(fdpool.Server(handle, "127.0.0.1:0", workers=1).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(b"x")
            assert read_all(client) == b"5 0"


# -- requests that do not end ----------------------------------------------------------------------------


@pytest.fixture
def slow_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has as long as a busy machine may take to write down its stacks."""
    monkeypatch.setattr("fdpool._server.crew._STACKS_S", 2.0)


@pytest.mark.usefixtures("slow_to_show")
def test_a_request_that_hangs_is_killed_with_its_programs_and_the_log_has_its_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The interpreter lock is held all the time, so the worker could not answer anybody."""

    def hang_in_c(connection: socket.socket, _: object) -> None:
        import ctypes
        import subprocess

        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        connection.sendall(b"%d" % child.pid)
        ctypes.PyDLL(None).usleep(600_000_000)

    def import_first(_: ServerWorker) -> None:
        import ctypes
        import subprocess

        assert ctypes, subprocess  # importing them takes a busy machine as long as a request may take

    # Starting the program takes it a while, too.
    options: dict[str, Any] = {"request_timeout": 3.0, "on_worker_start": import_first}
    with records(caplog) as logged:
        with Server(hang_in_c, ANY_PORT, workers=1, **options) as server:
            [before] = pids(server)
            with connect(server) as client:
                child = psutil.Process(int(client.recv(100)))
                assert is_over(client)
            seconds_until_gone([child], 30)
            wait_until(lambda: pids(server) not in ([before], []))
        [killed] = logged("worker_killed")
        assert "a request has not moved on" in killed.reason
        assert "hang_in_c" in killed.stacks
        assert killed.worker_pid == before


SECOND_BEGUN = threading.Event()


def wsgi_overlapping(environ: Any, start_response: Any) -> list[bytes]:
    """Of two requests that come together on a connection, the second begins before the first one's thread lets go.

    It is answered after that, with how many requests the threads have, or have before them.
    """
    tasks = environ["waitress.client_disconnected"].__self__.server.task_dispatcher
    if environ["PATH_INFO"] == "/first":
        add_task = tasks.add_task

        def add_and_wait(task: Any) -> None:
            add_task(task)
            SECOND_BEGUN.wait(20)

        tasks.add_task = add_and_wait
    elif environ["PATH_INFO"] == "/second":
        SECOND_BEGUN.set()
        wait_until(lambda: current_worker().progress.finished == 1)  # type: ignore[union-attr]
    body = b"%d" % tasks._unserved
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def ask_overlapping(server: Server) -> bytes:
    """What the second is answered with."""
    with connect(server) as client:
        client.sendall(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\nGET /second HTTP/1.0\r\n\r\n")
        return read_all(client).rpartition(b"\r\n")[2]


def test_a_worker_is_not_stuck_after_requests_that_came_together_on_a_connection() -> None:
    """One would be killed that has nothing to do."""
    pytest.importorskip("waitress")
    with Server(wsgi_overlapping, ANY_PORT, workers=1, threads=2) as server:
        assert ask_overlapping(server)
        wait_until(lambda: (one := server.stats().workers[0]).requests == 2 and one.oldest_s == 0.0)


def test_a_request_that_came_with_another_on_its_connection_has_a_thread_until_it_is_served() -> None:
    """Or connections would be taken for a thread that is not free."""
    pytest.importorskip("waitress")
    with Server(wsgi_overlapping, ANY_PORT, workers=1, threads=2) as server:
        assert ask_overlapping(server) == b"1"
        assert get(server)[1] == b"1"


def test_a_long_request_is_left_alone_where_no_limit_is_set() -> None:
    with Server(slow_then_pid, ANY_PORT, workers=1) as server, connect(server) as client:
        client.sendall(b"1.2")
        assert int(read_all(client)) in pids(server)


@pytest.mark.parametrize(
    ("app", "threads", "path"),
    [(asgi, None, "/block/600"), (wsgi, None, "/sleep/600"), (wsgi, 1, "/sleep/600")],
)
@pytest.mark.usefixtures("slow_to_show")
def test_a_worker_that_stands_still_is_logged_with_its_stacks_and_left_alone_where_no_limit_is_set(
    app: Any,
    threads: int | None,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    pytest.importorskip("uvicorn" if app is asgi else "waitress")
    begun = tmp_path / "begun"

    async def asgi_that_tells(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            begun.touch()
        await asgi(scope, receive, send)

    def wsgi_that_tells(environ: Any, start_response: Any) -> list[bytes]:
        begun.touch()
        return wsgi(environ, start_response)

    def told() -> list[Any]:
        """That it is the application which stands still; on a busy machine a loop that does nothing may as well."""
        return [each for each in logged("worker_slow") if "_that_tells" in each.stacks]

    telling = asgi_that_tells if app is asgi else wsgi_that_tells
    with records(caplog) as logged, Server(telling, ANY_PORT, workers=1, threads=threads) as server:
        before = pids(server)
        with connect(server) as client:
            client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            wait_until(begun.exists)  # a request is in flight before the application is called
            monkeypatch.setattr("fdpool._server.watch._SLOW_S", 0.3)
            wait_until(told)
            assert pids(server) == before
            server.stop(0)
        [slow] = told()
        assert slow.stacks in slow.getMessage()
        assert slow.worker_pid == before[0]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.usefixtures("slow_to_show")
def test_an_event_loop_that_stands_still_is_killed(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("uvicorn")
    options = {"loop": loop}
    with (
        records(caplog) as logged,
        Server(asgi, ANY_PORT, workers=1, request_timeout=2.0, options=options) as server,
    ):
        [before] = pids(server)
        with pytest.raises(ConnectionError):
            get(server, "/block/600")
        wait_until(lambda: pids(server) not in ([before], []))
        [killed] = logged("worker_killed")
        assert "event loop has not turned" in killed.reason
        assert "time.sleep" in killed.stacks or "applications.py" in killed.stacks


@pytest.mark.parametrize("loop", LOOPS)
def test_a_worker_whose_event_loop_turns_is_left_alone_until_its_end(loop: str, tmp_path: Path) -> None:
    """In its lifespan's shutdown, and in its hook after that, when there is no loop any more."""
    pytest.importorskip("uvicorn")
    limit_s = 2.0  # on a busy machine a loop that turns may be late by a second
    said = tmp_path / "said"

    async def slow_to_end(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await asgi(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(1.5 * limit_s)
        await send({"type": "lifespan.shutdown.complete"})

    def slow_hook(worker: ServerWorker) -> None:
        time.sleep(1.5 * limit_s)
        said.write_text(str(worker.pid))

    with Server(
        slow_to_end,
        ANY_PORT,
        workers=1,
        request_timeout=limit_s,
        on_worker_exit=slow_hook,
        options={"loop": loop},
    ) as server:
        [pid] = pids(server)
    assert said.read_text() == str(pid)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_coroutine_that_waits_for_too_long_is_cancelled_and_nobody_else_is(
    loop: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("uvicorn")
    with Server(asgi, ANY_PORT, workers=1, request_timeout=2.5, options={"loop": loop}) as server:
        before = pids(server)
        assert get(server, "/sleep/600")[0] == 500
        assert get(server, "/stream/60")[1].startswith(b"tick\n" * 60)  # longer in all, but it moves on
        assert pids(server) == before
    [told] = [line for line in capfd.readouterr().err.splitlines() if "has not moved on" in line]
    assert told.startswith("GET /sleep/600 ")
    *_, outermost = told.partition("it waits at ")[2].split(" < ")
    assert outermost.startswith(asgi.__code__.co_filename)


# -- workers that have done their share --------------------------------------------------------------------


def test_workers_are_replaced_after_so_many_requests_more_or_less_and_none_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """P15, for requests."""
    with records(caplog) as logged:
        with Server(echo_pid, ANY_PORT, workers=2, max_requests=20, jitter=0.5) as server:
            with Load(lambda: ask(server)[0]) as load:
                wait_until(lambda: len(load.answered) >= 5)
            assert load.failed == []
            assert server.stats().started >= 5
        shares = {each.reason for each in logged("worker_retires")}
        assert len(shares) > 1
        assert shares <= {f"it has served {count} requests" for count in range(10, 31)}


def test_workers_are_replaced_at_an_age_and_at_a_size(caplog: pytest.LogCaptureFixture) -> None:
    """P15."""

    def grow(connection: socket.socket, _: object) -> None:
        grown.append(bytearray(connection.recv(10) == b"grow" and 150_000_000))
        connection.sendall(b"%d " % os.getpid())

    grown: list[bytearray] = []
    with records(caplog) as logged:
        with Server(grow, ANY_PORT, workers=1, max_memory=120_000_000) as server:
            first, _ = ask(server, b"no")
            assert ask(server, b"grow")[0] == first
            wait_until(lambda: ask(server, b"no")[0] != first)
        with Server(echo_pid, ANY_PORT, workers=1, max_age=0.5) as server:
            second, _ = ask(server)
            wait_until(lambda: pids(server) not in ([second], []))
        of_size, of_age, *_ = logged("worker_retires")
    assert (of_size.slot, of_size.worker_pid, of_age.worker_pid) == (0, first, second)
    assert re.fullmatch(r"it has 1\d\d\.\d MiB of memory, and max_memory is 114\.4 MiB", of_size.reason)
    assert of_age.reason == "it has served for 0.5 seconds, and its max_age is over"
    for record in (of_size, of_age):
        assert f"worker 0 is to be replaced: {record.reason}" in log.Lines().format(record)
        assert json.loads(log.Json().format(record))["reason"] == record.reason


def test_a_server_whose_max_memory_is_too_little_for_any_worker_says_so_and_replaces_them_ever_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LOOK_S", 0.01)
    with records(caplog) as logged, Server(echo_pid, ANY_PORT, workers=1, max_memory=1 << 20) as server:
        wait_until(lambda: len(logged("worker_retires")) > 3)
        assert ask(server)[1] == b"hello"
        said = logged("worker_retires")
        assert all(each.levelno == logging.WARNING for each in said)
        assert re.fullmatch(
            r"it has \d+\.\d MiB of memory, and max_memory is 1\.0 MiB, less than a worker has that serves nothing yet",
            said[0].reason,
        )
        assert said[3].created - said[1].created >= 0.1 + 0.2


# -- clients that go ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
@pytest.mark.parametrize(("app", "threads"), [(echo_pid, 1), (asgi, None), (wsgi, 4), (wsgi, 1)])
def test_clients_that_reset_at_any_moment_leave_no_trace(
    app: Any, threads: int | None, dispatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """S10: before they are accepted, before they are handed over, in the middle of a request, and of its answer."""
    if app is not echo_pid:
        pytest.importorskip("uvicorn" if app is asgi else "waitress")
    with Server(app, ANY_PORT, workers=1, threads=threads, dispatch=dispatch) as server:
        before = pids(server)
        os.kill(before[0], signal.SIGSTOP)  # so that some are reset while nobody can take them
        for sent in (b"", b"GET / HT", b"GET /sleep/0.1 HTTP/1.1\r\nHost: x\r\n\r\n"):
            for _ in range(3):
                client = connect(server)
                client.sendall(sent)
                reset(client)
        os.kill(before[0], signal.SIGCONT)
        for sent in (b"", b"GET / HT", b"GET /sleep/0.1 HTTP/1.1\r\nHost: x\r\n\r\n"):
            client = connect(server)
            client.sendall(sent)
            reset(client)
        if app is echo_pid:
            assert ask(server)[0] == before[0]
        else:
            assert get(server)[0] == 200
        wait_until(lambda: server.stats().workers[0].in_flight == 0)
        assert pids(server) == before
    assert "Traceback" not in capfd.readouterr().err


# -- limits -----------------------------------------------------------------------------------------------


def leave_room_for(count: int) -> Any:
    """A hook that lets its worker open so many descriptors more."""

    def limit(_: ServerWorker) -> None:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(40)]  # fills what is free below
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(*taken, highest) + 1 + count, 4096))

    return limit


def cpu_in_a_second(server: Server, pid: int) -> float:
    """Seconds of processor time that the one worker takes in a second, in which it stays. One that spins takes what
    there is, so none of that is spent here."""
    process = psutil.Process(pid)
    before = process.cpu_times()
    begun = time.monotonic()
    while (passed_s := time.monotonic() - begun) < 1.0:
        assert pids(server) == [pid]
        time.sleep(0.02)
    used = process.cpu_times()
    return (used.user + used.system - before.user - before.system) / passed_s


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
def test_a_worker_without_descriptors_does_not_spin_and_serves_all_as_they_get_free(dispatch: Any) -> None:
    """S9, T3: the reserve lets one connection in at a time; the others wait, and none is lost or turned away."""
    server = Server(
        keep_echoing,
        ANY_PORT,
        workers=1,
        threads=30,
        dispatch=dispatch,
        on_worker_start=leave_room_for(12),
    )
    with server:
        [pid] = pids(server)
        clients = [connect(server) for _ in range(25)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        wait_until(lambda: server.stats().workers[0].in_flight >= 5)
        used_s = cpu_in_a_second(server, pid)
        assert server.stats().workers[0].in_flight < 25
        assert used_s < 0.3
        for number, client in enumerate(clients):  # in their order, as they wait in it
            assert client.recv(10) == b"%d" % number
            client.close()
        wait_until(lambda: server.stats().workers[0].requests == 25)


@pytest.mark.parametrize(
    ("room", "count", "dispatch", "loop"),
    [
        (14, 25, "shared", "asyncio"),
        (14, 25, "reuseport", "uvloop"),
        # Where uvloop begins with accepting by itself.
        (160, 250, "shared", "uvloop"),
        (160, 250, "reuseport", "uvloop"),
        (160, 250, "reuseport", "asyncio"),
    ],
)
def test_an_asgi_worker_without_descriptors_says_so_once_and_serves_all_as_they_get_free(
    room: int, count: int, dispatch: Any, loop: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """S9, T3."""
    pytest.importorskip("uvicorn")
    pytest.importorskip(loop)
    options = {"loop": loop, "timeout_keep_alive": 60}
    leave_room = leave_room_for(room)
    said: list[str] = []

    def start(worker: ServerWorker) -> None:
        # Each pause is twice as long as the one before: who waited for them all would not be served in time.
        accept._LONGEST_PAUSE_S = 600.0
        leave_room(worker)

    def has_said_so() -> bool:
        said.append(capfd.readouterr().err)
        return "cannot accept" in "".join(said)

    with (
        Server(
            asgi,
            ANY_PORT,
            workers=1,
            dispatch=dispatch,
            on_worker_start=start,
            options=options,
        ) as server,
        contextlib.ExitStack() as opened,
    ):
        [pid] = pids(server)
        clients = [opened.enter_context(connect(server)) for _ in range(count)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: server.stats().workers[0].requests >= room // 3)
        wait_until(has_said_so)
        used_s = cpu_in_a_second(server, pid)
        assert server.stats().workers[0].requests < count
        assert used_s < 0.3
        text = "".join([*said, capfd.readouterr().err])
        assert text.count("\n") == text.count("cannot accept") == 1, text
        for answered, client in enumerate(clients, server.stats().workers[0].requests + 1):
            assert client.recv(8) == b"HTTP/1.1"
            client.close()  # which lets the next one in, and not after a pause
            wait_until(lambda n=answered: server.stats().workers[0].requests >= min(n, count))  # type: ignore[misc]
        text = capfd.readouterr().err
        assert text.count("\n") <= 2, text  # one at most, but for what happens in the same turn


@pytest.mark.parametrize("threads", [1, 4])
def test_a_wsgi_worker_without_descriptors_serves_all_as_they_get_free(threads: int) -> None:
    """S9, T3."""
    pytest.importorskip("waitress")
    with (
        Server(wsgi, ANY_PORT, workers=1, threads=threads, on_worker_start=leave_room_for(14)) as server,
        contextlib.ExitStack() as opened,
    ):
        clients = [opened.enter_context(connect(server)) for _ in range(25)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: server.stats().workers[0].requests >= 3)
        assert server.stats().workers[0].requests < 25
        for client in clients:
            assert client.recv(8) == b"HTTP/1.1"
            client.close()  # which lets the next one in


#: The end of a program that has made its `server`: it serves with no descriptor left.
SERVES_AT_ITS_LIMIT = """
import resource
server.start()
taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(40)]
highest = max(int(name) for name in os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (highest, 4096))
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    log.info("full", extra={"event": "full"})
server.wait(60)
"""


def test_a_server_without_descriptors_hands_over_all_the_same(tmp_path: Path) -> None:
    """S9, T3, where the server accepts."""
    body = 'server = fdpool.Server(pid, "127.0.0.1:0", workers=2, dispatch="handoff")'
    with program(tmp_path, body + SERVES_AT_ITS_LIMIT) as server:
        port = port_in(server.expect("started"))
        server.expect("full")
        workers = {record["worker_pid"] for record in server.heard if record["event"] == "worker_ready"}
        begun = time.monotonic()
        while time.monotonic() - begun < 1.2:  # longer than the server leaves its workers unwatched
            clients = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(20)]
            for client in clients:
                client.sendall(b"x")
            assert {int(read_all(client)) for client in clients} <= workers
            for client in clients:
                client.close()


def test_a_server_without_descriptors_gives_the_silent_away(tmp_path: Path) -> None:
    """S9, T3: or those who have said nothing would leave no room for those who do."""
    pytest.importorskip("waitress")
    body = """
def hello(environ, start_response):
    start_response("200 OK", [("Content-Length", "5")])
    return [b"hello"]

server = fdpool.Server(hello, "127.0.0.1:0", workers=2, dispatch="handoff")
"""
    with program(tmp_path, body + SERVES_AT_ITS_LIMIT) as server, contextlib.ExitStack() as clients:
        port = port_in(server.expect("started"))
        server.expect("full")
        silent = [clients.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(20)]
        for client in [*silent[10:], *silent[:10]]:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_all(client).endswith(b"hello")


def test_more_workers_than_descriptors_allow_are_refused_in_plain_words(tmp_path: Path) -> None:
    """S14."""
    body = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
    try:
        fdpool.Server(pid, "127.0.0.1:0", workers=300).start()
    except fdpool.ServerFailed as error:
        log.info(str(error), extra={"event": "refused"})
    """
    with program(tmp_path, body) as server:
        said = server.expect("refused")["text"]
        assert "300 workers" in said
        assert "256" in said
        assert "ulimit -n" in said
        assert server.wait() == 0


@pytest.mark.parametrize("dispatch", ["shared", "handoff", "reuseport"])
def test_ten_thousand_descriptors_of_the_program_are_in_nobodys_way(dispatch: str, tmp_path: Path) -> None:
    """S14: select(2) ends at 1,024; and a worker has none of them, nor the time that to close them takes."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 12_000:
        pytest.skip("this machine allows fewer")
    body = f"""
    import resource

    def count(connection, address):
        connection.recv(10)
        connection.sendall(b"%d" % len(os.listdir("/dev/fd")))

    resource.setrlimit(resource.RLIMIT_NOFILE, (12_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(10_000)]
    fdpool.Server(count, "127.0.0.1:0", workers=2, dispatch={dispatch!r}).run()
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        for _ in range(3):
            assert int(ask_port(port)) < 100
            server.signal(signal.SIGHUP)
            server.expect("reloaded")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def at_standard_numbers(pid: int) -> dict[int, str]:
    """What a process has there, but for stdout."""
    found = {}
    for number in (0, 2):
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
def test_with_standard_streams_closed_nothing_of_the_servers_has_their_numbers(
    dispatch: str, tmp_path: Path
) -> None:
    """R2: a `print` would write into it."""
    body = f"""
    os.close(0), os.close(2)
    sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=2, dispatch="{dispatch}").run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        for _ in range(3):
            assert ask_port(port)
            # What it opens has the lowest number for a moment, before it is moved.
            try:
                wait_until(lambda: not at_standard_numbers(server.pid))
            except AssertionError:
                pytest.fail(f"there stays {at_standard_numbers(server.pid)}")
            server.signal(signal.SIGHUP)
            server.expect("reloaded")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.usefixtures("raising_log")
def test_a_log_handler_that_raises_is_told_of_and_the_server_goes_on() -> None:
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        [victim] = pids(server)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: pids(server) not in ([], [victim]))
        server.reload()
        assert ask(server)
        loop = server._loop
    assert loop is not None
    assert loop.exit_code == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_log_handler_that_raises_in_a_worker_costs_it_no_thread(threads: int) -> None:
    with Server(
        fail_or_pid, ANY_PORT, workers=1, threads=threads, on_worker_start=have_log_raise, interface="handler"
    ) as server:
        [pid] = pids(server)
        for _ in range(3):
            with connect(server) as client:
                client.sendall(b"fail")
                assert is_over(client)
        assert ask(server)[0] == pid


def test_a_server_that_cannot_clear_up_is_over_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(echo_pid, ANY_PORT, workers=1)
    server.start()
    loop, listeners = server._loop, server._listeners
    assert loop is not None
    assert listeners is not None
    with records(caplog) as logged, pytest.MonkeyPatch.context() as patch:
        patch.setattr(listeners, "close", lambda keep_path: os.unlink("/no such file"))
        server.stop(0)
        assert "No such file" in logged("failed")[0].getMessage()
    assert (loop.is_running, loop.exit_code) == (False, 70)
    listeners.close()
    loop.turns.close()
    loop._task.app.close()


def test_a_worker_that_cannot_boot_says_why_to_who_starts_the_server() -> None:
    def refuse(worker: ServerWorker) -> None:
        raise RuntimeError("no database")

    server = Server(echo_pid, ANY_PORT, workers=1, boot_limit=1, on_worker_start=refuse)
    with pytest.raises(ServerFailed, match="RuntimeError: no database"):
        server.start()


def test_an_asgi_application_that_fails_at_its_start_says_why_to_who_starts_the_server() -> None:
    pytest.importorskip("uvicorn")

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        said = "Traceback (most recent call last):\n  ...\nRuntimeError: no database\n"
        await send({"type": "lifespan.startup.failed", "message": said})

    server = Server(refuse, ANY_PORT, workers=1, boot_limit=1)
    with pytest.raises(ServerFailed, match=r"failed at its start \(lifespan\): RuntimeError: no database"):
        server.start()


# -- who holds what ----------------------------------------------------------------------------------------


def test_a_worker_holds_nothing_of_its_siblings_or_of_the_server() -> None:
    """P12, T21: two of the same kind hold as many descriptors, however many there are."""

    def count(connection: socket.socket, _: object) -> None:
        worker = current_worker()
        assert worker is not None
        held = sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")[:-1])
        assert not any("fdpool-board" in each for each in held)
        kinds = [each.partition(":")[0] for each in held]
        connection.sendall(b"%d %d" % (worker.slot, kinds.count("socket")))

    seen: dict[int, int] = {}
    with Server(count, ANY_PORT, workers=4) as server:
        wait_until(lambda: seen.update([(s, int(n)) for s, n in [ask(server, b"")]]) or len(seen) == 4, 60)
    assert len(set(seen.values())) == 1
    assert seen[0] <= 5  # the listener, its control stream, the pool's inbox, the connection


def test_a_worker_cannot_cut_the_memory_that_the_server_looks_at(tmp_path: Path) -> None:
    """A shrunk file under a mapping is SIGBUS for who reads it; here, for the server's whole process."""
    body = """
    def cut_all(connection, address):
        connection.recv(100)
        refused = []
        for number in map(int, os.listdir("/proc/self/fd")):
            try:
                what = os.readlink(f"/proc/self/fd/{number}")
                if "fdpool-" in what:
                    os.ftruncate(number, 0)
            except PermissionError:
                refused.append(what)
            except FileNotFoundError:
                pass  # what listed the folder
        connection.sendall(b"%d" % (os.getpid() if any("fdpool-server" in what for what in refused) else 0))

    sys.exit(fdpool.Server(cut_all, "127.0.0.1:0", workers=1).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        worker = ask_port(port)
        assert worker > 0
        assert ask_port(port) == worker  # both go on
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_forked_child_of_the_server_leaves_it_alone(dispatch: Any) -> None:
    with Server(echo_pid, ANY_PORT, workers=1, dispatch=dispatch) as server:
        orders = [server.reload, partial(server.scale, 3), server.upgrade, server.reopen_logs, server.stats]
        child = os.fork()
        if child == 0:
            refused = 0
            try:
                server.stop(0)
                for order in orders:
                    with pytest.raises(ForkedPool, match="make a new Server"):
                        order()
                    refused += 1
            finally:
                os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(orders)
        assert ask(server)[0] in pids(server)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_asgi_worker_that_uvicorn_ends_by_itself_polls_nothing_that_is_closed(
    loop: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip(loop)

    async def slow_to_end(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await asgi(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.sleep(0.3)
        await send({"type": "lifespan.shutdown.complete"})

    options = {"loop": loop, "limit_max_requests": 1}
    with Server(slow_to_end, ANY_PORT, workers=1, options=options) as server:
        [first] = pids(server)
        assert get(server)[0] == 200
        wait_until(lambda: first not in pids(server) or ask_in_vain(server))
    assert "Bad file descriptor" not in capfd.readouterr().err


def ask_in_vain(server: Server) -> bool:
    """Have somebody come; False."""
    connect(server).close()
    return False
