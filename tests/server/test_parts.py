"""The parts of a server that need no workers: kinds of applications, accepting, handing over, what is stuck (S9)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import logging.handlers
import os
import queue
import random
import resource
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import psutil
import pytest

from fdpool import BindFailed
from fdpool._links import Waker
from fdpool._reserve import Reserve
from fdpool._server import apps, room, succession
from fdpool._server.accept import Acceptor
from fdpool._server.balance import Loads
from fdpool._server.handoff import Handoff, Laden, _Seat, choose
from fdpool._server.link import WorkerLink
from fdpool._server.listeners import Listeners, keys_of
from fdpool._server.logs import reopen_logs
from fdpool._server.pace import Pace, Weight
from fdpool._server.progress import Progress, Seen, SeenPage
from fdpool._server.silence import Silent
from fdpool._server.steering import queued, steer
from fdpool._server.succession import Succession
from fdpool._server.turns import Turns
from fdpool._server.watch import Finding, Verdict, Watch, is_stopped, judge, resident_bytes
from fdpool._server.worker import _Listening
from fdpool.sockets import StreamSocket
from tests.process_state import wait_until

# -- kinds of applications -------------------------------------------------------------------------------


class AsgiObject:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class WsgiObject:
    def __call__(self, environ: Any, start_response: Any) -> Any: ...


async def asgi_function(scope: Any, receive: Any, send: Any) -> None: ...


def kinds() -> Iterator[tuple[Any, str]]:
    yield AsgiObject(), "asgi"
    yield asgi_function, "asgi"
    yield WsgiObject(), "wsgi"
    yield lambda environ, start_response: [], "wsgi"
    yield lambda env, start_response: [], "wsgi"
    yield lambda connection, address: None, "handler"
    yield lambda connection, address, log=None: None, "handler"
    yield socketserver.StreamRequestHandler, "socketserver"
    yield lambda listeners: None, "listeners"
    yield lambda sockets, worker: None, "listeners"


@pytest.mark.parametrize(("app", "kind"), list(kinds()))
def test_the_kind_of_an_application_is_told_by_its_parameters(app: Any, kind: str) -> None:
    assert apps.interface_of(app) == kind


@pytest.mark.parametrize("target", ["", ":", "a:", ":b", "a b:c", "a:b()()", "a:b(1)", "a/b:c", "a:b-c"])
def test_a_name_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="module:attribute"):
        apps.check_target(target)


def test_a_named_application_is_found_and_a_factory_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found_here.py").write_text("class outer:\n    inner = 7\ndef make():\n    return 8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert apps.load("found_here:outer.inner") == 7
    assert apps.load("found_here:make()") == 8
    with pytest.raises(AttributeError, match=r"no 'missing', which 'found_here:outer.missing' asks for"):
        apps.load("found_here:outer.missing")


# -- descriptors that are free ----------------------------------------------------------------------------


@pytest.fixture
def spare(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """Set the limit so that this process may open so many descriptors more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def set_spare(count: int) -> None:
        limit = len(os.listdir("/dev/fd")) - 1 + count
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))

    yield set_spare
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("kernel_counts", [True, False])
def test_room_is_ample_until_no_more_than_the_margin_is_free(
    kernel_counts: bool, spare: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel_counts:  # Linux before 6.2, and others
        monkeypatch.setattr(os, "stat", lambda _: SimpleNamespace(st_size=0))
    spare(150)
    with contextlib.ExitStack() as opened:
        count = unseen = 0
        while (unseen := unseen - 1) >= 0 or (unseen := room.unseen(50)) >= 0:
            opened.enter_context(open(os.devnull))
            count += 1
    assert 98 <= count <= 100  # a look may take one itself
    spare(50)
    assert room.unseen(50) == -1


def test_no_more_than_a_quarter_of_what_is_spare_is_taken_unseen(spare: Callable[[int], None]) -> None:
    for free in range(51, 100):
        spare(free)
        assert 0 <= room.unseen(50) <= (free - 50) // 4
    spare(50 + 3200)
    assert room.unseen(50) >= 100


# -- accepting ---------------------------------------------------------------------------------------------


class Moody(socket.socket):
    """A listener whose accept(2) fails as it is told, and then does not."""

    moods: list[int]

    def accept(self) -> Any:
        if self.moods:
            number = self.moods.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.fixture
def moody() -> Iterator[Moody]:
    with Moody(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.moods = []
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.EAGAIN, errno.ENETUNREACH])
def test_what_befalls_one_connection_is_no_error(moody: Moody, number: int) -> None:
    """S9."""
    acceptor = Acceptor()
    moody.moods = [number]
    with socket.create_connection(moody.getsockname()):
        wait_until(lambda: queued(moody) == 1)
        assert acceptor.accept(moody) is None
        connection = acceptor.accept(moody)
        assert connection is not None
        connection.close()
    acceptor.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_where_nothing_is_left_it_pauses_ever_longer_and_recovers(
    moody: Moody, number: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S9."""
    acceptor = Acceptor()
    moody.moods = [number] * 6
    now = time.monotonic()
    monkeypatch.setattr("fdpool._server.accept.CLOCK", SimpleNamespace(monotonic=lambda: now))
    with socket.create_connection(moody.getsockname()):
        wait_until(lambda: queued(moody) == 1)
        pauses = []
        for _ in range(3):
            before = acceptor.paused_until
            assert acceptor.accept(moody) is None
            pauses.append(acceptor.paused_until - before)
        assert pauses[1] < pauses[2]
        assert len(caplog.records) == 1
        connection = acceptor.accept(moody)
        assert connection is not None
        connection.close()
        acceptor.replenish()
        assert acceptor.paused_until == 0
    acceptor.close()


def test_an_error_that_is_nobodys_fault_but_ours_is_raised(moody: Moody) -> None:
    acceptor = Acceptor()
    moody.moods = [errno.EINVAL]
    with pytest.raises(OSError, match="Invalid argument"):
        acceptor.accept(moody)
    acceptor.close()


def test_at_the_limit_the_reserve_lets_one_more_in(moody: Moody) -> None:
    """S9: with the real limit."""
    acceptor = Acceptor()
    with socket.create_connection(moody.getsockname()), socket.create_connection(moody.getsockname()):
        wait_until(lambda: queued(moody) == 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        filler = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    filler.append(os.open(os.devnull, os.O_RDONLY))
            first = acceptor.accept(moody)
            assert first is not None
            assert acceptor.accept(moody) is None
            first.close()
            acceptor.replenish()
            second = acceptor.accept(moody)
            assert second is not None
            second.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in filler:
                os.close(fd)
    acceptor.close()


def test_no_connection_lands_on_a_standard_stream() -> None:
    """R2: with 0 to 2 closed, the next one would be standard input."""
    script = (
        "import os, socket, sys; from fdpool._server.accept import Acceptor\n"
        "listener = socket.create_server(('127.0.0.1', 0)); listener.setblocking(False)\n"
        "clients = [socket.create_connection(listener.getsockname()) for _ in range(4)]\n"
        "os.closerange(0, 3); acceptor = Acceptor()\n"
        "accepted = [acceptor.accept(listener) for _ in clients]\n"
        "sys.exit(sum(each.fileno() < 3 for each in accepted))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_reserve_that_is_closed_is_not_filled_again() -> None:
    reserve = Reserve()
    assert reserve.give()
    assert not reserve.give()
    assert reserve.fill()
    reserve.close()
    assert not reserve.fill()


def test_two_workers_at_a_listener_that_blocks_do_not_wait_in_accept() -> None:
    """M17: a POSIX lock on the listener itself; only its holder accepts, and only what is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = Acceptor()
        assert acceptor.accept(listener) is None  # nothing is there, and it does not wait
        with socket.create_connection(listener.getsockname()):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                import fcntl

                fcntl.lockf(listener, fcntl.LOCK_EX)
                os.close(reading)
                os.write(writing, b"x")
                __import__("signal").pause()
            os.close(writing)
            os.read(reading, 1)
            assert acceptor.accept(listener) is None  # it is another's turn
            os.kill(child, 9)
            os.waitpid(child, 0)
            connection = acceptor.accept(listener)  # its lock is gone with it
            assert connection is not None
            connection.close()
            os.close(reading)
        assert listener.getblocking()
        assert os.get_blocking(listener.fileno())
        acceptor.close()


# -- signals to a worker --------------------------------------------------------------------------------------


def test_a_signal_that_came_just_before_the_main_thread_blocked_is_heeded_soon() -> None:
    class Heeded(Exception):
        pass

    missed = [Heeded]

    def on_sigurg(*_: object) -> None:
        if missed:
            raise missed.pop()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGURG)
    with contextlib.ExitStack() as opened:
        for number in numbers:
            opened.callback(signal.signal, number, signal.getsignal(number))
        opened.callback(signal.set_wakeup_fd, -1)
        mine, theirs = StreamSocket.pair()
        opened.callback(mine.close)
        signal.signal(signal.SIGURG, on_sigurg)
        listening = _Listening(mine, cast("Any", None))
        listening.start()
        [thread] = [each for each in threading.enumerate() if each.name == "fdpool-server-control"]
        opened.callback(listening._waker.close)
        opened.callback(thread.join)
        opened.callback(theirs.close)
        with pytest.raises(Heeded):
            os.write(listening._waker.write_fileno(), bytes([signal.SIGINT]))  # as the kernel's handler does
            select.select([], [], [], 20)


