"""`AsyncSocket` and `AsyncDatagramSocket`: the twins' verbs on an event loop, and what cancelling leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from fdpool import aio
from fdpool.aio import AsyncDatagramSocket, AsyncSocket
from fdpool.errors import FdTransferError, PayloadTooLarge, WireError
from fdpool.fds import close_all
from fdpool.sockets import DatagramSocket, StreamSocket

from .chaos.disorder import room_for
from .test_wire import FakeSocket, files, open_fds
from .test_wire import pipes as pipes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

Face = AsyncSocket | AsyncDatagramSocket
BOTH = pytest.mark.parametrize("face", [AsyncSocket, AsyncDatagramSocket], ids=["stream", "datagram"])


async def until_waiting(task: asyncio.Task[Any], sock: Face) -> None:
    """Let `task` run until it waits for `sock`, in as many turns of the loop as it takes."""
    while not sock._waits._waiting:
        assert not task.done()
        await asyncio.sleep(0)


async def waiting(work: Coroutine[Any, Any, Any], sock: Face) -> asyncio.Task[Any]:
    """A task that runs `work` and has come to where it waits for `sock`."""
    task = asyncio.ensure_future(work)
    await until_waiting(task, sock)
    return task


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def fill(sock: Face, message: Any) -> int:
    """Send until there is room for no more; how many went."""
    count = 0
    while True:
        task = asyncio.ensure_future(sock.send(message))
        await asyncio.sleep(0)
        if not task.done():
            await cancelled(task)
            return count
        await task
        count += 1


# -- both ----------------------------------------------------------------------------------------


@BOTH
def test_messages_and_descriptors_come_as_they_were_sent(face: type[Face], pipes: list[int]) -> None:
    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            message: Any = {"a": ["ä", 1]} if face is AsyncSocket else b"\x00bytes"
            await one.send_with_fds(message, pipes)
            await one.send(message)
            got, fds = await other.receive_with_fds()
            assert (got, files(fds)) == (message, files(pipes))
            assert not any(os.get_inheritable(fd) for fd in fds)
            close_all(fds)
            assert await other.receive() == message

    asyncio.run(main())


@BOTH
def test_receive_waits_for_the_sender_and_closes_descriptors_it_does_not_return(
    face: type[Face], pipes: list[int]
) -> None:
    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            task = await waiting(other.receive(), other)
            before = open_fds()
            message: Any = "late" if face is AsyncSocket else b"late"
            await one.send_with_fds(message, pipes)
            assert await task == message
            assert open_fds() == before

    asyncio.run(main())


@BOTH
def test_no_call_changes_the_blocking_mode(face: type[Face]) -> None:
    """M17, P17: another process may hold the same open file."""

    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            task = await waiting(other.receive(), other)
            assert os.get_blocking(other.fileno())
            message: Any = "x" if face is AsyncSocket else b"x"
            await one.send(message)
            await task
            assert os.get_blocking(one.fileno())
            assert os.get_blocking(other.fileno())

    asyncio.run(main())


@BOTH
def test_nothing_stays_registered_with_the_loop(face: type[Face]) -> None:
    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            task = await waiting(other.receive(), other)
            await cancelled(task)
            loop = asyncio.get_running_loop()
            assert not loop.remove_reader(other.fileno())
            assert not loop.remove_writer(other.fileno())

    asyncio.run(main())


@BOTH
def test_a_cancelled_receive_leaves_the_message_to_the_next(face: type[Face], pipes: list[int]) -> None:
    """Cancelled while the loop already knows that the message is there."""

    async def main() -> None:
        one, other = face.pair()
        message: Any = "kept" if face is AsyncSocket else b"kept"
        async with one, other:
            task = await waiting(other.receive_with_fds(), other)
            await one.send_with_fds(message, pipes)
            (future,) = other._waits._waiting
            aio._wake(future)
            await cancelled(task)
            got, fds = await other.receive_with_fds()
            assert (got, files(fds)) == (message, files(pipes))
            close_all(fds)

    asyncio.run(main())


@BOTH
def test_receivers_take_turns_and_each_message_goes_to_one(face: type[Face]) -> None:
    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            tasks = [asyncio.ensure_future(other.receive()) for _ in range(5)]
            await until_waiting(tasks[0], other)
            messages: list[Any] = (
                ["a", "b", "c", "d", "e"] if face is AsyncSocket else [b"a", b"b", b"c", b"d", b"e"]
            )
            for message in messages:
                await one.send(message)
            assert await asyncio.gather(*tasks) == messages

    asyncio.run(main())


@BOTH
def test_a_cancelled_receiver_does_not_keep_the_others_turn(face: type[Face]) -> None:
    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            first = await waiting(other.receive(), other)
            second = asyncio.ensure_future(other.receive())
            await asyncio.sleep(0)
            await cancelled(first)
            message: Any = "x" if face is AsyncSocket else b"x"
            await one.send(message)
            assert await second == message

    asyncio.run(main())


@BOTH
@pytest.mark.parametrize("by_close", [True, False], ids=["close", "into_inner"])
def test_closing_wakes_every_waiter_with_a_clear_error(face: type[Face], by_close: bool) -> None:
    async def main() -> None:
        one, other = face.pair()
        async with one, other:
            tasks = [asyncio.ensure_future(other.receive()) for _ in range(2)]
            await until_waiting(tasks[0], other)
            if by_close:
                other.close()
            else:
                other.into_inner().close()
            for task in tasks:
                with pytest.raises(ValueError, match="closed"):
                    await task
            with pytest.raises(ValueError, match="closed"):
                await other.receive()
            assert other.closed

    asyncio.run(main())


@BOTH
def test_a_socket_closed_while_waited_on_leaves_no_ghost_in_epoll(face: type[Face]) -> None:
    """M27: with another holder of the open file, close alone would leave it registered and firing."""

    async def main() -> None:
        one, other = face.pair()
        async with one:
            holder = os.dup(other.fileno())
            number = other.fileno()
            task = await waiting(other.receive(), other)
            other.close()
            message: Any = "x" if face is AsyncSocket else b"x"
            await one.send(message)  # the holder becomes readable, the loop must not notice
            with pytest.raises(ValueError, match="closed"):
                await task
            loop = asyncio.get_running_loop()
            assert not loop.remove_reader(number)
            os.dup2(holder, number, inheritable=False)  # the number is somebody else's now
            fired = loop.create_future()
            loop.add_reader(number, aio._wake, fired)  # would fail, had the selector kept it
            await fired
            loop.remove_reader(number)
            close_all([holder, number])

    asyncio.run(main())


@BOTH
def test_one_object_serves_one_loop_after_another(face: type[Face]) -> None:
    one, other = face.pair()
    message: Any = "x" if face is AsyncSocket else b"x"

    async def exchange() -> None:
        task = await waiting(other.receive(), other)
        await one.send(message)
        assert await task == message

    asyncio.run(exchange())
    asyncio.run(exchange())
    one.close()
    other.close()


@BOTH
def test_a_loop_that_ends_while_a_task_waits_leaves_the_socket_usable(face: type[Face]) -> None:
    one, other = face.pair()
    message: Any = "x" if face is AsyncSocket else b"x"

    async def abandon() -> None:
        await waiting(other.receive(), other)

    async def use() -> None:
        await one.send(message)
        assert await other.receive() == message

    asyncio.run(abandon())
    asyncio.run(use())
    one.close()
    other.close()


@BOTH
def test_limits_are_refused_before_anything_is_sent(face: type[Face], pipes: list[int]) -> None:
    async def main() -> None:
        one, other = face.pair(max_bytes=10, max_fds=4)
        async with one, other:
            long: Any = "x" * 9 if face is AsyncSocket else b"x" * 11
            short: Any = "x" if face is AsyncSocket else b"x"
            with pytest.raises(PayloadTooLarge, match="max_bytes=10"):
                await one.send(long)
            with pytest.raises(PayloadTooLarge, match="max_fds=4"):
                await one.send_with_fds(short, pipes)
            await one.send(short)
            assert await other.receive() == short

    asyncio.run(main())


@BOTH
def test_lost_descriptors_are_an_error_and_the_next_message_comes(face: type[Face], pipes: list[int]) -> None:
    async def main() -> None:
        one, other = face.pair()
        message: Any = "x" if face is AsyncSocket else b"x"
        async with one, other:
            await one.send_with_fds(message, pipes)
            await one.send(message)
            with room_for(0), pytest.raises(FdTransferError, match="RLIMIT_NOFILE"):
                await other.receive_with_fds()
            assert await other.receive_with_fds() == (message, [])

    asyncio.run(main())


@BOTH
def test_a_full_queue_that_poll_cannot_see_is_waited_out_with_growing_pauses(
    face: type[Face], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T9 (wire part)"""
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    full = [OSError(errno.ENOBUFS, "no room")] * 20
    sock: Face
    if face is AsyncSocket:
        sock = AsyncSocket(StreamSocket(FakeSocket(*full, 5).as_socket(), 100, 10))
    else:
        sock = AsyncDatagramSocket(DatagramSocket(FakeSocket(*full, 1).as_socket(), 100, 10))
    message: Any = 1 if face is AsyncSocket else b"x"
    monkeypatch.setattr(aio.asyncio, "sleep", pause)
    asyncio.run(sock.send(message))
    sock.close()
    assert pauses == sorted(pauses)
    assert (len(pauses), min(pauses), max(pauses)) == (20, 0.001, 0.05)


