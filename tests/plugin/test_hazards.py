"""What goes wrong with fixtures elsewhere: ports, ends, streams, and the plugins of others (F1, F3, F5, F6, F7)."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.plugin import many
from tests.plugin.conftest import Outcome, Run, command, environment, write_project
from tests.process_state import living, seconds_until_gone, wait_until


def test_servers_of_parallel_processes_never_meet(tmp_path: Path) -> None:
    """F1, in short; `python -m tests.plugin.many` has a thousand of them in eight processes."""
    Outcome(many.run(30, 2, tmp_path)).assert_counts(passed=30)


HANGING = """
    import os, signal, subprocess, sys, threading, time
    import pytest

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

    def beget(listening):
        print(subprocess.Popen(["setsid", "sleep", "60"]).pid, flush=True)
        time.sleep(60)

    def work():
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)

    @pytest.fixture(scope="session")
    def service(session_service): return session_service("idle", beget)

    @pytest.fixture
    def started(serve, worker_pool, shared_worker_pool, service):
        served = serve(beget)
        program = serve.command(["sh", "-c", "sleep 60 & echo $!; wait"])
        worker_pool.submit(work)
        shared_worker_pool.submit(os.getpid).result()
        while not (served.logs and program.logs and worker_pool.worker_pids()): time.sleep(0.01)
        pids = [os.getpid(), served.pid, program.pid, service.pid, int(served.logs), int(program.logs)]
        with open("pids.new", "w") as file:
            print(*pids, *worker_pool.worker_pids(), *shared_worker_pool.worker_pids(), file=file)
        os.rename("pids.new", "pids")

    def test_hanging(started):
        {how}

    @pytest.mark.run_isolated
    def test_isolated(): pass
"""
WAITING = "while True: time.sleep(1)"
#: What pytest-timeout does where it cannot use a signal: a thread of it writes the stacks, and calls os._exit.
_TIMEOUT = ("--timeout=0.05", "--timeout-method=thread", "-o", "timeout_func_only=true")


def _leave(process: subprocess.Popen[str]) -> None: ...


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()


def _terminate(process: subprocess.Popen[str]) -> None:
    process.terminate()


def _interrupt_twice(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)  # the second comes in the middle of what the first has begun
    process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("how", "end", "plugin", "arguments"),
    [
        ("assert 0", _leave, None, ()),
        (WAITING, _kill, None, ()),
        (WAITING, _kill, "xdist", ("-n1",)),
        (WAITING, _terminate, None, ()),
        (WAITING, _interrupt_twice, None, ()),
        (WAITING, _leave, "timeout", _TIMEOUT),
    ],
    ids=["failure", "SIGKILL", "SIGKILL, xdist", "SIGTERM", "Ctrl-C twice", "pytest-timeout's thread"],
)
def test_nothing_is_left_a_second_after_pytest_has_ended(  # type: ignore[no-untyped-def]
    how: str, end, plugin: str | None, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """F3: in whatever way it ends."""
    write_project(tmp_path, HANGING.replace("{how}", how))
    pids = tmp_path / "pids"
    with (
        open(tmp_path / "said", "w+") as said,
        subprocess.Popen(
            command("-q", *arguments, plugins=[plugin] if plugin else []),
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            text=True,
        ) as process,
    ):
        wait_until(lambda: pids.exists() or process.poll() is not None, 60)
        assert pids.exists()
        started = living(map(int, pids.read_text().split()))
        end(process)
        try:
            process.wait(30)
        finally:
            process.kill()
        # On a busy machine; what is left would be there for a minute.
        assert seconds_until_gone(started) < 4.0
        assert process.returncode != 0
        said.seek(0)
        assert (" Timeout " in said.read()) == (plugin == "timeout")


EVERYTHING = """
    import asyncio, os, pytest
    def shout(listening):
        while True:
            with listening.accept()[0] as connection: connection.sendall(connection.recv(10).upper())
    def test_server(serve):
        with serve(shout).listener.connect() as client:
            client.sendall(b"x")
            assert client.recv(10) == b"X"
    def test_pools(worker_pool, shared_worker_pool):
        assert worker_pool.submit(pow, 2, 3).result() == shared_worker_pool.submit(pow, 2, 3).result()
    @pytest.mark.run_isolated
    def test_isolated(): print("isolated")
    @pytest.mark.xfail
    @pytest.mark.run_isolated
    def test_expected(serve): os._exit(3)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["-s", "-p", "no:logging", "-p", "no:faulthandler", "-p", "no:cacheprovider"],
        [
            "--capture=tee-sys",
            "-p",
            "no:warnings",
            "-p",
            "no:unraisableexception",
            "-p",
            "no:threadexception",
        ],
        ["--capture=fd", "-p", "no:junitxml", "-W", "error", "-v"],
    ],
    ids=["no capture", "tee", "few plugins"],
)
def test_it_works_with_every_capture_and_without_pytests_own_plugins(
    run_pytest: Run, arguments: list[str]
) -> None:
    """F5."""
    run_pytest(EVERYTHING, "--fdpool-leaks=fail", *arguments).assert_counts(passed=3, xfailed=1)


def test_it_works_without_standard_input_and_without_a_terminal(tmp_path: Path) -> None:
    """F5: descriptor 0 is closed, so the first that is opened would have its number."""
    write_project(tmp_path, EVERYTHING)
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command("-q", "--capture=tee-sys", "--fdpool-leaks=fail")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    Outcome(done).assert_counts(passed=3, xfailed=1)