# -- listeners ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", [b"x", bytearray(b"x")])
def test_bytes_are_not_taken_for_the_ports_of_a_server(bind: Any) -> None:
    with pytest.raises(TypeError, match="a bind is a string"):
        Listeners(bind, 100, reuseport=False, slots=1)


def test_listeners_apart_are_chosen_among_by_the_kernel_as_it_is_told() -> None:
    listeners = Listeners("127.0.0.1:0", 100, reuseport=True, slots=4)
    try:
        assert listeners.steer(2)
        address = listeners.of(0)[0].getsockname()
        clients = [socket.create_connection(address) for _ in range(40)]
        # A client may be connected before the kernel has put its connection into a queue.
        wait_until(lambda: sum(queued(listeners.of(slot)[0]) for slot in range(4)) == 40)
        lengths = [queued(listeners.of(slot)[0]) for slot in range(4)]
        assert lengths[2:] == [0, 0]
        assert min(lengths[:2]) > 5
        assert listeners.queued_above(1) == lengths[1]
        for client in clients:
            client.close()
    finally:
        listeners.close()


@pytest.mark.parametrize("reuseport", [True, False])
def test_listeners_of_who_is_to_come_get_no_connection_before_somebody_serves_there(reuseport: bool) -> None:
    """Nor do those of who was there and is not to come."""
    with contextlib.ExitStack() as opened:
        first = Listeners("127.0.0.1:0", 100, reuseport=True, slots=2)
        opened.callback(first.close)
        handed = [(slot, listener.handover(listener.socket.fileno())) for _, slot, listener in first.all()]
        successor = Listeners(
            "127.0.0.1:0", 100, reuseport, slots=4, inherited={"127.0.0.1:0": handed}, served=first.served
        )
        opened.callback(successor.close)
        successor.prepare(4)
        address = first.of(0)[0].getsockname()
        for _ in range(40):
            opened.enter_context(socket.create_connection(address))
        wait_until(lambda: sum(queued(each.socket) for _, _, each in first.all()) == 40)
        assert [queued(each.socket) > 0 for _, _, each in first.all()] == [True, reuseport]
        if reuseport:
            assert successor.steer(4)
            for _ in range(40):
                opened.enter_context(socket.create_connection(address))
            assert successor.queued_above(2) > 5