@BOTH
def test_from_fd_refuses_another_type_and_leaves_the_descriptor_to_the_caller(face: type[Face]) -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with first, second:
        with pytest.raises(ValueError, match="is not a Unix"):
            face.from_fd(first.fileno())
        first.send(b"still open")
        assert second.recv(20) == b"still open"


def test_from_fd_and_into_inner_move_ownership(pipes: list[int]) -> None:
    async def main() -> None:
        for face, kind in ((AsyncSocket, socket.SOCK_STREAM), (AsyncDatagramSocket, socket.SOCK_DGRAM)):
            first, second = socket.socketpair(socket.AF_UNIX, kind)
            number = first.detach()
            sock = face.from_fd(number, max_bytes=100, max_fds=3)
            assert sock.fileno() == number
            with sock.into_inner() as inner, second:
                assert (inner.fileno(), sock.closed) == (number, True)
                inner.send(b"x")
                assert second.recv(10) == b"x"

    asyncio.run(main())


# -- streams: half come, half gone ---------------------------------------------------------------


def test_a_cancelled_receive_goes_on_in_the_middle_of_the_frame(pipes: list[int]) -> None:
    """Cancelled after each single byte; descriptors that came with the first are not lost."""

    async def main() -> None:
        peer, ours = socket.socketpair()
        payload = b'["a"]'
        whole = struct.pack("<I", len(payload)) + payload
        with peer:
            async with AsyncSocket.from_fd(ours.detach()) as sock:
                for position in range(len(whole) - 1):
                    socket.send_fds(peer, [whole[position : position + 1]], pipes if position == 0 else [])
                    await cancelled(await waiting(sock.receive_with_fds(), sock))
                peer.send(whole[-1:])
                message, fds = await sock.receive_with_fds()
                assert (message, files(fds)) == (["a"], files(pipes))
                close_all(fds)

    asyncio.run(main())


