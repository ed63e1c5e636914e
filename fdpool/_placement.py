"""Which descriptor of a message belongs to which object: collected while pickling, dealt out while loading.

A pickle cannot hold a descriptor, so it holds an index into the list that travels beside it. The list in
the making, and the list being dealt out, belong to the thread that pickles or loads: reducers are called
with nothing but the object, so they find theirs here. Both nest (a `__reduce__` that submits a task, a
`__setstate__` that loads a payload), and each level has a list of its own.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Protocol

from ._naming import attribute_of, brief
from .errors import DescriptorRefused, PayloadTooLarge
from .fds import close_all, duplicate, take_and_close

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Numbers that are the pool's own sockets: a task that carried one could read other tasks' messages, and
#: a socket sent over itself is garbage only the kernel's collector finds (unix(7), hazard P24).
_reserved: set[int] = set()


def reserve(fd: int) -> None:
    """Refuse `fd` in every payload from now on, until `release(fd)`."""
    _reserved.add(fd)


def release(fd: int) -> None:
    """Let `fd` travel again; call it before closing the number. Releasing twice is harmless."""
    _reserved.discard(fd)


def refusal(obj: object, reason: str) -> DescriptorRefused:
    """The error for a descriptor that stays here; the caller raises it."""
    return DescriptorRefused(f"{brief(obj)} cannot be handed to another process: {reason}")


def chain(exc: BaseException) -> Iterator[BaseException]:
    """`exc`, its causes and contexts, and the members of groups among them, each once."""
    waiting, seen = [exc], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        members = attribute_of(each, "exceptions")
        waiting += [
            other
            for other in (each.__cause__, each.__context__, *(members if isinstance(members, tuple) else ()))
            if isinstance(other, BaseException)
        ]


def drop_tracebacks(exc: BaseException) -> None:
    """Take the tracebacks off `exc` and all chained to it, and with them what their frames hold."""
    for each in chain(exc):
        BaseException.with_traceback(each, None)


class Outgoing:
    """The descriptors of one payload in the making, duplicated the moment their object is met.

    Attributes:
        fds: what has been duplicated so far, in the order of the indices; owned.
        lent: how many of them are the pool's own (`_shared`), which may be sent again.
        max_fds: how many the message may carry.
        failure: an error of the system (EMFILE, say) that is nobody's object's fault, or None. Pickling may
            wrap what a reducer raises, and this one has to come out as it was.
    """

    __slots__ = ("failure", "fds", "lent", "max_fds")

    def __init__(self, max_fds: int) -> None:
        self.fds: list[int] = []
        self.lent = 0
        self.max_fds = max_fds
        self.failure: OSError | None = None

    def add(self, fd: int, holder: object) -> int:
        """Duplicate `fd` for `holder`, the object that is asked for it; the index to pickle instead.

        Raises:
            DescriptorRefused: `fd` is not open, or is the pool's own.
            PayloadTooLarge: the message is full.
        """
        if fd in _reserved:
            raise refusal(holder, f"descriptor {fd} belongs to the pool itself")
        if len(self.fds) >= self.max_fds:
            raise PayloadTooLarge(
                f"more than {self.max_fds} descriptors in one message (the kernel's own limit is 253,"
                " see SCM_RIGHTS in unix(7)): split them over several tasks"
            )
        try:
            self.fds.append(duplicate(fd))
        except OSError as error:
            if error.errno == errno.EBADF:
                raise refusal(holder, f"{fd} is not an open descriptor (EBADF)") from error
            self.failure = error
            raise
        return len(self.fds) - 1

    def close(self) -> None:
        """Close what was duplicated so far."""
        fds, self.fds = self.fds, []
        close_all(fds)


class Closable(Protocol):
    """What a rebuild function makes: it owns a descriptor, and closing it gives that back."""

    def close(self) -> None: ...


class Incoming:
    """The descriptors that came with a payload, until an object has taken each.

    Args:
        fds: their numbers. The list itself is kept, and has none any more that was taken or closed: so a caller who
            is interrupted before this is made, or while it is closed, can see what is left.
    """

    __slots__ = ("fds", "outer", "rebuilt")

    def __init__(self, fds: list[int], outer: Incoming | None) -> None:
        self.fds = fds
        self.outer = outer
        self.rebuilt: list[Closable] = []

    def number(self, index: int) -> int:
        """The descriptor at `index`, still owned here until `settle`.

        Raises:
            ValueError: there is none, or an object has it already: the bytes are not what was sent.
        """
        if not 0 <= index < len(self.fds) or self.fds[index] < 0:
            raise ValueError(f"the payload names descriptor {index}, but {len(self.fds)} came with it")
        return self.fds[index]

    def settle(self, index: int, owner: Closable) -> None:
        """`owner` has taken the descriptor at `index`."""
        self.fds[index] = -1
        self.rebuilt.append(owner)

    def close_rebuilt(self) -> None:
        """Close the objects made so far: a load that failed delivers nothing."""
        while self.rebuilt:
            try:
                self.rebuilt.pop().close()
            except OSError:
                pass  # close(2) has released the number whatever it says; nothing was written by us

    def close(self) -> None:
        """Close every descriptor that no object took."""
        if self.fds and max(self.fds) >= 0:
            take_and_close(self.fds)


class _Current(threading.local):
    outgoing: Outgoing | None = None
    incoming: Incoming | None = None


#: What this thread is pickling and loading, innermost first.
current = _Current()


def hand_over(fd: int, holder: object) -> int:
    """`Outgoing.add` on the payload that this thread is making."""
    outgoing = current.outgoing
    if outgoing is None:
        raise TypeError(f"{brief(holder)} can only be pickled as part of a task or a result")
    return outgoing.add(fd, holder)


def incoming() -> Incoming:
    """The descriptors that this thread is dealing out."""
    found = current.incoming
    if found is None:
        raise ValueError("the payload names a descriptor, but none came with it")
    return found
