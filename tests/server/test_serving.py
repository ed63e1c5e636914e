"""What a server does for each kind of application, address and way to begin."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import signal
import socket
import socketserver
import ssl
import threading
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import psutil
import pytest

from fdpool import NotPicklable, ServerFailed
from fdpool.server import Server, ServerWorker, current_worker
from tests.process_state import wait_until
from tests.server.applications import asgi, asgi_answering, echo_pid, keep_echoing, sleep_and_tell, wsgi
from tests.server.helpers import (
    ANY_PORT,
    WAYS_INTO_ASGI,
    ask,
    connect,
    get,
    is_over,
    pids,
    read_all,
    records,
)
from tests.server.programs import port_in, program


class Upper(socketserver.StreamRequestHandler):
    """A handler as `socketserver` has them."""

    def handle(self) -> None:
        line = self.rfile.readline()
        self.wfile.write(b"%d %s" % (os.getpid(), line.upper()))


# -- kinds of applications ---------------------------------------------------------------------------


def test_a_function_serves_connections_in_every_worker() -> None:
    with Server(echo_pid, ANY_PORT, workers=2) as server:
        seen: set[int] = set()
        wait_until(lambda: seen.add(ask(server)[0]) or len(seen) == 2, 60)  # type: ignore[func-returns-value]
        assert seen == set(pids(server))
        assert os.getpid() not in seen


def test_a_closure_of_the_program_serves_too() -> None:
    greeting = b"0 from a closure"

    def greet(connection: socket.socket, _: object) -> None:
        connection.sendall(greeting)

    with Server(greet, ANY_PORT, workers=1) as server:
        assert ask(server, b"") == (0, b"from a closure")


def test_a_socketserver_class_serves() -> None:
    with Server(Upper, ANY_PORT, workers=1) as server:
        assert ask(server, b"line\n")[1] == b"LINE\n"


@pytest.mark.parametrize("app", [asgi, wsgi])
def test_an_http_application_serves(app: Any) -> None:
    pytest.importorskip("uvicorn" if app is asgi else "waitress")
    with Server(app, ANY_PORT, workers=2) as server:
        status, body, _ = get(server)
        assert status == 200
        assert int(body) in pids(server)


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_request_is_served_in_whatever_pieces_it_comes(threads: int, dispatch: Any) -> None:
    """Waitress is given what came with the connection at once, which may be nothing, a part, or the end."""
    pytest.importorskip("waitress")
    with Server(wsgi, ANY_PORT, workers=1, threads=threads, dispatch=dispatch) as server:
        connect(server).close()
        with connect(server) as silent, connect(server) as halved, connect(server) as several:
            several.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + b"GET / HTTP/1.0\r\n\r\n")
            assert read_all(several).count(b"200 OK") == 3
            halved.sendall(b"GET / HT")
            assert get(server)[0] == 200
            halved.sendall(b"TP/1.0\r\n\r\n")
            assert b"200 OK" in read_all(halved)
            silent.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"200 OK" in read_all(silent)


@pytest.mark.parametrize(("loop", "dispatch"), [*WAYS_INTO_ASGI, ("asyncio", "reuseport")])
def test_an_answer_of_an_asgi_application_does_not_wait_for_its_client_to_acknowledge(
    loop: str, dispatch: Any
) -> None:
    """As kernels have it by default (RFC 896), and clients take 40 ms for that (RFC 1122, 4.2.3.2)."""
    pytest.importorskip("uvicorn")

    def nodelay(scope: Any) -> bytes:
        connections = psutil.Process().net_connections("tcp")
        [fd] = [each.fd for each in connections if tuple(each.raddr) == tuple(scope["client"])]
        with socket.socket(fileno=os.dup(fd)) as connection:
            return b"%d" % bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    app = asgi_answering(nodelay)
    with Server(app, ANY_PORT, workers=1, dispatch=dispatch, options={"loop": loop}) as server:
        assert get(server)[1] == b"1"


@pytest.mark.parametrize(
    ("options", "client"),
    [
        ({}, b"192.0.2.7 https"),  # uvicorn trusts this machine
        ({"forwarded_allow_ips": "192.0.2.1"}, b"127.0.0.1 http"),
        ({"proxy_headers": False}, b"127.0.0.1 http"),
        ({"proxy_headers": True, "forwarded_allow_ips": "*"}, b"192.0.2.7 https"),
    ],
)
def test_an_asgi_application_sees_whom_a_trusted_proxy_forwards_for(
    options: dict[str, object], client: bytes
) -> None:
    pytest.importorskip("uvicorn")

    tell_client = asgi_answering(lambda scope: f"{scope['client'][0]} {scope['scheme']}".encode())
    patient = {"timeout_keep_alive": 60}  # however late the second request is
    with Server(tell_client, ANY_PORT, workers=1, options=patient | options) as server:
        connection = http.client.HTTPConnection(*server.sockets[0].getsockname())
        with contextlib.closing(connection):
            for forwarded, seen in (
                ({}, b"127.0.0.1 http"),
                ({"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"}, client),
            ):
                connection.request("GET", "/", headers={"Accept": "*/*", **forwarded})
                assert connection.getresponse().read() == seen


def test_uvicorn_looks_at_no_other_headers_of_proxies_than_it_is_asked_for() -> None:
    pytest.importorskip("uvicorn")
    from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

    from fdpool._server import asgi as face

    constants = ProxyHeadersMiddleware.__call__.__code__.co_consts
    assert {each for each in constants if isinstance(each, bytes) and b"forwarded" in each} == face._FORWARDED


def test_uvicorn_puts_together_no_trace_that_nobody_reads() -> None:
    answer = asgi_answering(lambda _: b"%d" % logging.getLogger("uvicorn.error").level)

    async def tell_level(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            logging.getLogger().setLevel(logging.DEBUG)  # as an application may that sets up its logs
        await answer(scope, receive, send)

    with Server(tell_level, ANY_PORT, workers=1) as server:
        assert int(get(server)[1]) == logging.DEBUG


def test_an_application_that_is_named_is_found() -> None:
    with Server("tests.server.applications:echo_pid", ANY_PORT, workers=1, preload=True) as server:
        assert ask(server)[0] in pids(server)


def test_an_application_may_accept_for_itself_and_says_when_it_is_ready() -> None:
    def serve(listeners: list[socket.socket], worker: ServerWorker) -> None:
        import selectors

        worker.ready()
        with selectors.DefaultSelector() as selector:
            selector.register(listeners[0], selectors.EVENT_READ)
            selector.register(worker, selectors.EVENT_READ)
            while not worker.draining:
                for key, _ in selector.select():
                    if key.fileobj is listeners[0]:
                        connection, _ = listeners[0].accept()
                        with connection:
                            connection.sendall(b"%d slot %d" % (worker.pid, worker.slot))

    with Server(serve, ANY_PORT, workers=1, interface="listeners") as server:
        assert ask(server, b"")[1] == b"slot 0"


def test_an_application_that_accepts_for_itself_has_a_successor_first_if_it_is_sent_sigterm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """W1, where it takes the worker."""

    def serve(listeners: list[socket.socket], worker: ServerWorker) -> None:
        worker.ready()
        worker.wait_drain()

    with records(caplog) as logged, Server(serve, ANY_PORT, workers=1, interface="listeners") as server:
        [before] = pids(server)
        os.kill(before, signal.SIGTERM)
        wait_until(lambda: logged("worker_exited"))
        assert pids(server) not in ([before], [])
        assert logged("worker_exited")[0].reason == "drained"


def test_an_application_that_only_takes_listeners_is_drained_by_sigterm() -> None:
    def serve(listeners: list[socket.socket]) -> None:
        enough: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: enough.append(1))
        listeners[0].settimeout(0.05)
        while not enough:
            try:
                connection, _ = listeners[0].accept()
            except TimeoutError:
                continue
            with connection:
                connection.sendall(b"0 served")

    with Server(serve, ANY_PORT, workers=1) as server:
        assert ask(server, b"") == (0, b"served")


@pytest.mark.parametrize(
    ("app", "error", "text"),
    [
        ("no-colon", ValueError, "'module:attribute'"),
        ("module:", ValueError, "'module:attribute'"),
        (7, TypeError, "callable"),
        (lambda: None, TypeError, "say interface="),
        (lambda connection: None, TypeError, "say interface="),
        (print, TypeError, "say interface="),
    ],
)
def test_what_is_no_application_is_refused_before_anything_is_opened(
    app: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Server(app, ANY_PORT)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"workers": 0}, ValueError),
        ({"workers": True}, TypeError),
        ({"threads": 0}, ValueError),
        ({"grace": -1}, ValueError),
        ({"boot_timeout": 0}, ValueError),
        ({"request_timeout": float("nan")}, ValueError),
        ({"max_age": "1h"}, TypeError),
        ({"max_requests": 1.5}, TypeError),
        ({"jitter": 1}, ValueError),
        ({"dispatch": "random"}, ValueError),
        ({"interface": "cgi"}, ValueError),
        ({"interface": "listeners", "dispatch": "handoff"}, ValueError),
        ({"preload": "module"}, TypeError),
        ({"preload": True}, ValueError),
        ({"bind": "nonsense"}, ValueError),
        ({"bind": []}, ValueError),
    ],
)
def test_arguments_of_no_use_are_refused_and_nothing_is_left(options: Any, error: type[Exception]) -> None:
    arguments = {"bind": ANY_PORT, **options}
    with pytest.raises(error), Server(echo_pid, **arguments):
        pass


# -- where it listens ----------------------------------------------------------------------------------


def test_it_listens_on_several_addresses_at_once(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with Server(echo_pid, [ANY_PORT, "[::1]:0", f"unix:{path}?mode=600"], workers=1) as server:
        families = [each.family for each in server.sockets]
        assert families == [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]
        for listener in server.sockets:
            with socket.socket(listener.family) as client:
                client.connect(listener.getsockname())
                client.sendall(b"hi")
                assert read_all(client).endswith(b" hi")
        assert path.stat().st_mode & 0o777 == 0o600
        assert server.addresses[2] == f"unix:{path}"
    assert not path.exists()


FRAMEWORKS = {
    "flask": """
