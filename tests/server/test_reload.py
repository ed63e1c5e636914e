"""Replacing workers while clients keep coming: no request fails, no connection is reset (S1, S2, S3, S7)."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from fdpool import ReloadFailed
from fdpool._server.states import State
from fdpool.server import Server, ServerWorker, current_worker
from tests.process_state import wait_until
from tests.server.applications import (
    asgi,
    asgi_in_asyncio,
    boot_for_long_at_first,
    close_idle_after,
    echo_pid,
    wsgi,
)
from tests.server.helpers import (
    ANY_PORT,
    KeptAlive,
    Load,
    ask,
    connect,
    is_over,
    pids,
    port_of,
    read_all,
    records,
)

APPS = [
    pytest.param(asgi, None, id="asgi"),
    pytest.param(asgi_in_asyncio, None, id="asgi-asyncio"),
    pytest.param(wsgi, None, id="wsgi"),
    pytest.param(wsgi, 1, id="wsgi-1-thread"),
]

# Of ASGI, uvloop accepts by itself, and asyncio's loop has connections from the same door as those handed over; of WSGI
# threads have no part in where a connection comes from.
WAYS_IN = [
    pytest.param(asgi, None, "shared", id="asgi-shared"),
    pytest.param(asgi, None, "handoff", id="asgi-handoff"),
    pytest.param(asgi_in_asyncio, None, "shared", id="asgi-asyncio-shared"),
    pytest.param(wsgi, None, "shared", id="wsgi-shared"),
    pytest.param(wsgi, 1, "handoff", id="wsgi-1-thread-handoff"),
]


def need(app: Any) -> None:
    pytest.importorskip("waitress" if app is wsgi else "uvicorn")


def loop_of(app: Any) -> dict[str, Any]:
    return {"loop": "asyncio"} if app is asgi_in_asyncio else {}


def patient(app: Any) -> dict[str, Any]:
    """Arguments with which an idle connection is kept for longer than a busy machine may keep a test waiting."""
    if app is wsgi:
        return {"on_worker_start": partial(close_idle_after, 60.0)}
    return {"options": {"timeout_keep_alive": 60, **loop_of(app)}}


@pytest.mark.parametrize("dispatch", ["shared", "reuseport"])
def test_reloading_under_load_loses_no_connection(dispatch: Any) -> None:
    """S1."""
    with Server(echo_pid, ANY_PORT, workers=2, dispatch=dispatch) as server:
        with Load(lambda: ask(server)[0]) as load:
            for generation in (1, 2, 3):
                if generation > 1:
                    assert server.reload().result(60) == generation
                # Whoever is quicker takes a connection: on a busy machine that may be one of them many times in a row.
                wait_until(lambda: load.answered.keys() >= set(pids(server)) or load.failed, 60)
        assert load.failed == []
        assert len(load.answered) == 6


@pytest.mark.parametrize(("app", "threads"), APPS)
def test_reloading_under_load_loses_no_request_of_connections_that_are_kept(
    app: Any, threads: int | None
) -> None:
    """S1, S7: an answer that ends a connection says so, before anybody sends on it in vain."""
    need(app)
    with Server(app, ANY_PORT, workers=2, threads=threads, **patient(app)) as server:
        with KeptAlive(server) as request, Load(request) as load:
            for _ in range(2):
                load.go_on()
                server.reload().result(60)
            load.go_on()
        assert load.failed == []
        assert len(load.answered) >= 3


@pytest.mark.parametrize(("app", "threads"), APPS)
def test_a_kept_connection_is_answered_once_more_and_told_to_close(app: Any, threads: int | None) -> None:
    """S7."""
    need(app)
    with Server(app, ANY_PORT, workers=1, threads=threads, **patient(app)) as server:
        client = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
        client.request("GET", "/")
        response = client.getresponse()
        old = int(response.read())
        assert response.getheader("connection") != "close"
        server.reload().result(60)
        wait_until(lambda: old not in pids(server))
        client.request("GET", "/")
        response = client.getresponse()
        assert int(response.read()) == old
        assert response.getheader("connection") == "close"
        client.request("GET", "/")  # http.client connects anew
        assert int(client.getresponse().read()) in pids(server)
        client.close()


@contextlib.contextmanager
def idle_connections(server: Server) -> Iterator[list[socket.socket]]:
    """One that was answered and is kept, and one on which nothing was sent; the server has taken both."""
    kept = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    with connect(server) as silent, contextlib.closing(kept):
        kept.request("GET", "/")
        kept.getresponse().read()
        yield [silent, kept.sock]


@pytest.mark.parametrize(("app", "threads", "dispatch"), WAYS_IN)
def test_the_end_of_the_server_does_not_wait_for_idle_connections(
    app: Any, threads: int | None, dispatch: Any
) -> None:
    """Nobody else would answer on them."""
    need(app)
    with Server(
        app, ANY_PORT, workers=1, threads=threads, dispatch=dispatch, grace=60, **patient(app)
    ) as server:
        with idle_connections(server) as clients:
            server.stop(wait=False)
            has_ended = server.wait(30)
            server.stop(0)  # a test that fails need not take the minute
            assert has_ended
            assert all(map(is_over, clients))


@pytest.mark.parametrize(("app", "threads", "dispatch"), WAYS_IN)
def test_a_worker_that_drains_closes_idle_connections_after_their_time(
    app: Any, threads: int | None, dispatch: Any
) -> None:
    """Also one on which nobody has ever sent anything, which uvicorn itself would keep for good."""
    need(app)

    quick = partial(close_idle_after, 0.3) if app is wsgi else None
    options = {} if app is wsgi else {"timeout_keep_alive": 0.3, **loop_of(app)}
    with Server(
        app,
        ANY_PORT,
        workers=1,
        threads=threads,
        dispatch=dispatch,
        options=options,
        grace=60,
        on_worker_start=quick,
    ) as server:
        [old] = pids(server)
        with idle_connections(server) as clients:
            server.reload().result(60)
            try:
                wait_until(lambda: not psutil.pid_exists(old))
            finally:
                server.stop(0)
            assert all(map(is_over, clients))


@pytest.mark.parametrize(("app", "threads"), APPS)
def test_a_session_of_requests_goes_on_through_a_reload(app: Any, threads: int | None) -> None:
    """With connections that are kept, and bodies that the application does not read."""
    need(app)
    with (
        Server(app, ANY_PORT, workers=2, threads=threads, options=loop_of(app)) as server,
        requests.Session() as session,
    ):
        url = f"http://127.0.0.1:{port_of(server)}/"
        before = set(pids(server))
        assert int(session.get(url).text) in before
        reload = server.reload()
        while not reload.done():
            assert session.get(url).status_code == session.post(url, data=bytes(100_000)).status_code == 200
        session.get(url)  # a kept connection to an old worker ends with the next answer at the latest
        after = {int(session.get(url).text) for _ in range(10)}
    assert not before & after


@pytest.mark.parametrize(("app", "threads"), APPS)
def test_a_request_in_flight_is_finished_by_the_worker_that_has_begun_it(
    app: Any, threads: int | None
) -> None:
    """S7."""
    need(app)
    with Server(app, ANY_PORT, workers=1, threads=threads, options=loop_of(app)) as server:
        client = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
        client.request("GET", "/sleep/0.5")
        wait_until(lambda: (worker := server.stats().workers[0]).in_flight or worker.requests)
        old = pids(server)
        server.reload().result(60)
        response = client.getresponse()
        assert response.status == 200
        assert [int(response.read())] == old
        client.close()


def test_a_stream_that_outlasts_the_grace_is_cut_off() -> None:
    """S7: a deadline for those who never end."""
    pytest.importorskip("uvicorn")
    with Server(asgi, ANY_PORT, workers=1, grace=0.3) as server:
        client = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
        client.request("GET", "/stream/10000")
        response = client.getresponse()
        assert response.read(5) == b"tick\n"
        server.reload().result(60)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        client.close()
        wait_until(lambda: len(server.stats().workers) == 1)


@pytest.mark.parametrize("dispatch", ["shared", "handoff", "reuseport"])
def test_a_reload_loses_no_connection_that_waits_behind_busy_workers(dispatch: Any, tmp_path: Path) -> None:
    """S1: nor the request that was sent with it. Of two bare listeners with SO_REUSEPORT, one that is closed takes what
    waits at it along."""

    def wait_to_be_let(connection: socket.socket, address: object) -> None:
        worker = current_worker()
        assert worker is not None
        while not (tmp_path / f"go-{worker.generation}").exists():
            time.sleep(0.01)
        echo_pid(connection, address)

    with Server(wait_to_be_let, ANY_PORT, workers=2, dispatch=dispatch, grace=60) as server:
        old = pids(server)
        with contextlib.ExitStack() as opened:
            clients = [opened.enter_context(connect(server)) for _ in range(40)]
            for number, client in enumerate(clients):
                client.sendall(b"%d" % number)
            wait_until(lambda: [each.in_flight for each in server.stats().workers] == [1, 1])
            assert server.reload().result(60) == 2
            (tmp_path / "go-1").touch()
            wait_until(
                lambda: not any(map(psutil.pid_exists, old))
            )  # and with them all that was theirs alone
            (tmp_path / "go-2").touch()
            answers = [read_all(client).split() for client in clients]
        assert [int(said) for _, said in answers] == list(range(40))
        answered_by = Counter(int(pid) for pid, _ in answers)
        assert [answered_by[pid] for pid in old] == [1, 1]


# -- new code ------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `served` that can be rewritten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # One of the same second and size would be taken for it.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    path = tmp_path / "served.py"
    path.write_text(version(1))
    return path


def version(number: int, before: str = "") -> str:
    return f"{before}\ndef app(connection, address):\n    connection.sendall(b'0 version {number}')\n"


@pytest.mark.parametrize("preload", [False, True])
def test_a_reload_brings_new_code(module: Path, preload: bool) -> None:
    with Server("served:app", ANY_PORT, workers=2, preload=preload) as server:
        assert ask(server, b"")[1] == b"version 1"
        module.write_text(version(2))
        assert ask(server, b"")[1] == b"version 1"
        server.reload().result(60)
        assert {ask(server, b"")[1] for _ in range(10)} == {b"version 2"}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("import no_such_module", "no_such_module"),
        ("this is no python", "SyntaxError"),
        ("raise SystemExit(3)", "exited with code 3"),
        ("import os; os._exit(3)", "code 3"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("del app", "has no 'app'"),
    ],
)
def test_broken_new_code_leaves_the_old_at_work_and_is_reported(
    module: Path, broken: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S2."""
    with records(caplog) as logged, Server("served:app", ANY_PORT, workers=2) as server:
        before = pids(server)
        module.write_text(broken if not broken.startswith("del") else "other = 1")
        with pytest.raises(ReloadFailed, match=reason), Load(lambda: ask(server, b"")[1], clients=2) as load:
            server.reload().result(60)
        assert load.failed == []
        assert set(load.answered) <= {b"version 1"}
        assert pids(server) == before
        assert [each.generation for each in logged("reload_failed")] == [2]
        module.write_text(version(3))
        assert server.reload().result(60) == 3
        assert ask(server, b"")[1] == b"version 3"


