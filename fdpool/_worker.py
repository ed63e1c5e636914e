"""The loop in a worker: receive a call, run it, answer. The only place where user code runs.

Runs in: a process forked by the supervisor, in its main thread, one task at a time. Everything that a
task can do wrong ends here as an answer to that task: what it raises (anything, SystemExit included),
what cannot be loaded or pickled, descriptors that did not arrive.
"""

import errno
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from . import (
    _by_value,
    _chunks,
    _forensics,
    _messages,
    _own_sockets,
    _shared,
    _signals,
    _spill,
    payload,
    wire,
)
from ._board import Page
from ._clock import CLOCK
from ._leftovers import Leftovers, careful, encode
from ._messages import HEADER_BYTES, MAX_DATAGRAM, Header, Recycling
from ._naming import name_of
from ._spawn import flush_standard_streams, leave
from ._spin import Spin
from ._upkeep import Upkeep
from .errors import TaskTerminated, WireError
from .fds import SCM_MAX_FD, close_all, is_readable, take_and_close
from .payload import Payload

#: Longest that answers to tasks that came together are kept for each other, if those tasks take longer than expected.
FLUSH_S = 200e-6

_SHORT_WAIT_S = 50e-6  # for a page of memory, say

_NONE = -1
_NO_BODY = Payload(b"")

_IDLE_MS = 20  # a worker that has had nothing to do for so long has time to look at what tasks have left

_FINISH_S = 2  # how long what a failed initializer leaves behind (threads, exit handlers) may delay the news


class Boot(NamedTuple):
    """What a worker is told before it runs."""

    page: Page
    initializer: bytes | None
    initializer_spilled: bool
    initializer_fds: list[int]
    inherited: Callable[[], object] | None
    recycling: Recycling
    log_level: int | None


class _Clock:
    """How long something takes, and whether it runs meanwhile."""

    __slots__ = ("_ran", "began")

    def start(self) -> None:
        self.began = CLOCK.monotonic()
        self._ran = time.thread_time()

    def read(self) -> tuple[float, bool]:
        """Seconds since the start, and whether this thread ran for less than half of them: it waited for something, or
        others had the processor."""
        busy_s = CLOCK.monotonic() - self.began
        # To ask for the processor's time is a system call, of 0.3 us: not after what was too short anyway.
        waited = busy_s > _SHORT_WAIT_S and busy_s > 2 * (time.thread_time() - self._ran) + _SHORT_WAIT_S
        return busy_s, waited


