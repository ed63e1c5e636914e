"""Objects to payloads: one pickler per thread, what it fills, and the payload that is made of it.

Plain C pickle does the work, with a table of the kinds that own descriptors (`_reducers`). Only what it
cannot do, or would do by reference to a module that the other side does not have, is done again with
cloudpickle, which costs 4 to 15 times as much. What is too large for a message goes to a memory file
(`_spill`).
"""

from __future__ import annotations

import pickle
import sys
from mmap import mmap
from types import CodeType
from typing import TYPE_CHECKING, Any

from . import _by_value, _caches, _frozen, _reducers, _spill
from ._placement import Outgoing, chain, current, drop_tracebacks
from .errors import FdpoolError, PayloadTooLarge
from .fds import SCM_MAX_FD, OwnedFds, duplicate

if TYPE_CHECKING:
    from collections.abc import Callable

#: Larger payloads go to a memory file. Measured there and back, inline against memfd, in us: 24 / 76 for
#: 4 KiB, 40 / 87 for 32, 59 / 105 for 64, 106 / 153 for 128. So inline wins as far as a datagram reaches, but
#: a socket's queue holds 208 KiB (SO_SNDBUF), and three is as few as a busy slot should have room for.
SPILL_BYTES = 64 * 1024

#: Protocol-5 buffers from a page on stay out of band. Measured, 200 arrays there and back: of 4 KiB each, 2.6 ms
#: against 5.0 in band; of 32 KiB, 7.6 against 20.5.
_OUT_OF_BAND = 4 * 1024

#: What can hold a reference to a module is at the beginning of a chunk: the C pickler ends a frame as it has 64 KiB.
#: Behind that may be the last thing in it, a huge integer; and large bytes and strings are chunks by themselves.
_SEARCHED = 128 * 1024

#: A pickler that has made more than this is not kept: its memo, a table, never shrinks, and each time that it is
#: used all of it is cleared: after a million strings that took 11 ms, after these 10 µs at most.
_KEPT_BYTES = 16 * 1024

Bytes = bytes | bytearray | memoryview


class Payload:
    """One object, ready to be sent.

    Attributes:
        body: what goes into the message, after its header.
        fds: the descriptors that go with it, in order, owned by the payload; None if there are none. When
            spilled, the first is the memory file.
        spilled: True if `body` is only the head, and the rest is in the memory file.
        lent: how many of the other descriptors are of shared objects.
        mapping: where the memory file is mapped, for `_spill.recycle`, or None; owned.
    """

    __slots__ = ("body", "fds", "lent", "mapping", "spilled")

    def __init__(
        self,
        body: bytes,
        fds: OwnedFds | None = None,
        spilled: bool = False,
        lent: int = 0,
        mapping: mmap | None = None,
    ) -> None:
        self.body = body
        self.fds = fds
        self.spilled = spilled
        self.lent = lent
        self.mapping = mapping

    @property
    def carries_fds(self) -> bool:
        """True if there are descriptors of the user's among its own."""
        return self.fds is not None and len(self.fds) > self.spilled + self.lent

    def copy(self) -> Payload:
        """Another of the same, with duplicates of the descriptors.

        Raises:
            OSError: no descriptor is left (EMFILE).
        """
        if self.fds is None:
            return Payload(self.body)
        owned = OwnedFds()
        try:
            for number in self.fds.numbers:
                owned.numbers.append(duplicate(number))
        except BaseException:
            owned.close()
            raise
        return Payload(self.body, owned, self.spilled, self.lent)

    def close(self) -> None:
        """Close the descriptors and the mapping that it still owns; safe to call again."""
        mapping, self.mapping = self.mapping, None  # first: closing it lets other threads go on
        if mapping is not None:
            mapping.close()
        if self.fds is not None:
            self.fds.close()

    def __repr__(self) -> str:
        spilled = ", spilled" if self.spilled else ""
        return f"<Payload of {len(self.body)} bytes and {len(self.fds or ())} descriptors{spilled}>"


class _Sink:
    """The file that a pickler writes to: it keeps the chunks, and does not copy large bytes."""

    __slots__ = ("write",)

    def __init__(self, write: Callable[[Any], Any]) -> None:
        self.write = write


