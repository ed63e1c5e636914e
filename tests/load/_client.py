"""An HTTP client that loads a server and loses sight of no request; one thread, one epoll.

With `rps` requests are due at random moments of that rate, whether or not the server keeps up, and latency counts from
then: a server that stops for a second is charged for all who would have come in it. Without, each of
`connections` has one request on its way at any time, which measures what the server can do.
"""

from __future__ import annotations

import errno
import random
import select
import socket
import threading
import time
from collections import deque

from ._tally import Tally

_LOOK_AT_LEAST_EVERY_S = 0.05
_KEPT_S = 4.0  # a connection that is idle for less is not to be closed; servers that drain promise 5 s
_TRY_AGAIN_S = 0.001  # a Unix socket whose queue is full does not let one wait for it


class _Request:
    """One request: its token, when it was due, and how often it was sent."""

    __slots__ = ("attempts", "due", "token")

    def __init__(self, token: str, due: float) -> None:
        self.token = token
        self.due = due
        self.attempts = 0


class _Connection:
    """A socket, and the request on its way there."""

    __slots__ = ("connected", "keep", "keeps_until", "received", "request", "served", "sock")

    def __init__(self, sock: socket.socket, keep: bool) -> None:
        self.sock = sock
        self.keep = keep
        self.connected = False
        self.request: _Request | None = None
        self.received = b""
        self.served = 0
        self.keeps_until = 0.0  # once it was answered: when the server may close it, unless it is used before


