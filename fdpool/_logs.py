"""Log records of workers in the client's `logging`, for those who ask for it.

In the worker a handler of the root logger sends each record as a datagram of the task link, so they arrive in order and
before the answer of the task that wrote them. A client that does not read holds a record up for `_PATIENCE_S` at most;
then it is dropped, and so is what follows, at once, until there is room again: then a record says how many were.
"""

from __future__ import annotations

import logging
import pickle
import select

from . import _messages, wire
from ._clock import CLOCK
from ._own_sockets import OwnSocket

_PATIENCE_S = 1.0
_PAUSE_S = 0.002
_LONGEST = _messages.MAX_BODY - 4096  # characters of a message that is kept whole; most take a byte


class Forwarder(logging.Handler):
    """Runs in: a worker. Sends records over its end of the task link; from any thread.

    Args:
        inbox: the worker's end; borrowed.
        slot: the worker's place, which is in the `processName` of its records.
    """

    def __init__(self, inbox: OwnSocket, slot: int) -> None:
        super().__init__()
        self._inbox = inbox
        self._name = f"Worker-{slot}"
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                # One record has waited in vain. If each did, a client that stands still would hold up a task that logs
                # a thousand lines for a quarter of an hour.
                if not self._send(_fields(self._report_of_dropped()), 0.0):
                    self._dropped += 1
                    return
                self._dropped = 0
            record.processName = self._name
            if not self._send(_fields(record), _PATIENCE_S):
                self._dropped += 1
        except Exception:
            self.handleError(record)

    def _report_of_dropped(self) -> logging.LogRecord:
        text = f"{self._dropped} log records of this worker were dropped, as the client did not read"
        record = logging.LogRecord("fdpool", logging.WARNING, __file__, 0, text, None, None)
        record.processName = self._name
        return record

    def _send(self, body: bytes, patience_s: float) -> bool:
        header = _messages.pack_header(_messages.LOG, 0, len(body))
        deadline = CLOCK.monotonic() + patience_s
        while not wire.try_send(self._inbox, (header, body)):
            if CLOCK.monotonic() >= deadline:
                return False
            select.select([], [], [], _PAUSE_S)
        return True


def _fields(record: logging.LogRecord) -> bytes:
    """What makes the same record again, as far as it can travel: texts are made here, as QueueHandler does it."""
    fields = dict(vars(record))
    fields["msg"] = record.getMessage()[:_LONGEST]
    fields["args"] = None
    if record.exc_info and not record.exc_text:
        fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
    fields["exc_info"] = None
    body = _pickled(fields)
    if body is None or len(body) > _messages.MAX_BODY:
        plain = {name: value for name, value in fields.items() if _pickled(value) is not None}
        plain["msg"] = plain["msg"][: _LONGEST // 4]
        plain["exc_text"] = (plain.get("exc_text") or "")[-_LONGEST // 8 :] or None
        body = _pickled(plain)
        if body is None or len(body) > _messages.MAX_BODY:
            standard = vars(logging.makeLogRecord({}))
            body = pickle.dumps({name: plain[name] for name in standard if name in plain})
    return body


def _pickled(value: object) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:
        return None


def forward(inbox: OwnSocket, slot: int, level: int) -> None:
    """Runs in: a worker. Send what is logged from now on, from `level` up."""
    root = logging.getLogger()
    root.handlers[:] = [Forwarder(inbox, slot)]  # those of a client that was forked would write it twice
    root.setLevel(level)


def handle(body: bytes) -> None:
    """Runs in: the client. Hand a record to the logger of its name, if that listens.

    Raises: what loading it does, or a handler.
    """
    record = logging.makeLogRecord(pickle.loads(body))
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
