"""What this kernel offers beyond POSIX, one small function each, with what is done without it.

`FDPOOL_WITHOUT` in the environment (names separated by commas: memfd, pidfd, subreaper, pdeathsig,
epoll) makes a feature look absent, so that the fallbacks can be tested on a kernel that has them all.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable
from functools import partial

# fcntl(2); the names are in Python's fcntl module only where it was built against new enough headers.
_F_ADD_SEALS = 1033
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE = 1, 2, 4, 8

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PR_SET_CHILD_SUBREAPER = 36


def has(feature: str) -> bool:
    """True unless `feature` is named in FDPOOL_WITHOUT."""
    # The bytes that `os.environ` looks in: 0.1 us in place of 0.6, six times for each program.
    without = os.environb._data.get(b"FDPOOL_WITHOUT")  # type: ignore[attr-defined]
    return not without or feature.encode() not in without.split(b",")


def anonymous_file(name: str) -> int:
    """A new close-on-exec descriptor of a file that has no name in any folder; the caller's to close.

    A memfd where there is one (memfd_create(2)), else an unlinked temporary file: in /dev/shm if that
    can be written, as memory is what is wanted.
    """
    if hasattr(os, "memfd_create") and has("memfd"):
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    import tempfile  # 10 ms, and a memfd does not need it

    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    fd, path = tempfile.mkstemp(prefix=f"{name}-", dir=folder)
    os.unlink(path)
    return fd


def seal(fd: int, seals: int) -> None:
    """Let nobody do any more to an `anonymous_file` what `seals` name (F_ADD_SEALS in fcntl(2)), where the kernel can.

    `SEAL_SHRINK` is for all that are mapped: who cuts one would have those who map it die of SIGBUS. With `SEAL_SEAL`
    there will be no other seals, ever.
    """
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, seals)
    except OSError:
        pass  # EINVAL: a plain file


def open_pidfd(pid: int) -> int | None:
    """A descriptor that is readable once `pid` has died (pidfd_open(2)), or None without such."""
    if not hasattr(os, "pidfd_open") or not has("pidfd"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def child_pids(of_all_threads: bool = False) -> set[int] | None:
    """The children of this process, if the kernel lists them at no cost (proc(5)); else None, as where no descriptor is
    left to look with. Where there are none that is one system call, of a microsecond.

    Those that its main thread has forked, which is where workers and the supervisor fork; or all: where there are any
    that is a read of some 20 microseconds for each thread.
    """
    found: set[int] = set()
    try:
        if not has_children():
            return found
        for thread in os.listdir("/proc/self/task") if of_all_threads else ():
            try:
                found |= _children_of(thread)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended, and they are the main thread's now
        return found | _children_of(str(os.getpid()))
    except OSError:
        return None


#: Also children that clone(2) has made so that their end sends no SIGCHLD (waitpid(2)).
_WALL = 0x40000000 if sys.platform == "linux" else 0


def has_children() -> bool:
    """False if this process has none, alive or dead; True also where waitid(2) is missing."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
    except ChildProcessError:
        return False
    return True


def _children_of(thread: str) -> set[int]:
    with open(f"/proc/self/task/{thread}/children", "rb", buffering=0) as listing:
        return {int(pid) for pid in listing.read().split()}


def become_subreaper(wanted: bool = True) -> bool:
    """Let orphaned descendants become this process's children instead of init's, or no longer; True if done."""
    return has("subreaper") and _prctl(_PR_SET_CHILD_SUBREAPER, int(wanted))


def signal_when_parent_dies(signal_number: int) -> bool:
    """Have the kernel send `signal_number` to this process when its parent dies; True if it will.

    prctl(2): "parent" is the *thread* that forked, so this is only sound where the parent forks in
    its only thread, as the supervisor does.
    """
    return has("pdeathsig") and _prctl(_PR_SET_PDEATHSIG, signal_number)


_call_prctl: Callable[[tuple[int, ...]], int] | None = None


def load_prctl() -> None:
    """Load what calls prctl(2), if there is such a thing: before a fork, as the child would copy pages for it."""
    global _call_prctl
    if sys.platform != "linux" or _call_prctl is not None:
        return
    try:
        # What ctypes is made of, and all that is needed of it: 0.5 ms in place of 1.8, and 40 pages fewer.
        import _ctypes
    except ImportError:
        return  # an interpreter that was built without libffi

    # typeshed has it that dlopen takes no None, which is this process.
    libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    _call_prctl = partial(_ctypes.call_function, _ctypes.dlsym(libc, "prctl"))


def _prctl(option: int, argument: int) -> bool:
    load_prctl()
    return _call_prctl is not None and _call_prctl((option, argument, 0, 0, 0)) == 0
