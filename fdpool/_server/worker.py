"""A server worker: one long task of a pool, which loads the application and serves until it is told to drain.

Runs in: a worker of the generation's pool. The main thread boots and serves. A second thread listens to the server, so
that a drain arrives while the main thread is busy; it only ever sets something or posts something. What runs is told
in memory that the server sees (`_server.progress`).

    to the server     hello (pid; its pidfd comes along), standby, ready, retire (why), closed, failed (why, traceback)
    to the worker     serve (for one that stands by), drain (grace_s, leaving), reopen
"""

from __future__ import annotations

import json  # noqa: F401 - of what is told the server: here, and so in the supervisor, not in each worker (1.2 MiB)
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .. import _forensics, _platform, payload
from .._links import Waker
from .._log import log
from ..fds import Fd
from ..sockets import StreamSocket
from . import apps, doors, failures
from .balance import Balance
from .context import Face, Order, ServerWorker, become
from .logs import reopen_logs
from .progress import STACKS_AT, Progress
from .standby import Standby

_LONGEST_GRACE_S = 1e9  # 31 years; a thread cannot be waited for beyond 292 (`threading.TIMEOUT_MAX`)
_EXIT_S = 5.0  # how long threads and exit handlers may keep a worker that has served
_HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
#: When the main thread is interrupted again after one of these, in milliseconds from the time before.
_AGAIN_MS = (20, 40, 80, 160)
_LOGGER = "fdpool.server"


def main(
    order: Order,
    control: Fd,
    page: Fd,
    inbox: Fd | None,
    listeners: Sequence[socket.socket],
    loads: Fd | None,
    app_fds: Sequence[Fd],
) -> str:
    """Boot and serve as the task of a pool's worker; returns why it has ended."""
    stream = StreamSocket.from_fd(control.detach())
    _say_hello(stream)
    _write_stacks_to(page.fileno())
    progress = Progress(page.fileno())
    worker = ServerWorker(order.slot, order.generation, progress, lambda message: _tell(stream, message))
    door: doors.Door
    if inbox is not None:
        door = doors.HandedOver(inbox.detach(), progress)
    else:
        door = doors.Listening(listeners, None if loads is None else Balance(loads.fileno(), order.slot))
    try:
        return _boot_and_serve(order, stream, worker, door, listeners, [fd.detach() for fd in app_fds])
    finally:
        threading.Thread(target=_exit_at_last, name="fdpool-server-exit", daemon=True).start()
        door.close()


def _boot_and_serve(
    order: Order,
    stream: StreamSocket,
    worker: ServerWorker,
    door: doors.Door,
    listeners: Sequence[socket.socket],
    app_fds: list[int],
) -> str:
    become(worker)
    if order.reopens_logs:
        reopen_logs()
    listening = _Listening(stream, worker)
    on_exit: Callable[[ServerWorker], object] | None = None
    try:
        listening.start()
        app, on_start, on_exit = payload.loads(order.body, app_fds, order.spilled)
        if on_start is not None:
            on_start(worker)
        if order.target is not None:
            app = apps.load(order.target)
        interface = order.interface or apps.interface_of(app)
        make = partial(_face, interface, app, order, worker, door, listeners)
        if order.stands_by:
            face: Face = Standby(worker, make, lambda: _tell(stream, {"say": "standby"}), listening.called)
        else:
            face = make()
        worker.interface = interface
        worker.max_requests = order.max_requests
        listening.serves(face)
    except BaseException as error:
        _tell_failed(stream, error)
        if isinstance(error, Exception):
            return f"it could not be booted: {failures.why(error)}"
        raise
    try:
        face.serve(worker.ready)
    except BaseException as error:
        if not worker.is_ready:
            _tell_failed(stream, error)
        if not (worker.draining and isinstance(error, SystemExit) and not error.code):
            raise
    finally:
        if on_exit is not None:
            try:
                on_exit(worker)
            except Exception:
                log(
                    _LOGGER,
                    logging.ERROR,
                    "on_worker_exit failed in worker %d",
                    worker.slot,
                    extra={"event": "hook_failed"},
                    exc_info=True,
                )
    return "drained" if worker.draining else "its application has ended"


def _face(
    interface: str,
    app: Any,
    order: Order,
    worker: ServerWorker,
    door: doors.Door,
    listeners: Sequence[socket.socket],
) -> Face:
    """The way to serve this kind of application. What it needs is imported here: each needs something else."""
    try:
        if interface == "asgi":
            from .asgi import AsgiFace

            return AsgiFace(app, order, worker, door, listeners)
        if interface == "wsgi":
            from .wsgi import WsgiFace

            return WsgiFace(app, order, worker, door, listeners)
    except ModuleNotFoundError:
        from .checks import check_installed  # which none needs that can serve

        check_installed(interface)
        raise
    from . import handler

    if interface == "listeners":
        if not isinstance(door, doors.Listening):
            raise ValueError(
                "an application that accepts for itself cannot be handed connections (dispatch='handoff')"
            )
        return handler.ListenersFace(app, worker, listeners)
    handle = handler.handler_of(app, worker, listeners) if interface == "socketserver" else app
    return handler.HandlerFace(handle, worker, door, order.threads or 1)


