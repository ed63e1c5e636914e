"""`StreamSocket`: frames, their descriptors, what is half come and half gone."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from fdpool import sockets, wire
from fdpool._frames import FrameReader
from fdpool.errors import FdTransferError, PayloadTooLarge, WireError
from fdpool.fds import Fd, close_all
from fdpool.sockets import StreamSocket

from .chaos.disorder import room_for
from .test_wire import (
    NUMBERED,
    SO_PASSRIGHTS,
    Alarm,
    FakeSocket,
    await_alarm,
    files,
    linux_only,
    on_alarm,
    open_fds,
    raise_alarm,
    shooting,
    survives_alarms,
)
from .test_wire import pipes as pipes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Pair = tuple[StreamSocket, StreamSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    first, second = StreamSocket.pair()
    with first, second:
        yield first, second


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, StreamSocket]]:
    """A plain socket, to write any bytes into, and the reader of what it writes."""
    first, second = socket.socketpair()
    with first, StreamSocket.from_fd(second.detach(), max_bytes=1000, max_fds=4) as reader:
        yield first, reader


def frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def fill(sock: StreamSocket) -> int:
    """Send frames of one byte until there is room for none; how many went."""
    count = 0
    while True:
        with sock.outgoing(b"f") as attempt:
            if not attempt():
                break
        count += 1
    return count


# -- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [None, 0, "ä€😀", [1, {"a": [True, 1.5]}], {"nested": {"x": ""}}, ""])
def test_a_message_comes_back_equal(pair: Pair, message: object) -> None:
    pair[0].send(message)
    assert pair[1].receive() == message


def test_descriptors_come_with_their_message_in_order(pair: Pair, pipes: list[int]) -> None:
    with socket.socket() as sock:
        pair[0].send_with_fds({"n": 1}, [pipes[0], Fd(pipes[1]), sock])
        pair[0].send({"n": 2})
        pair[0].send_with_fds({"n": 3}, pipes[2:])
        expected = [
            ({"n": 1}, files([pipes[0], pipes[1], sock.fileno()])),
            ({"n": 2}, []),
            ({"n": 3}, files(pipes[2:])),
        ]
        for message, inodes in expected:
            got, fds = pair[1].receive_with_fds()
            assert (got, files(fds)) == (message, inodes)
            assert not any(os.get_inheritable(fd) for fd in fds)
            close_all(fds)


def test_a_receive_without_descriptors_closes_those_that_came(pair: Pair, pipes: list[int]) -> None:
    before = open_fds()
    pair[0].send_with_fds("x", pipes)
    assert pair[1].receive() == "x"
    assert open_fds() == before


def test_an_empty_payload_carries_descriptors_on_its_header(pair: Pair, pipes: list[int]) -> None:
    pair[0].send_bytes(b"", pipes)
    payload, fds = pair[1].receive_bytes()
    assert (payload, files(fds)) == (b"", files(pipes))
    close_all(fds)


def test_sixty_four_mebibytes_come_back_byte_for_byte_and_not_one_more(pair: Pair) -> None:
    """T7 (wire part): also with the smallest sizes there are."""
    for size in (0, 1, 64 * 2**20):
        payload = os.urandom(min(size, 4096)) * (size // 4096 or 1) if size else b""
        sender = threading.Thread(target=pair[0].send_bytes, args=(payload,))
        sender.start()
        received, _ = pair[1].receive_bytes()
        sender.join()
        assert len(received) == len(payload)
        assert received == payload
    with pytest.raises(PayloadTooLarge, match="max_bytes=67108864"):
        pair[0].send_bytes(bytearray(64 * 2**20 + 1))
    assert pair[1].try_receive_bytes() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "\ud800", b"bytes", object(), {1, 2}])
def test_what_has_no_json_form_is_refused_before_anything_is_sent(pair: Pair, bad: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        pair[0].send(bad)
    assert pair[1].try_receive_bytes() is None


def test_one_descriptor_more_than_the_limit_is_refused_before_anything_is_sent(pipes: list[int]) -> None:
    first, second = StreamSocket.pair(max_fds=4)
    with first, second:
        with pytest.raises(PayloadTooLarge, match="max_fds=4"):
            first.send_with_fds("x", pipes)
        assert second.try_receive_bytes() is None


def test_a_descriptor_that_is_not_open_costs_only_its_message(pair: Pair, pipes: list[int]) -> None:
    number = os.dup(pipes[0])
    os.close(number)
    for send in (pair[0].send_bytes, pair[0].queue_bytes):
        with pytest.raises(OSError) as failure:
            send(b"x", [number])
        assert failure.value.errno == errno.EBADF
    pair[0].send("after")
    assert pair[1].receive() == "after"


@linux_only
def test_a_peer_that_refuses_descriptors_is_an_error_that_costs_only_that_message(
    pair: Pair, pipes: list[int]
) -> None:
    """T23"""
    with socket.socket(fileno=os.dup(pair[1].fileno())) as other:
        try:
            other.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            pytest.skip("needs Linux 6.16")
    with pytest.raises(FdTransferError, match="SO_PASSRIGHTS") as failure:
        pair[0].send_with_fds("x", pipes)
    assert failure.value.wanted == 5
    pair[0].queue_bytes(b'"queued"', pipes)
    pair[0].queue_bytes(b'"behind it"')
    with pytest.raises(FdTransferError):
        pair[0].flush()
    assert pair[0].flush()
    assert pair[1].receive() == "behind it"


# -- what other peers may send -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "where"),
    [
        (b"", "between frames"),
        (b"\x05\x00", "header, after 2 of 4 bytes"),
        (b"\x05\x00\x00\x00", "payload, after 0 of 5 bytes"),
        (b"\x05\x00\x00\x00abc", "payload, after 3 of 5 bytes"),
    ],
)
def test_the_end_of_the_stream_is_named_by_its_place_and_leaks_nothing(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int], sent: bytes, where: str
) -> None:
    before = open_fds()
    if sent:
        socket.send_fds(raw[0], [sent], pipes[:4])
    raw[0].shutdown(socket.SHUT_WR)
    for _ in range(2):  # and it stays the end
        with pytest.raises(EOFError, match=where):
            raw[1].receive_bytes()
    assert open_fds() == before


@pytest.mark.parametrize("length", [2**32 - 1, 1001])
def test_an_announced_length_above_the_limit_is_refused_before_anything_is_allocated(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int], length: int
) -> None:
    """T18: for good, as nobody knows where the next frame begins."""
    before = open_fds()
    socket.send_fds(raw[0], [struct.pack("<I", length) + b"{}"], pipes[:1])
    for _ in range(2):
        with pytest.raises(WireError, match=f"{length} bytes, above the limit max_bytes=1000"):
            raw[1].receive()
    assert open_fds() == before


def test_a_long_frame_is_read_in_pieces_so_that_memory_follows_what_came() -> None:
    reader = FrameReader(2**32 - 1, 0)
    reader.arrived.append((struct.pack("<I", 2**32 - 1), [], 0, None))
    assert reader.missing() <= 2**17


def test_a_frame_that_comes_byte_by_byte_takes_little_more_memory_than_it_has() -> None:
    ours, theirs = socket.socketpair()
    count = 5000
    with ours, StreamSocket.from_fd(theirs.detach()) as reader:
        ours.send(struct.pack("<I", count))
        for n in range(count - 1):
            ours.send(b"%c" % (n % 256))
            assert reader.try_receive_bytes() is None
        assert len(reader._reader._current.pieces) < 1100
        ours.send(b"x")
        payload, _ = reader.receive_bytes()
    assert payload == bytes(n % 256 for n in range(count - 1)) + b"x"


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"\xff\xfe", b"[" * 900, b"1" * 5000 + b"x", b"{}{}", b"[NaN]", b"-Infinity"]
)
def test_a_payload_that_is_not_json_costs_only_its_frame(pipes: list[int], garbage: bytes) -> None:
    """T14 (wire part)"""
    first, second = StreamSocket.pair()
    with first, second:
        first.send_bytes(garbage, pipes)
        first.send("next")
        before = open_fds()
        with pytest.raises(WireError, match="not JSON"):
            second.receive_with_fds()
        assert open_fds() == before
        assert second.receive() == "next"


def test_json_nested_beyond_all_reason_is_no_recursion_error(pair: Pair) -> None:
    pair[0].send_bytes(b"[" * 100_000)
    with pytest.raises(WireError, match="not JSON"):
        pair[1].receive()


def test_too_many_descriptors_cost_only_their_frame(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int]
) -> None:
    """T15 (wire part): also when they come in small groups."""
    before = open_fds()
    socket.send_fds(raw[0], [frame(b"12")[:5]], pipes[:3])
    socket.send_fds(raw[0], [b"2"], pipes[3:])
    raw[0].sendall(frame(b'"next"'))
    with pytest.raises(WireError, match=r"5 descriptors.*max_fds=4"):
        raw[1].receive()
    assert open_fds() == before
    assert raw[1].receive() == "next"


def test_too_many_descriptors_are_closed_as_they_come_not_when_the_frame_ends(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int]
) -> None:
    """Else a peer could fill this process's table with one frame that never ends."""
    before = open_fds()
    for byte in frame(b"unfinished")[:-1]:
        socket.send_fds(raw[0], [bytes([byte])], pipes)
    assert raw[1].try_receive_bytes() is None
    assert open_fds() == before


