"""The server's one thread: takes orders, hears of workers, asks `_server.plan`, and has its answers performed.

Orders (reload, scale, stop) and news (a worker's end, which the pool's thread reports) are posted, from any thread or
signal handler. The thread never waits for anything but its turns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import _process
from .._clock import CLOCK
from ..errors import FdpoolError, ReloadFailed, ServerFailed
from .checks import check_descriptors
from .crew import Crew, Task
from .handoff import Handoff
from .logs import reopen_logs
from .news import say
from .plan import (
    Abandoned,
    Action,
    CallWorker,
    CloseGeneration,
    DrainWorker,
    EndWorker,
    GaveUp,
    Over,
    Plan,
    Reloaded,
    Retires,
    Started,
    StartWorker,
)
from .states import State
from .succession import Succession
from .turns import Turns
from .watch import Finding, Verdict, Watch

if TYPE_CHECKING:
    from .listeners import Listeners
    from .pools import Pools

GAVE_UP = 3  # exit code: no worker can be booted (gunicorn says the same)
_LAST_S = 0.5  # of the grace: for what workers have begun, when nothing else is waited for any more
_STEP_S = 0.02
# For how many steps it is waited to be told how the last worker that was lost has ended.
_LAST_WORDS_LOOKS = 50
_HANDSHAKE_S = 0.5  # a connection on its way may still come to a listener that gets no others any more
_SCALE_LOOKS = 500  # for how many steps it is waited until such a listener's queue is empty
_NO_STEERING = "%d workers stay: the kernel cannot keep connections from a listener of dispatch='reuseport'"
_RELOAD_PAUSE_S = 0.25  # after a reload has begun, before the next one may
_SUCCESSOR_S = 30.0  # how much longer than a worker a whole successor may take
FAILED = 70  # exit code: a defect of the server (EX_SOFTWARE, sysexits.h)


class Loop:
    """Runs one server, from `start` until it is over.

    Args:
        listeners: the loop's from `start` on, and closed at its end.
        dispatch: of the server; with "handoff" this thread accepts, and hands each connection to a worker.
        on_event: called in the loop's thread with "started", "reloading", "reloaded" (or it will not be), "upgraded",
            "stopping", "over" (no worker is left), "ended" (nothing is).

    Attributes:
        is_running: False once nothing of it is left, but for its thread, which ends this moment.
        is_forked: this is a forked child of the process that runs it, and nobody takes turns here.
        exit_code: once it is over: 0, or what an orchestrator is to be told.
        started: settled when all workers serve for the first time, or it is known that they never will.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        pools: Pools,
        listeners: Listeners,
        watch: Watch,
        dispatch: str,
        on_event: Callable[[str], None],
    ) -> None:
        self._task = task
        self._plan = plan
        self._pools = pools
        self._listeners = listeners
        self._watch = watch
        self._dispatch = dispatch
        self._on_event = on_event
        self.turns = Turns()
        self.handoff: Handoff | None = None
        if dispatch == "handoff":
            self.handoff = Handoff(self.turns, [listener.socket for listener in listeners.first])
        self.succession = Succession(
            self.turns,
            listeners,
            plan.settings.boot_timeout_s + _SUCCESSOR_S,
            plan.settings.grace_s,
            self._hand_over,
        )
        self.crew = Crew(self.turns, task, pools, listeners, self.handoff, self)
        self.exit_code = 0
        self.started: Future[None] = Future()
        self._failure = ""
        self._asked: set[Future[int]] = set()
        self._joined: list[Future[int]] = []  # of the next reload, which has not begun
        self._next_reload_at = 0.0
        self._reloads: dict[int, Future[int]] = {}
        self._over = False
        self._settled = False  # the plan has nothing more to do before its time comes, or something happens
        self.is_running = True
        self.is_forked = False
        self._stopping = False
        self._wanted = plan.wanted
        self._scalings = 0  # by which one that waits knows that another has come
        self._thread = threading.Thread(target=self._run, name="fdpool-server", daemon=True)
        crew = self.crew
        self._performers: dict[type, Callable[[Any], None]] = {
            StartWorker: lambda action: crew.start(*action),
            CallWorker: lambda action: crew.call(*action),
            Retires: lambda action: crew.retires(*action),
            DrainWorker: lambda action: crew.drain(*action),
            EndWorker: lambda action: crew.end(*action),
            CloseGeneration: lambda action: pools.close(action.generation),
            Started: self._note_started,
            Reloaded: self._note_reloaded,
            Abandoned: self._note_abandoned,
            GaveUp: self._note_gave_up,
            Over: partial(self._note_over, _LAST_WORDS_LOOKS),
        }

    # -- for the server, from any thread -------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        _process.register(self)
        self._thread.start()

    def reload(self) -> Future[int]:
        """Replace every worker by one of a new generation; the future is of its number."""
        future: Future[int] = Future()
        # Nobody can cancel a reload, and a future that was cancelled could not be told how it ends.
        future.set_running_or_notify_cancel()
        # Remembered first, looked at again last: the loop's end does it the other way round, so one of the two sees
        # that nobody will do it any more.
        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        self.turns.post(partial(self._reload, future))
        if not self.is_running:
            _fail(future, "the server has ended")
        return future

    def scale(self, change: Callable[[int], int]) -> None:
        """Have as many workers as `change` makes of the number that is wanted now."""
        self.turns.post(partial(self._scale, change))

    def stop(self, grace_s: float | None = None) -> None:
        """End the server: within `grace_s` (or the grace it was made with), or at once if that is 0. Does not wait."""
        self.turns.post(partial(self._stop, self._plan.settings.grace_s if grace_s is None else grace_s))

    def give_up(self, why: str) -> None:
        """End the server within its grace, with the exit code that says that it could not serve."""
        self.turns.post(partial(self._give_up, why))

    def upgrade(self) -> None:
        """Have a new process of this program take over the listeners, and end when it serves."""
        self.turns.post(self._upgrade)

    def reopen_logs(self) -> None:
        """Have log files opened anew, here and in every worker."""
        self.turns.post(self._reopen_logs)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing of the server is left; False if that takes longer than `timeout` seconds."""
        if threading.current_thread() is not self._thread:
            self._thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        return not self._thread.is_alive()

    @property
    def handed_over(self) -> bool:
        """True once another process serves in place of this one."""
        return self.succession.pid is not None

    @property
    def wanted(self) -> int:
        """How many workers shall serve."""
        return self._wanted

    @property
    def generation(self) -> int:
        """The generation that serves."""
        return self._plan.generation

    def state_of(self, number: int) -> str:
        """What a worker is about, in a word."""
        worker = self._plan.workers.get(number)
        return "gone" if worker is None else worker.state.value

    # -- `_process.Owner`: at the interpreter's exit, and in a forked child --------------------------------

    def shut_down(self) -> None:
        """The interpreter exits: end the server, or its pools' tasks would never."""
        self.stop()

    def end(self, grace_s: float, reason: str) -> None:
        """End now; does not wait."""
        self.stop(grace_s)

    def join(self) -> None:
        """Wait for the end."""
        self.wait()

    def forget_in_child(self) -> None:
        """Runs in a forked child: close the copies."""
        self.is_forked = True
        if self.handoff is not None:
            self.handoff.forget()
        self.turns.close()
        self.crew.close()
        self._listeners.close(keep_path=True)
        self._task.app.close()

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._perform(self._plan.begin(CLOCK.monotonic()))
            while not self._over:
                self.turns.take(self._wanted_at())
                now = CLOCK.monotonic()
                for finding in self._watch.look(list(self.crew.links.values()), now):
                    self._heed(finding, now)
                if not self._settled or self._is_due(now):
                    actions = self._plan.tick(now)
                    self._perform(actions)
                    self._settled = not actions
        except BaseException as error:
            self._note_failed(error)
        try:
            self._clean_up()
        except BaseException as error:
            self._note_failed(error)
        # Whatever has failed, nobody is to wait for what will not come.
        self.is_running = False
        if not self.started.done():
            reason = self._failure or "the server was stopped before it had started"
            self.started.set_exception(ServerFailed(reason))
        for future in list(self._asked):
            _fail(future, "the server has ended")
        self._on_event("ended")

    def _note_failed(self, error: BaseException) -> None:
        self.exit_code = FAILED
        self._failure = f"the server's loop failed: {type(error).__name__}: {error}"
        say("failed", "%s", self._failure, level=logging.CRITICAL, exc_info=error)

    def _is_due(self, now: float) -> bool:
        due = self._plan.next_deadline()
        return due is not None and due <= now

    def _wanted_at(self) -> float | None:
        moments = (self._plan.next_deadline(), self._watch.next_look)
        return min((moment for moment in moments if moment is not None), default=None)

    def _heed(self, finding: Finding, now: float) -> None:
        number, verdict, why = finding
        if verdict is Verdict.STUCK:
            self._perform(self._plan.hung(number, now, why))
        elif verdict is Verdict.LARGE:
            self._perform(self._plan.retire(number, now, why, too_large=True))
        else:
            self.crew.show(number, why)

    def _perform(self, actions: Sequence[Action]) -> None:
        self._settled = False
        for action in actions:
            self._performers[type(action)](action)

    def _clean_up(self) -> None:
        self.succession.close()
        # Whoever is still here was lost, and no word has come of how: their supervisor stands still.
        self._pools.join(kill=not self._over or bool(self.crew.links))
        _process.unregister(self)
        if self.handoff is not None:
            self.handoff.close()
        self.crew.close()
        self._listeners.close(keep_path=self.handed_over)
        self.turns.close()
        self._task.app.close()

    # -- orders --------------------------------------------------------------------------------------------

    def _reload(self, future: Future[int]) -> None:
        """Reload now; or a moment later, with all who want it meanwhile: each begins with a new supervisor."""
        self._joined.append(future)
        if len(self._joined) == 1:
            self.turns.later(max(0.0, self._next_reload_at - CLOCK.monotonic()), self._begin_reload)

    def _begin_reload(self) -> None:
        self._next_reload_at = CLOCK.monotonic() + _RELOAD_PAUSE_S
        (future, *others), self._joined = self._joined, []
        for other in others:
            future.add_done_callback(partial(_pass_on, other))
        if self._stopping:
            _fail(future, "the server is ending")
            return
        self._on_event("reloading")
        if self._task.on_reload is not None:
            try:
                self._task.on_reload(self._plan.newest + 1)
            except (Exception, SystemExit) as error:
                why = f"on_reload called it off: {type(error).__name__}: {error}"
                say("reload_failed", "no reload: %s", why, level=logging.ERROR, reason=why)
                self._reload_is_over()
                _fail(future, why)
                return
        for older in self._reloads.values():
            # The last wins: whoever waits for an earlier one gets what comes of this one.
            future.add_done_callback(partial(_pass_on, older))
        self._reloads.clear()
        actions = self._plan.reload(CLOCK.monotonic())
        self._reloads[self._plan.target] = future
        say("reloading", "generation %d is coming", self._plan.target, generation=self._plan.target)
        self._perform(actions)

    def _reload_is_over(self) -> None:
        """Tell so, unless another one goes on, or the server has yet to start: then it tells of that."""
        if not self._reloads and self.started.done():
            self._on_event("reloaded")

    def _scale(self, change: Callable[[int], int]) -> None:
        before = self._wanted
        wanted = self._wanted = max(1, change(before))
        if wanted == before or self._stopping or self.handed_over:
            return
        are = "worker is" if wanted == 1 else "workers are"
        say("scaled", "%d %s wanted, not %d", wanted, are, before, workers=wanted)
        # The plan may not have heard yet of the order before: whom that would have had go are there, and serve.
        is_less = wanted < self._plan.wanted
        if not (self._narrow(wanted) if is_less else self._prepare(wanted)):
            self._wanted = before
            return
        self._scalings += 1
        if is_less:
            pause_s = _HANDSHAKE_S if self._listeners.are_apart else 0.0
            self.turns.later(pause_s, partial(self._scale_down, self._scalings, _SCALE_LOOKS))
        else:
            self._perform(self._plan.scale(wanted, CLOCK.monotonic()))
        self._widen()

    def _narrow(self, wanted: int) -> bool:
        """Whoever has a listener of its own goes when that gets no connections any more, and has none left."""
        if self._listeners.steer(min(wanted, self._listeners.served)):
            return True
        say("scale_failed", _NO_STEERING, self._plan.wanted, level=logging.ERROR)
        return False

    def _prepare(self, wanted: int) -> bool:
        """Have listeners for so many; those that are new get no connections before somebody serves there (`_widen`)."""
        try:
            check_descriptors(wanted + self._plan.settings.standby, self._dispatch)
            self._listeners.steer(self._listeners.served)
            self._listeners.prepare(wanted)
        except FdpoolError as error:
            say("scale_failed", "no more workers: %s", error, level=logging.ERROR, reason=str(error))
            return False
        return True

    def _scale_down(self, scaling: int, looks: int) -> None:
        if self._scalings != scaling:
            return  # something else is wanted by now
        if looks and self._listeners.queued_above(self._wanted):
            self.turns.later(_STEP_S, partial(self._scale_down, scaling, looks - 1))
            return
        self._perform(self._plan.scale(self._wanted, CLOCK.monotonic()))

    def _widen(self) -> None:
        """Have the listeners of slots get connections that are served now, and were not before."""
        if not self._listeners.are_apart or self.handed_over:
            return
        serving = {each.slot for each in self._plan.workers.values() if each.state is State.SERVING}
        served = self._listeners.served
        while served < self._wanted and served in serving:
            served += 1
        if served > self._listeners.served:
            self._listeners.steer(served)

    def _upgrade(self) -> None:
        if not self._stopping:
            self.succession.begin()

    def _hand_over(self) -> None:
        """The successor serves."""
        if self._reloads and self.started.done():
            self._on_event("reloaded")  # it will not be, and nobody listens to the successor yet
        self._on_event("upgraded")
        is_less = self.succession.served < self._listeners.slots
        self.turns.later(_HANDSHAKE_S if is_less else 0.0, partial(self._leave, _SCALE_LOOKS))

    def _leave(self, looks: int) -> None:
        """End, as the successor serves; but first take what waits at listeners that nobody serves there."""
        if self._stopping:
            return
        if looks and self._listeners.queued_above(self.succession.served):
            self.turns.later(_STEP_S, partial(self._leave, looks - 1))
        else:
            self._stop(self._plan.settings.grace_s)

    def _stop(self, grace_s: float) -> None:
        say("stopping", "the server ends, within %g seconds", grace_s, grace_s=grace_s)
        if not self._stopping:
            self._stopping = True
            if not self.handed_over:
                self._on_event("stopping")
            if self.handoff is not None:
                self.handoff.stop(not self.handed_over)
        self.succession.dismiss(grace_s)  # or it would serve on, while what has begun here is finished
        self._stop_by(CLOCK.monotonic() + grace_s, grace_s <= 0)

    def _give_up(self, why: str) -> None:
        self._note_gave_up(GaveUp(why))
        self._stop(self._plan.settings.grace_s)

    def _stop_by(self, until: float, at_once: bool) -> None:
        """Dismiss the workers; but first those are to take what has been accepted for them."""
        grace_s = 0.0 if at_once else max(0.01, until - CLOCK.monotonic())
        waits = self.handoff is not None and not self.handoff.is_empty and grace_s > _LAST_S
        if waits and not self._plan.stopping:
            self.turns.later(_STEP_S, partial(self._stop_by, until, False))
        else:
            self._perform(self._plan.stop(grace_s, CLOCK.monotonic(), self.handed_over))

    def _reopen_logs(self) -> None:
        reopen_logs()
        self.crew.reopen_logs()
        say("logs_reopened", "log files were opened anew")

    # -- `_server.crew.Hears` ------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        return self._plan.stopping

    def worker_ready(self, number: int) -> None:
        self._perform(self._plan.readied(number, CLOCK.monotonic()))
        self._widen()

    def worker_stands_by(self, number: int) -> None:
        self._perform(self._plan.stood_by(number, CLOCK.monotonic()))

    def worker_retires(self, number: int, why: str) -> None:
        self._perform(self._plan.retire(number, CLOCK.monotonic(), why))

    def worker_closed(self, number: int) -> None:
        self._perform(self._plan.closed(number, CLOCK.monotonic()))

    def worker_ended(self, number: int, why: str) -> None:
        self._watch.forget(number)
        self._perform(self._plan.exited(number, CLOCK.monotonic(), why))

    # -- news ----------------------------------------------------------------------------------------------

    def _note_started(self, _: Started) -> None:
        addresses = [listener.address for listener in self._listeners.first]
        count = self._plan.wanted
        text = "%d %s at %s"
        say(
            "started",
            text,
            count,
            "worker serves" if count == 1 else "workers serve",
            ", ".join(addresses),
            addresses=addresses,
            workers=count,
        )
        self._on_event("started")
        self.started.set_result(None)

    def _note_reloaded(self, action: Reloaded) -> None:
        generation = action.generation
        say("reloaded", "every worker is of generation %d", generation, generation=generation)
        future = self._reloads.pop(generation, None)
        self._reload_is_over()
        if future is not None:
            future.set_result(generation)

    def _note_abandoned(self, action: Abandoned) -> None:
        generation, why = action
        say(
            "reload_failed",
            "generation %d is given up, generation %d goes on: %s",
            generation,
            self._plan.generation,
            why,
            level=logging.ERROR,
            generation=generation,
            reason=why,
        )
        future = self._reloads.pop(generation, None)
        self._reload_is_over()
        if future is not None:
            _fail(future, f"generation {generation} does not boot: {why}")

    def _note_gave_up(self, action: GaveUp) -> None:
        self.exit_code = GAVE_UP
        self._failure = action.why
        say("gave_up", "the server gives up: %s", action.why, level=logging.CRITICAL, reason=action.why)

    def _note_over(self, looks: int, over: Over) -> None:
        self.succession.dismiss(self._plan.settings.grace_s)  # where the plan has given up, nobody has yet
        if self.succession.is_leaving or (looks and self.crew.links):
            self.turns.later(_STEP_S, partial(self._note_over, max(0, looks - 1), over))
            return
        say("stopped", "the server has ended", exit_code=self.exit_code)
        self._on_event("over")
        self._over = True


def _fail(future: Future[int], why: str) -> None:
    try:
        future.set_exception(ReloadFailed(why))
    except InvalidStateError:
        pass  # it is settled


def _pass_on(older: Future[int], newer: Future[int]) -> None:
    """Settle an earlier reload as the one that took its place."""
    error = newer.exception()
    if error is not None:
        _fail(older, str(error))
    elif not older.done():
        older.set_result(newer.result())
