"""Objects as payloads: bytes for a message, the descriptors that go with them, and back again.

`dumps*` pickle where a task is submitted or a result returned (`_encoder`), `loads*` make the object again at
the other end. `*_failure` do so for an exception, and always come to an end: a failure that cannot be told
would be a task that hangs.
"""

from __future__ import annotations

import pickle
import sys
import threading
from typing import TYPE_CHECKING, Any

from . import _diagnosis, _frozen, _spill
from ._encoder import SPILL_BYTES, Bytes, Encoder, Payload, attempt, encode, enter, leave
from ._naming import attribute_of
from ._placement import Incoming, chain, current, drop_tracebacks, release, reserve
from .errors import FdpoolError, NotLoadable, RemoteError, RemoteTraceback
from .fds import SCM_MAX_FD, take_and_close

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "SPILL_BYTES",
    "Payload",
    "dumps",
    "dumps_call",
    "dumps_failure",
    "dumps_result",
    "loads",
    "loads_failure",
    "release",
    "reserve",
]


def dumps(
    obj: object, *, spill_bytes: int = SPILL_BYTES, max_fds: int = SCM_MAX_FD, fresh: bool = False
) -> Payload:
    """A payload that `loads` makes an equal object from, descriptors included; in a `fresh` memory file, if in any.

    Descriptors are borrowed: the payload has duplicates, made when each was met. Writers are flushed, and the
    offset of a reader is put where its user has got to.

    Raises:
        NotPicklable: the message names the part that cannot be pickled, and the way to it.
        DescriptorRefused: a file, socket or number that cannot travel.
        PayloadTooLarge: more than `max_fds` descriptors.
        OSError: no descriptor or no memory left (EMFILE, ENOSPC).
        BaseException: whatever else a `__reduce__` raises (SystemExit, KeyboardInterrupt), unchanged.

    Whatever is raised, nothing stays open.
    """
    return encode(
        obj,
        spill_bytes,
        max_fds,
        lambda error: _diagnosis.explain_value(error, obj, "the object", attempt),
        fresh,
    )


def dumps_call(
    fn: object,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    spill_bytes: int = SPILL_BYTES,
    max_fds: int = SCM_MAX_FD,
) -> Payload:
    """A payload of the tuple `(fn, args, kwargs)`; raises as `dumps` does, naming the call's arguments."""
    encoder = current.outgoing
    frozen = _frozen.find(fn)
    plainly = True
    if spill_bytes == SPILL_BYTES and max_fds == SCM_MAX_FD and type(encoder) is Encoder:
        payload = encoder.try_plainly((fn if frozen is None else frozen, args, kwargs))
        if payload is not None:
            return payload
        plainly = not encoder.refused
    return encode(
        (fn, args, kwargs),
        spill_bytes,
        max_fds,
        lambda error: _diagnosis.explain_call(error, fn, args, kwargs, attempt),
        instead=None if frozen is None else (frozen, args, kwargs),
        plainly=plainly,
    )


def dumps_result(value: object, *, spill_bytes: int = SPILL_BYTES, max_fds: int = SCM_MAX_FD) -> Payload:
    """A payload of what a task returned; raises as `dumps` does, with `may_have_run` True."""
    if value is None:
        return Payload(_NONE)
    encoder = current.outgoing
    plainly = True
    if spill_bytes == SPILL_BYTES and max_fds == SCM_MAX_FD and type(encoder) is Encoder:
        payload = encoder.try_plainly(value)
        if payload is not None:
            return payload
        plainly = not encoder.refused
    try:
        return encode(
            value,
            spill_bytes,
            max_fds,
            lambda error: _diagnosis.explain_value(error, value, "the result", attempt),
            plainly=plainly,
        )
    except FdpoolError as error:
        error.may_have_run = True
        raise


#: What a function that only does something returns: not worth a pickler.
_NONE = pickle.dumps(None, 5)


# -- payloads to objects -------------------------------------------------------------------------