def test_a_bind_that_the_process_before_did_not_have_has_a_listener_of_each_slot_too() -> None:
    with contextlib.ExitStack() as opened:
        first = Listeners("127.0.0.1:0", 100, reuseport=True, slots=2)
        opened.callback(first.close)
        handed = [(slot, listener.handover(listener.socket.fileno())) for _, slot, listener in first.all()]
        binds, inherited = ["127.0.0.1:0", "127.0.0.2:0"], {"127.0.0.1:0": handed}
        successor = Listeners(binds, 100, True, slots=2, inherited=inherited, served=2)
        opened.callback(successor.close)
        addresses = [[each.getsockname() for each in successor.of(slot)] for slot in range(2)]
        assert addresses[0] == addresses[1]
        assert [host for host, _ in addresses[0]] == ["127.0.0.1", "127.0.0.2"]
        for _ in range(40):
            opened.enter_context(socket.create_connection(addresses[0][1]))
        assert min(queued(successor.of(slot)[1]) for slot in range(2)) > 5


def test_what_cannot_be_steered_says_so() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        assert not steer(listener, 2)


def test_listeners_that_are_handed_on_are_found_by_what_they_were_bound_for(tmp_path: Path) -> None:
    binds = ["127.0.0.1:0", f"unix:{tmp_path}/a.sock", f"unix:{tmp_path}/b.sock"]
    first = Listeners(binds, 10, reuseport=False, slots=1)
    handed: dict[str, list[tuple[int, str]]] = {}
    for key, slot, listener in first.all():
        handed.setdefault(key, []).append((slot, listener.handover(listener.socket.fileno())))
    with pytest.raises(BindFailed):
        Listeners([binds[2], "unix:/nowhere/c.sock"], 10, reuseport=False, slots=1, inherited=handed)
    again = Listeners(binds[:2], 10, reuseport=False, slots=1, inherited=handed)
    again.close()  # it has not come to serve
    again = Listeners(binds[:2], 10, reuseport=False, slots=1, inherited=handed)
    assert [each.address for each in again.first] == [each.address for each in first.first[:2]]
    assert (tmp_path / "b.sock").exists()
    again.take_over()
    first.close(keep_path=True)
    assert (tmp_path / "a.sock").exists()
    assert not (tmp_path / "b.sock").exists()  # nobody listens there any more
    again.close()
    assert not (tmp_path / "a.sock").exists()


