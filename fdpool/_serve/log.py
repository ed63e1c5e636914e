"""What `fdpool serve` logs: one line for each event in the server's life, for people or as JSON.

Runs in: the server, and each of its workers, so that both write in the same form.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

_LOGGER = "fdpool"
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

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(2, (self.format(record) + "\n").encode(errors="backslashreplace"))
        except OSError:
            pass
        except Exception:
            self.handleError(record)


def configure(as_json: bool, level: str) -> None:
    """Have what fdpool logs in this process written to standard error, from `level` on; the last call counts."""
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(level)
    logger.propagate = False
    for old in [each for each in logger.handlers if isinstance(each, _Stderr)]:
        logger.removeHandler(old)
    handler = _Stderr()
    handler.setFormatter(Json() if as_json else Lines())
    logger.addHandler(handler)


def configure_worker(as_json: bool, level: str, _worker: object) -> None:
    """Runs in: each worker, before its application is loaded, which may configure all of it otherwise."""
    configure(as_json, level)
