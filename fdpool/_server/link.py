"""What the server holds of one worker: a control stream, the page that tells how far it is, and its task's future."""

import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import _forensics
from .._broken import WorkerLost
from .._clock import CLOCK
from .._frames import decode_json, encode_json
from .._own_sockets import OwnSocket
from ..errors import FdTransferError, RemoteTraceback, WireError
from ..fds import Fd, above_stdio, close_all
from ..payload import Payload
from ..sockets import StreamSocket
from . import worker
from .context import Order
from .progress import Seen, SeenPage

if TYPE_CHECKING:
    from .._tasks import TaskFuture
    from ..pool import Pool

_MAX_MESSAGE = 1 << 20
_LONGEST_LINE = 500
_FOR_MEMORY = re.compile(r"\(([^()]*out-of-memory killer[^()]*)\)")  # as `_oom` says it


class End(NamedTuple):
    """How a worker has ended.

    Attributes:
        why: in one line.
        unasked: it has neither returned nor gone at a SIGTERM, which is how some applications drain.
        traceback: of what it has raised, if it has.
        stderr: the end of what it wrote there, if it was killed.
    """

    why: str
    unasked: bool = False
    traceback: str = ""
    stderr: str = ""


class WorkerLink:
    """One server worker, from its start to its end. Not thread-safe: the loop's.

    Attributes:
        number: what the plan calls it.
        pid: once it has said hello.
        ready_at: when it said that it serves.
        interface: which kind of application it serves, once it serves.
        why: why it failed to boot, or is to be ended, if that is known; in one line.
        traceback: of a failed boot.
        killed: the server has killed it, or is about to.
        stuck: because it had not moved on.
        stands_by: it has loaded its application, and is to serve when it is called.
        called: it was, though it was started to stand by.
        lost: it served, and is dead; how it ended is not known yet.
        pidfd: readable once it is dead; None before its hello, and where the kernel has none.
    """

    def __init__(self, number: int, slot: int, generation: int) -> None:
        self.number = number
        self.slot = slot
        self.generation = generation
        self.pid: int | None = None
        self.began_at = CLOCK.monotonic()
        self.ready_at: float | None = None
        self.interface = ""
        self.why = ""
        self.traceback = ""
        self.killed = False
        self.stuck = False
        self.stands_by = False
        self.called = False
        self.lost = False
        self.draining = False
        self.stopped_since: float | None = None  # SIGSTOP
        self.pidfd: int | None = None
        self._future: TaskFuture[str] | None = None
        self.control, self._theirs = StreamSocket.pair(max_bytes=_MAX_MESSAGE, max_fds=1)
        try:
            self._page = SeenPage()
        except BaseException:
            self.control.close()
            self._theirs.close()
            raise

    def start(
        self,
        pool: "Pool",
        order: Order,
        inbox: OwnSocket | None,
        listeners: Sequence[socket.socket],
        loads: int | None,
        app: Payload,
        on_end: Callable[[End], object],
    ) -> None:
        """Have a worker of the pool begin. All descriptors are borrowed.

        Args:
            on_end: called once, in any thread.

        Raises: as `Pool.submit`; the worker is not there then.
        """
        future = pool.submit(
            worker.main,
            order,
            Fd(self._theirs),
            Fd(self._page.fd),
            None if inbox is None else Fd(inbox),
            list(listeners),
            None if loads is None else Fd(loads),
            [Fd(number) for number in (app.fds.numbers if app.fds else ())],
        )
        self._future = future
        self._theirs.close()
        future.add_done_callback(lambda done: on_end(end_of(done)))

    def receive(self) -> dict[str, object] | None:
        """The next message that has come, or None. The end of the stream is no news: the future tells of it.

        Raises:
            EOFError: no more will come.
        """
        try:
            received = self._receive()
        except (OSError, WireError) as error:
            raise EOFError(str(error)) from error
        if received is None:
            return None
        message, numbers = received
        if isinstance(message, dict) and message.get("say") == "hello" and self.pid is None:
            self.pid = int(message["pid"])
            self.pidfd, numbers = (above_stdio(numbers[0]), numbers[1:]) if numbers else (None, [])
        close_all(numbers)
        return message if isinstance(message, dict) else None

    def _receive(self) -> tuple[Any, list[int]] | None:
        try:
            return self.control.try_receive_with_fds()
        except FdTransferError as error:
            # No descriptor was left for its pidfd: it is known by its pid then, as where the kernel has no pidfds.
            return decode_json(error.data), []

    def tell(self, message: object) -> None:
        """Send a message; never waits. A worker that does not listen any more is about to be reported dead."""
        try:
            if not self.control.closed:
                self.control.queue_bytes(encode_json(message))
                self.control.flush()
        except OSError:
            pass

    def see(self) -> Seen:
        """How far it has got."""
        return self._page.see()

    def load(self) -> tuple[int, int]:
        """Connections that it has taken so far, and that it has open."""
        return self._page.load()

    def is_busy(self, waiting: int = 0) -> bool:
        """True if it has no thread free for one more than so many connections that it has yet to take."""
        return self._page.is_busy(waiting)

    def wait_for_end(self, wanted: bool) -> None:
        """Have it say when a request has ended, or no longer."""
        self._page.wait_for_end(wanted)

    def ask_for_stacks(self) -> bool:
        """Have it write down what its threads are at; `stacks` has it a little later. False if it cannot be asked."""
        number = _forensics.ASK_SIGNAL
        return number is not None and self.pid is not None and self._signal(number)

    def stacks(self) -> str:
        """What it has written down since this was last called."""
        return _forensics.without_ours(self._page.stacks().rstrip())

    def end_task(self) -> None:
        """Have it not begin; or, if it has, without saying hello, have its pool end it."""
        if self._future is not None:
            self._future.terminate(0.0)

    def kill(self) -> bool:
        """SIGKILL it; its pool's supervisor kills what descends from it. False if nobody knows its pid yet."""
        return self.pid is not None and self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> bool:
        try:
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            elif self.pid is not None:
                os.kill(self.pid, number)
        except OSError:
            return False  # it is dead
        return True

    def close(self) -> None:
        """Close everything held for it; safe to call again."""
        if self.pidfd is not None:
            pidfd, self.pidfd = self.pidfd, None  # in this order: a fork may come between
            os.close(pidfd)
        self.control.close()
        self._theirs.close()
        self._page.close()


