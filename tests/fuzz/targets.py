"""What is fuzzed: the decoders alone, and the live sockets of a worker, a client and an `ExecServer`.

Each target is a context manager: `feed(dice)` gives it one input, `check()` asserts that it goes on as before and
has lost nothing.
"""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import logging
import os
import random
import socket
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

import fdpool
from fdpool import _exec_session as session
from fdpool import _messages
from fdpool.errors import FdTransferError, WireError
from fdpool.exec_server import Deny, Escalate, ExecServer, Request, Run
from fdpool.fds import close_all
from fdpool.sockets import StreamSocket
from tests.contract import helpers
from tests.process_state import open_descriptors, wait_until

from . import inputs

_LIMIT_S = 30.0


def send(sock: socket.socket, data: bytes, fd: int, count: int) -> None:
    """One message with `count` times the descriptor `fd`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little") * count)] if count else []
    sock.sendmsg([data], rights)


class Target:
    """Base: owns a descriptor that is sent along."""

    def __enter__(self) -> Target:
        self.null = os.open(os.devnull, os.O_RDONLY)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        os.close(self.null)

    def feed(self, dice: random.Random) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Nothing to look at, by default: `feed` has."""


class Header(Target):
    """`unpack_header` and `split`: the message as it was packed, or WireError, and nothing else."""

    def feed(self, dice: random.Random) -> None:
        data, _ = inputs.datagram(dice, inputs.TO_WORKER + inputs.TO_CLIENT)
        try:
            header = _messages.unpack_header(data)
        except WireError:
            return
        assert data[0] == _messages.VERSION
        assert header.kind == data[1]
        try:
            found = _messages.split(data)
        except WireError:
            return
        lengths = [_messages.HEADER_BYTES + len(body) for _, _, body in found]
        assert sum(lengths) == len(data) - _messages.HEADER_BYTES


class Stream(Target):
    """A `StreamSocket` whose peer cuts its frames anywhere, and lies: whole frames, or an error that says why."""

    MAX_BYTES = 100

    def feed(self, dice: random.Random) -> None:
        peer, ours = socket.socketpair()
        before = len(os.listdir("/proc/self/fd"))
        with peer, StreamSocket.from_fd(ours.detach(), max_bytes=self.MAX_BYTES, max_fds=3) as stream:
            for data, count in inputs.pieces(dice, self.MAX_BYTES):
                send(peer, data, self.null, count)
            peer.shutdown(socket.SHUT_WR)
            while self._read(stream):
                pass
            assert len(os.listdir("/proc/self/fd")) == before

    def _read(self, stream: StreamSocket) -> bool:
        """Read one frame; False at the end of all that can be read."""
        try:
            payload, numbers = stream.receive_bytes()
        except EOFError:
            return False
        except FdTransferError:
            return True
        except WireError as error:
            return "cannot be read on" not in str(error)
        close_all(numbers)
        assert len(payload) <= self.MAX_BYTES
        assert len(numbers) <= 3
        return True


class Session(Target):
    """`_exec_session`: whatever a client says, and whenever, the session ends once, and its command with it."""

    def feed(self, dice: random.Random) -> None:
        machine = session.Session()
        commands = closed = 0
        for _ in range(dice.randint(1, 6)):
            event = self._event(dice, machine.state)
            for action in machine.handle(event):
                commands += isinstance(action, session.StartCommand)
                commands -= isinstance(action, session.EndCommand)
                closed += isinstance(action, session.Close)
            commands -= isinstance(event, session.Finished)
            assert closed == (machine.state is session.State.OVER)
            assert commands == (machine.state is session.State.RUNNING)

    def _event(self, dice: random.Random, state: session.State) -> session.Event:
        if state is session.State.POLICY and dice.random() < 0.7:
            return session.Decided(dice.choice((Run(), Escalate(), Escalate(), Deny("no"))))
        if state is session.State.RUNNING and dice.random() < 0.3:
            return session.Finished(dice.choice((0, 1, -9)))
        if dice.random() < 0.1:
            return dice.choice((session.Gone("gone"), session.Overdue()))
        return session.Received(
            inputs.session_message(dice, ["/bin/true"]), dice.choice((0, 1, 3, inputs.MOST_FDS))
        )


class Live(Target):
    """A pool of one worker, whose sockets can be reached here."""

    log_level: str | None = None

    def __enter__(self) -> Live:
        super().__enter__()
        self.pool = fdpool.Pool(1, log_level=self.log_level)
        self.probes = 0
        self.leaves = 0  # LEAVE messages, each of which a worker obeys
        assert self.pool.submit(helpers.square, 2).result(_LIMIT_S) == 4
        self.link = self.pool._client.links[0]
        self.in_worker = Counter(self.pool.submit(helpers.open_numbers).result(_LIMIT_S).values())
        wait_until(self.pool.worker_pids, _LIMIT_S)  # its start is reported with a pidfd, which may be late
        self.in_client = Counter(open_descriptors().values())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.pool.kill_workers()
        self.pool.shutdown()
        super().__exit__(kind, error, trace)

    def check(self) -> None:
        """The pool works, its worker is the one that it was, and neither side has more open than at first."""
        self.probes += 1
        assert self.pool.submit(helpers.square, self.probes).result(_LIMIT_S) == self.probes**2
        assert list(self.pool.map(helpers.square, range(20), timeout=_LIMIT_S)) == [n * n for n in range(20)]
        found = Counter(self.pool.submit(helpers.open_numbers).result(_LIMIT_S).values())
        assert found == self.in_worker, "the worker has other descriptors than at first"
        try:
            wait_until(lambda: not self._new_descriptors(), _LIMIT_S)
        except AssertionError:
            raise AssertionError(
                f"the client has more descriptors than at first: {self._new_descriptors()}"
            ) from None
        generation = self.pool._client.dispatcher.generation(0)
        assert generation <= 1 + self.leaves, "a worker died of what it was fed"

    def _new_descriptors(self) -> Counter[str]:
        return Counter(open_descriptors().values()) - self.in_client


