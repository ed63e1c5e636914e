"""What a process has just now that a test could leave behind: descriptors, processes, threads, shared memory.

A census costs a tenth of a millisecond, so that one before and one after every test is not felt. Where there is no
/proc, only threads are seen, and child processes by psutil.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .. import _own_sockets
from .holdings import LASTING, MEMORY, Holdings, holdings_of, live_pools

#: Set in the process of the tests, and so in what these start: the same test may be running elsewhere as well.
MARK = "FDPOOL_TESTS"

_SHM = "/dev/shm"

# Kernel: in the middle of an execve(2), and of zombies and kernel threads at any time, the environment is empty.
_EXEC_LOOKS = 5

#: Helpers of the standard library that are started when first needed, and stay for good.
_LASTING = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


class Census(NamedTuple):
    """What there was at one moment.

    Attributes:
        descriptors: number -> what the kernel calls it (`readlink` of /proc/self/fd).
        children: process ids of everything that descends from this process.
        running: every process id of the machine.
        threads: of this process, as `threading` knows them.
        shared: names in /dev/shm.
        pools: the fdpool pools, by their clients.
    """

    descriptors: dict[int, str]
    children: frozenset[int]
    running: frozenset[int]
    threads: frozenset[threading.Thread]
    shared: frozenset[str]
    pools: frozenset[object]


class Leak(NamedTuple):
    """One thing that is there and was not before."""

    kind: str  # "descriptor", "process", "thread", "shared memory", "pool"
    text: str  # what it is, for a reader
    number: int = -1  # the descriptor, or the process id

    def __str__(self) -> str:
        return f"{self.kind} {self.text}"


def take() -> Census:
    """The census of this process."""
    return Census(
        descriptors(),
        frozenset(descendants(os.getpid())),
        frozenset(_numbers_in("/proc")),
        frozenset(threading.enumerate()),
        frozenset(_names_in(_SHM)),
        frozenset(live_pools()),
    )


def added(base: Census, before: Census, after: Census) -> Census:
    """`base`, and what `after` has and `before` had not."""
    return Census(
        {**base.descriptors, **dict(after.descriptors.items() - before.descriptors.items())},
        base.children | after.children - before.children,
        base.running | after.running - before.running,
        base.threads | after.threads - before.threads,
        base.shared | after.shared - before.shared,
        base.pools | after.pools - before.pools,
    )


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Number and target of each descriptor of a process; empty if it is gone, or not ours to look at."""
    folder = f"/proc/{pid}/fd"
    found = {}
    for number in _numbers_in(folder):
        try:
            found[number] = os.readlink(f"{folder}/{number}")
        except OSError:
            continue  # the one that listed the folder
    return found


def descendants(pid: int) -> list[int]:
    """Process ids of everything that descends from `pid`, zombies included."""
    found = []
    todo = [pid]
    while todo:
        below = list(_children(todo.pop()))
        found += below
        todo += below
    return found


