"""The pytest plugin: fixtures for workers, listeners and servers, and a check that tests leave nothing behind.

Only what every run needs is here and imported here; the parts are in `_fixtures`, and are imported by the fixtures
that use them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ._fixtures.errors import ServerDied as ServerDied
    from ._fixtures.leaks import LeakCheck as LeakCheck
    from ._fixtures.listener import Listener as Listener
    from ._fixtures.listener import ListenerFactory as ListenerFactory
    from ._fixtures.pools import PoolFactory as PoolFactory
    from ._fixtures.pools import SharedPool
    from ._fixtures.serve import Serve as Serve
    from ._fixtures.served import Served as Served
    from ._fixtures.service import Service as Service
    from ._fixtures.service import Services as Services
    from .pool import Pool

_HOME_OF = {
    "LeakCheck": "leaks",
    "Listener": "listener",
    "ListenerFactory": "listener",
    "PoolFactory": "pools",
    "Serve": "serve",
    "Served": "served",
    "ServerDied": "errors",
    "Service": "service",
    "Services": "service",
}


if not TYPE_CHECKING:  # a type checker would take it that there is every name

    def __getattr__(name: str) -> Any:
        """What tests annotate fixtures with, and catch; imported when first used."""
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(f"._fixtures.{home}", __package__), name)


_MODE = pytest.StashKey[str]()
_CHECKS = pytest.StashKey["list[LeakCheck]"]()  # those that are under way
_RAISED = pytest.StashKey[bool]()  # by a phase of the test, and not to skip it
_SERVE = pytest.StashKey["Serve"]()
_TOLD = pytest.StashKey[bool]()  # the test has failed, and it was said that its server has died

_CONTROLLER = "fdpool_controller"  # process id of that of pytest-xdist

_NAME = "fdpool.pytest_plugin"
_MARK = "FDPOOL_TESTS"  # as `_fixtures.census` knows it
_MODES = ("off", "warn", "fail")


class LeakWarning(pytest.PytestWarning):
    """A test has left something behind."""


class _EntryPoint:
    """What pytest loads where fdpool is installed. Registers this module under the name that `-p` and
    `pytest_plugins` would give it, so that it is never loaded twice."""

    @staticmethod
    def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
        if not pluginmanager.has_plugin(_NAME):
            pluginmanager.register(sys.modules[__name__], _NAME)


entry_point = _EntryPoint()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fdpool")
    group.addoption(
        "--fdpool-leaks",
        choices=_MODES,
        default=None,
        help="what to do if a test leaves descriptors, processes, threads or shared memory behind "
        "(default: the ini option fdpool_leaks, or off)",
    )
    group.addoption(
        "--fdpool-trace",
        action="store_true",
        help="note where descriptors are opened, and tell it of those that are left behind; slows tests down",
    )
    parser.addini("fdpool_leaks", "what --fdpool-leaks is if it is not given", default="off")
    parser.addini(
        "fdpool_leaks_ignore",
        "patterns of what may be left behind, one a line, such as: thread 'metrics'*",
        type="linelist",
    )
    parser.addini(
        "fdpool_leaks_patience",
        "seconds for what is about to go, such as a thread that has been told to end (2)",
        default="2",
    )
    parser.addini(
        "fdpool_preload",
        "modules to import once before the workers of servers are forked, such as: uvicorn myproject.app",
        type="args",
    )
    parser.addini(
        "fdpool_isolated_timeout",
        "seconds that an isolated test may take if its marker does not say it (60)",
        default="60",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leaks(*patterns): this test leaves things behind on purpose; all, or what fits a pattern"
    )
    config.addinivalue_line(
        "markers",
        "run_isolated(timeout=, max_memory=): run the body of this test in a worker forked from the test process",
    )
    config.stash[_MODE] = _mode(config)
    config.stash[_CHECKS] = []
    _mark_processes(config)
    _end_with_controller(getattr(config, "workerinput", {}))
    _seconds(config, "fdpool_leaks_patience")
    if "coverage" in sys.modules:
        from ._fixtures import coverage

        coverage.begin_in(os.fspath(config.invocation_params.dir))
    if config.getoption("importmode") == "importlib":
        from ._fixtures import importing

        importing.begin()
    if config.getoption("--fdpool-trace"):
        from ._fixtures import trace

        trace.start()
        config.add_cleanup(trace.stop)


def _mode(config: pytest.Config) -> str:
    mode = config.getoption("--fdpool-leaks") or config.getini("fdpool_leaks")
    if mode not in _MODES:
        raise pytest.UsageError(f"fdpool_leaks must be one of {', '.join(_MODES)}, not {mode!r}")
    return str(mode)


def _mark_processes(config: pytest.Config) -> None:
    """Have all that descends from here carry a mark in its environment; a run inside a run has one of its own."""
    before = os.environ.get(_MARK)

    def restore() -> None:
        os.environ.pop(_MARK, None)
        if before is not None:
            os.environ[_MARK] = before

    os.environ[_MARK] = f"{os.getpid()}.{time.time_ns()}"
    config.add_cleanup(restore)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Runs in: the controller of pytest-xdist. Tell a worker who that is."""
    node.workerinput[_CONTROLLER] = os.getpid()