def test_a_timeout_on_a_receive_loses_nothing(pipes: list[int]) -> None:
    async def main() -> None:
        peer, ours = socket.socketpair()
        with peer:
            async with AsyncSocket.from_fd(ours.detach()) as sock:
                socket.send_fds(peer, [b"\x01\x00"], pipes)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(sock.receive_with_fds(), 0.001)
                peer.sendall(b"\x00\x007")
                message, fds = await sock.receive_with_fds()
                assert (message, files(fds)) == (7, files(pipes))
                close_all(fds)

    asyncio.run(main())


def test_a_send_cancelled_before_its_first_byte_was_never_sent(pipes: list[int]) -> None:
    async def main() -> None:
        one, other = AsyncSocket.pair()
        async with one, other:
            count = await fill(one, 0)
            await cancelled(await waiting(one.send_with_fds("never", pipes), one))
            for _ in range(count):
                assert await other.receive_with_fds() == (0, [])
            await one.send("next")
            assert await other.receive_with_fds() == ("next", [])

    asyncio.run(main())


@pytest.mark.parametrize("by_drain", [True, False], ids=["drain", "the next send"])
def test_a_send_cancelled_half_way_is_finished_in_order(pipes: list[int], by_drain: bool) -> None:
    async def main() -> None:
        payload = os.urandom(2_000_000)
        one, other = AsyncSocket.pair()
        async with one, other:
            await cancelled(await waiting(one.send_bytes(payload, pipes), one))
            with pytest.raises(ValueError, match="still to be sent"):
                one.into_inner()
            first: Awaitable[None] = one.drain() if by_drain else one.send_bytes(b"next")
            task = asyncio.ensure_future(first)
            received, fds = await other.receive_bytes()
            assert received == payload
            assert files(fds) == files(pipes)
            close_all(fds)
            await task
            if by_drain:
                await one.send_bytes(b"next")
            assert await other.receive_bytes() == (b"next", [])

    asyncio.run(main())