# -- listening to the server -------------------------------------------------------------------------------


class _Listening:
    """The thread that listens to the server, and to signals: SIGTERM asks for a successor, SIGUSR1 reopens logs.

    A signal handler only writes a byte, as a stream is not to be used in one.

    Python runs it as the main thread comes back from what that waits in; and a signal that comes just before a system
    call that blocks does not end that. (So it was with one in two hundred of those that came as a worker began to
    drain, beside other work.) So the main thread is interrupted again a few times: the kernel's own handler says at
    once that something has come (`signal.set_wakeup_fd`).
    """

    def __init__(self, stream: StreamSocket, worker: ServerWorker) -> None:
        self._stream = stream
        self._worker = worker
        self._waker = Waker()
        self._signalled: set[int] = set()
        self._face: Face | None = None
        self._told: tuple[float, bool] | None = None  # a drain that came before there was a face
        self._lock = threading.Lock()
        self.called = threading.Event()  # it is not to stand by any more

    def start(self) -> None:
        """Begin; in the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(self._waker.write_fileno(), warn_on_full_buffer=False)
        self._main, self._on_sigurg = threading.get_ident(), signal.getsignal(signal.SIGURG)
        threading.Thread(target=self._run, name="fdpool-server-control", daemon=True).start()

    def serves(self, face: Face) -> None:
        """The face is there, and drains are its own from now on."""
        with self._lock:
            self._face, told = face, self._told
        if told is not None:
            face.drain(*told)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signalled.add(number)
        self._waker.wake()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stream.fileno(), select.POLLIN)
        poll.register(self._waker.fileno(), select.POLLIN)
        again: list[int] = []
        while True:
            ready = {fd for fd, _ in poll.poll(again[0] if again else None)}
            if not ready:
                del again[0]
                self._interrupt_main()
            if self._waker.fileno() in ready:
                if not self._waker.clear().isdisjoint(_HEEDED):
                    again = [*_AGAIN_MS]
                self._heed_signals()
            if self._stream.fileno() in ready:
                try:
                    received = self._stream.try_receive_with_fds()
                except (EOFError, OSError):
                    return  # the server is gone, and the pool's supervisor ends this process
                if received is not None:
                    self._do(received[0])

    def _interrupt_main(self) -> None:
        """By a signal that means nothing where no task is to be terminated; unless the application has taken it."""
        if signal.getsignal(signal.SIGURG) is self._on_sigurg:
            signal.pthread_kill(self._main, signal.SIGURG)

    def _heed_signals(self) -> None:
        if signal.SIGUSR1 in self._signalled:
            self._signalled.discard(signal.SIGUSR1)
            reopen_logs()
        if signal.SIGTERM in self._signalled:
            self._worker.retire("it was sent SIGTERM")

    def _do(self, message: Any) -> None:
        if message["do"] == "reopen":
            reopen_logs()
        elif message["do"] == "serve":
            self.called.set()
        elif message["do"] == "drain":
            self._worker.start_draining()
            told = (min(float(message["grace_s"]), _LONGEST_GRACE_S), bool(message["leaving"]))
            with self._lock:
                face = self._face
                if face is None:
                    self._told = told
            if face is not None:
                face.drain(*told)


# -- small things ------------------------------------------------------------------------------------------


def _say_hello(stream: StreamSocket) -> None:
    """Tell who this is; with a pidfd, so that nobody else can ever be taken for it."""
    pidfd = _platform.open_pidfd(os.getpid())
    try:
        stream.send_with_fds({"say": "hello", "pid": os.getpid()}, [] if pidfd is None else [pidfd])
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _tell(stream: StreamSocket, message: object) -> None:
    try:
        stream.send(message)
    except OSError:
        pass  # the server is gone


def _tell_failed(stream: StreamSocket, error: BaseException) -> None:
    """Why the application cannot be served."""
    _tell(stream, {"say": "failed", "why": failures.why(error), "traceback": failures.formatted(error)})


def _write_stacks_to(page_fd: int) -> None:
    """Have stacks written where the server sees them at once, and not where the supervisor does after a death."""
    fd = os.dup(page_fd)  # kept open for good, for the handler
    os.lseek(fd, STACKS_AT, os.SEEK_SET)
    _forensics.write_stacks_to(fd)


def _exit_at_last() -> None:
    """Threads and exit handlers that never end must not keep a process that serves nobody."""
    time.sleep(_EXIT_S)
    os._exit(0)