def loads(body: Bytes, fds: list[int], spilled: bool) -> Any:
    """The object in a payload. It, or what it is made of, owns its descriptors.

    Args:
        body: as in `Payload.body`.
        fds: the descriptors that came, in order; taken, whatever happens, but that a signal handler raises before
            anything of it is done. What is left of them then is in the list.
        spilled: as in `Payload.spilled`.

    Raises:
        NotLoadable: with the original error as its cause.
        BaseException: whatever else runs while unpickling raises (SystemExit, KeyboardInterrupt), unchanged.
    """
    if not fds and not spilled:
        try:
            return None if body == _NONE else pickle.loads(body)
        except Exception as error:
            raise _not_loadable(error) from error
    dealt = current.incoming = Incoming(fds, current.incoming)
    try:
        return _load(dealt, body, spilled)
    except BaseException as error:
        dealt.close_rebuilt()
        if isinstance(error, Exception):
            raise _not_loadable(error) from error
        raise
    finally:
        current.incoming = dealt.outer
        dealt.close()


def _load(dealt: Incoming, body: Bytes, spilled: bool) -> Any:
    """Unpickle `body`, from its memory file if it has one, with the descriptors that are being dealt out."""
    if not spilled:
        return pickle.loads(body)
    if not dealt.fds:
        raise ValueError("the payload is in a memory file, but none came with it")
    try:
        data, buffers = _spill.read(body, dealt.fds[0])
    finally:
        take_and_close(dealt.fds, 1)
    try:
        return pickle.loads(data, buffers=buffers)
    finally:
        # An error's traceback keeps this frame, and the frame would keep the mapping.
        del data, buffers


def _not_loadable(error: Exception) -> NotLoadable:
    text = said(error)
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing is None and isinstance(error, AttributeError) and "Can't get attribute" in text:
        missing = text.partition("<module ")[2].partition("'")[2].partition("'")[0]
    if missing:
        text += (
            f" (module {missing!r}, as the other side has it, must be importable here; or register it there"
            " with cloudpickle.register_pickle_by_value, so that its functions travel by value)"
        )
    return NotLoadable(f"the object could not be rebuilt: {text}")


# -- failures ------------------------------------------------------------------------------------

_CLIPPED = 4096


def dumps_failure(
    exc: BaseException, *, spill_bytes: int = SPILL_BYTES, max_fds: int = SCM_MAX_FD
) -> Payload:
    """A payload that tells of `exc`: its name, message and formatted traceback, and itself if that can be.

    Never fails for an `Exception`: what cannot be carried is left out, and a note says why. Afterwards the
    frames that `exc` and those chained to it passed through are cleared, and their tracebacks dropped: their
    locals pin no descriptor (hazard H15).
    """
    # Runs in: the worker, after user code failed; and all of this calls more user code (__str__, __reduce__).
    told = (_type_name(exc), _text_of(exc), _notes_of(exc), _formatted(exc))
    try:
        return _encode_failure(told, exc, None, spill_bytes, max_fds)
    except BaseException as error:
        why = f"the exception itself could not be sent: {_explained(error, exc)}"
    finally:
        release_frames(exc)
    try:
        return _encode_failure(told, None, why, spill_bytes, max_fds)
    except (OSError, FdpoolError, MemoryError):  # no memory file to be had
        name, message, _, text = told
        told = (name[:_CLIPPED], message[:_CLIPPED], [], text[-_CLIPPED:])
        return _encode_failure(told, None, why[:_CLIPPED], SPILL_BYTES, max_fds)


def _encode_failure(
    told: tuple[str, str, list[str], str],
    exc: BaseException | None,
    why: str | None,
    spill_bytes: int,
    max_fds: int,
) -> Payload:
    """The payload of `(*told, exception's own pickle or None, why not)`.

    A pickle in a pickle, as the outer one must load where the inner one does not.
    """
    encoder = enter(sys.maxsize, max_fds)  # so that no buffer of the inner pickle goes out of band
    try:
        inner = None
        if exc is not None:
            encoder.fill(exc)
            inner = b"".join(encoder.chunks)
        encoder.chunks[:] = [pickle.dumps((*told, inner, why), 5)]
        encoder.spill_bytes = spill_bytes
        return encoder.pack()
    finally:
        leave(encoder, keep=False)


