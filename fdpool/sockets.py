"""`StreamSocket` and `DatagramSocket`: the wire's blocking faces, byte-compatible with a peer in any language."""

from __future__ import annotations

import errno
import select
import socket
from _thread import allocate_lock  # `threading` costs 1.5 ms to import
from array import array
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ._frames import (
    STREAM_MAX_BYTES,
    FrameReader,
    FrameWriter,
    OutgoingFrame,
    as_is,
    check_size,
    checked_descriptors,
    decode_json,
    encode_json,
)
from ._own_sockets import OwnSocket, own, pair
from .errors import PayloadTooLarge, WireError
from .fds import SCM_MAX_FD, HasFileno, OwnedFds, close_all, descriptor_number
from .wire import (
    CLOEXEC,
    CONTROL_BYTES,
    RECEIVE_FLAGS,
    SCM_RIGHTS,
    SEND_FLAGS,
    SOL_SOCKET,
    Bytes,
    Inbox,
    fds_lost,
    refused_by_peer,
    try_send,
    until_sent,
    wait_for,
)

_T = TypeVar("_T")

# What is wrong with one frame's descriptors, and nothing of it was sent. EINVAL: the kernel hands on no io_uring.
_OF_DESCRIPTORS = (errno.EBADF, errno.EINVAL, errno.ETOOMANYREFS)


def _adopt(fd: int, kind: int, max_bytes: int | None, max_fds: int) -> OwnSocket:
    """A socket object that owns `fd`; on an error `fd` is still the caller's."""
    if not 0 <= max_fds <= SCM_MAX_FD:
        raise ValueError(f"max_fds must be in 0..{SCM_MAX_FD}, not {max_fds}")
    if max_bytes is not None and not 0 <= max_bytes < 2**32:
        raise ValueError(f"max_bytes must be in 0..{2**32 - 1}, not {max_bytes}")
    number = descriptor_number(fd)
    try:
        sock = own(number)
    except OSError as error:
        if error.errno != errno.ENOTSOCK:
            raise
        raise ValueError(f"descriptor {number} is not a socket") from error
    problem = ""
    if (
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != kind
        or isinstance(sock.getsockname(), tuple)  # as of every family but Unix that has these types
    ):
        problem = f"is not a Unix {'stream' if kind == socket.SOCK_STREAM else 'datagram'} socket"
    elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        problem = "is a listening socket"
    if problem:
        sock.detach()
        raise ValueError(f"descriptor {number} {problem}")
    return sock


def _fresh_pair(kind: int) -> tuple[int, int]:
    """Two connected descriptors, blocking, close-on-exec, above the standard streams."""
    first, second = pair(kind)
    return first.detach(), second.detach()


class _Face:
    """What both classes share: one socket, owned, and two limits."""

    __slots__ = ("_receiving", "_sock", "max_bytes", "max_fds")

    def __init__(self, sock: OwnSocket, max_bytes: int, max_fds: int) -> None:
        self._sock: OwnSocket | None = sock
        self._receiving = False
        self.max_bytes = max_bytes
        self.max_fds = max_fds

    def fileno(self) -> int:
        """The descriptor, still owned by this object.

        Raises:
            ValueError: closed.
        """
        return self._open_socket().fileno()

    @property
    def closed(self) -> bool:
        """True once closed, or once `into_inner` has given the socket away."""
        return self._sock is None

    def _open_socket(self) -> OwnSocket:
        if self._sock is None:
            raise ValueError(f"this {type(self).__name__} is closed")
        return self._sock

    def _release(self) -> socket.socket:
        sock = self._open_socket()
        self._sock = None
        # A socket object as anybody else would make it: the one used here pretends to be non-blocking.
        return socket.socket(fileno=sock.detach())

    def _begin_receiving(self) -> None:
        # Not a lock: releasing one is a call, after which a signal handler may raise and lose the message.
        if self._receiving:
            raise RuntimeError(f"another thread is receiving on this {type(self).__name__}")
        self._receiving = True

    def close(self) -> None:
        """Close the socket; safe to call again. What is queued for the peer still reaches it."""
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def __repr__(self) -> str:
        state = "closed" if self._sock is None else self._sock.fileno()
        return f"<{type(self).__name__} {state} max_bytes={self.max_bytes} max_fds={self.max_fds}>"


