"""Who disturbs a chaos: one kills and stops workers and what they start, one takes the client's descriptors."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

import fdpool
from fdpool._slots import State

_FATAL = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
#: Faults of workers that boot break a pool, three in a row; what comes from outside only does so after twelve.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)


class Assassin:
    """Kills, stops and continues.

    Attributes:
        done: how often each was done, and to whom, as in ("stop", "descendant").
    """

    def __init__(
        self, pools: Sequence[fdpool.Pool], dice: random.Random, pauses: tuple[float, float]
    ) -> None:
        self.done: Counter[tuple[str, str]] = Counter()
        self._pools = pools
        self._dice = dice
        self._pauses = pauses

    def act(self, stop: threading.Event) -> None:
        """Runs in: a thread, until `stop`."""
        while not stop.wait(self._dice.uniform(*self._pauses)):
            booting = self._dice.random() < 0.1
            pids = self._pids(booting)
            if not pids:
                continue
            try:
                if self._dice.random() < 0.7:
                    self._disturb_worker(self._dice.choice(pids), _FROM_OUTSIDE if booting else _FATAL)
                else:
                    self._disturb_descendant(pids)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
            except OSError as error:
                if error.errno != errno.EMFILE:  # it lacks what the thief has taken, too
                    raise

    def _pids(self, booting: bool) -> list[int]:
        """Of workers that take tasks; with `booting`, of those that do not yet, too."""
        found = []
        for pool in self._pools:
            client = pool._client
            links = list(client.links.values())
            ready = [link for link in links if booting or client.dispatcher.state(link.slot) is State.READY]
            found += [pid for link in ready if (pid := link.pid) is not None]
        return found

    def _disturb_worker(self, pid: int, signals: Sequence[int]) -> None:
        if self._dice.random() < 0.7:
            os.kill(pid, self._dice.choice(signals))
            self.done["kill", "worker"] += 1
        else:
            self._pause(pid)
            self.done["stop", "worker"] += 1

    def _disturb_descendant(self, pids: Sequence[int]) -> None:
        """One of all that the tasks of these workers have started."""
        below = [each.pid for pid in pids for each in psutil.Process(pid).children(recursive=True)]
        if not below:
            return
        victim = self._dice.choice(below)
        if self._dice.random() < 0.5:
            os.kill(victim, signal.SIGKILL)
            self.done["kill", "descendant"] += 1
        else:
            self._pause(victim)
            self.done["stop", "descendant"] += 1

    def _pause(self, pid: int) -> None:
        """Stop a process, and let it go on. It may be killed meanwhile, as all that a dead worker leaves must be."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._dice.uniform(0.001, 0.05))
        os.kill(pid, signal.SIGCONT)


class Thief:
    """Now and then leaves the client few descriptors, or none, for a moment.

    Attributes:
        done: how often.
    """

    def __init__(self, dice: random.Random) -> None:
        self.done = 0
        self._dice = dice

    def act(self, stop: threading.Event) -> None:
        """Runs in: a thread, until `stop`."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            while not stop.wait(self._dice.uniform(0.1, 0.6)):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(self._dice.randrange(6)), hard))
                self.done += 1
                time.sleep(self._dice.uniform(0.001, 0.05))
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limit_with_room(room: int) -> int:
    """The limit of open files at which exactly `room` more can be opened."""
    number = 0
    while True:
        try:
            os.fstat(number)
        except OSError:
            if not room:
                return number
            room -= 1
        number += 1


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """So many descriptors can be opened here, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit_with_room(count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def started(actors: list[Callable[[threading.Event], None]], stop: threading.Event) -> list[threading.Thread]:
    """A running thread for each."""
    threads = [threading.Thread(target=act, args=(stop,)) for act in actors]
    for thread in threads:
        thread.start()
    return threads
