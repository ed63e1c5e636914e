"""One message = bytes + descriptors, in one system call: `try_*` never waits, the plain verbs do.

`try_send`, `send`, `try_receive`, `receive` and `Inbox` are for datagram sockets. Nothing is interpreted;
what the kernel cut off is reported, never hidden. The frames of a stream are in `_frames`, the public
sockets in `sockets`, and the asyncio ones in `aio`: each on the one before.

No call changes the blocking mode of a socket: O_NONBLOCK belongs to the open file description, which
another process may hold too (fcntl(2)). So "do not wait" is MSG_DONTWAIT, call by call.

Signals: a handler that raises (Ctrl-C does) between `recvmsg` and the next line loses the message and
leaks its descriptors; aimed at, it hit 4 of 10. Masking would not help, as the C handler may run in any
thread and the Python one always runs in the main one. So what is received goes into a list *inside C*
(`list.extend` over a map of `recvmsg`) and is let go of only by plain stores, between which CPython 3.11
and later run no handler. `Inbox` and the public sockets do so; `try_receive` and `receive` do not.
"""

import errno
import os
import select
import socket
import sys
import time
from _socket import socket as AnySocket  # what every class of sockets is made of
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat, starmap
from typing import Any, NamedTuple, TypeVar

from .errors import FdTransferError
from .fds import SCM_MAX_FD, HasFileno, OwnedFds, close_all

_T = TypeVar("_T")
#: What can be sent.
Bytes = bytes | bytearray | memoryview
_Ancillary = Iterable[tuple[int, int, bytes]]
#: What `recvmsg` returns: data (or its length, from `recvmsg_into`), ancillary data, flags, address.
Raw = tuple[Any, list[tuple[int, int, bytes]], int, Any]

# Plain ints: `|` on the enum members costs as much as all the rest here. The two with a default are not on
# macOS.
SOL_SOCKET = int(socket.SOL_SOCKET)
SCM_RIGHTS = int(socket.SCM_RIGHTS)
_SCM_PIDFD = 4 if sys.platform == "linux" else -1  # linux/socket.h; the socket module has no name for it
_DESCRIPTORS = (SCM_RIGHTS, _SCM_PIDFD)
_TRUNC = int(socket.MSG_TRUNC)
CTRUNC = int(socket.MSG_CTRUNC)
_CUT = _TRUNC | CTRUNC
_DONTWAIT = int(socket.MSG_DONTWAIT)
_NOSIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))
CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
SEND_FLAGS = _DONTWAIT | _NOSIGNAL
RECEIVE_FLAGS = _DONTWAIT | CLOEXEC
_PEEK = int(socket.MSG_PEEK)
_SO_PEEK_OFF = 42  # asm-generic/socket.h; the socket module has no name for it

# Kernel: credentials and security labels are put before the descriptors, a pidfd after them, into the
# same buffer; without room for all, descriptors are what is lost (test_kernel_facts, M23). 256: a label.
_CONTROL_EXTRA = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4) + socket.CMSG_SPACE(256)
CONTROL_BYTES = tuple(socket.CMSG_SPACE(4 * n) + _CONTROL_EXTRA for n in range(SCM_MAX_FD + 1))

# Above 128 KiB malloc maps fresh pages for every buffer: 20 µs a receive, measured, against 4.
MALLOC_BYTES = 120_000

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


# -- datagrams, one system call each -------------------------------------------------------------


class Received(NamedTuple):
    """One receive, with what the kernel says was cut off.

    Attributes:
        data: the bytes.
        fds: the descriptors that came, close-on-exec; the caller owns them, whatever else is true.
        bytes_cut: the message was longer than `max_bytes`; its rest is gone (MSG_TRUNC).
        fds_lost: descriptors were sent that are not in `fds` (MSG_CTRUNC, or more than `max_fds`).
    """

    data: bytes
    fds: list[int]
    bytes_cut: bool
    fds_lost: bool


_new: Callable[..., Received] = tuple.__new__  # half the cost of Received(...), which is a Python function


def try_send(sock: AnySocket, buffers: Sequence[Bytes], fds: Sequence[int] = ()) -> bool:
    """Send the buffers as one datagram with `fds`; False if it would have to wait. Never waits.

    Costs 0.15 µs above the bare `sendmsg`, with a descriptor as without (measured, CPython 3.11).

    Args:
        sock: a connected Unix datagram socket with no Python timeout. Not a stream: a part might be sent.
        buffers: joined by the kernel; SO_SNDBUF - 32 bytes at most.
        fds: numbers, borrowed until the call returns; `SCM_MAX_FD` at most.

    Raises:
        FdTransferError: the receiver takes no descriptors (EPERM: SO_PASSRIGHTS off, a security module).
        OSError: nothing was sent. With errno ETOOMANYREFS this user has too many descriptors in
            flight: try again once some have landed. With ENOBUFS (BSD, macOS) the receiver's queue is
            full, and poll(2) does not tell when it no longer is: pause, then try again; `send` does.
            With EMSGSIZE or EINVAL there are too many bytes or descriptors, with ECONNREFUSED the
            other end has been closed by all its holders, with EBADF one of `fds` is not open.

    Any number of threads and processes may send on one socket: the kernel keeps datagrams whole.
    """
    try:
        if fds:
            sock.sendmsg(buffers, ((SOL_SOCKET, SCM_RIGHTS, array("i", fds)),), SEND_FLAGS)
        elif len(buffers) == 1:
            sock.send(buffers[0], SEND_FLAGS)
        else:
            sock.sendmsg(buffers, (), SEND_FLAGS)
    except BlockingIOError:
        return False
    except PermissionError as error:
        if fds:
            raise refused_by_peer(len(fds)) from error
        raise
    return True


