"""Log files opened anew, after somebody has moved them away (logrotate)."""

from __future__ import annotations

import logging


def reopen_logs() -> int:
    """Have every file handler of `logging` open its file again; returns how many did."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.FileHandler)
    }
    for handler in handlers:
        handler.acquire()
        try:
            if handler.stream is not None:
                handler.stream.close()
                handler.stream = handler._open()
        finally:
            handler.release()
    return len(handlers)
