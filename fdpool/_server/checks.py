"""Arguments of a `Server` that are of no use, found before anything is opened; and what follows from those that are."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from .._options import check_count, check_seconds
from ..errors import ServerFailed
from . import apps, room

_FACES = {
    "asgi": ("uvicorn", "fdpool._server.asgi"),
    "wsgi": ("waitress", "fdpool._server.wsgi"),
    "handler": (None, "fdpool._server.handler"),
    "socketserver": (None, "fdpool._server.handler"),
    "listeners": (None, "fdpool._server.handler"),
}

# Of this process, for each worker: its control stream, page and pidfd; the pool's slot with its pair and pidfd. With a
# hand-over, a pair more.
_PER_WORKER = {"shared": 6, "reuseport": 7, "handoff": 8}
_BESIDES = 48

#: Most workers of a server. As many again may drain at the same time.
MOST_WORKERS = 512


def check_counts(optional: bool = False, **counts: int | None) -> None:
    """Raise TypeError or ValueError unless each is an integer above 0."""
    for name, count in counts.items():
        if count is not None or not optional:
            check_count(name, count, 1)


def check_standby(standby: int, dispatch: str) -> None:
    """Raise TypeError or ValueError where there cannot be so many workers that stand by."""
    check_count("standby", standby, 0)
    if standby and dispatch == "reuseport":
        raise ValueError(
            "with dispatch='reuseport' each worker has a listener of its own, and nobody can stand by for all of them: "
            "leave standby at 0, or take 'shared' or 'handoff'"
        )


def check_times(optional: bool = False, **times: float | None) -> None:
    """Raise TypeError or ValueError unless each is a number of seconds; `grace` may be 0."""
    for name, seconds in times.items():
        if seconds is not None or not optional:
            check_seconds(name, seconds, zero=name == "grace")


def checked_interface(app: Any, interface: str | None, dispatch: str) -> str | None:
    """Which kind of application it is; None if only a worker can tell, as it is named.

    Raises:
        ValueError, TypeError: it is none, or does not go with `dispatch`.
        ImportError: what it needs is not installed.
    """
    if interface is not None and interface not in apps.INTERFACES:
        raise ValueError(f"interface is one of {', '.join(apps.INTERFACES)}, not {interface!r}")
    if isinstance(app, str):
        apps.check_target(app)
    elif interface is None:
        interface = apps.interface_of(app)
    elif not callable(app):
        raise TypeError(f"an application is callable, and {app!r} is not")
    if interface == "listeners" and dispatch == "handoff":
        raise ValueError(
            "an application that accepts for itself cannot be handed connections (dispatch='handoff')"
        )
    if interface is not None:
        check_installed(interface)
    return interface


def check_installed(interface: str) -> None:
    """Raise ModuleNotFoundError, with what to do, where that is missing which serves applications of this kind."""
    library = _FACES[interface][0]
    if library is not None and not _is_installed(library):
        raise ModuleNotFoundError(
            f"an application of the kind {interface!r} is served by {library}, which is not installed: "
            f"pip install 'fdpool[{interface}]'",
            name=library,
        )


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def modules_to_serve(interface: str | None) -> list[str]:
    """The modules that every worker needs to serve an application of this kind, or of one that is not known yet."""
    kinds = dict.fromkeys(_FACES.values()) if interface is None else [_FACES[interface]]
    # One that was guessed may need what is not installed: the worker says so in plain words.
    faces = [face for library, face in kinds if library is None or _is_installed(library)]
    return ["fdpool._server.worker", *faces]


def modules_to_look_closer(interface: str | None) -> list[str]:
    """The modules that every worker needs beside, to see how an application of this kind, if any is told, is called."""
    return ["inspect"] if interface in (None, "listeners") else []


def check_not_imported(target: str | None, boots: bool) -> None:
    """Raise RuntimeError where a module starts a server as it is imported, and the workers would import it again: each
    of them would start one, and so on without end.

    Args:
        boots: this process is a worker that does not serve yet, so what it imports is its application.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            name = frame.f_globals.get("__name__")
            if boots or (target is not None and name == apps.module_of(target)):
                raise RuntimeError(
                    f"line {frame.f_lineno} of module {name!r} starts a server as the module is imported, and its "
                    "workers import it again, without end: do so in a function, or under `if __name__ == '__main__':`"
                )
        frame = frame.f_back


def modules_to_preload(preload: bool | Iterable[str], target: str | None) -> list[str]:
    """The modules that were asked to be imported before workers are forked.

    Raises:
        TypeError, ValueError: `preload` is of no use.
    """
    if preload is True:
        if target is None:
            raise ValueError("preload=True is for an application that is named, 'module:attribute'")
        return [apps.module_of(target)]
    if preload is False:
        return []
    if isinstance(preload, str):
        raise TypeError(f"preload must be True or an iterable of module names, not the string {preload!r}")
    return list(preload)


def handed_at_most(interface: str, threads: int | None) -> int:
    """How many connections a worker may be handed at a time.

    One that calls a handler can do with `threads`, and two more, so that it need not wait for the next. What speaks
    HTTP has many that are idle: waitress takes up to a thousand, uvicorn as many as there are descriptors for.
    """
    if interface in ("handler", "socketserver"):
        return (threads or 1) + 2
    return max(90, _most_descriptors()[0] - _BESIDES) if interface == "asgi" else room.for_connections() - 10


def check_descriptors(workers: int, dispatch: str) -> None:
    """Raise ServerFailed if there are too many of them, or this process may not have the descriptors that they take."""
    if workers > MOST_WORKERS:
        raise ServerFailed(f"a server has {MOST_WORKERS} workers at most, not {workers}")

    soft, hard = _most_descriptors()
    wanted = _BESIDES + workers * _PER_WORKER[dispatch]
    if wanted > soft:
        raise ServerFailed(
            f"{workers} workers take about {wanted} descriptors in this process, and its limit is {soft}: raise it "
            f"(ulimit -n, LimitNOFILE=; the hard limit is {hard}), or have fewer workers"
        )


def _most_descriptors() -> tuple[int, int]:
    """How many this process, and whoever descends from it, may have: the soft limit, and the hard one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft, hard
