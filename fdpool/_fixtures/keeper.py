"""The keeper of a service that several processes of tests use: it starts the server, and ends when nobody holds it.

Runs in: a process of its own, so that it depends on none of those. Each of them holds a connection to the keeper's
socket for as long as it uses the service; the kernel closes that however the process ends.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import selectors
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import _own_sockets
from ..fds import close_all
from ..pool import Pool
from ..sockets import StreamSocket
from . import importing
from .errors import ServerDied
from .serve import Serve

FIRST_S = 30.0  # how long the first user may take to come

# Forked at once, so that it is an orphan: whoever starts it may end long before it, and is not to wait for it.
_BOOT = """import os, sys
os.fork() and os._exit(0)
sys.path[:] = sys.argv[2:]
from fdpool._fixtures.keeper import main
main(sys.argv[1])
"""


class Order(NamedTuple):
    """What to serve: `serve(*args, **options)`, or `serve.command(...)`. Pickled, as it goes to a fresh interpreter.

    Attributes:
        what, given: the same for all processes that mean the same, and different for others: what serves, and with
            which arguments and options.
    """

    what: str
    given: str
    command: bool
    args: tuple[Any, ...]
    options: dict[str, Any]


def spawn(path: str, door: socket.socket, order: bytes, log_fd: int) -> None:
    """Start a keeper that answers on `door`, which is bound to `path`. It is nobody's child, in a session of its own.

    Args:
        order: a pickle of two, the second of which is an `Order`.
        log_fd: for its standard output and error; borrowed, as `door` is.

    Raises:
        OSError: it cannot be started.
    """
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(order)
        file.seek(0)
        # It expects the door and the order as 3 and 4, which these may have here: first they are moved out of the way.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (door.fileno(), file.fileno(), log_fd)]
    actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, high[at], number) for at, number in ((2, 1), (2, 2), (0, 3), (1, 4))]
    arguments = [sys.executable, "-c", _BOOT, path, *sys.path]
    # It is no test's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    try:
        pid = os.posix_spawn(sys.executable, arguments, environment, file_actions=actions, setsid=True)
    finally:
        close_all(high)
    os.waitpid(pid, 0)


def main(path: str) -> None:
    """Serve until nobody holds the service any more."""
    door = _own_sockets.adopt(3)
    with open(4, "rb") as file:
        order: Order = pickle.load(file)[1]
    pool = Pool(2, **importing.with_pool_options({"max_tasks_per_child": 1}))
    serve = Serve(pool)
    try:
        answer: dict[str, Any] = {"what": order.what, "given": order.given}
        try:
            served = (serve.command if order.command else serve)(*order.args, **order.options)
            answer |= {"kind": served.listener.kind, "pid": served.pid}
            numbers = [served.listener.fileno(), served.log_fd]
        except BaseException as error:
            what, logs = (error.what, error.logs) if isinstance(error, ServerDied) else (f"{error}", "")
            answer |= {"error": what, "logs": logs}
            numbers = []
        _keep(door, answer, numbers)
    finally:
        _give_up_name(path)
        door.close()
        serve.close()
        pool.shutdown()
        try:
            os.rmdir(os.path.dirname(path))
        except OSError:
            pass  # other services are in it


def _give_up_name(path: str) -> None:
    """Remove the socket's name and the lock's, with the lock held, and the door open until then: who has the lock is
    let in by a keeper, or there is none. Otherwise it could be the next one's name that is removed."""
    # The folder has gone where temporary files were cleaned up.
    with suppress(FileNotFoundError), open(f"{path}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in (path, lock.name):
            Path(name).unlink(missing_ok=True)


def _keep(door: socket.socket, answer: dict[str, Any], numbers: list[int]) -> None:
    """Answer whoever comes, and return when the last of them has gone, or nobody has come."""
    holders: set[StreamSocket] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(door, selectors.EVENT_READ)
        while True:
            ready = selector.select(None if holders else FIRST_S)
            for key, _ in ready:
                if key.fileobj is door:
                    holder = StreamSocket.from_fd(door.accept()[0].detach())
                    holders.add(holder)
                    selector.register(holder, selectors.EVENT_READ)
                    try:
                        holder.send_with_fds(answer, numbers)
                    except OSError:
                        pass  # it has gone, and its end says so as well
                elif isinstance(key.fileobj, StreamSocket):  # nobody says anything, so it is the end
                    selector.unregister(key.fileobj)
                    holders.discard(key.fileobj)
                    key.fileobj.close()
            if not holders:
                return