class Encoder(Outgoing):
    """A thread's pickler with all that it fills; kept, as making one costs nearly as much as a small payload does.

    Attributes:
        refused: what `try_plainly` was asked for last is not for plain pickle.
    """

    __slots__ = (
        "buffers",
        "busy",
        "chunks",
        "fresh",
        "in_band",
        "outer",
        "pickler",
        "refused",
        "sink",
        "spill_bytes",
    )

    def __init__(self, outer: Outgoing | None) -> None:
        super().__init__(SCM_MAX_FD)
        self.busy = False
        self.outer = outer
        self.spill_bytes = SPILL_BYTES
        self.fresh = False
        self.chunks: list[Bytes] = []
        self.buffers: list[memoryview] = []
        self.in_band = 0
        self.sink = _Sink(self.chunks.append)
        self.pickler: pickle.Pickler | None = None
        self.refused = False

    def try_plainly(self, obj: object) -> Payload | None:
        """What `encode` does where all is simple: 2 microseconds, against 3.3. None if it is not, and nothing has
        happened."""
        pickler = self.pickler
        self.refused = False
        if pickler is None or self.busy or _reducers.is_stale():
            return None
        chunks = self.chunks
        self.busy = self.refused = True
        simple = small = False
        try:
            pickler.dump(obj)
            body = chunks[0]
            small = len(chunks) == 1 and len(body) <= _KEPT_BYTES
            if small and type(body) is bytes and not self.fds and not self.buffers and not self.in_band:
                simple = True
                return None if _refers_to_values(body) else Payload(body)
            return None if any(map(_needs_values, chunks)) else self.pack()
        except Exception:
            return None  # `encode` will meet it again, and explain
        finally:
            if small:
                pickler.clear_memo()
            else:
                self.pickler = None
            if simple:
                chunks.clear()
            else:
                self.clear()
            self.busy = False

    def fill(self, obj: object) -> None:
        """Fill chunks, buffers and descriptors from `obj`, with plain pickle if that will do."""
        if not self.fill_plainly(obj):
            self.fill_by_value(obj)

    def fill_by_value(self, obj: object) -> None:
        """`fill` with cloudpickle, after `fill_plainly` has said no."""
        self.clear()
        _reducers.refresh()
        pickler = _cloud_pickler()(self.sink, protocol=5, buffer_callback=self.keep)
        pickler.dump(obj)
        if pickler.froze and any(map(_frozen.may_assign, pickler.parts)):
            # To globals that one which was pickled for itself may be there to see.
            self.clear()
            pickler = _cloud_pickler()(self.sink, protocol=5, buffer_callback=self.keep)
            pickler.freezes = False
            pickler.dump(obj)
        for part in pickler.parts:
            _frozen.note(part, pickled_by_value)

    def fill_plainly(self, obj: object) -> bool:
        """`fill` with plain pickle; False if that fails, or if what it made will not do."""
        pickler = self.pickler
        if pickler is None:
            pickler = self.pickler = pickle.Pickler(self.sink, 5, buffer_callback=self.keep)
            pickler.dispatch_table = _reducers.dispatch_table
        try:
            pickler.dump(obj)
        except FdpoolError:
            raise
        except Exception:
            if self.failure is not None:
                raise
            return False
        return not any(map(_needs_values, self.chunks))

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        """Whether a protocol-5 buffer is pickled in band, with the rest.

        One goes out of band only if the payload is too large for a message anyway, with what came before.
        """
        view = buffer.raw()
        if view.nbytes < (_OUT_OF_BAND if self.spill_bytes else 1):
            return True
        if self.in_band + view.nbytes <= self.spill_bytes:
            self.in_band += view.nbytes
            return True
        self.buffers.append(view)
        return False

    def pack(self) -> Payload:
        """The payload of what was pickled; it takes the descriptors."""
        chunks = self.chunks
        if len(chunks) > 1:
            # A large buffer that is kept in band is passed through as it is, and has no length.
            chunks[:] = [c.raw() if isinstance(c, pickle.PickleBuffer) else c for c in chunks]
        body = chunks[0] if len(chunks) == 1 else b""
        if self.buffers or (len(body) or self.size()) > self.spill_bytes:
            return self._pack_spilled()
        if type(body) is not bytes or not body:
            body = b"".join(chunks)
        if not self.fds:
            return Payload(body)
        fds, self.fds = self.fds, []
        return Payload(body, OwnedFds(fds), False, self.lent)

    def _pack_spilled(self) -> Payload:
        if len(self.fds) >= self.max_fds:
            raise PayloadTooLarge(
                f"{len(self.fds)} descriptors and {self.size()} bytes in one message: bytes beyond"
                f" {self.spill_bytes} need a descriptor too, and {self.max_fds} is the limit"
            )
        memory, body, mapping = _spill.write(self.chunks, self.buffers, self.fresh)
        fds, self.fds = self.fds, []
        return Payload(body, OwnedFds([memory, *fds]), True, self.lent, mapping)

    def size(self) -> int:
        """How many bytes were pickled, buffers included."""
        return sum(map(len, self.chunks)) + sum(view.nbytes for view in self.buffers)

    def clear(self) -> None:
        """Forget what was pickled, and close what was duplicated for it."""
        if self.fds:
            self.close()
        self.chunks.clear()
        if self.buffers:
            self.buffers.clear()
        self.in_band = 0
        self.lent = 0
        self.failure = None


