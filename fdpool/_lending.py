"""What makes a fork of one pool's supervisor as good as a fresh interpreter for the next pool of the same client.

A fresh one takes 60 ms to start and to import, a fork 4. It is only borrowed where nobody could tell: what a process
inherits is handed over (environment, working directory, umask, standard streams), or has to be the same (`likeness`).
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence

from . import _messages, _spawn, _trees, fds

#: What the names of variables begin with that an interpreter, or the C library, reads once and for all as it starts.
_READ_AT_START = (b"PYTHON", b"LC_", b"LANG", b"LD_", b"MALLOC_", b"GLIBC_TUNABLES", b"TZ")
#: Lines of /proc/self/status with what a process inherits, and a running one can be told to change. Compiled by the
#: client as it asks (`re` keeps it), not by each supervisor as it imports this: 0.3 ms of its start.
_STATUS = rb"(?m)^(?:Uid|Gid|Groups|NoNewPrivs|Seccomp\w*|Cap\w+|Cpus_allowed|Mems_allowed):.*"
_UMASK = rb"(?m)^Umask:\s*(\d+)"

Likeness = tuple[object, ...]


def likeness() -> Likeness | None:
    """All that a child of this thread would inherit just now and that is not handed over; None if that cannot be said.

    From proc(5): 0.2 ms. Landlock is not to be seen there: see `is_as_confined`. Not in a worker of another pool, which
    may be a subreaper for a while, and would take a supervisor that is orphaned for what a program has left.
    """
    if _trees.WORKER_MARK in os.environ:
        return None
    try:
        status = _read("/proc/thread-self/status")
        return (
            [item for item in _environment() if item[0].startswith(_READ_AT_START)],
            re.findall(_STATUS, status),
            _read("/proc/thread-self/limits"),
            _read("/proc/self/cgroup"),
            _read("/proc/self/oom_score_adj"),
            _read("/proc/self/personality"),
            _confinement(),
            [
                os.readlink(f"/proc/thread-self/ns/{name}")
                for name in sorted(os.listdir("/proc/thread-self/ns"))
            ],
            os.getpriority(os.PRIO_PROCESS, 0),
            _io_priority(),
            (os.sched_getscheduler(0), os.sched_getparam(0)),
            os.readlink("/proc/self/root"),
            os.getsid(0),
            sys.executable,
            list(sys.warnoptions),
        )
    except (OSError, AttributeError):
        return None


def heritage(control_fd: int) -> tuple[_messages.Lend, fds.OwnedFds]:
    """What is handed over to a supervisor that serves on `control_fd`; duplicates, so that is only borrowed.

    Raises:
        OSError: there is no descriptor left, or no working directory.
    """
    found = re.search(_UMASK, _read("/proc/thread-self/status"))
    if found is None:
        raise OSError("this kernel does not tell the umask")
    owned = fds.OwnedFds()
    owned.numbers.append(fds.duplicate(control_fd))
    # One that may be entered need not be readable.
    owned.numbers.append(fds.above_stdio(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
    streams = [fd for fd in (1, 2) if _spawn.is_passed_on(fd)]
    owned.numbers += map(fds.duplicate, streams)
    return _messages.Lend(_environment(), int(found[1], 8), streams), owned


def adopt(message: _messages.Lend, numbers: Sequence[int]) -> int:
    """Runs in: the fork. Make it what a fresh interpreter would be; returns the descriptor that it is to serve on.

    Raises:
        OSError: it cannot be made so.
    """
    control_fd, folder_fd, *stream_fds = numbers
    os.fchdir(folder_fd)
    os.close(folder_fd)
    _forget_search_path()
    os.umask(message.umask)
    if dict(message.environment) != dict(os.environb):
        os.environb.clear()
        os.environb.update(message.environment)
    null = os.open(os.devnull, os.O_WRONLY)
    passed = dict(zip(message.streams, stream_fds))
    for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(passed.get(fd, null), fd)
        if fd == 1 and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=os.isatty(fd))
    fds.close_all([null, *stream_fds])
    return control_fd


def _forget_search_path() -> None:
    """Forget where relative entries have led, and which were no folders, or are none; the others will be listed anew.

    Not by clearing all: what they have listed would be freed here, which copies 170 pages, and takes 1 ms.
    `importlib.invalidate_caches` imports `importlib.metadata`.
    """
    finders = sys.path_importer_cache
    for path, finder in list(finders.items()):
        # An archive's finder has no `path`. There may be a folder now, as there may be an archive where one was.
        keeps = os.path.isabs(path) and hasattr(finder, "path") and os.path.isdir(path)
        if finder is not None and hasattr(finder, "invalidate_caches"):
            try:
                finder.invalidate_caches()  # also for an archive's next finder, as `zipimport` keeps what is in one
            except Exception:
                keeps = False  # as where that has been cut short (EOFError)
        if not keeps:
            del finders[path]


def is_as_confined(supervisor: int) -> bool:
    """True unless this process has been put into a Landlock domain since it started `supervisor`, its child.

    Nothing says so, but who is in one may look at nobody outside (landlock(7), "Ptrace restrictions"): 4 microseconds.
    """
    try:
        os.readlink(f"/proc/{supervisor}/exe")
    except OSError:
        return False
    return True


def _environment() -> list[tuple[bytes, bytes]]:
    # Not os.environb, as os.environ may have been replaced.
    return [(os.fsencode(name), os.fsencode(value)) for name, value in os.environ.items()]


def _io_priority() -> object:
    """None for the usual one. Only where psutil is loaded (30 microseconds): to load it would take longer than to start
    an interpreter, and Python code of this process cannot well have changed it without."""
    psutil = sys.modules.get("psutil")
    if psutil is None:
        return None
    try:
        found = psutil.Process().ionice()
    except psutil.Error as error:
        raise OSError("the I/O priority cannot be read") from error
    return tuple(found) if found.ioclass else None


def _confinement() -> bytes | None:
    """What a security module has confined this thread to."""
    try:
        return _read("/proc/thread-self/attr/current")
    except OSError:
        return None  # there is none


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()
