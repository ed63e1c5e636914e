"""The memory of servers: a worker that takes more than there is (W3), and what workers load for themselves."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fdpool import Pool, Server
from fdpool._server import checks
from tests.memory_group import memory_group
from tests.process_state import wait_until
from tests.server.helpers import ANY_PORT, ask, get, read_all
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
        assert exited["reason"].startswith(
            "it was killed by SIGKILL, perhaps by the kernel's out-of-memory killer: its control group counted a kill"
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


@pytest.mark.usefixtures("fresh_supervisors")  # another's may have loaded it
def test_what_finds_out_the_kind_of_an_application_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect`, which only a worker needs that is not told."""
    (tmp_path / "told.py").write_text(
        "import sys\nwas = 'inspect' in sys.modules\n"
        "def app(connection, _): connection.sendall(b'%d' % was)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for interface, shared in ((None, 1), ("handler", 0)):
        with Server("told:app", ANY_PORT, workers=1, interface=interface) as server:
            assert ask(server, b"")[0] == shared


@pytest.mark.parametrize("preload", [(), ["json"]])
def test_the_collector_leaves_alone_what_workers_share_with_their_supervisor(preload: Any) -> None:
    """It would write to each object that it looks at, and so have each worker copy all of them."""

    def tell(connection: socket.socket, _: object) -> None:
        connection.sendall(b"%d %d" % (gc.get_freeze_count(), len(gc.get_objects())))

    with Server(tell, ANY_PORT, workers=2, preload=preload) as server:
        for generation in (1, 2):
            frozen, tracked = ask(server, b"")
            assert frozen > int(tracked)
            if generation == 1:
                server.reload().result(60)


def test_stats_have_each_workers_memory_and_age() -> None:
    def hold(connection: socket.socket, _: object) -> None:
        held.append(bytes(range(256)) * 400_000)
        connection.sendall(b"0 ")

    held: list[bytes] = []
    begun = time.monotonic()
    with Server(hold, ANY_PORT, workers=1) as server:
        [first] = server.stats().workers
        served_s = time.monotonic() - begun
        assert 0 < first.age_s <= served_s
        assert first.rss_bytes is not None
        pages = int(Path(f"/proc/{first.pid}/statm").read_text().split()[1])  # proc(5): resident
        assert abs(first.rss_bytes - pages * resource.getpagesize()) < 2 * 2**20
        ask(server, b"")
        [second] = server.stats().workers
        assert second.rss_bytes is not None
        assert 150_000_000 > second.rss_bytes - first.rss_bytes > 90_000_000
        assert first.age_s < second.age_s
        killed_at = time.monotonic()  # before: its successor may have begun as the call returns
        os.kill(second.pid or 0, signal.SIGKILL)
        wait_until(
            lambda: [each.state for each in server.stats().workers if each.pid != first.pid] == ["serving"]
        )
        assert server.stats().workers[0].age_s <= time.monotonic() - killed_at


def test_the_process_of_a_server_loads_nothing_that_it_may_do_without() -> None:
    """Neither an event loop, which is its workers', nor what is slow to import."""
    slow = "ast asyncio dataclasses inspect psutil socketserver ssl uvicorn waitress"
    code = f"import sys, fdpool._serve.command\nprint(*({set(slow.split())} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"
