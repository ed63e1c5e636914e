"""The memory file of a large payload: how its bytes and buffers are laid out, written and mapped.

Layout, from offset 0: the pickle; at the next multiple of 8, one u64 length per buffer; then each buffer,
page-aligned so that an array in it is as aligned as one from malloc. All little-endian. The message itself
holds only `HEAD`: the pickle's length and the number of buffers.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from . import _platform
from ._clock import CLOCK
from .fds import above_stdio, mapped

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = struct.Struct("<QQ")

_PAGE = mmap.PAGESIZE
_NOTHING = bytes(_PAGE)
_IOV_MAX = 1024  # Linux's UIO_MAXIOV, and POSIX's largest _XOPEN_IOV_MAX in use
_F_GET_SEALS = 1034  # fcntl(2), as in _platform

Bytes = bytes | bytearray | memoryview


def write(
    chunks: Sequence[Bytes], buffers: Sequence[memoryview], fresh: bool = False
) -> tuple[int, bytes, mmap.mmap | None]:
    """A memory file that holds a pickle (in chunks) and its buffers.

    Args:
        fresh: it must not have been used before, as it is to be sealed against writing: a child that was forked
            meanwhile may have it mapped.

    Returns:
        Its descriptor, the caller's to close, the body for the message, and if the file was used before, a mapping to
        fill it by: to be given to `recycle` with the descriptor, or dropped.

    Raises:
        OSError: the file cannot be made or filled (EMFILE, ENOSPC, EFBIG); nothing is left open.
    """
    pickled = sum(map(len, chunks))
    pieces: list[Bytes] = list(chunks)
    end = pickled
    if buffers:
        table = struct.pack(f"<{len(buffers)}Q", *[buffer.nbytes for buffer in buffers])
        end = _pad(pieces, end, 8)
        pieces.append(table)
        end += len(table)
    for buffer in buffers:
        end = _pad(pieces, end, _PAGE)
        pieces.append(buffer)
        end += buffer.nbytes
    kept = None if fresh else _take_kept(end)
    fd, mapping = (_acquire(), None) if kept is None else kept
    try:
        if mapping is None and kept is not None:
            mapping = _map_to_fill(fd)
        if mapping is not None:
            _copy_all(mapping, pieces)
        else:
            _write_all(fd, pieces)
            if kept is None:
                _platform.seal(fd, _platform.SEAL_SHRINK | _platform.SEAL_GROW)
    except OSError as error:
        _release(fd)
        raise OSError(
            error.errno, f"no room for a payload of {end} bytes in memory: {error.strerror}"
        ) from error
    except BaseException:
        _release(fd)
        if mapping is not None:
            mapping.close()  # or it would live as long as the traceback
        raise
    return fd, HEAD.pack(pickled, len(buffers)), mapping


def read(body: Bytes, fd: int, writable: bool = True) -> tuple[memoryview, list[memoryview]]:
    """The pickle and the buffers in the memory file `fd`, which stays the caller's to close at once.

    The views are private to this process, and writable unless told otherwise: what is written to them is copied
    first, page by page.
    The mapping lives as long as any view of it. Before Python 3.13 it also holds a duplicate of `fd` (`mmap` keeps one
    for its `resize`); so where many live, or no descriptor is left, it is of a copy.

    Raises:
        ValueError: the lengths in `body` do not fit the file. That is checked before anything is mapped, as
            touching a page beyond the end would be SIGBUS.
        OSError: the file cannot be mapped.
    """
    if len(body) != HEAD.size:
        raise ValueError(f"the head of a memory file has {HEAD.size} bytes, not {len(body)}")
    pickled, count = HEAD.unpack(body)
    size = os.fstat(fd).st_size
    table = _aligned(pickled, 8)
    if not 0 < pickled <= size or (count and table + 8 * count > size):
        raise ValueError(
            f"a memory file of {size} bytes cannot hold a pickle of {pickled} and {count} buffers"
        )
    lengths: Sequence[int] = ()
    if count:
        lengths = struct.unpack(f"<{count}Q", os.pread(fd, 8 * count, table))
    spans = []
    end = table + 8 * count if count else pickled
    for length in lengths:
        start = _aligned(end, _PAGE)
        end = start + length
        spans.append((start, end))
    if end > size:
        raise ValueError(f"buffers reach to {end}, but the memory file has {size} bytes")
    view = memoryview(_map(fd, end, writable))
    return view[:pickled], [view[start:stop] for start, stop in spans]


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _pad(pieces: list[Bytes], end: int, to: int) -> int:
    """Fill up to the next multiple of `to`: zeros in the same writev are cheaper than a second call."""
    start = _aligned(end, to)
    if start != end:
        pieces.append(memoryview(_NOTHING)[: start - end])
    return start


def _acquire() -> int:
    """A memory file to fill. This and `_release` are the only two places that know where such come from."""
    return above_stdio(_platform.anonymous_file("fdpool-payload"))


def _release(fd: int) -> None:
    os.close(fd)


def _write_all(fd: int, pieces: Sequence[Bytes]) -> None:
    """Write `pieces` one after another from offset 0.

    writev measured 1.2 to 1.5 times faster than copying into a shared mapping of the new file, at every size
    from 1 KiB to 64 MiB: a write faults no pages in. It may be short (Linux stops at 0x7ffff000 bytes).
    """
    views = [view for piece in pieces if (view := memoryview(piece)).nbytes]
    offset = first = 0
    while first < len(views):
        wrote = os.pwritev(fd, views[first : first + _IOV_MAX], offset)
        offset += wrote
        while first < len(views) and wrote >= views[first].nbytes:
            wrote -= views[first].nbytes
            first += 1
        if wrote:
            views[first] = views[first][wrote:]


#: Those that hold a descriptor each, and how many there may be: fewer than `_budget` leaves to others. Who keeps the
#: arrays of a thousand results would have no descriptor left.
_holding: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_MOST_HOLDING = 16


def _map(fd: int, length: int, writable: bool) -> mmap.mmap:
    if not writable:  # a shared object's, which is one for all, and not the task's own
        return mapped(fd, length, mmap.MAP_PRIVATE, writable=False)
    mapping = _mapped_if_room(fd, length) if len(_holding) < _MOST_HOLDING else None
    if mapping is None:
        mapping = _copied(fd, length)
    if _first.mapping is None:
        _first.mapping, _first.forks = weakref.ref(mapping), _forks
    return mapping


def _mapped_if_room(fd: int, length: int) -> mmap.mmap | None:
    try:
        mapping = mapped(fd, length, mmap.MAP_PRIVATE)
    except OSError as error:
        if error.errno == errno.EMFILE:
            return None
        raise
    if sys.version_info < (3, 13):
        _holding.add(mapping)
    return mapping


def _copied(fd: int, length: int) -> mmap.mmap:
    """What `_mapped` gives, in memory that no file is behind."""
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE)
    with memoryview(mapping) as view:
        at = 0
        while at < length:
            wrote = os.preadv(fd, [view[at:]], at)
            if not wrote:
                raise ValueError(f"the memory file ends at {at}, before {length}")
            at += wrote
    return mapping


# -- files used again ---------------------------------------------------------------------------------------------
#
# To fill a fresh one of 64 MiB takes 26 ms, as the kernel clears every page; to write to it again, 16; to map it and
# copy, 9; and to copy to where it is mapped, 6, as any copy does.


class _First(threading.local):
    """The first mapping that this thread has made since it was asked to watch, and how often this process had forked
    before."""

    mapping: weakref.ref[mmap.mmap] | None = None
    forks = 0


_first = _First()
_forks = 0

#: Files to be filled again: their size, their descriptor, when they are to be closed, and where they are mapped.
#: Changed by single calls.
_kept: list[tuple[int, int, float, mmap.mmap | None]] = []
_MOST_KEPT = 4
_LARGEST_KEPT = 256 << 20
KEEP_S = 5.0

#: The interpreter lock is held meanwhile, 3 ms. Of 16 MiB or less memcpy(3) goes by way of the caches, and
#: takes 1.7 times as long.
_COPIED_AT_ONCE = 32 << 20


class Watch:
    """Tells whether anybody can still see the memory that this thread maps first: what it comes with may load others,
    as it is made."""

    __slots__ = ("_forks", "_mapping")

    def __init__(self) -> None:
        _first.mapping = None
        self._mapping: weakref.ref[mmap.mmap] | None = None
        self._forks = 0

    def loaded(self) -> None:
        """It is mapped now."""
        self._mapping, self._forks = _first.mapping, _first.forks

    def is_over(self) -> bool:
        """True if the mapping is gone, and no child was forked that may have it."""
        return self._mapping is not None and self._mapping() is None and self._forks == _forks


def recycle(fd: int, mapping: mmap.mmap | None = None) -> bool:
    """Keep a memory file, which nobody else maps any more, for the next payload; False if it is closed instead.

    Takes `fd`, and the `mapping` that `write` returned with it.
    """
    size = os.fstat(fd).st_size
    if len(_kept) >= _MOST_KEPT or size + sum(entry[0] for entry in _kept) > _LARGEST_KEPT:
        _release(fd)
        return False
    _kept.append((size, fd, CLOCK.monotonic() + KEEP_S, mapping))
    return True


def expires_at() -> float | None:
    """When `expire` is due, or None."""
    return min((entry[2] for entry in list(_kept)), default=None)


def expire(now: float | None = None) -> None:
    """Close the files that nobody wanted for a while; or all."""
    for entry in list(_kept):
        if now is None or entry[2] <= now:
            try:
                _kept.remove(entry)
            except ValueError:
                continue  # just taken
            _release(entry[1])


def _take_kept(size: int) -> tuple[int, mmap.mmap | None] | None:
    """One that is large enough, and not far too large, and where it is mapped, if it is."""
    for entry in sorted(_kept):
        if size <= entry[0] <= 2 * size:
            try:
                _kept.remove(entry)
            except ValueError:
                continue
            return entry[1], entry[3]
    return None


#: Where used files are mapped in this process. Of a forked child they are none of its business.
_mapped_to_fill: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def _map_to_fill(fd: int) -> mmap.mmap | None:
    """All of a file that was filled before, mapped with all its pages; None if that cannot be.

    A file that is not sealed is left alone: who has its descriptor could cut it, and we would die of SIGBUS. (As we
    would if what is copied is a mapping, too, whose file was cut; but so does whoever looks at that.) And there are
    never more than a few: before Python 3.13 each holds a descriptor that nobody has counted.
    """
    if len(_mapped_to_fill) >= _MOST_KEPT:
        return None
    try:
        if not fcntl.fcntl(fd, _F_GET_SEALS) & _platform.SEAL_SHRINK:
            return None
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapping = mapped(fd, os.fstat(fd).st_size, flags)
    except OSError:
        return None  # EINVAL: a plain file; EMFILE; ENOMEM
    _mapped_to_fill.add(mapping)
    return mapping


def _copy_all(mapping: mmap.mmap, pieces: Sequence[Bytes]) -> None:
    """`_write_all` by way of a mapping."""
    at = 0
    with memoryview(mapping) as target:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, view.nbytes, _COPIED_AT_ONCE):
                part = view[start : start + _COPIED_AT_ONCE]
                target[at : at + part.nbytes] = part
                at += part.nbytes


def _count_fork() -> None:
    global _forks
    _forks += 1


def _forget_in_child() -> None:
    """Runs in: a forked child. What it could write to are the arguments of the parent's tasks."""
    expire()
    for mapping in list(_mapped_to_fill):
        try:
            mapping.close()
        except BufferError:
            continue  # a thread of the parent's, which is not here, was just copying


os.register_at_fork(after_in_parent=_count_fork, after_in_child=_forget_in_child)


def seal_for_good(fd: int) -> None:
    """Let nobody write to the file any more, nor lift that."""
    _platform.seal(fd, _platform.SEAL_WRITE | _platform.SEAL_SEAL)