def enter(spill_bytes: int, max_fds: int, fresh: bool = False) -> Encoder:
    """This thread's encoder, or another inside it: a `__reduce__`, or a finalizer, may make payloads too."""
    encoder: Encoder | None = current.outgoing  # type: ignore[assignment] # nothing else is ever put there
    if encoder is None or encoder.busy:
        encoder = current.outgoing = Encoder(encoder)
    encoder.busy = True
    encoder.spill_bytes = spill_bytes
    encoder.max_fds = max_fds
    encoder.fresh = fresh
    _reducers.refresh_if_stale()
    return encoder


def leave(encoder: Encoder, *, keep: bool) -> None:
    """Give the encoder back for the next payload, if it is not an inner one.

    One that failed, or has grown large, is not to be kept: a pickler's memo never shrinks.
    """
    if keep and encoder.outer is None and encoder.pickler is not None:
        encoder.pickler.clear_memo()
        encoder.spill_bytes = SPILL_BYTES
        encoder.max_fds = SCM_MAX_FD
        encoder.fresh = False
        encoder.chunks.clear()
        encoder.lent = 0
        if encoder.fds or encoder.buffers or encoder.in_band:
            encoder.clear()
        encoder.busy = False
    else:
        encoder.clear()
        encoder.pickler = None
        current.outgoing = encoder.outer


def encode(
    obj: object,
    spill_bytes: int,
    max_fds: int,
    explain: Callable[[Exception], FdpoolError],
    fresh: bool = False,
    instead: object = None,
    plainly: bool = True,
) -> Payload:
    """The payload of `obj`; where it cannot be pickled, `explain` makes the error to raise of the original.

    Args:
        fresh: as for `_spill.write`.
        instead: what is worth as much, if plain pickle will do for that; `obj` itself has to travel by value then.
        plainly: try plain pickle first.
    """
    encoder = enter(spill_bytes, max_fds, fresh)
    done = False
    try:
        try:
            if not plainly or not encoder.fill_plainly(obj if instead is None else instead):
                encoder.fill_by_value(obj)
        except Exception as error:
            if encoder.failure is not None:
                raise encoder.failure from None
            encoder.clear()
            if isinstance(error, PayloadTooLarge):
                raise  # about the whole, so there is no part to look for
            # Not by way of a variable: this frame is in the traceback, and so would be a cycle that holds `obj`.
            raise explain(error) from error
        payload = encoder.pack()
        done = len(payload.body) <= _KEPT_BYTES and not payload.spilled
        return payload
    finally:
        leave(encoder, keep=done)


