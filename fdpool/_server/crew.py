"""The workers of a server, as its thread deals with them: starts, hears, drains and ends each. Decides nothing."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .. import _process
from .._broken import PoolBroken
from .._clock import CLOCK
from .._own_sockets import OwnSocket
from ..errors import FdpoolError, PoolShutDown
from ..payload import Payload
from . import apps, checks, news
from .balance import Loads
from .context import Order
from .link import End, WorkerLink, in_one_line

if TYPE_CHECKING:
    from .handoff import Handoff
    from .listeners import Listeners
    from .pools import Pools
    from .turns import Turns

_STACKS_S = 0.25  # how long a stuck worker has to write down its stacks
_KILL_AGAIN_S = 5.0  # after which a worker that should be dead is looked after again


class Task(NamedTuple):
    """What every worker of a server is to do.

    Attributes:
        app: payload of (application, on_start, on_exit); owned by the server.
        order: a worker's order, but for its slot and generation.
        on_reload: called with the new generation's number before it begins.
    """

    app: Payload
    order: Order
    on_reload: Callable[[int], object] | None


class Hears(Protocol):
    """Whom the crew tells."""

    def worker_ready(self, number: int) -> None:
        """The worker serves."""

    def worker_stands_by(self, number: int) -> None:
        """The worker has loaded its application, and waits to be called."""

    def worker_retires(self, number: int, why: str) -> None:
        """The worker asks to be replaced."""

    def worker_closed(self, number: int) -> None:
        """The worker accepts nothing any more."""

    def worker_ended(self, number: int, why: str) -> None:
        """The worker is not there any more, or never was. Of one that served it may be said twice: as it is dead, and
        when somebody knows how it ended."""

    @property
    def stopping(self) -> bool:
        """True once every worker's end is expected."""


