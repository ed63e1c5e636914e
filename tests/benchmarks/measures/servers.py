"""Servers of two workers beside each other: how fast, what a reload and a killed worker cost, how much memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import quantiles
from typing import Any

import psutil

from tests.load._client import Client

from .. import _http_load, servers
from .._cpu import tree_cpu_s, uss
from .._measure import Measure, Outcome, Round, Settings, Side, ahead_of, at_most

_CONNECTIONS = 32
_RELOAD_RPS = 300.0
_GRACE_S = 0.3  # of load before and after what is done to the server
_RECOVERED_S = 60.0


@contextmanager
def throughput(name: str, form: str, keep_alive: bool, settings: Settings) -> Iterator[Round]:
    """`size` milliseconds of as many requests as the server bears; seconds for each, and CPU of the server."""
    with servers.serving(name, form) as server:

        def one_round() -> Outcome:
            load, cpu_s = _loaded(server, settings, keep_alive)
            return Outcome(value=load.seconds / load.answered, cpu_s=cpu_s, samples=load.latencies)

        yield one_round


@contextmanager
def latency(name: str, form: str, pause_ms: int, settings: Settings) -> Iterator[Round]:
    """The time in which 99 of 100 requests were answered, of as many a second from each server as 32 clients send that
    wait for `pause_ms` after each answer; on kept connections that are opened anew in each round."""
    with servers.serving(name, form) as server:

        def one_round() -> Outcome:
            load, cpu_s = _loaded(server, settings, True, pause_ms)
            p99_s = quantiles(load.latencies, n=100)[-1]
            return Outcome(value=p99_s, cpu_s=cpu_s, samples=load.latencies)

        yield one_round


def _loaded(
    server: servers.Server, settings: Settings, keep_alive: bool, pause_ms: int = 0
) -> tuple[_http_load.Load, float]:
    """What comes of a load for `size` milliseconds, and the CPU of the server for each request, in seconds."""
    before_s = tree_cpu_s()
    load = _http_load.load(
        server.address,
        connections=_CONNECTIONS,
        keep_alive=keep_alive,
        seconds=settings.size / 1000,
        pause_ms=pause_ms,
    )
    return load, (tree_cpu_s() - before_s - load.cpu_s) / load.answered


@contextmanager
def reload(name: str, form: str, settings: Settings) -> Iterator[Round]:
    """Requests that are lost in a reload: the mean of `size` reloads, at 300 a second, half on kept connections."""
    with servers.serving(name, form) as server:

        def one_round() -> Outcome:
            client = Client(server.address, rps=_RELOAD_RPS, seed=os.getpid())
            thread = threading.Thread(target=client.run, args=(3600,))
            thread.start()
            try:
                for _ in range(settings.size):
                    time.sleep(_GRACE_S)
                    server.reload()
                time.sleep(_GRACE_S)
            finally:
                client.stop()
                thread.join()
            tally = client.tally
            return Outcome(value=(tally.failed + tally.reset) / settings.size, cpu_s=0.0)

        yield one_round


@contextmanager
def recovery(name: str, form: str, _settings: Settings) -> Iterator[Round]:
    """From `kill -9` of one of two workers until another answers in its place, under load.

    Of a new server each time: one whose workers die again and again may well take its time.
    """

    def one_round() -> Outcome:
        with servers.serving(name, form) as server:
            before = server.wait_for(lambda pids: len(pids) == servers.WORKERS)
            client = Client(server.address, connections=8, keep_alive=0.0)
            thread = threading.Thread(target=client.run, args=(3600,))
            thread.start()
            try:
                begun = time.perf_counter()
                os.kill(min(before), signal.SIGKILL)
                while not client.tally.pids.keys() - before:
                    if time.perf_counter() - begun > _RECOVERED_S:
                        raise RuntimeError("no other worker has come")
                    time.sleep(0.001)
                return Outcome(value=time.perf_counter() - begun, cpu_s=0.0)
            finally:
                client.stop()
                thread.join()

    yield one_round


@contextmanager
def memory(name: str, form: str, settings: Settings) -> Iterator[Round]:
    """Memory of a worker that has answered `size` requests: pages of its own, and its share of the others (PSS)."""
    with servers.serving(name, form) as server:

        def one_round() -> Outcome:
            tally = Client(server.address, connections=_CONNECTIONS, keep_alive=0.0).run(settings.size / 1000)
            pss = [psutil.Process(pid).memory_full_info().pss for pid in tally.pids]
            return Outcome(value=sum(pss) / len(pss), cpu_s=0.0)

        yield one_round


@contextmanager
def private_memory(name: str, form: str, settings: Settings) -> Iterator[Round]:
    """Memory that is a worker's alone (USS)."""
    with servers.serving(name, form) as server:

        def one_round() -> Outcome:
            tally = Client(server.address, connections=_CONNECTIONS, keep_alive=0.0).run(settings.size / 1000)
            return Outcome(value=sum(map(uss, tally.pids)) / len(tally.pids), cpu_s=0.0)

        yield one_round