class Worker:
    """One worker's state: its socket, and whether user code is running (a `_chunks.Guard`)."""

    def __init__(self, inbox: _own_sockets.OwnSocket, page: Page) -> None:
        self._inbox = inbox
        self._pid = os.getpid()
        self.in_task = False
        self.items: Iterator[object] = iter(())
        os.register_at_fork(after_in_child=self._drop_items)
        self._page = page
        self._clock = _Clock()
        self._ran = _NONE  # the task that ran last
        self._previous = _NONE  # the same, unless a task was returned since
        self._name = ""  # of that task's function
        self._careful = False  # that function is one of `_leftovers.careful`
        self._memory: _spill.Watch | None = None  # what the running task came in

    def run(self, boot: Boot) -> None:
        """Run the initializer, say READY, and serve until told to leave, or until the worker has had its time."""
        _signals.set_handler(signal.SIGINT, self._on_sigint)
        _signals.set_handler(signal.SIGURG, self._on_sigurg)
        if not self._initialize(boot):
            raise SystemExit(1)
        upkeep = self._upkeep = Upkeep(boot.recycling)
        self._send(_messages.READY, 0, _NO_BODY)
        spin = Spin()
        poll = select.poll()
        poll.register(self._inbox, select.POLLIN)
        ready, page = poll.poll, self._page
        while not upkeep.over and not page.is_last(self._ran):
            soon = spin.look(ready)
            if not soon and upkeep.has_unseen and not ready(_IDLE_MS):
                self._tell_left(upkeep.look_closely())
                if upkeep.over:
                    break
            received = wire.receive(self._inbox, MAX_DATAGRAM, SCM_MAX_FD)
            if not soon:
                spin.waited()
            if not self._take(received):
                break
            del received
        page.go()
        self._send(_messages.GOING, 0, _NO_BODY)

    def _take(self, received: wire.Received) -> bool:
        """Do what a message says; False if that is to leave."""
        data, fds, bytes_cut, fds_lost = received
        try:
            header = _messages.unpack_header(data)
            kind = header.kind
            calls = _messages.split(data) if kind == _messages.TASKS else []
        except WireError:
            close_all(fds)  # nobody that we know of speaks like that: let the task link live
            return True
        if kind == _messages.TASK or kind == _messages.CHUNK:
            if fds_lost or bytes_cut or len(fds) != header.fd_count:
                self._refuse(header, received)
            elif self._may_begin(header):
                if kind == _messages.TASK:
                    self._run_one(header, data, fds)
                else:
                    self._run_chunk(header, received)
            return True
        close_all(fds)
        if kind == _messages.TASKS:
            self._run_batch(calls)
        elif kind == _messages.FORGET:
            _shared.forget(data[HEADER_BYTES:])
        return kind != _messages.LEAVE

    def _run_one(self, header: Header, data: bytes, fds: list[int]) -> None:
        """Run a task that has come alone, and answer."""
        self._careful = False  # if it cannot be loaded
        self._clock.start()
        answer, kind = self._run_task(data[HEADER_BYTES:], fds, header.spilled)
        flags = 0
        if self._memory is not None:
            flags = _messages.RELEASED if self._memory.is_over() else 0
            self._memory = None
        busy_s, waited = self._clock.read()
        if waited:
            flags |= _messages.WAITED
        self._send(kind, header.task, answer, int(busy_s * 1e6), flags)
        del answer
        self._tell_left(self._upkeep.ran(self._name, 1, busy_s, self._careful))

    def _may_begin(self, header: Header) -> bool:
        """Say that a task begins; or that it is returned, as the client wants nothing to begin after the one before.

        What carries descriptors is not recalled: there is no other copy of it.
        """
        page = self._page
        if header.fd_count:
            page.begin(header.task)
        elif not page.may_begin(header.task, self._previous):
            page.begin(0)
            self._previous = _NONE
            returned = _messages.pack_header(_messages.RETURNED, header.task)
            self._send(_messages.ANSWERS, 0, Payload(returned))
            return False
        self._previous = self._ran = header.task
        return True

    def _run_batch(self, calls: list[tuple[int, int, bytes]]) -> None:
        """Run tasks that came together, and answer them together, but for those after which time has passed.

        Each answer is written down before the next task begins, so that it outlives whatever that does to us.
        """
        page = self._page
        answers: list[bytes] = []
        clock = self._clock
        clock.start()
        previous = self._previous
        first, count = clock.began, len(calls)
        calls.reverse()
        while calls:
            _, task, body = calls.pop()
            if not page.may_begin(task, previous):
                page.begin(0)
                previous = _NONE
                back = [task, *(task for _, task, _ in reversed(calls))]
                answers += [_messages.pack_header(_messages.RETURNED, task) for task in back]
                break
            answer, kind = self._run_call(body, [], False)
            del body
            previous = self._ran = task
            record = b""
            if not answer.fds:
                record = _messages.pack_header(kind, task, len(answer.body)) + answer.body
            if not record or not page.log(record):
                self._send_answers(answers)
                self._send(kind, task, answer)
                clock.start()
                continue
            answers.append(record)
            if calls and CLOCK.monotonic() - clock.began > FLUSH_S:
                self._send_answers(answers)
                clock.start()
        self._previous = previous
        self._send_answers(answers)
        self._tell_left(self._upkeep.ran(self._name, count - len(calls), CLOCK.monotonic() - first))

    def _run_chunk(self, header: Header, received: wire.Received) -> None:
        """Run items of a map as far as time allows, and answer with their results."""
        task, page = header.task, self._page
        start, stop, body = _messages.split_chunk(received.data)

        page.claim(task, start, start)
        try:
            self.in_task = True
            fn, items, star = payload.loads(body, received.fds, header.spilled)
            self.in_task = False
            if not start <= stop <= len(items):
                raise WireError(f"items {start} to {stop} of a chunk that has {len(items)}")
        except BaseException as error:
            self.in_task = False
            take_and_close(received.fds)
            self._send(_messages.FAILED, task, payload.dumps_failure(error))
            return
        began = CLOCK.monotonic()

        def flush(results: list[object], mixed: bool) -> None:
            carried = False
            for count, piece in _chunks.answers(results, mixed):
                carried = carried or piece.carries_fds
                self._send(_messages.PIECE, task, piece, count)
            if carried and _reports_unclosed():
                with _letting_go():
                    results.clear()

        claim, has_more = partial(page.claim, task), partial(is_readable, self._inbox)
        reached = _chunks.run(fn, items, star, start, stop, claim, self, flush, has_more)
        page.end()
        self._send(_messages.DONE if reached == stop else _messages.CUT, task, payload.dumps_result([]))
        name = f"items of a map of {name_of(fn)}"
        self._tell_left(self._upkeep.ran(name, reached - start, CLOCK.monotonic() - began))

    def _send_answers(self, answers: list[bytes]) -> None:
        """Send what `answers` holds, if anything, and forget it. They have taken since the clock was started."""
        if answers:
            busy_s, waited = self._clock.read()
            flags = _messages.WAITED if waited else 0
            self._send(_messages.ANSWERS, int(busy_s * 1e9), Payload(b"".join(answers)), flags=flags)
            answers.clear()
            self._page.forget_log()

    def _run_task(self, body: bytes, fds: list[int], spilled: bool) -> tuple[Payload, int]:
        """Load the call, run it, and pickle what became of it; nothing that it does escapes."""
        if len(fds) > spilled and _reports_unclosed():
            with _letting_go():
                return self._run_call(body, fds, spilled)
        return self._run_call(body, fds, spilled)

    def _run_call(self, body: bytes, fds: list[int], spilled: bool) -> tuple[Payload, int]:
        try:
            self.in_task = True
            if self._page.is_to_stop():  # the signal came before that
                raise TaskTerminated
            if spilled:
                self._memory = _spill.Watch()
            fn, args, kwargs = payload.loads(body, fds, spilled)
            if self._memory is not None:
                self._memory.loaded()
            if self._page.is_to_stop():  # what a handler raises in a finalizer of what was loaded is dropped
                raise TaskTerminated
            self._name = name_of(fn)
            self._careful = id(fn) in careful
            result = fn(*args, **kwargs)
            self.leave_if_forked()
            fn = args = kwargs = None
            answer = payload.dumps_result(result)
            self.in_task = False
            self._page.end()
            if answer.fds is not None and answer.carries_fds and _reports_unclosed():
                with _letting_go():
                    result = None
            return answer, _messages.DONE
        except BaseException as error:
            self.in_task = False
            take_and_close(fds)  # which the signal may have left here
            self.leave_if_forked(error)
            fn = args = kwargs = result = None
            answer = payload.dumps_failure(error)
            self._page.end()
            return answer, _messages.FAILED

    def _initialize(self, boot: Boot) -> bool:
        if boot.initializer is None and boot.inherited is None:
            return True
        try:
            self.in_task = True
            if boot.initializer is not None:
                fds, spilled = boot.initializer_fds, boot.initializer_spilled
                carried = len(fds) > spilled
                with _by_value.initializing():
                    fn, args, kwargs = payload.loads(boot.initializer, fds, spilled)
                    fn(*args, **kwargs)
                if carried and _reports_unclosed():
                    with _letting_go():
                        fn = args = kwargs = None
            elif boot.inherited is not None:
                with _by_value.initializing(getattr(boot.inherited, "func", None)):
                    boot.inherited()
            self.in_task = False
            self.leave_if_forked()
            return True
        except BaseException as error:
            self.in_task = False
            self.leave_if_forked(error)
            import logging

            # As concurrent.futures does it, for those who watch its logger.
            logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
            self._tell_boot_failed(payload.dumps_failure(error))
            return False

    def _tell_boot_failed(self, failure: Payload) -> None:
        """Tell the client, but first let out what was written and logged: it ends the workers at that news."""

        def give_up(_number: int, _frame: object) -> None:
            raise TimeoutError

        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(_FINISH_S)
        try:
            _finish()
        except TimeoutError:
            pass  # a thread that the initializer left behind does not end
        finally:
            signal.alarm(0)
        flush_standard_streams()
        self._send(_messages.BOOT_FAILED, 0, failure)

    def _refuse(self, header: Header, received: wire.Received) -> None:
        """Tell the client that the task's descriptors did not arrive whole, and so the task never ran."""
        got = len(received.fds)
        close_all(received.fds)
        reason = _messages.explain_loss(header.fd_count, got, f"worker {self._pid}")
        body = _messages.REFUSAL.pack(header.fd_count, min(got, 0xFFFF)) + reason.encode()
        self._send(_messages.REFUSED, header.task, Payload(body))

    def _send(self, kind: int, task: int, answer: Payload, micros: int = 0, flags: int = 0) -> None:
        """Send one answer, waiting as long as it takes: the client reads, or it is dead and so are we."""
        body, owned = answer.body, answer.fds
        fds: Sequence[int] = () if owned is None else owned.numbers
        if answer.spilled:
            flags |= _messages.SPILLED
        header = _messages.pack_header(kind, task, len(body), len(fds), flags, micros)
        pause_s = 0.001
        while True:
            try:
                wire.send(self._inbox, (header, body), fds)
                break
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    raise SystemExit(1) from None  # the client is dead: nobody reads a traceback of that
                if error.errno not in _messages.MAY_YET_LAND:
                    raise
                select.select([], [], [], pause_s)
                pause_s = min(pause_s * 2, 0.1)
        if owned is not None:
            answer.close()

    def _on_sigint(self, _number: int, _frame: object) -> None:
        """Interrupt the task, as Ctrl-C would; never the loop, which might lose a message half received."""
        if self.in_task:
            self.in_task = False
            raise KeyboardInterrupt

    def _on_sigurg(self, _number: int, _frame: object) -> None:
        """Interrupt the task, if it is the one that the client wants ended."""
        if self.in_task and self._page.is_to_stop():
            self.in_task = False
            raise TaskTerminated

    def _tell_left(self, left: Leftovers | None) -> None:
        if left is not None:
            self._send(_messages.LEFT, 0, Payload(encode(left)))

    def _drop_items(self) -> None:
        """Runs in: a child that a task has forked."""
        for _ in self.items:
            pass

    def leave_if_forked(self, error: BaseException | None = None) -> None:
        """A task may fork; a child that returns from it, or raises, is not a worker and must not speak as one."""
        if os.getpid() != self._pid:
            leave(error)