def test_listeners_that_are_handed_on_are_found_however_their_bind_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the program's next code. Another mode is another file, which has to be made anew."""
    monkeypatch.chdir(tmp_path)
    assert keys_of([8000, "localhost:80", "[::A]:80", "unix:b.sock?mode=660", "unix:@b"]) == keys_of(
        [
            "tcp://127.0.0.1:8000",
            "LocalHost:80",
            "tcp://[::a]:80",
            f"unix://{tmp_path}/b.sock?mode=0660",
            "unix:@b",
        ]
    )
    assert keys_of(["systemd:b", 80, "systemd:a"]) == keys_of(["systemd:a", "systemd:b", 80])
    assert keys_of("systemd:b") != keys_of("systemd:a") != keys_of("systemd")
    assert keys_of("unix:b.sock?mode=660") != keys_of("unix:b.sock?mode=600") != keys_of("unix:b.sock")
    with contextlib.ExitStack() as closing:
        first = Listeners([0, "unix:a.sock"], 10, reuseport=False, slots=1)
        closing.callback(first.close)
        handed: dict[str, list[tuple[int, str]]] = {}
        for key, slot, listener in first.all():
            handed.setdefault(key, []).append((slot, listener.handover(listener.socket.fileno())))
        binds = ["127.0.0.1:0", f"unix:{tmp_path}/a.sock"]
        again = Listeners(binds, 10, reuseport=False, slots=1, inherited=handed)
        closing.callback(again.close)
        assert [each.address for each in again.first] == [each.address for each in first.first]


@pytest.mark.parametrize("reuseport", [False, True])
def test_a_free_port_that_is_asked_for_twice_is_two_also_when_it_is_handed_on(reuseport: bool) -> None:
    binds = ["127.0.0.1:0", 0, "127.0.0.1:0", 0]
    with contextlib.ExitStack() as closing:
        first = Listeners(binds, 10, reuseport, slots=2)
        closing.callback(first.close)
        addresses = [each.address for each in first.first]
        assert len(set(addresses)) == 4
        handed: dict[str, list[tuple[int, str]]] = {}
        for key, slot, listener in first.all():
            handed.setdefault(key, []).append((slot, listener.handover(listener.socket.fileno())))
        again = Listeners(binds, 10, reuseport, slots=2, inherited=handed)
        closing.callback(again.close)
        assert [each.address for each in again.first] == addresses


def test_a_port_that_is_asked_for_twice_is_one_listener() -> None:
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        listeners = Listeners([f"127.0.0.1:{port}"] * 2, 10, reuseport=True, slots=1)
        assert [each.address for each in listeners.first] == [f"tcp://127.0.0.1:{port}"]
        listeners.close()


# -- a successor ---------------------------------------------------------------------------------------------


class Refusing:
    """A successor that will not serve, and takes its time to end: its workers finish what they run."""

    pid = 2
    is_gone = False

    def __init__(self, *_: object) -> None:
        self.control, theirs = StreamSocket.pair()
        theirs.close()

    def is_ready(self) -> bool:
        raise EOFError

    def reap(self) -> None:
        return None

    def close(self) -> None:
        self.control.close()

    def kill(self) -> None:
        self.is_gone = True


