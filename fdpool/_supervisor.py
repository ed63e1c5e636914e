"""The supervisor's loop: forks, reaps and kills workers as the client says; it decides nothing else.

Runs in: a process of its own, single-threaded, so that it may fork at any time. Its life hangs on the
client's: when the control link ends, or the client's pidfd says that it is dead, the whole tree is
killed and the supervisor exits. It never unpickles anything that a worker or a task made.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import NoReturn

from . import _forensics, _lending, _messages, _oom, _platform, _spawn, _trees, _worker, fds
from ._board import AREA_BYTES, Page
from ._clock import CLOCK
from ._ending import Ending
from ._messages import Configure, EndWorker, Lend, Quit, StartWorker
from ._reserve import Reserve
from .errors import FdTransferError
from .sockets import StreamSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


# Of a server. Who sends one to all of its processes (`systemctl stop`, unless KillMode= is mixed) means the server, and
# that needs its workers to finish what they run.
_HEEDED_BY_CLIENT = (
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
_IDLE_MS = 20.0  # nothing asked for so long is an idle moment
_LOOK_AGAIN_S = 0.05  # for what dead workers have left, where nobody could look


class _Child:
    """One worker: whose it is, what tells of its death, the file that its stacks go to, and its end once that was asked
    for. The descriptors are its own."""

    __slots__ = ("ending", "generation", "mark", "pid", "pidfd", "slot", "stacks_fd")

    def __init__(self, slot: int, generation: int, mark: str, pid: int, stacks_fd: int | None) -> None:
        self.slot = slot
        self.mark = mark
        self.generation = generation
        self.pid = pid
        self.pidfd = _platform.open_pidfd(pid)
        self.stacks_fd = stacks_fd
        self.ending: Ending | None = None

    def owned(self) -> list[int]:
        return [fd for fd in (self.pidfd, self.stacks_fd) if fd is not None]


class Supervisor:
    """Serves one client over `control`, until it says Quit or is gone.

    Args:
        control: the supervisor's end of the control link; owned.
        client_pidfd: readable once the client is dead, or None; owned. The link's EOF alone would not do:
            a child that the client forked may hold a copy of its end.
        inherited: what each worker calls first if there is no payload of it; only in a fork of the client.
        fresh: this is no fork of the client.
    """

    def __init__(
        self,
        control: StreamSocket,
        client_pidfd: int | None,
        inherited: Callable[[], object] | None,
        fresh: bool,
    ) -> None:
        self._control = control
        self._inherited = inherited
        self._fresh = fresh
        self._client_pidfd = client_pidfd
        self._configuration: Configure | None = None
        self._board_fd = -1
        self._initializer_fds: list[int] = []
        self._children: dict[int, _Child] = {}
        self._endings: list[_Child] = []
        self._unswept: list[_Child] = []  # dead, and nobody could see yet what they have left
        self._lent: set[int] = set()  # other pools' supervisors, that are children of this one
        self._sigchld_read, self._sigchld_write = (fds.above_stdio(fd) for fd in os.pipe())
        os.set_blocking(self._sigchld_read, False)
        os.set_blocking(self._sigchld_write, False)
        self._reserve = Reserve()  # to look at processes with, and for a worker's inbox
        self._poll = select.poll()
        self._warm = False
        self._oom = _oom.Witness()

    def run(self) -> None:
        """Serve until the client has said Quit or is dead; then nothing that descends from here lives."""
        self._listen_to_signals()
        self._poll.register(self._control.fileno(), select.POLLIN)
        self._poll.register(self._sigchld_read, select.POLLIN)
        if self._client_pidfd is not None:
            self._poll.register(self._client_pidfd, select.POLLIN)
        try:
            while self._turn():
                pass
        finally:
            for pid in self._children:
                _trees.kill_group(pid)
            self._reserve.close()
            _trees.kill_descendants(sparing=self._lent)

    def _listen_to_signals(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._sigchld_write, warn_on_full_buffer=False)
        if self._configuration is not None and self._configuration.client_heeds_signals:
            for number in _HEEDED_BY_CLIENT:  # not for workers: a fork of this has the default again
                signal.signal(number, signal.SIG_IGN)

    def _turn(self) -> bool:
        """Wait once and handle what came; False when it is time to go."""
        ready = {fd for fd, _ in self._poll.poll(self._poll_ms())}
        if not ready and self._children and not self._warm:
            self._warm_up()
        if ready - {self._control.fileno(), self._client_pidfd}:
            # A pidfd tells what SIGCHLD does not, where a module that was preloaded has it ignored.
            self._forget_wakeups()
            self._reap()
        if self._client_pidfd in ready:
            return False
        unswept, self._unswept = self._unswept, []
        for child in unswept:
            self._sweep(child)
        self._move_endings_on(CLOCK.monotonic())
        return self._control.fileno() not in ready or self._serve_frame()

    def _poll_ms(self) -> float | None:
        if self._children and not self._warm:
            return _IDLE_MS
        now = CLOCK.monotonic()
        moments = [due for child in self._endings if (due := _due(child)) is not None]
        if self._unswept:
            moments.append(now + _LOOK_AGAIN_S)
        if not moments:
            return None
        return min(max(0.0, min(moments) - now), fds.LONGEST_POLL_S) * 1000 + 1

    def _warm_up(self) -> None:
        """Import what each worker would otherwise import for itself. Before the first worker it would be somebody's
        waiting time."""
        self._warm = True
        import gc
        import importlib

        assert self._configuration is not None
        try:
            for name in self._configuration.idle_imports:
                importlib.import_module(name)
        except Exception:
            return  # then whoever needs it will say so
        gc.freeze()

    def _serve_frame(self) -> bool:
        """Do what one frame says; False if it is the last."""
        try:
            with self._reserve.lent():
                data, numbers = self._control.receive_bytes()
        except FdTransferError as error:
            data, numbers = error.data, []  # there was no room for them
        except (EOFError, OSError):
            return False
        message = _messages.decode_control(data)
        if isinstance(message, StartWorker):
            self._start_worker(message, numbers)
        elif isinstance(message, EndWorker):
            self._end_worker(message)
        elif isinstance(message, Configure):
            if not numbers:
                return False
            self._configure(message, numbers)
        elif isinstance(message, Lend):
            if numbers:  # else its client sees the end of the link
                self._lend(message, numbers)
        elif isinstance(message, Quit):
            return False
        return True

    def _configure(self, message: Configure, numbers: list[int]) -> None:
        import gc

        self._configuration = message
        self._warm = not message.idle_imports
        self._board_fd, *self._initializer_fds = numbers
        sys.argv[:] = message.argv
        sys.path[:] = message.path
        self._listen_to_signals()
        if message.preload:
            from . import _preload

            failed = _preload.load(message.preload, self._client_pidfd, flush=self._fresh)
            if failed is not None:
                self._tell(_messages.PreloadFailed(*failed))
                self._configuration = None
                return
            self._listen_to_signals()  # which a module may have taken
        # What is shared copy-on-write stays shared only if the collector does not touch it
        # (gc.freeze, Python 3.7: made for exactly this).
        gc.freeze()

    def _lend(self, message: Lend, numbers: list[int]) -> None:
        """Fork a supervisor for another pool. If that fails, its client sees the end of the link, and does without."""
        try:
            self._lent.add(_spawn.fork_supervisor(lambda: self._serve_another(message, numbers)))
        except OSError:
            pass
        finally:
            fds.close_all(numbers)

    def _serve_another(self, message: Lend, numbers: list[int]) -> NoReturn:
        """Runs in: the fork. Of what this one had it keeps the client's pidfd."""
        client_pidfd, self._client_pidfd = self._client_pidfd, None
        fds.close_all([*self._own_fds()[1:], self._board_fd, *self._initializer_fds])
        self._control.close()
        try:
            control = StreamSocket.from_fd(_lending.adopt(message, numbers))
            own_pidfd = _platform.open_pidfd(os.getpid())
            if own_pidfd is None:
                os._exit(1)
            control.send_bytes(_messages.encode_control(_messages.Born(os.getpid())), [own_pidfd])
        except OSError:
            os._exit(1)  # it has taken too long, and nobody waits any more
        os.close(own_pidfd)
        _serve_fresh(control, client_pidfd)

    def _start_worker(self, message: StartWorker, numbers: list[int]) -> None:
        slot, generation = message
        if self._configuration is None:
            # The client may have asked before it heard that, and a fast worker's answer would overtake the news.
            fds.close_all(numbers)
            self._tell(_messages.StartFailed(slot, generation, "a module could not be preloaded", False))
            return
        if not numbers:
            reason = "its supervisor had no descriptor left for its inbox"
            self._tell(_messages.StartFailed(slot, generation, reason, True))
            return
        inbox_fd = numbers[0]
        stacks_fd = _new_stacks_file()
        page = _new_page(self._board_fd, slot)
        mark = f"{_trees.supervisor_mark(os.getpid(), self._configuration.token)}{slot}.{generation}"
        os.environ[_trees.WORKER_MARK] = mark
        try:
            pid = _spawn.fork_worker(
                lambda: self._be_worker(slot, page, inbox_fd, stacks_fd), close=self._own_fds()
            )
        except OSError as error:
            if stacks_fd is not None:
                os.close(stacks_fd)
            # Kernel: EAGAIN at a limit of processes, RLIMIT_NPROC or the control group's pids.max; ENOMEM.
            self._tell(_messages.StartFailed(slot, generation, f"fork failed: {error}", True))
            return
        finally:
            del os.environ[_trees.WORKER_MARK]
            fds.close_all(numbers)
            self._reserve.fill()  # whose place the inbox may have had
            if page is not None:
                page.close()
        self._children[pid] = child = _Child(slot, generation, mark, pid, stacks_fd)
        if child.pidfd is not None:
            self._poll.register(child.pidfd, select.POLLIN)
        self._tell(
            _messages.WorkerStarted(slot, generation, pid), [] if child.pidfd is None else [child.pidfd]
        )
        if child.pidfd is None and not _trees.is_ours(pid):
            # The kernel reaps, and has been quicker: nothing would tell of it later.
            self._report_death(child, None)
        self._oom.look_at_times()

    def _be_worker(self, slot: int, page: Page | None, inbox_fd: int, stacks_fd: int | None) -> None:
        """Runs in: the forked worker."""
        if stacks_fd is not None:
            _forensics.write_stacks_to(stacks_fd)
        configuration = self._configuration
        assert configuration is not None
        page = page or Page(self._board_fd, slot)
        page.enter()
        os.close(self._board_fd)
        boot = _worker.Boot(
            page,
            configuration.initializer,
            configuration.initializer_spilled,
            self._initializer_fds,
            self._inherited,
            configuration.recycling,
            configuration.log_level,
        )
        _worker.main(inbox_fd, boot)

    def _own_fds(self) -> list[int]:
        """What a worker must not keep: everything of this loop's, the initializer's descriptors excepted."""
        own = [self._control.fileno(), self._sigchld_read, self._sigchld_write, *self._reserve.owned()]
        own += [fd for child in self._children.values() for fd in child.owned()]
        return own if self._client_pidfd is None else [*own, self._client_pidfd]

    def _end_worker(self, message: EndWorker) -> None:
        for child in self._children.values():
            if (child.slot, child.generation) == (message.slot, message.generation):
                break
        else:
            return
        if not _trees.is_ours(child.pid):
            self._report_death(child, None)
            return
        now = CLOCK.monotonic()
        if child.ending is not None:
            child.ending.hasten(message.grace_s, now)
        else:
            stacks_fd = child.stacks_fd if message.stacks else None
            with self._reserve.lent():
                child.ending = Ending(child.pid, stacks_fd, message.grace_s, now)
            self._endings.append(child)
        self._move_endings_on(now)

    def _move_endings_on(self, now: float) -> None:
        for child in list(self._endings):
            due = _due(child)
            if due is not None and due <= now and child.ending is not None:
                with self._reserve.lent():
                    child.ending.step(now)
                if child.ending.due is None:
                    self._endings.remove(child)
                    self._sweep(child)

    def _reap(self) -> None:
        """Collect every dead child: workers are reported, adopted orphans are just laid to rest."""
        while (pid := _trees.next_dead_child()) is not None:
            child = self._children.get(pid)
            if child is not None and child not in self._endings:
                _trees.kill_group(pid)  # before the pid can be used again
            status = _trees.reap(pid)
            if status:
                self._oom.look()  # whatever it was, it is not to be put down to a worker that dies later
            self._lent.discard(pid)
            if child is not None:
                self._report_death(child, status)
        # With SIGCHLD ignored the kernel has reaped them, and a module that was preloaded may have.
        for child in [child for pid, child in self._children.items() if not _trees.is_ours(pid)]:
            self._report_death(child, None)

    def _report_death(self, child: _Child, status: int | None) -> None:
        del self._children[child.pid]
        if child.ending is not None:
            child.ending.dead = True
        self._sweep(child)
        stacks = ""
        if child.stacks_fd is not None:
            stacks = _forensics.read_stacks(child.stacks_fd)
        if child.pidfd is not None:
            self._poll.unregister(child.pidfd)
        fds.close_all(child.owned())
        hint = ""
        if child.ending is None and status is not None and os.WIFSIGNALED(status):
            hint = self._oom.explain(os.WTERMSIG(status))
        self._tell(_messages.WorkerExited(child.slot, child.generation, child.pid, status, stacks, hint))

    def _sweep(self, child: _Child) -> None:
        """End what lives of a worker's tasks and lost its parent; with the rest, if that is on its way out.

        Where nobody can look now, it is done soon.
        """
        area = None
        if all(other.slot != child.slot for other in self._children.values()):
            # What it has forked can be told by the slot, as no other worker has that yet.
            area = (os.fstat(self._board_fd).st_ino, child.slot * AREA_BYTES)
        try:
            with self._reserve.lent():
                strays = _trees.strays(child.mark, {*self._children, *self._lent}, area)
                if child.ending is not None and child in self._endings:
                    child.ending.add(strays)
                else:
                    _trees.signal_all(strays, signal.SIGKILL)
        except _trees.CANNOT_LOOK:
            self._unswept.append(child)

    def _forget_wakeups(self) -> None:
        try:
            while os.read(self._sigchld_read, 4096):
                pass
        except BlockingIOError:
            pass

    def _tell(self, message: _messages.ToClient, numbers: list[int] | None = None) -> None:
        """Report to the client; if it is gone, the loop is about to learn that too."""
        try:
            self._control.send_bytes(_messages.encode_control(message), numbers or [])
        except OSError as error:
            if numbers and error.errno in _messages.MAY_YET_LAND:
                self._tell(message)  # the client can do without a pidfd, but not without the news