def _end_with_controller(workerinput: dict[str, Any]) -> None:
    """Runs in: a worker of pytest-xdist. Have the kernel end it, and so all that it has, when the controller is killed.
    Otherwise it goes on with its test, and with those that it has been given."""
    if workerinput.get(_CONTROLLER) == os.getppid():  # it may be on another machine
        from . import _platform

        # The controller starts workers in the thread that waits for them.
        _platform.signal_when_parent_dies(signal.SIGKILL)
        if os.getppid() != workerinput[_CONTROLLER]:
            os.kill(os.getpid(), signal.SIGKILL)


def _seconds(config: pytest.Config, name: str) -> float:
    text = config.getini(name)
    try:
        return float(text)
    except ValueError:
        raise pytest.UsageError(f"{name} must be a number of seconds, not {text!r}") from None


# -- leaks ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fdpool_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check the test, if it is to be checked. A fixture: what lives longer than a test is set up before those of the
    test, and what ends with it is torn down before the first of them."""
    mode = request.config.stash[_MODE]
    if "leak_check" in request.fixturenames:
        request.getfixturevalue("leak_check")
        mode = "off"
    yield from _checked(request, mode) if mode != "off" else (None,)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Iterator[None]:
    """Have the check be the first fixture of its test, also where a conftest or another plugin has such for all; and
    let be what is set up later and is to last longer, by `request.getfixturevalue` say."""
    __tracebackhide__ = True
    if fixturedef.scope == "function":
        if fixturedef.argname not in ("_fdpool_leaks", "leak_check"):
            request.getfixturevalue("_fdpool_leaks")
        return (yield)
    with _lasting(request.config):
        return (yield)


@contextmanager
def _lasting(config: pytest.Config) -> Iterator[None]:
    """What comes in this block outlives the test that is under way, and is no leak of it."""
    checks = config.stash[_CHECKS]
    if not checks:
        yield
        return
    from ._fixtures import census

    before = census.take()
    try:
        yield
    finally:
        for check in checks:
            check.let_be(before)


@pytest.fixture
def leak_check(request: pytest.FixtureRequest) -> Iterator[LeakCheck]:
    """Fail this test if it leaves descriptors, processes, threads or shared memory behind; names them.

    `allow(pattern)` lets something be, `assert_clean()` checks in the midst of the test.
    """
    yield from _checked(request, "fail")


def _checked(request: pytest.FixtureRequest, mode: str) -> Iterator[Any]:
    from ._fixtures import leaks

    ignored = list(request.config.getini("fdpool_leaks_ignore"))
    request.node.stash[_RAISED] = False  # a test may run again
    check = leaks.LeakCheck(request.node.nodeid, ignored)
    request.config.stash[_CHECKS].append(check)
    yield check
    request.config.stash[_CHECKS].remove(check)
    if request.node.stash[_RAISED]:
        return  # the traceback holds the frames, and these what they had open
    marker = request.node.get_closest_marker("leaks")
    if marker is not None and not marker.args:
        return
    for pattern in marker.args if marker is not None else ():
        check.allow(pattern)
    found = check.settled(_seconds(request.config, "fdpool_leaks_patience"))
    if found:
        text = leaks.report(found)
        if mode == "fail":
            pytest.fail(text, pytrace=False)
        request.node.warn(LeakWarning(text))


# -- listeners -----------------------------------------------------------------------------------------


@pytest.fixture
def listener_factory() -> Iterator[ListenerFactory]:
    """Makes listening sockets that are closed at the end of the test: `listener_factory("unix")`."""
    from ._fixtures.listener import ListenerFactory

    factory = ListenerFactory()
    yield factory
    factory.close()


@pytest.fixture
def listener(request: pytest.FixtureRequest, listener_factory: ListenerFactory) -> Listener:
    """A listening socket on a free port of 127.0.0.1; with an indirect parameter of another kind, such as "unix"."""
    return listener_factory(getattr(request, "param", "tcp"))


# -- pools ---------------------------------------------------------------------------------------------


@pytest.fixture
def worker_pool_factory() -> Iterator[PoolFactory]:
    """Makes pools, with the arguments of `fdpool.Pool`, that end with the test."""
    from ._fixtures.pools import PoolFactory

    factory = PoolFactory()
    yield factory
    factory.close()


@pytest.fixture
def worker_pool(worker_pool_factory: PoolFactory) -> Pool:
    """A fresh `fdpool.Pool` that ends with the test."""
    return worker_pool_factory()


@pytest.fixture(scope="session")
def _fdpool_shared_pool() -> Iterator[SharedPool]:
    from ._fixtures.pools import SharedPool, new_pool

    shared = SharedPool(new_pool)
    shared.begin()  # now, so that no test's leak check sees it come
    yield shared
    shared.close()


@pytest.fixture
def shared_worker_pool(_fdpool_shared_pool: SharedPool, request: pytest.FixtureRequest) -> Iterator[Pool]:
    """One `fdpool.Pool` for all tests of this process; workers that a test leaves changed are replaced, and named."""
    with _lasting(request.config):  # another pool, if the last test has misused that of all
        pool = _fdpool_shared_pool.begin()
    yield pool
    found = _fdpool_shared_pool.audit()
    if found:
        text = "the test left shared_worker_pool otherwise than it was:\n  " + "\n  ".join(found)
        if request.config.stash[_MODE] == "fail":
            pytest.fail(text, pytrace=False)
        request.node.warn(LeakWarning(text))


# -- servers -------------------------------------------------------------------------------------------

#: Servers at a time in one process of tests. Nothing is made for those that there are not.
_MOST_SERVERS = 256

# Each server has a fresh worker, which would import these for itself: 20 ms, where the rest of its start takes 5.
_PRELOADED = (
    "cloudpickle",
    "json",
    "fdpool.commands",
    "fdpool._fixtures.serve_worker",
    "fdpool._fixtures.apps",
)


@pytest.fixture(scope="session")
def _fdpool_servers(request: pytest.FixtureRequest) -> Iterator[Pool]:
    from ._fixtures import importing
    from ._fixtures.pools import end
    from .pool import Pool

    preload = [*_PRELOADED, *request.config.getini("fdpool_preload")]
    # One worker more than most tests need: it is forked while the test before goes on.
    options = importing.with_pool_options({"max_tasks_per_child": 1, "min_workers": 2, "preload": preload})
    pool = Pool(_MOST_SERVERS, **options)
    pool.submit(int).result()  # so that the first server does not wait for the supervisor
    yield pool
    end(pool)


@pytest.fixture
def serve(_fdpool_servers: Pool, request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Starts servers on listeners that are bound already, each in a worker of its own: `serve(function)`,
    `serve.command([program, ...])`. A server that dies by itself fails the test."""
    from ._fixtures.serve import Serve

    servers = Serve(_fdpool_servers)
    request.node.stash[_SERVE] = servers
    request.node.stash[_TOLD] = False  # a test may run again
    yield servers
    texts = [] if request.node.stash[_TOLD] else [_death(died) for died in servers.died()]
    servers.close()
    if texts:
        pytest.fail("\n".join(texts), pytrace=False)


