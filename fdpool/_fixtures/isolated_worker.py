"""The worker's half of `run_isolated`, and the files through which output, log records, warnings and the reports of
subtests come back.

Files in memory that both processes hold, so that what was written until then is there however the worker ends.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import pdb
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import IO, Any, NamedTuple, NoReturn

import pytest

from .. import _platform
from . import coverage


class Outcome(NamedTuple):
    """What became of a body.

    Attributes:
        report: of the call, as `pytest_report_to_serializable` makes it.
        error: what was raised, or an `IsolatedFailure` in place of what cannot travel; None if nothing was.
        called: the function of pytest's by which the body has ended instead, "skip" or "exit", and its arguments.
    """

    report: dict[str, Any]
    error: Exception | None = None
    called: tuple[str, tuple[Any, ...]] | None = None


class IsolatedFailure(Exception):
    """Stands for what was raised in the worker, and cannot be raised here. Its text begins with the type."""


_STREAMS = ("stdout", "stderr")


class Channel:
    """What is written in the worker to streams that live in memory (`--capture=sys`, `capsys`), and notes: what is
    logged, warned of, and reported of subtests.

    Made before the fork. Descriptors need no help: they are inherited.
    """

    def __init__(self) -> None:
        self._files: dict[str, IO[bytes]] = {}
        for name in (*_STREAMS, "notes"):
            fd = _platform.anonymous_file(f"fdpool-{name}")
            self._files[name] = open(fd, "r+b", buffering=0)

    def install(self, config: pytest.Config) -> None:
        """Runs in: the worker. Copy what is written, logged and warned of from now on."""
        for name in _STREAMS:
            stream = getattr(sys, name)
            if _lives_in_memory(stream):
                _tee(stream, self._files[name])
        logging.getLogger().addHandler(_Recorder(self))
        if config.pluginmanager.hasplugin("warnings"):  # otherwise they are written to standard error
            _note_warnings(self)

    def note(self, kind: str, content: Any, plain: Any) -> None:
        """Runs in: the worker. Have the process of the tests know of it; of `plain`, where the content cannot be
        pickled here or loaded there."""
        import cloudpickle  # a warning's class may be one of the body's own

        try:
            pickled = cloudpickle.dumps(content)
        except Exception:  # of a __reduce__ of the body's own
            pickled = b""
        data = pickle.dumps((kind, pickled, plain))
        self._files["notes"].write(len(data).to_bytes(4, "little") + data)

    def replay(self) -> None:
        """Runs in: the process of the tests, when the worker is gone. Write, log and warn here as was done there."""
        for name in _STREAMS:
            stream = getattr(sys, name)
            text = self._content(name).decode(errors="backslashreplace")
            if text and stream is not None:
                # With --capture=tee-sys its own `write` writes to the terminal too, where it has been seen.
                write = io.TextIOWrapper.write if isinstance(stream, io.TextIOWrapper) else type(stream).write
                write(stream, text)
        for fields in self.notes("record"):
            _handle_record(logging.makeLogRecord(fields))
        for shown in self.notes("warning"):
            warnings.showwarning(*shown)  # past the filters, which it has passed

    def notes(self, kind: str) -> Iterator[Any]:
        """The notes of one kind, in their order, without one that the end of the worker has torn."""
        data = self._content("notes")
        while (end := 4 + int.from_bytes(data[:4], "little")) <= len(data):
            found, pickled, content = pickle.loads(data[4:end])
            data = data[end:]
            if found == kind:
                with suppress(Exception):  # of what the body's own classes do as they are loaded
                    content = pickle.loads(pickled)
                yield content

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
    channel.install(item.config)
    pdb.set_trace = _refuse_to_debug
    call = pytest.CallInfo.from_call(partial(_call, item, body, channel), when="call")
    report = item.ihook.pytest_runtest_makereport(item=item, call=call)
    # Failed subtests make the test a failure only here.
    item.ihook.pytest_report_teststatus(report=report, config=item.config)
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    outcome = Outcome(data)
    if call.excinfo is not None:
        outcome = outcome._replace(**_as_it_travels(call.excinfo.value))
    coverage.save_fork()
    for name in _STREAMS:
        with suppress(OSError, ValueError, AttributeError):
            getattr(sys, name).flush()
    return outcome


def _refuse_to_debug(*_: object, **__: object) -> NoReturn:
    """What `breakpoint()` calls. Who reads from a terminal without being in its foreground is stopped by the kernel."""
    __tracebackhide__ = True
    pytest.fail(
        "a test that is run isolated has no terminal for a debugger; with `pytest --pdb` none is isolated"
    )


#: Plugins of pytest's own that look, when a body has ended, for what nobody could be told of, and whether it has marked
#: itself as expected to fail (`request.applymarker`).
_AFTER_BODIES = ("threadexception", "unraisableexception", "skipping")


def _call(item: pytest.Item, body: Callable[[], None], channel: Channel) -> None:
    """Run the body with what belongs before, around and after it, as far as this process will not come to it."""
    __tracebackhide__ = True
    plugins = item.config.pluginmanager
    inside = _Inside(item.config, body, channel)
    plugins.register(_Kept())
    plugins.register(inside)
    taking_part = [inside, *map(plugins.get_plugin, _AFTER_BODIES)]
    others = [plugin for plugin in plugins.get_plugins() if plugin not in taking_part]
    plugins.subset_hook_caller("pytest_runtest_call", others)(item=item)


class _Inside:
    """What the worker has pytest do otherwise."""

    def __init__(self, config: pytest.Config, body: Callable[[], None], channel: Channel) -> None:
        self._config = config
        self._body = body
        self._channel = channel
        self._ends = ExitStack()

    def pytest_runtest_call(self, item: pytest.Item) -> None:
        __tracebackhide__ = True
        item.addfinalizer = self._ends.callback  # type: ignore[assignment, method-assign]
        with self._ends:
            self._body()
        gc.collect()  # what it leaves unfinalized would never be told of

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Iterator[None]:
        """What the body asks for by `request.getfixturevalue` is known only here, whatever its scope."""
        try:
            return (yield)
        finally:
            self._ends.callback(fixturedef.finish, request)  # type: ignore[arg-type]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a subtest. Nobody in this process is to be told: what a plugin of pytest-xdist says to its controller, or
        the terminal is told, would be said twice."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._channel.note("report", data, {**data, "user_properties": []})
        raise _NoFurther


class _NoFurther(Exception):
    """Raised by the first hook so that the others are not called."""


class _Kept:
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_logreport(self) -> Iterator[None]:
        try:
            return (yield)
        except _NoFurther:
            return None


def _as_it_travels(error: BaseException) -> dict[str, Any]:
    """What an `Outcome` says of the error."""
    if isinstance(error, pytest.exit.Exception):
        return {"called": ("exit", (error.msg, error.returncode))}
    for name in ("skip", "xfail", "fail"):
        # Their classes say that they are builtins, so they cannot be pickled.
        if type(error) is getattr(pytest, name).Exception:
            return {"called": (name, (str(error),))}
    if isinstance(error, Exception):  # others end more than a test
        import cloudpickle

        try:
            pickle.loads(cloudpickle.dumps(error))
        except Exception:  # of its own __reduce__, or its __init__
            pass
        else:
            return {"error": error}
    return {"error": IsolatedFailure(f"{type(error).__name__}: {error}")}


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


def _note_warnings(channel: Channel) -> None:
    """Note each warning that is shown. One that a block of the body's own catches is not."""
    show = warnings.showwarning

    def noting(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        plain = (f"{category.__name__}: {text}", Warning, filename, lineno)
        channel.note("warning", (text, category, filename, lineno), plain)
        show(message, category, filename, lineno, file, line)

    warnings.showwarning = noting


#: What every log record has. The rest is what was given as `extra`, or added by a filter.
_FIELDS = frozenset(logging.makeLogRecord({}).__dict__)


class _Recorder(logging.Handler):
    """Notes each record, as `logging.handlers.QueueHandler` prepares it for another process."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {**record.__dict__, "msg": record.getMessage(), "args": None, "exc_info": None}
            if record.exc_info:
                fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
            plain = {name: value for name, value in fields.items() if name in _FIELDS}
            self._channel.note("record", fields, plain)
        except Exception:
            self.handleError(record)


def _handle_record(record: logging.LogRecord) -> None:
    """Give the record to the handlers by which pytest captures logs; others have had it in the worker."""
    for handler in logging.getLogger().handlers:
        if type(handler).__module__ == "_pytest.logging" and record.levelno >= handler.level:
            handler.handle(record)
