"""What every test gets: fdpool's own pytest plugin, which fails it if it leaves something behind."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdpool import Pool
from fdpool._cpus import usable_cpus
from tests.process_state import children, open_descriptors, seconds_until_gone, wait_until

__all__ = ["children", "open_descriptors", "seconds_until_gone", "wait_until"]


# Collecting, where a test seems to leave something, costs 35 ms with what pytest has loaded, and next to nothing
# without.
gc.collect()
gc.freeze()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugin of this clone, unless fdpool is installed and pytest has done so."""
    parser.addoption(
        "--fresh-supervisors",
        action="store_true",
        help="keep no pool open whose supervisor is forked for those of the tests' pools and servers",
    )
    if not pluginmanager.has_plugin("fdpool.pytest_plugin"):
        from fdpool import pytest_plugin

        pluginmanager.register(pytest_plugin, "fdpool.pytest_plugin")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Three times as many processes as processors, with `-n auto`: half of its time a test waits for something."""
    return 3 * usable_cpus()


@pytest.fixture(scope="session", autouse=True)
def lender(request: pytest.FixtureRequest) -> Iterator[Pool | None]:
    """A pool that is kept open: its supervisor is forked for those of other pools and of servers, as `fdpool._lending`
    does for any second pool. A fork takes 7 ms of CPU where a start takes 77: of a quarter of all time that the tests
    of pools and servers took. Programs that tests run have fresh ones, and so have tests with `fresh_supervisors`."""
    if request.config.getoption("--fresh-supervisors"):
        yield None
        return
    with Pool(1) as pool:
        pool.submit(int).result()
        yield pool


@pytest.fixture
def fresh_supervisors(lender: Pool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor of the test's first pool is a fresh interpreter, and a child of this process."""
    if lender is not None:
        monkeypatch.setattr(lender._client.supervision, "may_lend", lambda likeness: False)


@pytest.fixture
def as_other_uid() -> int:
    """The uid of nobody, for tests that need another user; skips where the process may not change to it."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    return 65534


@pytest.fixture
def heeding_the_terminal() -> Iterator[None]:
    """What is started meanwhile heeds a terminal's signals, also where this run of the tests does not: what a shell
    without job control starts in the background ignores SIGINT and SIGQUIT (POSIX, Shell 2.11), under nohup SIGHUP, and
    so does all that descends from it."""
    heeded = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in heeded.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def raising_log(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever is logged meets a handler that raises, as one of an application's own may; somewhere that is printed."""

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise BrokenPipeError(f"nobody reads {record.getMessage()!r}")

    handler = Raising()
    loggers = [logging.getLogger(name) for name in ("fdpool", "concurrent.futures")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert "BrokenPipeError: nobody reads" in capsys.readouterr().err


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A file of ten numbered lines."""
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    return path