def send(sock: AnySocket, buffers: Sequence[Bytes], fds: Sequence[int] = ()) -> None:
    """Like `try_send`, but wait for room; ENOBUFS is waited out too, with pauses up to 50 ms."""
    until_sent(partial(try_send, sock, buffers, fds), sock)


def try_receive(sock: AnySocket, max_bytes: int, max_fds: int = SCM_MAX_FD) -> Received | None:
    """One message with its descriptors, or None if none is queued. Never waits, never loses silently.

    Costs 0.5 µs above the bare `recvmsg`, 1.3 µs with a descriptor (measured), and 16 to 20 µs more from
    128 KiB of `max_bytes` on. `Inbox` is the better choice there, and where a signal handler may raise.

    Args:
        sock: a Unix socket with no Python timeout. On a stream, one read and not one message.
        max_bytes: the rest of a longer message is gone, and `bytes_cut` says so.
        max_fds: 0..`SCM_MAX_FD`; more than these are closed, and `fds_lost` says so.

    Raises:
        OSError: from recvmsg(2); nothing was received.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(max_bytes, CONTROL_BYTES[max_fds], RECEIVE_FLAGS)
    except BlockingIOError:
        return None
    if ancillary or flags & _CUT:  # never `if flags`: MSG_CMSG_CLOEXEC comes back in them
        return _judged(data, ancillary, flags, max_fds)
    return _new(Received, (data, [], False, False))


def try_take(sock: AnySocket, max_bytes: int, max_fds: int = SCM_MAX_FD) -> Received | None:
    """As `try_receive`, but a message stays where it is if there is no room for its descriptors.

    It is looked at first (MSG_PEEK), which gives duplicates of them. If another process receives it just then, the next
    is what is returned.

    Raises:
        OSError: as `try_receive`. EMFILE: no room.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(max_bytes, CONTROL_BYTES[max_fds], RECEIVE_FLAGS | _PEEK)
    except BlockingIOError:
        return None
    seen = _judged(data, ancillary, flags, max_fds)
    if seen.fds_lost:
        close_all(seen.fds)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    taken = try_receive(sock, max_bytes, max_fds)
    if taken is not None and taken.fds_lost and taken.data == seen.data:
        close_all(taken.fds)
        return seen
    close_all(seen.fds)
    return taken


