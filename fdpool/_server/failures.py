"""Why an application could not be loaded or served, in the words of who has to mend it."""

from __future__ import annotations

import importlib
import os
import traceback

_MOST_TRACEBACK = 32 * 1024
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def why(error: BaseException) -> str:
    """What it was, in the error's own words."""
    if isinstance(error, SystemExit):
        # sys.exit("text") is how a program says why, and it exits with 1 then.
        return (
            f"it exited: {error.code}"
            if isinstance(error.code, str)
            else f"it exited with code {error.code!r}"
        )
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def formatted(error: BaseException) -> str:
    """Its traceback from the first frame on that is the application's; "" if it is not from there."""
    place = error.__traceback__
    while place is not None and _is_way_there(place.tb_frame.f_code.co_filename):
        place = place.tb_next
    if place is None and not isinstance(error, SyntaxError) and error.__cause__ is None:
        return ""  # the reason says it all
    return "".join(traceback.format_exception(type(error), error, place))[-_MOST_TRACEBACK:]


def _is_way_there(filename: str) -> bool:
    """True of the frames that a traceback has before those of the application: ours, and the import system's."""
    return filename.startswith(("<frozen importlib", _PACKAGE)) or filename == importlib.__file__
