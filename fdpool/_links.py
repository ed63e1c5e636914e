"""What the client holds of a slot: both ends of its datagram pair, and the worker that serves it now."""

import os
import signal
import socket
from typing import NamedTuple

from . import _own_sockets, _trees, fds, payload

_PIDFD_SIGNAL_PROCESS_GROUP = 4  # pidfd_send_signal(2), Linux 6.9


class Exit(NamedTuple):
    """A worker's death, as far as it is known."""

    pid: int
    status: int | None  # as waitpid(2) gives it
    stacks: str = ""
    hint: str = ""  # who may have killed it
    said: str = ""  # the end of what it wrote to stderr
    refused: bool = False  # there was none, for want of what may come again


class SlotLink:
    """One slot's sockets and worker.

    The client keeps the worker's end as well: so the slot's inbox outlives its workers, and what a worker
    has not received can be received here.

    Attributes:
        mine: the client's end.
        theirs: the worker's end; workers come and go on duplicates of it.
        pid: process id of the worker, or None while there is none.
        last_exit: what became of the last worker that died.
        lost: that one was killed from here, and its death is to be settled if the pool is to go on.
    """

    __slots__ = ("_pidfd", "last_exit", "lost", "mine", "pid", "slot", "starting", "theirs")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.mine, self.theirs = _own_sockets.pair(socket.SOCK_DGRAM)
        for end in (self.mine, self.theirs):
            payload.reserve(end.fileno())
        self.pid: int | None = None
        self.starting = False  # asked for, and not yet reported
        self.last_exit = Exit(0, None)
        self.lost = False
        self._pidfd: int | None = None

    @property
    def alive(self) -> bool:
        """True from the moment a worker is asked for until its death is reported."""
        return self.starting or self.pid is not None

    def began(self, pid: int, pidfds: list[int]) -> None:
        """A worker runs; its pidfd, if the kernel has such, is owned from now on."""
        self._pidfd = fds.above_stdio(pidfds[0]) if pidfds else None
        self.pid = pid
        self.starting = False  # last: another thread that ends the pool must not find it dead in between

    def ended(self, last_exit: Exit) -> None:
        """The worker is dead and reaped."""
        self.starting = False
        self.pid = None
        self.last_exit = last_exit
        self.lost = False
        self._close_pidfd()

    def kill(self) -> None:
        """SIGKILL the worker and its tree, without the supervisor: for when that is gone.

        With a pidfd never a recycled pid; without one the pid is trusted, as its death would have
        been reported had the supervisor lived to see it.
        """
        self.signal_tree()
        if self.pid is not None:
            self.ended(Exit(self.pid, None))
            self.lost = True

    def signal_tree(self) -> None:
        """SIGKILL the worker and its tree, and leave it to others to notice."""
        pidfd, pid = self._pidfd, self.pid  # another thread may just learn of its death
        if pid is None:
            return
        try:
            below = _trees.descendants(pid)
        except _trees.CANNOT_LOOK:
            below = []  # but the worker ends, and then its supervisor looks for what is left
        try:
            if pidfd is None or not fds.is_readable(pidfd):
                os.killpg(pid, signal.SIGKILL)
            else:
                below = []  # whoever has its pid now is none of ours
                signal.pidfd_send_signal(pidfd, signal.SIGKILL, None, _PIDFD_SIGNAL_PROCESS_GROUP)
        except OSError:
            pass  # no such group any more, or a kernel without the flag
        try:
            _trees.signal_all(below, signal.SIGKILL)
        except OSError:
            pass  # as above

    def has_died(self) -> bool:
        """True if the worker is dead, whether that was reported or not; or if its start never was. False where nobody
        can look: without a pidfd and without a descriptor to be had."""
        pid = self.pid
        if pid is None:
            return True
        if self._pidfd is not None:
            return fds.is_readable(self._pidfd)
        try:
            import psutil

            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except _trees.CANNOT_LOOK:
            return False
        except psutil.NoSuchProcess:
            return True  # the supervisor may have reaped it, and stand still since
        except psutil.Error:
            return False

    def memory_bytes(self) -> int:
        """Resident memory of the worker and of all that descends from it, as far as it can be looked at now; 0 if it
        has died, or no descriptor is left to look with."""
        if self.pid is None:
            return 0
        total = 0
        try:
            import psutil

            worker = psutil.Process(self.pid)
            processes = [worker, *worker.children(recursive=True)]
        except _trees.CANNOT_LOOK:
            return 0
        except psutil.Error:
            return 0
        for process in processes:
            try:
                total += process.memory_info().rss
            except (psutil.Error, OSError):
                continue  # it has died meanwhile, or is another user's: the others count all the same
        return total

    def wake_worker(self) -> bool:
        """Make the worker's poll(2) return, if its task waits for that; SIGURG does nothing to any other. False if it
        cannot be told yet who that is: what a worker has begun may be known before its report has come."""
        pidfd, pid = self._pidfd, self.pid  # another thread may just learn of its death
        try:
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGURG)
            elif pid is not None:
                os.kill(pid, signal.SIGURG)
        except OSError:
            pass  # it has died
        return pidfd is not None or pid is not None

    def close(self) -> None:
        """Close every descriptor held for the slot."""
        self._close_pidfd()
        for end in (self.mine, self.theirs):
            payload.release(end.fileno())
            end.close()

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            pidfd, self._pidfd = self._pidfd, None  # in this order: a fork may come between
            os.close(pidfd)


class Waker:
    """A pipe that makes a selector return: `wake()` from any thread or signal handler, `clear()` by who woke."""

    __slots__ = ("_read", "_write")

    def __init__(self) -> None:
        self._read, self._write = (fds.above_stdio(fd) for fd in os.pipe())
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The end that becomes readable."""
        return self._read

    def write_fileno(self) -> int:
        """The end to write to, for `signal.set_wakeup_fd`."""
        return self._write

    def wake(self) -> None:
        """Make `fileno()` readable; nothing happens if it is, or if the waker is closed."""
        try:
            os.write(self._write, b"\0")
        except (BlockingIOError, OSError):
            pass

    def clear(self) -> set[int]:
        """Forget the wake-ups so far; the signals among them, where `signal.set_wakeup_fd` wakes, and 0."""
        woke_by: set[int] = set()
        try:
            while True:
                found = os.read(self._read, 4096)
                woke_by.update(found)
                if len(found) < 4096:
                    break
        except BlockingIOError:
            pass
        return woke_by

    def close(self) -> None:
        """Close both ends."""
        if self._read >= 0:
            read, write = self._read, self._write
            self._read = self._write = -1
            os.close(read)
            os.close(write)
