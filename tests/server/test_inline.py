"""WSGI with one thread, the worker's main thread: what waitress leaves to a loop beside it happens all the same.

Where a test is of what any number of threads does, it is of both.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("waitress")

from fdpool.fds import is_readable
from fdpool.server import Server, ServerWorker
from tests.process_state import wait_until
from tests.server.applications import Gate, with_length, with_write, without_length, wsgi
from tests.server.helpers import (
    ANY_PORT,
    Load,
    connect,
    get,
    is_over,
    pids,
    port_of,
    read_all,
    records,
    reset,
)

THREADS = pytest.mark.parametrize("threads", [1, 2])
MIB = 2**20


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def waiting_at(gate: Gate) -> Any:
    """An application that answers with its worker's pid; `/wait` waits first."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/wait":
            gate.wait()
        return wsgi(environ | {"PATH_INFO": "/"}, start_response)

    return app


def in_megabytes(count: int, told: Path) -> Any:
    """An application whose answer is so long; `told` has a byte for each piece, and an "x" at the end."""

    def pieces() -> Iterator[bytes]:
        try:
            for number in range(count):
                with told.open("ab") as file:
                    file.write(b".")
                yield bytes([number]) * MIB
        finally:
            with told.open("ab") as file:
                file.write(b"x")

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/long":
            return wsgi(environ, start_response)
        start_response("200 OK", [("Content-Length", str(count * MIB))])
        return pieces()

    return app


@contextlib.contextmanager
def asked(server: Server, path: str = "/wait") -> Iterator[http.client.HTTPConnection]:
    """A connection on which this is on its way."""
    client = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    with contextlib.closing(client):
        client.request("GET", path)
        yield client


def in_flight(server: Server) -> int:
    return sum(each.in_flight for each in server.stats().workers)


def requests(server: Server) -> int:
    """Those that are over."""
    return sum(each.requests for each in server.stats().workers)


# -- where it runs ---------------------------------------------------------------------------------------


@THREADS
def test_one_thread_is_the_main_thread_and_the_application_is_told(threads: int) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        is_main = threading.current_thread() is threading.main_thread()
        others = [each.name for each in threading.enumerate() if each.name.startswith("waitress")]
        return [repr((is_main, environ["wsgi.multithread"], len(others))).encode()]

    with Server(app, ANY_PORT, workers=1, threads=threads) as server:
        assert get(server)[1] == (b"(True, False, 0)" if threads == 1 else b"(False, True, 2)")


# -- answers -----------------------------------------------------------------------------------------------


