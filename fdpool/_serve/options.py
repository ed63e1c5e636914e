"""The options of `fdpool serve`: how they are written, which go together, and what they come to."""

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from .. import _bind_spec, _systemd
from .._server import apps, upgrade
from ..server import Server
from . import log

DEFAULT_BIND = "127.0.0.1:8000"
DISPATCHES = ("shared", "handoff", "reuseport")

_USAGE = "fdpool serve [OPTION ...] TARGET"
_DESCRIPTION = """\
Serve TARGET with several worker processes on the same listening sockets. TARGET is
module:attribute, or module:factory() to have it made: an ASGI or WSGI application, a
function of (connection, address), a socketserver handler class, or a function that is
given the listeners and serves for itself.
"""
_EPILOG = """\
signals:
  TERM  stop: finish the requests that run     HUP   reload: new code, one worker at a time
  INT, QUIT  stop quickly; again: at once      TTIN, TTOU  one worker more, one less
  USR1  open the log files anew                USR2  start this program anew on the same sockets,
                                                     and leave when it serves

exit status:
  0 when it was told to stop; 1 if it cannot begin (as where the port is taken); 2 for
  bad usage; 3 if it gave up, as no worker could be started; 70 for a defect of the server

examples:
  fdpool serve app:app
  fdpool serve --bind :8000 --workers 8 --max-memory 500M --max-requests 10000 shop.wsgi:application
  fdpool serve --bind 'unix:/run/shop.sock?mode=660' --pid-file /run/shop.pid --log-json 'shop:make_app()'
  fdpool serve --check app:app && kill -HUP $(cat /run/shop.pid)
"""


class Options(NamedTuple):
    """What is to be served, and how; times in seconds, memory in bytes, None for the server's own choice."""

    target: str
    interface: str | None
    app_dir: str
    binds: list[str]
    backlog: int | None
    workers: int | None
    standby: int | None
    threads: int | None
    dispatch: str
    settings: dict[str, Any]
    preload: tuple[str, ...]
    max_requests: int | None
    max_age: float | None
    max_memory: int | None
    grace: float | None
    boot_timeout: float | None
    request_timeout: float | None
    reload_batch: int | None
    reload_on_change: bool
    reload_dirs: list[str]
    pid_file: str | None
    log_json: bool
    log_level: str
    check: bool


def parser() -> argparse.ArgumentParser:
    """`fdpool serve --help`, in groups."""
    serve = argparse.ArgumentParser(
        prog="fdpool serve",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.add_argument("target", metavar="TARGET", help="module:attribute or module:factory()")
    serve.add_argument(
        "--check", action="store_true", help="only see whether all of this would work, and say so"
    )

    app = serve.add_argument_group("the application")
    app.add_argument(
        "--interface",
        choices=apps.INTERFACES,
        help="what TARGET is, if its parameters do not tell",
    )
    app.add_argument("--app-dir", default=".", metavar="DIR", help="where its module is looked for first (.)")
    app.add_argument(
        "--option",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of what speaks HTTP, uvicorn or waitress, such as root_path=/shop or timeout_keep_alive=20; may be "
        "repeated",
    )
    app.add_argument(
        "--preload",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this before the workers are forked, so that they share its memory; may be repeated",
    )

    where = serve.add_argument_group("where it listens")
    where.add_argument(
        "-b",
        "--bind",
        action="append",
        default=[],
        metavar="WHERE",
        help=f"HOST:PORT, [V6ADDRESS]:PORT, :PORT, 'unix:PATH?mode=660', fd:N, systemd or systemd:NAME; may be "
        f"repeated ({DEFAULT_BIND}, or what systemd passes)",
    )
    where.add_argument(
        "--backlog", type=_whole, metavar="N", help="connections that the kernel keeps waiting"
    )
    where.add_argument(
        "--dispatch",
        choices=DISPATCHES,
        default="shared",
        help="who takes a connection: any worker from the shared sockets; the least busy, handed to it by the "
        "server; or the kernel's choice among sockets of their own (shared)",
    )

    workers = serve.add_argument_group("workers")
    workers.add_argument(
        "-w", "--workers", type=_whole, metavar="N", help="how many (one for each processor)"
    )
    workers.add_argument(
        "--standby",
        type=partial(_whole, least=0),
        metavar="N",
        help="so many more load the application and stand by, to serve as soon as another is lost (0)",
    )
    workers.add_argument(
        "--threads",
        type=_whole,
        metavar="N",
        help="connections, or WSGI requests, that a worker serves at a time; 1 serves them in its main thread "
        "(4 for WSGI, else 1; not for ASGI)",
    )
    workers.add_argument(
        "--max-requests", type=_whole, metavar="N", help="replace a worker after about so many"
    )
    workers.add_argument("--max-age", type=_seconds, metavar="SECONDS", help="replace a worker of that age")
    workers.add_argument(
        "--max-memory",
        type=_bytes,
        metavar="SIZE",
        help="replace a worker that has grown to this, as in 500M",
    )
    workers.add_argument(
        "--grace",
        type=_seconds_or_none,
        metavar="SECONDS",
        help="for requests that run when it is to go (30)",
    )
    workers.add_argument(
        "--boot-timeout", type=_seconds, metavar="SECONDS", help="for importing and starting (60)"
    )
    workers.add_argument(
        "--request-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="kill a worker that takes longer for one request, and log where it hung",
    )

    reload = serve.add_argument_group("reloading")
    reload.add_argument("--reload-batch", type=_whole, metavar="N", help="workers replaced at a time (1)")
    reload.add_argument(
        "--reload-on-change", action="store_true", help="when a Python file changes; for development"
    )
    reload.add_argument(
        "--reload-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder whose files are watched; may be repeated (that of --app-dir)",
    )

    process = serve.add_argument_group("the process")
    process.add_argument("--pid-file", metavar="FILE", help="holds the process id while this one serves")
    process.add_argument("--log-json", action="store_true", help="log a JSON object a line")
    process.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(info)"
    )
    return serve