class Worker(Live):
    """T13 to T15, T24: a worker's inbox."""

    def feed(self, dice: random.Random) -> None:
        kinds = (_messages.LEAVE,) if dice.random() < 0.0005 else inputs.TO_WORKER
        data, count = inputs.datagram(dice, kinds)
        left = len(data) > 1 and data[1] == _messages.LEAVE
        self.leaves += left
        send(self.link.mine, data, self.null, count)
        if left:  # nobody would read what follows
            self.pool.submit(helpers.nothing).result(_LIMIT_S)


class Client(Live):
    """T13 to T15, T24: the client's end of a slot. Some answers are to a task that runs: it may be settled by that,
    but once, and everything else goes on. Log records are read, and what is to be told is formatted, but not shown.
    """

    log_level = "ERROR"

    def __enter__(self) -> Client:
        self.handlers, logging.root.handlers = logging.root.handlers, [Formats()]
        self.warned, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
        super().__enter__()
        self.gate = -1  # while it is open, a task runs
        self.held: Future[Any] | Iterator[Any] | None = None
        self.called_back: Counter[Future[Any]] = Counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        logging.root.handlers, warnings.showwarning = self.handlers, self.warned

    def feed(self, dice: random.Random) -> None:
        tasks: tuple[int, ...] = inputs.STRANGERS
        if self.held is None and dice.random() < 0.01:
            self._hold(dice.random() < 0.5)
        if self.held is not None:
            tasks = (*tasks, *list(self.pool._client.tasks))
        data, count = inputs.datagram(dice, inputs.TO_CLIENT, tasks)
        send(self.link.theirs, data, self.null, count)
        if self.held is not None and dice.random() < 0.1:
            self._release()

    def _hold(self, chunk: bool) -> None:
        """Have a task run, or a chunk of a map, until the gate is closed."""
        read, self.gate = os.pipe()
        with open(read, "rb", buffering=0) as gate:
            if chunk:
                self.held = self.pool.map(
                    partial(wait_at_gate, gate), range(4), chunksize=4, timeout=_LIMIT_S
                )
            else:
                future = self.pool.submit(wait_at_gate, gate, 0)
                future.add_done_callback(lambda done: self.called_back.update([done]))
                self.held = future

    def _release(self) -> None:
        """Let it end, whatever it has been given as a result by now."""
        held, self.held = self.held, None
        os.close(self.gate)
        try:
            if isinstance(held, Future):
                held.result(_LIMIT_S)
            elif held is not None:
                for _ in held:
                    pass
        except cf.TimeoutError:
            raise
        except Exception:
            pass  # an error that it was given

    def check(self) -> None:
        if self.held is not None:
            self._release()
        super().check()
        assert all(count == 1 for count in self.called_back.values()), "a future was settled twice"
        self.called_back.clear()
        stats = self.pool.stats()
        assert stats.recycled == self.leaves, "a worker was let go that was not to go"
        assert len(stats.left.latest) <= 100


class Formats(logging.Handler):
    """Formats records, and raises what that does."""

    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


def wait_at_gate(gate: Any, number: int) -> int:
    """Runs in: a worker."""
    gate.read()
    return number


class Exec(Target):
    """An `ExecServer`: its door, and sessions that say anything."""

    PROGRAMS = ("/bin/true", "true", "/no such program", "", "/", "\0", "\ud800", "x" * 300_000)

    def __enter__(self) -> Exec:
        super().__enter__()
        logging.getLogger("fdpool.exec").setLevel(logging.CRITICAL)
        self.dice = random.Random(0)
        self.pool = fdpool.Pool(2)
        self.pool.run(["true"]).result(_LIMIT_S)
        self.server = ExecServer(self.pool, self._decide, patience_s=0.2, grace=0.1)
        self.door = socket.socket(fileno=os.dup(self.server.fileno()))
        self.before = Counter(open_descriptors().values())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.door.close()
        self.server.close()
        logging.getLogger("fdpool.exec").setLevel(logging.NOTSET)
        self.pool.shutdown()
        super().__exit__(kind, error, trace)

    def _left(self) -> Counter[str]:
        """Descriptors that were not there before."""
        return Counter(open_descriptors().values()) - self.before

    def _decide(self, request: Request) -> Run | Escalate | Deny:
        if request.workdir == "":
            raise LookupError("a policy that fails")
        return Escalate() if len(request.argv) == 1 else self.dice.choice((Run(), Deny("no")))

    def feed(self, dice: random.Random) -> None:
        if dice.random() < 0.2:
            data, count = inputs.noise(dice, 3), dice.choice((0, 1, 2))
            send(self.door, data, self.null, count)
            return
        mine, theirs = socket.socketpair()
        with mine, theirs:
            send(self.door, b"\0", theirs.fileno(), 1)
            theirs.close()
            try:
                for _ in range(dice.randint(0, 4)):
                    data, count = inputs.session_frame(dice, self.PROGRAMS)
                    send(mine, data, self.null, count)
            except OSError:
                pass  # it was turned away

    def check(self) -> None:
        wait_until(lambda: not self.server._sessions, _LIMIT_S)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self._left(), _LIMIT_S)
        assert not self._left()
        assert self.pool.submit(helpers.square, 3).result(_LIMIT_S) == 9


PURE: tuple[type[Target], ...] = (Header, Stream, Session)
LIVE: tuple[type[Target], ...] = (Worker, Client, Exec)
