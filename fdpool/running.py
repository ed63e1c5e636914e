"""`RunningCommand`: the client's handle of a program that runs in a worker.

Between the two is a leash, a stream pair: the worker says over it which process the program is, and sends a
pidfd; the handle sends signals or the wish to end it. When the handle lets go of its end, the program is
ended with all that descends from it, so nothing runs that nobody holds.
"""

import json  # of the leash: here, as with no descriptor left it could not be loaded any more
import os
import signal
import subprocess
import threading
import weakref
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import IO, Any, NamedTuple

from ._completed import Arguments, CompletedCommand
from ._frames import encode_json
from ._options import check_seconds
from .errors import FdTransferError, ForkedPool
from .fds import Fd, close_all, is_readable
from .sockets import StreamSocket


class _Process(NamedTuple):
    """A program's process, as its worker announced it."""

    pid: int
    pidfd: Fd | None


class RunningCommand:
    """A program that runs in a worker, or waits there for its turn; `Pool.popen` makes it.

    Much as `subprocess.Popen`: as a context manager it closes its pipes at the end and waits. Dropped or
    closed while the program runs, it ends it.

    Attributes:
        args: as given.
        future: of its `CompletedCommand`.
        stdin, stdout, stderr: this side of its pipes, where PIPE was asked for; else None.

    Threads: any may call any method; the pipes are files as others are.

    In a forked child of this process the program is the parent's: leaving the block, `end` and `close` leave it alone.
    """

    def __init__(
        self,
        args: Arguments,
        future: Future[CompletedCommand],
        leash: StreamSocket,
        pipes: dict[str, IO[Any]],
        grace_s: float,
    ) -> None:
        # First, as a handle that is dropped lets go of its attributes in this order: what is buffered for stdin may
        # have to wait until the program has ended.
        self._leash = leash
        self.args = args
        self.future = future
        self.stdin = pipes.get("stdin")
        self.stdout = pipes.get("stdout")
        self.stderr = pipes.get("stderr")
        self._grace_s = grace_s
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._is_parents = False
        _handles.add(self)

    @property
    def pid(self) -> int:
        """Its process id; waits until it has been started. Tried again after a loss, it is another process.

        Raises:
            SpawnError: it could not be; or whatever else its future failed with.
            CancelledError: it was cancelled before it began.
        """
        return self._newest().pid

    def _newest(self) -> _Process:
        """What its worker announced last: with `retries`, one that takes over does so again. Waits for the first."""
        with self._lock:
            try:
                while (announced := self._announced()) is not None:
                    self._process = announced
            except (EOFError, OSError, ValueError):
                if self._process is None:
                    self.future.result()
                    raise RuntimeError("this handle has been closed") from None
            assert self._process is not None
            return self._process

    def _announced(self) -> _Process | None:
        """The next announcement: None if there is no other than those that have come."""
        leash = self._leash
        try:
            received = leash.receive_with_fds() if self._process is None else leash.try_receive_with_fds()
        except FdTransferError as error:  # no descriptor was left here for the pidfd
            received = json.loads(error.data), []
        if received is None:
            return None
        message, numbers = received
        return _Process(int(message["pid"]), Fd.take(numbers[0]) if numbers else None)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None as long as it is not known."""
        return self.poll()

    def poll(self) -> int | None:
        """The exit status if the program and its worker's task are done, else None; raises as `wait`."""
        return self.wait() if self.future.done() else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it runs on.
            SpawnError, CommandTimedOut, CommandFailed, WorkerLost ...: as its future.
        """
        try:
            return self.future.result(timeout).returncode
        except FutureTimeoutError:
            if timeout is None or self.future.done():
                raise
            raise subprocess.TimeoutExpired(self.args, timeout) from None

    def send_signal(self, number: int) -> None:
        """Send a signal to the program; waits until it has been started, and does nothing once it has ended.

        Through its pidfd, so never to another process that has its pid by now. Without one (no pidfds, or
        no descriptor was left for it) the worker, which has not reaped it, sends the signal.

        Raises:
            ValueError: there is no such signal.
        """
        _check_signal(number)
        pidfd = self._newest().pidfd
        # The worker passes over a signal for a program that has ended. But if it was lost, and the program with it,
        # the signal is for the one that is started next.
        if pidfd is None or is_readable(pidfd):
            self._tell({"signal": int(number)})
            return
        try:
            signal.pidfd_send_signal(pidfd.fileno(), number)
        except ProcessLookupError:
            pass

    def signal_group(self, number: int) -> None:
        """Send a signal to its process group, as a terminal would. Does not wait: the worker sees to it.

        Raises:
            ValueError: there is no such signal.
        """
        _check_signal(number)
        self._tell({"signal": int(number), "group": True})

    def terminate(self) -> None:
        """Send SIGTERM to the program."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the program."""
        self.send_signal(signal.SIGKILL)

    def end(self, grace: float | None = None) -> None:
        """End it with everything that descends from it: SIGTERM, `grace` seconds, SIGKILL. Does not wait.

        One that no worker has begun is cancelled.

        Raises:
            TypeError, ValueError: `grace` is no finite number of seconds.
        """
        if grace is not None:
            check_seconds("grace", grace, zero=True)
        if not self.future.cancel() and not self._tell({"end": self._grace_s if grace is None else grace}):
            self._leash.close()

    def _tell(self, wish: dict[str, object]) -> bool:
        """Tell the worker; False if there is no room, which takes hundreds of wishes that it has not read."""
        payload = encode_json(wish)
        try:
            with self._leash.outgoing(payload) as attempt:
                return attempt()
        except (OSError, ValueError):
            return True  # it has ended, or this handle has been closed

    def close(self) -> None:
        """Let go of it: end it if it runs, and close the pipes. Safe to call again.

        Does not wait: what is still buffered for its stdin is written as far as there is room. Only where another
        thread is just reading or writing one of the pipes, until the program has ended.
        """
        self._let_go()  # first, as that thread holds its file until then
        # In a forked child that would change the parent's, too.
        if self.stdin is not None and not self.stdin.closed and not self._is_parents:
            os.set_blocking(self.stdin.fileno(), False)
        with suppress(BlockingIOError):
            self._close_pipes()

    def _close_pipes(self) -> None:
        with ExitStack() as closing:
            # What it had not been told yet, it will never read.
            closing.enter_context(suppress(BrokenPipeError))
            # The last is closed first: what is buffered for its stdin may have to wait until it reads, and it may
            # not do so before it has written (`subprocess.Popen` has the same order).
            for pipe in (self.stdin, self.stdout, self.stderr):
                if pipe is not None:
                    closing.callback(pipe.close)

    def _let_go(self) -> None:
        self._leash.close()
        if self._process is not None:
            # Its pidfd is closed with the last reference: another thread may be sending a signal through it.
            self._process = self._process._replace(pidfd=None)

    def __enter__(self) -> "RunningCommand":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        """Close the pipes, wait for the end, and let go; if an error ends the block, end the program first."""
        if kind is not None:
            self.end()
        try:
            self._close_pipes()
        finally:
            try:
                self.future.exception()
            except ForkedPool:
                pass
            except BaseException:  # cancelled, or a Ctrl-C in the wait
                self.end(0.0)
                if not self.future.cancelled():
                    raise
            finally:
                self.close()

    def forget_in_child(self) -> None:
        """Runs in: a forked child. A copy of the leash could end the parent's program, or keep it from ending."""
        self._lock = threading.Lock()  # another thread may have had it
        self._leash.close()
        self._is_parents = True

    def __repr__(self) -> str:
        state = "running" if not self.future.done() else "ended"
        return f"<RunningCommand {self.args!r} {state}>"