class Client:
    """Loads one server.

    Args:
        address: `tcp://127.0.0.1:8000` or `unix:/path`.
        rps: requests a second; None for as many as `connections` bear.
        connections: how many requests are on their way without `rps`.
        keep_alive: share of requests, 0 to 1, for which the connection is kept, and a kept one used.
        path: what is requested is `/TOKEN` and this.
        timeout_s: after which a request has failed.
        seed: of the random moments and choices.

    `run` may be called in a thread, and `stop` from any.
    """

    def __init__(
        self,
        address: str,
        *,
        rps: float | None = None,
        connections: int = 16,
        keep_alive: float = 0.5,
        path: str = "",
        timeout_s: float = 10.0,
        seed: int = 1,
    ) -> None:
        self.tally = Tally()
        self._family, self._place = _destination(address)
        self._rps = rps
        self._connections = connections
        self._keep_alive = keep_alive
        self._path = path
        self._timeout_s = timeout_s
        self._random = random.Random(seed)
        self._prefix = f"{seed}-{self._random.getrandbits(32):08x}"
        self._sent = 0
        self._stopped = threading.Event()
        self._epoll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._again: deque[tuple[float, _Request]] = deque()
        self._overdue_at = 0.0

    def stop(self) -> None:
        """Send no more; `run` returns when what is on its way has ended."""
        self._stopped.set()

    @property
    def on_their_way(self) -> int:
        """Requests that are neither answered nor lost just now."""
        return sum(each.request is not None for each in list(self._open.values())) + len(self._again)

    def run(self, seconds: float) -> Tally:
        """Send for so long, wait for the answers, and count. Leaves nothing open."""
        begun = time.perf_counter()
        try:
            self._send_until(begun + seconds, begun)
            self.tally.seconds = time.perf_counter() - begun
            self._stopped.set()
            while self.on_their_way:
                self._turn(time.perf_counter() + _LOOK_AT_LEAST_EVERY_S)
        finally:
            for connection in list(self._open.values()):
                self._close(connection)
            self._epoll.close()
        return self.tally

    def _send_until(self, end: float, begun: float) -> None:
        due = begun
        if self._rps is None:
            for _ in range(self._connections):
                self._start(self._next(begun))
        while (now := time.perf_counter()) < end and not self._stopped.is_set():
            if self._rps is not None:
                while due <= now:
                    self._start(self._next(due))
                    due += self._random.expovariate(self._rps)
            self._turn(min(end, due) if self._rps is not None else end)

    def _next(self, due: float) -> _Request:
        self._sent += 1
        return _Request(f"{self._prefix}-{self._sent}", due)

    def _turn(self, until: float) -> None:
        """Attend to what happens, until then or a little."""
        now = time.perf_counter()
        patience_s = _TRY_AGAIN_S if self._again else _LOOK_AT_LEAST_EVERY_S
        for number, events in self._epoll.poll(max(0.0, min(until - now, patience_s))):
            connection = self._open.get(number)
            if connection is not None:
                self._attend(connection, events)
        now = time.perf_counter()
        while self._again and self._again[0][0] <= now:
            self._start(self._again.popleft()[1])
        if now >= self._overdue_at:
            self._overdue_at = now + _LOOK_AT_LEAST_EVERY_S
            self._give_up_on_overdue(now)

    def _give_up_on_overdue(self, now: float) -> None:
        for connection in list(self._open.values()):
            request = connection.request
            if request is not None and now - request.due > self._timeout_s:
                self._lose(connection, "failed", f"no answer within {self._timeout_s:g} s")

    # -- one request -------------------------------------------------------------------------------

    def _start(self, request: _Request) -> None:
        keep = self._keep_alive > 0 and self._random.random() < self._keep_alive
        if keep and self._idle and request.attempts == 0:
            connection = self._idle.pop(self._random.randrange(len(self._idle)))
            connection.request = request
            self._send(connection)
            return
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            problem = sock.connect_ex(self._place)
            if problem == errno.EINPROGRESS:
                # Asked again it is known: on this machine it has been made by now. So the request is sent with it, also
                # where many are due at once: a server may take connections as long as they ask for nothing.
                problem = sock.connect_ex(self._place)
        except OSError as error:  # no descriptor is left, say
            self._count_lost(request, "failed", f"cannot connect: {error}")
            return
        if problem == errno.EAGAIN:
            sock.close()
            self._again.append((time.perf_counter() + _TRY_AGAIN_S, request))
            return
        connection = _Connection(sock, keep)
        connection.request = request
        self.tally.opened += 1
        self._open[sock.fileno()] = connection
        self._epoll.register(sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if problem else 0))
        if problem == 0:
            connection.connected = True
            self._send(connection)
        elif problem != errno.EALREADY:
            self._lose(connection, "reset", f"cannot connect: {errno.errorcode[problem]}")

    def _send(self, connection: _Connection) -> None:
        request = connection.request
        assert request is not None
        request.attempts += 1
        lines = f"GET /{request.token}{self._path} HTTP/1.1\r\nHost: x\r\n"
        if not connection.keep:
            lines += "Connection: close\r\n"
        try:
            connection.sock.send(f"{lines}\r\n".encode())
        except OSError as error:
            self._gone(connection, errno.errorcode[error.errno or 0])

    def _attend(self, connection: _Connection, events: int) -> None:
        if not connection.connected:
            problem = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem:
                self._lose(connection, "reset", f"cannot connect: {errno.errorcode[problem]}")
                return
            connection.connected = True
            self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)
            self._send(connection)
            return
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(connection, errno.errorcode[error.errno or 0])
            return
        if not data:
            self._gone(connection, "closed")
            return
        connection.received += data
        answer = _parsed(connection.received)
        if answer is not None:
            self._answered(connection, *answer)

    def _answered(self, connection: _Connection, status: int, body: bytes, keep: bool) -> None:
        request, connection.request = connection.request, None
        connection.received = b""
        connection.served += 1
        connection.keeps_until = time.perf_counter() + _KEPT_S
        if request is None:  # an answer that nobody asked for
            self._close(connection)
            return
        words = body.split()
        if status == 200 and len(words) >= 2 and words[1].decode() == request.token:
            self.tally.ok += 1
            self.tally.latencies.append(time.perf_counter() - request.due)
            pid = int(words[0])
            self.tally.pids[pid] = self.tally.pids.get(pid, 0) + 1
        else:
            self._count_lost(request, "failed", f"status {status}: {body[:80]!r}")
        if keep and connection.keep:
            self._idle.append(connection)
        else:
            self._close(connection)
        if self._rps is None and not self._stopped.is_set():
            self._start(self._next(time.perf_counter()))

    def _gone(self, connection: _Connection, how: str) -> None:
        """The server has closed the connection, or the kernel says that it is broken."""
        request = connection.request
        is_kept = connection.served > 0 and not connection.received
        self.tally.cut += is_kept and time.perf_counter() < connection.keeps_until
        if request is not None and is_kept and request.attempts == 1:
            self.tally.raced += 1
            connection.request = None
            self._close(connection)
            self._start(request)
        elif request is not None:
            self._lose(connection, "reset", f"{how} after {len(connection.received)} bytes")
        else:
            self._close(connection)

    def _lose(self, connection: _Connection, kind: str, why: str) -> None:
        request, connection.request = connection.request, None
        self._close(connection)
        if request is not None:
            self._count_lost(request, kind, why)

    def _count_lost(self, request: _Request, kind: str, why: str) -> None:
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        self.tally.lost[request.token] = f"{kind}: {why}"
        if self._rps is None and not self._stopped.is_set():
            again = time.perf_counter() + 0.01  # who was refused does not ask at once
            self._again.append((again, self._next(again)))

    def _close(self, connection: _Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
        self._epoll.unregister(connection.sock.fileno())
        del self._open[connection.sock.fileno()]
        connection.sock.close()


def _destination(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        return socket.AF_UNIX, path.replace("@", "\0", 1) if path.startswith("@") else path
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return family, (host.strip("[]"), int(port))


def _parsed(received: bytes) -> tuple[int, bytes, bool] | None:
    """Status, body, and whether the connection is kept, once all of the answer has come."""
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return None
    lines = head.lower().split(b"\r\n")
    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
    if len(body) < length:
        return None
    keep = b"connection: close" not in lines and not lines[0].startswith(b"http/1.0")
    return int(lines[0].split()[1]), body, keep