def _measure(name: str, title: str, sides: dict[str, Side], ours: str = "fdpool", **rest: Any) -> Measure:
    """`ours` is the server that is the side "fdpool" here."""
    labels = servers.LABELS | {"fdpool": servers.LABELS[ours]}
    return Measure(name, "Servers", title, sides, labels=labels, **rest)


def _sides(side: object, *given: object, names: tuple[str, ...]) -> dict[str, Side]:
    return {name: partial(side, name, *given) for name in names}  # type: ignore[operator]


def _of_one_thread(side: object, *given: object, names: tuple[str, ...] = ("gunicorn",)) -> dict[str, Side]:
    """Ours with a WSGI worker's one thread, beside `names`."""
    return {"fdpool": partial(side, "fdpool-sync", *given), **_sides(side, *given, names=names)}  # type: ignore[operator]


_ASGI = ("fdpool", "uvicorn", "gunicorn-uvicorn")
_WSGI = ("fdpool", "gunicorn")
_AHEAD = (ahead_of("uvicorn", 1), ahead_of("gunicorn-uvicorn", 1))

# What measures of one kind have in common.
_REQUESTS: dict[str, Any] = {"size": 2000, "quick_size": 300, "rounds": 7}
_RELOADS: dict[str, Any] = {
    "size": 5,
    "quick_size": 1,
    "rounds": 5,
    "quick_rounds": 1,
    "warm_up": False,
    "unit": "requests",
    "scale": 1,
    "goals": (at_most(0),),
    "mean": True,
}
_RECOVERIES: dict[str, Any] = {
    "size": 1,
    "quick_size": 1,
    "rounds": 7,
    "quick_rounds": 1,
    "warm_up": False,
    "unit": "ms",
    "scale": 1e3,
}
_MEMORY: dict[str, Any] = {
    "size": 1000,
    "quick_size": 200,
    "rounds": 3,
    "quick_rounds": 1,
    "unit": "MiB",
    "scale": 1 / 2**20,
}