def loads_failure(body: Bytes, fds: list[int], spilled: bool) -> BaseException:
    """The exception in a payload of `dumps_failure`: a new one each time, with the remote traceback as cause.

    One that cannot be made again here (its constructor wants other arguments, its module is missing) is a
    `RemoteError`. Takes `fds`, and never raises, but for a Ctrl-C in the main thread.
    """
    name, message, notes, text, why = "", "", [], "", None
    dealt = current.incoming = Incoming(fds, current.incoming)
    exc: Any = None
    try:
        name, message, notes, text, inner, why = _load(dealt, body, spilled)
        if inner is not None:
            exc = pickle.loads(inner)
            if not isinstance(exc, BaseException):
                raise TypeError(f"its pickle makes a {type(exc).__qualname__}, which is no exception")
    except BaseException as error:
        dealt.close_rebuilt()
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        exc, why = None, f"the exception itself could not be made again here: {said(error)}"
    finally:
        current.incoming = dealt.outer
        dealt.close()
    if exc is None:
        exc = RemoteError(message or why or "", name, text)
        notes = [*notes, *([why] if why else [])]
    _attach(exc, notes, RemoteTraceback(text))
    found: BaseException = exc
    return found


def _attach(exc: BaseException, notes: list[str], cause: RemoteTraceback) -> None:
    """Set cause and notes, whatever `__setattr__` the class of `exc` has."""
    set_attribute = BaseException.__setattr__
    set_attribute(exc, "__cause__", cause)
    if notes and not attribute_of(exc, "__notes__"):
        set_attribute(exc, "__notes__", notes)


def release_frames(exc: BaseException) -> None:
    """Clear the frames that `exc` and all chained to it passed through, and drop their tracebacks."""
    import traceback

    for each in chain(exc):
        traceback.clear_frames(each.__traceback__)
    drop_tracebacks(exc)


def keep_in_words(exc: BaseException) -> None:
    """`release_frames`, but where the cause of `exc` was raised in code of the user's (a `__reduce__`, say), the way
    there stays, as text."""
    cause = exc.__cause__
    if cause is not None and _passed_others(cause):
        text = _formatted(cause)
        release_frames(exc)
        BaseException.__setattr__(cause, "__cause__", RemoteTraceback(text))
    else:
        release_frames(exc)


def _passed_others(exc: BaseException) -> bool:
    """True if code that is not ours, nor a pickler's, is in the traceback."""
    passed = exc.__traceback__
    while passed is not None:
        if passed.tb_frame.f_globals.get("__name__", "").partition(".")[0] not in (
            "fdpool",
            "cloudpickle",
            "pickle",
        ):
            return True
        passed = passed.tb_next
    return False


def _type_name(exc: BaseException) -> str:
    cls = type(exc)
    module = cls.__module__
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"


def _text_of(exc: BaseException) -> str:
    try:
        return "".join([str(exc)])  # joined: a subclass of str would have to be pickled as such
    except BaseException:  # its __str__ is user code
        return "(its __str__ failed)"


def _notes_of(exc: BaseException) -> list[str]:
    notes = attribute_of(exc, "__notes__")
    return [note for note in notes if type(note) is str] if isinstance(notes, list) else []


def _formatted(exc: BaseException) -> str:
    import traceback  # linecache and tokenize come with it

    try:
        return "".join(traceback.format_exception(exc))
    except BaseException as error:  # calls __str__ and more of user code
        return f"(the traceback could not be formatted: {type(error).__qualname__})\n"


def _explained(error: BaseException, exc: BaseException) -> str:
    try:
        if isinstance(error, Exception):
            return str(_diagnosis.explain_value(error, exc, "the exception", attempt))
    except BaseException:  # tries the parts of `exc` again, which is user code
        pass
    return said(error)


def said(error: BaseException) -> str:
    """Type and text of an error, whose `__str__` may fail."""
    return f"{type(error).__qualname__}: {_text_of(error)}"