def test_a_send_cancelled_in_the_queue_of_senders_was_never_sent() -> None:
    async def main() -> None:
        one, other = AsyncSocket.pair()
        async with one, other:
            first = await waiting(one.send_bytes(bytes(2_000_000)), one)
            second = asyncio.ensure_future(one.send_bytes(b"second"))
            third = asyncio.ensure_future(one.send_bytes(b"third"))
            await asyncio.sleep(0)
            await cancelled(second)
            assert len((await other.receive_bytes())[0]) == 2_000_000
            await asyncio.gather(first, third)
            assert (await other.receive_bytes())[0] == b"third"

    asyncio.run(main())


def test_closing_while_a_send_waits_is_a_clear_error(pipes: list[int]) -> None:
    async def main() -> None:
        one, other = AsyncSocket.pair()
        async with one, other:
            task = await waiting(one.send_bytes(bytes(2_000_000), pipes), one)
            one.close()
            with pytest.raises(ValueError, match="closed"):
                await task
            with pytest.raises(EOFError, match="inside a frame's payload"):
                await other.receive()

    asyncio.run(main())


def test_many_senders_do_not_tear_frames() -> None:
    async def main() -> None:
        one, other = AsyncSocket.pair()
        async with one, other:
            payloads = [bytes([number]) * number * 5000 for number in range(50)]
            sending = asyncio.gather(*(one.send_bytes(payload) for payload in payloads))
            received = [(await other.receive_bytes())[0] for _ in payloads]
            await sending
            assert received == payloads

    asyncio.run(main())


def test_the_end_of_the_stream_and_a_broken_frame_are_the_twins_errors() -> None:
    async def main() -> None:
        peer, ours = socket.socketpair()
        async with AsyncSocket.from_fd(ours.detach(), max_bytes=100) as sock:
            with peer:
                peer.sendall(b"\x01\x00\x00\x00{" + b"\x02\x00")
            with pytest.raises(WireError, match="not JSON"):
                await sock.receive()
            with pytest.raises(EOFError, match="header, after 2 of 4 bytes"):
                await sock.receive()
            with pytest.raises(BrokenPipeError):
                await sock.send(1)

    asyncio.run(main())


# -- datagrams -----------------------------------------------------------------------------------


def test_a_cancelled_datagram_send_was_not_sent() -> None:
    async def main() -> None:
        one, other = AsyncDatagramSocket.pair()
        async with one, other:
            count = await fill(one, b"x")
            await cancelled(await waiting(one.send(b"never"), one))
            task = await waiting(one.send(b"waited"), one)
            assert [await other.receive() for _ in range(count)] == [b"x"] * count
            await task
            assert await other.receive() == b"waited"

    asyncio.run(main())


def test_a_waiting_datagram_sender_learns_that_the_receiver_has_gone() -> None:
    """M21"""

    async def main() -> None:
        one, other = AsyncDatagramSocket.pair()
        async with one:
            await fill(one, b"x")
            task = await waiting(one.send(b"x"), one)
            other.close()
            with pytest.raises(ConnectionRefusedError):
                await task

    asyncio.run(main())


def test_a_truncated_datagram_costs_only_itself(pipes: list[int]) -> None:
    """T24"""

    async def main() -> None:
        one, other = AsyncDatagramSocket.pair(max_bytes=8192, max_fds=16)
        async with one, other, AsyncDatagramSocket.from_fd(os.dup(one.fileno())) as unlimited:
            before = open_fds()
            await unlimited.send_with_fds(bytes(8193), pipes)
            await one.send(bytes(8192))
            with pytest.raises(WireError, match="max_bytes=8192"):
                await other.receive()
            assert open_fds() == before
            assert await other.receive() == bytes(8192)

    asyncio.run(main())