from flask import Flask
app = Flask("shop")

@app.get("/")
def hello():
    return f"{os.getpid()}"
""",
    "starlette": """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def hello(request):
    return PlainTextResponse(f"{os.getpid()}")

app = Starlette(routes=[Route("/", hello)])
""",
}
RUN = "fdpool.Server({}, '127.0.0.1:0', workers=2).run()"


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_application_that_cannot_be_pickled_is_imported_by_the_workers(
    framework: str, guarded: bool, tmp_path: Path
) -> None:
    """From the script that has made it; which must not start a server in each of them."""
    pytest.importorskip(framework)
    pytest.importorskip("uvicorn" if framework == "starlette" else "waitress")
    guard = "if __name__ == '__main__':\n    " if guarded else ""
    with program(tmp_path, FRAMEWORKS[framework] + guard + RUN.format("app")) as server:
        if guarded:
            port = port_in(server.expect("started"))
            for generation in (1, 2):
                with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
                    client.request("GET", "/")
                    pid = int(client.getresponse().read())
                serving = [each for each in server.heard if each["event"] == "worker_ready"]
                assert pid in [each["worker_pid"] for each in serving if each["generation"] == generation]
                server.signal(signal.SIGHUP)
                server.expect("reloaded")
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
        else:
            assert "under `if __name__ == '__main__':`" in server.expect("gave_up")["reason"]
            server.wait()


@pytest.mark.parametrize("preload", [True, False])
def test_a_module_that_serves_as_it_is_imported_does_not_start_servers_without_end(
    preload: bool, tmp_path: Path
) -> None:
    body = f"fdpool.Server('program:pid', '127.0.0.1:0', workers=1, boot_limit=1, preload={preload}).run()"
    with program(tmp_path, body) as server:
        said = server.expect("gave_up")["reason"]
        assert "of module 'program' starts a server as the module is imported" in said
        server.wait()


def test_an_application_that_can_neither_travel_nor_be_imported_is_refused_at_once() -> None:
    class Holding:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
            return []

    class Unbuildable(Holding):
        def __init__(self) -> None:
            pass

        def __reduce__(self) -> Any:
            return (int, ("x",))

    for app in (Holding(), Unbuildable()):
        with pytest.raises(NotPicklable, match="module:attribute"):
            Server(app, ANY_PORT, interface="wsgi")


def a_link_local_bind() -> str | None:
    """An address that means nothing without its scope."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET6 and each.address.startswith("fe80:"):
                return f"[{each.address.partition('%')[0]}%{name}]:0"
    return None


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
@pytest.mark.parametrize(("app", "needs"), [(echo_pid, "socket"), (asgi, "uvicorn"), (wsgi, "waitress")])
def test_it_listens_at_abstract_names_and_at_addresses_with_a_scope(
    app: Any, needs: str, dispatch: Any
) -> None:
    pytest.importorskip(needs)
    name = f"fdpool-{os.getpid()}-{dispatch}"
    binds = [f"unix:@{name}", a_link_local_bind()]
    with Server(app, [bind for bind in binds if bind], workers=2, dispatch=dispatch) as server:
        for _ in range(2):
            for listener in server.sockets:
                with socket.socket(listener.family) as client:
                    client.connect(listener.getsockname())
                    client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    said = read_all(client)
                    assert any(str(pid).encode() in said for pid in pids(server)), said
            assert server.reload().result(60)
    with socket.socket(socket.AF_UNIX) as again:
        again.bind(f"\0{name}")  # it is nobody's any more