def test_a_successor_that_will_not_serve_is_not_waited_for_until_connections_are_ours_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has had some at listeners that are its own, and takes none any more."""
    steered: list[int] = []
    listeners: Any = SimpleNamespace(all=list, served=3, steer=steered.append)
    monkeypatch.setattr(succession, "Successor", Refusing)
    with contextlib.closing(Turns()) as turns:
        coming = Succession(turns, listeners, 60.0, 60.0, lambda: None)
        coming.begin()
        turns.take(None)
        assert steered == [3]
        coming.close()


# -- handing over --------------------------------------------------------------------------------------------


def laden(number: int, waiting: int = 0, open: int = 0, most: int = 3, slow: bool = False) -> Laden:  # noqa: A002
    return Laden(number, waiting, open, most, slow)


def test_the_least_laden_is_handed_the_next() -> None:
    assert choose([laden(1, open=2), laden(2, waiting=1), laden(3, open=1, waiting=1)], 0) == 2
    assert choose([laden(1, open=1), laden(2)], 2) == 2


def test_who_has_a_thread_free_is_handed_the_next_before_who_has_less_open() -> None:
    crew = [laden(1, open=1)._replace(busy=True), laden(2, open=2)]
    assert choose(crew, 0) == 2
    assert choose([each._replace(busy=True) for each in crew], 0) == 1


def test_equals_take_turns() -> None:
    last, order = 0, []
    for _ in range(6):
        found = choose([laden(1), laden(2), laden(3)], last)
        assert found is not None
        last = found
        order.append(last)
    assert order == [1, 2, 3, 1, 2, 3]


def test_nobody_is_handed_one_who_is_full_or_stands_still() -> None:
    assert choose([laden(1, open=3), laden(2, slow=True)], 0) is None
    assert choose([], 0) is None


@pytest.mark.parametrize("seed", range(5))
def test_whoever_is_chosen_has_room_and_nobody_has_less(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        crew = [
            laden(
                number,
                chance.randrange(3),
                chance.randrange(3),
                chance.randrange(1, 5),
                chance.random() < 0.2,
            )
            for number in range(chance.randrange(5))
        ]
        able = [each for each in crew if not each.slow and each.load < each.most]
        found = choose(crew, chance.randrange(5))
        assert (found is None) == (not able)
        if found is not None:
            assert next(each for each in able if each.number == found).load == min(each.load for each in able)


@contextlib.contextmanager
def seat(begun: int, finished: int, threads: int) -> Iterator[_Seat]:
    """Of a worker that had finished nothing as it was decided to look."""
    with contextlib.closing(SeenPage()) as page, contextlib.closing(Progress(page.fd)) as progress:
        requests = [progress.begin() for _ in range(begun)]
        for request in requests[:finished]:
            progress.end(request)
        progress.runs_at_most(threads)
        link: Any = SimpleNamespace(see=page.see, is_busy=page.is_busy)
        with contextlib.closing(_Seat(link)) as found:
            yield found


@pytest.mark.parametrize(
    ("waits_at", "other", "is_later"),
    [
        ((2, 0, 2), (2, 0, 2), False),
        ((2, 0, 2), (1, 0, 2), True),
        ((2, 0, 2), (1, 1, 2), True),
        ((2, 0, 2), (3, 1, 2), True),
        ((3, 1, 2), (3, 1, 2), False),
        ((1, 0, 2), (2, 0, 2), True),  # it has a thread free, and takes nothing all the same
        ((2, 1, 2), (2, 0, 2), False),  # it has a thread free only now
        ((1, 0, 0), (1, 0, 0), True),
    ],
)
def test_a_connection_leaves_a_worker_whose_threads_are_busy_only_for_one_that_takes_it_sooner(
    waits_at: tuple[int, int, int], other: tuple[int, int, int], is_later: bool
) -> None:
    with seat(*waits_at) as mine, seat(*other) as theirs:
        assert mine.is_later_than(theirs) == is_later


def test_a_worker_whose_inbox_cannot_be_watched_has_none_and_costs_no_descriptor() -> None:
    """`epoll_ctl` fails with ENOSPC or ENOMEM."""

    class Full:
        def watch(self, source: socket.socket, action: Callable[[], object]) -> None:
            raise OSError(errno.ENOSPC, "no room")

        def unwatch(self, source: socket.socket) -> None:
            raise KeyError(source)  # as a selector does

    handoff = Handoff(cast("Any", Full()), [])
    with contextlib.closing(handoff):
        before = os.listdir("/dev/fd")
        with pytest.raises(OSError, match="no room"):
            handoff.seat(cast("Any", SimpleNamespace(number=1)))
        assert os.listdir("/dev/fd") == before
        handoff.gone(1)


def test_what_an_event_ends_is_not_told_of_its_own_that_came_with_it() -> None:
    """Nor is what is watched by the same number from then on."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(3)))
    told: list[int] = []

    def on_event(number: int) -> None:
        told.append(number)
        for other in {0, 1, 2} - {number}:
            turns.unwatch(ours[other])
            turns.watch(ours[other], lambda: told.append(-1))

    with contextlib.closing(Turns()) as turns:
        for number, source in enumerate(ours):
            turns.watch(source, partial(on_event, number))
        for each in theirs:
            each.send(b"x")
        turns.take(None)
        assert len(told) == 1
        for each in ours:
            turns.unwatch(each)
    for each in (*ours, *theirs):
        each.close()


def test_a_connection_is_kept_only_as_long_as_a_worker_could_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T3."""
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.closing(Turns()) as turns:
        silent = Silent(turns, lambda _: None)
        monkeypatch.setattr(room, "unseen", lambda margin: -1)
        assert not silent.keep(ours)
        monkeypatch.setattr(room, "unseen", lambda margin: 0)
        assert silent.keep(ours)
        assert silent.release() == [ours]


def test_those_who_say_nothing_are_handed_over_where_it_is_the_worker_who_speaks_first() -> None:
    """As after a reload that brings another kind of application."""
    with silent_and_seated() as (handoff, ours, link):
        handoff.opened(link.number, 1, clients_speak_first=False)
        assert handoff.handed == 1
        assert ours.fileno() == -1


@pytest.mark.parametrize("leaving", [True, False])
def test_as_all_leave_those_who_say_nothing_are_closed_as_idle_ones_are(leaving: bool) -> None:
    with silent_and_seated() as (handoff, ours, _):
        handoff.stop(leaving)
        assert handoff.is_empty == leaving
        assert (ours.fileno() == -1) == leaving


@contextlib.contextmanager
def silent_and_seated() -> Iterator[tuple[Handoff, socket.socket, Any]]:
    """A server that has a connection on which nothing was said, and a worker that does not serve yet."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(Turns()) as turns, contextlib.closing(Handoff(turns, [])) as handoff:
        link: Any = SimpleNamespace(number=1, load=lambda: (0, 0), is_busy=lambda _: False, pid=1)
        link.wait_for_end, link.see = lambda _: None, lambda: Seen(0, 0, None, None)
        inbox = handoff.seat(link)
        handoff._clients_speak_first = True
        assert handoff._silent.keep(ours)
        yield handoff, ours, link
        handoff.gone(1)
        inbox.close()


