"""A file that holds the process id of a server, for whoever sends it signals.

Whether its writer still lives is not asked of the number in it, which may be another process's by now (in a container
it mostly is), but of a lock that the kernel drops with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile

from ..errors import FdpoolError


class PidFileRefused(FdpoolError, OSError):
    """The file cannot be written, or belongs to a server that runs."""


class PidFile:
    """Holds this process's id in a file, from now until `close`.

    The file appears whole, by a rename. One that a dead server has left is replaced; nothing else than a file is.

    Args:
        path: absolute.
        replace: take it from a server that lives: it has started this one, to be its successor.

    Raises:
        PidFileRefused: another server lives and holds it, or it cannot be written; nothing was changed.
    """

    def __init__(self, path: str, *, replace: bool = False) -> None:
        self._path = path
        _check_kind(path)
        if not replace and (holder := _live_holder(path)) is not None:
            raise PidFileRefused(
                f"{path} belongs to a server that runs, process {holder}: stop that one, or choose another file"
            )
        try:
            self._fd = _write(path)
        except OSError as error:
            raise PidFileRefused(f"cannot write the pid file {path}: {error.strerror}") from error

    def close(self) -> None:
        """Remove the file, unless a successor has put its own there. Safe to call again."""
        if self._fd < 0:
            return
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                os.unlink(self._path)
        except OSError:
            pass  # somebody has removed it, or its folder
        os.close(self._fd)
        self._fd = -1


def _check_kind(path: str) -> None:
    """A device would be replaced, if this is root; and a pipe is not opened before somebody writes to it."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return  # it is not there, or what comes next says why it cannot be used
    if not stat.S_ISREG(kind):
        raise PidFileRefused(
            f"the pid file {path} cannot be written: it is no regular file; choose another path"
        )


def _write(path: str) -> int:
    """Put a new file there; returns its locked descriptor."""
    fd, temporary = tempfile.mkstemp(prefix=".fdpool-pid-", dir=os.path.dirname(path))
    try:
        os.fchmod(fd, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, f"{os.getpid()}\n".encode())
        os.rename(temporary, path)
    except BaseException:
        os.close(fd)
        os.unlink(temporary)
        raise
    return fd


def _live_holder(path: str) -> str | None:
    """What the file says of the process that holds it; None if none does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PidFileRefused(f"cannot read the pid file {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise PidFileRefused(f"cannot lock the pid file {path}: {error.strerror}") from error
        return os.read(fd, 100).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(fd)
    return None