def _due(child: _Child) -> float | None:
    return None if child.ending is None else child.ending.due


def _new_stacks_file() -> int | None:
    """For a worker's stacks; None if there is no descriptor, or no memory, left for that: it must do without."""
    try:
        return fds.above_stdio(_platform.anonymous_file("fdpool-stacks"))
    except OSError:
        return None


def _new_page(board_fd: int, slot: int) -> Page | None:
    """For a worker, which would copy 90 pages of memory for making it: 0.3 ms of its start. None if there is no
    descriptor left for that: it has room, once it has closed what is not its own."""
    try:
        return Page(board_fd, slot)
    except OSError:
        return None


def main(control_fd: int, inherited: Callable[[], object] | None = None) -> NoReturn:
    """Runs in: a fork of the client. Serve on `control_fd`, then exit; `inherited` as for `Supervisor`."""
    _serve(StreamSocket.from_fd(control_fd), inherited, _platform.open_pidfd(os.getppid()), fresh=False)


def main_fresh(control_fd: int) -> NoReturn:
    """As `main`, in a fresh interpreter: first close what the client's inheritable descriptors left here."""
    highest = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, control_fd)
    os.closerange(control_fd + 1, highest if highest > 0 else 1 << 20)
    _serve_fresh(StreamSocket.from_fd(control_fd), _platform.open_pidfd(os.getppid()))


def _serve_fresh(control: StreamSocket, client_pidfd: int | None) -> NoReturn:
    """Serve where nothing is of the client's memory.

    First take over what a fork would have inherited: multiprocessing's key, without which no manager answers a task.
    """
    try:
        key, _ = control.receive_bytes()
    except (EOFError, OSError):
        os._exit(1)
    from multiprocessing import process  # 2 ms

    process.current_process().authkey = key
    _serve(control, None, client_pidfd, fresh=True)


def _serve(
    control: StreamSocket, inherited: Callable[[], object] | None, client_pidfd: int | None, fresh: bool
) -> NoReturn:
    _platform.become_subreaper()
    _forensics.make_audible()
    supervisor = Supervisor(control, client_pidfd, inherited, fresh)
    supervisor.run()
    os._exit(0)
