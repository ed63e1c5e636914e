"""The worker's half of `run_isolated`, and the files through which output and log records come back.

Files in memory that both processes hold, so that what was written until then is there however the worker ends.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, Any, NamedTuple

import pytest

from .. import _platform
from . import coverage


class Outcome(NamedTuple):
    """What became of a body.

    Attributes:
        report: of the call, as `pytest_report_to_serializable` makes it.
        exit: reason and status, if `pytest.exit` was called.
    """

    report: dict[str, Any]
    exit: tuple[str, int | None] | None


_STREAMS = ("stdout", "stderr")


class Channel:
    """What is written in the worker to streams that live in memory (`--capture=sys`, `capsys`), and logged.

    Made before the fork. Descriptors need no help: they are inherited.
    """

    def __init__(self) -> None:
        self._files: dict[str, IO[bytes]] = {}
        for name in (*_STREAMS, "records"):
            fd = _platform.anonymous_file(f"fdpool-{name}")
            self._files[name] = open(fd, "r+b", buffering=0)

    def install(self) -> None:
        """Runs in: the worker. Copy what is written from now on."""
        for name in _STREAMS:
            stream = getattr(sys, name)
            if _lives_in_memory(stream):
                _tee(stream, self._files[name])
        logging.getLogger().addHandler(_Recorder(self._files["records"]))

    def replay(self) -> None:
        """Runs in: the process of the tests, when the worker is gone. Write and log here what was there."""
        for name in _STREAMS:
            stream = getattr(sys, name)
            text = self._content(name).decode(errors="backslashreplace")
            if text and stream is not None:
                stream.write(text)
        _handle_records(self._content("records"))

    def _content(self, name: str) -> bytes:
        file = self._files[name]
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()


#: The item, its body and the channel. Inherited by the worker, not sent: an item and its fixtures cannot be pickled.
_pending: tuple[pytest.Item, Callable[[], None], Channel] | None = None


@contextmanager
def pending(item: pytest.Item, body: Callable[[], None]) -> Iterator[Channel]:
    """What is forked in this block runs that body with `run`."""
    global _pending
    with Channel() as channel:
        _pending = item, body, channel
        try:
            yield channel
        finally:
            _pending = None


def run() -> Outcome:
    """Runs in: the worker. Run the body, and report on it as pytest would."""
    assert _pending is not None
    item, body, channel = _pending
    channel.install()
    call = pytest.CallInfo.from_call(body, when="call")
    left = None
    if call.excinfo is not None and isinstance(call.excinfo.value, pytest.exit.Exception):
        left = call.excinfo.value.msg, call.excinfo.value.returncode
    report = item.ihook.pytest_runtest_makereport(item=item, call=call)
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    coverage.save_fork()
    for name in _STREAMS:
        with suppress(OSError, ValueError, AttributeError):
            getattr(sys, name).flush()
    return Outcome(data, left)


def _lives_in_memory(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream is not None
    return False


def _tee(stream: Any, file: IO[bytes]) -> None:
    """Have the file receive a copy of all that is written to the stream."""
    write = stream.write

    def copying(text: str) -> Any:
        file.write(text.encode(errors="backslashreplace"))
        return write(text)

    stream.write = copying


class _Recorder(logging.Handler):
    """Writes each record to a file, as `logging.handlers.QueueHandler` prepares it for another process."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {**record.__dict__, "msg": record.getMessage(), "args": None, "exc_info": None}
            if record.exc_info:
                fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
            data = pickle.dumps(fields)
        except Exception:
            self.handleError(record)
            return
        self._file.write(len(data).to_bytes(4, "little") + data)


def _handle_records(data: bytes) -> None:
    """Give the records to the handlers by which pytest captures logs; others have had them in the worker."""
    handlers = [each for each in logging.getLogger().handlers if type(each).__module__ == "_pytest.logging"]
    while len(data) >= 4:
        size = int.from_bytes(data[:4], "little")
        record = logging.makeLogRecord(pickle.loads(data[4 : 4 + size]))
        data = data[4 + size :]
        for handler in handlers:
            if record.levelno >= handler.level:
                handler.handle(record)
