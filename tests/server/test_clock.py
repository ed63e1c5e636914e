"""Servers where the wall clock is set: nothing that they time is by that clock (S11)."""

from __future__ import annotations

import contextlib
import http.client
import select
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process_state import wait_until
from tests.server.programs import port_in, program

# A clock that the test sets, in the server's process and in every worker: what is added to it is in a file.
CLOCK = """
import mmap, os, struct, time
with open("clock", "rb") as file:
    page = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + struct.unpack("d", page)[0]
time.time_ns = lambda: real_ns() + int(struct.unpack("d", page)[0] * 1e9)
"""

# Every application holds "/hold" until the file "go" is there; and its module, while "boot" is there, who imports it.
CLOCKED = """
import clock, os, pathlib, time

def until(condition):
    while not condition():
        yield
        time.sleep(0.01)

def exists(name):
    return lambda: os.path.exists(name)

if os.path.exists("boot"):
    pathlib.Path("booting").touch()
    for _ in until(lambda: not os.path.exists("boot")):
        pass

def begun(path):
    if path == "/hold":
        pathlib.Path("held").touch()
        yield from until(exists("go"))

def wsgi(environ, start_response):
    for _ in begun(environ["PATH_INFO"]):
        pass
    body = b"%d" % os.getpid()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    import asyncio
    for _ in begun(scope["path"]):
        await asyncio.sleep(0)
    body = b"%d" % os.getpid()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

def handler(connection, address):
    while request := connection.recv(1000):
        for _ in begun(request.split()[1].decode()):
            pass
        body = b"%d" % os.getpid()
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
"""


class WallClock:
    """Sets the clock of programs whose folder this is."""

    def __init__(self, folder: Path) -> None:
        (folder / "clock.py").write_text(CLOCK)
        (folder / "clocked.py").write_text(CLOCKED)
        self._file = folder / "clock"
        self.jump_to(0.0)

    def jump_to(self, offset_s: float) -> None:
        with open(self._file, "r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("d", offset_s))


def clocked(kind: str, **settings: object) -> str:
    interface, _, rest = kind.partition(" ")
    given = "".join(f", {name}={value!r}" for name, value in settings.items())
    return f"""
    import clock
    sys.exit(fdpool.Server("clocked:{interface}", "127.0.0.1:0", workers=1, interface="{interface}"{given}{rest}).run())
    """


KINDS = [
    "handler , threads=2",
    "handler , threads=2, dispatch='handoff'",
    "asgi , options={'timeout_keep_alive': 60}",
    "wsgi , threads=1, options={'channel_timeout': 60, 'cleanup_interval': 1}",
    "wsgi , threads=2, options={'channel_timeout': 60, 'cleanup_interval': 1}, dispatch='handoff'",
]


def needs(kind: str) -> None:
    served_by = {"asgi": "uvicorn", "wsgi": "waitress"}.get(kind.partition(" ")[0])
    if served_by is not None:
        pytest.importorskip(served_by)


@contextlib.contextmanager
def sent(port: int, path: str) -> Iterator[http.client.HTTPConnection]:
    """A connection on which this was asked for."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as client:
        client.request("GET", path)
        yield client


@pytest.mark.parametrize("kind", KINDS)
def test_a_wall_clock_that_jumps_ends_replaces_and_closes_nothing(kind: str, tmp_path: Path) -> None:
    """S11: while a request runs, while a connection is idle, while a worker boots, and while another drains."""
    needs(kind)
    clock = WallClock(tmp_path)
    limits = {"max_age": 600, "request_timeout": 60, "boot_timeout": 60, "grace": 60}
    with program(tmp_path, clocked(kind, **limits)) as server:
        port = port_in(server.expect("started"))
        with sent(port, "/") as idle:
            first = int(idle.getresponse().read())
            with sent(port, "/hold") as held:
                wait_until((tmp_path / "held").exists)

                def jump(offset_s: float, moment_s: float = 0.6) -> None:
                    clock.jump_to(offset_s)
                    # Time to do wrong: longer than the server leaves between two looks, or a worker's loop.
                    waiting = [each.sock for each in (held, idle) if each.sock is not None]
                    assert not select.select(waiting, [], [], moment_s)[0]

                jump(1e6, 1.2)
                jump(-1e6)
                (tmp_path / "boot").touch()
                server.signal(signal.SIGHUP)
                wait_until((tmp_path / "booting").exists)
                jump(1e6)
                idle.close()
                (tmp_path / "boot").unlink()
                ready = server.expect("worker_ready")
                server.expect("reloaded")  # and the old worker takes nothing more, but has the one request
                jump(2e6)
                jump(-1e6)
                (tmp_path / "go").touch()
                assert int(held.getresponse().read()) == first
        with sent(port, "/") as last:
            assert int(last.getresponse().read()) == ready["worker_pid"]
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not {"worker_killed", "worker_failed", "worker_slow", "reload_failed"} & set(server.events())
        assert [each["worker_pid"] for each in server.heard if each["event"] == "worker_ready"] == [
            first,
            ready["worker_pid"],
        ]


@pytest.mark.parametrize("kind", KINDS[1:4])
def test_a_wall_clock_that_was_set_back_keeps_nobody_past_his_time(kind: str, tmp_path: Path) -> None:
    """S11: ages, requests, boots and drains end when they would have."""
    needs(kind)
    clock = WallClock(tmp_path)
    # Long enough for a busy machine to boot a worker, and to send it a request while it is not too old.
    limits = {"max_age": 5, "request_timeout": 2, "boot_timeout": 6, "grace": 1, "jitter": 0}
    with program(tmp_path, clocked(kind, **limits)) as server:
        port = port_in(server.expect("started"))
        with sent(port, "/hold") as held:
            wait_until((tmp_path / "held").exists)
            clock.jump_to(-1e6)
            if kind.startswith("asgi"):
                assert held.getresponse().status == 500  # cancelled by its worker, in which others may run
            else:
                assert "has not moved on" in server.expect("worker_killed")["reason"]
                server.expect("worker_ready")
        clock.jump_to(-2e6)
        server.expect("worker_ready")  # the successor of one that is too old
        (tmp_path / "boot").touch()
        server.signal(signal.SIGHUP)
        server.expect("reloading")
        clock.jump_to(-3e6)
        server.expect("reload_failed")
        (tmp_path / "boot").unlink()
        server.signal(signal.SIGTERM)
        server.expect("stopping")
        clock.jump_to(-4e6)
        assert server.wait() == 0
