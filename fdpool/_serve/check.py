"""`fdpool serve --check`: would it work?

Loads the application in a worker, prepares to serve it, opens what it would listen on, and says what it has found.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterable
from concurrent.futures import TimeoutError as FutureTimeoutError

from .. import _bind, _bind_spec
from .._cpus import usable_cpus
from .._server import apps, checks, doors, failures, worker
from .._server.context import Order, ServerWorker
from .._server.link import end_by
from .._server.progress import Progress, SeenPage
from ..errors import BindFailed, ServerFailed
from ..pool import Pool
from .options import Options, server_of

_BOOT_S = 60.0


def check(options: Options) -> int:
    """Say what would be done, or what is wrong; 0 if nothing is, else 1."""
    problems = [*_server(options), *_listeners(options)]
    for problem in problems:
        sys.stderr.write(f"fdpool serve: {problem}\n")
    if not problems:
        workers = usable_cpus() if options.workers is None else options.workers
        by = f", {options.standby} more standing by" if options.standby else ""
        print(f"would start {workers} worker{'s' * (workers != 1)}{by}, dispatch {options.dispatch}")
    return 1 if problems else 0


def _server(options: Options) -> Iterable[str]:
    """What is wrong with the server, its workers and its application."""
    try:
        server = server_of(options, None)
    except (ValueError, TypeError, ImportError) as error:
        yield str(error)
        return
    try:
        checks.check_descriptors(server._workers + server._settings.standby, options.dispatch)
    except ServerFailed as error:
        yield str(error)
    yield from _application(options, server._order)


def _application(options: Options, order: Order) -> Iterable[str]:
    """What is wrong with it, found by a worker that prepares it as a server's worker would."""
    limit_s = options.boot_timeout or _BOOT_S
    with Pool(1, max_tasks_per_child=1, preload=options.preload) as pool:  # as for each worker of a server
        preparing = pool.submit(prepare, order, options.dispatch)
        try:
            interface, why = preparing.result(limit_s)
        except FutureTimeoutError:
            pool.kill_workers()
            yield f"{options.target} is not loaded within {limit_s:g} s (--boot-timeout)"
            return
        except Exception as error:  # what is to be preloaded, or the worker's death
            end = end_by(error)
            interface, why = "", f"{end.why}\n{end.traceback}".rstrip()
    if not why:
        print(f"{options.target} loads, and is served as {interface}")
    elif interface:
        yield f"cannot serve {options.target} as {interface}: {why}"
    else:
        yield f"cannot load {options.target}: {why}"


def prepare(order: Order, dispatch: str) -> tuple[str, str]:
    """Runs in: a worker of the check's pool. Which kind of application it is, "" if it cannot be loaded; and why it
    cannot be served ("" if it can).

    It comes as far as a server's worker does before it serves, with a listener that nobody knows.
    """
    interface = ""
    try:
        assert order.target is not None
        app = apps.load(order.target)
        interface = order.interface or apps.interface_of(app)
        checks.checked_interface(order.target, interface, dispatch)
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.closing(SeenPage()) as page:
            doing = ServerWorker(order.slot, order.generation, Progress(page.fd), lambda _: None)
            worker._face(interface, app, order, doing, doors.Listening([listener]), [listener]).close()
        return interface, ""
    except (Exception, SystemExit) as error:
        return interface, f"{failures.why(error)}\n{failures.formatted(error)}".rstrip()


def _listeners(options: Options) -> Iterable[str]:
    """What is wrong with the binds; one that is in use is not, as a server of ours may be what uses it."""
    for bind in options.binds:
        if bind.startswith("systemd"):
            print(f"would listen on {bind}: what is passed is known when it starts")
            continue
        # Not in the group of a server that runs: there it would get clients' connections, and reset them as it closes.
        joins = options.dispatch == "reuseport" and not isinstance(_bind_spec.parse(bind), _bind_spec.Tcp)
        try:
            listeners = _bind.open_listeners(bind, reuseport=joins)
        except BindFailed as error:
            if error.errno != errno.EADDRINUSE:
                yield str(error)
                continue
            print(f"would listen on {bind}, which is in use now")
            continue
        except ValueError as error:
            yield str(error)
            continue
        for listener in listeners:
            print(f"would listen on {bind if bind.startswith('fd:') else listener.address}")
            listener.close()