_handles: weakref.WeakSet[RunningCommand] = weakref.WeakSet()


def _forget_all_in_child() -> None:
    for handle in list(_handles):
        handle.forget_in_child()
    _handles.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)


def _check_signal(number: int) -> None:
    if not 0 <= number < signal.NSIG:
        raise ValueError(
            f"cannot send signal {number}: it must be in 0..{signal.NSIG - 1}; use the numbers of the signal module"
        )


def pipes_for(
    streams: dict[str, Any], text: bool | None, encoding: str | None, errors: str | None
) -> tuple[dict[str, Any], dict[str, IO[Any]], list[int]]:
    """Make the pipes that are asked for: the streams with the program's ends in place, our files, those ends.

    The last are the caller's to close once they have been handed over.
    """
    ours: dict[str, IO[Any]] = {}
    theirs: list[int] = []
    wants_text = bool(text or encoding or errors)
    try:
        for name, stream in streams.items():
            if not (isinstance(stream, int) and stream == subprocess.PIPE):
                continue
            reading, writing = os.pipe()
            mine, its = (writing, reading) if name == "stdin" else (reading, writing)
            theirs.append(its)
            streams[name] = its
            mode = "w" if name == "stdin" else "r"
            if wants_text:
                ours[name] = open(mine, mode, encoding=encoding, errors=errors)
            else:
                ours[name] = open(mine, mode + "b")
    except BaseException:
        close_all(theirs)
        for file in ours.values():
            file.close()
        raise
    return streams, ours, theirs
