"""Owning descriptors: the `Fd` handle that tasks carry, and close-once ownership of raw numbers."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

_Made = TypeVar("_Made")

#: Longest that the kernel is asked to wait: poll(2) and epoll_wait(2) count milliseconds in an int, 24 days.
LONGEST_POLL_S = 86_400.0

#: Most descriptors that one message can carry: the kernel's SCM_MAX_FD (unix(7)). 254 give EINVAL.
SCM_MAX_FD = 253


@runtime_checkable
class HasFileno(Protocol):
    """Anything with a `fileno()`, as `select.select` takes it."""

    def fileno(self) -> int: ...


class Fd:
    """A bare descriptor that a task may carry: a directory, pidfd, eventfd, or any number.

    `Fd(n)` *borrows*: the caller keeps `n`, and may close it as soon as `submit` has returned. The task
    receives an `Fd` that *owns* its own descriptor of the same open file description (so file offset and
    O_NONBLOCK are shared, see unix(7)); it is closed by `close()`, by `with`, or when it is
    garbage-collected. `Fd.take(n)` makes an owning handle from a number.

    Args:
        fd: a descriptor number, or anything with `fileno()`.
        reopen: hand over a *private* open file description of the same file, with its own offset and
            flags (regular files only; through /proc/self/fd).

    Raises:
        TypeError: `fd` is neither an `int` nor has a `fileno()`.
        ValueError: the number is negative, or too large to be a descriptor.

    Not thread-safe: one thread at a time may close or detach it.
    """

    __slots__ = ("__weakref__", "_fd", "_owned", "reopen")

    def __init__(self, fd: int | HasFileno, *, reopen: bool = False) -> None:
        self._owned = False
        self._fd = -1
        self._fd = descriptor_number(fd)
        self.reopen = reopen

    @classmethod
    def take(cls, fd: int) -> Fd:
        """An `Fd` that owns `fd` from now on, and closes it when closed or collected."""
        handle = cls(fd)
        handle._owned = True
        return handle

    def fileno(self) -> int:
        """The number; still owned as before.

        Raises:
            ValueError: the handle is closed or detached.
        """
        if self._fd < 0:
            raise ValueError("this Fd is closed")
        return self._fd

    def detach(self) -> int:
        """Give the number away: the caller owns it, and this handle counts as closed."""
        fd = self.fileno()
        self._fd, self._owned = -1, False
        return fd

    @property
    def closed(self) -> bool:
        """True once closed or detached."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor if this handle owns it; safe to call again."""
        fd, owned = self._fd, self._owned
        self._fd, self._owned = -1, False
        if owned:
            os.close(fd)

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(
            f"{self!r} can only travel in a task or a result of a Pool; a copy would be a bare number"
        )

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._owned:
            self.close()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<Fd closed>"
        return f"<Fd {self._fd}{' owned' if self._owned else ''}{' reopen' if self.reopen else ''}>"


def descriptor_number(fd: int | HasFileno) -> int:
    """The number behind `fd`, checked to be one; nothing is opened or closed.

    Raises:
        TypeError: not a descriptor at all (a `bool` is not a number here).
        ValueError: negative or beyond what a C int holds.
    """
    number: object = fd
    if not isinstance(fd, int):
        fileno = getattr(fd, "fileno", None)
        if fileno is None:
            raise TypeError(f"a descriptor is an int or has fileno(), not {fd!r}")
        number = fileno()
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"a descriptor is an int or has fileno(), not {fd!r}")
    if not 0 <= number < 2**31:
        raise ValueError(f"{number} cannot be a descriptor: it must be in 0..{2**31 - 1}")
    return number


class OwnedFds:
    """Descriptor numbers with one owner: closed once by `close()`, or given away by `detach()`.

    Closing is also done when the object is collected, so that no error path leaks.
    """

    __slots__ = ("numbers",)

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def detach(self) -> list[int]:
        """The numbers, now the caller's."""
        numbers, self.numbers = self.numbers, []
        return numbers

    def close(self) -> None:
        """Close what is still owned; safe to call again."""
        close_all(self.detach())

    def __del__(self) -> None:
        if self.numbers:
            self.close()