class StreamSocket(_Face):
    """Whole messages with descriptors over a Unix stream socket; blocking, with `try_*` for event loops.

    A frame is a u32 little-endian payload length and the payload, with the descriptors on its first
    bytes. Make one with `pair` or `from_fd`.

    Descriptors that are sent are borrowed until the call returns (numbers, or anything with `fileno()`);
    those received belong to the caller, and are close-on-exec.

    Threads: any number may send, frames are never torn (a lock), and each sender is told of its own frame's
    errors. One at a time may receive, a second one gets a RuntimeError. Close it when no thread is using it.
    Not to be used from a signal handler.

    Signals: a handler that raises out of a receive loses nothing, the next receive goes on (not so on Python 3.10, see
    the note of `fdpool.wire`). Out of a send: if a byte of the frame had gone, the next send or `drain` sends the rest
    first, and otherwise it was never sent; the exception does not say which.
    """

    __slots__ = ("__weakref__", "_lock", "_reader", "_writer")

    def __init__(self, sock: OwnSocket, max_bytes: int, max_fds: int) -> None:
        super().__init__(sock, max_bytes, max_fds)
        # Held for one system call that does not wait, never while waiting: so `try_*` may take it too.
        self._lock = allocate_lock()
        self._reader = FrameReader(max_bytes, max_fds)
        self._writer = FrameWriter(max_bytes, max_fds)

    @classmethod
    def pair(
        cls, *, max_bytes: int = STREAM_MAX_BYTES, max_fds: int = SCM_MAX_FD
    ) -> tuple[StreamSocket, StreamSocket]:
        """Two ends connected to each other; see `from_fd` for the limits."""
        first, second = _fresh_pair(socket.SOCK_STREAM)
        try:
            one = cls.from_fd(first, max_bytes=max_bytes, max_fds=max_fds)
        except BaseException:
            close_all((first, second))
            raise
        return one, cls.from_fd(second, max_bytes=max_bytes, max_fds=max_fds)

    @classmethod
    def from_fd(
        cls, fd: int, *, max_bytes: int = STREAM_MAX_BYTES, max_fds: int = SCM_MAX_FD
    ) -> StreamSocket:
        """The Unix stream socket `fd`, owned by the result from now on.

        Args:
            fd: its number. Its blocking mode is neither used nor changed.
            max_bytes: the longest payload, either way.
            max_fds: most descriptors of a frame, either way; 0..`SCM_MAX_FD`.

        Raises:
            ValueError: not a Unix stream socket, or a limit out of range; `fd` is still the caller's.
            OSError: `fd` is not open (EBADF).
        """
        return cls(_adopt(fd, socket.SOCK_STREAM, max_bytes, max_fds), max_bytes, max_fds)

    def into_inner(self) -> socket.socket:
        """The plain socket, ownership with it; this object counts as closed. Nothing was read ahead.

        Raises:
            ValueError: a frame is half received or half sent and would be lost; or closed. Nothing changed.
        """
        if not self._reader.between_frames:
            raise ValueError("a frame is half received: finish it before giving the socket away")
        if self._writer.backlog:
            raise ValueError("frames are still to be sent: drain before giving the socket away")
        return self._release()

    # JSON -------------------------------------------------------------------------------------

    def send(self, message: object) -> None:
        """Send `message` as JSON; waits for room. Errors as for `send_with_fds`."""
        self.send_bytes(encode_json(message))

    def send_with_fds(self, message: object, fds: Iterable[int | HasFileno]) -> None:
        """Send `message` as JSON with descriptors; waits for room.

        Raises:
            TypeError, ValueError: `message` has no JSON form.
            PayloadTooLarge, FdTransferError, OSError: as for `send_bytes`.
        """
        self.send_bytes(encode_json(message), fds)

    def receive(self) -> Any:
        """The next message; descriptors that come with it are closed. Errors as for `receive_with_fds`."""
        message, fds = self.receive_with_fds()
        if fds:
            close_all(fds)
        return message

    def receive_with_fds(self) -> tuple[Any, list[int]]:
        """The next message and its descriptors, which the caller owns; waits for it.

        Raises:
            WireError: not JSON; that frame is gone, the next can be received. Else as for `receive_bytes`.
            EOFError, FdTransferError, OSError: as for `receive_bytes`.
        """
        return self._receive(decode_json)

    def try_receive_with_fds(self) -> tuple[Any, list[int]] | None:
        """Like `receive_with_fds`, but None if no whole frame has come; never waits."""
        return self._try_receive(decode_json)

    # Bytes ------------------------------------------------------------------------------------

    def send_bytes(self, payload: Bytes, fds: Iterable[int | HasFileno] = ()) -> None:
        """Send one frame, after whatever is in the backlog; waits for room.

        Raises:
            PayloadTooLarge: above `max_bytes` or `max_fds`. Like all of these, before anything is sent:
            FdTransferError: the peer takes no descriptors (EPERM).
            OSError: EBADF for a descriptor that is not open, ETOOMANYREFS if too many are in flight (see
                `try_send`), BrokenPipeError or ConnectionResetError if the peer has gone (then the
                frame may have been sent in part; no more can be sent on this stream).
        """
        with self.outgoing(payload, fds) as attempt:
            until_sent(attempt, self._open_socket())

    def outgoing(self, payload: Bytes, fds: Iterable[int | HasFileno] = ()) -> _Sending:
        """One frame to send, for a caller with his own way of waiting for room.

        `with stream.outgoing(...) as attempt:` call `attempt()`, which never waits, until it says True.
        Leaving the block before the frame's first byte has gone withdraws it. Errors as for `send_bytes`.
        """
        self._open_socket()
        return _Sending(self, self._writer.frame(payload, fds))

    def queue_bytes(self, payload: Bytes, fds: Iterable[int | HasFileno] = ()) -> None:
        """Put one frame at the end of the backlog, to be sent by `flush`, `drain` or the next send.

        Its descriptors are duplicated: the caller's may be closed as soon as this returns.

        Raises:
            PayloadTooLarge: above `max_bytes` or `max_fds`. Like this one, with nothing queued:
            OSError: EBADF for a descriptor that is not open, EMFILE if there is no room for duplicates.
        """
        self._open_socket()
        frame = self._writer.frame(payload, fds)
        frame.keep()
        with self._lock:
            self._writer.backlog.append(frame)

    def flush(self) -> bool:
        """Send what the backlog holds as far as it goes, and never wait; True if it is empty now.

        Raises:
            FdTransferError: the peer takes no descriptors; the frame that had them has been dropped.
            OSError: with ETOOMANYREFS or ENOBUFS try again later (see `try_send`), nothing is lost;
                with others the stream is broken.
        """
        with self._lock:
            return self._write()

    def drain(self) -> None:
        """Send what the backlog holds; waits for room. Errors as for `flush`."""
        until_sent(self.flush, self._open_socket())

    @property
    def backlog(self) -> int:
        """How many frames have not gone, or not entirely."""
        return len(self._writer.backlog)

    def receive_bytes(self) -> tuple[bytes, list[int]]:
        """The next frame's payload and descriptors, which the caller owns; waits for it.

        Raises:
            EOFError: the peer has closed; the text says between which bytes. Final.
            WireError: a length above `max_bytes` (final: close it), or more than `max_fds` descriptors
                (all closed; that frame is gone, the next can be received).
            FdTransferError: the kernel lost descriptors of this frame (those that came are closed; its
                `wanted` is 0, as a frame does not say). The next frame can be received.
            ConnectionResetError: the peer has gone without reading all that it was sent.
            RuntimeError: another thread is receiving.
        """
        return self._receive(as_is)

    def try_receive_bytes(self) -> tuple[bytes, list[int]] | None:
        """Like `receive_bytes`, but None if no whole frame has come; never waits, keeps what has."""
        return self._try_receive(as_is)

    def close(self) -> None:
        """Close the socket, and every descriptor of frames half received or not sent; safe to call again."""
        super().close()
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> StreamSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # How --------------------------------------------------------------------------------------

    def _receive(self, decode: Callable[[bytes], _T]) -> tuple[_T, list[int]]:
        sock = self._open_socket()
        self._begin_receiving()
        try:
            while not self._read(sock, CLOEXEC):
                wait_for(sock, select.POLLIN)
            return self._taken(decode)
        finally:
            self._receiving = False

    def _try_receive(self, decode: Callable[[bytes], _T]) -> tuple[_T, list[int]] | None:
        sock = self._open_socket()
        self._begin_receiving()
        try:
            return self._taken(decode) if self._read(sock, RECEIVE_FLAGS) else None
        finally:
            self._receiving = False

    def _read(self, sock: OwnSocket, flags: int) -> bool:
        """Read until a frame is whole; False if the socket has no more to give."""
        reader = self._reader
        # Always room for all descriptors that the kernel can send: too many can then be told from lost.
        control = CONTROL_BYTES[SCM_MAX_FD]
        while size := reader.missing():
            try:
                reader.arrived.extend(map(sock.recvmsg, (size,), (control,), (flags,)))
            except BlockingIOError:
                return False
        return True

    def _taken(self, decode: Callable[[bytes], _T]) -> tuple[_T, list[int]]:
        try:
            message = decode(self._reader.payload())
        except WireError:
            close_all(self._reader.take())
            raise
        return message, self._reader.take()

    def _send_frame(self, frame: OutgoingFrame) -> bool:
        """Send the backlog up to `frame`, which is put at its end, as far as it goes; True if `frame` has gone."""
        with self._lock:
            backlog = self._writer.backlog
            if not frame.sent and frame.error is None and frame not in backlog:
                backlog.append(frame)
            gone = frame not in backlog or self._write(frame)
        if frame.error is not None:
            try:
                raise frame.error
            finally:
                frame.error = None  # once some have landed it may go: the next attempt is a new one
        return gone

    def _withdraw(self, frame: OutgoingFrame) -> None:
        with self._lock:
            self._writer.withdraw(frame)

    def _write(self, last: OutgoingFrame | None = None) -> bool:
        """Send the backlog, up to `last`, as far as it goes; True if all of that went. The caller holds the lock.

        What is behind `last` is left alone, so that its errors are not told to whoever sent `last` whole. A frame
        that cannot go for its descriptors is dropped, and whose it is learns of it at his next attempt.
        """
        sock, backlog = self._open_socket(), self._writer.backlog
        while backlog:
            frame = backlog[0]
            buffers, fds = frame.rest()
            if frame.done:
                del backlog[0]
                if frame is last:
                    break
                continue
            ancillary = ((SOL_SOCKET, SCM_RIGHTS, array("i", fds)),) if fds else ()
            try:
                frame.sent.extend(map(sock.sendmsg, (buffers,), (ancillary,), (SEND_FLAGS,)))
            except BlockingIOError:
                return False
            except OSError as error:
                refused = isinstance(error, PermissionError)
                its_own = refused or (error.errno in _OF_DESCRIPTORS and not frame.queued)
                if not (fds and its_own):
                    raise
                self._writer.withdraw(frame)
                frame.error = refused_by_peer(len(fds)) if refused else error
                if frame.queued:
                    raise frame.error from error
                if frame is last:
                    break
        return True