def test_listeners_that_cannot_be_watched_for_now_are_all_watched_a_little_later() -> None:
    class FullOnce:
        watched: ClassVar[list[object]] = []
        later_on: ClassVar[list[Callable[[], object]]] = []
        full_at = 1

        def watch(self, source: object, action: Callable[[], object]) -> None:
            if len(self.watched) == self.full_at:
                raise OSError(errno.ENOMEM, "no room")
            self.watched.append(source)

        def unwatch(self, source: object) -> None:
            self.watched.remove(source)

        def later(self, pause_s: float, action: Callable[[], object]) -> None:
            self.later_on.append(action)

    turns, listeners = FullOnce(), [cast("Any", "one"), cast("Any", "two")]
    with contextlib.closing(Handoff(cast("Any", turns), listeners)) as handoff:
        handoff._watch(True)
        assert turns.watched == []
        assert turns.later_on == [handoff._pump]
        turns.full_at = -1
        handoff._watch(True)
        assert turns.watched == listeners
    assert turns.watched == []


def test_a_forked_child_forgets_the_handing_over_whatever_the_servers_thread_was_at() -> None:
    """That thread is not there to let go of a lock, and the fork would not return in the child."""
    handoff = Handoff(cast("Any", None), [])
    with handoff._reserve._lock, handoff._acceptor._reserve._lock:
        in_child = threading.Thread(target=handoff.forget)
        in_child.start()
        in_child.join(10)
        assert not in_child.is_alive()


# -- how many an event loop takes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn_s", "begun_in_it", "at_once"),
    [(0.01, 1, 1), (0.0004, 1, 5), (0.001, 16, 32), (0.0, 1, 32), (0.1, 40, 1)],
)
def test_an_event_loop_takes_as_many_at_once_as_it_begins_in_two_milliseconds(
    turn_s: float, begun_in_it: int, at_once: int
) -> None:
    pace = Pace()
    assert pace.at_once == 1
    pace.left_some(0.0, 7)
    pace.left_some(turn_s, 7 + begun_in_it)
    assert pace.at_once == at_once


def test_turns_in_which_nothing_is_begun_and_idle_time_say_nothing_of_how_long_requests_take() -> None:
    pace = Pace()
    pace.left_some(0.0, 0)
    pace.left_some(0.00001, 0)  # quick, as the first one's request has yet to be read
    assert pace.at_once == 1
    pace.left_some(0.001, 4)
    assert pace.at_once == 8
    pace.took_all()
    pace.left_some(200.0, 5)
    assert pace.at_once == 8


def test_requests_are_long_that_keep_the_loop_for_a_millisecond_by_computing_or_waiting() -> None:
    weight = Weight()
    assert not weight.is_long(40.0, 100)  # what was before says nothing
    assert not weight.is_long(40.1, 300)
    assert weight.is_long(40.3, 400)
    assert weight.is_long(40.3, 400)  # none has begun
    assert weight.is_long(40.36, 500)
    assert not weight.is_long(40.4, 600)
    for turn_s, begun in [(0.02, 4), (0.03, 6), (0.001, 2)]:
        weight.took(turn_s, begun)
    weight.took(1.0, 0)  # nobody has begun in it
    assert not weight.is_long(40.4, 700)  # in others it may have been kept from the processor
    weight.took(0.02, 2)
    weight.took(0.02, 2)
    assert not weight.is_long(40.4, 800)
    weight.took(0.02, 2)
    assert weight.is_long(40.4, 900)


# -- progress --------------------------------------------------------------------------------------------------


def test_the_server_sees_what_a_worker_tells() -> None:
    page = SeenPage()
    progress = Progress(page.fd)
    assert page.see() == Seen(0, 0, None, None)
    first, second = progress.begin(), progress.begin()
    seen = page.see()
    assert (seen.begun, seen.in_flight) == (2, 2)
    oldest = seen.oldest
    assert oldest is not None
    progress.touch(first)
    assert page.see().oldest > oldest  # type: ignore[operator]
    assert progress.end(second) == 1
    assert progress.end(first) == 2
    progress.beat()
    progress.took()
    progress.has_open(1)
    seen = page.see()
    assert (seen.in_flight, seen.oldest, seen.taken, seen.open) == (0, None, 1, 1)
    assert seen.beat is not None
    assert not page.is_busy()
    progress.begin()
    assert not page.is_busy()
    progress.runs_at_most(1)
    assert page.is_busy()
    assert not progress.waited_for
    page.wait_for_end(True)
    assert progress.waited_for
    progress.close()
    page.close()


