"""What became of a program: the record of its completion, and the errors that stand for the rest."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

from .errors import FdpoolError

if TYPE_CHECKING:
    from resource import struct_rusage

Argument = Union[str, bytes, os.PathLike[str], os.PathLike[bytes]]
#: A program and its arguments, or a string for the shell.
Arguments = Union[Sequence[Argument], str]


class CompletedCommand(subprocess.CompletedProcess[Any]):
    """A program that has run: a `subprocess.CompletedProcess`, and what else is known of it.

    Attributes:
        signal_name: the signal that ended it (`"SIGKILL"`), or None if it exited.
        wall_s: seconds from its start to its end.
        rusage: what it used, with all its descendants that were waited for (getrusage(2)); None if unknown.
        timed_out: it overran its timeout, and was ended.
        truncated: it wrote more than `max_output`; what is here of that stream ends at the cut.
    """

    def __init__(
        self,
        args: Any,
        returncode: int,
        stdout: Any = None,
        stderr: Any = None,
        *,
        wall_s: float = 0.0,
        rusage: struct_rusage | None = None,
        timed_out: bool = False,
        truncated: bool = False,
    ) -> None:
        super().__init__(args, returncode, stdout, stderr)
        self.wall_s = wall_s
        self.rusage = rusage
        self.timed_out = timed_out
        self.truncated = truncated

    @property
    def signal_name(self) -> str | None:
        if self.returncode >= 0:
            return None
        try:
            return signal.Signals(-self.returncode).name
        except ValueError:  # a real-time signal
            return f"signal {-self.returncode}"

    def check_returncode(self) -> None:
        """Raise `CommandFailed` unless the exit status is 0."""
        if self.returncode:
            raise CommandFailed(self)


class CommandFailed(FdpoolError, subprocess.CalledProcessError):
    """A program that was run with `check`, and whose exit status was not 0.

    Attributes:
        completed: the whole record.
    """

    may_have_run = True

    def __init__(self, completed: CompletedCommand) -> None:
        super().__init__(completed.returncode, completed.args, completed.stdout, completed.stderr)
        self.args = (completed,)
        self.completed = completed


class CommandTimedOut(FdpoolError, subprocess.TimeoutExpired):
    """A program that overran its timeout, and was ended with all its descendants.

    Attributes:
        completed: the record, with what it had written until then.
    """

    may_have_run = True

    def __init__(self, completed: CompletedCommand, timeout: float) -> None:
        super().__init__(completed.args, timeout, completed.stdout, completed.stderr)
        self.args = (completed, timeout)
        self.completed = completed


class SpawnError(FdpoolError, OSError):
    """A program that could not be started; nothing ran. Its `errno` says why, its `filename` names what is at fault.

    It is also the `OSError` that its errno stands for: `FileNotFoundError` if there is no such program (or
    no such `cwd`), `PermissionError` if it must not be executed, `NotADirectoryError` for `cwd`; and a
    `ValueError` if an argument holds NUL.

    Attributes:
        in_cwd: it is `cwd` that is at fault, not the program.
    """

    may_have_run = False
    in_cwd = False

    def __new__(cls, number: int, reason: str, name: object = None) -> SpawnError:
        """An instance of the class that `number` stands for."""
        kind = _KINDS.get(number, cls) if cls is SpawnError else cls
        return super().__new__(kind, number, reason, name)

    def __reduce__(self) -> Any:
        return SpawnError, (self.errno, self.strerror, self.filename), self.__dict__

    def __str__(self) -> str:
        name = os.fsdecode(self.filename) if isinstance(self.filename, (str, bytes)) else self.filename
        return f"cannot run {name}: {self.strerror}"


class _NotFound(SpawnError, FileNotFoundError):
    pass


class _NotPermitted(SpawnError, PermissionError):
    pass


class _NotADirectory(SpawnError, NotADirectoryError):
    pass


class _Unusable(SpawnError, ValueError):
    pass


_KINDS: dict[int, type[SpawnError]] = {
    errno.ENOENT: _NotFound,
    errno.EACCES: _NotPermitted,
    errno.EPERM: _NotPermitted,
    errno.ENOTDIR: _NotADirectory,
    errno.EINVAL: _Unusable,
}
for _kind in _KINDS.values():
    _kind.__name__ = _kind.__qualname__ = "SpawnError"  # the name under which it is documented