def end_of(done: Future[str]) -> End:
    """How a worker has ended, by its task's settled future; in words about a server, not about a task."""
    if done.cancelled():
        return End("it was not started any more")
    error = done.exception()
    return End(in_one_line(done.result())) if error is None else end_by(error)


def end_by(error: BaseException) -> End:
    """How a worker has ended whose task has failed so."""
    if isinstance(error, WorkerLost):
        # Its own text is about a task, and who runs a server has never heard of one.
        how = (
            f"was killed by {_name(error.signal)}" if error.signal else f"exited with code {error.exit_code}"
        )
        for_memory = _FOR_MEMORY.search(str(error)) if error.signal == signal.SIGKILL else None
        if for_memory is not None:
            how += f", {for_memory[1]}"
        said = error.stderr.strip().splitlines()
        last = f"; the last that it wrote to stderr: {in_one_line(said[-1])}" if said else ""
        return End(f"it {how}{last}", error.signal != signal.SIGTERM, stderr=error.stderr)
    cause = error.__cause__
    traceback = cause.tb.rstrip() if isinstance(cause, RemoteTraceback) else ""
    return End(in_one_line(f"{type(error).__name__}: {error}"), True, traceback)


def in_one_line(text: str) -> str:
    """The first line of a text, and not too much of that; all of it is in the traceback."""
    first, _, more = text.strip().partition("\n")
    return f"{first[:_LONGEST_LINE]} ..." if more or len(first) > _LONGEST_LINE else first


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