def test_connections_that_end_in_several_threads_at_once_are_open_no_more() -> None:
    """Whichever thread tells last; or the worker would be taken for one that has more to do, as long as it is idle."""

    class Interrupted(Progress):
        """At its first look at how many run, another thread ends its own, and tells."""

        @property
        def in_flight(self) -> int:
            found = super().in_flight
            if found == 1 and (thread := threads.pop() if threads else None) is not None:
                thread.start()
                thread.join(0.2)  # it may have to wait for us
                started.append(thread)
            return found

    def end_other() -> None:
        progress.end(other)
        progress.has_open_what_runs()

    started: list[threading.Thread] = []
    threads = [threading.Thread(target=end_other)]
    with contextlib.closing(SeenPage()) as page, contextlib.closing(Interrupted(page.fd)) as progress:
        one, other = progress.begin(), progress.begin()
        progress.has_open_what_runs()
        assert page.see().open == 2
        progress.end(one)
        progress.has_open_what_runs()
        [thread] = started
        thread.join()
        assert page.see().open == 0


@pytest.mark.parametrize(
    ("seen", "limit", "stuck"),
    [
        (Seen(1, 0, 90.0, None), 5.0, True),
        (Seen(1, 0, 96.0, None), 5.0, False),
        (Seen(0, 0, None, None), 5.0, False),
        (Seen(0, 0, None, 90.0), 5.0, True),
        (Seen(1, 0, 90.0, None), None, False),
        (Seen(1, 0, 99.0, 90.0), 5.0, True),
    ],
)
def test_a_worker_is_stuck_if_its_oldest_request_or_its_loop_has_not_moved_on(
    seen: Seen, limit: float | None, stuck: bool
) -> None:
    assert (judge(seen, 100.0, limit) is not None) is stuck


def test_where_everything_has_stood_still_workers_have_their_time_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A control group that is frozen, a virtual machine that is stopped."""
    link: Any = SimpleNamespace(
        number=1,
        interface="handler",
        pid=None,
        ready_at=0.0,
        lost=False,
        see=lambda: Seen(1, 0, 100.0, None),
        stopped_since=None,
    )
    monkeypatch.setattr("fdpool._server.watch.CLOCK", SimpleNamespace(monotonic=lambda: 100.0))
    watch = Watch(5.0, None)
    assert list(watch.look([link], 101.0)) == []
    assert list(watch.look([link], 700.0)) == []
    for now in (701.0, 702.0, 703.0, 704.0):
        assert list(watch.look([link], now)) == []
    [finding] = watch.look([link], 705.5)
    assert finding.verdict is Verdict.STUCK


class Still:
    """A link to a worker that does nothing, as far as `Watch` looks at it."""

    number = 1
    interface = "wsgi"
    pid = None
    ready_at = 0.0
    stopped_since = None
    lost = False

    def __init__(self) -> None:
        self.since: float | None = 0.0

    def see(self) -> Seen:
        return Seen(1, 0, self.since, None)


def test_a_worker_that_stands_still_is_told_once_for_each_time() -> None:
    link, watch = Still(), Watch(None, None)

    def look(now: float) -> list[Finding]:
        watch.next_look = now
        return list(watch.look([link], now))  # type: ignore[list-item]

    assert look(29.0) == []
    assert look(31.0) == [Finding(1, Verdict.SLOW, "a request has not moved on for 31.0 seconds")]
    assert look(32.0) == look(300.0) == []
    link.since = 310.0
    assert look(320.0) == []
    assert [found.verdict for found in look(341.0)] == [Verdict.SLOW]
    link.interface = "handler"
    link.since = 1000.0
    assert look(2000.0) == []


def test_a_process_is_looked_at_whatever_it_is_called(tmp_path: Path) -> None:
    program = tmp_path / "x) T (T) "  # proc_pid_stat(5) has the name in brackets, as it is
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            looked_at = psutil.Process(process.pid)
            wait_until(lambda: looked_at.name() == program.name)
            assert not is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: looked_at.status() == psutil.STATUS_STOPPED)
            assert is_stopped(process.pid)
            assert resident_bytes(process.pid) == looked_at.memory_info().rss > 0
        finally:
            process.kill()
    assert not is_stopped(process.pid)
    assert resident_bytes(process.pid) is None
    assert resident_bytes(None) is None
    assert not is_stopped(None)


class Trigger:
    """waitress's trigger, as far as `Threads` have to do with it: a pipe with bytes in it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.as_it_is_read: Callable[[], object] = lambda: None

    def _physical_pull(self) -> None:
        self.bytes += 1

    def recv(self, size: int) -> bytes:
        self.as_it_is_read()
        found, self.bytes = self.bytes, 0
        return b"x" * found