def test_it_can_be_left_out_and_is_never_loaded_twice(run_pytest: Run) -> None:
    twice = run_pytest("def test_it(listener): pass", conftest='pytest_plugins = ["fdpool.pytest_plugin"]')
    twice.assert_counts(passed=1)
    entered = run_pytest(
        "def test_it(listener): pass",
        conftest="""
        from fdpool.pytest_plugin import entry_point  # as pytest does with the entry point of what is installed
        def pytest_addoption(pluginmanager): entry_point.pytest_addoption(pluginmanager)
        """,
    )
    entered.assert_counts(passed=1)


# -- plugins of others ------------------------------------------------------------------------------------


def test_isolated_coroutines_run_by_asyncio_and_anyio(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import asyncio, os, pytest
        here = os.getpid()
        async def echo(listening):
            async def answer(reader, writer):
                writer.write(await reader.read(10))
                writer.close()
            await (await asyncio.start_server(answer, sock=listening)).serve_forever()
        @pytest.mark.run_isolated
        @pytest.mark.asyncio
        async def test_by_asyncio(): assert os.getpid() != here
        @pytest.mark.run_isolated
        @pytest.mark.anyio
        async def test_by_anyio(anyio_backend_name): assert os.getpid() != here
        @pytest.mark.asyncio
        async def test_client(serve, leak_check):
            server = serve(echo)
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(b"x")
            assert await reader.read(10) == b"x"
            writer.close()
            await writer.wait_closed()
        @pytest.mark.run_isolated
        @pytest.mark.asyncio
        async def test_failing(): assert 0
        """,
        ini="asyncio_default_fixture_loop_scope = function\n",
        conftest='import pytest\n@pytest.fixture\ndef anyio_backend(): return "asyncio"\n',
        plugins=["asyncio", "anyio"],
    )
    outcome.assert_counts(passed=3, failed=1)


@pytest.mark.parametrize(("processes", "source", "folder"), [(1, "measured", "."), (0, ".", "elsewhere")])
def test_coverage_of_workers_servers_and_isolated_tests_is_kept(
    run_pytest: Run, tmp_path: Path, processes: int, source: str, folder: str
) -> None:
    """F7. Also if the tests have changed their directory, and what is measured is told by a relative path."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "measured.py").write_text(
        "def by_test():\n    return 1\ndef by_isolated():\n    return 2\n"
        "def by_server():\n    return 3\ndef by_worker():\n    return 4\ndef by_shared_worker():\n    return 5\n"
        "def by_nobody():\n    return 6\n"
    )
    outcome = run_pytest(
        """
        import measured, os, pytest
        @pytest.fixture(autouse=True)
        def moved(monkeypatch): monkeypatch.chdir(os.environ["TESTS_GO_TO"])
        def test_here(): measured.by_test()
        @pytest.mark.run_isolated
        def test_isolated(): measured.by_isolated()
        def serving(listening, ready):
            measured.by_server()
            ready()
            listening.accept()
        def test_server(serve): serve(serving)
        def test_worker(worker_pool): worker_pool.submit(measured.by_worker).result()
        def test_shared_worker(shared_worker_pool):
            shared_worker_pool.submit(measured.by_shared_worker).result()
        """,
        *(f"-n{processes}", f"--cov={source}", "--cov-report=term-missing"),
        plugins=["pytest_cov", "xdist"],
        env={"PYTHONPATH": f"{many.__file__.rpartition('/tests/')[0]}:{tmp_path}", "TESTS_GO_TO": folder},
    )
    outcome.assert_counts(passed=5)
    outcome.assert_says("measured.py", "92%   12")


def test_reruns_and_shuffled_tests_get_fresh_fixtures(run_pytest: Run) -> None:
    """F6: a rerun sets everything up again."""
    outcome = run_pytest(
        """
        import os, pytest
        runs = []
        @pytest.mark.flaky(reruns=2)
        @pytest.mark.parametrize("number", range(4))
        def test_flaky(number, serve, worker_pool, leak_check):
            runs.append(number)
            worker_pool.submit(os.getpid).result()
            assert runs.count(number) == 2
        @pytest.mark.flaky(reruns=1)
        @pytest.mark.run_isolated
        def test_crashing(): os._exit(1)
        """,
        plugins=["randomly", "rerunfailures"],
    )
    outcome.assert_counts(passed=4, failed=1, rerun=5)


def test_an_isolated_test_runs_again_by_the_error_that_it_has_raised(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import pytest
        @pytest.mark.run_isolated
        def test_flaky(): raise ConnectionError("the network")
        @pytest.mark.run_isolated
        def test_wrong(): raise ValueError("the code")
        """,
        *("--reruns=1", "--only-rerun=ConnectionError"),
        plugins=["rerunfailures"],
    )
    outcome.assert_counts(failed=2, rerun=1)


def test_it_works_with_all_that_is_installed_at_once_and_warnings_as_errors(run_pytest: Run) -> None:
    """Each by its entry point, as pytest does where nobody says otherwise; fdpool as well, where it is installed."""
    outcome = run_pytest(
        EVERYTHING,
        *("--fdpool-leaks=fail", "-W", "error", "-n1", "--timeout=60", "--reruns=1", "--cov=test_it"),
        ini="asyncio_default_fixture_loop_scope = function\n",
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""},
    )
    outcome.assert_counts(passed=3, xfailed=1)
    outcome.assert_says("asyncio", "rerunfailures", "xdist", "cov", "test_it.py")
