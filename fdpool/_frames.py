"""A stream's frames, with no socket: u32 little-endian payload length, payload, descriptors on the first bytes.

They hold what has half come or half gone, so that a caller that stops waiting, for whatever reason, loses
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import json

from .errors import PayloadTooLarge, WireError
from .fds import HasFileno, OwnedFds, close_all, descriptor_number, duplicate
from .wire import CTRUNC, MALLOC_BYTES, Bytes, Raw, descriptors_in, fds_lost

#: The default `max_bytes` of a stream.
STREAM_MAX_BYTES = 64 * 2**20
HEADER_BYTES = 4

_MANY_PIECES, _SMALL_BYTES = 1024, 1024


class _Incoming:
    """A frame that is arriving: its bytes and descriptors so far."""

    __slots__ = ("arrived", "fds", "gathered", "got_fds", "have", "header", "lost", "pieces", "size")

    def __init__(self) -> None:
        self.arrived: list[Raw] = []  # received, not yet looked at
        self.header = b""
        self.size = -1  # of the payload; unknown until the header is whole
        self.pieces: list[bytes] = []
        self.gathered = 0  # so many pieces at the beginning have been looked at by `_gather`
        self.have = 0  # bytes in the pieces
        self.fds: list[int] = []  # owned; the reader closes them
        self.got_fds = 0  # all that came, also those closed again at once
        self.lost = False


class FrameReader:
    """Puts frames together from whatever pieces the stream gives; no socket in it.

    Use: read into `arrived` at most as many bytes as `missing()` says, until it says 0; then look at
    `payload()` and `take()` the descriptors, which ends the frame. It never asks for more than the rest
    of one frame: a read that spanned two could bring the later one's descriptors along with bytes of
    the earlier (M6). So descriptors belong to the frame being read, on whichever of its bytes they ride.

    Of a frame that brings too many descriptors, or has lost some, all are closed on arrival, and the
    error is raised once its last byte has come: the stream stays in step, and the next frame can be
    read. An end of stream, or a length above the limit, is final: every later call raises it again.

    Attributes:
        max_fds: most descriptors of a frame; may be changed. What has been closed of one that is arriving is gone.
    """

    __slots__ = ("_current", "_ended", "_max_bytes", "max_fds")

    def __init__(self, max_bytes: int, max_fds: int) -> None:
        self._max_bytes = max_bytes
        self.max_fds = max_fds
        self._current = _Incoming()
        self._ended: Exception | None = None

    @property
    def arrived(self) -> list[Raw]:
        """Where results of `recvmsg` go, one at a time, before `missing()` is called again."""
        return self._current.arrived

    @property
    def between_frames(self) -> bool:
        """True if nothing of a frame has been read, or nothing more will come."""
        current = self._current
        return self._ended is not None or not (current.arrived or current.header)

    def missing(self) -> int:
        """How many bytes to read now; 0 if a frame is whole.

        Raises:
            EOFError: the stream has ended; the text names where.
            WireError: an impossible length (final), or too many descriptors (only this frame).
            FdTransferError: the kernel lost descriptors of this frame.
        """
        if self._ended is not None:
            raise type(self._ended)(*self._ended.args)
        current = self._current
        if current.arrived:
            if not current.arrived[0][0]:
                self._end(EOFError(self._where(current)))
            self._own(current)
            if len(current.pieces) - current.gathered >= _MANY_PIECES:
                self._gather(current)
        # Each step looks at the state, as a signal handler may have raised after any call before.
        unacceptable = current.lost or current.got_fds > self.max_fds
        if unacceptable:
            self._close_fds(current)
        if current.size < 0:
            if len(current.header) < HEADER_BYTES:
                return HEADER_BYTES - len(current.header)
            current.size = self._announced(current)
        if current.have < current.size:
            # In pieces, so that memory follows what came and not what was announced.
            return min(current.size - current.have, MALLOC_BYTES)
        if unacceptable:
            error, fresh = self._complaint(current), _Incoming()
            self._current = fresh
            raise error
        return 0

    def payload(self) -> bytes:
        """The payload of the whole frame, which stays until `take`."""
        return b"".join(self._current.pieces)

    def take(self) -> list[int]:
        """End the frame: its descriptors, now the caller's."""
        fresh = _Incoming()
        done = self._current
        # From here to the return nothing is called: see the module's note on signals.
        self._current = fresh
        return done.fds

    def close(self) -> None:
        """Close the descriptors of a frame that will not be finished."""
        current = self._current
        if current.arrived:
            self._own(current)
        self._close_fds(current)

    def __del__(self) -> None:
        if hasattr(self, "_current"):  # else a signal handler has raised as it was made
            self.close()

    def _announced(self, current: _Incoming) -> int:
        size = int.from_bytes(current.header, "little")
        if size > self._max_bytes:
            limit = f"the limit max_bytes={self._max_bytes}"
            self._end(
                WireError(f"a frame announces {size} bytes, above {limit}; the stream cannot be read on")
            )
        return size

    def _complaint(self, current: _Incoming) -> Exception:
        if current.got_fds <= self.max_fds:
            lost = fds_lost(current.got_fds, "frame")
            lost.data = b"".join(current.pieces)
            return lost
        limit = f"the limit max_fds={self.max_fds}"
        return WireError(
            f"a frame came with {current.got_fds} descriptors, above {limit}; all have been closed"
        )

    @staticmethod
    def _gather(current: _Incoming) -> None:
        """Join the last pieces if they are small: each takes 33 bytes more, and a hostile peer sends single bytes."""
        tail = b"".join(current.pieces[current.gathered :])
        if len(tail) <= _MANY_PIECES * _SMALL_BYTES:
            current.pieces[current.gathered :] = [tail]
        current.gathered = len(current.pieces)

    @staticmethod
    def _close_fds(current: _Incoming) -> None:
        fds, current.fds = current.fds, []
        close_all(fds)

    @staticmethod
    def _own(current: _Incoming) -> None:
        """Move what arrived into the frame."""
        data, ancillary, flags, _ = current.arrived[0]
        fds, strays = descriptors_in(ancillary) if ancillary else ([], [])
        unwanted = OwnedFds() if strays else None
        header = current.header + data if current.size < 0 else current.header
        pieces = [data] if current.size >= 0 else []
        have = current.have + len(data) if current.size >= 0 else 0
        got_fds = current.got_fds + len(fds)
        # From here to the `del` nothing is called: all of it happens, or none.
        current.header = header
        current.pieces += pieces
        current.have = have
        current.fds += fds
        current.got_fds = got_fds
        current.lost = current.lost or flags & CTRUNC != 0
        if unwanted is not None:
            unwanted.numbers = strays
        del current.arrived[:]
        if unwanted is not None:
            unwanted.close()

    def _end(self, error: Exception) -> NoReturn:
        self._ended = error
        self._close_fds(self._current)
        raise type(error)(*error.args)  # another one: what is kept must not keep its callers by their frames

    @staticmethod
    def _where(current: _Incoming) -> str:
        have, size, part = current.have, current.size, "payload"
        if size < 0:
            have, size, part = len(current.header), HEADER_BYTES, "header"
            if not have:
                return "the stream ended between frames"
        return f"the stream ended inside a frame's {part}, after {have} of {size} bytes"