def test_waitress_is_woken_once_for_many_and_never_too_few_times() -> None:
    """A pull at any moment of a read is followed by another read, or by what that read leads to."""
    pytest.importorskip("waitress")
    from fdpool._server.threads import Threads

    trigger = Trigger()
    Threads(2).prepare(SimpleNamespace(trigger=trigger))
    for _ in range(3):
        trigger._physical_pull()
    assert trigger.bytes == 1
    trigger.as_it_is_read = trigger._physical_pull
    assert trigger.recv(100)
    trigger._physical_pull()
    assert trigger.bytes == 1


@pytest.mark.parametrize("step_s", [1e6, -1e6])
def test_the_wait_for_waitress_threads_heeds_no_clock_that_is_set(
    step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S11."""
    pytest.importorskip("waitress")
    from fdpool._server.threads import Threads

    class Task:
        begun, may_end = threading.Event(), threading.Event()

        def service(self) -> None:
            self.begun.set()
            self.may_end.wait()

    tasks, task = Threads(1), Task()
    with tasks.running():
        tasks.add_task(task)
        assert task.begun.wait(20)
    now = itertools.count(time.time(), step_s)
    monkeypatch.setattr(time, "time", lambda: next(now))
    tasks.shutdown(timeout=0.05)
    assert tasks.threads, "it is not waited for beyond the time"
    waiter = threading.Thread(target=tasks.shutdown, kwargs={"timeout": 60})
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive(), "it is waited for until the time"
    task.may_end.set()
    waiter.join(20)
    assert not waiter.is_alive()
    assert not tasks.threads


# -- log files ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that there are (pytest's, of /dev/null) are not to have other descriptors after the test."""
    monkeypatch.setattr(logging, "_handlerList", [])


@contextlib.contextmanager
def log_file(path: Path, mode: str = "a") -> Iterator[logging.FileHandler]:
    """A handler that has a file open, and is attached to nothing."""
    handler = logging.FileHandler(path, mode)
    try:
        yield handler
    finally:
        handler.close()


@pytest.mark.parametrize("mode", ["w", "x"])
@pytest.mark.usefixtures("no_handlers")
def test_a_log_file_that_is_opened_anew_keeps_what_others_have_written_there(
    tmp_path: Path, mode: str
) -> None:
    """Each worker opens the new file, and so does each that comes later."""
    with log_file(tmp_path / "log", mode) as handler:
        (tmp_path / "log").rename(tmp_path / "old")
        (tmp_path / "log").write_text("another\n")
        assert reopen_logs() == 1
        handler.handle(logging.makeLogRecord({"msg": "this"}))
        assert (tmp_path / "log").read_text() == "another\nthis\n"
        assert handler.mode == mode


@pytest.mark.parametrize("through", ["memory", "queue"])
@pytest.mark.usefixtures("no_handlers")
def test_log_files_behind_other_handlers_are_opened_anew(tmp_path: Path, through: str) -> None:
    record = logging.makeLogRecord({"msg": "this", "levelno": logging.INFO})
    with log_file(tmp_path / "log") as handler:
        (tmp_path / "log").rename(tmp_path / "old")
        if through == "memory":
            memory = logging.handlers.MemoryHandler(100, target=handler)
            memory.handle(record)
            reopen_logs()
            memory.close()
        else:
            entries: queue.SimpleQueue[Any] = queue.SimpleQueue()
            listener = logging.handlers.QueueListener(entries, handler)  # type: ignore[arg-type]
            logging.handlers.QueueHandler(entries).handle(record)  # type: ignore[arg-type]
            reopen_logs()
            listener.start()
            listener.stop()
        assert (tmp_path / "log").read_text() == "this\n"


@pytest.mark.parametrize("make", [Waker, SeenPage, lambda: Loads(2), lambda: WorkerLink(1, 0, 1)])
def test_a_child_that_is_forked_as_something_is_closed_closes_no_number_twice(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes its copies, and may come before a close is noted: the number may be another's by then."""
    closed: list[int] = []
    close = os.close

    def close_as_in_a_child(fd: int) -> None:
        closed.append(fd)
        made.close()
        close(fd)

    made = make()
    if isinstance(made, WorkerLink):
        made.pidfd = os.dup(0)
    monkeypatch.setattr(os, "close", close_as_in_a_child)
    made.close()
    monkeypatch.undo()
    assert len(closed) == len(set(closed)) > 0
