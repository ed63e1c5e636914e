"""What a service and systemd tell each other: sockets that it opened for us, and how we are.

Both are plain environment variables and datagrams: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
Where systemd has not started the process, there are no sockets, and every notification does nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Mapping, MutableMapping

from . import _own_sockets
from ._clock import CLOCK
from .errors import BindFailed

_FIRST = 3  # SD_LISTEN_FDS_START
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
_PATIENCE_S = (
    5.0  # for a change of state while systemd's queue is full, which holds but a few messages (unix(7))
)


_passed: list[tuple[str, socket.socket]] = []  # to this process, as far as it has looked


def passed_sockets() -> list[tuple[str, socket.socket]]:
    """Name and socket of each listener that systemd has opened for this process, however often one asks; borrowed.

    They stay open, close-on-exec: a program may have several servers, and what one of them has no use for is perhaps
    another's. Nobody's client is kept waiting for that, as systemd keeps them open anyway.

    Raises:
        BindFailed: as `listen_sockets`, the first time.
    """
    _passed.extend(listen_sockets())
    return list(_passed)


def listen_sockets(environment: MutableMapping[str, str] = os.environ) -> list[tuple[str, socket.socket]]:
    """Name and socket of each listener that systemd has opened for this process; the caller's to close.

    The name is the unit's FileDescriptorName=, or "unknown" if the environment has none. Empty if no sockets were
    passed, or to another process (LISTEN_PID). The variables are removed in any case, so that no child takes them
    for its own and a second call finds nothing. The sockets are close-on-exec.

    Raises:
        BindFailed: the variables contradict each other or what is open, or something was passed that does not
            listen for connections. Then nothing has been taken over.
    """
    given = {name: environment.pop(name, None) for name in _LISTEN}
    if given["LISTEN_PID"] is None or given["LISTEN_FDS"] is None:
        return []
    if _number("LISTEN_PID", given["LISTEN_PID"]) != os.getpid():
        return []
    count = _number("LISTEN_FDS", given["LISTEN_FDS"])
    if not 0 < count <= 2**31 - 1 - _FIRST:
        raise BindFailed(f"systemd's LISTEN_FDS is {count}, which is no number of sockets")
    names = ["unknown"] * count if given["LISTEN_FDNAMES"] is None else given["LISTEN_FDNAMES"].split(":")
    if len(names) != count:
        raise BindFailed(
            f"systemd passed {count} sockets (LISTEN_FDS) and {len(names)} names (LISTEN_FDNAMES)"
        )
    # All is looked at before any is owned: where one is wrong, the others may be somebody else's.
    for number, name in enumerate(names, _FIRST):
        _check(number, name)
    return [(name, _owned(number)) for number, name in enumerate(names, _FIRST)]


def _number(variable: str, text: str) -> int:
    if not (text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()):
        raise BindFailed(f"systemd's {variable} is {text!r}, which is no number")
    return int(text)


def _check(number: int, name: str) -> None:
    """Refuse what does not accept connections, with the line of the unit that is to be changed."""
    what = f"descriptor {number}, which systemd has passed as {name!r},"
    try:
        kind = os.fstat(number).st_mode
    except OSError as error:
        raise BindFailed(f"{what} is not open: is LISTEN_FDS right?", error.errno) from error
    if not stat.S_ISSOCK(kind):
        raise BindFailed(f"{what} is no socket: of a socket unit's lines only ListenStream= can be served")
    # A probe of our own, as closing it must not close what was passed.
    with _own_sockets.adopt(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _FIRST)) as probe:
        if probe.type != socket.SOCK_STREAM:
            raise BindFailed(f"{what} is a {probe.type.name} socket: write ListenStream= into its unit")
        if not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise BindFailed(f"{what} does not listen: write Accept=no into its unit")


def _owned(number: int) -> socket.socket:
    os.set_inheritable(number, False)
    return _own_sockets.adopt(number)


def passes_sockets(environment: Mapping[str, str] = os.environ) -> bool:
    """True if `listen_sockets` would look for some: they are announced, and to this process. Changes nothing."""
    return bool(environment.get("LISTEN_FDS")) and environment.get("LISTEN_PID") == str(os.getpid())


def successor_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that is to take this one's place under the same unit.

    WATCHDOG_PID names this process, and would have the successor believe that nobody watches it. Without it
    the watchdog counts for whoever is started (sd_watchdog_enabled(3)). The LISTEN_ variables are gone, too.
    """
    return {key: value for key, value in environment.items() if key not in (*_LISTEN, "WATCHDOG_PID")}


class Notifier:
    """Tells systemd the service's state. Every verb returns False if it could not be told, and never raises.

    Args:
        environment: read once, here. Nothing is removed from it.

    Attributes:
        watchdog_interval_s: call `watchdog` this often: half of WatchdogSec=, as sd_watchdog_enabled(3) advises. None
            if nobody watches this process.

    A change of state waits for up to 5 s while systemd's queue is full; `watchdog` and `status` do not wait, as they
    come again. Thread-safe: each notification is one datagram from a socket of its own.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._place = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_interval_s = _watchdog_interval_s(environment) if self.enabled else None

    @property
    def enabled(self) -> bool:
        """True if systemd listens: NOTIFY_SOCKET is a path, or a name in Linux's abstract namespace."""
        return self._place[:1] in ("/", "@") and len(self._place) > 1

    def ready(self) -> bool:
        """The service is started, or its reload is over; a unit of Type=notify waits for this."""
        return self._send("READY=1")

    def reloading(self) -> bool:
        """A reload begins; `ready` says that it is over. With the time that Type=notify-reload asks for."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={CLOCK.monotonic_ns() // 1000}")

    def stopping(self) -> bool:
        """The service begins to end."""
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """The service is alive."""
        return self._send("WATCHDOG=1", patience_s=0.0)

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(f"STATUS={' '.join(text.split())}", patience_s=0.0)

    def main_pid(self, pid: int) -> bool:
        """Another process is the service's main process from now on."""
        return self._send(f"MAINPID={pid}")

    def _send(self, *assignments: str, patience_s: float = _PATIENCE_S) -> bool:
        if not self.enabled:
            return False
        address = self._place.replace("@", "\0", 1) if self._place.startswith("@") else self._place
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(patience_s)
                # Kernel: only of a connected datagram socket does poll(2) know whether the other queue is full. An
                # unconnected one is always writable, and waiting for it would be a busy loop.
                sender.connect(address)
                sender.send("\n".join(assignments).encode())
        except OSError:  # nobody is there, or is too busy to look: neither is the service's trouble
            return False
        return True


def _watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    period, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID")
    if not (period.isascii() and period.isdigit()) or int(period) == 0:
        return None
    if pid is not None and pid != str(os.getpid()):
        return None
    return int(period) / 2e6
