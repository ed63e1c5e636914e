"""To be preloaded: the supervisor can fork no more workers than the file named by `VARIABLE` says, as at the limit of
the user's processes (RLIMIT_NPROC), or of a control group's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from fdpool import _spawn, _trees

VARIABLE = "FDPOOL_TEST_PROCESSES"

_fork_worker = _spawn.fork_worker


def _fork_if_there_is_room(*arguments: Any, **options: Any) -> int:
    if len(_trees.direct_children()) >= int(Path(os.environ[VARIABLE]).read_text()):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return _fork_worker(*arguments, **options)


if VARIABLE in os.environ:
    _spawn.fork_worker = _fork_if_there_is_room