@contextmanager
def _letting_go() -> Iterator[None]:
    """Around what lets go of files that travel, a task's arguments and results: that they are closed then is the
    contract, and no carelessness of the task's, which `-W error` and `-X dev` would report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def _reports_unclosed() -> bool:
    """True if a ResourceWarning might be heard of; the filters that Python starts with ignore it.

    Those that ignore some texts only, as numpy's do, say nothing of the others.
    """
    for action, text, category, module, line in warnings.filters:
        if issubclass(ResourceWarning, category):
            if action != "ignore":
                return True
            if text is None and module is None and line == 0:
                return False
    return True


def main(inbox_fd: int, boot: Boot) -> None:
    """Serve on the worker's end of its slot's pair until told to leave."""
    _begin()
    _forensics.overhear_stderr(boot.page.say)
    inbox = _own_sockets.own(inbox_fd)
    if boot.log_level is not None:
        from . import _logs

        _logs.forward(inbox, boot.page.slot, boot.log_level)
    try:
        Worker(inbox, boot.page).run(boot)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOTSOCK, errno.EDESTADDRREQ, errno.ENOTCONN):
            raise
        # Nothing of ours is to be trusted to be what it was, stderr included.
        boot.page.say(b"fdpool: a task has closed descriptors of its worker's own, or replaced them\n")
        raise SystemExit(1) from None
    _finish()


def _begin() -> None:
    """What multiprocessing does at the start of its own processes (`BaseProcess._bootstrap`), if it is loaded.

    What was the parent's to finalize is not ours, inherited queues start their threads anew, and our own
    are waited for at our end: all of it is forgotten with the parent's exit handlers otherwise.
    """
    util = sys.modules.get("multiprocessing.util")
    if util is None:
        return
    import atexit
    from multiprocessing import process

    process._children = set()  # type: ignore[attr-defined]
    util._finalizer_registry.clear()
    util._run_after_forkers()
    atexit.register(util._exit_function)


def _finish() -> None:
    """What an interpreter does at its end, as far as a forked one may: join threads, run exit handlers."""
    import atexit

    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    atexit._run_exitfuncs()
