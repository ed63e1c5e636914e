"""The load test in its short form, and that its client overlooks nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.load._client import Client
from tests.load._scenarios import Verdict, play, taken_by
from tests.load._served import Served, served
from tests.load._tally import Tally
from tests.process_state import wait_until

# -- the client ------------------------------------------------------------------------------------

Behaviour = Callable[[socket.socket, str], bool]  # with a connection and a request's token; False to close it


def reply(connection: socket.socket, token: str, status: str = "200 OK") -> bool:
    body = f"1 {token}\n".encode()
    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return True


@contextlib.contextmanager
def behaving(behaviour: Behaviour) -> Iterator[str]:
    """The address of a server that does so with every request."""

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while received := connection.recv(65536):
                if not behaviour(connection, received.split()[1].decode()[1:]):
                    return

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve_one, args=(connection,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)  # wakes the one that accepts
        for thread in threads:
            thread.join()


def run_until(client: Client, condition: Callable[[], object]) -> Tally:
    """Let the client send until that is true, however slow the machine is."""
    thread = threading.Thread(target=client.run, args=(60.0,))
    thread.start()
    try:
        wait_until(condition)
    finally:
        client.stop()
        thread.join()
    return client.tally


def counted(tally: Tally) -> tuple[bool, bool, bool, bool]:
    """Which counts are above 0: ok, failed, reset, raced."""
    return tally.ok > 0, tally.failed > 0, tally.reset > 0, tally.raced > 0


def reset(connection: socket.socket, _token: str) -> bool:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def silent(_connection: socket.socket, _token: str) -> bool:
    return True


def half(connection: socket.socket, token: str) -> bool:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhal")
    return False


@pytest.mark.parametrize(
    ("behaviour", "counts"),
    [
        (reply, (True, False, False, False)),
        (lambda connection, token: reply(connection, token, "500 No"), (False, True, False, False)),
        (lambda connection, token: reply(connection, token + "x"), (False, True, False, False)),
        (silent, (False, True, False, False)),
        (lambda connection, token: False, (False, False, True, False)),
        (reset, (False, False, True, False)),
        (half, (False, False, True, False)),
    ],
    ids=["good", "status", "another's", "silent", "closed", "reset", "half"],
)
@pytest.mark.parametrize("rps", [200.0, None])
def test_every_request_is_counted_for_what_became_of_it(
    behaviour: Behaviour, counts: tuple[bool, ...], rps: float | None
) -> None:
    with behaving(behaviour) as address:
        timeout_s = 0.2 if behaviour is silent else 20.0  # others may be late, where the machine is busy
        tally = Client(address, rps=rps, connections=4, timeout_s=timeout_s).run(0.1)
    assert counted(tally) == counts
    assert len(tally.lost) == tally.failed + tally.reset
    assert len(tally.latencies) == tally.ok


def test_nobody_there_is_a_reset() -> None:
    with socket.socket() as bound:  # so that nobody else comes to listen there
        bound.bind(("127.0.0.1", 0))
        tally = Client(f"tcp://127.0.0.1:{bound.getsockname()[1]}", rps=100).run(0.1)
    assert counted(tally) == (False, False, True, False)
    assert "ECONNREFUSED" in next(iter(tally.lost.values()))


def test_a_kept_connection_that_is_closed_as_it_is_used_is_told_apart_and_the_request_sent_again() -> None:
    answered: set[int] = set()

    def once(connection: socket.socket, token: str) -> bool:
        if connection.fileno() in answered:
            answered.discard(connection.fileno())
            return False
        answered.add(connection.fileno())
        return reply(connection, token)

    with behaving(once) as address:
        client = Client(address, rps=200, keep_alive=1.0)
        tally = run_until(client, lambda: client.tally.raced and client.tally.ok)
    assert counted(tally) == (True, False, False, True)
    assert tally.cut >= tally.raced  # none had been idle for long


def test_a_kept_connection_that_is_closed_early_is_counted_though_nobody_used_it() -> None:
    def once(connection: socket.socket, token: str) -> bool:
        reply(connection, token)
        return False

    with behaving(once) as address:
        client = Client(address, rps=0.001, keep_alive=1.0)  # the second request is due in minutes
        tally = run_until(client, lambda: client.tally.cut)
    assert (tally.ok, tally.opened, tally.cut, tally.raced) == (1, 1, 1, 0)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A server that stands still is charged for all who would have come."""
    standing = threading.Event()

    def stand(connection: socket.socket, token: str) -> bool:
        standing.wait(0.3)
        standing.set()
        return reply(connection, token)

    with behaving(stand) as address:
        tally = Client(address, rps=100, keep_alive=0.0).run(0.3)
    assert tally.percentile_s(99) >= 0.25


