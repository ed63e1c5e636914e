"""`Shared`: an object that many tasks take, put into memory once, and mapped by each worker that meets it."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from . import _spill
from ._placement import current, hand_over, incoming, refusal

T = TypeVar("T")

_MOST_OPEN = 16  # shared objects that one worker keeps at hand


class Shared(Generic[T]):
    """A handle of an object that `Pool.share` has put into memory; in a task, it is that object.

    Anything in a task's arguments may be such a handle. The first task of a worker that takes it maps the memory
    and makes the object, later ones find it made. What it holds of buffers (NumPy arrays, say) is the same memory in
    all workers, and **read-only**; the rest of it is each worker's own, and what a task changes there, later tasks of
    that worker see.

    The memory is given back once the handle is closed, or dropped, and no task uses it any more.

    Thread-safe. A handle cannot travel in a result.
    """

    __slots__ = ("__weakref__", "_body", "_fd", "_forget", "_release", "_token")

    def __init__(
        self, fd: int, body: bytes, release: Callable[[], None], forget: Callable[[bytes], None]
    ) -> None:
        self._token = os.urandom(16)
        self._fd = fd
        self._body = body
        self._release = release
        self._forget = forget
        _spill.seal_for_good(fd)

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Give the memory back, as soon as no task uses it. Tasks submitted before still find it.

        Safe to call again.
        """
        if self._fd >= 0:
            self._fd = -1
            self._release()
            self._forget(self._token)

    def __enter__(self) -> Shared[T]:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<Shared object {self._token[:4].hex()}{', closed' if self.closed else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Shared handle can only travel in a task of a Pool")


def reduce_shared(shared: Shared[Any]) -> tuple[Any, ...]:
    """What a payload holds in place of a handle."""
    if shared.closed:
        raise refusal(shared, "it is closed")
    index = hand_over(shared._fd, shared)
    assert current.outgoing is not None
    current.outgoing.lent += 1
    return open_shared, (index, shared._token, shared._body)


#: The objects at hand, the last used one last.
_open: OrderedDict[bytes, Any] = OrderedDict()


def open_shared(index: int, token: bytes, body: bytes) -> Any:
    """The object: the one made before, or made now from the memory whose descriptor is at `index`."""
    fd = incoming().number(index)  # not settled, so it is closed with the load
    if token in _open:
        _open.move_to_end(token)
        return _open[token]
    data, buffers = _spill.read(body, fd, writable=False)
    found = _open[token] = pickle.loads(data, buffers=buffers)
    if len(_open) > _MOST_OPEN:
        _open.popitem(last=False)
    return found


def forget(token: bytes) -> None:
    """Let go of an object whose handle is closed."""
    _open.pop(token, None)
