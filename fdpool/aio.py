"""asyncio faces: `AsyncSocket` (stream) and `AsyncDatagramSocket`, with the verbs of their blocking twins.

Each verb is the twin's try-verb in a loop; only who waits differs: here the event loop, through
`add_reader` and `add_writer`. A frame half come or half gone lives in the twin and is touched only
between two waits, so a cancelled verb loses neither bytes nor descriptors:

- receive: what has come of a frame stays, and the next receive goes on with it;
- send: cancelled before its first byte, it was never sent. After that the next send, or `drain`, sends
  the rest first; its descriptors have gone with its first bytes.

One event loop and one thread at a time. Any number of tasks may send and receive; they take turns.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, TypeVar

from ._frames import STREAM_MAX_BYTES, encode_json
from .fds import SCM_MAX_FD, HasFileno, close_all
from .sockets import DatagramSocket, StreamSocket
from .wire import Bytes

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable

_T = TypeVar("_T")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


class _Waits:
    """Waiting for one socket on the running loop, and being woken when it is closed here.

    Invariant: the descriptor is registered with a loop only while a future in `_waiting` stands for it,
    and is unregistered before it is closed. Closed first, with a copy in another process, it would stay
    in the epoll set and be reported for ever, under a number that may be somebody else's by then (M27).
    """

    __slots__ = ("_receive_turn", "_send_turn", "_sock", "_waiting")

    def __init__(self, sock: HasFileno) -> None:
        self._sock = sock
        self._receive_turn = asyncio.Lock()
        self._send_turn = asyncio.Lock()
        self._waiting: dict[asyncio.Future[None], Callable[[], object]] = {}  # and how to unregister

    async def received(self, attempt: Callable[[], _T | None]) -> _T:
        """What `attempt` gives, once it gives something."""
        async with self._receive_turn:
            while (result := attempt()) is None:
                await self._readable()
            return result

    async def sent(self, attempt: Callable[[], bool]) -> None:
        """Repeat `attempt` until it says True."""
        async with self._send_turn:
            pause_s = _FIRST_PAUSE_S
            while True:
                try:
                    if attempt():
                        return
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    await asyncio.sleep(pause_s)  # no poll tells when a BSD has room again
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                else:
                    await self._writable()

    def end(self) -> None:
        """Unregister, and wake every waiter with an error. The caller closes the socket afterwards."""
        while self._waiting:
            future, unregister = self._waiting.popitem()
            unregister()
            if not future.done():
                future.set_exception(ValueError("the socket was closed while a task waited for it"))

    async def _readable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._sock.fileno()
        future = loop.create_future()
        loop.add_reader(fd, _wake, future)
        await self._woken(future, lambda: loop.remove_reader(fd))

    async def _writable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._sock.fileno()
        future = loop.create_future()
        loop.add_writer(fd, _wake, future)
        await self._woken(future, lambda: loop.remove_writer(fd))

    async def _woken(self, future: asyncio.Future[None], unregister: Callable[[], object]) -> None:
        self._waiting[future] = unregister
        try:
            await future
        finally:
            # Not after `end`: the number may be somebody else's by now.
            if self._waiting.pop(future, None) is not None:
                unregister()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class AsyncSocket:
    """Whole messages with descriptors over a Unix stream socket, for asyncio.

    The wire form, the limits and the errors are those of `StreamSocket`; descriptors that are sent are
    borrowed until the call returns, those received are the caller's and close-on-exec. Make one with
    `pair` or `from_fd`. The blocking mode of the descriptor is never changed.

    Cancelling, threads, loops: see the module.
    """

    __slots__ = ("__weakref__", "_sock", "_waits")

    def __init__(self, sock: StreamSocket) -> None:
        self._sock = sock
        self._waits = _Waits(sock)

    @classmethod
    def pair(
        cls, *, max_bytes: int = STREAM_MAX_BYTES, max_fds: int = SCM_MAX_FD
    ) -> tuple[AsyncSocket, AsyncSocket]:
        """Two ends connected to each other; limits as for `StreamSocket.from_fd`."""
        one, other = StreamSocket.pair(max_bytes=max_bytes, max_fds=max_fds)
        return cls(one), cls(other)

    @classmethod
    def from_fd(cls, fd: int, *, max_bytes: int = STREAM_MAX_BYTES, max_fds: int = SCM_MAX_FD) -> AsyncSocket:
        """The Unix stream socket `fd`, owned by the result from now on; as `StreamSocket.from_fd`."""
        return cls(StreamSocket.from_fd(fd, max_bytes=max_bytes, max_fds=max_fds))

    def into_inner(self) -> socket.socket:
        """The plain socket, ownership with it; this object counts as closed, waiters get a ValueError.

        Raises:
            ValueError: a frame is half received or half sent and would be lost. Nothing changed.
        """
        inner = self._sock.into_inner()
        self._waits.end()
        return inner

    async def send(self, message: object) -> None:
        """Send `message` as JSON. Errors as for `StreamSocket.send_with_fds`."""
        await self.send_bytes(encode_json(message))

    async def send_with_fds(self, message: object, fds: Iterable[int | HasFileno]) -> None:
        """Send `message` as JSON with descriptors. Errors as for `StreamSocket.send_with_fds`."""
        await self.send_bytes(encode_json(message), fds)

    async def receive(self) -> Any:
        """The next message; descriptors that come with it are closed."""
        message, fds = await self.receive_with_fds()
        close_all(fds)
        return message

    async def receive_with_fds(self) -> tuple[Any, list[int]]:
        """The next message and its descriptors, which the caller owns.

        Raises:
            EOFError, WireError, FdTransferError, OSError: as for `StreamSocket.receive_with_fds`.
            ValueError: closed, now or while waiting.
        """
        return await self._waits.received(self._sock.try_receive_with_fds)

    async def send_bytes(self, payload: Bytes, fds: Iterable[int | HasFileno] = ()) -> None:
        """Send one frame, after what is left of an earlier one. Errors as for `StreamSocket.send_bytes`.

        Raises:
            ValueError: closed, now or while waiting.
        """
        with self._sock.outgoing(payload, fds) as attempt:
            await self._waits.sent(attempt)

    async def receive_bytes(self) -> tuple[bytes, list[int]]:
        """The next frame's payload and descriptors; else like `receive_with_fds`."""
        return await self._waits.received(self._sock.try_receive_bytes)

    async def drain(self) -> None:
        """Send what is left of a frame whose send was cancelled. Errors as for `StreamSocket.flush`."""
        await self._waits.sent(self._sock.flush)

    def fileno(self) -> int:
        """The descriptor, still owned by this object; ValueError if closed."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """True once closed, or once `into_inner` has given the socket away."""
        return self._sock.closed

    def close(self) -> None:
        """Unregister and close; tasks that wait on it get a ValueError. Safe to call again."""
        self._waits.end()
        self._sock.close()

    async def __aenter__(self) -> AsyncSocket:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncDatagramSocket:
    """Messages of bytes with descriptors over a Unix datagram socket, one datagram each, for asyncio.

    Limits, errors and warnings are those of `DatagramSocket`: above all, a receive waits for ever when
    the peer has died. A cancelled send was not sent. Make one with `pair` or `from_fd`.

    Cancelling, threads, loops: see the module.
    """

    __slots__ = ("__weakref__", "_sock", "_waits")

    def __init__(self, sock: DatagramSocket) -> None:
        self._sock = sock
        self._waits = _Waits(sock)

    @classmethod
    def pair(
        cls, *, max_bytes: int | None = None, max_fds: int = SCM_MAX_FD
    ) -> tuple[AsyncDatagramSocket, AsyncDatagramSocket]:
        """Two ends connected to each other; limits as for `DatagramSocket.from_fd`."""
        one, other = DatagramSocket.pair(max_bytes=max_bytes, max_fds=max_fds)
        return cls(one), cls(other)

    @classmethod
    def from_fd(
        cls, fd: int, *, max_bytes: int | None = None, max_fds: int = SCM_MAX_FD
    ) -> AsyncDatagramSocket:
        """The Unix datagram socket `fd`, owned by the result from now on; as `DatagramSocket.from_fd`."""
        return cls(DatagramSocket.from_fd(fd, max_bytes=max_bytes, max_fds=max_fds))

    def into_inner(self) -> socket.socket:
        """The plain socket, ownership with it; this object counts as closed, waiters get a ValueError."""
        inner = self._sock.into_inner()
        self._waits.end()
        return inner

    async def send(self, data: Bytes) -> None:
        """Send one datagram. Errors as for `DatagramSocket.send_with_fds`."""
        await self.send_with_fds(data, ())

    async def send_with_fds(self, data: Bytes, fds: Iterable[int | HasFileno]) -> None:
        """Send one datagram with descriptors, borrowed until this returns.

        Raises:
            PayloadTooLarge, FdTransferError, OSError: as for `DatagramSocket.send_with_fds`.
            ValueError: closed, now or while waiting.
        """
        borrowed = list(fds)
        await self._waits.sent(lambda: self._sock.try_send_with_fds(data, borrowed))

    async def receive(self) -> bytes:
        """The next datagram; descriptors that come with it are closed."""
        data, fds = await self.receive_with_fds()
        close_all(fds)
        return data

    async def receive_with_fds(self) -> tuple[bytes, list[int]]:
        """The next datagram and its descriptors, which the caller owns.

        Raises:
            WireError, FdTransferError: as for `DatagramSocket.receive_with_fds`.
            ValueError: closed, now or while waiting.
        """
        return await self._waits.received(self._sock.try_receive_with_fds)

    def fileno(self) -> int:
        """The descriptor, still owned by this object; ValueError if closed."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """True once closed, or once `into_inner` has given the socket away."""
        return self._sock.closed

    def close(self) -> None:
        """Unregister and close; tasks that wait on it get a ValueError. Safe to call again."""
        self._waits.end()
        self._sock.close()

    async def __aenter__(self) -> AsyncDatagramSocket:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
