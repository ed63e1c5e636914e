"""The files that `--out` and `--err` name: written without a name, and put in place when a job has succeeded.

    opened, nameless ──commit──► under its name, in place of what was there
                     ──discard─► gone

Whoever is killed in between leaves nothing, as the kernel frees what has no name (O_TMPFILE, open(2)). A file
system without such files gets one with a name of its own beside the target.

What is no regular file is written as it is, and so is a file or socket that this process was started with
(`--err /dev/stderr`): others go on writing there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from .. import _platform
from ..fds import above_stdio, duplicate

_NOT_THERE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # what O_TMPFILE gets where nobody knows it
_PRIVATE = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY


class Refused(Exception):
    """Why a name must not be written to."""


class Target:
    """One output of one job.

    Attributes:
        path: the name as it was given.
        fd: to be written to; owned.
    """

    def __init__(self, path: bytes, clobber: bool) -> None:
        self.path = path
        self.fd = -1
        self._clobber = clobber
        self._real = b""
        self._beside: bytes | None = None  # the name that it has until it gets its own

    def open_as_it_is(self) -> None:
        """Open what is no regular file, as `>` does, but for a FIFO only if somebody reads it."""
        self.fd = above_stdio(os.open(self.path, _PRIVATE | os.O_NONBLOCK))
        os.set_blocking(self.fd, True)

    def share(self, number: int) -> None:
        """Write to what is open here as descriptor `number`, from where that stands."""
        self.fd = duplicate(number)

    def open_nameless(self, real: bytes, there: os.stat_result | None) -> None:
        """Open a file that is to become `real`, with owner and permissions of what is there now."""
        self._real = real
        self.fd = above_stdio(self._open(os.path.dirname(real)))
        if there is not None:
            mine = os.fstat(self.fd)
            if (mine.st_uid, mine.st_gid) != (there.st_uid, there.st_gid):
                try:
                    os.fchown(self.fd, there.st_uid, there.st_gid)
                except PermissionError:
                    pass  # a file of another's, in a folder of ours
            os.fchmod(self.fd, stat.S_IMODE(there.st_mode) & 0o777)

    def _open(self, folder: bytes) -> int:
        if hasattr(os, "O_TMPFILE") and _platform.has("tmpfile") and os.path.exists("/proc/self/fd"):
            try:
                return os.open(folder, os.O_TMPFILE | _PRIVATE, 0o666)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
        self._beside = self._name_beside()
        return os.open(self._beside, os.O_CREAT | os.O_EXCL | _PRIVATE, 0o666)

    def _name_beside(self) -> bytes:
        return os.path.join(os.path.dirname(self._real), b".fdpool-" + os.urandom(8).hex().encode())

    @property
    def size(self) -> int:
        """How many bytes it has got; 0 where others write, too."""
        return os.fstat(self.fd).st_size if self._real else 0

    def commit(self) -> None:
        """Put it in place.

        Raises:
            OSError: it is not; what was there still is. The output is gone.
        """
        try:
            if not self._real:
                return
            if self._beside is None:
                if self._try_link():
                    return
                self._beside = self._name_beside()
                self._link(self._beside)
            if self._clobber:
                os.replace(self._beside, self._real)
            else:
                os.link(self._beside, self._real)
        finally:
            self.discard()

    def _try_link(self) -> bool:
        """Give it its name, if nothing has that."""
        try:
            self._link(self._real)
        except FileExistsError:
            if not self._clobber:
                raise
            return False
        return True

    def _link(self, name: bytes) -> None:
        # With any src_dir_fd, which counts for nothing here, Python calls linkat(2), which can follow.
        os.link(f"/proc/self/fd/{self.fd}".encode(), name, src_dir_fd=self.fd, follow_symlinks=True)

    def discard(self) -> None:
        """Close it; what is not in place is gone. Safe to call again."""
        beside, self._beside = self._beside, None
        if beside is not None:
            try:
                os.unlink(beside)
            except OSError:
                pass  # it has been renamed, or its folder has gone
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class Targets:
    """All outputs of a run, no two of which may be the same.

    Args:
        clobber: what is there may be replaced.
        log: the name of the run's own log, which is there; None if it has none.
    """

    def __init__(self, clobber: bool, log: bytes | None) -> None:
        self._clobber = clobber
        self._log = None if log is None else os.stat(log)
        self._inputs: set[tuple[int, int]] = set()
        self._owners: dict[tuple[int, int, bytes], tuple[int, str]] = {}

    def note_inputs(self, names: Iterable[bytes]) -> None:
        """Remember files that are read in this run, so far as they are there."""
        for name in names:
            try:
                status = os.stat(name)
            except (OSError, ValueError):
                continue
            if stat.S_ISREG(status.st_mode):
                self._inputs.add((status.st_dev, status.st_ino))

    def claim(self, target: Target, seq: int, kind: str) -> None:
        """Open `target` for a job.

        Raises:
            Refused: it is an input or the log of this run, or another's output, or must not be replaced.
            OSError, ValueError: it cannot be opened.
        """
        path = target.path
        try:
            there = os.stat(path)
        except FileNotFoundError:
            if not path:
                raise
            there = None
        if there is not None and (there.st_dev, there.st_ino) in self._inputs:
            raise Refused("it is an input of this run")
        if there is not None and self._log is not None and os.path.samestat(there, self._log):
            raise Refused("it is the log of this run")
        real = os.path.realpath(path)
        if path.endswith(b"/") or (there is not None and stat.S_ISDIR(there.st_mode)):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        number = None if there is None else _inherited(path, there)
        # A socket cannot be opened, whatever its name. What else is no file is opened anew all the same, as what has
        # the number may be open for reading alone.
        if there is not None and number is not None and _is_file_or_socket(there):
            target.share(number)
            return
        if there is not None and not stat.S_ISREG(there.st_mode):
            target.open_as_it_is()
            return
        folder, last = os.path.split(real)
        status = os.stat(folder)
        owner = self._owners.setdefault((status.st_dev, status.st_ino, last), (seq, kind))
        if owner != (seq, kind):
            raise Refused(f"it is {owner[1]} of job {owner[0]} already")
        if there is not None:
            if not self._clobber:
                raise Refused("it is there already, and --no-clobber is given")
            if not os.access(real, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        target.open_nameless(real, there)


def _is_file_or_socket(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISSOCK(status.st_mode)


def _inherited(path: bytes, there: os.stat_result) -> int | None:
    """The descriptor of this process that a file's name leads to: as `/dev/fd/N`, or as its standard output or error,
    whichever name that goes by. None if there is no such.

    Raises:
        OSError: `/dev/fd/N` is none that it was started with, but one of its own.
    """
    folder, last = os.path.split(path)
    if last.isdigit() and os.path.realpath(folder) == os.path.realpath(b"/dev/fd"):
        if not os.get_inheritable(int(last)):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), path)
        return int(last)
    for number in (1, 2):
        try:
            if os.path.samestat(there, os.fstat(number)):
                return number
        except OSError:
            continue  # it is closed
    return None