@pytest.mark.parametrize("app", [echo_pid, asgi])
def test_a_listener_that_blocks_is_served_and_its_mode_left_alone(app: Any) -> None:
    """M17: O_NONBLOCK belongs to whoever made it; workers take turns instead of blocking in accept."""

    def answers() -> int:
        return ask(server)[0] if app is echo_pid else int(get(server)[1])

    if app is asgi:
        pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as mine:
        # Not in uvloop, which makes what it polls non-blocking.
        options = {"loop": "asyncio"} if app is asgi else {}
        with Server(app, mine, workers=3, options=options) as server:
            seen = {answers() for _ in range(40)}
            assert os.get_blocking(mine.fileno())
            server.reload().result(60)  # nobody is stuck in accept
            assert not seen & set(pids(server))
            assert answers() in pids(server)
        assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert seen


def test_a_connection_that_nobody_has_accepted_is_served_after_all_workers_have_been_replaced() -> None:
    """M28: no listener is ever shut down, so its queue outlives those who accept from it."""
    with Server(keep_echoing, ANY_PORT, workers=1) as server:
        with connect(server) as first, connect(server) as second:
            first.sendall(b"one")
            assert first.recv(10) == b"one"
            second.sendall(b"two")  # in the kernel's queue, as the only worker is busy
            reload = server.reload()
            assert second.recv(10) == b"two"
            first.shutdown(socket.SHUT_WR)
            second.shutdown(socket.SHUT_WR)
            assert reload.result(60) == 2