def pickled_by_value(obj: object, freezes: bool) -> bytes:
    """What cloudpickle makes of `obj`, which is not to hold descriptors; by a protocol in which no string is short, so
    that `_needs_values` finds nothing in it.

    Args:
        freezes: what goes with it may be pickled for itself.
    """
    chunks: list[bytes] = []
    pickler = _cloud_pickler()(_Sink(chunks.append), protocol=3)
    pickler.whole, pickler.freezes = obj, freezes
    pickler.dump(obj)
    return b"".join(chunks)


def attempt(obj: object) -> Exception | None:
    """Pickle `obj` for the sake of the error alone."""
    handled = sys.exc_info()[1]  # which is to be explained, and keeps its traceback
    encoder = enter(SPILL_BYTES, SCM_MAX_FD)
    try:
        encoder.fill(obj)
    except Exception as error:
        for each in chain(error):
            if each.__context__ is handled:
                BaseException.__setattr__(each, "__context__", None)  # whatever `__setattr__` its class has
        drop_tracebacks(error)
        return error
    finally:
        leave(encoder, keep=False)
    return None


def _needs_values(chunk: Bytes | pickle.PickleBuffer) -> bool:
    """`_refers_to_values` of any chunk, of which only the beginning is looked at."""
    if isinstance(chunk, pickle.PickleBuffer):
        return False
    return _refers_to_values(chunk if len(chunk) <= _SEARCHED else memoryview(chunk)[:_SEARCHED].tobytes())


def _refers_to_values(data: Any) -> bool:
    """True if the bytes refer to something that has to travel by value, or to a subclass of one of our kinds.

    They are enough to know: a reference holds its module's name as a short string. A string that merely
    says so costs a second pass, and nothing else.
    """
    if _reducers.find_telltale(data) is not None:
        return True
    # As prefixes: a registered package stands for its submodules.
    return any(
        name.encode() in data for name in _by_value.registered_by_value() if name not in _by_value.MAIN
    )


#: What cloudpickle 3.1.3 and later put in place of a code object's file, so that equal functions have equal pickles.
_NO_FILE = "<dynamic-code>"


def _code_with_file_name(reduce: Callable[[CodeType], tuple[Any, ...]], code: CodeType) -> tuple[Any, ...]:
    """What `reduce` makes of a code object, naming the file that it was written in.

    A traceback finds its lines by that, and coverage and debuggers know code by it.
    """
    make, arguments = reduce(code)
    # Only strings are compared: bytes with a string would warn, under `-b`.
    return make, tuple(
        code.co_filename if isinstance(argument, str) and argument == _NO_FILE else argument
        for argument in arguments
    )


_CloudPickler: Any = None


def _cloud_pickler() -> Any:
    """cloudpickle's pickler, with our kinds looked at first; imported when needed, as that takes 32 ms."""
    global _CloudPickler
    main = sys.modules.get("__mp_main__")  # of a process that multiprocessing has spawned
    if main is not None:
        import cloudpickle

        cloudpickle.register_pickle_by_value(main)
    if _CloudPickler is None:
        import cloudpickle

        base: Any = cloudpickle.Pickler

        def reducer_override(self: Any, obj: object) -> Any:
            # First, because cloudpickle would send a text file as a StringIO with a copy of its contents.
            reducer = _reducers.find(type(obj))
            if reducer is not None:
                return reducer(obj)
            if type(obj) is CodeType:
                return _code_with_file_name(base.dispatch_table[CodeType], obj)
            frozen = _frozen.find(obj, alone=False) if self.freezes and obj is not self.whole else None
            if frozen is not None:
                self.froze = True
                return frozen.reduction
            reduction = base.reducer_override(self, obj)
            if reduction is not NotImplemented:
                self.parts.append(obj)
            return _caches.reduced(obj) or _by_value.reduced(obj, reduction)

        def __init__(self: Any, *args: Any, **options: Any) -> None:
            base.__init__(self, *args, **options)
            self.parts = []  # what was pickled by value

        members = {
            "__init__": __init__,
            "reducer_override": reducer_override,
            "freezes": True,
            "froze": False,  # something that was frozen
            "whole": None,  # what is not to be, as that is being done
        }
        _CloudPickler = type("_CloudPickler", (base,), members)
    return _CloudPickler