class OutgoingFrame:
    """A frame on its way out.

    Attributes:
        sent: every count that `sendmsg` returned for it. Progress is only ever derived from these, so
            that a count which C has appended cannot be forgotten, or reckoned twice.
        error: why it was dropped; another thread may have found out while it sent the backlog.
    """

    __slots__ = ("_fds", "_header", "_owned", "_payload", "error", "sent")

    def __init__(self, payload: bytes, fds: list[int]) -> None:
        self._header = len(payload).to_bytes(HEADER_BYTES, "little")
        self._payload = payload
        self._fds = fds
        self._owned: OwnedFds | None = None
        self.sent: list[int] = []
        self.error: OSError | None = None

    @property
    def done(self) -> bool:
        """True once the last byte has been sent."""
        return sum(self.sent) == HEADER_BYTES + len(self._payload)

    @property
    def queued(self) -> bool:
        """True if `keep` was called: nobody waits for it."""
        return self._owned is not None

    def keep(self) -> None:
        """Duplicate what was borrowed, so that the caller may close his own before the frame has gone."""
        owned = OwnedFds()
        for fd in self._fds:
            owned.numbers.append(duplicate(fd))
        self._owned = owned
        self._fds = owned.numbers

    def release(self) -> None:
        """Close the duplicates; the kernel holds the descriptors of a frame begun."""
        if self._owned is not None:
            self._owned.close()

    def rest(self) -> tuple[list[memoryview | bytes], list[int]]:
        """What is still to be sent. Descriptors go with the first byte, so only a frame not begun has any."""
        sent = sum(self.sent)
        if not sent:
            return [self._header, self._payload], self._fds
        self.release()
        if sent < HEADER_BYTES:
            return [self._header[sent:], self._payload], []
        return [memoryview(self._payload)[sent - HEADER_BYTES :]], []


