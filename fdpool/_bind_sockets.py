"""New listening sockets: TCP on every address of a host, Unix sockets and the files that stand for them.

A path of the file system is replaced only if nobody listens there, and removed only by whom it belongs to.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import _own_sockets
from ._bind_spec import Tcp, Unix
from ._clock import CLOCK
from ._log import log
from .errors import BindFailed

_Address = tuple[Any, ...]  # as getaddrinfo gives it, and bind takes it

_PORTS_TRIED = 20
# How long a folder's lock is waited for; servers of ours have it for less than a millisecond.
_BEGINNING_S = 5.0
_END_S = 1.0
_LOOK_S = 0.005
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine has no such address, or no IPv6 at all


class OwnPath(NamedTuple):
    """The file of a Unix socket that goes with its listener, as long as it is this very one.

    Attributes:
        path: absolute.
        identity: device and inode.
    """

    path: str
    identity: tuple[int, int]

    def remove(self) -> None:
        """Unlink it, if nothing else has taken its place, and this process still may: else the next to listen does."""
        with _folder_locked(self.path, _END_S) as is_locked, contextlib.suppress(OSError):
            if not is_locked:
                extra = {"event": "folder_locked", "file": self.path}
                text = "unix:%s is removed although %s"
                log("fdpool.server", logging.WARNING, text, self.path, _kept(_END_S), extra=extra)
            if _identity(self.path) == self.identity:
                os.unlink(self.path)


# -- TCP -------------------------------------------------------------------------------------------


def listen_tcp(spec: Tcp, backlog: int, reuseport: bool) -> list[socket.socket]:
    """A listening socket for each address of the host, all with the same port; the caller's to close.

    Raises:
        BindFailed: at one address it cannot be, or the host has none; nothing is left open.
    """
    where = f"tcp://{f'[{spec.host}]' if ':' in spec.host else spec.host}:{spec.port}"
    for attempt in range(_PORTS_TRIED):
        try:
            if not spec.host:
                return [_listen_everywhere(spec.port, backlog, reuseport)]
            return _listen_at_all(_addresses(spec), spec.port, backlog, reuseport)
        except OSError as error:
            # A port that was free at the first address may be taken at the next.
            if error.errno == errno.EADDRINUSE and spec.port == 0 and attempt + 1 < _PORTS_TRIED:
                continue
            raise BindFailed(f"cannot listen on {where}: {why_not(error)}", error.errno) from error
        except UnicodeError as error:
            raise BindFailed(f"cannot listen on {where}: {spec.host!r} is no name of a host") from error
    raise AssertionError("the last attempt returns or raises")


def _addresses(spec: Tcp) -> list[tuple[socket.AddressFamily, _Address]]:
    found = socket.getaddrinfo(spec.host, spec.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _listen_at_all(
    addresses: Sequence[tuple[socket.AddressFamily, _Address]],
    port: int,
    backlog: int,
    reuseport: bool,
) -> list[socket.socket]:
    absent: OSError | None = None
    with contextlib.ExitStack() as opened:
        listening: list[socket.socket] = []
        for family, address in addresses:
            try:
                one = _listen(family, (address[0], port, *address[2:]), backlog, reuseport, only_v6=True)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error  # "localhost" is ::1 too, even where there is no IPv6
                continue
            opened.enter_context(one)
            listening.append(one)
            port = one.getsockname()[1]
        if not listening and absent is not None:
            raise absent
        opened.pop_all()
    return listening


def _listen_everywhere(port: int, backlog: int, reuseport: bool) -> socket.socket:
    """One socket for both families, or for IPv4 where there is no IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return _listen(socket.AF_INET6, ("::", port), backlog, reuseport, only_v6=False)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
    return _listen(socket.AF_INET, ("0.0.0.0", port), backlog, reuseport, only_v6=False)


def _listen(family: int, address: _Address, backlog: int, reuseport: bool, only_v6: bool) -> socket.socket:
    listening = _own_sockets.made(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuseport:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only_v6))
        listening.bind(address)
        listening.listen(backlog)
    except BaseException:
        listening.close()
        raise
    return listening