def test_lost_descriptors_cost_only_their_frame(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int]
) -> None:
    """T2, T3 (wire part): the error names the likely causes, and the stream stays in step."""
    before = open_fds()
    socket.send_fds(raw[0], [frame(b'"lost"')], pipes[:4])
    socket.send_fds(raw[0], [frame(b'"next"')], pipes[:4])
    with room_for(0), pytest.raises(FdTransferError) as failure:
        raw[1].receive_with_fds()
    for cause in ("EMFILE", "RLIMIT_NOFILE", "control buffer", "security module", "unknown"):
        assert cause in str(failure.value)
    assert open_fds() == before
    message, fds = raw[1].receive_with_fds()
    close_all(fds)
    assert (message, len(fds)) == ("next", 4)


def test_descriptors_withheld_by_a_security_module_are_the_same_error() -> None:
    """T4: MSG_CTRUNC with no control message at all, here on the payload."""
    fake = FakeSocket((frame(b"x")[:4], [], 0, None), (b"x", [], socket.MSG_CTRUNC, None))
    with (
        StreamSocket(fake.as_socket(), 100, 10) as sock,
        pytest.raises(FdTransferError, match="SELinux"),
    ):
        sock.receive_bytes()


def test_a_reset_by_the_peer_comes_after_what_it_sent(pair: Pair) -> None:
    """M9"""
    pair[0].send("never read")
    pair[1].send("last words")
    pair[1].close()
    assert pair[0].receive() == "last words"
    with pytest.raises(ConnectionResetError):
        pair[0].receive()
    with pytest.raises(EOFError):
        pair[0].receive()
    with pytest.raises(BrokenPipeError):
        pair[0].send("x")