def _under_systemd() -> bool:
    """True if systemd has passed sockets, to this process or to the one that it is to replace."""
    return _systemd.passes_sockets() or "systemd" in upgrade.announced_binds()


def started_in() -> str:
    """The folder that this was started in, by the name that its shell has for it: where that is a symbolic link, a
    reload is to look where it leads by then.

    Raises:
        FileNotFoundError: it has been removed.
    """
    here, named = os.getcwd(), os.environ.get("PWD", "")
    try:
        return named if os.path.isabs(named) and os.path.samefile(named, here) else here
    except OSError:
        return here


def parse(given: Sequence[str], under_systemd: Callable[[], bool] = _under_systemd) -> Options:
    """What the options come to; ends the process, with a message, where they contradict each other."""
    serve = parser()
    options = serve.parse_args(given)
    try:
        apps.check_target(options.target)
        for bind in options.bind:
            _bind_spec.parse(bind)
    except ValueError as error:
        serve.error(str(error))
    for folder in (options.app_dir, *options.reload_dir):
        if not os.path.isdir(folder):
            serve.error(f"there is no folder {folder!r}")
    if options.reload_dir and not options.reload_on_change:
        serve.error("--reload-dir says what --reload-on-change watches, which is not given")
    try:
        app_dir = started_in() if options.app_dir == os.curdir else os.path.abspath(options.app_dir)
        reload_dirs = [os.path.abspath(folder) for folder in options.reload_dir] or [app_dir]
        pid_file = None if options.pid_file is None else os.path.abspath(options.pid_file)
    except FileNotFoundError:
        serve.error("the folder that this was started in has been removed, so no path can be relative to it")
    return Options(
        target=options.target,
        interface=options.interface,
        app_dir=app_dir,
        binds=options.bind or ["systemd" if under_systemd() else DEFAULT_BIND],
        backlog=options.backlog,
        workers=options.workers,
        standby=options.standby,
        threads=options.threads,
        dispatch=options.dispatch,
        settings=dict(options.option),
        preload=tuple(options.preload),
        max_requests=options.max_requests,
        max_age=options.max_age,
        max_memory=options.max_memory,
        grace=options.grace,
        boot_timeout=options.boot_timeout,
        request_timeout=options.request_timeout,
        reload_batch=options.reload_batch,
        reload_on_change=options.reload_on_change,
        reload_dirs=reload_dirs,
        pid_file=pid_file,
        log_json=options.log_json,
        log_level=options.log_level.upper(),
        check=options.check,
    )


def server_of(options: Options, on_ready: Callable[[], object] | None) -> Server:
    """The server that the options ask for; nothing is opened yet.

    Raises:
        ValueError, TypeError, ImportError: as `Server` does.
    """
    chosen: dict[str, Any] = {
        "workers": options.workers,
        "standby": options.standby,
        "threads": options.threads,
        "backlog": options.backlog,
        "grace": options.grace,
        "boot_timeout": options.boot_timeout,
        "request_timeout": options.request_timeout,
        "max_requests": options.max_requests,
        "max_age": options.max_age,
        "max_memory": options.max_memory,
        "reload_batch": options.reload_batch,
        "options": options.settings,
    }
    return Server(
        options.target,
        options.binds,
        interface=options.interface,  # type: ignore[arg-type]  # one of the choices
        dispatch=options.dispatch,  # type: ignore[arg-type]
        preload=(log.__name__, *options.preload),  # the log, too: 0.1 MiB that workers share
        on_ready=on_ready,
        on_worker_start=partial(log.configure_worker, options.log_json, options.log_level),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _setting(text: str) -> tuple[str, Any]:
    """A name and its value: as in JSON (5, true, "5"), or else the text as it is."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"it must be NAME=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _whole(text: str, least: int = 1) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"it must be a whole number from {least}, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number of seconds above 0, not {text!r}")
    return seconds


def _seconds_or_none(text: str) -> float:
    return 0.0 if re.fullmatch(r"0+(\.0*)?", text) else _seconds(text)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"it must be a size such as 500M or 2G, not {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])