MEASURES = (
    _measure(
        "serve-asgi",
        "a request to an ASGI application, on 32 kept connections",
        _sides(throughput, "asgi", True, names=(*_ASGI, "fdpool-handoff")),
        goals=_AHEAD,
        **_REQUESTS,
    ),
    _measure(
        "serve-asgi-close",
        "a request to an ASGI application, each on a connection of its own, 32 at a time",
        _sides(throughput, "asgi", False, names=(*_ASGI, "fdpool-handoff")),
        goals=_AHEAD,
        **_REQUESTS,
    ),
    _measure(
        "serve-wsgi",
        "a request to a WSGI application, each on a connection of its own, 32 at a time; workers of one thread",
        _of_one_thread(throughput, "wsgi", False),
        ours="fdpool-sync",
        goals=(ahead_of("gunicorn", 1),),
        **_REQUESTS,
    ),
    _measure(
        "serve-wsgi-threads",
        "a request to a WSGI application, each on a connection of its own, 32 at a time; workers of four threads",
        _sides(throughput, "wsgi", False, names=("fdpool", "gunicorn-threads")),
        goals=(ahead_of("gunicorn-threads", 1),),
        **_REQUESTS,
    ),
    _measure(
        "serve-wsgi-kept",
        "a request to a WSGI application, on 32 kept connections; workers of four threads",
        _sides(throughput, "wsgi", True, names=("fdpool", "gunicorn-threads")),
        goals=(ahead_of("gunicorn-threads", 1),),
        **_REQUESTS,
    ),
    _measure(
        "serve-asgi-p99",
        "99 of 100 requests to an ASGI application are answered in, at some 25,000 a second on 32 kept connections",
        _sides(latency, "asgi", 1, names=(*_ASGI, "fdpool-handoff")),
        goals=_AHEAD,
        **_REQUESTS,
    ),
    _measure(
        "serve-wsgi-p99",
        "99 of 100 requests to a WSGI application are answered in, at some 5,000 a second on 32 kept connections; "
        "workers of four threads",
        _sides(latency, "wsgi", 5, names=("fdpool", "gunicorn-threads")),
        goals=(ahead_of("gunicorn-threads", 1),),
        **_REQUESTS,
    ),
    _measure(
        "serve-reload",
        "requests lost in a reload (ASGI), at 300 a second, half of them on kept connections",
        _sides(reload, "asgi", names=_ASGI),
        **_RELOADS,
    ),
    _measure(
        "serve-reload-wsgi",
        "requests lost in a reload (WSGI), at 300 a second, half of them on kept connections",
        _sides(reload, "wsgi", names=_WSGI),
        **_RELOADS,
    ),
    _measure(
        "serve-recovery",
        "from `kill -9` of one of two workers (ASGI) to the first answer of another in its place",
        _sides(recovery, "asgi", names=_ASGI),
        goals=_AHEAD,
        **_RECOVERIES,
    ),
    _measure(
        "serve-recovery-wsgi",
        "from `kill -9` of one of two workers (WSGI, of one thread) to the first answer of another in its place",
        _of_one_thread(recovery, "wsgi"),
        ours="fdpool-sync",
        goals=(ahead_of("gunicorn", 1),),
        **_RECOVERIES,
    ),
    _measure(
        "serve-recovery-standby",
        "the same, where a worker (ASGI) stands by",
        {"fdpool": partial(recovery, "fdpool-standby", "asgi"), **_sides(recovery, "asgi", names=_ASGI[1:])},
        ours="fdpool-standby",
        goals=_AHEAD,
        **_RECOVERIES,
    ),
    _measure(
        "serve-recovery-standby-wsgi",
        "the same, where a worker (WSGI, of one thread) stands by",
        {
            "fdpool": partial(recovery, "fdpool-sync-standby", "wsgi"),
            **_sides(recovery, "wsgi", names=_WSGI[1:]),
        },
        ours="fdpool-sync-standby",
        goals=(ahead_of("gunicorn", 1),),
        **_RECOVERIES,
    ),
    _measure(
        "serve-memory",
        "memory of an ASGI worker with its share of what it shares (PSS)",
        _sides(memory, "asgi", names=(*_ASGI, "fdpool-preload")),
        goals=_AHEAD,
        **_MEMORY,
    ),
    _measure(
        "serve-memory-own",
        "memory that is an ASGI worker's alone (USS)",
        _sides(private_memory, "asgi", names=(*_ASGI, "fdpool-preload")),
        goals=_AHEAD,
        **_MEMORY,
    ),
    _measure(
        "serve-memory-wsgi",
        "memory of a WSGI worker of one thread with its share of what it shares (PSS)",
        _of_one_thread(memory, "wsgi", names=("gunicorn", "gunicorn-preload")),
        ours="fdpool-sync",
        goals=(ahead_of("gunicorn", 1),),
        **_MEMORY,
    ),
    _measure(
        "serve-memory-wsgi-threads",
        "memory of a WSGI worker of four threads with its share of what it shares (PSS)",
        _sides(memory, "wsgi", names=("fdpool", "gunicorn-threads", "fdpool-preload")),
        goals=(ahead_of("gunicorn-threads", 1),),
        **_MEMORY,
    ),
)