def test_a_verdict_allows_what_the_scenario_does_and_no_more() -> None:
    assert Verdict("x", 1, Tally(ok=5, reset=1)).is_good
    assert not Verdict("x", 1, Tally(ok=5, reset=1, failed=1)).is_good
    assert not Verdict("x", 0, Tally()).is_good
    assert not Verdict("x", 0, Tally(ok=5), wanted=6).is_good
    assert Verdict("x", 0, Tally(ok=5, raced=1)).is_good
    assert not Verdict("x", 0, Tally(ok=5, raced=1, cut=1)).is_good
    assert Verdict("x", 0, Tally(ok=5, raced=1, cut=1), may_cut=True).is_good


# -- the server ------------------------------------------------------------------------------------


# This machine may be busy with other tests.
ENOUGH = 0.4  # of what was due
PATIENCE_S = 40.0  # as it may take a while until what has piled up is answered


def play_well(name: str, server: Served, *, seed: int = 1, **options: Any) -> Verdict:
    """Play a scenario, of half a second each time, that must cost no more than it may."""
    verdict = play(name, server, seconds=0.5, seed=seed, enough=ENOUGH, timeout_s=PATIENCE_S, **options)
    assert verdict.is_good, f"{verdict.as_json()}\n{server.tail()}"
    return verdict


@pytest.mark.parametrize(
    ("dispatch", "scenarios"),
    [
        ("shared", ("reload", "scale", "kill", "upgrade")),
        ("handoff", ("reload", "scale", "kill", "upgrade")),
        ("reuseport", ("reload", "scale", "kill", "upgrade")),
    ],
)
def test_no_reload_no_scaling_and_no_upgrade_costs_a_request_and_a_killed_worker_at_most_its_own(
    dispatch: str, scenarios: tuple[str, ...]
) -> None:
    """S1, S8: 300 requests a second meanwhile."""
    arguments = ["-b", "127.0.0.1:0", "-w", "2", "--threads", "1", "--dispatch", dispatch]
    with served(*arguments, "tests.load.app:handler") as server:
        for name in scenarios:
            play_well(name, server, rps=300, times=3, work_ms=2)


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
@pytest.mark.parametrize(("form", "needs"), [("asgi", "uvicorn"), ("wsgi", "waitress")])
def test_clients_that_keep_their_connections_lose_nothing_by_a_reload_a_scaling_and_an_upgrade(
    form: str, needs: str, dispatch: str
) -> None:
    """S1, S7: they are told to connect anew, and no connection is closed as they use it."""
    pytest.importorskip(needs)
    arguments = ["-b", "127.0.0.1:0", "-w", "2", "--threads", "4", "--dispatch", dispatch]
    with served(*arguments, f"tests.load.app:{form}") as server:
        for name in ("reload", "scale", "upgrade"):
            play_well(name, server, rps=300, times=2, keep_alive=0.9)


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
@pytest.mark.parametrize(
    ("form", "needs", "threads", "rps"),
    [
        ("handler", "socket", 1, 85),
        ("asgi", "uvicorn", 1, 300),
        ("wsgi", "waitress", 1, 85),
        ("wsgi", "waitress", 3, 250),
    ],
)
def test_a_killed_worker_costs_what_had_begun_there_and_nothing_that_waits(
    form: str, needs: str, threads: int, rps: float, dispatch: str, tmp_path: Path
) -> None:
    """S8: a ledger has what begins. The rate is such that some run, and others wait, most of the time; on a busy
    machine the kills may find nothing that runs."""
    pytest.importorskip(needs)
    ledger = tmp_path / "begun"
    arguments = ["-b", "127.0.0.1:0", "-w", "2", "--threads", f"{threads}", "--dispatch", dispatch]
    with served(*arguments, f"tests.load.app:{form}", env={"TEST_LOAD_LEDGER": str(ledger)}) as server:
        for seed in range(1, 6):
            verdict = play_well(
                "kill",
                server,
                seed=seed,
                rps=rps,
                times=9,
                keep_alive=0.0,
                work_ms=20,
                ledger=None if form == "handler" else ledger,
                taken=taken_by(form, threads, dispatch),
            )
            if set(verdict.tally.lost) & set(ledger.read_text().split()):
                return
    pytest.fail("nothing that had begun was killed")