def peek_all(sock: AnySocket, max_bytes: int) -> list[bytes]:
    """The bytes of all messages that are queued, which stay there; no descriptor is opened. One process at a time.

    Empty messages may be passed over.

    Raises:
        OSError: this kernel cannot do that (SO_PEEK_OFF in socket(7), on Unix sockets from Linux 3.4 on).
    """
    found = []
    sock.setsockopt(SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        while True:
            found.append(sock.recv(max_bytes, _DONTWAIT | _PEEK))
    except BlockingIOError:
        return found
    finally:
        sock.setsockopt(SOL_SOCKET, _SO_PEEK_OFF, -1)


def receive(sock: AnySocket, max_bytes: int, max_fds: int = SCM_MAX_FD) -> Received:
    """Like `try_receive`, but wait for a message: in `recvmsg` itself, or in poll(2) if O_NONBLOCK is set."""
    while True:
        try:
            data, ancillary, flags, _ = sock.recvmsg(max_bytes, CONTROL_BYTES[max_fds], CLOEXEC)
        except BlockingIOError:
            wait_for(sock, select.POLLIN)
        else:
            if ancillary or flags & _CUT:
                return _judged(data, ancillary, flags, max_fds)
            return _new(Received, (data, [], False, False))


def _judged(data: bytes, ancillary: _Ancillary, flags: int, max_fds: int) -> Received:
    received, strays = _sort_out(data, ancillary, flags, max_fds)
    if strays:
        close_all(strays)
    return received


def wait_for(sock: HasFileno, events: int) -> None:
    """Wait until poll(2) reports one of `events`, or an error or hang-up, for `sock`."""
    poll = select.poll()
    poll.register(sock, events)
    poll.poll()


class Inbox:
    """The receiving side of one socket: `try_receive` and `receive` that a raising signal handler cannot rob.

    A message leaves the inbox only as it is returned. If a handler raises before that, the next call
    returns it. (On CPython 3.10 a handler may also run between the return and the caller's assignment,
    where nothing can help.) Costs 0.5 µs more than the functions; 15 less from 128 KiB of `max_bytes` on.

    Args:
        sock: borrowed; must outlive the inbox.
        max_bytes, max_fds: as for `try_receive`.

    One thread at a time.
    """

    __slots__ = ("_buffer", "_max_fds", "_now", "_sock", "_wait", "arrived")

    def __init__(self, sock: AnySocket, max_bytes: int, max_fds: int = SCM_MAX_FD) -> None:
        self.arrived: list[Raw] = []
        self._sock = sock
        self._max_fds = max_fds
        self._buffer: memoryview | None = None
        call: Callable[..., Raw] = sock.recvmsg
        first: object = max_bytes
        if max_bytes > MALLOC_BYTES:
            self._buffer = memoryview(bytearray(max_bytes))
            call, first = sock.recvmsg_into, (self._buffer,)
        control = CONTROL_BYTES[max_fds]
        self._now: Iterator[Raw] = starmap(call, repeat((first, control, RECEIVE_FLAGS)))
        self._wait: Iterator[Raw] = starmap(call, repeat((first, control, CLOEXEC)))

    def try_receive(self) -> Received | None:
        """Like the function: one message, or None if none is queued."""
        if not self.try_fill():
            return None
        received = self.look()
        del self.arrived[:]
        return received

    def receive(self) -> Received:
        """Like the function: one message, waiting for it."""
        self.fill()
        received = self.look()
        del self.arrived[:]
        return received

    def try_fill(self) -> bool:
        """True if a message is in `arrived`, now or already."""
        if not self.arrived:
            try:
                self.arrived.extend(islice(self._now, 1))
            except BlockingIOError:
                return False
        return True

    def fill(self) -> None:
        """Wait until a message is in `arrived`."""
        while not self.arrived:
            try:
                self.arrived.extend(islice(self._wait, 1))
            except BlockingIOError:
                wait_for(self._sock, select.POLLIN)

    def look(self) -> Received:
        """What `arrived` holds, which stays there until the caller says `del inbox.arrived[:]`."""
        data, ancillary, flags, address = self.arrived[0]
        if self._buffer is not None:
            data = bytes(self._buffer[:data])
        if not ancillary and not flags & _CUT:
            return _new(Received, (data, [], False, False))
        received, strays = _sort_out(data, ancillary, flags, self._max_fds)
        if strays:
            owned = OwnedFds()
            rights = (SOL_SOCKET, SCM_RIGHTS, array("i", received.fds).tobytes())
            kept = (self.arrived[0][0], [rights], flags | received.fds_lost * CTRUNC, address)
            # Two stores and no call: whoever looks again finds no strays that are closed already.
            self.arrived[0] = kept
            owned.numbers = strays
            owned.close()
        return received


def _sort_out(data: bytes, ancillary: _Ancillary, flags: int, max_fds: int) -> tuple[Received, list[int]]:
    """The message, and the descriptors that its receiver did not ask for; closes nothing."""
    fds, strays = descriptors_in(ancillary)
    cut, lost = flags & _TRUNC != 0, flags & CTRUNC != 0
    if (
        len(fds) > max_fds
    ):  # the padding of CMSG_SPACE, or the room for credentials, let more in than was asked for
        strays += fds[max_fds:]
        del fds[max_fds:]
        lost = True
    return _new(Received, (data, fds, cut, lost)), strays


def descriptors_in(ancillary: _Ancillary) -> tuple[list[int], list[int]]:
    """The descriptors of all SCM_RIGHTS, in order, and those that came uninvited (SCM_PIDFD)."""
    fds: list[int] = []
    strays: list[int] = []
    for level, kind, data in ancillary:
        if level != SOL_SOCKET or kind not in _DESCRIPTORS:
            continue  # credentials, labels: nothing to own
        numbers = array("i", data[: len(data) & -4])  # cut inside a number: that one was not installed
        if kind == SCM_RIGHTS:
            fds += numbers
        else:
            strays += numbers  # or -errno, which closing passes over
    if not CLOEXEC:
        for fd in fds:
            os.set_inheritable(fd, False)
    return fds, strays


def refused_by_peer(wanted: int) -> FdTransferError:
    return FdTransferError(
        f"the receiving socket takes no descriptors (EPERM), so a message with {wanted} of them was not "
        "sent: SO_PASSRIGHTS is off there, or a security module forbids it",
        wanted=wanted,
    )


def fds_lost(got: int, what: str) -> FdTransferError:
    return FdTransferError(
        f"descriptors of a {what} were lost on the way: {got} arrived (closed again), how many were sent "
        "is unknown. Likely causes: this process is at its limit of open files (EMFILE: see "
        "RLIMIT_NOFILE); the control buffer was too small for what came with them; a security module "
        "(SELinux, AppArmor) refused them",
        got=got,
    )


def until_sent(attempt: Callable[[], bool], sock: HasFileno) -> None:
    """Repeat a try-verb until it says True, waiting for room in between."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            if attempt():
                return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        else:
            wait_for(sock, select.POLLOUT)
