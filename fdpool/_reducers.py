"""The table of kinds: every type that owns a descriptor, with the function that takes it apart for a payload.

A reducer is called with the object, and answers as `__reduce__` would, with an index where the descriptor
was (`_placement`). `KINDS` is looked up by exact type on the way through C pickle, and along the `__mro__`
on the way through cloudpickle, which is how subclasses are found.
"""

from __future__ import annotations

import copyreg
import io
import re
import select
import selectors
import socket
import sys
from collections.abc import Callable
from typing import Any

from ._placement import refusal
from ._reduce_files import (
    reduce_buffered,
    reduce_fd,
    reduce_named_temporary,
    reduce_raw,
    reduce_spooled,
    reduce_text,
)
from ._reduce_sockets import TLS_STAYS, reduce_connection, reduce_socket, reduce_socket_io
from ._shared import Shared, reduce_shared
from .fds import Fd

Reduced = tuple[Any, ...]
Reducer = Callable[[Any], Reduced]

# -- what stays here -----------------------------------------------------------------------------


def refuse(reason: str) -> Reducer:
    """A reducer that refuses, for `reason`."""

    def reduce_refused(obj: object) -> Reduced:
        raise refusal(obj, reason)

    return reduce_refused


_in_a_loop = refuse(
    "it belongs to an event loop of this process, and may hold bytes read already; send the plain socket"
)
_tls = refuse(TLS_STAYS)
_selector = refuse("what is registered with it are descriptor numbers of this process")

# -- the table -----------------------------------------------------------------------------------

#: Every kind that is looked at. Kinds of modules that nobody has imported cannot occur; `refresh` adds them
#: when they can.
KINDS: dict[type, Reducer] = {
    io.FileIO: reduce_raw,
    io.BufferedReader: reduce_buffered,
    io.BufferedWriter: reduce_buffered,
    io.BufferedRandom: reduce_buffered,
    io.BufferedRWPair: refuse(
        "it does not tell what its two ends are; send the socket, or each end by itself"
    ),
    io.TextIOWrapper: reduce_text,
    Fd: reduce_fd,
    Shared: reduce_shared,
    socket.socket: reduce_socket,
    socket.SocketIO: reduce_socket_io,
    selectors.BaseSelector: _selector,
    selectors.SelectSelector: _selector,
}
for _name in ("epoll", "kqueue"):
    if hasattr(select, _name):
        KINDS[getattr(select, _name)] = refuse(
            f"two processes on one {_name} get events of descriptors that only the other has; make one there,"
            f" or send fdpool.Fd({_name}) if that is what you want"
        )

_LATER: dict[str, dict[str, Reducer]] = {
    "tempfile": {"_TemporaryFileWrapper": reduce_named_temporary, "SpooledTemporaryFile": reduce_spooled},
    "multiprocessing.connection": {"Connection": reduce_connection},
    "ssl": {"SSLSocket": _tls, "SSLObject": _tls},
    "asyncio.transports": {"BaseTransport": _in_a_loop},
    "asyncio.streams": {"StreamReader": _in_a_loop, "StreamWriter": _in_a_loop},
    "asyncio.trsock": {"TransportSocket": _in_a_loop},
    "asyncio.events": {"AbstractEventLoop": _in_a_loop, "AbstractServer": _in_a_loop},
}

#: Module names that stand for what has to travel by value, and attribute names that give away an instance of a
#: *subclass* of a kind which plain pickle lets through, with a number for a descriptor or as a copy. Each
#: as the short string (SHORT_BINUNICODE and a length) that it is in a pickle. Where one is seen, the payload is
#: made anew with cloudpickle, where subclasses are found. (Files and sockets refuse to be pickled.)
_TELLTALES = ("__main__", "__mp_main__", "_owned", "_fd_to_key", "_closer", "_TemporaryFileArgs", "_writable")
find_telltale = re.compile(
    b"\x8c(?:" + b"|".join(re.escape(bytes([len(name)]) + name.encode()) for name in _TELLTALES) + b")"
).search

#: `KINDS` together with what is registered with copyreg, which a pickler with a table of its own does not
#: ask. Changed in place only: picklers are kept.
dispatch_table: dict[type, Callable[[Any], Any]] = {}
_copied: dict[Any, Any] = {}
_urgent = ["tempfile", "multiprocessing.connection"]


def is_stale() -> bool:
    """True if plain pickle would go wrong without `refresh`; cheap, as every payload asks."""
    modules = sys.modules
    for name in _urgent:
        if name in modules:
            return True
    return _copied != copyreg.dispatch_table


def refresh_if_stale() -> None:
    """`refresh` if it is due."""
    if is_stale():
        refresh()


def refresh() -> None:
    """Take notice of modules imported, and of reducers registered with copyreg, since the last call."""
    for name, kinds in list(_LATER.items()):
        module = sys.modules.get(name)
        if module is None or not all(hasattr(module, kind) for kind in kinds):
            continue  # not imported, or still being so in another thread
        for kind, reducer in kinds.items():
            KINDS[getattr(module, kind)] = reducer
        _LATER.pop(name, None)
    _urgent[:] = [name for name in _urgent if name in _LATER]
    registered = dict(copyreg.dispatch_table)
    for gone in _copied.keys() - registered.keys():
        dispatch_table.pop(gone, None)
    _copied.clear()
    _copied.update(registered)
    dispatch_table.update(registered)
    dispatch_table.update(KINDS)


refresh()


def find(cls: type) -> Reducer | None:
    """The reducer for instances of `cls` or of what it derives from; None if it is not a kind, or says itself
    how it is pickled."""
    own: Reducer | None = None
    for base in cls.__mro__:
        reducer = KINDS.get(base)
        if reducer is not None:
            return own or reducer
        attributes = base.__dict__
        if "__reduce_ex__" in attributes or "__getstate__" in attributes or base in copyreg.dispatch_table:
            return None
        if "__reduce__" in attributes:
            own = _by_its_own_reduce
    return None


def _by_its_own_reduce(obj: Any) -> Any:
    """From 3.12 on pickle itself would not get there: files have a `__reduce_ex__`, which refuses."""
    return obj.__reduce__()