def take_fds(stream: StreamSocket, most: int) -> None:
    """Have `stream` take up to `most` descriptors with a frame; where there are more, all are closed as they come."""
    stream._reader.max_fds = most


class _Sending:
    """See `StreamSocket.outgoing`."""

    __slots__ = ("_frame", "_stream")

    def __init__(self, stream: StreamSocket, frame: OutgoingFrame) -> None:
        self._stream = stream
        self._frame = frame

    def __enter__(self) -> Callable[[], bool]:
        return self._attempt

    def __exit__(self, *_: object) -> None:
        self._stream._withdraw(self._frame)

    def _attempt(self) -> bool:
        return self._stream._send_frame(self._frame)


class DatagramSocket(_Face):
    """Messages of bytes with descriptors over a Unix datagram socket, one datagram each; blocking.

    Make one with `pair` or `from_fd`. Descriptors that are sent are borrowed until the call returns
    (numbers, or anything with `fileno()`); those received belong to the caller, and are close-on-exec.

    An empty message is legal. A datagram socket has no end of stream: when the peer has died, a send
    raises ConnectionRefusedError, but a receive waits for ever, so learn of deaths elsewhere. After
    a `shutdown(SHUT_RD)` receives give b"".

    Threads: any number may send. One at a time may receive, a second one gets a RuntimeError. Close it
    when no thread is using it.

    Signals: a handler that raises out of a receive loses nothing (not so on Python 3.10, see the note of
    `fdpool.wire`); out of a send, it does not say whether the datagram was sent.
    """

    __slots__ = ("__weakref__", "_inbox")

    def __init__(self, sock: OwnSocket, max_bytes: int, max_fds: int) -> None:
        super().__init__(sock, max_bytes, max_fds)
        # Room for all descriptors that the kernel can send: too many can then be told from lost.
        self._inbox = Inbox(sock, max_bytes, SCM_MAX_FD)

    @classmethod
    def pair(
        cls, *, max_bytes: int | None = None, max_fds: int = SCM_MAX_FD
    ) -> tuple[DatagramSocket, DatagramSocket]:
        """Two ends connected to each other; see `from_fd` for the limits."""
        first, second = _fresh_pair(socket.SOCK_DGRAM)
        try:
            one = cls.from_fd(first, max_bytes=max_bytes, max_fds=max_fds)
        except BaseException:
            close_all((first, second))
            raise
        return one, cls.from_fd(second, max_bytes=max_bytes, max_fds=max_fds)

    @classmethod
    def from_fd(cls, fd: int, *, max_bytes: int | None = None, max_fds: int = SCM_MAX_FD) -> DatagramSocket:
        """The Unix datagram socket `fd`, owned by the result from now on.

        Args:
            fd: its number. Its blocking mode is neither used nor changed.
            max_bytes: the longest message, either way; None for what its SO_SNDBUF allows.
            max_fds: most descriptors of a message, either way; 0..`SCM_MAX_FD`.

        Raises:
            ValueError: not a Unix datagram socket, or a limit out of range; `fd` is still the caller's.
            OSError: `fd` is not open (EBADF).
        """
        sock = _adopt(fd, socket.SOCK_DGRAM, max_bytes, max_fds)
        if max_bytes is None:
            # Kernel: 32 bytes of SO_SNDBUF are kept back (test_kernel_facts, M13).
            max_bytes = max(0, sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 32)
        return cls(sock, max_bytes, max_fds)

    def into_inner(self) -> socket.socket:
        """The plain socket, ownership with it; this object counts as closed.

        Raises:
            ValueError: an interrupted receive has left a message here: receive it first; or closed.
        """
        if self._inbox.arrived:
            raise ValueError("a message has been received and not fetched: receive it first")
        return self._release()

    def send(self, data: Bytes) -> None:
        """Send one datagram; waits for room. Errors as for `send_with_fds`."""
        self.send_with_fds(data, ())

    def send_with_fds(self, data: Bytes, fds: Iterable[int | HasFileno]) -> None:
        """Send one datagram with descriptors; waits for room. On every error nothing was sent.

        Raises:
            PayloadTooLarge: above `max_bytes` or `max_fds`, or above what SO_SNDBUF allows.
            FdTransferError: the peer takes no descriptors (EPERM).
            OSError: ConnectionRefusedError if the peer has gone; EBADF, ETOOMANYREFS as for the function
                `try_send`.
        """
        sock = self._open_socket()
        borrowed = list(fds)
        until_sent(lambda: self.try_send_with_fds(data, borrowed), sock)

    def try_send_with_fds(self, data: Bytes, fds: Iterable[int | HasFileno] = ()) -> bool:
        """Like `send_with_fds`, but False if it would have to wait (or ENOBUFS); never waits."""
        sock = self._open_socket()
        size = memoryview(data).nbytes
        check_size(size, self.max_bytes)
        numbers = checked_descriptors(fds, self.max_fds)
        try:
            return try_send(sock, (data,), numbers)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 32
            raise PayloadTooLarge(
                f"{size} bytes are above what the socket's SO_SNDBUF lets through, {room}"
            ) from error

    def receive(self) -> bytes:
        """The next datagram; descriptors that come with it are closed. Errors as for `receive_with_fds`."""
        data, fds = self.receive_with_fds()
        if fds:
            close_all(fds)
        return data

    def receive_with_fds(self) -> tuple[bytes, list[int]]:
        """The next datagram and its descriptors, which the caller owns; waits for it.

        Raises:
            WireError: it was longer than `max_bytes`, or had more than `max_fds` descriptors.
            FdTransferError: the kernel lost descriptors of it (`wanted` is 0, as a datagram does not say).
            RuntimeError: another thread is receiving.

        Each of the first two costs only that datagram: its descriptors are closed, the next can be received.
        """
        self._open_socket()
        self._begin_receiving()
        try:
            self._inbox.fill()
            return self._taken()
        finally:
            self._receiving = False

    def try_receive_with_fds(self) -> tuple[bytes, list[int]] | None:
        """Like `receive_with_fds`, but None if no datagram is queued; never waits."""
        self._open_socket()
        self._begin_receiving()
        try:
            return self._taken() if self._inbox.try_fill() else None
        finally:
            self._receiving = False

    def _taken(self) -> tuple[bytes, list[int]]:
        received = self._inbox.look()
        fds = received.fds
        problem: Exception | None = None
        if received.bytes_cut:
            problem = WireError(f"a datagram was longer than max_bytes={self.max_bytes}; its rest is gone")
        elif len(fds) > self.max_fds:
            problem = WireError(
                f"a datagram came with {len(fds)} descriptors, above the limit max_fds={self.max_fds}; "
                "all have been closed"
            )
        elif received.fds_lost:
            problem = fds_lost(len(fds), "datagram")
        if problem is not None:
            # Only here: its __del__ would run at every return, and swallow what a handler raises in it.
            unwanted = OwnedFds()
            unwanted.numbers = fds
            del self._inbox.arrived[:]
            unwanted.close()
            raise problem
        del self._inbox.arrived[:]
        return received.data, fds

    def close(self) -> None:
        """Close the socket, and the descriptors of a message not fetched; safe to call again."""
        super().close()
        if self._inbox.arrived:
            close_all(self._inbox.look().fds)
            del self._inbox.arrived[:]

    def __enter__(self) -> DatagramSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
