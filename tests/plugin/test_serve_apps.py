"""`serve` of applications: every kind that `fdpool.Server` serves, told apart as it does."""

from __future__ import annotations

import asyncio
import functools
import http.client
import os
import signal
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fdpool._fixtures.apps import kind_of
from fdpool._fixtures.errors import ServerDied
from fdpool._fixtures.serve import Serve
from fdpool._fixtures.served import Served
from tests.process_state import wait_until


def shout(connection: socket.socket, address: Any) -> None:
    connection.sendall(connection.recv(100).upper())


class Shouter(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


async def asgi_page(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": f"asgi {os.getpid()}".encode()})


def wsgi_page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [f"wsgi {os.getpid()}".encode()]


def ask(served: Served, data: bytes) -> bytes:
    with served.listener.connect() as client:
        client.sendall(data)
        return client.recv(100)


def get(served: Served) -> str:
    connection = http.client.HTTPConnection(*served.address, timeout=10)
    connection.request("GET", "/")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_a_handler_serves_clients_beside_each_other_and_outlives_its_errors(serve: Serve) -> None:
    served = serve(shout)
    with served.listener.connect():  # who says nothing is in nobody's way
        assert ask(served, b"hello") == b"HELLO"

    def failing(connection: socket.socket, address: Any) -> None:
        raise LookupError(connection.recv(100).decode())

    broken = serve(failing)
    for word in (b"first", b"second"):
        assert ask(broken, word) == b""
    wait_until(lambda: broken.logs.count("LookupError: ") == 2)
    assert broken.running


def test_a_socketserver_class_serves(serve: Serve) -> None:
    assert ask(serve(Shouter, kind="unix"), b"hello\n") == b"HELLO\n"


def test_an_asgi_and_a_wsgi_application_serve_and_end_when_told(serve: Serve) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("waitress")
    for app in (asgi_page, wsgi_page):
        served = serve(app)
        assert get(served) == f"{app.__name__[:4]} {served.pid}"
        served.stop()
        assert served.end_in_words() == f"the server {app.__name__} was stopped"


async def asgi_counting(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            print(kind, flush=True)
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    print("asked", flush=True)
    await asyncio.sleep(0.02)
    await asgi_page(scope, receive, send)


def test_an_asgi_application_ends_at_once_but_answers_first_and_has_its_shutdown(serve: Serve) -> None:
    """uvicorn by itself takes a fifth of a second to end, and so does each test that has such a server."""
    pytest.importorskip("uvicorn")
    served = serve(asgi_counting)
    assert get(served).startswith("asgi ")
    connection = http.client.HTTPConnection(*served.address, timeout=10)
    connection.request("GET", "/")
    wait_until(lambda: served.logs.count("asked") == 2)
    served.stop()
    assert connection.getresponse().read().startswith(b"asgi ")
    connection.close()
    assert "lifespan.shutdown" in served.logs
    # Either of uvicorn's rests is a tenth of a second each time; a busy machine is as slow, but not every time.
    took_s = [seconds_to_stop(served)]
    while took_s[-1] >= 0.1:
        assert len(took_s) < 12, took_s
        took_s.append(seconds_to_stop(served))
    assert served.logs.count("lifespan.shutdown") == 1 + len(took_s)


def seconds_to_stop(served: Served) -> float:
    starts = served.logs.count("lifespan.startup")
    served.restart()
    wait_until(lambda: served.logs.count("Application startup complete") > starts)
    begun = time.monotonic()
    served.stop()
    return time.monotonic() - begun


def test_an_application_is_found_by_its_name(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[2]
    assert str(folder) in sys.path  # as it was when the workers' supervisor started
    served = serve("tests.plugin.test_serve_apps:shout")
    assert ask(served, b"named") == b"NAMED"
    with pytest.raises(ValueError, match="an application is named 'module:attribute'"):
        serve("no colon")
    missing = serve("tests.plugin.test_serve_apps:nothing")
    assert "has no 'nothing'" in missing.wait()


@pytest.mark.parametrize("by", ["function", "name", "command"])
def test_a_server_has_the_tests_environment_folder_and_path(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """As they are when it starts; its worker is older."""
    (tmp_path / "only_here.py").write_text(
        "import os\n"
        "def app(connection, address):\n"
        "    connection.sendall(' '.join([os.getcwd(), os.environ['WORD'], *set(os.environ) & {'HOME'}]).encode())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WORD", "of the test")
    monkeypatch.delenv("HOME", raising=False)

    def calling(listening: socket.socket) -> None:
        import only_here  # type: ignore[import-not-found]

        with listening.accept()[0] as connection:
            only_here.app(connection, None)

    program = "import only_here, socket; only_here.app(socket.socket(fileno=3).accept()[0], None)"
    if by == "command":
        served = serve.command([sys.executable, "-c", program])
    else:
        served = serve(calling if by == "function" else "only_here:app")
    assert ask(served, b"") == f"{tmp_path} of the test".encode()


def test_with_options_of_a_server_it_is_that_which_serves(serve: Serve) -> None:
    served = serve(pids, workers=2, threads=1)
    with served.listener.connect(60) as first, served.listener.connect(60) as second:
        found = {int(each.recv(20)) for each in (first, second)}
    assert len(found) == 2
    assert served.pid not in found
    served.kill(signal.SIGHUP)
    wait_until(lambda: not {_pid_of(served) for _ in range(4)} & found)
    assert served.running
    served.stop()


def pids(connection: socket.socket, address: Any) -> None:
    connection.sendall(str(os.getpid()).encode())
    connection.recv(1)


def _pid_of(served: Served) -> int:
    with served.listener.connect() as client:
        return int(client.recv(20))


def test_a_server_that_cannot_boot_its_workers_fails_the_test_with_its_log(serve: Serve) -> None:
    served = serve("tests.plugin.test_serve_apps:nothing", workers=1, boot_limit=1)
    assert served.wait(60) == "the server tests.plugin.test_serve_apps:nothing exited with 3"
    assert "has no 'nothing'" in served.logs


def _three(scope: Any, receive: Any, send: Any) -> None: ...


class _Wsgi:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...


@pytest.mark.parametrize(
    ("app", "interface", "args", "kind"),
    [
        (lambda listening: None, None, 0, "function"),
        (lambda listening, ready: None, None, 0, "function"),
        (lambda listening, greeting="": None, None, 0, "function"),
        (lambda listening, word: None, None, 1, "function"),
        (functools.partial(lambda listening, word: None, word=1), None, 0, "function"),
        (lambda listeners: None, None, 0, "listeners"),
        (lambda listeners, worker: None, None, 0, "listeners"),
        (lambda connection, address: None, None, 0, "handler"),
        (lambda environ, start_response: None, None, 0, "wsgi"),
        (_Wsgi(), None, 0, "wsgi"),
        (_three, None, 0, "asgi"),
        (Shouter, None, 0, "socketserver"),
        (lambda a, b, c: None, "function", 0, "function"),
        ("module:attribute", None, 0, "named"),
    ],
)
def test_kinds_are_told_apart_by_what_they_can_be_called_with(
    app: Any, interface: str | None, args: int, kind: str
) -> None:
    assert kind_of(app, interface, args) == kind


def test_what_cannot_be_told_is_refused_with_the_way_out(serve: Serve) -> None:
    with pytest.raises(TypeError, match="it cannot be told what kind of application"):
        serve(lambda a, b, c, d: None)
    with pytest.raises(ValueError, match="interface= is one of function, handler, socketserver, asgi"):
        serve(shout, interface="http")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="workers: a function that is given the listening socket has no options"
    ):
        serve(lambda listening: None, workers=2)
    with pytest.raises(TypeError, match="is served as handler, and not called with arguments such as"):
        serve(shout, 1, interface="handler")


def test_one_that_fails_at_its_start_says_so(serve: Serve) -> None:
    def fails(listening: socket.socket, ready: Callable[[], None]) -> None:
        raise RuntimeError("no configuration")

    with pytest.raises(ServerDied, match="the server fails raised RuntimeError: no configuration"):
        serve(fails)