def test_an_asgi_worker_is_handed_as_many_connections_as_it_has_descriptors_for() -> None:
    pytest.importorskip("uvicorn")
    with contextlib.ExitStack() as clients:
        with Server(
            asgi, ANY_PORT, workers=1, dispatch="handoff", options={"timeout_keep_alive": 60}
        ) as server:
            for _ in range(150):  # each stays open
                client = clients.enter_context(connect(server))
                client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.recv(8) == b"HTTP/1.1"


# With TLS all connections come by the door, in uvloop, too.
@pytest.mark.parametrize(("dispatch", "loop"), [("shared", "uvloop"), ("handoff", "asyncio")])
def test_tls_clients_that_never_finish_the_handshake_keep_no_worker_from_its_end(
    dispatch: Any, loop: str
) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip(loop)
    certificate = Path(__file__).with_name("certificate.pem")
    tls = ssl.create_default_context(cafile=str(certificate))
    options = {"loop": loop, "ssl_certfile": str(certificate), "timeout_keep_alive": 1}
    with Server(asgi, ANY_PORT, workers=1, dispatch=dispatch, options=options, grace=60) as server:

        def is_answered_by_tls() -> bool:
            with tls.wrap_socket(connect(server), server_hostname="localhost") as client:
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return b"200 OK" in read_all(client)

        with connect(server) as silent:
            silent.sendall(b"\x16")  # so that it is handed over
            assert is_answered_by_tls()  # it is taken after the silent one
            [before] = pids(server)
            assert server.reload().result(60) == 2
            assert is_over(silent)
            wait_until(lambda: not psutil.pid_exists(before))
        with connect(server) as silent:
            silent.sendall(b"\x16")
            assert is_answered_by_tls()
            server.stop(wait=False)
            assert is_over(silent)
            assert server.wait(30)


