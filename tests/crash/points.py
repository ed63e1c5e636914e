"""Stopping a process exactly at a named point, with nothing in the product for it: a function there is wrapped.

The first process that comes to the point while it is armed writes down its pid and stops itself, all its threads
with it, by SIGSTOP. The test finds it stopped, and kills it there, or lets it go on.

    worker      `install` is the pool's initializer
    supervisor  `supervisor_stops` is a module to preload
    client      a script calls `install`
"""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fdpool import _control, _messages, _spawn, _trees, payload, wire
from fdpool._ending import Ending
from fdpool._tasks import TaskFuture
from fdpool.sockets import StreamSocket
from tests.process_state import wait_until

VARIABLE = "FDPOOL_TEST_STOP"  # "<point>@<folder>", for `supervisor_stops`

_ANSWERS = (_messages.DONE, _messages.FAILED, _messages.ANSWERS, _messages.PIECE, _messages.CUT)
_TASKS = (_messages.TASK, _messages.TASKS, _messages.CHUNK)


class Point(NamedTuple):
    """Before or after calls of `owner.name` for which `meant` is true.

    Attributes:
        meant: told the arguments, and, after the call, its result.
    """

    owner: Any
    name: str
    after: bool
    meant: Callable[..., bool]


def _any(*_: object) -> bool:
    return True


def _sends(kinds: tuple[int, ...]) -> Callable[..., bool]:
    return lambda _sock, buffers, *_: buffers[0][1] in kinds


def _received(kinds: tuple[int, ...]) -> Callable[..., bool]:
    return lambda *told: told[-1] is not None and told[-1].data[1] in kinds


def _finds(kinds: tuple[int, ...]) -> Callable[..., bool]:
    """What would be received now is one of these."""

    def meant(sock: socket.socket, *_: object) -> bool:
        try:
            return sock.recv(2, socket.MSG_PEEK | socket.MSG_DONTWAIT)[1:] in [
                bytes([kind]) for kind in kinds
            ]
        except BlockingIOError:
            return False

    return meant


def _ordered(kind: type[Any]) -> Callable[..., bool]:
    return lambda *told: isinstance(_messages.decode_control(told[-1][0]), kind)


def _tells(kind: type[Any]) -> Callable[..., bool]:
    return lambda message, *_: isinstance(message, kind)


def _asks(kind: type[Any]) -> Callable[..., bool]:
    return lambda _link, message, *_: isinstance(message, kind)


def _heard(kind: type[Any]) -> Callable[..., bool]:
    return lambda *told: told[-1] is not None and isinstance(told[-1][0], kind)


WORKER = {
    "before it receives": Point(wire, "receive", False, _any),
    "after it has received": Point(wire, "receive", True, _received(_TASKS)),
    "while it loads": Point(payload, "loads", False, _any),
    "after it has run": Point(payload, "dumps_result", False, _any),
    "before it answers": Point(wire, "send", False, _sends(_ANSWERS)),
    "after it has answered": Point(wire, "send", True, _sends(_ANSWERS)),
}
#: The same, where tasks have come together.
WORKER_OF_SEVERAL = {
    "after it has received several": Point(wire, "receive", True, _received((_messages.TASKS,))),
    "before it answers several": Point(wire, "send", False, _sends((_messages.ANSWERS,))),
    "after it has answered several": Point(wire, "send", True, _sends((_messages.ANSWERS,))),
}
SUPERVISOR = {
    "before it receives the order to start a worker": Point(StreamSocket, "receive_bytes", False, _any),
    "after it has received the order to start a worker": Point(
        StreamSocket, "receive_bytes", True, _ordered(_messages.StartWorker)
    ),
    "before it forks": Point(_spawn, "fork_worker", False, _any),
    "after it has forked": Point(_spawn, "fork_worker", True, _any),
    "before it reports a start": Point(_messages, "encode_control", False, _tells(_messages.WorkerStarted)),
    "before it reaps": Point(_trees, "reap", False, _any),
    "after it has reaped": Point(_trees, "reap", True, _any),
    "before it reports a death": Point(_messages, "encode_control", False, _tells(_messages.WorkerExited)),
}
#: The same, where a worker's task has had its time, and does not heed SIGTERM.
SUPERVISOR_THAT_ENDS = {
    "before it receives the order to end a worker": Point(StreamSocket, "receive_bytes", False, _any),
    "after it has received the order to end a worker": Point(
        StreamSocket, "receive_bytes", True, _ordered(_messages.EndWorker)
    ),
    "before it sends SIGTERM": Point(Ending, "step", False, lambda ending, *_: not ending._told),
    "after it has sent SIGTERM": Point(Ending, "step", True, lambda ending, *_: ending._told),
    "before it sends SIGKILL": Point(Ending, "step", False, lambda ending, *_: ending._told),
    "after it has sent SIGKILL": Point(Ending, "step", True, lambda ending, *_: ending.due is None),
}
CLIENT = {
    "before it asks for a worker": Point(_control.ControlLink, "tell", False, _asks(_messages.StartWorker)),
    "after it has asked for a worker": Point(
        _control.ControlLink, "tell", True, _asks(_messages.StartWorker)
    ),
    "before it sends": Point(wire, "try_send", False, _sends(_TASKS)),
    "after it has sent": Point(wire, "try_send", True, _sends(_TASKS)),
    "before it receives an answer": Point(wire, "try_receive", False, _finds(_ANSWERS)),
    "after it has received an answer": Point(wire, "try_receive", True, _received(_ANSWERS)),
    "before it settles a future": Point(TaskFuture, "settle", False, _any),
    "after it has settled a future": Point(TaskFuture, "settle", True, _any),
    "after it has heard of a death": Point(
        _control.ControlLink, "try_receive", True, _heard(_messages.WorkerExited)
    ),
}
POINTS = {**WORKER, **WORKER_OF_SEVERAL, **SUPERVISOR, **SUPERVISOR_THAT_ENDS, **CLIENT}


def install(name: str, folder: str) -> None:
    """Runs in: the process that is to stop. Wrap the function of the point."""
    point = POINTS[name]
    inner = getattr(point.owner, point.name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not point.after and point.meant(*args):
            reach(folder)
        result = inner(*args, **kwargs)
        if point.after and point.meant(*args, result):
            reach(folder)
        return result

    setattr(point.owner, point.name, wrapped)


def reach(folder: str) -> None:
    """Stop here, if this is the first to come since the point was armed."""
    try:
        os.unlink(os.path.join(folder, "armed"))
    except FileNotFoundError:
        return
    with open(os.path.join(folder, "writing"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, os.path.join(folder, "reached"))
    os.kill(os.getpid(), signal.SIGSTOP)


def arm(folder: Path) -> None:
    """Let the next process that comes to the point stop."""
    (folder / "armed").touch()


def reached(folder: Path) -> bool:
    """True once a process has come to the point."""
    return (folder / "reached").exists()


def stopped(folder: Path) -> int:
    """Wait for a process to stop at the point; returns its pid."""
    wait_until(lambda: reached(folder))
    pid = int((folder / "reached").read_text())
    wait_until(lambda: _state(pid) == "T")
    return pid


def _state(pid: int) -> str:
    """As in proc(5): T for stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def signal_stopped(folder: Path, number: int) -> None:
    """Kill who stands at the point, or let it go on."""
    os.kill(stopped(folder), number)