@pytest.fixture(scope="session")
def session_service(request: pytest.FixtureRequest) -> Iterator[Services]:
    """One server for all processes of the test run, under pytest-xdist, too: `session_service(name, function)`. Whoever
    asks first starts it; it ends with the last that holds it."""
    from ._fixtures.service import Services

    # The variable PYTEST_XDIST_TESTRUNUID is inherited by a run that a test starts.
    run = getattr(request.config, "workerinput", {}).get("testrunuid") or str(os.getpid())
    services = Services(run)
    yield services
    services.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run the body where it is to run. If a server has died, that is why the test has failed."""
    __tracebackhide__ = True
    try:
        if "run_isolated" in item.keywords or "run_isolated" in getattr(item, "fixturenames", ()):
            with _isolating(item):
                return (yield)
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        servers = item.stash.get(_SERVE, None)
        died = servers.died(_patience_s(error)) if servers is not None else []
        if died:
            from ._fixtures.errors import ServerDied

            item.stash[_TOLD] = True
            if not isinstance(error, ServerDied):
                raise ServerDied(died[0].end_in_words(), died[0].logs) from error
        raise


def _patience_s(error: BaseException) -> float:
    """How long to wait for the word that a server has died; a client that it leaves sees that earlier than we."""
    from ._placement import chain

    return 2.0 if any(isinstance(each, (ConnectionError, EOFError)) for each in chain(error)) else 0.1


def _death(served: Any) -> str:
    from ._fixtures.errors import ServerDied

    return str(ServerDied(served.end_in_words(), served.logs))


# -- isolated tests ------------------------------------------------------------------------------------


@pytest.fixture
def run_isolated() -> None:
    """Run the body of this test in a worker forked from the test process, as `@pytest.mark.run_isolated` does."""


@contextmanager
def _isolating(item: pytest.Item) -> Iterator[None]:
    from ._fixtures import isolated

    limits = isolated.limits_of(item, _seconds(item.config, "fdpool_isolated_timeout"))
    debugs = item.config.getoption("usepdb", False) or item.config.getoption("trace", False)
    if limits is None or debugs:  # a worker has no terminal for a debugger
        yield
        return
    with isolated.isolating(item, limits, item.config.stash[_CHECKS]):
        yield


# -- reports -------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Before other plugins see the report: take that of the worker for what was made of it here, and show what servers
    wrote if the test has failed, in whatever way."""
    report = yield
    isolated = sys.modules.get(f"{__package__}._fixtures.isolated")
    if isolated is not None:
        isolated.take_report(item, report)
    if call.excinfo is not None and not report.skipped:
        item.stash[_RAISED] = True
        servers = item.stash.get(_SERVE, None)
        if servers is not None and call.when == "call":
            report.sections += [("Captured output call", f"{what}:\n{logs}") for what, logs in servers.logs()]
    return report
