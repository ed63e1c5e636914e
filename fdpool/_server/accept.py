"""Taking connections from a listener that others take from as well, in a worker or in the server.

Whoever polls a shared listener hears of each connection, and only one gets it. On a listener that is non-blocking
the others get EAGAIN. On one that blocks they would wait in accept(2), deaf to everything else; but its mode belongs to
the open file description (hazard M17), so it is not ours to change if we did not open it. There we take turns,
by a POSIX lock on the listener: who has it looks again, and accepts only what is certainly there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time

from .._clock import CLOCK
from .._log import log
from .._reserve import Reserve
from ..fds import duplicate, is_readable

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# accept(2): what befell that one connection, on its way; the next is accepted as if nothing had been.
_ITS_OWN = (
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
    getattr(errno, "ENONET", errno.EPROTO),
    errno.EPERM,
)
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5


class Acceptor:
    """Accepts from listeners, and keeps one descriptor in reserve, so that the limit is no dead end.

    Where no descriptor is left, the reserve makes room for one connection; it is filled again when a connection ends
    (`replenish`). Until then nothing is accepted: what waits, waits in the kernel's queue, where another
    worker may take it. Nothing is turned away, and nobody spins.

    Attributes:
        paused_until: clock value before which `accept` is not to be tried.
    """

    def __init__(self) -> None:
        self._reserve = Reserve()
        self._pause_s = _FIRST_PAUSE_S
        self._told = False
        self.paused_until = 0.0

    def accept(self, listener: socket.socket) -> socket.socket | None:
        """A connection, the caller's to close; None if there is none now, or none can be taken."""
        try:
            found = _accept(listener)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTOR:
                raise
            self._tell(error)
            try:
                found = _accept(listener) if self._reserve.give() else None
            except OSError as again:
                if again.errno not in _NO_DESCRIPTOR:
                    raise
                found = None
            if found is None:
                self._pause()
            return found
        self._pause_s = _FIRST_PAUSE_S
        self._told = False
        return found

    def replenish(self) -> None:
        """A connection has ended: have a descriptor in reserve again, if there is one."""
        if self._reserve.fill():
            self.paused_until = 0.0

    def close(self) -> None:
        """Close the reserve."""
        self._reserve.close()

    def forget(self) -> None:
        """Runs in a forked child: close the copy of the reserve."""
        self._reserve.forget()

    def _pause(self) -> None:
        self._reserve.fill()
        self.paused_until = CLOCK.monotonic() + self._pause_s
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            log(
                "fdpool.server",
                logging.WARNING,
                "process %d cannot accept: %s. What waits is taken as descriptors get free",
                os.getpid(),
                error,
                extra={"event": "accept_failed", "reason": str(error)},
            )


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        blocks = os.get_blocking(listener.fileno())
        found = _accept_in_turn(listener) if blocks else listener.accept()[0]
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in _ITS_OWN:
            return None
        raise
    return None if found is None else off_stdio(found)


def off_stdio(connection: socket.socket) -> socket.socket:
    """The connection with a number above the standard streams, which may be closed; itself if no descriptor is left."""
    if connection.fileno() > 2:
        return connection
    try:
        moved = duplicate(connection.fileno())
    except OSError:
        return connection
    connection.close()
    return socket.socket(fileno=moved)


def _accept_in_turn(listener: socket.socket) -> socket.socket | None:
    """Accept from a listener that blocks, if a connection is there and it is our turn."""
    try:
        # Kernel: a POSIX lock is the process's, not the description's, and sockets take them
        # (test_kernel_facts); so it tells workers apart that hold the same listener.
        fcntl.lockf(listener, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        time.sleep(0.001)  # somebody is about to take what was seen
        return None
    try:
        return listener.accept()[0] if is_readable(listener) else None
    finally:
        fcntl.lockf(listener, fcntl.LOCK_UN)