class FrameWriter:
    """The frames still to be sent, in order; no socket in it.

    Attributes:
        backlog: the first may be half sent; every other is untouched.
    """

    __slots__ = ("_max_bytes", "_max_fds", "backlog")

    def __init__(self, max_bytes: int, max_fds: int) -> None:
        self._max_bytes = max_bytes
        self._max_fds = max_fds
        self.backlog: list[OutgoingFrame] = []

    def frame(self, payload: Bytes, fds: Iterable[int | HasFileno] = ()) -> OutgoingFrame:
        """A frame with `fds` borrowed, checked against the limits and not yet in the backlog.

        Raises:
            PayloadTooLarge: above `max_bytes` or `max_fds`; the text names the limit.
        """
        check_size(memoryview(payload).nbytes, self._max_bytes)
        numbers = checked_descriptors(fds, self._max_fds)
        # A copy of what the caller could change: the rest of a half-sent frame must fit its beginning.
        return OutgoingFrame(payload if type(payload) is bytes else bytes(payload), numbers)

    def withdraw(self, frame: OutgoingFrame) -> None:
        """Take a frame out again, unless a byte of it has been sent."""
        if not frame.sent and frame in self.backlog:
            self.backlog.remove(frame)
            frame.release()

    def close(self) -> None:
        """Drop the backlog."""
        while self.backlog:
            self.backlog.pop().release()


def checked_descriptors(fds: Iterable[int | HasFileno], max_fds: int) -> list[int]:
    """The numbers of `fds`, borrowed; PayloadTooLarge if they are more than `max_fds`."""
    numbers = [descriptor_number(fd) for fd in fds] if fds else []
    if len(numbers) > max_fds:
        raise PayloadTooLarge(
            f"{len(numbers)} descriptors are above the limit of a message, max_fds={max_fds}"
        )
    return numbers


def check_size(size: int, max_bytes: int) -> None:
    """PayloadTooLarge if `size` bytes are above `max_bytes`."""
    if size > max_bytes:
        raise PayloadTooLarge(f"{size} bytes are above the limit of a message, max_bytes={max_bytes}")


def encode_json(message: object) -> bytes:
    """`message` as compact JSON in UTF-8.

    Raises:
        TypeError, ValueError: it has no JSON form. NaN and infinity have none: other languages refuse them.
    """
    import json  # here: it costs 5 ms of start-up, and the pool's own frames are no JSON

    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def decode_json(payload: bytes) -> Any:
    """The message in a frame.

    Raises:
        WireError: the payload is not JSON in UTF-8 (or is nested too deeply). NaN and infinity are not.
    """
    try:
        return _decoder().decode(payload.decode())
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame of {len(payload)} bytes is not JSON: {error}") from error


@functools.cache
def _decoder() -> json.JSONDecoder:
    """Made once: 3 us."""
    import json

    return json.JSONDecoder(parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number there")


def as_is(payload: bytes) -> bytes:
    return payload
