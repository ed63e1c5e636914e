"""One system call a message: the try-verbs, their waiting twins, `Inbox`, and `DatagramSocket`."""

from __future__ import annotations

import array
import errno
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

import pytest

from fdpool import wire
from fdpool.errors import FdTransferError, PayloadTooLarge, WireError
from fdpool.fds import Fd, close_all
from fdpool.sockets import DatagramSocket
from fdpool.wire import Inbox
from tests.chaos.disorder import room_for

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux sockets")
SO_PASSPIDFD, SO_PASSRIGHTS = 76, 83
SCM_RIGHTS, SCM_PIDFD = socket.SCM_RIGHTS, 4

Receive = Callable[[socket.socket, int, int], "wire.Received | None"]
EVERY_RECEIVE = pytest.mark.parametrize(
    "receive",
    [
        wire.try_receive,
        wire.receive,
        lambda sock, max_bytes, max_fds: Inbox(sock, max_bytes, max_fds).try_receive(),
        lambda sock, max_bytes, max_fds: Inbox(sock, max_bytes + 200_000, max_fds).receive(),
    ],
    ids=["try_receive", "receive", "Inbox.try_receive", "Inbox.receive"],
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second:
        yield first, second


@pytest.fixture
def pair() -> Iterator[tuple[DatagramSocket, DatagramSocket]]:
    first, second = DatagramSocket.pair()
    with first, second:
        yield first, second


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Read ends of five pipes: five files that can be told from each other."""
    both = [os.pipe() for _ in range(5)]
    yield [read_end for read_end, _ in both]
    close_all(fd for ends in both for fd in ends)


def files(fds: list[int]) -> list[int]:
    """What the descriptors refer to, comparable."""
    return [os.fstat(fd).st_ino for fd in fds]


def open_fds() -> set[int]:
    """Every open number; not the one that listed them."""
    listed = [int(name) for name in os.listdir("/dev/fd")]
    return {fd for fd in listed if is_open(fd)}


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class FakeSocket:
    """A socket whose answers are written down beforehand; an exception among them is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def recvmsg(self, *_: object) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    sendmsg = send = recvmsg

    def close(self) -> None:
        pass

    def as_socket(self) -> socket.socket:
        return cast("socket.socket", self)


# -- the verbs -----------------------------------------------------------------------------------


@EVERY_RECEIVE
def test_a_message_arrives_with_its_bytes_and_its_descriptors_in_order(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], receive: Receive
) -> None:
    assert wire.try_send(ends[0], (b"head", memoryview(b"body")), pipes)
    assert wire.try_send(ends[0], [b"single"])
    received = receive(ends[1], 100, 253)
    assert received is not None
    assert (received.data, received.bytes_cut, received.fds_lost) == (b"headbody", False, False)
    assert files(received.fds) == files(pipes)
    assert not any(os.get_inheritable(fd) for fd in received.fds)
    close_all(received.fds)
    assert receive(ends[1], 100, 253) == (b"single", [], False, False)


def test_try_receive_gives_none_where_receive_would_wait(ends: tuple[socket.socket, socket.socket]) -> None:
    assert wire.try_receive(ends[1], 100) is None
    assert Inbox(ends[1], 100).try_receive() is None


def test_try_send_gives_false_where_send_would_wait(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    while wire.try_send(ends[0], (b"x",)):
        pass

    def make_room(sock: socket.socket, events: int) -> None:
        assert (sock, events) == (ends[0], select.POLLOUT)
        while wire.try_receive(ends[1], 10):
            pass

    monkeypatch.setattr(wire, "wait_for", make_room)
    wire.send(ends[0], (b"waited",))
    assert wire.receive(ends[1], 10).data == b"waited"


@pytest.mark.parametrize("inbox", [False, True])
def test_receive_waits_whatever_the_blocking_mode_which_it_leaves_alone(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, inbox: bool
) -> None:
    os.set_blocking(ends[1].fileno(), False)

    def send_something(sock: socket.socket, events: int) -> None:
        assert (sock, events) == (ends[1], select.POLLIN)
        ends[0].send(b"late")

    monkeypatch.setattr(wire, "wait_for", send_something)
    received = Inbox(ends[1], 10).receive() if inbox else wire.receive(ends[1], 10)
    assert received.data == b"late"
    assert not os.get_blocking(ends[1].fileno())


@EVERY_RECEIVE
@pytest.mark.parametrize("count", [2, 5, 200])
def test_more_descriptors_than_asked_for_are_closed_and_reported(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], receive: Receive, count: int
) -> None:
    """T2: the caller learns of it, has at most what it asked for, and nothing else is open."""
    before = open_fds()
    wire.try_send(ends[0], (b"header",), pipes[:1] * count)
    received = receive(ends[1], 100, 1)
    assert received is not None
    assert (received.data, len(received.fds), received.fds_lost) == (b"header", 1, True)
    close_all(received.fds)
    assert open_fds() == before