def is_readable(fd: int | HasFileno, timeout_s: float | None = 0.0) -> bool:
    """Wait until poll(2) reports `fd` readable, at its end or broken, for `timeout_s` seconds (None: for ever); False
    if it did not. A pidfd is readable once its process has died."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while timeout_s is not None and timeout_s > LONGEST_POLL_S:
        if poll.poll(LONGEST_POLL_S * 1000):
            return True
        timeout_s -= LONGEST_POLL_S
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def is_open(fd: int) -> bool:
    """True if there is a descriptor of this number now; opens none."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def duplicate(fd: int) -> int:
    """A close-on-exec duplicate of `fd`, never one of 0 to 2; the caller's to close.

    Even where the standard streams are closed, what is duplicated here must not land on their
    numbers: a later `print` would write into it.
    """
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def above_stdio(fd: int) -> int:
    """`fd` itself if it is above the standard streams, else a duplicate above them, `fd` closed.

    Raises:
        OSError: no descriptor is left (EMFILE); `fd` is closed.
    """
    if fd > 2:
        return fd
    try:
        return duplicate(fd)
    finally:
        os.close(fd)


def made_above_stdio(make: Callable[[], _Made]) -> _Made:
    """What `make` returns, with a number above the standard streams, or without any: for what cannot be moved.

    Another thread may have one of their numbers for a moment, and so `make` cannot be kept from it beforehand: what
    gets one is held until another has been made, and closed.

    Args:
        make: makes something with `close`, and with a `fileno` if it has a descriptor.
    """
    with ExitStack() as wrong:
        while True:
            made: Any = make()
            if not hasattr(made, "fileno") or made.fileno() > 2:
                return made  # type: ignore[no-any-return]
            wrong.callback(made.close)


@contextmanager
def standard_numbers_taken() -> Iterator[None]:
    """Whatever is opened meanwhile gets a number above the standard streams, as long as the process has one thread:
    another may have had one of these numbers for a moment, and let go of it in between.

    Raises:
        OSError: no descriptor is left (EMFILE).
    """
    taken: list[int] = []
    try:
        while not all(map(is_open, range(3))):
            taken.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        yield
    finally:
        close_all(taken)


def mapped(fd: int, length: int, flags: int, writable: bool = True, offset: int = 0) -> mmap.mmap:
    """A mapping of a file. From Python 3.13 on it holds no descriptor, so who keeps it (an array) pins memory alone;
    before, a duplicate of `fd`, above the standard streams also where other threads open and close."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    options: dict[str, Any] = {"flags": flags, "prot": protection, "offset": offset}
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, length, trackfd=False, **options)
    wrong: list[mmap.mmap] = []
    low: set[int] = set()
    try:
        while True:
            made = mmap.mmap(fd, length, **options)
            # It says nowhere which number its duplicate has. As in `made_above_stdio`, one that is wrong is held.
            now = _standard_numbers_of(fd)
            if now <= low:
                return made
            wrong.append(made)
            low = now
    finally:
        for each in wrong:
            each.close()


def _standard_numbers_of(fd: int) -> set[int]:
    """Which of the standard streams' numbers, but for `fd` itself, are of the same file."""
    file = os.fstat(fd)
    found = set()
    for number in range(3):
        try:
            if os.path.samestat(file, os.fstat(number)) and number != fd:
                found.add(number)
        except OSError:
            pass  # it is closed
    return found


def close_all(fds: Iterable[int]) -> None:
    """Close every number; one that is not open is passed over (EBADF), so that the rest still are."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise


def take_and_close(fds: list[int], count: int | None = None) -> None:
    """Take the first `count` numbers out of the list, or all, and close them. Negative ones are passed over, and so is
    what close(2) says: the number is free in any case.

    A signal handler that raises in here leaves each number either in the list or closed: it is taken out and closed in
    C, between which none runs. So whoever else has the list can go on with it.
    """
    left = 0 if count is None else len(fds) - count
    while len(fds) > left:
        taken = map(fds.pop, repeat(0, len(fds) - left))
        try:
            deque(map(os.close, filter((-1).__lt__, taken)), 0)
        except OSError:
            pass
