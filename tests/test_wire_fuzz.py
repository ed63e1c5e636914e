"""Whatever bytes, pieces and descriptors come: content, order, attribution are right, and nothing leaks."""

from __future__ import annotations

import array
import os
import socket
import struct
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpool import wire
from fdpool._frames import FrameReader
from fdpool.errors import FdTransferError, WireError
from fdpool.fds import close_all
from fdpool.sockets import DatagramSocket, StreamSocket

from .test_wire import files, open_fds

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = 6
payloads = st.binary(max_size=40)
some_fds = st.lists(st.integers(0, SOURCES - 1), max_size=5)
frames = st.lists(st.tuples(payloads, some_fds), min_size=1, max_size=8)
cuts = st.lists(st.integers(1, 30), max_size=40)


@pytest.fixture(scope="module")
def sources() -> Iterator[list[int]]:
    """Files that can be told from each other."""
    pairs = [os.pipe() for _ in range(SOURCES)]
    yield [read_end for read_end, _ in pairs]
    close_all(fd for ends in pairs for fd in ends)


@contextmanager
def stream(max_bytes: int = 100, max_fds: int = 253) -> Iterator[tuple[socket.socket, StreamSocket]]:
    peer, ours = socket.socketpair()
    before = open_fds() - {ours.fileno()}
    with peer:
        with StreamSocket.from_fd(ours.detach(), max_bytes=max_bytes, max_fds=max_fds) as sock:
            yield peer, sock
        assert open_fds() == before


def write_in_pieces(peer: socket.socket, data: bytes, fds: list[int], sizes: Iterator[int]) -> None:
    """`data` cut anywhere, the descriptors spread over the pieces in order."""
    left = list(fds)
    while data:
        size = next(sizes, len(data))
        now, left = (left, []) if size >= len(data) else (left[:1], left[1:])
        socket.send_fds(peer, [data[:size]], now)
        data = data[size:]


def header(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload))


@settings(deadline=None, max_examples=200)
@given(frames=frames, cuts=cuts, read_between=st.booleans())
def test_frames_come_out_as_they_went_in_however_the_stream_was_cut(
    sources: list[int], frames: list[tuple[bytes, list[int]]], cuts: list[int], read_between: bool
) -> None:
    """Each frame's descriptors on any of its bytes; reads while the peer writes, and after."""
    sizes = iter(cuts)
    got = []
    with stream() as (peer, sock):

        def read() -> None:
            while (received := sock.try_receive_bytes()) is not None:
                got.append((received[0], files(received[1])))
                close_all(received[1])

        for payload, fds in frames:
            write_in_pieces(peer, header(payload) + payload, [sources[index] for index in fds], sizes)
            if read_between:
                read()
        read()
    assert got == [(payload, files([sources[index] for index in fds])) for payload, fds in frames]


@settings(deadline=None, max_examples=100)
@given(frames=frames, cuts=cuts, stops=st.lists(st.booleans(), max_size=40))
def test_a_reader_that_gives_up_and_comes_back_at_any_time_misses_nothing(
    frames: list[tuple[bytes, list[int]]], cuts: list[int], stops: list[bool]
) -> None:
    """No socket: the sans-I/O reader, fed as much as it asks for or less, with made-up numbers."""
    reader = FrameReader(100, 253)
    data = b"".join(header(payload) + payload for payload, _ in frames)
    sizes, pauses, got = iter(cuts), iter(stops), []
    while data:
        if next(pauses, False):
            reader.missing()  # asked twice: the same answer, nothing consumed
        missing = reader.missing()
        if not missing:
            got.append(reader.payload())
            reader.take()
            continue
        size = min(next(sizes, missing), missing)
        reader.arrived.append((data[:size], [], 0, None))
        data = data[size:]
    assert reader.missing() == 0
    got.append(reader.payload())
    reader.take()
    assert got == [payload for payload, _ in frames]
    assert reader.between_frames


@settings(deadline=None, max_examples=200)
@given(garbage=st.binary(max_size=200), fds=some_fds, max_fds=st.integers(0, 5), cuts=cuts)
def test_garbage_ends_in_a_clear_error_and_leaks_nothing(
    sources: list[int], garbage: bytes, fds: list[int], max_fds: int, cuts: list[int]
) -> None:
    """T14 (wire part)"""
    with stream(max_fds=max_fds) as (peer, sock):
        write_in_pieces(peer, garbage, [sources[index] for index in fds], iter(cuts))
        peer.shutdown(socket.SHUT_WR)
        for _ in range(len(garbage) + 1):
            try:
                _, received = sock.receive_with_fds()
            except EOFError:
                break
            except WireError as error:
                if "cannot be read on" in str(error):
                    break
            else:
                close_all(received)
        else:
            pytest.fail("the end of the stream was never reached")


@pytest.mark.skipif(sys.platform != "linux", reason="options of Linux sockets")
@settings(deadline=None, max_examples=200)
@given(
    data=st.binary(max_size=30),
    groups=st.lists(some_fds, max_size=4),
    credentials=st.booleans(),
    options=st.tuples(st.booleans(), st.booleans()),
    max_bytes=st.integers(0, 40),
    max_fds=st.integers(0, 25),
    inbox=st.booleans(),
)
def test_a_datagram_with_any_control_data_is_accounted_for_to_the_last_descriptor(
    sources: list[int],
    data: bytes,
    groups: list[list[int]],
    credentials: bool,
    options: tuple[bool, bool],
    max_bytes: int,
    max_fds: int,
    inbox: bool,
) -> None:
    """T22, T24: credentials asked for or sent uninvited, pidfds, several groups, too small a limit."""
    before = open_fds()
    sent = [sources[index] for group in groups for index in group]
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with first, second:
        for wanted, option in zip(options, (socket.SO_PASSCRED, 76)):
            try:
                second.setsockopt(socket.SOL_SOCKET, option, wanted)
            except OSError:
                pass  # SO_PASSPIDFD: older than Linux 6.5
        ancillary: list[tuple[int, int, object]] = [
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sources[index] for index in group]))
            for group in groups
        ]
        if credentials:
            own = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())
            ancillary.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own))
        first.sendmsg([data], ancillary)  # type: ignore[arg-type]
        if inbox:
            received = wire.Inbox(second, max_bytes, max_fds).try_receive()
        else:
            received = wire.try_receive(second, max_bytes, max_fds)
        assert received is not None
        assert received.data == data[:max_bytes]
        assert received.bytes_cut == (len(data) > max_bytes)
        assert received.fds_lost == (len(sent) > max_fds)
        assert files(received.fds) == files(sent)[:max_fds]
        close_all(received.fds)
    assert open_fds() == before


@settings(deadline=None, max_examples=50)
@given(payload=payloads, fds=some_fds, max_bytes=st.integers(0, 40), max_fds=st.integers(0, 5))
def test_a_datagram_socket_gives_the_message_whole_or_an_error(
    sources: list[int], payload: bytes, fds: list[int], max_bytes: int, max_fds: int
) -> None:
    before = open_fds()
    sent = [sources[index] for index in fds]
    first, second = DatagramSocket.pair(max_bytes=max_bytes, max_fds=max_fds)
    with first, second, DatagramSocket.from_fd(os.dup(first.fileno())) as sender:
        sender.send_with_fds(payload, sent)
        try:
            data, got = second.receive_with_fds()
        except (WireError, FdTransferError):
            assert len(payload) > max_bytes or len(fds) > max_fds
        else:
            assert (data, files(got)) == (payload, files(sent))
            close_all(got)
        assert second.try_receive_with_fds() is None
    assert open_fds() == before
