"""Log files opened anew, after somebody has moved them away (logrotate)."""

from __future__ import annotations

import logging
from typing import Any

from .._log import log


def reopen_logs() -> int:
    """Have every file handler of `logging` open its file again; returns how many did.

    One whose file cannot be opened goes on with the file that it has, and says why.
    """
    # All that there are, as `logging.shutdown` has them: one may be behind another (a MemoryHandler's target), or in a
    # QueueListener, of which no logger knows.
    handlers = [reference() for reference in [*logging._handlerList]]  # type: ignore[attr-defined]
    reopened = 0
    for handler in handlers:
        if not isinstance(handler, logging.FileHandler):
            continue
        try:
            _reopen(handler)
            reopened += 1
        except OSError as error:
            log(
                "fdpool.server",
                logging.WARNING,
                "the log file %s cannot be opened anew: %s",
                handler.baseFilename,
                error,
                extra={"event": "reopen_failed", "file": handler.baseFilename, "reason": str(error)},
            )
    return reopened


def _open(handler: logging.FileHandler) -> Any:
    """Its file, to be added to: other processes open the same one anew, and may have written there before."""
    mode = handler.mode
    handler.mode = mode.replace("w", "a").replace("x", "a")
    try:
        return handler._open()
    finally:
        handler.mode = mode


def _reopen(handler: logging.FileHandler) -> None:
    handler.acquire()
    try:
        if handler.stream is not None:
            # Opened before the other is closed: a handler without a stream tries to open its file at each record, and
            # raises in whoever logs what comes of that.
            old, handler.stream = handler.stream, _open(handler)
            old.close()
    finally:
        handler.release()
