"""Importing modules in the supervisor before it forks: it must not outlive its client meanwhile, whatever they do.

Runs in: the supervisor. Its loop does not turn while it imports, so a thread looks after the client. That has ended
before the first fork, as nothing may be forked beside a thread.
"""

from __future__ import annotations

import importlib
import os
import select
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from . import _trees
from ._spawn import flush_standard_streams

_MOST_TRACEBACK = 32 * 1024
_LOOK_MS = 500  # where there is no pidfd


def load(modules: Iterable[str], client_pidfd: int | None, flush: bool) -> tuple[str, str, str] | None:
    """Import `modules`; returns the first that cannot be, why, and the traceback, or None.

    Args:
        client_pidfd: readable once the client is dead, or None where there is no such thing; borrowed.
        flush: what they have printed, or each worker would write what is left of it. Not in a fork of the client: a
            stream's lock may be held by a thread that is not here.
    """
    with _ending_with(client_pidfd):
        try:
            for module in modules:
                try:
                    importlib.import_module(module)
                except BaseException as error:
                    formatted = "".join(traceback.format_exception(error))
                    return module, f"{type(error).__name__}: {error}", formatted[-_MOST_TRACEBACK:]
        finally:
            if flush:
                flush_standard_streams()
    return None


@contextmanager
def _ending_with(client_pidfd: int | None) -> Iterator[None]:
    """End this process, and all that descends from it, if the client dies."""
    import threading

    parent = os.getppid()
    read, write = os.pipe()

    def watch() -> None:
        poll = select.poll()
        poll.register(read, select.POLLIN)
        if client_pidfd is not None:
            poll.register(client_pidfd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(None if client_pidfd is not None else _LOOK_MS)}
            if read in ready:
                return
            if ready or os.getppid() != parent:
                _trees.kill_descendants()
                os._exit(1)

    thread = threading.Thread(target=watch, name="fdpool-preload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(write)
        thread.join()
        os.close(read)
