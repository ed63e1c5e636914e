"""`fdpool serve --check`: would it work?

Loads the application in a worker, opens what it would listen on, and says what it has found.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
from concurrent.futures import TimeoutError as FutureTimeoutError

from .. import _bind, _bind_spec
from .._cpus import usable_cpus
from .._server import apps, failures
from .._server.link import end_by
from ..errors import BindFailed
from ..pool import Pool
from ..server import Server
from .options import Options

_BOOT_S = 60.0


def check(options: Options) -> int:
    """Say what would be done, or what is wrong; 0 if nothing is, else 1."""
    problems = [*_application(options), *_listeners(options)]
    for problem in problems:
        sys.stderr.write(f"fdpool serve: {problem}\n")
    if not problems:
        workers = usable_cpus() if options.workers is None else options.workers
        print(f"would start {workers} workers, dispatch {options.dispatch}")
    return 1 if problems else 0


def _application(options: Options) -> Iterable[str]:
    """What is wrong with it, found by a worker that imports it as a server's worker would."""
    limit_s = options.boot_timeout or _BOOT_S
    with Pool(1, preload=options.preload) as pool:
        loading = pool.submit(interface_of_target, options.target, options.interface)
        try:
            interface, why = loading.result(limit_s)
        except FutureTimeoutError:
            pool.kill_workers()
            yield f"{options.target} is not loaded within {limit_s:g} s (--boot-timeout)"
            return
        except Exception as error:  # what is to be preloaded, or the worker's death
            end = end_by(error)
            interface, why = "", f"{end.why}\n{end.traceback}".rstrip()
    if why:
        yield f"cannot load {options.target}: {why}"
        return
    try:
        Server(options.target, interface=interface, dispatch=options.dispatch)  # type: ignore[arg-type]
    except (ValueError, TypeError, ImportError) as error:
        yield str(error)
        return
    print(f"{options.target} loads, and is served as {interface}")


def interface_of_target(target: str, interface: str | None) -> tuple[str, str]:
    """Runs in: a worker of the check's pool. Which kind it is, and why it cannot be loaded ("" if it can)."""
    try:
        app = apps.load(target)
        return interface or apps.interface_of(app), ""
    except (Exception, SystemExit) as error:
        return "", f"{failures.why(error)}\n{failures.formatted(error)}".rstrip()


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
