"""What `fdpool serve` logs: one line for each event in the server's life, for people or as JSON.

Runs in: the server, and each of its workers, so that both write in the same form.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import stat
import time
from typing import Any

from .._clock import CLOCK

_LOGGER = "fdpool"
_PATIENCE_S = 5.0  # for another process that writes, and for a reader in the middle of a line
_LOOK_S = 0.002
_PLAIN = set(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}


class Lines(logging.Formatter):
    """`2026-11-22 16:20:01 [4711] worker 1 is ready`, and INFO is not said."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{moment} [{record.process}] {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class Json(logging.Formatter):
    """An object a line: `time` (since 1970), `level`, `logger`, `pid`, `message`, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
        }
        fields = {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
        said.update({name: value for name, value in fields.items() if name not in said})
        said["message"] = record.getMessage()
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


class _Stderr(logging.Handler):
    """Writes each record in one piece, so that lines of several processes do not mix; nobody reading is no error."""

    def __init__(self) -> None:
        super().__init__()
        self._patience_s = _PATIENCE_S

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
            has_turn = self._take_turn()
            try:
                _write(line)
            finally:
                if has_turn:
                    fcntl.lockf(2, fcntl.LOCK_UN)
        except OSError:
            pass
        except Exception:
            self.handleError(record)

    def _take_turn(self) -> bool:
        """Have no other process log to the same pipe or socket; False where that cannot be, or takes too long.

        A pipe that is full takes a record in parts, and of all that wait some part of each (pipe(7)).
        """
        mode = os.fstat(2).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            return False  # each write(2) to a file is in one piece
        deadline = CLOCK.monotonic() + self._patience_s
        while True:
            try:
                # Kernel: pipes and sockets take POSIX locks (test_kernel_facts), which tell apart the processes that
                # hold the same description, and go with one that is killed.
                fcntl.lockf(2, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if CLOCK.monotonic() >= deadline:
                    self._patience_s = 0.0  # who has it is stopped, say; no more records are to wait for that
                    return False
                time.sleep(_LOOK_S)
            except OSError:
                return False  # another kernel
            else:
                self._patience_s = _PATIENCE_S
                return True


def _write(line: bytes) -> None:
    """Write all of it, or nothing if O_NONBLOCK is set and nobody reads."""
    left = memoryview(line)
    left = left[os.write(2, left) :]
    while left:  # a signal has come, or O_NONBLOCK is set: what has begun is to be ended
        select.select([], [2], [], _PATIENCE_S)
        left = left[os.write(2, left) :]


def configure(as_json: bool, level: str) -> None:
    """Have what fdpool logs in this process written to standard error, from `level` on; the last call counts."""
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(level)
    logger.propagate = False
    for old in [each for each in logger.handlers if isinstance(each, _Stderr)]:
        logger.removeHandler(old)
    logger.addHandler(_handler(as_json))


def _handler(as_json: bool) -> logging.Handler:
    handler = _Stderr()
    handler.setFormatter(Json() if as_json else Lines())
    return handler


def configure_worker(as_json: bool, level: str, _worker: object) -> None:
    """Runs in: each worker, before its application is loaded, which may configure all of it otherwise."""
    configure(as_json, level)
    # What uvicorn, waitress and the application log of what has gone wrong, and nobody else writes.
    logging.lastResort = last = _handler(as_json)
    last.setLevel(logging.WARNING)
