"""Notices that Python files have changed, for `fdpool serve --reload-on-change`.

By the kernel's notifications where the package `watchfiles` is installed, until one of the folders is another one than
before; else by looking at all of them twice a second. Editors write a file in several steps, and version control many
files: one change is told when all is quiet.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from .._clock import CLOCK
from ..fds import OwnedFds, above_stdio

Snapshot = dict[str, tuple[int, int, int]]

_PERIOD_S = 0.5
_QUIET_S = 0.2
_RESTLESS_S = 3.0  # longer than this no change is held back
_SUFFIXES = (".py", ".pyi", ".so")
_NEVER = {"__pycache__", "node_modules", "site-packages"}


class Watcher:
    """Calls `changed(paths)` in a thread of its own after each change of a Python file below `folders`, until closed.

    Args:
        notified: use watchfiles; by default if it is installed.
    """

    def __init__(
        self, folders: Sequence[str], changed: Callable[[list[str]], object], *, notified: bool | None = None
    ) -> None:
        self._folders = list(folders)
        self._changed = changed
        self._closed = threading.Event()
        self.watch: Any = None if notified is False else _watchfiles()
        if notified and self.watch is None:
            raise ImportError("watchfiles is not installed")
        self._before = None if self.watch is not None else snapshot(self._folders)
        self._thread = threading.Thread(target=self._run, name="fdpool-serve-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        for paths in self._by_notification() if self._before is None else self._by_looking(self._before):
            self._changed(paths)

    def _by_notification(self) -> Iterable[list[str]]:
        # Held open, as the inode of one that is removed may be the next one's.
        with contextlib.closing(OwnedFds(map(_opened, self._folders))) as held:

            def is_over() -> bool:
                return self._closed.is_set() or not all(map(_is_at, held.numbers, self._folders))

            for changes in self.watch(
                *self._folders,
                watch_filter=lambda _, path: is_watched(path, self._folders),
                debounce=int(_RESTLESS_S * 1000),
                step=int(_QUIET_S * 1000),
                stop_event=SimpleNamespace(is_set=is_over),
                rust_timeout=int(_PERIOD_S * 1000),
                raise_interrupt=False,
            ):
                yield sorted({path for _, path in changes})
        yield from self._by_looking({})  # the kernel's notifications are of the folder that was there

    def _by_looking(self, before: Snapshot) -> Iterable[list[str]]:
        while not self._closed.wait(_PERIOD_S):
            now = snapshot(self._folders)
            if now != before:
                now = self._settled(now)
                changed = differing(before, now)
                if changed:  # and not as before again: an editor's scratch file is there for a moment
                    yield changed
                before = now

    def _settled(self, now: Snapshot) -> Snapshot:
        """What is there once nothing changes any more."""
        deadline = CLOCK.monotonic() + _RESTLESS_S
        while not self._closed.wait(_QUIET_S) and CLOCK.monotonic() < deadline:
            earlier, now = now, snapshot(self._folders)
            if now == earlier:
                break
        return now


def _watchfiles() -> Any:
    try:
        return importlib.import_module("watchfiles").watch
    except ImportError:
        return None


def _opened(folder: str) -> int:
    return above_stdio(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _is_at(fd: int, path: str) -> bool:
    """True if what is open is what `path` leads to."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False  # nothing is there


def is_watched(path: str, folders: Iterable[str]) -> bool:
    """True for Python code below one of the folders, but not in caches, environments and hidden folders."""
    if not path.endswith(_SUFFIXES):
        return False
    below = [os.path.relpath(path, folder).split(os.sep) for folder in folders]
    return any(
        parts[0] != os.pardir and not any(part in _NEVER or part.startswith(".") for part in parts)
        for parts in below
    )


def snapshot(folders: Iterable[str]) -> Snapshot:
    """Time of change, size and inode of every file that is watched."""
    found: Snapshot = {}
    pending = list(folders)
    while pending:
        folder = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue  # it has just been removed, or cannot be read
        if any(entry.name == "pyvenv.cfg" for entry in entries):
            continue  # an environment, under whatever name
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _NEVER and not entry.name.startswith("."):
                        pending.append(entry.path)
                elif entry.name.endswith(_SUFFIXES) and not entry.name.startswith("."):
                    status = entry.stat()
                    found[entry.path] = (status.st_mtime_ns, status.st_size, status.st_ino)
            except OSError:
                continue
    return found


def differing(before: Snapshot, now: Snapshot) -> list[str]:
    """The files that have come, gone or changed, in order."""
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
