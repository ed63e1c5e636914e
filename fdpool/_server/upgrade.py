"""A new process of the server itself, with new code of everything, in place of this one; without a closed port.

This process starts the same command again, with the listeners among its descriptors, and a variable that says which is
which. When the successor's workers serve, it says so, and this one drains. If it fails before, nothing has happened.

    FDPOOL_UPGRADE    {"of": our pid, "control": fd, "identity": [device, inode] of that, "served": slots,
                       "listeners": {bind: [[slot, "fd:7?owns=1-2"], ...]}}
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from typing import Any

from .. import _children
from .._bind import Listener
from .._systemd import successor_environment
from ..errors import ServerFailed
from ..fds import close_all, is_readable
from ..sockets import StreamSocket

VARIABLE = "FDPOOL_UPGRADE"

Inherited = dict[str, list[tuple[int, str]]]

_before: Predecessor | None = None  # what this process is to replace, once `take` has looked


class Predecessor:
    """The process that this one is to replace.

    Attributes:
        listeners: which it hands to this one, until they are taken: by the bind that they were opened for, the slot
            and the bind that makes each here.
        served: of how many slots they get connections.
    """

    def __init__(self, control: StreamSocket, listeners: Inherited, served: int) -> None:
        self.listeners = listeners
        self.served = served
        self._control: StreamSocket | None = control

    def tell_ready(self, served: int) -> None:
        """Say that this process serves, at the listeners of so many slots; the other one drains then. Safe to call
        again."""
        control, self._control = self._control, None
        if control is not None:
            try:
                control.send({"say": "ready", "pid": os.getpid(), "served": served})
            except OSError:
                pass  # it is gone already, so nobody needs to be told
            control.close()

    def abandon(self) -> None:
        """This process will not serve: the other one goes on. Safe to call again."""
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def close_listeners(self) -> None:
        """Close what was inherited, as the descriptors themselves; those that are used have been duplicated."""
        close_all({_number_in(bind) for binds in self.listeners.values() for _, bind in binds})
        self.listeners = {}


def is_successor() -> bool:
    """True if this process was started to replace another server, now or before `take` was called."""
    return _before is not None or _announced(os.environ) is not None


def announced_binds(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The binds for which a process that is to be replaced hands its listeners to this one."""
    found = _announced(environment)
    return [] if found is None else list(found["listeners"])


def take(
    binds: Collection[str] | None, environment: MutableMapping[str, str] = os.environ
) -> Predecessor | None:
    """The process that this one is to replace, for whoever takes its listeners; None if that is somebody else.

    A program may have several servers, and it is one of them that is replaced. Removes the variable in any case.

    Args:
        binds: of a server. It is that one's if one of these is among those that are handed on; None: it is in any case.
    """
    global _before
    if _before is None:
        _before = _find(environment)
    if _before is None or not _before.listeners:
        return None
    return _before if binds is None or not _before.listeners.keys().isdisjoint(binds) else None


def _find(environment: MutableMapping[str, str]) -> Predecessor | None:
    found = _announced(environment)
    environment.pop(VARIABLE, None)
    if found is None:
        return None
    try:
        control = StreamSocket.from_fd(int(found["control"]))
    except (OSError, ValueError) as error:
        raise ServerFailed(f"{VARIABLE} names no descriptor of the process to replace: {error}") from error
    os.set_inheritable(control.fileno(), False)
    listeners = {
        key: [(int(slot), str(bind)) for slot, bind in binds] for key, binds in found["listeners"].items()
    }
    for binds in listeners.values():
        for _, bind in binds:
            os.set_inheritable(_number_in(bind), False)
    return Predecessor(control, listeners, int(found["served"]))


def _announced(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What the variable says, if it is meant for this process: it is inherited by others, too.

    Who has the stream has the listeners: that is this process, and perhaps children that it forked before it looked,
    which are told by their parent. The process to replace may be dead by now: then the stream is at its end. Until
    then nothing comes from there.
    """
    try:
        found = json.loads(environment.get(VARIABLE, ""))
        if _identity(found["control"]) != found["identity"]:
            return None
        is_ours = found["of"] == os.getppid() or is_readable(found["control"])
    except (ValueError, TypeError, LookupError, OSError):
        return None
    return found if is_ours else None


def _identity(fd: int) -> list[int]:
    """Which file that is, whatever the number is in whichever process."""
    status = os.fstat(fd)
    return [status.st_dev, status.st_ino]


class Successor:
    """The process that is to replace this one.

    Args:
        listeners: every one, with the bind it was opened for and its slot; borrowed.
        served: of how many slots they get connections.

    Attributes:
        is_gone: it has ended, as far as is known; its status may have gone to somebody else.
        served: at the listeners of how many slots it serves, once it is ready.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, listeners: Iterable[tuple[str, int, Listener]], served: int) -> None:
        self.is_gone = False
        self.served = served
        self.control, theirs = StreamSocket.pair()
        said: dict[str, list[tuple[int, str]]] = {}
        passed = [theirs.fileno()]
        for key, slot, listener in listeners:
            number = listener.socket.fileno()
            passed.append(number)
            said.setdefault(key, []).append((slot, listener.handover(number)))
        text = json.dumps(
            {
                "of": os.getpid(),
                "control": theirs.fileno(),
                "identity": _identity(theirs.fileno()),
                "served": served,
                "listeners": said,
            }
        )
        environment = {**successor_environment(os.environ), VARIABLE: text}
        try:
            self.pid = _children.start(lambda: _spawn(environment, passed))
        except BaseException:
            self.control.close()
            raise
        finally:
            theirs.close()

    def is_ready(self) -> bool:
        """True if it has said so.

        Raises:
            EOFError: it has ended instead, or closed its end.
        """
        try:
            received = self.control.try_receive_with_fds()
        except OSError as error:
            raise EOFError(str(error)) from error
        if received is not None:
            self.served = int(received[0]["served"])
        return received is not None

    def reap(self) -> int | None:
        """Its wait status if it has ended and was not reaped before; never waits."""
        return None if self.is_gone else self._reap(os.WNOHANG)

    def _reap(self, options: int) -> int | None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # somebody else has reaped it
            pid, status = self.pid, None
        if not pid:
            return None
        self.is_gone = True
        _children.forget(self.pid)
        return status

    def terminate(self) -> None:
        """Have it end as by SIGTERM: what its workers run has its grace. Does not wait."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        self.reap()
        if not self.is_gone:  # else the number may be another process's by now
            with contextlib.suppress(ProcessLookupError):  # somebody else has reaped it this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone; its workers die with it."""
        self._signal(signal.SIGKILL)
        if not self.is_gone:
            self._reap(0)

    def close(self) -> None:
        """Close the stream to it."""
        self.control.close()


def _spawn(environment: Mapping[str, str], passed: Iterable[int]) -> int:
    """The pid of this command, started again with these descriptors."""
    return os.posix_spawn(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        environment,
        # Onto itself: all that this does is to clear close-on-exec (posix_spawn(3)).
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd) for fd in passed],
        setsigmask=(),
        setsigdef=sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}),
    )


def _number_in(bind: str) -> int:
    """The descriptor in "fd:7" or "fd:7?owns=1-2"."""
    return int(bind.removeprefix("fd:").partition("?")[0])