# -- half come, half gone ------------------------------------------------------------------------


def test_a_frame_is_kept_between_calls_until_it_is_whole(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int]
) -> None:
    whole = frame(b'["a"]')
    for position in range(len(whole)):
        assert raw[1].try_receive_with_fds() is None
        socket.send_fds(raw[0], [whole[position : position + 1]], pipes[:1] if position in (0, 6) else [])
    received = raw[1].try_receive_with_fds()
    assert received is not None
    assert (received[0], files(received[1])) == (["a"], files(pipes[:1] * 2))
    close_all(received[1])


def test_closing_in_the_middle_of_a_frame_closes_its_descriptors(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int]
) -> None:
    before = open_fds()
    socket.send_fds(raw[0], [frame(b"half")[:6]], pipes[:4])
    assert raw[1].try_receive_bytes() is None
    assert len(open_fds()) == len(before) + 4
    number = raw[1].fileno()
    raw[1].close()
    raw[1].close()
    assert open_fds() == before - {number}


def test_into_inner_loses_nothing(raw: tuple[socket.socket, StreamSocket]) -> None:
    """It refuses in the middle of a frame; between frames nothing was read ahead."""
    raw[0].sendall(frame(b"1") + frame(b"2")[:3])
    assert raw[1].receive() == 1
    assert raw[1].try_receive_bytes() is None
    with pytest.raises(ValueError, match="half received"):
        raw[1].into_inner()
    raw[0].sendall(frame(b"2")[3:] + b"and no frame at all")
    assert raw[1].receive() == 2
    with raw[1].into_inner() as inner:
        assert raw[1].closed
        assert inner.recv(100) == b"and no frame at all"