def listen_beside(member: socket.socket, backlog: int) -> socket.socket:
    """A listening socket at the same address, in the same SO_REUSEPORT group; the caller's to close.

    Raises:
        OSError: it cannot be.
    """
    # Kernel: those that take IPv4 too and those that do not are groups of their own (inet_reuseport_add_sock).
    only_v6 = member.family == socket.AF_INET6 and bool(
        member.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )
    return _listen(member.family, member.getsockname(), backlog, reuseport=True, only_v6=only_v6)


# -- Unix sockets ----------------------------------------------------------------------------------


def listen_unix(spec: Unix, backlog: int) -> tuple[socket.socket, OwnPath | None]:
    """A listening socket at a path or abstract name, and the file that stands for it; the caller's.

    Raises:
        BindFailed: it cannot be; a file that is no dead server's socket is left alone.
    """
    try:
        if not spec.is_abstract:
            with _folder_locked(spec.path, _BEGINNING_S) as is_locked:
                if not is_locked:
                    why = f"{_kept(_BEGINNING_S)}; end it (`lslocks` shows it), or choose another folder"
                    raise BindFailed(f"cannot listen on unix:{spec.path}: {why}", errno.EWOULDBLOCK)
                return _listen_at_path(spec, backlog)
        listening = _own_sockets.made(socket.AF_UNIX)
        try:
            listening.bind("\0" + spec.path[1:])
            listening.listen(backlog)
        except BaseException:
            listening.close()
            raise
        return listening, None
    except BindFailed:
        raise
    except OSError as error:
        raise BindFailed(f"cannot listen on unix:{spec.path}: {why_not(error)}", error.errno) from error


def _listen_at_path(spec: Unix, backlog: int) -> tuple[socket.socket, OwnPath | None]:
    _remove_stale(spec.path)
    listening = _own_sockets.made(socket.AF_UNIX)
    own: OwnPath | None = None
    try:
        listening.bind(spec.path)
        identity = _identity(spec.path)
        own = None if identity is None else OwnPath(os.path.abspath(spec.path), identity)
        # Nobody can connect before `listen`, so nobody gets in under other permissions than these.
        if spec.mode is not None:
            os.chmod(spec.path, spec.mode)
        listening.listen(backlog)
    except BaseException:
        listening.close()
        if own is not None:
            os.unlink(own.path)
        raise
    return listening, own


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more; refuse whatever else is at `path`."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise BindFailed(
            f"cannot listen on unix:{path}: there is something that is no socket, and it is left alone; remove it, or "
            "choose another path",
            errno.EEXIST,
        )
    with _own_sockets.made(socket.AF_UNIX) as visitor:
        visitor.setblocking(False)
        try:
            visitor.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:  # its server has just gone, and cleared up
            return
        except BlockingIOError:
            pass  # its queue is full, so somebody listens
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # which is that of a socket of another type, and alive
                raise
    raise BindFailed(
        f"cannot listen on unix:{path}: another process listens there; stop it, or choose another path",
        errno.EADDRINUSE,
    )


@contextlib.contextmanager
def _folder_locked(path: str, limit_s: float) -> Iterator[bool]:
    """Keep other servers of ours from binding and removing in the same folder meanwhile.

    Between `bind` and `listen` a socket looks stale, so two that start at once would each remove the other's.

    Returns: False if another process has the lock, and keeps it for so long: whoever may read the folder can.
    """
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it cannot be read, or is missing, which `bind` says better
        yield True
        return
    try:
        yield _lock(folder, CLOCK.monotonic() + limit_s)
    finally:
        os.close(folder)


def _lock(folder: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if CLOCK.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_S)
        except OSError:
            return True  # a file system without locks
        else:
            return True


def _kept(limit_s: float) -> str:
    return f"another process has kept its folder locked (flock) for {limit_s:g} seconds"


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def why_not(error: OSError) -> str:
    """The kernel's reason for refusing a listener, in words, and what to do about it."""
    advice = {
        errno.EADDRINUSE: "another process listens there (`ss -lptn` shows which); stop it, or choose another port",
        errno.EACCES: "no permission: a port below 1024 is for root, a path for whoever may write to its folder",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EAFNOSUPPORT: "this machine has no IPv6",
        errno.ENOENT: "its folder does not exist",
        errno.EBADF: "it is not open",
        errno.ENOTSOCK: "it is no socket",
    }
    if isinstance(error, socket.gaierror):
        return f"the host's name cannot be resolved ({error.strerror})"
    return advice.get(error.errno or 0, error.strerror or str(error))