# -- beginning and end ---------------------------------------------------------------------------------


def test_a_server_serves_once() -> None:
    server = Server(echo_pid, ANY_PORT, workers=1)
    with pytest.raises(RuntimeError, match="not started"):
        server.sockets
    with server:
        with pytest.raises(RuntimeError, match="started before"):
            server.start()
    with pytest.raises(RuntimeError, match="started before"):
        server.start()
    server.stop()


def test_once_it_has_ended_nobody_is_kept_waiting_at_its_addresses(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    server = Server(echo_pid, [ANY_PORT, f"unix:{path}"], workers=1)
    server.start()
    address = server.sockets[0].getsockname()
    server.stop(wait=False)
    assert server.wait(1e11)  # more than a lock can be waited for
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert not path.exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stop_with_a_grace_of_its_own_lets_what_is_shorter_finish(threads: int) -> None:
    """However little the server's own is."""
    with Server(sleep_and_tell, ANY_PORT, workers=1, threads=threads, grace=0) as server:
        with connect(server) as client:
            client.sendall(b"0.5")
            wait_until(lambda: (worker := server.stats().workers[0]).in_flight or worker.requests)
            server.stop(60)
            assert read_all(client) == b"done"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stop_with_a_grace_of_its_own_cuts_off_what_is_longer(threads: int) -> None:
    """However much the server's own is."""
    with Server(sleep_and_tell, ANY_PORT, workers=1, threads=threads, grace=600) as server:
        with connect(server) as client:
            client.sendall(b"600")
            wait_until(lambda: server.stats().workers[0].in_flight)
            server.stop(0.1, wait=False)
            has_ended = server.wait(30)
            server.stop(0)
            assert has_ended
            assert is_over(client)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_grace_of_any_length_lets_what_runs_finish(threads: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fdpool.server"):
        with Server(sleep_and_tell, ANY_PORT, workers=1, threads=threads, grace=1e300) as server:
            with connect(server) as client:
                wait_until(lambda: server.stats().workers[0].in_flight)
                server.reload().result(60)
                client.sendall(b"0")
                assert read_all(client) == b"done"
    assert caplog.messages == []


@pytest.mark.parametrize("threads", [1, 4])
def test_a_grace_of_any_length_ends_a_wsgi_worker_as_any_other_does(
    threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fdpool.server"):
        with Server(wsgi, ANY_PORT, workers=1, threads=threads, grace=1e300) as server:
            get(server)
            server.stop()
    assert caplog.messages == []


def test_a_request_that_outlives_its_worker_writes_to_no_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread wakes no loop that has ended: what it would write to is closed, and others have that number."""
    pytest.importorskip("waitress")
    # Or it might be killed before it has saved.
    monkeypatch.setattr("fdpool._server.plan._DRAIN_MARGIN_S", 60.0)
    opened = tmp_path / "opened"

    def app(environ: Any, start_response: Any) -> list[bytes]:
        wait_until(opened.exists)
        return wsgi(environ, start_response)

    def save(worker: ServerWorker) -> None:
        with contextlib.ExitStack() as files:
            for number in range(30):
                files.enter_context((tmp_path / f"state{number}").open("wb"))
            opened.touch()
            wait_until(lambda: worker.progress.finished)

    with (
        Server(app, ANY_PORT, workers=1, threads=2, on_worker_exit=save) as server,
        connect(server) as client,
    ):
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        wait_until(lambda: server.stats().workers[0].in_flight)
        server.stop(0.1)
    assert [each.read_bytes() for each in tmp_path.glob("state*")] == [b""] * 30


def test_more_workers_than_a_server_can_have_are_refused() -> None:
    with Server(echo_pid, ANY_PORT, workers=1) as server:
        for count, error in ((0, ValueError), (10_000, ServerFailed)):
            with pytest.raises(error):
                server.scale(count)
        assert server.stats().wanted == 1


def test_it_serves_in_an_event_loop() -> None:
    async def main() -> bytes:
        async with Server(echo_pid, ANY_PORT, workers=1) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"x")
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            assert await asyncio.wrap_future(server.reload()) == 2
            return answer

    assert asyncio.run(main()).endswith(b" x")


@pytest.mark.parametrize("boots", [False, True])
def test_cancelled_before_its_block_is_entered_it_ends(tmp_path: Path, boots: bool) -> None:
    """Also where it was about to open its listeners."""

    def boot_for_long(worker: ServerWorker) -> None:
        (tmp_path / "boots").touch()
        worker.wait_drain()

    async def enter(server: Server) -> None:
        async with server:
            raise AssertionError("it has come to serve")

    async def main() -> None:
        server = Server(
            echo_pid, ANY_PORT, workers=1, on_worker_start=boot_for_long, boot_timeout=20, boot_limit=1
        )
        entering = asyncio.create_task(enter(server))
        await asyncio.sleep(0)
        if boots:
            await asyncio.to_thread(wait_until, (tmp_path / "boots").exists)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        try:
            assert server.stats().workers == ()
            assert server.wait(0)
        finally:
            server.stop(0.0)

    asyncio.run(main())


def test_it_begins_and_ends_in_any_thread() -> None:
    answers: list[bytes] = []

    def serve() -> None:
        with Server(echo_pid, ANY_PORT, workers=1) as server:
            answers.append(ask(server)[1])
            with pytest.raises(RuntimeError, match="main thread"):
                Server(echo_pid, ANY_PORT).run()

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert answers == [b"hello"]


def test_a_worker_knows_its_place() -> None:
    def tell(connection: socket.socket, _: object) -> None:
        worker = current_worker()
        assert worker is not None
        connection.sendall(b"%d %d %d" % (worker.pid, worker.slot, worker.generation))

    assert current_worker() is None
    with Server(tell, ANY_PORT, workers=1) as server:
        assert ask(server, b"")[1] == b"0 1"
        server.reload().result(60)
        assert ask(server, b"")[1] == b"0 2"


def test_hooks_run_in_the_worker_before_the_application_is_loaded_and_after_it_has_drained(
    tmp_path: Path,
) -> None:
    log = tmp_path / "hooks"

    def note(worker: ServerWorker) -> None:
        with log.open("a") as file:
            file.write(f"{worker.slot} {worker.generation} {worker.draining} {worker.pid == os.getpid()}\n")

    with Server(echo_pid, ANY_PORT, workers=1, on_worker_start=note, on_worker_exit=note) as server:
        assert log.read_text() == "0 1 False True\n"
        ask(server)
    assert log.read_text() == "0 1 False True\n0 1 True True\n"


def test_a_thousand_connections_are_echoed() -> None:
    with Server(keep_echoing, ANY_PORT, workers=2, threads=600) as server:
        clients = [connect(server) for _ in range(1000)]
        try:
            for number, client in enumerate(clients):
                client.sendall(b"%d" % number)
            for number, client in enumerate(clients):
                assert client.recv(10) == b"%d" % number
            assert sum(each.in_flight for each in server.stats().workers) == 1000
        finally:
            for client in clients:
                client.close()
        wait_until(lambda: sum(each.requests for each in server.stats().workers) == 1000)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_wsgi_application_is_told_all_that_it_may_rely_on(threads: int) -> None:
    """PEP 3333, as the standard library checks it."""
    pytest.importorskip("waitress")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [f"{environ['wsgi.multiprocess']} {environ['wsgi.multithread']}".encode()]

    with Server(validator(app), ANY_PORT, interface="wsgi", workers=1, threads=threads) as server:
        assert get(server)[:2] == (200, f"True {threads > 1}".encode())
