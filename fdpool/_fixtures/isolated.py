"""`run_isolated`: the body of one test in a worker forked from the test process, with its outcome as if it ran here.

Forked, and not run by node id in a fresh worker: the body needs the fixtures that were set up for it, as they are, and
those of a session or a module were not made to be made twice. What a fork cannot take along are threads: a lock that
one of them holds at that moment stays held in the worker. So an isolated body always has a limit on its time, and a
failure by that limit names the threads that there were. A crash, an exit, too much time or memory are failures of this
test alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from ..errors import FdpoolError
from ..pool import Pool
from . import census
from . import isolated_worker as inside
from .isolated_worker import Outcome
from .leaks import LeakCheck


class Limits(NamedTuple):
    """What an isolated body may take."""

    timeout: float
    max_memory: int | None = None


#: Frames that every test has, left out of the stacks of one that was ended.
_MACHINERY = ("/_pytest/", "/pluggy/", "/pytest/__main__.py", "<frozen runpy>")

_GRACE_S = 0.2  # from SIGTERM to SIGKILL, for a body that takes too much


#: The report of the worker, where the body did not simply pass.
REPORT = pytest.StashKey[pytest.TestReport]()

#: Those of its subtests.
SUBTESTS = pytest.StashKey[list[pytest.TestReport]]()


@contextmanager
def isolating(item: pytest.Item, limits: Limits, checks: list[LeakCheck]) -> Iterator[None]:
    """In this block, `item.runtest()` runs in a worker. What the worker has that this process has not is no leak for
    the copies of `checks` there."""
    original = item.runtest
    before = census.take() if checks else None

    def body() -> None:
        __tracebackhide__ = True
        if before is not None:
            for check in checks:
                check.let_be(before)
        original()

    item.runtest = lambda: _run(item, body, limits)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del item.runtest


def limits_of(item: pytest.Item, default_timeout: float) -> Limits | None:
    """The limits that the marker gives; those by default where the fixture is asked for; None for neither.

    Raises:
        UsageError: the marker has arguments of no use.
    """
    marker = item.get_closest_marker("run_isolated")
    if marker is None:
        return Limits(default_timeout) if "run_isolated" in getattr(item, "fixturenames", ()) else None
    unknown = set(marker.kwargs) - set(Limits._fields)
    if marker.args or unknown:
        wrong = ", ".join([*map(repr, marker.args), *sorted(unknown)])
        raise pytest.UsageError(
            f"{item.nodeid}: @pytest.mark.run_isolated takes timeout= (seconds) and max_memory= (bytes), not {wrong}"
        )
    return Limits(marker.kwargs.get("timeout", default_timeout), marker.kwargs.get("max_memory"))


def _run(item: pytest.Item, body: Callable[[], None], limits: Limits) -> None:
    """Run the body in a worker, and end as it did."""
    beside = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    failure = ""
    with inside.pending(item, body) as channel:
        try:
            outcome = _outcome(item.name, limits)
        except FdpoolError as error:
            failure = _in_words(error, beside)
        finally:
            channel.replay()
            item.stash[SUBTESTS] = [_report(item, data) for data in channel.notes("report")]
    if failure:
        pytest.fail(failure, pytrace=False)
    report = _report(item, outcome.report)
    item.user_properties[:] = [(name, value) for name, value in report.user_properties]
    if not report.passed or hasattr(report, "wasxfail"):
        item.stash[REPORT] = report
    if outcome.called is not None:
        name, arguments = outcome.called
        getattr(pytest, name)(*arguments)
    if outcome.error is not None:
        raise outcome.error


def _report(item: pytest.Item, data: dict[str, Any]) -> pytest.TestReport:
    report: pytest.TestReport = item.config.hook.pytest_report_from_serializable(
        config=item.config, data=data
    )
    return report


def _outcome(name: str, limits: Limits) -> Outcome:
    """What the worker says of the body.

    Raises:
        FdpoolError: it said nothing before it died, or was ended.
    """
    pool = Pool(1, start_method="fork")
    try:
        view = pool.with_options(
            timeout=limits.timeout, max_memory=limits.max_memory, name=name, grace=_GRACE_S
        )
        return view.submit(inside.run).result()
    finally:
        pool.kill_workers()
        pool.shutdown()


def _in_words(error: FdpoolError, beside: list[str]) -> str:
    lines = str(error).splitlines()
    text = "\n".join(line for line in lines if not any(part in line for part in _MACHINERY))
    text = f"the isolated test did not come to its end: {text}"
    if isinstance(error, TimeoutError) and beside:
        text += f"\n(threads beside it when it was forked, whose locks it may have waited for: {', '.join(beside)})"
    return text


def take_report(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what the worker reported in place of what was made here of the error that it raised."""
    if report.when != "call":
        return
    for each in item.stash.get(SUBTESTS, ()):  # here, as output is captured while the test is called
        item.ihook.pytest_runtest_logreport(report=each)
    item.stash[SUBTESTS] = []
    remote = item.stash.get(REPORT, None)
    if remote is None:
        return
    del item.stash[REPORT]
    report.outcome = remote.outcome
    report.longrepr = remote.longrepr
    if hasattr(remote, "wasxfail"):
        report.wasxfail = remote.wasxfail
    elif hasattr(report, "wasxfail"):
        del report.wasxfail