@THREADS
def test_an_answer_leaves_with_its_header_in_one_piece(threads: int, tmp_path: Path) -> None:
    log = tmp_path / "sent"

    def note_what_is_sent(worker: ServerWorker) -> None:
        send = socket.socket.send

        def noted(self: socket.socket, data: Any, *flags: int) -> int:
            if self.family == socket.AF_INET:
                with log.open("ab") as file:
                    file.write(b"%d\n" % len(data))
            return send(self, data, *flags)

        socket.socket.send = noted  # type: ignore[method-assign]

    with Server(wsgi, ANY_PORT, workers=1, threads=threads, on_worker_start=note_what_is_sent) as server:
        with connect(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = read_all(client)
    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert log.read_bytes() == b"%d\n" % len(answer)


@THREADS
def test_a_header_that_nothing_comes_after_is_sent(threads: int) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("204 No Content", [("X-Path", environ["PATH_INFO"])])
        return [b"which is ignored"]

    with Server(app, ANY_PORT, workers=1, threads=threads) as server:
        with connect(server) as client:
            client.sendall(b"GET /first HTTP/1.0\r\n\r\n")
            answer = read_all(client)
    assert answer.startswith(b"HTTP/1.0 204 No Content")
    assert b"X-Path: /first" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("answer", [with_write, with_length, without_length])
@THREADS
def test_each_small_piece_arrives_before_the_next_is_made(
    answer: Callable[..., Any], threads: int, gate: Gate
) -> None:
    """PEP 3333, "Buffering and Streaming"."""

    def pieces() -> Iterator[bytes]:
        for piece in (b"a", b"b", b"c"):
            yield piece
            gate.wait()

    def app(environ: Any, start_response: Any) -> Any:
        return answer(start_response, pieces())

    with Server(app, ANY_PORT, workers=1, threads=threads, grace=1) as server:
        with asked(server) as client:
            response = client.getresponse()
            for piece in (b"a", b"b", b"c"):
                assert response.read(1) == piece
                gate.let_pass()
            assert response.read() == b""


def test_an_answer_is_sent_before_the_next_request_begins(gate: Gate) -> None:
    """Of the same client, who sent it ahead."""
    with Server(waiting_at(gate), ANY_PORT, workers=1, threads=1, grace=1) as server:
        with connect(server) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /wait HTTP/1.0\r\n\r\n")
            first = client.recv(1000)
            assert first.startswith(b"HTTP/1.1 200 OK")
            gate.let_pass()
            assert read_all(client).startswith(b"HTTP/1.0 200 OK")


@THREADS
def test_requests_that_are_sent_ahead_are_answered_in_their_order(threads: int) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read() + environ["PATH_INFO"].encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    with Server(app, ANY_PORT, workers=1, threads=threads) as server, connect(server) as client:
        for number in range(200):
            client.sendall(b"POST /%d HTTP/1.1\r\nContent-Length: 3\r\n\r\nxyz" % number)
        client.sendall(b"POST /last HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        answers = read_all(client).split(b"HTTP/1.")[1:]
        assert [answer.rpartition(b"\r\n")[2] for answer in answers] == [
            *(b"xyz/%d" % number for number in range(200)),
            b"/last",
        ]


@THREADS
def test_a_client_that_expects_to_be_told_to_continue_is(threads: int) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    with Server(app, ANY_PORT, workers=1, threads=threads) as server, connect(server) as client:
        for _ in range(2):
            client.sendall(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"hello")
            answer = b""
            while not answer.endswith(b"hello"):
                answer += client.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200 OK")


# -- clients that are slow, or go --------------------------------------------------------------------------


@THREADS
def test_more_than_is_buffered_arrives_whole_however_slow_its_client(threads: int, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with Server(in_megabytes(48, told), ANY_PORT, workers=1, threads=threads) as server:
        with asked(server, "/long") as client:
            wait_until(lambda: told.exists() and told.stat().st_size > 16)
            response = client.getresponse()
            for number in range(48):
                assert response.read(MIB) == bytes([number]) * MIB
            assert response.read() == b""
        wait_until(lambda: told.read_bytes() == b"." * 48 + b"x")
        assert get(server)[0] == 200


@THREADS
def test_a_request_moves_on_as_its_client_takes_some_and_does_not_otherwise(
    threads: int, tmp_path: Path
) -> None:
    told = tmp_path / "told"

    def waited_s() -> float:
        return server.stats().workers[0].oldest_s or 0.0

    def take_some() -> bool:
        response.read(MIB)
        return waited_s() < 0.2  # or it would have waited for longer than before

    with Server(in_megabytes(200, told), ANY_PORT, workers=1, threads=threads, grace=0) as server:
        with asked(server, "/long") as client:
            wait_until(lambda: waited_s() > 0.2)  # the 16 MiB are full
            response = client.getresponse()
            if threads == 1:
                wait_until(take_some)
            produced = told.stat().st_size
            wait_until(lambda: waited_s() > 0.2)
            assert b"x" not in told.read_bytes()
            assert produced < 200


@THREADS
def test_a_request_moves_on_with_each_part_of_a_piece_that_its_client_takes(threads: int) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", str(64 * MIB))])
        return (bytes(32 * MIB) for _ in range(2))

    def waited_s() -> float:
        return server.stats().workers[0].oldest_s

    def take_some() -> bool:
        taken.append(response.read(MIB // 4))
        assert len(taken) < 100, "the first piece has all been taken"
        return waited_s() < 0.2  # or it would have waited for longer than before

    taken: list[bytes] = []
    settings = {"outbuf_high_watermark": MIB}
    with Server(app, ANY_PORT, workers=1, threads=threads, options=settings, grace=0) as server:
        with asked(server, "/long") as client:
            wait_until(lambda: waited_s() > 0.2)  # the second one has to wait
            response = client.getresponse()
            wait_until(take_some)


def test_a_client_that_does_not_take_its_answer_is_stuck(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = tmp_path / "told"
    with records(caplog) as logged:
        with Server(in_megabytes(200, told), ANY_PORT, workers=1, threads=1, request_timeout=0.5) as server:
            [before] = pids(server)
            with asked(server, "/long"):
                wait_until(lambda: pids(server) not in ([before], []))
        [killed] = logged("worker_killed")
        assert "a request has not moved on" in killed.reason


@pytest.mark.parametrize("go", [reset, socket.socket.close])
@THREADS
def test_a_client_that_goes_in_the_midst_of_its_answer_frees_the_worker(
    threads: int, go: Callable[[socket.socket], None], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    with Server(in_megabytes(200, told), ANY_PORT, workers=1, threads=threads) as server:
        before = pids(server)
        client = connect(server)
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: told.exists() and told.stat().st_size > 16)
        go(client)
        wait_until(lambda: told.read_bytes().endswith(b"x"))
        assert len(told.read_bytes()) < 200
        assert get(server)[0] == 200
        assert pids(server) == before


def test_an_application_hears_that_its_client_is_cut_off_at_the_end_of_the_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or its worker might be killed before it has heard.
    monkeypatch.setattr("fdpool._server.plan._DRAIN_MARGIN_S", 60.0)
    told = tmp_path / "told"

    def is_told(_: object = None) -> bool:
        return told.read_bytes().endswith(b"x")

    def wait(_: ServerWorker) -> None:
        wait_until(is_told)

    app = in_megabytes(200, told)
    with Server(app, ANY_PORT, workers=1, threads=2, grace=0.5, on_worker_exit=wait) as server:
        with asked(server, "/long"):
            wait_until(lambda: told.exists() and told.stat().st_size > 16)
            server.stop()
    assert is_told()


@pytest.mark.parametrize("ahead", [0, 1])
@THREADS
def test_a_file_that_becomes_shorter_as_it_is_sent_ends_its_connection(
    threads: int, ahead: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its length is told in the answer's header, so there is no other way to say that there is no more."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(60 * MIB)

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/file":
            return wsgi(environ, start_response)
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](path.open("rb"))

    with Server(app, ANY_PORT, workers=1, threads=threads, grace=0) as server:
        [before] = pids(server)
        with connect(server) as client:
            client.sendall(
                b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n" + ahead * b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
            os.truncate(path, 0)
            assert len(read_all(client)) < 60 * MIB
        assert int(get(server)[1]) == before
        wait_until(lambda: not in_flight(server))
    assert "a file has become shorter" in capfd.readouterr().err


def test_an_application_that_streams_hears_of_a_client_that_has_gone(gate: Gate, tmp_path: Path) -> None:
    """The first piece that cannot be sent closes the connection, and the next one raises."""
    left = tmp_path / "left"

    def pieces() -> Iterator[bytes]:
        try:
            yield b"first"
            gate.wait()
            while True:
                yield b"more"
        finally:
            left.touch()

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/":
            return wsgi(environ, start_response)
        start_response("200 OK", [])
        return pieces()

    with Server(app, ANY_PORT, workers=1, threads=1) as server:
        with asked(server, "/stream") as client:
            assert client.getresponse().read(5) == b"first"
        gate.let_pass()
        wait_until(left.exists)
        assert get(server)[0] == 200


@THREADS
def test_an_application_that_asks_is_told_that_its_client_has_gone(
    threads: int, gate: Gate, tmp_path: Path
) -> None:
    asked_once = tmp_path / "asked once"
    seen = tmp_path / "seen"

    def app(environ: Any, start_response: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/wait":
            has_gone = environ["waitress.client_disconnected"]
            assert not has_gone()
            asked_once.touch()
            gate.wait()
            wait_until(has_gone)
            seen.touch()
        return wsgi(environ, start_response)

    options = {"channel_request_lookahead": 1}
    with Server(app, ANY_PORT, workers=1, threads=threads, options=options) as server:
        with asked(server):
            wait_until(asked_once.exists)
        gate.let_pass()
        wait_until(seen.exists)
        assert get(server)[0] == 200


# -- several connections -----------------------------------------------------------------------------------


def or_megabytes(app: Any, count: int) -> Any:
    """An application that answers `/long` with so many in one piece, and leaves the rest to `app`."""

    def either(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/long":
            return app(environ, start_response)
        start_response("200 OK", [("Content-Length", str(count * MIB))])
        return [b"x" * (count * MIB)]

    return either


@contextlib.contextmanager
def kept(server: Server) -> Iterator[http.client.HTTPConnection]:
    """A connection that has been answered, and is open."""
    with asked(server, "/") as client:
        assert client.getresponse().read() == b"%d" % pids(server)[0]
        yield client


def take_what_has_come(client: socket.socket) -> int:
    """Bytes that the kernel has for it. They take a moment from the sender's side to this one."""
    count = 0
    while is_readable(client, 0.1):
        count += len(client.recv(MIB))
    return count


def runs_for(server: Server, seconds: float, after: int) -> None:
    """Return when so many requests are over, and the next has run for so long."""

    def does() -> bool:
        [worker] = server.stats().workers
        return worker.requests == after and (worker.oldest_s or 0.0) > seconds

    wait_until(does)


def test_what_a_slow_client_waits_for_is_sent_between_two_requests_of_others(gate: Gate) -> None:
    app = or_megabytes(waiting_at(gate), 14)
    with Server(app, ANY_PORT, workers=1, threads=1) as server:
        with kept(server) as second, kept(server) as third, connect(server) as downloading:
            downloading.sendall(b"GET /long HTTP/1.0\r\n\r\n")
            wait_until(lambda: requests(server) == 3)
            with asked(server) as first:
                runs_for(server, 0.0, after=3)
                second.request("GET", "/wait")
                third.request("GET", "/wait")
                gate.let_pass()
                assert first.getresponse().status == 200
            runs_for(server, 0.02, after=4)
            assert take_what_has_come(downloading) < 14 * MIB
            gate.let_pass()
            runs_for(server, 0.0, after=5)
            assert take_what_has_come(downloading) > 0
            gate.let_pass()
            assert second.getresponse().status == third.getresponse().status == 200


def test_time_for_which_the_worker_is_busy_is_not_idle_time_of_its_clients(gate: Gate) -> None:
    """What they have sent and taken meanwhile is in the kernel."""
    answer = or_megabytes(waiting_at(gate), 12)

    def app(environ: Any, start_response: Any) -> Any:
        # Only in this request and the turn after it, or a test that is late itself has idle clients.
        waitress_channel = environ["waitress.client_disconnected"].__self__
        waitress_channel.adj.channel_timeout = 2 if environ["PATH_INFO"] == "/wait" else 120
        return answer(environ, start_response)

    with Server(app, ANY_PORT, workers=1, threads=1, options={"cleanup_interval": 1}) as server:
        with kept(server) as other, connect(server) as downloading:
            downloading.sendall(b"GET /long HTTP/1.0\r\n\r\n")
            wait_until(lambda: requests(server) == 2)
            with asked(server) as busy:
                runs_for(server, 0.0, after=2)
                other.request("GET", "/")
                runs_for(server, 2.1, after=2)
                taken = take_what_has_come(downloading)
                gate.let_pass()
                assert busy.getresponse().status == 200
            assert other.getresponse().status == 200
            assert 0 < taken < 12 * MIB
            assert taken + len(read_all(downloading)) > 12 * MIB


@pytest.mark.parametrize("dispatch", ["shared", "handoff"])
@THREADS
def test_connections_that_are_idle_for_too_long_are_closed(threads: int, dispatch: Any) -> None:
    options = {"channel_timeout": 1, "cleanup_interval": 1}
    with Server(wsgi, ANY_PORT, workers=1, threads=threads, options=options, dispatch=dispatch) as server:
        with kept(server) as client:
            assert is_over(client.sock)


# -- signals, and the end of a worker ------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["shared", "handoff", "reuseport"])
@THREADS
def test_a_reload_waits_for_no_request_and_cuts_none_off(threads: int, dispatch: Any, gate: Gate) -> None:
    """S7: what is busy takes nothing new from the moment on that it is told."""
    with Server(waiting_at(gate), ANY_PORT, workers=1, threads=threads, dispatch=dispatch) as server:
        [old] = pids(server)
        with asked(server) as client:
            wait_until(lambda: in_flight(server))
            assert server.reload().result(60) == 2
            assert int(get(server)[1]) != old
            gate.let_pass()
            response = client.getresponse()
            assert response.status == 200
            assert response.getheader("connection") == "close"
            assert int(response.read()) == old
        wait_until(lambda: [each.pid for each in server.stats().workers] == pids(server))


def test_a_reload_that_comes_in_a_turn_of_the_loop_does_not_wait_for_the_request_after_it(
    gate: Gate, tmp_path: Path
) -> None:
    """S7."""
    begun = tmp_path / "begun"

    def last_a_turn_until_a_drain_comes(worker: ServerWorker) -> None:
        from waitress.parser import HTTPRequestParser
        from waitress.trigger import trigger

        told = threading.Event()
        pull, parse = trigger.pull_trigger, HTTPRequestParser.received

        def pull_trigger(self: Any, thunk: Any = None) -> None:
            pull(self, thunk)
            told.set()  # with one thread, nothing but a drain has a reason to

        def received(self: Any, data: bytes) -> Any:
            if b"/wait" in data:
                begun.touch()
                assert told.wait(60)
            return parse(self, data)

        if worker.generation == 1:
            trigger.pull_trigger, HTTPRequestParser.received = pull_trigger, received

    with Server(
        waiting_at(gate),
        ANY_PORT,
        workers=1,
        threads=1,
        dispatch="reuseport",
        on_worker_start=last_a_turn_until_a_drain_comes,
    ) as server:
        [old] = pids(server)
        with asked(server) as client:
            wait_until(begun.exists)
            assert server.reload().result(60) == 2
            assert old not in {int(get(server)[1]) for _ in range(10)}
            gate.let_pass()
            assert int(client.getresponse().read()) == old


@THREADS
def test_a_drain_that_comes_late_writes_to_nobody_elses_descriptor(threads: int, tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def tell_once_more_after_the_end(worker: ServerWorker) -> None:
        from fdpool._server.wsgi import WsgiFace

        serve = WsgiFace.serve

        def served(face: WsgiFace, ready: Callable[[], None]) -> None:
            serve(face, ready)
            number = face._servers[0].trigger.trigger
            theirs, ours = os.pipe()
            os.dup2(ours, number)
            face.drain(1.0, leaving=True)
            seen.write_text(str(is_readable(theirs)))

        WsgiFace.serve = served  # type: ignore[method-assign]

    with Server(wsgi, ANY_PORT, workers=1, threads=threads, on_worker_start=tell_once_more_after_the_end):
        pass
    assert seen.read_text() == "False"


@THREADS
def test_sigterm_in_the_midst_of_a_request_lets_it_finish_and_has_a_successor_first(
    threads: int, gate: Gate
) -> None:
    """W1."""
    with Server(waiting_at(gate), ANY_PORT, workers=1, threads=threads) as server:
        [old] = pids(server)
        with asked(server) as client:
            wait_until(lambda: in_flight(server))
            os.kill(old, signal.SIGTERM)
            os.kill(old, signal.SIGUSR1)
            wait_until(lambda: pids(server) not in ([old], []))
            gate.let_pass()
            assert int(client.getresponse().read()) == old


@THREADS
def test_sigint_in_the_midst_of_a_request_ends_the_worker(threads: int, gate: Gate) -> None:
    """W1: as where it comes between requests."""
    with Server(waiting_at(gate), ANY_PORT, workers=1, threads=threads) as server:
        [old] = pids(server)
        with connect(server) as client:
            client.sendall(b"GET /wait HTTP/1.0\r\n\r\n")
            wait_until(lambda: in_flight(server))
            os.kill(old, signal.SIGINT)
            wait_until(lambda: pids(server) not in ([old], []))
            assert int(get(server)[1]) != old
            if threads > 1:
                assert is_over(client)


def test_a_request_that_outlasts_the_grace_is_cut_off(
    gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S7."""
    # A worker that is asked where it is may wait for a core until it can say so.
    monkeypatch.setattr("fdpool._server.crew._STACKS_S", 1.0)
    with records(caplog) as logged:
        with Server(waiting_at(gate), ANY_PORT, workers=1, threads=1, grace=0.1) as server:
            with connect(server) as client:
                client.sendall(b"GET /wait HTTP/1.0\r\n\r\n")
                wait_until(lambda: in_flight(server))
                server.reload().result(60)
                assert is_over(client)
            wait_until(lambda: logged("worker_killed"))
            assert "test_inline.py" in logged("worker_killed")[0].stacks


def test_workers_are_replaced_after_so_many_requests_and_none_is_lost() -> None:
    with Server(wsgi, ANY_PORT, workers=2, threads=1, max_requests=20) as server:
        with Load(lambda: get(server)[1]) as load:
            wait_until(lambda: len(load.answered) >= 5, 60)
        assert load.failed == []


def test_a_worker_that_is_busy_leaves_connections_to_others(gate: Gate) -> None:
    with Server(waiting_at(gate), ANY_PORT, workers=2, threads=1) as server:
        with asked(server) as client:
            wait_until(lambda: in_flight(server))
            others = {int(get(server)[1]) for _ in range(20)}
            assert len(others) == 1
            gate.let_pass()
            assert int(client.getresponse().read()) not in others


def test_a_connection_is_handed_to_a_worker_that_has_a_thread_free_however_many_it_has_open(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._server.handoff._LOOK_S", 600.0)  # nothing is taken back
    with Server(waiting_at(gate), ANY_PORT, workers=2, threads=2, dispatch="handoff", grace=0) as server:
        loop = server._loop
        assert loop is not None

        def is_open() -> int:
            return sum(link.load()[1] for link in loop.crew.links.values())

        kept: dict[int, list[http.client.HTTPConnection]] = {pid: [] for pid in pids(server)}
        with contextlib.ExitStack() as clients:
            for count in range(1, 7):
                client = clients.enter_context(asked(server, "/"))
                kept[int(client.getresponse().read())].append(client)
                # An answer may be there before the worker has told that one more is open.
                wait_until(lambda count=count: in_flight(server) == 0 and is_open() == count)  # type: ignore[misc]
            busy, idle = kept
            assert len(kept[busy]) == len(kept[idle]) == 3
            kept[busy].pop().close()
            [link] = [each for each in loop.crew.links.values() if each.pid == busy]
            wait_until(lambda: link.load()[1] == 2)
            for client in kept[busy]:
                client.request("GET", "/wait")
            wait_until(lambda: in_flight(server) == 2)
            assert int(get(server)[1]) == idle
