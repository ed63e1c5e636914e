"""Logging from threads that have to go on: what a handler or a filter raises goes no further.

Those of the standard library print it and go on (`Handler.handleError`); an application's own may raise, of a pipe that
nobody reads any more, say. In the thread of a pool or of a server everybody would wait for ever.
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress
from typing import Any


def log(logger: str, level: int, text: str, *args: object, **options: Any) -> None:
    """`Logger.log` of the logger of this name. What that raises is printed, as logging itself does.

    Args:
        options: `exc_info` and `extra`.
    """
    try:
        logging.getLogger(logger).log(level, text, *args, stacklevel=2, **options)
    except (Exception, SystemExit):
        stderr = sys.stderr
        if logging.raiseExceptions and stderr is not None:
            with suppress(Exception):
                traceback.print_exc(file=stderr)
