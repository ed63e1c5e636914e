"""The client's end of the control link: launching the supervisor, talking to it, burying it.

Nothing here waits, save `bury`. Not thread-safe: `_client` calls it under its lock.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import _children, _lending, _messages, _platform, _process, _spawn, _trees, fds
from ._clock import CLOCK
from .errors import FdTransferError
from .payload import Payload
from .sockets import StreamSocket

_BIRTH_S = 0.25  # how long another pool's supervisor may take to fork, 4 ms if it is idle

#: Has the supervisor of a pool forked, with what is handed over to the fork; the descriptors are its own.
Lender = Callable[[_messages.Lend, fds.OwnedFds], None]
#: This side's end of the link, the supervisor's pid, and its pidfd where there is such a thing.
_Started = tuple[StreamSocket, int, int | None]


class ControlLink:
    """A running supervisor, as its client sees it.

    Args:
        fork: fork this process instead of starting a fresh interpreter.
        configuration: the first frame.
        board_fd: the file of the pool's `Board`; borrowed.
        initializer: the payload that the configuration speaks of; borrowed until this returns.
        inherited: with `fork`, the call that each worker makes first if there is no payload of it.
        lender: tells, by likeness, which other pool's supervisor may be forked in place of a fresh interpreter.

    Attributes:
        pid: of the supervisor. It is a child of this process, unless it was forked from another one.
        mark: what those of its workers begin with.
        likeness: of a supervisor that may be forked for other pools; else None.
        was_heard: the supervisor has spoken.

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
        lender: Callable[[_lending.Likeness], Lender | None],
    ) -> None:
        likeness = None if fork else _lending.likeness()
        self.was_heard = False
        lend = None if likeness is None else lender(likeness)
        numbers = initializer.fds.numbers if initializer is not None and initializer.fds else []

        def introduce(sock: StreamSocket) -> None:
            self.socket = sock
            if not fork:
                sock.queue_bytes(_process.multiprocessing_key())  # `_supervisor.main_fresh` takes it
            self.tell(configuration, [board_fd, *numbers])

        borrowed = None if lend is None else _borrow(lend, introduce)
        self._is_child = borrowed is None
        # A fork of a fork would be adopted by the first one when the second has ended, and die with it.
        self.likeness = likeness if borrowed is None and not configuration.preload else None
        self.socket, self.pid, self._pidfd = borrowed or _start(fork, inherited)
        self.mark = _trees.supervisor_mark(self.pid, configuration.token)
        if borrowed is None:
            try:
                introduce(self.socket)
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
        self.was_heard = True
        message: _messages.ToClient = _messages.decode_control(frame[0])  # type: ignore[assignment]
        return message, frame[1]

    def bury(self, limit_s: float) -> int | None:
        """Wait for the supervisor's end, kill it after `limit_s` seconds; close the link.

        Returns its wait status, or None if it was not this process's child, or somebody else has reaped it.
        """
        deadline = CLOCK.monotonic() + limit_s
        killed = False
        while True:
            gone, status = self._look_for_death()
            if gone:
                break
            if CLOCK.monotonic() > deadline and not killed:
                self.kill()
                killed = True
            self._await_death(deadline)
        if self._is_child:
            _children.forget(self.pid)
        self.close()
        return status

    def _look_for_death(self) -> tuple[bool, int | None]:
        """Whether the supervisor has died, and its wait status if that is known."""
        if self._is_child or self._pidfd is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return True, None
            return bool(pid), status
        if not fds.is_readable(self._pidfd):
            return False, None
        try:
            # It was another supervisor's child, but may have been adopted by this process since.
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            pass
        return True, None

    def kill(self) -> None:
        """SIGKILL the supervisor, which has not been buried; the end of the link says when it has died."""
        try:
            if self._is_child or self._pidfd is None:
                os.kill(self.pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has died meanwhile

    def close(self) -> None:
        """Close the link's descriptors; the supervisor will end itself and all its tree."""
        if self._pidfd is not None:
            pidfd, self._pidfd = self._pidfd, None  # in this order: a fork may come between
            os.close(pidfd)
        self.socket.close()

    def _await_death(self, deadline: float) -> None:
        """Return when the supervisor may have died: at once with a pidfd, else after a short nap."""
        if self._pidfd is None:
            time.sleep(0.001)
            return
        remaining_s = deadline - CLOCK.monotonic()
        fds.is_readable(self._pidfd, remaining_s + 0.001 if remaining_s > 0 else None)


def _start(fork: bool, inherited: Callable[[], object] | None) -> _Started:
    """Start a supervisor from a fresh interpreter, or as a fork of this process."""
    if fork:
        # Here, once for all pools: each fork would copy 600 pages to load it for itself.
        from . import _supervisor

        _platform.load_prctl()
    mine, theirs = StreamSocket.pair()

    def main() -> NoReturn:
        _spawn.reset_stdin()
        mine.close()
        _supervisor.main(theirs.into_inner().detach(), inherited)

    try:
        pid = _children.start(
            lambda: _spawn.fork_supervisor(main) if fork else _spawn.spawn_supervisor(theirs.fileno())
        )
    except BaseException:
        mine.close()
        raise
    finally:
        theirs.close()
    pidfd = _platform.open_pidfd(pid)
    return mine, pid, None if pidfd is None else fds.above_stdio(pidfd)


def _borrow(lend: Lender, introduce: Callable[[StreamSocket], None]) -> _Started | None:
    """Have a supervisor forked from one of another pool; None if it does not answer soon.

    What it is told first is there before it is, so that it need not wait for that: 0.4 ms.
    """
    mine, theirs = StreamSocket.pair()
    frame = None
    try:
        lend(*_lending.heritage(theirs.fileno()))
        theirs.close()  # its end is seen from now on
        introduce(mine)
        deadline = CLOCK.monotonic() + _BIRTH_S
        while frame is None and (remaining_s := deadline - CLOCK.monotonic()) > 0:
            fds.is_readable(mine, remaining_s)
            frame = mine.try_receive_bytes()
    except (OSError, EOFError):
        pass  # also: its pidfd was lost
    finally:
        theirs.close()
        if frame is None:
            mine.close()  # one that comes too late finds nobody
    if frame is None:
        return None
    data, (pidfd,) = frame
    born = _messages.decode_control(data)
    assert isinstance(born, _messages.Born)
    return mine, born.pid, fds.above_stdio(pidfd)


def configuration(
    preload: tuple[str, ...],
    idle_imports: tuple[str, ...],
    initializer: Payload | None,
    recycling: _messages.Recycling,
    log_level: int | None,
    client_heeds_signals: bool,
) -> _messages.Configure:
    """The first frame for a supervisor of this process: its search path, its arguments, what to run first."""
    return _messages.Configure(
        token=os.urandom(8).hex(),
        argv=list(getattr(sys, "argv", [])),
        path=list(sys.path),
        preload=preload,
        idle_imports=idle_imports,
        initializer=None if initializer is None else initializer.body,
        initializer_spilled=initializer is not None and initializer.spilled,
        recycling=recycling,
        log_level=log_level,
        client_heeds_signals=client_heeds_signals,
    )
