"""`ExecServer`: run commands that programs deep in a process tree ask for, on their own descriptors.

A program started with `ExecServer.start` inherits one end of a datagram pair, and so does everything below
it. Whoever has it sends one byte with one end of a fresh stream pair: a session. In it a command is asked
for, the policy decides, and if it escalates, the command runs in a worker of the pool, on the
descriptors that the client sends.

One thread serves all sessions and never waits for any of them; each policy call has a thread of its own, as
it may ask a human. What a session says is judged by `_exec_session`.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import os
import selectors
import signal
import subprocess
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, TypeVar, Union

from . import _exec_session
from ._clock import CLOCK
from ._completed import SpawnError
from ._exec_session import Decided, Decision, Deny, Escalate, Finished, Gone, Overdue, Received, Request, Run
from ._frames import encode_json
from ._links import Waker
from ._log import log
from ._options import check_count, check_seconds
from .errors import FdpoolError, FdTransferError, PayloadTooLarge, WireError
from .fds import LONGEST_POLL_S, SCM_MAX_FD, OwnedFds, made_above_stdio
from .pool import Pool
from .running import RunningCommand
from .sockets import DatagramSocket, StreamSocket, take_fds

__all__ = ["VARIABLE", "Decision", "Deny", "Escalate", "ExecServer", "Request", "Run"]

VARIABLE = "FDPOOL_EXEC_SOCKET"
Policy = Callable[[Request], Union[Decision, Awaitable[Decision]]]
_T = TypeVar("_T")

_servers: weakref.WeakSet[ExecServer] = weakref.WeakSet()  # those whose threads run

_MAX_REQUEST = 1 << 20
# Of the signals that are passed on, those that by default end no process (signal(7)).
_SURVIVED = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
_BATCH = 16  # most handshakes received before the sessions are looked at
_LOGGER = "fdpool.exec"


class ExecServer:
    """Serves the exec hand-off until closed.

    Args:
        pool: whose workers run the escalated commands, one each; the pool stays the caller's, and must
            outlive the server.
        policy: called with each `Request`, in a thread of its own; returns `Run()`, `Escalate()` or
            `Deny(reason)`, or a coroutine of one. If it raises, whatever that is, the request is denied.
        variable: environment variable that tells the number of the inherited end.
        loop: event loop in which coroutines run; by default each in a loop of its own.
        patience_s: how long a client may be silent when it is its turn.
        max_sessions: sessions at a time, and calls of the policy for clients that have gone; more are turned away.
        max_request: bytes of a frame.
        grace: seconds from SIGTERM to SIGKILL for a command whose client has gone.

    Raises:
        TypeError, ValueError: a number is of no use.

    A descriptor that a client sends is used for its command and for nothing else. A request is what the
    *client* says; the policy must not take the word of one that it does not trust for anything but what is
    asked, and should decide by the whole of it (file, argv, workdir and env).
    """

    def __init__(
        self,
        pool: Pool,
        policy: Policy,
        *,
        variable: str = VARIABLE,
        loop: asyncio.AbstractEventLoop | None = None,
        patience_s: float = 30.0,
        max_sessions: int = 64,
        max_request: int = _MAX_REQUEST,
        grace: float = 1.0,
    ) -> None:
        check_seconds("patience_s", patience_s, zero=False)
        check_count("max_sessions", max_sessions, 1)
        check_count("max_request", max_request, 1)
        check_seconds("grace", grace, zero=True)
        self.variable = variable
        self._pool = pool
        self._policy = policy
        self._loop = loop
        self._patience_s = patience_s
        self._max_sessions = max_sessions
        self._max_request = max_request
        self._grace = grace
        self._sessions: set[_Served] = set()
        self._deciding: set[_Served] = set()  # the policy is called for them; they may be over
        self._posted: deque[tuple[_Served, _exec_session.Event]] = deque()
        self._closing = False
        self._over = False
        self._over_lock = threading.Lock()
        # A datagram of one byte is all that is ever received here; what is longer is garbage.
        self._door, self._client_end = DatagramSocket.pair(max_bytes=1, max_fds=1)
        self._waker = Waker()
        self._selector = made_above_stdio(selectors.DefaultSelector)
        self._selector.register(self._door, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="fdpool-exec", daemon=True)
        _servers.add(self)
        self._thread.start()

    # -- for its owner ---------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The end that clients inherit; the server's own."""
        return self._client_end.fileno()

    def start(
        self, args: Sequence[str] | str, *, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a program that may ask: it inherits the client's end, and the variable with its number.

        Args:
            args, options: as for `subprocess.Popen`, which starts it, as a child of this process; so it
                may be given another user, a working directory, pipes.
            env: its environment, to which the variable is added; None for this process's.
        """
        environment = dict(os.environ if env is None else env)
        environment[self.variable] = str(self.fileno())
        handed = (*options.pop("pass_fds", ()), self.fileno())
        return subprocess.Popen(args, env=environment, pass_fds=handed, **options)

    def close(self) -> None:
        """End every session and its command, and wait until none is left. Safe to call again."""
        self._closing = True
        with self._over_lock:
            if not self._over:
                self._waker.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._client_end.close()

    def __enter__(self) -> ExecServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._turn()
            for session in list(self._sessions):
                self._have(session, session.handle, Gone("the server is closing"))
            while self._sessions:  # commands that are being ended
                self._turn()
        finally:
            with self._over_lock:  # a policy may still be thinking
                self._over = True
            _servers.discard(self)
            self._release()

    def _release(self) -> None:
        """Close all that is open here but the clients' end; a session is only if an error has ended the thread."""
        for session in self._sessions:
            session.release()
        self._selector.close()
        self._door.close()
        self._waker.close()

    def forget_in_child(self) -> None:
        """Runs in: a forked child, just after the fork. Close the copies: a client is told its session's end by the
        last close of it, and that nobody serves by that of the door.

        The clients' end stays open, as `start` forks too if it is given a `preexec_fn`.
        """
        self._over_lock = threading.Lock()
        self._over = True
        self._release()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._timeout_s()):
            if key.fileobj is self._door:
                self._receive_handshakes()
            elif key.fileobj is self._waker:
                self._waker.clear()
            else:
                self._have(key.data, key.data.attend, events)
        while self._posted:
            session, event = self._posted.popleft()
            if isinstance(event, Decided):
                self._deciding.discard(session)
            self._have(session, session.handle, event)
        now = CLOCK.monotonic()
        for session in list(self._sessions):
            if session.expires_at is not None and session.expires_at <= now:
                self._have(session, session.handle, Overdue())

    def _have(self, session: _Served, act: Callable[[_T], None], argument: _T) -> None:
        """Have a session act; an error of ours in that costs this one only."""
        try:
            act(argument)
        except Exception:
            log(_LOGGER, logging.ERROR, "a session failed, and is ended", exc_info=True)
            session.give_up()

    def _timeout_s(self) -> float | None:
        moments = [session.expires_at for session in self._sessions if session.expires_at is not None]
        return min(max(0.0, min(moments) - CLOCK.monotonic()), LONGEST_POLL_S) if moments else None

    def _receive_handshakes(self) -> None:
        for _ in range(_BATCH):
            try:
                received = self._door.try_receive_with_fds()
            except (WireError, FdTransferError) as error:
                log(_LOGGER, logging.WARNING, "a handshake was turned away: %s", error)
                continue
            except OSError as error:
                log(_LOGGER, logging.WARNING, "the handshake socket failed: %s", error)
                return
            if received is None:
                return
            self._welcome(*received)

    def _welcome(self, data: bytes, numbers: list[int]) -> None:
        """Begin a session, if what came is a handshake."""
        owned = OwnedFds(numbers)
        problem = None
        # Who asks and goes, again and again, would else have as many threads started.
        taken = len(self._sessions | self._deciding)
        if len(data) != 1 or len(numbers) != 1:
            problem = f"{len(data)} bytes and {len(numbers)} descriptors, where one of each is due"
        elif self._closing or taken >= self._max_sessions:
            problem = f"there are {taken} sessions already"
        else:
            try:
                stream = StreamSocket.from_fd(numbers[0], max_bytes=self._max_request, max_fds=0)
            except (ValueError, OSError) as error:
                problem = str(error)
            else:
                owned.detach()
                problem = self._begin_session(stream)
        if problem is not None:
            owned.close()
            log(_LOGGER, logging.WARNING, "a handshake was turned away: %s", problem)

    def _begin_session(self, stream: StreamSocket) -> str | None:
        """Serve the client at the other end; why that cannot be, if it cannot."""
        session = _Served(self, stream)
        try:
            self._selector.register(stream, selectors.EVENT_READ, session)
        except OSError as error:  # ENOSPC: fs.epoll.max_user_watches (epoll(7))
            stream.close()
            return str(error)
        self._sessions.add(session)
        return None

    def post(self, session: _Served, event: _exec_session.Event) -> None:
        """Have the session handle the event in the server's thread; from any."""
        self._posted.append((session, event))
        with self._over_lock:
            if not self._over:
                self._waker.wake()

    # -- for its sessions, in the thread -----------------------------------------------------------------

    @property
    def patience_s(self) -> float:
        return self._patience_s

    def watch(self, session: _Served, events: int) -> None:
        """Attend to these events of the session's stream from now on."""
        self._selector.modify(session.stream, events, session)

    def unwatch(self, session: _Served) -> None:
        """The session's stream is about to be closed."""
        self._selector.unregister(session.stream)

    def forget(self, session: _Served) -> None:
        """The session is over, and so is its command."""
        self._sessions.discard(session)

    def ask_policy(self, session: _Served, request: Request) -> None:
        """Have the policy decide, in a thread of its own."""

        def ask() -> None:
            self.post(session, Decided(self._decision(request)))

        threading.Thread(target=ask, name="fdpool-exec-policy", daemon=True).start()
        self._deciding.add(session)  # until its answer is looked at, in this thread

    def _decision(self, request: Request) -> Decision:
        try:
            decision: Any = self._policy(request)
            if inspect.isawaitable(decision):
                decision = self._awaited(decision)
            if not isinstance(decision, (Run, Escalate, Deny)):
                raise TypeError(f"a policy returns Run(), Escalate() or Deny(reason), not {decision!r}")
        except BaseException as error:  # SystemExit, say, or CancelledError: the client waits all the same
            log(_LOGGER, logging.ERROR, "the policy failed; its request is denied", exc_info=True)
            return Deny("the policy failed: " + "".join(traceback.format_exception_only(error)).strip())
        return decision

    def _awaited(self, decision: Awaitable[Decision]) -> Decision:
        async def wait() -> Decision:
            return await decision

        if self._loop is None:
            return asyncio.run(wait())
        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()

    def start_command(self, request: Request, descriptors: dict[int, int]) -> RunningCommand:
        """Run the command in a worker; descriptors are borrowed."""
        # In a session of its own the command may read from the client's terminal: in the terminal's
        # session, but not in its foreground, it would be stopped for that.
        streams = {
            name: descriptors.pop(n, subprocess.DEVNULL)
            for n, name in enumerate(("stdin", "stdout", "stderr"))
        }
        return self._pool.popen(
            request.argv,
            executable=request.file,
            stdin=streams["stdin"],
            stdout=streams["stdout"],
            stderr=streams["stderr"],
            fds=descriptors,
            cwd=request.workdir,
            env=request.env,
            new_session=True,
            grace=self._grace,
        )


