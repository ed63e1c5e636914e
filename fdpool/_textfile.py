"""What CPython's buffered and text files do not say of themselves: unread bytes, buffer size, newline mode.

None of it has a public name, so each answer here is the way round that works on CPython 3.10 to 3.14, with
what happens where it does not.
"""

from __future__ import annotations

import codecs
import functools
import gc
import io
from _thread import get_ident
from typing import Any


def sync_buffer(file: io.BufferedReader | io.BufferedRandom) -> None:
    """Put the descriptor's offset where the reader has got to, so that the receiver reads on from there.

    `seek(tell())` is not enough: BufferedReader.seek only moves within its buffer if the target is in there
    (measured: the offset stays at 8192). One byte past the buffer is outside, and drops it.
    """
    here = file.tell()
    ahead = file.raw.tell()
    if ahead != here:
        file.seek(ahead + 1)
        file.seek(here)


def has_unread(file: io.BufferedReader | io.BufferedRandom) -> bool:
    """True if the reader holds bytes that it has read and not given out; reads nothing, and so never waits.

    `peek` alone would read from an empty buffer, and block on a pipe. It calls `raw.readinto`, found like any
    attribute, so for the time of the call this object gets one of its own that says "nothing there now", to
    this thread; to others it is the real one. (A thread that is inside a read holds the file's lock, and is
    waited for: who reads a file while handing it over gets what they ask for.)
    """
    raw: Any = file.raw
    here = get_ident()
    genuine = raw.readinto

    def nothing_now(buffer: Any) -> int | None:
        count: int | None = None if get_ident() == here else genuine(buffer)
        return count

    try:
        raw.readinto = nothing_now
    except AttributeError:
        return False  # a raw object without a __dict__ is none of ours: it is pickled by its own rules
    try:
        return bool(file.peek(1))
    finally:
        del raw.readinto


def buffer_size(file: io.BufferedReader | io.BufferedWriter | io.BufferedRandom) -> int:
    """How large a buffer the file was opened with: `__sizeof__` counts it on top of the object's own size."""
    size = file.__sizeof__() - type(file).__basicsize__
    return size if 0 < size < 1 << 40 else io.DEFAULT_BUFFER_SIZE


def newline_and_unread(file: io.TextIOWrapper) -> tuple[str | None, bool]:
    """The `newline` that a text file was opened with, and whether it holds text it has read.

    Both are fields of the C struct without a getter. But the garbage collector is shown them
    (`textiowrapper_traverse` in Modules/_io/textio.c visits, in this order: buffer, encoding, encoder,
    decoder, readnl, decoded_chars, pending_bytes, snapshot, errors): `readnl` is what was given as `newline`,
    NULL for None, and `decoded_chars` the text decoded last. A reader's decoder tells the two apart: it is an
    IncrementalNewlineDecoder for None and "", and for no other. Checked on 3.10 to 3.13. Where the referents
    look otherwise, `newline` is taken for None, the default of `open`, and the file for read.

    How much of the decoded text has been given out is not shown, so True means "perhaps". After a `seek`,
    or a `read` to the end, there is none.
    """
    texts: list[str] = []
    decoder: Any = None
    for referent in gc.get_referents(file):
        if type(referent) is str and referent is not file.encoding and referent is not file.errors:
            texts.append(referent)
        elif (
            hasattr(referent, "decode") and hasattr(referent, "getstate") and not hasattr(referent, "encode")
        ):
            decoder = referent
    if decoder is None:  # write only
        return (texts[0] if texts and texts[0] in ("", "\n", "\r", "\r\n") else None), False
    pending, flags = decoder.getstate()
    if isinstance(decoder, io.IncrementalNewlineDecoder):
        held_back = bool(flags & 1)  # a "\r" that may be the first half of "\r\n"
        newline = "" if texts and texts[0] == "" else None
        texts = texts[1:] if newline == "" else texts
    else:
        held_back = False
        newline = texts.pop(0) if texts and texts[0] in ("\n", "\r", "\r\n") else None
    return newline, bool(texts or pending or held_back)


@functools.cache
def begins_with_state(encoding: str) -> bool:
    """True if a decoder of `encoding` waits for something at the start: a byte order mark."""
    return codecs.getincrementaldecoder(encoding)().getstate() != (b"", 0)