class Crew:
    """The workers. Runs in: the server's thread, all of it.

    Attributes:
        links: the workers by number. Others may read what it holds; it changes under them.
        started: how many were started so far.
        failure: why the last one that could not serve did not.
    """

    def __init__(
        self,
        turns: "Turns",
        task: Task,
        pools: "Pools",
        listeners: "Listeners",
        handoff: "Handoff | None",
        boss: Hears,
    ) -> None:
        self._turns = turns
        self._task = task
        self._pools = pools
        self._listeners = listeners
        self._handoff = handoff
        self._boss = boss
        # Of those who accept from the same listeners; `dispatch="handoff"` sees to that itself.
        self._loads = None if handoff is not None or listeners.are_apart else Loads(checks.MOST_WORKERS)
        self.links: dict[int, WorkerLink] = {}
        self.started = 0
        self.failure = ""
        self._watched: set[int] = set()  # numbers of workers of whose death the kernel tells
        self._reopened_logs = False
        # The last failed boot of which the log has it all: its generation, its traceback.
        self._told = (0, "")

    def start(self, number: int, slot: int, generation: int, spread: float, stands_by: bool) -> None:
        """Have a worker started, to serve `spread` times as much as one may, or to stand by first. If that fails, a
        later turn says so."""
        self.started += 1
        link = None
        try:
            link = WorkerLink(number, slot, generation)
            inbox = None if self._handoff is None else self._handoff.seat(link)
            self._turns.watch(link.control, partial(self._hear, link))
            try:
                self._begin(link, inbox, self._order_of(link, spread, stands_by))
            except BaseException:
                self._stop_hearing(link)
                raise
        except (FdpoolError, OSError) as error:
            if link is not None:
                self._let_go(link)
            self._turns.post(partial(self._never_began, number, slot, error))
            return
        self.links[number] = link
        news.say_of(link, "worker_started", "of generation %d boots", generation, level=logging.DEBUG)

    def _order_of(self, link: WorkerLink, spread: float, stands_by: bool) -> Order:
        order = self._task.order
        most = order.max_requests
        return order._replace(
            slot=link.slot,
            generation=link.generation,
            max_requests=None if most is None else max(1, round(most * spread)),
            reopens_logs=self._reopened_logs,
            stands_by=stands_by,
        )

    def _begin(self, link: WorkerLink, inbox: OwnSocket | None, order: Order, anew: bool = False) -> None:
        try:
            link.start(
                self._pools.of(link.generation, anew),
                order,
                inbox,
                self._listeners.of(link.slot),
                None if self._loads is None else self._loads.fd,
                self._task.app,
                lambda end: self._turns.post(partial(self._ended, link, end)),
            )
        except (PoolBroken, PoolShutDown):
            if anew or _process.exiting():
                raise
            self._begin(link, inbox, order, anew=True)

    def _never_began(self, number: int, slot: int, error: BaseException) -> None:
        self.failure = in_one_line(f"{type(error).__name__}: {error}")
        news.say(
            "worker_failed",
            "worker %d could not be started: %s",
            slot,
            self.failure,
            level=logging.ERROR,
            slot=slot,
            reason=self.failure,
        )
        self._boss.worker_ended(number, self.failure)

    # -- what they say -------------------------------------------------------------------------------------

    def _hear(self, link: WorkerLink) -> None:
        try:
            while (message := link.receive()) is not None:
                self._heed(link, message)
            if link.killed and link.number in self.links:
                link.kill()  # it was not there yet as it was to be ended
        except EOFError:
            self._stop_hearing(link)

    def _stop_hearing(self, link: WorkerLink) -> None:
        if not link.control.closed:
            self._turns.unwatch(link.control)
            link.control.close()

    def _heed(self, link: WorkerLink, message: dict[str, Any]) -> None:
        said = message.get("say")
        if said == "hello":
            self._watch_for_death(link)
        elif said == "ready":
            if link.stuck or link.killed or link.lost:
                return  # too late: its end is under way
            link.ready_at = CLOCK.monotonic()
            news.say_of(
                link,
                "worker_ready",
                "of generation %d serves, as process %s",
                link.generation,
                link.pid,
                boot_s=round(link.ready_at - link.began_at, 3),
            )
            self._pools.interface = link.interface = str(message["interface"])
            if self._handoff is not None:
                most = checks.handed_at_most(link.interface, self._task.order.threads)
                self._handoff.opened(link.number, most, link.interface in apps.HTTP)
            self._boss.worker_ready(link.number)
        elif said == "standby":
            if link.called:
                return  # it does not know yet
            link.stands_by = True
            news.say_of(
                link,
                "worker_stands_by",
                "of generation %d stands by, as process %s",
                link.generation,
                link.pid,
                boot_s=round(CLOCK.monotonic() - link.began_at, 3),
            )
            self._boss.worker_stands_by(link.number)
        elif said == "retire":
            self._boss.worker_retires(link.number, str(message["why"]))
        elif said == "closed":
            self._takes_no_more(link)
            self._boss.worker_closed(link.number)
        elif said == "failed":
            link.why, link.traceback = in_one_line(str(message["why"])), str(message["traceback"]).rstrip()

    def _watch_for_death(self, link: WorkerLink) -> None:
        if link.pidfd is not None and link.number not in self._watched:
            try:
                self._turns.watch(link.pidfd, partial(self._lost, link))
            except OSError:
                return  # others have all that the kernel may watch for this user; the pool says it, too
            self._watched.add(link.number)

    def _stop_watching(self, link: WorkerLink) -> None:
        if link.pidfd is not None and link.number in self._watched:
            self._turns.unwatch(link.pidfd)
            self._watched.discard(link.number)

    def _lost(self, link: WorkerLink) -> None:
        """The kernel says that the worker is dead. Its pool will, and how it ended, but 2 ms later: so that another one
        is there the sooner, it is started now, and what this one has left goes to others."""
        self._stop_watching(link)
        if link.ready_at is not None and not (link.draining or self._boss.stopping):
            link.lost = True
            self._give_it_no_more(link)
            self._boss.worker_ended(link.number, "")

    def _ended(self, link: WorkerLink, end: End) -> None:
        """The pool says that the worker's task has ended, in whichever way."""
        if link.number not in self.links:
            return
        if not link.control.closed:
            self._hear(link)  # what it said before
        self._stop_hearing(link)
        why = link.why or end.why
        expected = (link.draining or self._boss.stopping) and (link.killed or not end.unasked)
        has_booted = link.ready_at is not None or link.stands_by
        if not (has_booted or link.draining or self._boss.stopping):
            self.failure = why
            traceback = link.traceback or end.traceback
            repeated = bool(traceback) and self._told == (link.generation, traceback)
            self._told = (link.generation, traceback)
            news.worker_failed(link, why, end, traceback, repeated)
        else:
            news.worker_exited(link, why, end, expected)
        del self.links[link.number]
        self._let_go(link)
        self._boss.worker_ended(link.number, why)

    def _takes_no_more(self, link: WorkerLink) -> None:
        """Have nobody leave connections to it, unless another one takes them in its slot."""
        if self._loads is None:
            return
        others = (each for each in self.links.values() if each is not link and each.slot == link.slot)
        if not any(other.ready_at is not None and not (other.draining or other.lost) for other in others):
            self._loads.absent(link.slot)

    def _give_it_no_more(self, link: WorkerLink) -> None:
        """It is not there any more: what it has left goes to others. Safe to call again."""
        self._takes_no_more(link)
        if self._handoff is not None:
            self._handoff.gone(link.number)

    def _let_go(self, link: WorkerLink) -> None:
        self._stop_watching(link)
        self._give_it_no_more(link)
        link.close()

    # -- what they are told --------------------------------------------------------------------------------

    def reopen_logs(self) -> None:
        """Have every worker open its log files anew, and those that come later, too: the supervisors that they are
        forked from go on with the files that they have."""
        self._reopened_logs = True
        for link in self.links.values():
            link.tell({"do": "reopen"})

    def call(self, number: int) -> None:
        """Tell a worker that stands by, or is to, to serve."""
        link = self.links.get(number)
        if link is not None:
            link.began_at = CLOCK.monotonic()
            link.called, link.stands_by = True, False
            link.tell({"do": "serve"})

    def retires(self, number: int, why: str, too_soon: bool) -> None:
        """Have the log say why a worker is to be replaced."""
        link = self.links.get(number)
        if link is not None:
            level = logging.WARNING if too_soon else logging.INFO
            news.say_of(link, "worker_retires", "is to be replaced: %s", why, level=level, reason=why)

    def drain(self, number: int, grace_s: float, leaving: bool) -> None:
        """Tell a worker to take nothing new, and to be done after `grace_s`."""
        link = self.links.get(number)
        if link is not None:
            link.draining = True
            self._takes_no_more(link)
            if self._handoff is not None:
                self._handoff.closing(number)
            link.tell({"do": "drain", "grace_s": grace_s, "leaving": leaving})

    def end(self, number: int, why: str, stuck: bool) -> None:
        """Kill a worker with all that descends from it; one that is stuck shows where, before."""
        link = self.links.get(number)
        if link is None:
            return
        link.why = why
        link.stuck = stuck
        if not stuck:
            link.draining = True  # its end is no news
            self._kill(link)
        elif link.ask_for_stacks():
            self._turns.later(_STACKS_S, partial(self._kill_stuck, link))
        else:
            self._kill_stuck(link)

    def show(self, number: int, why: str) -> None:
        """Have the log say where a worker is, and let it go on."""
        link = self.links.get(number)
        if link is not None and link.ask_for_stacks():
            self._turns.later(_STACKS_S, partial(self._show, link, why))

    def _show(self, link: WorkerLink, why: str) -> None:
        if link.number in self.links:
            news.worker_slow(link, why)

    def _kill_stuck(self, link: WorkerLink) -> None:
        if link.number in self.links:
            news.worker_killed(link)
            self._kill(link)

    def _kill(self, link: WorkerLink) -> None:
        if link.number not in self.links:
            return
        link.killed = True
        if not link.kill() and link.pid is None:
            self._kill_unborn(link)
        self._turns.later(_KILL_AGAIN_S, partial(self._kill, link))

    def _kill_unborn(self, link: WorkerLink) -> None:
        """End one that has not said hello: there is no process yet, or its generation's supervisor hangs."""
        generation = [each for each in self.links.values() if each.generation == link.generation]
        if all(each.killed for each in generation):
            self._pools.kill(link.generation)  # the supervisor, too, which may hang in a preload
        else:
            link.end_task()
            if link.stuck:
                # Others serve, and are not to suffer. Whoever comes next comes of another supervisor.
                self._pools.close(link.generation)

    def close(self) -> None:
        """Close what is held for those that are left."""
        for link in list(self.links.values()):
            link.close()
        self.links.clear()
        if self._loads is not None:
            self._loads.close()
