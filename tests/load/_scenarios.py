"""What is done to a server while it is under load, and how many requests that may cost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._client import Client
from ._served import Served, is_alive
from ._tally import Tally


@dataclass(frozen=True, slots=True)
class Situation:
    """One scenario's means.

    seconds: how long it takes, beside what the server takes.
    times: how often it is done.
    """

    server: Served
    client: Client
    seconds: float
    rng: random.Random
    times: int

    def pause(self, share: float) -> None:
        """Let so much of the time pass, by a third more or less."""
        time.sleep(self.seconds * share * self.rng.uniform(0.67, 1.33))


def steady(situation: Situation) -> int:
    """Nothing happens."""
    time.sleep(situation.seconds)
    return 0


def reloads(situation: Situation) -> int:
    """Reloads, one after another."""
    for _ in range(situation.times):
        situation.pause(0.8 / situation.times)
        since = situation.server.tell(signal.SIGHUP)
        situation.server.wait_for("reloaded", since)
    situation.pause(0.1)
    return 0


def scaling(situation: Situation) -> int:
    """Two workers more, one by one, and two less."""
    for _ in range(max(1, situation.times // 5)):
        for _ in range(2):
            situation.pause(0.2)
            since = situation.server.tell(signal.SIGTTIN)
            situation.server.wait_for("worker_ready", since)
        for _ in range(2):
            situation.pause(0.2)
            since = situation.server.tell(signal.SIGTTOU)
            situation.server.wait_for("worker_exited", since)
    return 0


def upgrade(situation: Situation) -> int:
    """Another process of the server takes the sockets over, and the first one leaves."""
    situation.pause(0.3)
    server = situation.server
    before = server.pid
    since = server.tell(signal.SIGUSR2)
    deadline = time.monotonic() + 30
    while not (came := [each["pid"] for each in server.events[since:] if _is_start_of_another(each, before)]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no other process has come to serve; the log ends with\n{server.tail()}")
        time.sleep(0.002)
    server.pid = came[0]
    while is_alive(before):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the old process did not leave; the log ends with\n{server.tail()}")
        time.sleep(0.002)
    situation.pause(0.3)
    return 0


def _is_start_of_another(event: dict[str, Any], pid: int) -> bool:
    return event.get("event") == "started" and event["pid"] != pid


def kills(situation: Situation) -> int:
    """Workers are killed with SIGKILL, one by one."""
    count = max(1, situation.times // 3)
    for _ in range(count):
        situation.pause(0.8 / count)
        server = situation.server
        victim = situation.rng.choice(server.workers())
        since = len(server.events)
        os.kill(victim, signal.SIGKILL)
        server.wait_for("worker_ready", since)
    situation.pause(0.2)
    return count


Scenario = Callable[[Situation], int]
#: Each returns how many times it may cost what a worker has taken.
SCENARIOS: dict[str, Scenario] = {
    "steady": steady,
    "reload": reloads,
    "scale": scaling,
    "upgrade": upgrade,
    "kill": kills,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scenario cost, and what it may.

    allowed: how many requests it may cost.
    wanted: how many must have been answered well: far fewer than were asked means that the load was none.
    may_cut: kept connections may be cut off, as they may where a worker is killed.
    """

    scenario: str
    allowed: int
    tally: Tally
    wanted: float = 1
    may_cut: bool = False

    @property
    def lost(self) -> int:
        """Requests that were not answered well."""
        return self.tally.failed + self.tally.reset

    @property
    def is_good(self) -> bool:
        """True if no more was lost or cut off than may be, and enough was answered."""
        enough = self.tally.ok >= max(1, self.wanted)
        return self.lost <= self.allowed and enough and (self.may_cut or self.tally.cut == 0)

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "scenario": self.scenario,
            "good": self.is_good,
            "allowed": self.allowed,
            "wanted": round(self.wanted),
            **self.tally.as_json(),
        }


def taken_by(form: str, threads: int, dispatch: str) -> int:
    """How many connections a worker has taken at most whose requests it has not begun; of a function, with those that
    it has begun.

    A thread takes one as it can begin it; so does an event loop of what it is handed, in its next turn. From a listener
    an event loop takes one in each turn where requests are quick (`fdpool._server.pace`), and begins that three turns
    after it.
    """
    if form == "asgi":
        return 1 if dispatch == "handoff" else 3
    return threads


def play(
    name: str,
    server: Served,
    *,
    rps: float,
    seconds: float,
    seed: int,
    times: int = 10,
    keep_alive: float = 0.5,
    work_ms: int = 0,
    enough: float = 0.8,
    timeout_s: float = 10.0,
    ledger: Path | None = None,
    taken: int = 1,
) -> Verdict:
    """Load the server from the scenario's beginning to its end.

    Args:
        enough: the share of what was due that must be answered.
        timeout_s: after which a request has failed.
        ledger: the file that its TEST_LOAD_LEDGER names. With it a killed worker may cost what had begun, however much
            that was, and `taken` beside; without, `taken`.
        taken: as `taken_by` has it.
    """
    path = f"/{work_ms}" if work_ms else ""
    client = Client(server.address, rps=rps, keep_alive=keep_alive, path=path, timeout_s=timeout_s, seed=seed)
    thread = threading.Thread(target=client.run, args=(3600.0,))
    thread.start()
    try:
        allowed = SCENARIOS[name](Situation(server, client, seconds, random.Random(seed), times))
    finally:
        client.stop()
        thread.join()
    tally = client.tally
    killed = name == "kill"
    if killed:
        allowed *= taken
    if killed and ledger is not None:
        begun = set(ledger.read_text().split())
        allowed += sum(token in begun for token in tally.lost)
    return Verdict(name, allowed, tally, enough * rps * tally.seconds, may_cut=killed)
