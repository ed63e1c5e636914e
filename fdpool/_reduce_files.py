"""Files, temporary files and bare descriptors: how each is taken apart for a payload, and made again.

Layer by layer, text over buffer over raw, so that a file and its `.buffer` in one task stay one object.
"""

from __future__ import annotations

import copyreg
import fcntl
import io
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from . import _textfile
from ._checks import StandIn, attributes, check_access, check_open, check_subclass, open_number
from ._placement import current, hand_over, incoming, refusal
from .fds import Fd, above_stdio

if TYPE_CHECKING:
    from collections.abc import Callable

Reduced = tuple[Any, ...]

# -- raw files and bare descriptors --------------------------------------------------------------


def reduce_raw(raw: io.FileIO) -> Reduced:
    check_subclass(raw, io.FileIO)
    fd = open_number(raw)
    check_access(fd, raw, readable=raw.readable(), writable=raw.writable())
    return rebuild_raw, (type(raw), hand_over(fd, raw), raw.mode), attributes(raw)


def rebuild_raw(cls: type[io.FileIO], index: int, mode: str) -> io.FileIO:
    """A raw file on descriptor `index`; neither offset nor contents are touched, whatever the mode."""
    dealt = incoming()
    fd = dealt.number(index)
    if "a" not in mode or not _seekable(fd):
        raw = cls(fd, mode)
        dealt.settle(index, raw)
        return raw
    # FileIO(fd, "ab") seeks to the end, and the offset is shared with the sender. So let it seek the null
    # device, and put the real file under it afterwards.
    with StandIn(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) as spare:
        raw = cls(spare.fd, mode)
        spare.become(fd)
    dealt.settle(index, raw)
    os.close(fd)
    return raw


def _seekable(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True


def reduce_fd(handle: Fd) -> Reduced:
    check_subclass(handle, Fd)
    fd = open_number(handle)
    if not handle.reopen:
        return rebuild_fd, (type(handle), hand_over(fd, handle)), attributes(handle)
    private = _reopened(fd, handle)
    try:
        return rebuild_fd, (type(handle), hand_over(private, handle)), attributes(handle)
    finally:
        os.close(private)


def _reopened(fd: int, handle: Fd) -> int:
    """A new open file description of the same file, with the same access; the caller's to close."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise refusal(
                handle, "reopen=True is for regular files; a private offset means nothing for others"
            )
        # Not all flags: F_GETFL also gives O_TMPFILE back, which on open(2) means another thing.
        keep = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & keep
        return above_stdio(os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC))
    except OSError as error:
        raise refusal(handle, f"it cannot be opened anew: {error}") from error


def rebuild_fd(cls: type[Fd], index: int) -> Fd:
    """An `Fd` that owns descriptor `index`."""
    dealt = incoming()
    handle = cls.take(dealt.number(index))
    dealt.settle(index, handle)
    return handle


# -- buffered and text files ---------------------------------------------------------------------

Buffered = io.BufferedReader | io.BufferedWriter | io.BufferedRandom
_BUFFERED = (io.BufferedRandom, io.BufferedReader, io.BufferedWriter)


def _settle_writes(file: Any) -> None:
    """Flush, so that the bytes written here land before those that the receiver writes (M29)."""
    check_open(file)
    if not file.writable():
        return
    try:
        file.flush()
    except OSError as error:
        raise refusal(file, f"what it has buffered cannot be written: {error}") from error


def reduce_buffered(file: Buffered) -> Reduced:
    check_subclass(file, next(kind for kind in _BUFFERED if isinstance(file, kind)))
    _settle_writes(file)
    if not isinstance(file, io.BufferedWriter):
        if file.seekable():
            _textfile.sync_buffer(file)
        elif _textfile.has_unread(file):
            raise refusal(file, "bytes already read into its buffer would be lost, and it cannot seek back")
    return rebuild_layer, (type(file), file.raw, _textfile.buffer_size(file)), attributes(file)


def reduce_text(file: io.TextIOWrapper) -> Reduced:
    check_subclass(file, io.TextIOWrapper)
    _settle_writes(file)
    cookie = 0
    if file.readable() and file.seekable():
        try:
            cookie = file.tell()
            file.seek(cookie)
        except OSError as error:  # "telling position disabled by next() call", "can't reconstruct ..."
            raise refusal(
                file, f"its position is unknown while it is being iterated over, use readline() ({error})"
            ) from error
    newline, unread = _textfile.newline_and_unread(file)
    if unread and file.readable() and not file.seekable():
        raise refusal(
            file, "it has been read from, so characters may be in its buffer, and it cannot seek back"
        )
    settings = (file.buffer, file.encoding, file.errors, newline, file.line_buffering, file.write_through)
    if cookie and (cookie >> 64 or _textfile.begins_with_state(file.encoding)):
        # More than an offset: the decoder is in another state than a new one (UTF-16 knows its byte order by
        # now, and would miss the mark). Only seek() can set that.
        return rebuild_mid_text, (cookie, type(file), *settings), attributes(file)
    return rebuild_layer, (type(file), *settings), attributes(file)


def rebuild_layer(cls: Callable[..., Any], *settings: Any) -> Any:
    """A buffered or text file. Known to the load, so that it is closed if the load fails later on: collected
    unclosed, it would be a ResourceWarning that nobody can act on."""
    file = cls(*settings)
    if current.incoming is not None:
        current.incoming.rebuilt.append(file)
    return file


def rebuild_mid_text(cookie: int, *settings: Any) -> Any:
    """A text file whose decoder goes on in the middle, as `tell()` put it into `cookie`."""
    file = rebuild_layer(*settings)
    file.seek(cookie)
    return file


# -- temporary files -----------------------------------------------------------------------------


def reduce_named_temporary(wrapper: Any) -> Reduced:
    """The file and its name; deleting it stays the business of the process that made it."""
    check_subclass(wrapper, sys.modules["tempfile"]._TemporaryFileWrapper)
    return rebuild_named_temporary, (type(wrapper), wrapper.file, wrapper.name)


def rebuild_named_temporary(cls: Callable[..., Any], file: Any, name: Any) -> Any:
    return cls(file, name, delete=False)


def reduce_spooled(spooled: Any) -> Reduced:
    """Rolled over to a real file first: a copy of what is still in memory would take the worker's writes
    with it, and the caller would never see them."""
    if spooled.closed:
        raise refusal(spooled, "it is closed")
    spooled.rollover()
    return copyreg.__newobj__, (type(spooled),), vars(spooled)  # type: ignore[attr-defined]