def _children(pid: int) -> Iterator[int]:
    # Kernel: children are listed by the thread that forked them (proc(5), task/[tid]/children).
    for thread in _numbers_in(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as listing:
                yield from map(int, listing.read().split())
        except OSError:
            if pid == os.getpid() and thread == pid:  # a kernel without CONFIG_PROC_CHILDREN
                yield from _children_by_psutil(pid)


def _children_by_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _numbers_in(folder: str) -> list[int]:
    return [int(name) for name in _names_in(folder) if name.isdigit()]


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


# -- comparing -----------------------------------------------------------------------------------------


def compare(before: Census, after: Census, test: str) -> list[Leak]:
    """What `after` has and `before` had not, but for what older pools hold.

    Args:
        test: as PYTEST_CURRENT_TEST began, by which a process is known that has left the tree.
    """
    pools = after.pools
    held = Holdings(frozenset(), frozenset(), frozenset())
    if pools and _has_more(before, after):  # finding out what pools hold takes a while
        held = holdings_of(pools)
    leaks = [Leak("pool", _describe_pool(pool)) for pool in pools - before.pools]
    leaks += _descriptors_left(before, after, held, bool(pools))
    leaks += _processes_left(before, after, held, test)
    leaks += [
        Leak("thread", _describe_thread(thread))
        for thread in after.threads - before.threads - held.threads
        if thread.is_alive()
    ]
    leaks += [Leak("shared memory", f"{_SHM}/{name}") for name in _shared_left(before, after)]
    return leaks


def _has_more(before: Census, after: Census) -> bool:
    return bool(
        after.descriptors.items() - before.descriptors.items()
        or after.children - before.children
        or after.threads - before.threads
    )


def _descriptors_left(before: Census, after: Census, held: Holdings, pools: bool) -> Iterator[Leak]:
    for number, what in sorted(after.descriptors.items()):
        if before.descriptors.get(number) == what or number in held.descriptors:
            continue
        if (pools and what.startswith(MEMORY)) or number in LASTING or number in _lasting_numbers():
            continue
        yield Leak("descriptor", f"{number}: {_describe_descriptor(number, what)}", number)


def _processes_left(before: Census, after: Census, held: Holdings, test: str) -> Iterator[Leak]:
    of_pools = set(held.processes)
    for supervisor in held.processes:
        of_pools.update(descendants(supervisor))
    for pid in sorted(after.children - before.children - of_pools):
        if (text := _describe_process(pid)) is not None:
            yield Leak("process", text, pid)
    for pid in sorted(after.running - before.running - after.children - of_pools):
        if _is_of_test(pid, test) and (text := _describe_process(pid)) is not None:
            yield Leak("process", f"{text} (it has left this process's tree)", pid)


def _shared_left(before: Census, after: Census) -> list[str]:
    """What is new in /dev/shm and ours: made by this process, or mapped by one that descends from it. That folder is
    the whole machine's, and who has made a file there is not written anywhere."""
    new = after.shared - before.shared
    if not new:
        return []
    ours = {name for name in new if name in _made}
    for pid in (os.getpid(), *after.children):
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
                text = maps.read()
        except OSError:
            continue
        ours.update(name for name in new if f"{_SHM}/{name}\n" in text)
    return sorted(name for name in ours if os.path.exists(f"{_SHM}/{name}"))


_made: set[str] = set()


def watch_shared_memory() -> None:
    """Note the names under which this process makes shared memory from now on; safe to call again."""
    try:
        posix: Any = importlib.import_module("_posixshmem")  # which has no types
    except ImportError:
        return
    original = posix.shm_open
    if getattr(original, "noting", False):
        return

    def shm_open(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            _made.add(path.lstrip("/"))
        return int(original(path, flags, mode))

    shm_open.noting = True  # type: ignore[attr-defined]
    posix.shm_open = shm_open  # multiprocessing.shared_memory looks it up there each time


def _lasting_numbers() -> Iterable[int]:
    import sys

    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    names = ("_fd", "_forkserver_alive_fd")
    found = [getattr(helper, name, None) for helper in (tracker, server) for name in names]
    return [number for number in found if isinstance(number, int)]


def _is_of_test(pid: int, test: str) -> bool:
    """True if the process inherited the environment of the test: pytest says there which one is running."""
    for _ in range(_EXEC_LOOKS):
        try:
            with open(f"/proc/{pid}/environ", "rb", buffering=0) as environment:
                found = environment.read()
        except OSError:
            return False
        if found:
            variables = b"\0" + found
            is_ours = f"\0{MARK}={os.environ.get(MARK, '')}\0".encode() in variables
            return is_ours and f"\0PYTEST_CURRENT_TEST={test} (".encode() in variables
        time.sleep(0.001)
    return False


def _describe_process(pid: int) -> str | None:
    """Process id, command line and state; None for what is gone meanwhile, or stays by design."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            line = file.read()
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            name, _, rest = file.read().partition(b"(")[2].rpartition(b")")
    except OSError:
        return None
    if any(helper in line for helper in _LASTING):
        return None
    command = line.replace(b"\0", b" ").strip() or name
    dead = ", dead and not waited for" if rest.split()[0] == b"Z" else ""
    shown = command.decode(errors="replace")
    return f"{pid}: {shown if len(shown) <= 100 else shown[:97] + '...'}{dead}"


def _describe_descriptor(number: int, what: str) -> str:
    if not what.startswith("socket:"):
        return what
    import socket

    duplicate = -1
    try:
        duplicate = os.dup(number)
        found = _own_sockets.adopt(duplicate)
    except OSError:  # another thread has closed it meanwhile, and the number may be something else's
        if duplicate >= 0:
            os.close(duplicate)
        return what
    with found:
        try:
            name, kind = found.getsockname(), socket.SocketKind(found.type).name
            return f"{what}, {found.family.name} {kind}{f' at {name}' if name else ''}"
        except (OSError, ValueError, AttributeError):
            return what


def _describe_thread(thread: threading.Thread) -> str:
    target = getattr(thread, "_target", None)
    runs = getattr(target, "__qualname__", None) or type(thread).__qualname__
    return f"{thread.name!r}, which runs {runs}{' (a daemon)' if thread.daemon else ''}"


def _describe_pool(pool: object) -> str:
    links = getattr(getattr(pool, "client", None), "links", {})
    pids = [link.pid for link in links.values() if link.pid is not None]
    workers = f"with the workers {', '.join(map(str, pids))}" if pids else "without workers"
    return f"of fdpool {workers}: shut it down, or use it in a `with` block"
