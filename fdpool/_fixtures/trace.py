"""Where descriptors were opened: while tracing is on, every usual way of opening one writes down its caller.

The ways are wrapped (`os.open`, `open`, `socket.socket` and so on), as the interpreter's audit events come before there
is a number, and there is none for a pipe. What C code opens by itself is not seen.
"""

from __future__ import annotations

import builtins
import io
import os
import socket
import sys
from collections.abc import Callable
from functools import update_wrapper, wraps
from types import FrameType, ModuleType
from typing import Any

_DEPTH = 6  # frames that are kept: the one that opened it, and who called that
_SKIPPED = (os.path.join(os.sep + "fdpool", "_fixtures", "trace"), os.sep + "_pytest" + os.sep)

# Functions that return a number, a pair of numbers, or something with a fileno().
_IN_OS = (
    "dup",
    "dup2",
    "eventfd",
    "memfd_create",
    "open",
    "openpty",
    "pidfd_open",
    "pipe",
    "pipe2",
    "timerfd_create",
)

# What C code opens gets the numbers of what was closed: so each is noted with the file that it was then.
_opened: dict[int, tuple[tuple[int, int], list[str]]] = {}
_originals: list[tuple[Any, str, Any]] = []


def is_on() -> bool:
    """True while openings are written down."""
    return bool(_originals)


def opened_at(fd: int) -> list[str]:
    """Where the descriptor was opened, innermost first: "at file.py:12 in function"; empty if nobody knows."""
    file, places = _opened.get(fd, (None, []))
    return places if file == _file(fd) else []


def start() -> None:
    """Begin to write down; safe to call again."""
    if _originals:
        return
    for name in _IN_OS:
        if hasattr(os, name):
            _replace(os, name, _Traced(os, name))
    traced = _Traced(builtins, "open")
    _replace(builtins, "open", traced)
    _replace(io, "open", traced)
    _replace(socket.socket, "__init__", _traced_init(socket.socket.__init__))


def stop() -> None:
    """Undo `start`, and forget everything."""
    while _originals:
        holder, name, original = _originals.pop()
        setattr(holder, name, original)
    _opened.clear()


class _Traced:
    """In place of a builtin function, and like one: it is not bound to an instance whose class has it for an attribute,
    and a pickle names it."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self._original = getattr(module, name)
        update_wrapper(self, self._original)
        self.__module__ = module.__name__  # where a pickle finds it; `os.open` says that it is of `posix`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._original(*args, **kwargs)
        _note(result)
        return result

    def __reduce__(self) -> str:
        return str(self._original.__name__)


def _traced_init(original: Any) -> Callable[..., None]:
    # The class itself stays, as others are derived from it; every way to make a socket goes through here.
    @wraps(original)
    def traced(self: socket.socket, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _note(self)

    return traced


def _replace(holder: Any, name: str, traced: Callable[..., Any]) -> None:
    _originals.append((holder, name, getattr(holder, name)))
    setattr(holder, name, traced)


def _note(result: Any) -> None:
    for each in result if isinstance(result, tuple) else (result,):
        number = each if isinstance(each, int) else _number_of(each)
        if number is not None and (file := _file(number)) is not None:
            _opened[number] = file, _callers()


def _number_of(opened: Any) -> int | None:
    try:
        number = opened.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return number if isinstance(number, int) else None


def _file(fd: int) -> tuple[int, int] | None:
    """Device and inode; None if it is not open."""
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _callers() -> list[str]:
    """The innermost frames that are neither ours nor pytest's own."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(found) < _DEPTH:
        code = frame.f_code
        if not any(part in code.co_filename for part in _SKIPPED):
            found.append(f"at {_shortened(code.co_filename)}:{frame.f_lineno} in {code.co_name}")
        elif found:
            break  # pytest called this: what is further out tells nothing
        frame = frame.f_back
    return found


def _shortened(path: str) -> str:
    try:
        relative = os.path.relpath(path)
    except OSError:  # the working directory is gone
        return path
    return path if relative.startswith("..") else relative