@EVERY_RECEIVE
def test_no_room_in_the_table_of_descriptors_is_reported_with_the_bytes(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], receive: Receive
) -> None:
    """T2, T3 (wire part): the header, and with it the task's id, is never lost."""
    wire.try_send(ends[0], (b"header",), pipes)
    with room_for(0):
        received = receive(ends[1], 100, 253)
    assert received == (b"header", [], False, True)
    wire.try_send(ends[0], (b"next",), pipes)
    following = receive(ends[1], 100, 253)
    assert following is not None
    assert (following.data, len(following.fds)) == (b"next", 5)
    close_all(following.fds)


@pytest.mark.parametrize("with_fds", [False, True])
def test_a_cut_message_is_reported_and_its_descriptors_are_the_callers(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], with_fds: bool
) -> None:
    """T24"""
    for take in (wire.try_receive, lambda sock, size: Inbox(sock, size).try_receive()):
        wire.try_send(ends[0], (b"too long",), pipes if with_fds else ())
        received = take(ends[1], 3)
        assert received is not None
        assert (received.data, received.bytes_cut, received.fds_lost) == (b"too", True, False)
        assert len(received.fds) == 5 * with_fds
        close_all(received.fds)


def test_a_message_whose_descriptors_find_no_room_can_be_left_where_it_is(
    ends: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    before = open_fds()
    wire.try_send(ends[0], (b"first",), pipes)
    wire.try_send(ends[0], (b"second",))
    for room in range(5):
        with room_for(room), pytest.raises(OSError, match="Too many open files") as caught:
            wire.try_take(ends[1], 100)
        assert caught.value.errno == errno.EMFILE
        assert open_fds() == before
    for room in (5, 9, 10):  # for its descriptors once, almost twice, twice
        with room_for(room):
            received = wire.try_take(ends[1], 100)
        assert received is not None
        assert (received.data, received.fds_lost) == (b"first", False)
        assert files(received.fds) == files(pipes)
        assert open_fds() == before | set(received.fds)
        assert wire.try_take(ends[1], 100) == (b"second", [], False, False)
        assert wire.try_take(ends[1], 100) is None
        wire.try_send(ends[0], (b"first",), received.fds)
        wire.try_send(ends[0], (b"second",))
        close_all(received.fds)


@pytest.mark.parametrize("left", [0, 1])
def test_a_message_that_another_process_takes_as_it_is_looked_at_is_that_ones(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire.try_send(ends[0], (b"first",), pipes[:2])
    if left:
        wire.try_send(ends[0], (b"second",), pipes[2:])
    try_receive = wire.try_receive

    def too_late(sock: socket.socket, *arguments: int) -> wire.Received | None:
        close_all(socket.recv_fds(sock, 100, 2)[1])
        return try_receive(sock, *arguments)

    monkeypatch.setattr(wire, "try_receive", too_late)
    before = open_fds()
    received = wire.try_take(ends[1], 100)
    if left:
        assert received is not None
        assert received.data == b"second"
        assert files(received.fds) == files(pipes[2:])
        close_all(received.fds)
    else:
        assert received is None
    assert open_fds() == before


@linux_only
def test_all_that_is_queued_can_be_read_and_left_there(
    ends: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    messages = [b"first", b"2", b"third" * 100]
    for message in messages:
        wire.try_send(ends[0], (message,), pipes)
    before = open_fds()
    assert wire.peek_all(ends[1], 1000) == messages
    assert wire.peek_all(ends[1], 1000) == messages
    assert open_fds() == before
    for message in messages:
        received = wire.try_receive(ends[1], 1000)
        assert received is not None
        assert (received.data, len(received.fds)) == (message, 5)
        close_all(received.fds)
    assert wire.peek_all(ends[1], 1000) == []


@linux_only
@EVERY_RECEIVE
def test_credentials_and_pidfds_displace_no_descriptor_and_are_closed(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], receive: Receive
) -> None:
    """T22"""
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        ends[1].setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
    except OSError:
        pass  # older than Linux 6.5: credentials alone
    before = open_fds()
    for count in (0, 1, 253):
        wire.try_send(ends[0], (b"x",), pipes[:1] * count)
        received = receive(ends[1], 100, max(count, 1))
        assert received is not None
        assert (len(received.fds), received.fds_lost) == (count, False)
        close_all(received.fds)
        assert open_fds() == before


def test_what_a_control_message_cut_off_inside_a_number_holds_is_not_taken_for_one() -> None:
    """P30"""
    read_end, write_end = os.pipe()
    data = array.array("i", [read_end, write_end]).tobytes()
    fake = FakeSocket((b"x", [(socket.SOL_SOCKET, SCM_RIGHTS, data[:6])], socket.MSG_CTRUNC, None))
    received = wire.try_receive(fake.as_socket(), 10)
    os.close(write_end)
    os.close(read_end)
    assert received == (b"x", [read_end], False, True)


def test_all_groups_of_descriptors_are_one_list_and_an_error_in_place_of_a_pidfd_is_ignored() -> None:
    """P5: other kernels may not merge what was sent in several control messages."""
    level = socket.SOL_SOCKET

    def packed(*numbers: int) -> bytes:
        return array.array("i", numbers).tobytes()

    ancillary = [(level, SCM_RIGHTS, packed(801, 802)), (level, SCM_PIDFD, packed(-3)), (level, 99, b"label")]
    ancillary.append((level, SCM_RIGHTS, packed(803)))
    if sys.platform == "linux":
        fake = FakeSocket((b"x", ancillary, 0, None))
        assert wire.try_receive(fake.as_socket(), 10) == (b"x", [801, 802, 803], False, False)


# -- errors of sending ---------------------------------------------------------------------------


def test_a_closed_receiver_is_a_connection_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[1].close()
    with pytest.raises(ConnectionRefusedError):
        wire.try_send(ends[0], (b"x",))


def test_too_many_descriptors_in_flight_reach_the_caller_as_they_are() -> None:
    fake = FakeSocket(OSError(errno.ETOOMANYREFS, "in flight"), OSError(errno.ETOOMANYREFS, "in flight"))
    for verb in (wire.try_send, wire.send):
        with pytest.raises(OSError) as failure:
            verb(fake.as_socket(), (b"x",), (1,))
        assert failure.value.errno == errno.ETOOMANYREFS


def test_a_full_queue_that_poll_cannot_see_is_waited_out_with_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T9 (wire part): ENOBUFS on BSD and macOS. No spinning, and no pause above 50 ms."""
    pauses: list[float] = []
    monkeypatch.setattr(wire.time, "sleep", pauses.append)
    full = [OSError(errno.ENOBUFS, "no room")] * 50
    with pytest.raises(OSError):
        wire.try_send(FakeSocket(*full).as_socket(), (b"x",))
    wire.send(FakeSocket(*full, 1).as_socket(), (b"x",))
    assert len(pauses) == 50
    assert pauses == sorted(pauses)
    assert (min(pauses), max(pauses)) == (0.001, 0.05)


def test_waiting_for_a_queue_that_poll_cannot_see_takes_next_to_no_cpu() -> None:
    """T9."""
    full = [OSError(errno.ENOBUFS, "no room")] * 20
    begun, cpu_s = time.monotonic(), time.thread_time()
    wire.send(FakeSocket(*full, 1).as_socket(), (b"x",))
    # It takes 1 %, and to ask again and again all. But the collector may run in here, on what other tests have left.
    assert time.thread_time() - cpu_s < 0.3 * (time.monotonic() - begun)


@linux_only
def test_a_receiver_that_refuses_descriptors_is_a_transfer_error(
    ends: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    """T23"""
    try:
        ends[1].setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        pytest.skip("needs Linux 6.16")
    with pytest.raises(FdTransferError, match="SO_PASSRIGHTS") as failure:
        wire.try_send(ends[0], (b"x",), pipes)
    assert (failure.value.wanted, failure.value.got, failure.value.may_have_run) == (5, 0, False)
    assert wire.try_send(ends[0], (b"without",))


def test_no_permission_to_send_at_all_is_not_blamed_on_descriptors() -> None:
    with pytest.raises(PermissionError):
        wire.try_send(FakeSocket(PermissionError(errno.EPERM, "no")).as_socket(), (b"x",))


# -- signals -------------------------------------------------------------------------------------


# These own SIGALRM and its timer while they run, so the time limit must come from a thread.
shooting = pytest.mark.timeout(60, method="thread")


class Alarm(Exception):
    pass


@contextmanager
def on_alarm(handler: Callable[..., None]) -> Iterator[None]:
    """Have `handler` called meanwhile, and never in a finalizer of garbage that others have left: what it raises there
    is told as nobody's error, and is dropped."""
    gc.collect()
    gc.disable()
    old = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        gc.enable()


def raise_alarm(*_: object) -> None:
    raise Alarm


def await_alarm() -> NoReturn:
    """Run until the alarm that was set raises. Where nothing comes it is set again: a finalizer may have met it."""
    while True:
        again_at = time.monotonic() + 1.0
        while time.monotonic() < again_at:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0.0001)


T = TypeVar("T")
NUMBERED = [b"%d" % number for number in range(100)]


def survives_alarms(
    send: Callable[[Any], object],
    receive: Callable[[], T],
    messages: list[Any],
    rounds: int,
    message_of: Callable[[T], object] = lambda received: received,
) -> None:
    """Shoot at a loop of receives; every message must come, once and in order.

    Args:
        receive: calls nothing after what is shot at: a handler that raises there would lose what has been received.
    """
    with on_alarm(raise_alarm):
        for _ in range(rounds):
            for message in messages:
                send(message)
            got: list[T] = []
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001)
                while True:
                    got.append(receive())
                    if len(got) == len(messages):
                        await_alarm()
            except Alarm:
                pass
            while len(got) < len(messages):
                got.append(receive())
            assert [message_of(each) for each in got] == messages


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 also runs handlers as a function returns")
@pytest.mark.parametrize("max_bytes", [1000, 200_000])
@shooting
def test_a_raising_handler_cannot_rob_an_inbox(
    ends: tuple[socket.socket, socket.socket], pipes: list[int], max_bytes: int
) -> None:
    """T11, T12 (wire part), M25; the same shots at plain `recvmsg` are in test_kernel_facts."""
    inbox = Inbox(ends[1], max_bytes)

    def open_up(received: wire.Received) -> bytes:
        close_all(received.fds)
        return received.data

    def send(message: bytes) -> None:
        wire.send(ends[0], (message,), pipes[:1])

    survives_alarms(send, inbox.receive, NUMBERED, 20, open_up)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 also runs handlers as a function returns")