def test_into_inner_refuses_while_frames_are_still_to_be_sent(pair: Pair) -> None:
    pair[0].queue_bytes(b"1")
    with pytest.raises(ValueError, match="drain before"):
        pair[0].into_inner()
    pair[0].drain()
    pair[0].into_inner().close()
    assert pair[1].receive() == 1
    with pytest.raises(EOFError):
        pair[1].receive()


def test_a_queued_frame_keeps_its_own_descriptors_and_its_place(pair: Pair) -> None:
    read_end, write_end = os.pipe()
    pair[0].queue_bytes(b"first", [write_end])
    os.close(write_end)
    pair[0].queue_bytes(b"second")
    assert pair[0].backlog == 2
    pair[0].send_bytes(b"third")
    assert pair[0].backlog == 0
    payload, fds = pair[1].receive_bytes()
    assert payload == b"first"
    os.write(fds[0], b"still open")
    close_all(fds)
    assert os.read(read_end, 100) == b"still open"
    assert os.read(read_end, 100) == b""  # the duplicate was closed once the frame had gone
    os.close(read_end)
    assert [pair[1].receive_bytes()[0] for _ in range(2)] == [b"second", b"third"]


def test_flush_sends_what_fits_and_never_waits(pair: Pair, pipes: list[int]) -> None:
    payload = os.urandom(2_000_000)
    pair[0].queue_bytes(payload, pipes)
    pair[0].queue_bytes(b"behind")
    assert not pair[0].flush()
    received = None
    while received is None:
        received = pair[1].try_receive_bytes()
        pair[0].flush()
    assert received[0] == payload
    assert files(received[1]) == files(pipes)
    close_all(received[1])
    assert pair[0].flush()
    assert pair[1].receive_bytes()[0] == b"behind"