class _Served:
    """One session: its stream, its state and its command. Runs in: the server's thread."""

    def __init__(self, server: ExecServer, stream: StreamSocket) -> None:
        self.stream = stream
        self.expires_at: float | None = CLOCK.monotonic() + server.patience_s
        self._server = server
        self._session = _exec_session.Session()
        self._command: RunningCommand | None = None
        self._arrived = OwnedFds()
        self._leaving = False  # close as soon as the backlog is sent
        self._gone = False  # the backlog will not be read

    def attend(self, events: int) -> None:
        """Send and receive as far as it goes."""
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and not self.stream.closed:
            self._receive()

    def _receive(self) -> None:
        try:
            received = self.stream.try_receive_with_fds()
        except (EOFError, OSError, WireError) as error:
            self.handle(Gone(str(error)))
            return
        if received is not None:
            message, numbers = received
            self._arrived = OwnedFds(numbers)
            try:
                self.handle(Received(message, len(numbers)))
            finally:
                self._arrived.close()

    def handle(self, event: _exec_session.Event) -> None:
        """Do what follows from an event."""
        if isinstance(event, Finished) and self._command is not None:
            self._command.close()
            self._command = None
        self._gone = self._gone or isinstance(event, Gone)
        left_before = self._leaving
        actions = self._session.handle(event)
        # At no other time: who has not been judged yet could hold hundreds here by frames that he does not finish.
        take_fds(self.stream, SCM_MAX_FD if self._session.takes_descriptors else 0)
        for action in actions:
            self._perform(action)
        if self._leaving and (self._gone or isinstance(event, Overdue)):
            self._close()
        waits = self._session.waits_for_client or self._leaving
        if not (
            waits and left_before
        ):  # who is told the end, and talks on instead of reading, gains no time by it
            self.expires_at = CLOCK.monotonic() + self._server.patience_s if waits else None
        if self.stream.closed and self._command is None:
            self.expires_at = None
            self._server.forget(self)

    def give_up(self) -> None:
        """End it and its command, as something has gone wrong in here."""
        self._leaving = True  # it may be over for the protocol, and its stream open
        self.handle(Gone("it failed"))

    def release(self) -> None:
        """Close what it holds, and by that end its command."""
        self.stream.close()
        self._arrived.close()
        if self._command is not None:
            self._command.close()

    def _perform(self, action: _exec_session.Action) -> None:
        if isinstance(action, _exec_session.Send):
            try:
                self.stream.queue_bytes(encode_json(action.message))
            except PayloadTooLarge as error:  # a small `max_request` holds for what is answered, too
                log(_LOGGER, logging.WARNING, "an answer could not be sent: %s", error)
                self._gone = True
            self._flush()
        elif isinstance(action, _exec_session.AskPolicy):
            self._server.ask_policy(self, action.request)
        elif isinstance(action, _exec_session.StartCommand):
            self._start(action)
        elif isinstance(action, _exec_session.SignalCommand):
            if self._command is not None:
                self._signal(self._command, action.number)
        elif isinstance(action, _exec_session.EndCommand):
            if self._command is not None:
                self._command.end()
        elif action.reason is not None:
            log(_LOGGER, logging.INFO, "a session was closed: %s", action.reason)
            self._close()
        elif self.stream.closed or not self.stream.backlog:
            self._close()
        else:
            self._leaving = True

    def _start(self, action: _exec_session.StartCommand) -> None:
        try:
            descriptors = dict(zip(action.numbers, self._arrived.numbers))
            command = self._server.start_command(action.request, descriptors)
        except (FdpoolError, ValueError, OSError, RuntimeError) as error:
            self._server.post(self, Finished(126, f"{type(error).__name__}: {error}"))
            return
        self._command = command
        command.future.add_done_callback(lambda _: self._server.post(self, _finished(command)))

    def _signal(self, command: RunningCommand, number: int) -> None:
        if number not in _SURVIVED and command.future.cancel():
            self.handle(Finished(-number))  # no worker has begun it, so there is no process to die of this
        else:
            command.signal_group(_for_a_session(number))

    def _flush(self) -> None:
        try:
            done = self.stream.flush()
        except OSError:
            self.handle(Gone("the client has gone"))
            return
        if done and self._leaving:
            self._close()
            self._server.forget(self)
        elif not self.stream.closed:
            self._server.watch(self, selectors.EVENT_READ | (0 if done else selectors.EVENT_WRITE))

    def _close(self) -> None:
        self._leaving = False
        if not self.stream.closed:
            self._server.unwatch(self)
            self.stream.close()


def _for_a_session(number: int) -> int:
    """The signal for a group without a terminal: there the kernel passes over SIGTSTP (setpgid(2), orphaned)."""
    return signal.SIGSTOP if number == signal.SIGTSTP else number


def _finished(command: RunningCommand) -> Finished:
    try:
        return Finished(command.future.result(0).returncode)
    except SpawnError as error:
        not_found = error.errno == errno.ENOENT and not error.in_cwd
        return Finished(127 if not_found else 126, str(error))
    except CancelledError:
        return Finished(126, "the command was cancelled before it began")
    except Exception as error:
        # 126 and 127 say that nothing ran. A worker that was killed took its command along, however far that was.
        never_ran = getattr(error, "may_have_run", None) is False
        return Finished(126 if never_ran else 125, f"{type(error).__name__}: {error}")


def _forget_all_in_child() -> None:
    for server in list(_servers):
        server.forget_in_child()
    _servers.clear()


os.register_at_fork(after_in_child=_forget_all_in_child)
