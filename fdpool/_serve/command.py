"""`fdpool serve`: a `Server` run from the command line, its log, its pid file, and its watch over changed files."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial

from .. import __version__
from .._server import upgrade
from .._server.signals import Signals
from ..errors import BindFailed, FdpoolError
from ..server import Server
from . import check, log
from .options import Options, parse, server_of, started_in
from .pid_file import PidFile, PidFileRefused
from .watch import Watcher

_LOG = logging.getLogger("fdpool.server")
_FAILED = 1
_STARTED_IN = "FDPOOL_STARTED_IN"


def main(given: Sequence[str]) -> int:
    """The exit status, once the server has ended."""
    _go_where_it_was_started()
    options = parse(given)
    log.configure(options.log_json, options.log_level)
    if options.app_dir not in sys.path[:1]:
        sys.path.insert(0, options.app_dir)  # workers get this process's search path
    if options.check:
        try:
            return check.check(options)
        except BrokenPipeError:  # who reads what it has found has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try again as it ends
            return _FAILED
    try:
        return serve(options)
    except (BindFailed, PidFileRefused, FdpoolError, ValueError, TypeError, ImportError) as error:
        _LOG.critical(
            "cannot serve %s: %s", options.target, error, extra={"event": "refused", "reason": str(error)}
        )
        return _FAILED


def _go_where_it_was_started() -> None:
    """A successor begins in the folder that now has the name which that of the first server had: it may be a symbolic
    link, to the latest release."""
    named = os.environ.get(_STARTED_IN)  # not PWD, which is what it likes where no shell has set it
    with contextlib.suppress(OSError):  # it has been removed
        if named is not None and upgrade.is_successor():
            os.chdir(named)
            os.environ["PWD"] = named
        os.environ[_STARTED_IN] = os.environ["PWD"] = started_in()


def serve(options: Options) -> int:
    """Serve until a signal ends it; the exit status.

    Raises:
        FdpoolError, ValueError, TypeError, ImportError: it cannot begin; nothing is left.
    """
    with contextlib.ExitStack() as until_the_end:

        def hold_pid_file(replace: bool = False) -> None:
            if options.pid_file is not None:
                until_the_end.callback(PidFile(options.pid_file, replace=replace).close)

        # A successor that never serves must leave the file to the server that goes on.
        takes_over = upgrade.is_successor()
        server = server_of(options, partial(hold_pid_file, replace=True) if takes_over else None)
        # Before a file tells whom to send them to, and a line what they do; and longer than both.
        signals = until_the_end.enter_context(Signals(ends_process=True))
        if not takes_over:
            hold_pid_file()
        if options.reload_on_change:
            until_the_end.callback(Watcher(options.reload_dirs, partial(_reload, server)).close)
        _LOG.info(
            "fdpool %s starts %s at %s: SIGTERM ends it, SIGHUP reloads",
            __version__,
            options.target,
            ", ".join(options.binds),
            extra={
                "event": "starting",
                "version": __version__,
                "python": ".".join(map(str, sys.version_info[:3])),
                "target": options.target,
                "binds": options.binds,
                "dispatch": options.dispatch,
            },
        )
        return server._run_under(signals)


def _reload(server: Server, changed: list[str]) -> None:
    """Runs in: the watcher's thread."""
    try:
        first = os.path.relpath(changed[0])
    except FileNotFoundError:  # the working directory has been removed
        first = changed[0]
    _LOG.info(
        "%s%s changed, so the server reloads",
        first,
        "" if len(changed) == 1 else f" and {len(changed) - 1} more",
        extra={"event": "files_changed", "files": changed},
    )
    try:
        server.reload()
    except RuntimeError:
        pass  # it does not serve yet, and will load what is there