def test_the_duplicates_of_a_frame_are_closed_once_its_first_byte_has_gone(pair: Pair) -> None:
    """The kernel holds them now; a pipe must not stay open until the last byte of a long frame."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    pair[0].queue_bytes(bytes(2_000_000), [write_end])
    os.close(write_end)
    assert not pair[0].flush()
    assert pair[1].try_receive_bytes() is None
    with pytest.raises(BlockingIOError):  # the receiver holds it
        os.read(read_end, 1)
    pair[1].close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_a_queued_payload_is_what_it_was_when_it_was_queued(pair: Pair) -> None:
    payload = bytearray(b"before")
    pair[0].queue_bytes(payload)
    payload[:] = b"after it"
    pair[0].drain()
    assert pair[1].receive_bytes() == (b"before", [])


def test_closing_drops_the_backlog_and_its_descriptors(pair: Pair, pipes: list[int]) -> None:
    before = open_fds()
    pair[0].queue_bytes(b"x", pipes)
    number = pair[0].fileno()
    pair[0].close()
    assert open_fds() == before - {number}
    with pytest.raises(EOFError):
        pair[1].receive()


def test_a_send_interrupted_before_its_first_byte_was_never_sent(
    pair: Pair, pipes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = fill(pair[0])
    monkeypatch.setattr(wire, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pair[0].send_bytes(b"never", pipes)
    assert pair[0].backlog == 0
    for _ in range(count):
        assert pair[1].receive_bytes() == (b"f", [])
    pair[0].send_bytes(b"next")
    assert pair[1].receive_bytes() == (b"next", [])


def test_a_send_interrupted_half_way_is_finished_by_the_next(
    pair: Pair, pipes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = os.urandom(1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(wire, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pair[0].send_bytes(payload, pipes)
    assert pair[0].backlog == 1
    sender = threading.Thread(target=pair[0].send_bytes, args=(b"next",))
    sender.start()
    received, fds = pair[1].receive_bytes()
    following = pair[1].receive_bytes()
    sender.join()
    assert received == payload
    assert files(fds) == files(pipes)
    close_all(fds)
    assert following == (b"next", [])


def test_a_receive_interrupted_half_way_goes_on_where_it_was(
    raw: tuple[socket.socket, StreamSocket], pipes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.set_blocking(raw[1].fileno(), False)
    socket.send_fds(raw[0], [frame(b"payload")[:7]], pipes[:2])
    with monkeypatch.context() as patch:
        patch.setattr(sockets, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            raw[1].receive_bytes()
    raw[0].sendall(frame(b"payload")[7:])
    payload, fds = raw[1].receive_bytes()
    assert (payload, files(fds)) == (b"payload", files(pipes[:2]))
    close_all(fds)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 also runs handlers as a function returns")
@shooting
def test_a_raising_handler_cannot_rob_a_stream(pair: Pair, pipes: list[int]) -> None:
    """T11, T12 (wire part)"""
    before = open_fds()
    survives_alarms(pair[0].send_bytes, lambda: pair[1].receive_bytes()[0], NUMBERED, 40)
    survives_alarms(pair[0].send, pair[1].receive, list(range(100)), 40)
    assert open_fds() == before


@shooting
def test_a_raising_handler_cannot_tear_or_double_a_frame_that_is_being_sent(pair: Pair) -> None:
    """T11 (wire part): whether the frame it hit was sent is unknown, all others come whole and in order."""
    got: list[tuple[int, int]] = []

    def receive_all() -> None:
        while (payload := pair[1].receive_bytes()[0]) != b"last":
            assert payload == payload[:2] * (len(payload) // 2)
            got.append((int.from_bytes(payload[:2], "little"), len(payload)))

    receiver = threading.Thread(target=receive_all)
    receiver.start()
    certain = []
    with on_alarm(raise_alarm):
        for number in range(200):
            size = number * 2000 + 2
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00005 + number % 7 * 0.00005)
                pair[0].send_bytes(number.to_bytes(2, "little") * (size // 2))
                certain.append((number, size))
                await_alarm()
            except Alarm:
                pass
    pair[0].send_bytes(b"last")
    receiver.join()
    assert [number for number, _ in got] == sorted({number for number, _ in got})
    assert set(certain) <= set(got)
    assert all(size == number * 2000 + 2 for number, size in got)


@shooting
def test_signals_interrupt_a_large_frame_and_nothing_is_lost(pair: Pair) -> None:
    """T10: the handler returns; both sides are hit in the middle of their waits."""
    payload = os.urandom(1_000_000) * 20
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        sender = threading.Thread(target=pair[0].send_bytes, args=(payload,))
        sender.start()
        received, _ = pair[1].receive_bytes()
        sender.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert received == payload


# -- threads -------------------------------------------------------------------------------------


def test_frames_of_many_threads_are_neither_torn_nor_doubled_nor_out_of_order(
    pair: Pair, pipes: list[int]
) -> None:
    """T26 (wire part)"""
    sizes = [number % 40 * 997 for number in range(300)]

    def send_all(letter: int) -> None:
        for number, size in enumerate(sizes):
            pair[0].send_bytes(bytes([letter]) * (size + 1), pipes[:1] if number % 2 else [])

    threads = [threading.Thread(target=send_all, args=(letter,)) for letter in b"abcd"]
    got: dict[int, list[tuple[int, int]]] = {letter: [] for letter in b"abcd"}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # without the lock, this fails every time
    try:
        for thread in threads:
            thread.start()
        for _ in range(len(threads) * len(sizes)):
            payload, fds = pair[1].receive_bytes()
            close_all(fds)
            assert len(set(payload)) == 1
            got[payload[0]].append((len(payload) - 1, len(fds)))
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    expected = [(size, number % 2) for number, size in enumerate(sizes)]
    assert got == dict.fromkeys(b"abcd", expected)


def test_a_refusal_found_by_another_thread_reaches_the_sender_whose_frame_it_was(pipes: list[int]) -> None:
    """Whoever finds room sends for all; an innocent frame must not be blamed."""
    fake = FakeSocket(BlockingIOError(), PermissionError(errno.EPERM, "no"), 5)
    with StreamSocket(fake.as_socket(), 100, 10) as sock:
        with sock.outgoing(b"a", pipes[:1]) as attempt, sock.outgoing(b"b") as other:
            assert not attempt()
            assert other()
            with pytest.raises(FdTransferError):
                attempt()


@pytest.fixture
def closed_number(pipes: list[int]) -> int:
    """A descriptor that is not open any more."""
    number = os.dup(pipes[0])
    os.close(number)
    return number


def test_a_frame_that_went_whole_is_not_blamed_for_one_behind_it(pair: Pair, closed_number: int) -> None:
    payload = os.urandom(1_000_000)
    with pair[0].outgoing(payload) as attempt, pair[0].outgoing(b"bad", [closed_number]) as other:
        assert not attempt()
        assert not other()
        received = None
        while not attempt():
            received = received or pair[1].try_receive_bytes()
        assert (received or pair[1].receive_bytes())[0] == payload
        with pytest.raises(OSError) as failure:
            other()
    assert failure.value.errno == errno.EBADF
    pair[0].send("after")
    assert pair[1].receive() == "after"


def test_a_frame_is_not_blamed_for_one_before_it_that_somebody_else_sends(
    pair: Pair, closed_number: int
) -> None:
    payload = os.urandom(1_000_000)
    pair[0].queue_bytes(payload)
    with pair[0].outgoing(b"bad", [closed_number]) as attempt, pair[0].outgoing(b"good") as other:
        assert not attempt()
        received = None
        while not other():
            received = received or pair[1].try_receive_bytes()
        assert (received or pair[1].receive_bytes())[0] == payload
        with pytest.raises(OSError) as failure:
            attempt()
    assert failure.value.errno == errno.EBADF
    assert pair[1].receive_bytes() == (b"good", [])


def test_a_frame_with_too_many_descriptors_in_flight_may_be_tried_again(pipes: list[int]) -> None:
    fake = FakeSocket(OSError(errno.ETOOMANYREFS, "in flight"), OSError(errno.ETOOMANYREFS, "in flight"), 5)
    with StreamSocket(fake.as_socket(), 100, 10) as sock, sock.outgoing(b"a", pipes[:1]) as attempt:
        for _ in range(2):
            with pytest.raises(OSError) as failure:
                attempt()
            assert failure.value.errno == errno.ETOOMANYREFS
        assert attempt()


def test_too_many_descriptors_in_flight_lose_no_queued_frame(pipes: list[int]) -> None:
    in_flight = OSError(errno.ETOOMANYREFS, "in flight")
    fake = FakeSocket(in_flight, in_flight, 10)
    with StreamSocket(fake.as_socket(), 100, 10) as sock:
        sock.queue_bytes(b"queued", pipes[:1])
        for send in (sock.flush, lambda: sock.send_bytes(b"behind it")):
            with pytest.raises(OSError) as failure:
                send()
            assert failure.value.errno == errno.ETOOMANYREFS
            assert sock.backlog == 1
        assert sock.flush()


def test_a_second_receiver_at_the_same_time_is_told_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    os.set_blocking(pair[1].fileno(), False)

    def intrude(*_: object) -> None:
        with pytest.raises(RuntimeError, match="another thread is receiving"):
            pair[1].try_receive_bytes()
        pair[0].send("x")

    monkeypatch.setattr(sockets, "wait_for", intrude)
    assert pair[1].receive() == "x"


# -- ownership -----------------------------------------------------------------------------------


def test_from_fd_takes_a_stream_and_leaves_its_mode_alone() -> None:
    first, second = socket.socketpair()
    with second:
        os.set_blocking(first.fileno(), False)
        number = first.detach()
        with StreamSocket.from_fd(number) as sock:
            assert sock.fileno() == number
            assert not os.get_blocking(number)
            second.sendall(frame(b"1"))
            assert sock.receive() == 1


@pytest.mark.parametrize("kind", ["datagram", "tcp", "listener", "pipe"])
def test_from_fd_refuses_what_is_not_a_unix_stream_and_leaves_it_to_the_caller(
    kind: str, pipes: list[int], tmp_path: Any
) -> None:
    def refused(number: int) -> None:
        with pytest.raises(ValueError, match=f"descriptor {number} is "):
            StreamSocket.from_fd(number)
        os.fstat(number)

    if kind == "pipe":
        refused(pipes[0])
    elif kind == "tcp":
        with socket.socket(socket.AF_INET) as sock:
            refused(sock.fileno())
    elif kind == "datagram":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            refused(sock.fileno())
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.path.relpath(tmp_path / "s"))
            sock.listen()
            refused(sock.fileno())


@pytest.mark.parametrize(
    "limits", [{"max_fds": 254}, {"max_fds": -1}, {"max_bytes": -1}, {"max_bytes": 2**32}]
)
def test_limits_out_of_range_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be in 0"):
        StreamSocket.pair(**limits)


def test_everything_but_close_is_refused_after_close(pair: Pair) -> None:
    first = pair[0]
    first.close()
    first.close()
    uses: list[Callable[[], object]] = [
        lambda: first.send(1),
        lambda: first.queue_bytes(b"x"),
        first.receive,
        first.try_receive_bytes,
        first.flush,
        first.drain,
        first.fileno,
        first.into_inner,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="this StreamSocket is closed"):
            use()


def test_a_socket_dropped_in_the_middle_of_a_frame_leaks_no_descriptor(pipes: list[int]) -> None:
    before = open_fds()
    first, second = socket.socketpair()
    reader = StreamSocket.from_fd(second.detach())
    socket.send_fds(first, [b"\x05"], pipes)
    assert reader.try_receive_bytes() is None
    with pytest.warns(ResourceWarning):
        del reader
    first.close()
    assert open_fds() == before


def test_a_socket_that_met_the_end_is_gone_as_it_is_dropped(raw: tuple[socket.socket, StreamSocket]) -> None:
    reader = StreamSocket(raw[1].into_inner(), 1000, 4)
    raw[0].shutdown(socket.SHUT_WR)
    for _ in range(2):
        with pytest.raises(EOFError):
            reader.receive()
    reader.close()
    dropped = weakref.ref(reader)
    del reader
    assert dropped() is None


def test_it_can_be_polled_like_any_socket(pair: Pair) -> None:
    poll = select.poll()
    poll.register(pair[1], select.POLLIN)
    assert poll.poll(0) == []
    pair[0].send(1)
    assert poll.poll(0) == [(pair[1].fileno(), select.POLLIN)]
