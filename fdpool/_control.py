"""The client's end of the control link: launching the supervisor, talking to it, burying it.

Nothing here waits, save `bury`. Not thread-safe: `_client` calls it under its lock.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import _messages, _platform, _process, _spawn, fds
from .errors import FdTransferError
from .payload import Payload
from .sockets import StreamSocket


class ControlLink:
    """A running supervisor, as its client sees it.

    Args:
        fork: fork this process instead of starting a fresh interpreter.
        configuration: the first frame.
        board_fd: the file of the pool's `Board`; borrowed.
        initializer: the payload that the configuration speaks of; borrowed until this returns.
        inherited: with `fork`, the call that each worker makes first if there is no payload of it.

    Raises:
        OSError: the supervisor cannot be started.
    """

    def __init__(
        self,
        fork: bool,
        configuration: _messages.Configure,
        board_fd: int,
        initializer: Payload | None,
        inherited: Callable[[], object] | None,
    ) -> None:
        mine, theirs = StreamSocket.pair()
        try:
            self.pid = _start(fork, mine, theirs, inherited)
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        self.socket = mine
        pidfd = _platform.open_pidfd(self.pid)
        self._pidfd = None if pidfd is None else fds.above_stdio(pidfd)
        numbers = initializer.fds.numbers if initializer is not None and initializer.fds else []
        try:
            if not fork:
                self.socket.queue_bytes(_process.multiprocessing_key())  # `_supervisor.main_fresh` takes it
            self.tell(configuration, [board_fd, *numbers])
        except BaseException:
            self.bury(0.0)
            raise

    def tell(self, message: _messages.ToSupervisor, numbers: Sequence[int] = ()) -> bool:
        """Send a frame, or queue what the kernel will not take now; True if all has gone.

        A dead supervisor, or one that is buried, is not an error here: the end of the link says it.
        """
        if self.socket.closed:
            return True
        self.socket.queue_bytes(_messages.encode_control(message), numbers)
        return self.flush()

    def flush(self) -> bool:
        """Send what is queued; True if nothing is left to send."""
        if not self.socket.backlog:
            return True
        try:
            return self.socket.flush()
        except (BrokenPipeError, ConnectionResetError):
            return True
        except OSError as error:
            if error.errno in _messages.MAY_YET_LAND:
                return False
            raise

    def try_receive(self) -> tuple[_messages.ToClient, list[int]] | None:
        """One frame and its descriptors (the caller's), or None if none has come. They may be missing.

        Raises:
            EOFError: the supervisor is gone.
        """
        try:
            frame = self.socket.try_receive_bytes()
        except ConnectionResetError as error:
            raise EOFError("the supervisor died with frames unread") from error
        except FdTransferError as error:
            # At the limit of open files there is no room for a worker's pidfd. The pool can do without, but not
            # without the news.
            frame = error.data, []
        if frame is None:
            return None
        message: _messages.ToClient = _messages.decode_control(frame[0])  # type: ignore[assignment]
        return message, frame[1]

    def bury(self, limit_s: float) -> int | None:
        """Wait for the supervisor's end, kill it after `limit_s` seconds; close the link.

        Returns its wait status, or None if somebody else has reaped it.
        """
        deadline = time.monotonic() + limit_s
        killed = False
        while True:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                status = None
                break
            if pid:
                break
            if time.monotonic() > deadline and not killed:
                os.kill(self.pid, signal.SIGKILL)
                killed = True
            self._await_death(deadline)
        self.close()
        return status

    def close(self) -> None:
        """Close the link's descriptors; the supervisor will end itself and all its tree."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.socket.close()

    def _await_death(self, deadline: float) -> None:
        """Return when the supervisor may have died: at once with a pidfd, else after a short nap."""
        if self._pidfd is None:
            time.sleep(0.001)
            return
        remaining_s = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(remaining_s * 1000 + 1 if remaining_s > 0 else None)


def _start(
    fork: bool, mine: StreamSocket, theirs: StreamSocket, inherited: Callable[[], object] | None
) -> int:
    if not fork:
        return _spawn.spawn_supervisor(theirs.fileno())

    def main() -> NoReturn:
        from . import _supervisor

        mine.close()
        _supervisor.main(theirs.into_inner().detach(), inherited)

    return _spawn.fork_supervisor(main)


def configuration(
    preload: tuple[str, ...],
    initializer: Payload | None,
    recycling: _messages.Recycling,
    log_level: int | None,
) -> _messages.Configure:
    """The first frame for a supervisor of this process: its search path, its arguments, what to run first."""
    return _messages.Configure(
        argv=list(getattr(sys, "argv", [])),
        path=list(sys.path),
        preload=preload,
        initializer=None if initializer is None else initializer.body,
        initializer_spilled=initializer is not None and initializer.spilled,
        recycling=recycling,
        log_level=log_level,
    )
