"""What a reducer asks of an object first: is it open, may it do what it claims, can it be made again?"""

from __future__ import annotations

import fcntl
import os
from typing import Any

from ._placement import refusal

_O_PATH = getattr(os, "O_PATH", 0)


def open_number(file: Any) -> int:
    """The descriptor of an object that has `closed` and `fileno()`; refused if it has none now."""
    check_open(file)
    try:
        number: int = file.fileno()
    except ValueError as error:  # io.UnsupportedOperation is one
        raise refusal(file, f"it has no descriptor ({error})") from error
    return number


def check_open(file: Any) -> None:
    try:
        closed = file.closed
    except ValueError as error:  # a wrapper whose lower layer was detached
        raise refusal(file, str(error)) from error
    if closed:
        raise refusal(file, "it is closed")


def check_access(fd: int, holder: object, *, readable: bool, writable: bool) -> None:
    """Refuse an object that claims more than its descriptor allows.

    `os.fdopen(read_only, "w")` is accepted by Python and fails with EBADF at the first flush (measured, M31):
    in the worker that would be far from the mistake.
    """
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        return  # not open: `hand_over` says so
    access = flags & os.O_ACCMODE
    if flags & _O_PATH:
        raise refusal(
            holder, "its descriptor was opened with O_PATH; send fdpool.Fd(n) for a bare descriptor"
        )
    if readable and access == os.O_WRONLY:
        raise refusal(holder, "it is readable, but its descriptor was opened for writing only")
    if writable and access == os.O_RDONLY:
        raise refusal(holder, "it is writable, but its descriptor was opened for reading only")


def check_subclass(obj: object, base: type) -> None:
    """Refuse an object of a subclass that cannot be made again with the arguments that `base` takes."""
    if type(obj) is base:
        return
    for cls in type(obj).__mro__:
        if cls is base:
            return
        own = cls.__dict__
        if "__init__" in own or "__new__" in own or own.get("__slots__"):
            raise refusal(
                obj,
                f"{cls.__qualname__} is a {base.__name__} with an __init__, __new__ or __slots__ of its"
                " own, and nobody knows how to make another: give it a __reduce__, or send the plain object",
            )


def attributes(obj: object) -> dict[str, Any] | None:
    """What hangs on the object itself (`mode` of a text file, what the user put there), or None."""
    attached = getattr(obj, "__dict__", None)
    if not attached:
        return None
    found = {
        name: value
        for name, value in attached.items()
        # A number for a name means os.fdopen, and says nothing there. The other one is IOBase's mark.
        if not (name == "name" and isinstance(value, int)) and name != "__IOBase_closed"
    }
    return found or None


class StandIn:
    """A descriptor for a constructor to do to what it must not do to the real one.

    Takes `fd`, and closes it on leaving, unless `become(real)` has put the real one in its place: from then
    on the object that was made on it owns that.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._settled = False

    def __enter__(self) -> StandIn:
        return self

    def become(self, real: int) -> None:
        """Make the stand-in's number a duplicate of `real`, which stays the caller's."""
        os.dup2(real, self.fd, inheritable=False)
        self._settled = True

    def __exit__(self, *_: object) -> None:
        if not self._settled:
            os.close(self.fd)