@shooting
def test_a_raising_handler_cannot_rob_a_datagram_socket(pair: tuple[DatagramSocket, DatagramSocket]) -> None:
    """T12, T11"""
    survives_alarms(pair[0].send, pair[1].receive, NUMBERED, 50)


@shooting
def test_signals_interrupt_ten_thousand_messages_and_none_is_lost_or_doubled(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """T10: a handler that returns is nobody's business (PEP 475)."""
    count = 10_000
    sender = threading.Thread(
        target=lambda: [wire.send(ends[0], (number.to_bytes(4, "little"),)) for number in range(count)]
    )
    shots: list[int] = []
    with on_alarm(lambda number, _frame: shots.append(number)):
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        sender.start()
        got = [int.from_bytes(wire.receive(ends[1], 10).data, "little") for _ in range(count)]
        sender.join()
    assert got == list(range(count))
    assert shots


def test_a_message_looked_at_twice_closes_what_was_not_asked_for_once(
    ends: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    """An interrupted receive looks again; numbers closed before may be somebody else's by then."""
    inbox = Inbox(ends[1], 10, max_fds=1)
    wire.try_send(ends[0], (b"x",), pipes[:3])
    assert inbox.try_fill()
    first = inbox.look()
    others = [os.dup(pipes[0]) for _ in range(3)]
    assert inbox.look() == first == (b"x", first.fds, False, True)
    assert inbox.receive() == first
    assert files(others) == files(pipes[:1]) * 3
    close_all(others + first.fds)


# -- DatagramSocket ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 8192, 212_960])
def test_a_datagram_comes_back_byte_for_byte(pair: tuple[DatagramSocket, DatagramSocket], size: int) -> None:
    """T7 (wire part); the largest is what SO_SNDBUF allows by default."""
    if size > pair[0].max_bytes:
        pytest.skip(f"SO_SNDBUF is smaller here: {pair[0].max_bytes}")
    data = os.urandom(size)
    pair[0].send(data)
    assert pair[1].receive() == data


def test_an_oversized_datagram_is_refused_before_anything_is_sent(
    pair: tuple[DatagramSocket, DatagramSocket],
) -> None:
    """T7 (wire part)"""
    largest = pair[0].max_bytes
    with pytest.raises(PayloadTooLarge, match=f"max_bytes={largest}"):
        pair[0].send(bytes(largest + 1))
    assert pair[1].try_receive_with_fds() is None


def test_a_limit_above_what_the_kernel_takes_still_ends_in_the_same_error() -> None:
    """T8 (wire part): no bare EMSGSIZE."""
    first, second = DatagramSocket.pair(max_bytes=10_000_000)
    with first, second:
        with pytest.raises(PayloadTooLarge, match="SO_SNDBUF"):
            first.send(bytes(10_000_000))


def test_an_empty_datagram_is_a_message_like_others(
    pair: tuple[DatagramSocket, DatagramSocket], pipes: list[int]
) -> None:
    """T13 (wire part): it may carry descriptors, and the channel lives on."""
    pair[0].send_with_fds(b"", pipes)
    pair[0].send(b"")
    pair[0].send(b"after")
    data, fds = pair[1].receive_with_fds()
    close_all(fds)
    assert (data, len(fds)) == (b"", 5)
    assert [pair[1].receive(), pair[1].receive()] == [b"", b"after"]


def test_descriptors_are_borrowed_when_sent_and_the_callers_when_received(
    pair: tuple[DatagramSocket, DatagramSocket], pipes: list[int]
) -> None:
    with socket.socket() as sock:
        pair[0].send_with_fds(b"mixed", [pipes[0], Fd(pipes[1]), sock])
        data, fds = pair[1].receive_with_fds()
        assert data == b"mixed"
        assert files(fds) == files([pipes[0], pipes[1], sock.fileno()])
    close_all(fds)


def test_descriptors_of_an_iterator_are_sent_also_after_a_wait_for_room(
    pair: tuple[DatagramSocket, DatagramSocket], pipes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = 0
    while pair[0].try_send_with_fds(b"before"):
        before += 1

    def make_room(*_: object) -> None:
        assert [pair[1].receive() for _ in range(before)] == [b"before"] * before

    monkeypatch.setattr(wire, "wait_for", make_room)
    pair[0].send_with_fds(b"x", iter(pipes))
    data, fds = pair[1].receive_with_fds()
    assert (data, files(fds)) == (b"x", files(pipes))
    close_all(fds)


def test_a_receive_without_descriptors_closes_those_that_came(
    pair: tuple[DatagramSocket, DatagramSocket], pipes: list[int]
) -> None:
    before = open_fds()
    pair[0].send_with_fds(b"x", pipes)
    assert pair[1].receive() == b"x"
    assert open_fds() == before


def test_one_descriptor_more_than_the_limit_is_refused_before_anything_is_sent(pipes: list[int]) -> None:
    first, second = DatagramSocket.pair(max_fds=4)
    with first, second:
        with pytest.raises(PayloadTooLarge, match="max_fds=4"):
            first.send_with_fds(b"x", pipes)
        assert second.try_receive_with_fds() is None
        first.send_with_fds(b"x", pipes[:4])
        close_all(second.receive_with_fds()[1])


@pytest.mark.parametrize("bad", [True, "1", None, -1, 2**31])
def test_what_is_no_descriptor_is_refused(pair: tuple[DatagramSocket, DatagramSocket], bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        pair[0].send_with_fds(b"x", [bad])
    assert pair[1].try_receive_with_fds() is None


def test_a_datagram_too_long_for_the_receiver_is_an_error_that_costs_only_it(pipes: list[int]) -> None:
    """T24"""
    first, second = DatagramSocket.pair(max_bytes=100)
    with first, second, DatagramSocket.from_fd(os.dup(first.fileno())) as unlimited:
        before = open_fds()
        unlimited.send_with_fds(bytes(101), pipes)
        unlimited.send(b"next")
        with pytest.raises(WireError, match="max_bytes=100"):
            second.receive_with_fds()
        assert open_fds() == before
        assert second.receive() == b"next"


def test_a_datagram_with_too_many_descriptors_is_an_error_that_costs_only_it(pipes: list[int]) -> None:
    """T2, T15 (wire part)"""
    first, second = DatagramSocket.pair(max_fds=4)
    with first, second, DatagramSocket.from_fd(os.dup(first.fileno())) as unlimited:
        before = open_fds()
        unlimited.send_with_fds(b"x", pipes)
        unlimited.send(b"next")
        with pytest.raises(WireError, match=r"5 descriptors.*max_fds=4"):
            second.receive_with_fds()
        assert open_fds() == before
        assert second.receive() == b"next"


def test_lost_descriptors_are_an_error_that_names_the_likely_causes(
    pair: tuple[DatagramSocket, DatagramSocket], pipes: list[int]
) -> None:
    """T2, T4"""
    pair[0].send_with_fds(b"x", pipes)
    pair[0].send(b"next")
    with room_for(0), pytest.raises(FdTransferError) as failure:
        pair[1].receive_with_fds()
    for cause in ("EMFILE", "RLIMIT_NOFILE", "control buffer", "security module", "unknown"):
        assert cause in str(failure.value)
    assert pair[1].receive() == b"next"


def test_descriptors_withheld_by_a_security_module_are_the_same_error() -> None:
    """T4: all that such a kernel says is MSG_CTRUNC, with no control message at all."""
    fake = FakeSocket((b"x", [], socket.MSG_CTRUNC, None))
    with DatagramSocket(fake.as_socket(), 100, 10) as sock, pytest.raises(FdTransferError, match="SELinux"):
        sock.receive_with_fds()


def test_a_second_receiver_at_the_same_time_is_told_so(
    pair: tuple[DatagramSocket, DatagramSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.set_blocking(pair[1].fileno(), False)

    def intrude(*_: object) -> None:
        with pytest.raises(RuntimeError, match="another thread is receiving"):
            pair[1].try_receive_with_fds()
        pair[0].send(b"x")

    monkeypatch.setattr(wire, "wait_for", intrude)
    assert pair[1].receive() == b"x"


# -- ownership, for datagrams; streams have their own of each ------------------------------------


def test_into_inner_gives_a_plain_socket_and_closes_the_object(
    pair: tuple[DatagramSocket, DatagramSocket],
) -> None:
    number = pair[0].fileno()
    with pair[0].into_inner() as inner:
        assert (inner.fileno(), inner.gettimeout(), type(inner)) == (number, None, socket.socket)
        assert pair[0].closed
        with pytest.raises(ValueError, match="closed"):
            pair[0].fileno()
        pair[0].close()
        inner.send(b"still connected")
        assert pair[1].receive() == b"still connected"


def test_into_inner_does_not_lose_a_message_that_an_interrupted_receive_left(
    pair: tuple[DatagramSocket, DatagramSocket], pipes: list[int]
) -> None:
    pair[0].send_with_fds(b"x", pipes)
    assert pair[1]._inbox.try_fill()
    with pytest.raises(ValueError, match="receive it first"):
        pair[1].into_inner()
    pair[1].close()  # and closing it leaks nothing


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_from_fd_refuses_another_type_and_leaves_the_descriptor_to_the_caller(kind: int) -> None:
    first, second = socket.socketpair(socket.AF_UNIX, kind)
    with first, second:
        with pytest.raises(ValueError, match="not a Unix datagram socket"):
            DatagramSocket.from_fd(first.fileno())
        first.send(b"still open")
        assert second.recv(20) == b"still open"


def test_from_fd_refuses_what_is_not_a_unix_socket(pipes: list[int]) -> None:
    with pytest.raises(ValueError, match="not a socket"):
        DatagramSocket.from_fd(pipes[0])
    os.fstat(pipes[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        with pytest.raises(ValueError, match="not a Unix datagram socket"):
            DatagramSocket.from_fd(udp.fileno())
        assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_DGRAM
    number = os.dup(pipes[0])
    os.close(number)
    with pytest.raises(OSError) as failure:
        DatagramSocket.from_fd(number)
    assert failure.value.errno == errno.EBADF


@pytest.mark.parametrize(
    "limits", [{"max_fds": 254}, {"max_fds": -1}, {"max_bytes": -1}, {"max_bytes": 2**32}]
)
def test_limits_out_of_range_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be in 0"):
        DatagramSocket.pair(**limits)


def test_a_default_timeout_of_the_program_changes_no_blocking_mode() -> None:
    """M30: the socket module would set O_NONBLOCK on what another process may share."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second:
        socket.setdefaulttimeout(5)
        try:
            adopted = DatagramSocket.from_fd(os.dup(first.fileno()))
            one, other = DatagramSocket.pair()
        finally:
            socket.setdefaulttimeout(None)
        with adopted, one, other:
            assert all(os.get_blocking(end.fileno()) for end in (adopted, one, other))


def test_everything_but_close_is_refused_after_close(pair: tuple[DatagramSocket, DatagramSocket]) -> None:
    first = pair[0]
    assert "max_fds=253" in repr(first)
    first.close()
    first.close()
    assert "closed" in repr(first)
    for use in (
        lambda: first.send(b"x"),
        first.receive,
        first.try_receive_with_fds,
        first.fileno,
        first.into_inner,
    ):
        with pytest.raises(ValueError, match="this DatagramSocket is closed"):
            use()


def test_new_sockets_stay_off_the_standard_streams() -> None:
    """R2: in a process started with them closed, a later print would go into the pool's link."""
    script = (
        "import os; os.close(0); os.close(1)\n"
        "from fdpool.sockets import DatagramSocket, StreamSocket\n"
        "ends = [*DatagramSocket.pair(), *StreamSocket.pair()]\n"
        "os.write(2, str(min(end.fileno() for end in ends) > 2).encode())\n"
        "for end in ends: end.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.stderr == b"True"


def test_importing_wire_brings_in_nothing_slow() -> None:
    """It is imported in the supervisor, whose start-up is somebody's waiting time."""
    script = (
        "import sys, fdpool.sockets\n"
        "slow = {'asyncio', 'ctypes', 'dataclasses', 'inspect', 'json', 'logging', 'threading'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["_supervisor", "pool", "commands", "_serve.command", "_run.loop", "_exec_session"]
)
def test_what_programs_import_compiles_no_source(module: str) -> None:
    """Nor may it as `typing` sees it: a NamedTuple whose annotations are strings (`from __future__ import annotations`)
    compiles each field's, 20 microseconds each; and the first compile() of a process takes 2 ms."""
    script = (
        "import builtins, typing\n"
        "real, found = compile, []\n"
        "def watched(source, filename, *rest, **options):\n"
        "    found.extend([source] if filename == '<string>' else [])\n"  # and not a module's, which may not be cached
        "    return real(source, filename, *rest, **options)\n"
        "builtins.compile = watched\n"
        f"import fdpool.{module}\n"
        "print(found)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