@pytest.mark.parametrize("preload", [False, True])
def test_a_failed_import_is_logged_with_its_traceback(
    module: Path, preload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: also where it is the supervisor that imports it."""
    with records(caplog) as logged, Server("served:app", ANY_PORT, workers=1, preload=preload) as server:
        module.write_text(version(2, "import no_such_module"))
        server.reload().exception(60)
        [failed] = logged("worker_failed")
        assert "No module named 'no_such_module'" in failed.reason
        assert 'served.py", line 1' in failed.traceback
        assert failed.traceback in failed.getMessage()


@pytest.mark.parametrize("preload", [False, True])
def test_new_code_that_hangs_at_import_is_ended_at_the_boot_deadline_and_shows_where(
    module: Path, preload: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2, W6: also where it hangs in the supervisor, before any worker is there."""
    # That the supervisor does nothing is not seen sooner.
    monkeypatch.setattr("fdpool._lifetime._LEAVE_S", 1.0)
    # A worker that is asked where it is may wait for a core until it can say so.
    monkeypatch.setattr("fdpool._server.crew._STACKS_S", 1.0)
    hangs = "import pathlib, threading\npathlib.Path(__file__ + '.hangs').touch()\nthreading.Event().wait()"
    with records(caplog) as logged:
        with Server("served:app", ANY_PORT, workers=1, preload=preload) as server:
            module.write_text(version(2, hangs))
            reload = server.reload()
            wait_until(module.with_name("served.py.hangs").exists)
            if not preload:  # the server is to know the process that it asks for its stacks
                wait_until(lambda: all(each.pid is not None for each in server.stats().workers))
            let_time_pass(server)
            with pytest.raises(ReloadFailed, match="boot_timeout=60"):
                reload.result(60)
            assert ask(server, b"")[1] == b"version 1"
        [killed] = logged("worker_killed")
        if preload:
            assert "its supervisor still imports what is preloaded" in killed.getMessage()
        else:
            assert "served.py" in killed.stacks
            assert f"{os.sep}fdpool{os.sep}" not in killed.stacks  # no frames and threads of ours


def let_time_pass(server: Server) -> None:
    """Have the deadline of all that boots be over, as the plan sees it."""
    loop = server._loop
    assert loop is not None

    def expire() -> None:
        for worker in loop._plan.workers.values():
            if worker.state is State.BOOTING:
                worker.deadline = 0.0

    loop.turns.post(expire)


def test_a_reload_has_as_many_workers_boot_at_a_time_as_it_was_told_and_no_more(tmp_path: Path) -> None:
    """In one step of the plan all are started that may be, so nobody is late."""

    def wait_to_be_let(worker: ServerWorker) -> None:
        (tmp_path / f"boots-{worker.pid}").touch()
        while worker.generation > 1 and not (tmp_path / f"go-{worker.pid}").exists():
            time.sleep(0.01)

    def held() -> set[str]:
        """Those that have come to the hook and were not let go."""
        names = [path.name.split("-") for path in tmp_path.iterdir()]
        return {pid for what, pid in names if what == "boots"} - {pid for what, pid in names if what == "go"}

    def in_state(state: str) -> int:
        return sum(each.state == state for each in server.stats().workers)

    with Server(echo_pid, ANY_PORT, workers=4, reload_batch=2, on_worker_start=wait_to_be_let) as server:
        for pid in held():
            (tmp_path / f"go-{pid}").touch()
        reload = server.reload()
        for left in (4, 3, 2, 1):
            boot = min(2, left)
            wait_until(lambda boot=boot: len(held()) == boot == in_state("booting"), 60)  # type: ignore[misc]
            wait_until(lambda: len(pids(server)) == 4)  # a moment ago there may have been one more
            (tmp_path / f"go-{min(held())}").touch()
            wait_until(lambda left=left: newer(server) == 5 - left, 60)  # type: ignore[misc]
        assert reload.result(60) == 2


def newer(server: Server) -> int:
    """How many of the second generation serve."""
    return sum(each.generation == 2 and each.state == "serving" for each in server.stats().workers)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_hook_can_call_a_reload_off(error: type[BaseException]) -> None:
    def refuse(generation: int) -> None:
        raise error(f"not {generation}")

    with Server(echo_pid, ANY_PORT, workers=1, on_reload=refuse) as server:
        before = pids(server)
        with pytest.raises(ReloadFailed, match=f"{error.__name__}: not 2"):
            server.reload().result(60)
        assert pids(server) == before


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_hook_that_fails_as_the_server_is_ready_ends_nothing(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("not today")

    with Server(echo_pid, ANY_PORT, workers=1, on_ready=fail) as server:
        assert [ask(server)[0]] == pids(server)


def test_nobody_can_cancel_a_reload() -> None:
    async def give_up_waiting(reload: Future[int]) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(reload), 0)

    with Server(echo_pid, ANY_PORT, workers=1) as server:
        reload = server.reload()
        asyncio.run(give_up_waiting(reload))
        assert not reload.cancel()
        assert reload.result(60) == 2
        assert server.reload().result(60) == 3
        assert ask(server)


def test_a_server_that_gives_up_closes_its_listeners(module: Path) -> None:
    with Server("served:app", ANY_PORT, workers=1, boot_limit=1) as server:
        address = server.sockets[0].getsockname()
        module.write_text("this is no python")
        os.kill(pids(server)[0], signal.SIGKILL)
        assert server.wait(30)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


# -- several things at once ---------------------------------------------------------------------------


def test_of_several_reloads_the_last_wins_and_all_get_its_outcome(tmp_path: Path) -> None:
    """S3."""

    def boot_when_all_are_asked_for(worker: ServerWorker) -> None:
        boot_for_long_at_first(worker)
        while worker.generation > 2 and not (tmp_path / "go").exists():
            time.sleep(0.01)

    with (
        Server(echo_pid, ANY_PORT, workers=2, on_worker_start=boot_when_all_are_asked_for) as server,
        Load(lambda: ask(server)[0], clients=2) as load,
    ):
        reloads = [server.reload()]
        wait_until(lambda: any(each.generation == 2 for each in server.stats().workers))
        reloads += [server.reload() for _ in range(5)]
        wait_until_all_have_begun(server)
        (tmp_path / "go").touch()
        last = reloads[-1].result(60)
        assert last >= 3
        assert [each.result(60) for each in reloads] == [last] * 6
        assert {each.generation for each in server.stats().workers if each.state == "serving"} == {last}
    assert load.failed == []


def wait_until_all_have_begun(server: Server) -> None:
    """Return when no reload that was asked for waits for its turn."""
    loop = server._loop
    assert loop is not None
    heard = threading.Event()
    loop.turns.post(heard.set)  # after all of them
    assert heard.wait(30)
    wait_until(lambda: not loop._joined)


def test_reloads_that_come_in_a_flood_are_few() -> None:
    """S3: each costs an interpreter, so that a flood would keep the server from everything else."""
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        reloads = [server.reload() for _ in range(200)]
        assert max(reload.result(60) for reload in reloads) < 20
        assert server.stats().started < 20


def test_who_boots_and_is_not_wanted_any_more_takes_nobody_along() -> None:
    """S3: there is no process to kill before it has said hello, and its generation has others who serve."""
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        before = pids(server)
        for _ in range(5):
            server.scale(3)
            server.scale(1)
        wait_until(lambda: len(server.stats().workers) == 1)
        assert pids(server) == before
        server.scale(3)
        reload = server.reload()
        server.scale(1)
        assert reload.result(60) == 2
        assert server.stats().generation == 2


def test_scaling_during_a_reload_loses_nothing() -> None:
    """S3."""
    with Server(echo_pid, ANY_PORT, workers=2) as server:
        with Load(lambda: ask(server)[0], clients=2) as load:
            reload = server.reload()
            server.scale(4)
            assert reload.result(60) == 2
            wait_until(lambda: len(pids(server)) == 4)
            server.scale(1)
            wait_until(lambda: len(server.stats().workers) == 1)
            load.go_on()
        assert load.failed == []


def test_a_stop_during_a_reload_ends_both() -> None:
    """S3."""
    with Server(echo_pid, ANY_PORT, workers=2, on_worker_start=boot_for_long_at_first) as server:
        reload = server.reload()
        server.stop()
        with pytest.raises(ReloadFailed):
            reload.result(0)
        with pytest.raises(ReloadFailed, match="has ended"):
            server.reload().result(0)


def test_workers_that_came_and_went_leave_nothing_open() -> None:
    """The autouse fixture sees what is left at the end; this sees what piles up meanwhile."""
    with Server(echo_pid, ANY_PORT, workers=2) as server:
        server.reload().result(60)
        wait_until(lambda: len(server.stats().workers) == 2)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            server.reload().result(60)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def ask_at(host: str, port: int) -> int:
    """The pid of the worker that answers one connection there."""
    with socket.create_connection((host, port), 20) as client:
        client.sendall(b"x")
        return int(read_all(client).partition(b" ")[0])


def test_listeners_apart_at_all_addresses_have_every_worker_serve_both_families() -> None:
    """Where there are both."""
    with Server(echo_pid, ":0", workers=3, dispatch="reuseport") as server:
        for host in ("127.0.0.1", "::1") if "[::]" in server.addresses[0] else ("127.0.0.1",):
            with Load(partial(ask_at, host, port_of(server))) as load:
                wait_until(lambda load=load: load.failed or set(pids(server)) <= set(load.answered))
            assert load.failed == []


@pytest.mark.parametrize("dispatch", ["shared", "handoff", "reuseport"])
def test_workers_more_that_cannot_boot_cost_no_connection(dispatch: Any, module: Path) -> None:
    code = "from tests.server.applications import echo_pid as app\n"
    module.write_text(code)
    with Server("served:app", ANY_PORT, workers=2, dispatch=dispatch) as server:
        module.write_text("this is no python")
        server.scale(4)
        wait_until(lambda: server.stats().started > 4)  # those have failed
        assert {ask(server)[0] for _ in range(20)} <= set(pids(server))
        module.write_text(code)
        wait_until(lambda: len(pids(server)) == 4, 60)
        wait_until(lambda: ask(server)[0] in pids(server)[2:], 60)


def test_scaling_down_with_listeners_apart_leaves_no_connection_to_nobody() -> None:
    """S1, S3: the kernel chooses among the listeners that somebody accepts from; the others stay, and are empty."""
    with Server(echo_pid, ANY_PORT, workers=4, dispatch="reuseport") as server:
        with Load(lambda: ask(server)[0]) as load:
            load.go_on()
            server.scale(1)
            wait_until(lambda: len(server.stats().workers) == 1)
            load.go_on(60)
            server.scale(3)
            wait_until(lambda: len(pids(server)) == 3)
            now = set(pids(server))
            load.answered.clear()
            wait_until(lambda: load.failed or now <= set(load.answered))
        assert load.failed == []


def test_workers_that_were_too_many_for_a_moment_get_connections_again() -> None:
    """S3: with listeners apart, also where none of them had begun to leave."""
    with Server(echo_pid, ANY_PORT, workers=4, dispatch="reuseport") as server:
        before = set(pids(server))
        server.scale(1)
        server.scale(4)
        with Load(lambda: ask(server)[0]) as load:
            wait_until(lambda: load.failed or before <= set(load.answered))
        assert load.failed == []
        assert before == set(pids(server))


@pytest.mark.parametrize("orders", [(2, 3), (2, 3, 1)])
def test_a_worker_too_many_by_two_orders_leaves_none_that_waits_at_its_listener(
    orders: tuple[int, ...],
) -> None:
    """S3: whichever of the orders it was that gave it up."""
    with Server(echo_pid, ANY_PORT, workers=4, dispatch="reuseport") as server, contextlib.ExitStack() as end:
        clients = []
        while not server._opened().queued_above(3):
            clients.append(
                end.enter_context(connect(server))
            )  # which say nothing before the orders are given
        for wanted in orders:
            server.scale(wanted)
        wait_until(lambda: server.stats().wanted == orders[-1])
        for client in clients:
            client.sendall(b"x")
        assert all(read_all(client) for client in clients)
        wait_until(lambda: len(server.stats().workers) == orders[-1])
