"""The memory of servers: a worker that takes more than there is (W3), and what workers load for themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fdpool import Pool, Server
from fdpool._server import checks
from tests.memory_group import memory_group
from tests.server.helpers import ANY_PORT, get, read_all
from tests.server.programs import ask_port, port_in, program


def test_a_worker_that_the_kernel_kills_for_memory_is_named_and_the_server_goes_on(tmp_path: Path) -> None:
    """W3: a real control group, which has room for the server and its workers, but not for such a request."""
    body = """
    with open(os.environ["GROUP"], "w") as members:
        members.write(str(os.getpid()))

    def serve(connection, address):
        kept = []
        while connection.recv(1) == b"m":
            kept.append(bytearray(10 << 20))
        connection.sendall(b"%d" % os.getpid())

    sys.exit(fdpool.Server(serve, "127.0.0.1:0", workers=2).run())
    """
    with memory_group(200 << 20) as members, program(tmp_path, body, GROUP=str(members)) as server:
        port = port_in(server.expect("started"))
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(b"m" * 1000)
            try:
                assert read_all(client) == b""
            except ConnectionResetError:
                pass  # it died with some of the request unread
        exited = server.expect("worker_exited")
        assert exited["reason"] == (
            "it was killed by SIGKILL by the kernel's out-of-memory killer, as its control group counts"
        )
        assert exited["lost"] == 1
        successor = server.expect("worker_ready")["worker_pid"]
        assert successor != exited["worker_pid"]
        assert ask_port(port) not in (exited["worker_pid"], os.getpid())


TELLING = """
import sys

def loaded():
    return ",".join(sorted(sys.modules)).encode()

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", str(len(loaded())))])
    return [loaded()]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": loaded()})
"""


def modules_here() -> set[str]:
    return set(sys.modules)


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_a_worker_loads_nothing_but_the_application(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each worker loads for itself is memory of each: it is to be in the supervisor when workers are forked."""
    pytest.importorskip({"wsgi": "waitress", "asgi": "uvicorn"}[kind])
    (tmp_path / "telling.py").write_text(TELLING)
    monkeypatch.syspath_prepend(str(tmp_path))
    with Pool(1, preload=checks.modules_to_serve(kind)) as pool:
        forked = pool.submit(modules_here).result()
    with Server(f"telling:{kind}", ANY_PORT, workers=1, interface=kind) as server:
        loaded = set(get(server)[1].decode().split(","))
    assert loaded - forked == {"telling"}


def test_the_process_of_a_server_loads_no_event_loop() -> None:
    code = "import sys, fdpool._serve.command\nprint(*({'asyncio', 'ssl', 'uvicorn', 'waitress'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"
