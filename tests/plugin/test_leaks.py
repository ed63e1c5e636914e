"""The leak check: what it finds, how it names it, and what it lets be (F4)."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import cloudpickle
import pytest

import fdpool
from fdpool._fixtures import census, trace
from fdpool._fixtures.leaks import LeakCheck, report
from tests.plugin.conftest import Run
from tests.process_state import wait_until

LEAKY = """
    import os, socket, subprocess, threading, time
    from multiprocessing import shared_memory
    import fdpool
    kept = []

    def test_file(): kept.append(os.open(os.__file__, os.O_RDONLY))
    def test_socket(): kept.append(socket.create_server(("127.0.0.1", 0)))
    def test_memory_file(): kept.append(os.memfd_create("mine"))
    def test_process(): kept.append(subprocess.Popen(["sleep", "30"], start_new_session=True))
    def test_zombie():
        kept.append(subprocess.Popen(["true"]))
        os.waitid(os.P_PID, kept[-1].pid, os.WEXITED | os.WNOWAIT)
    def test_daemon():
        subprocess.run("setsid sleep 30 & echo $! > daemon", shell=True)
        with open("daemon") as file: name = f"/proc/{file.read().strip()}/comm"
        while True:  # until it is no copy of the shell any more
            with open(name) as file:
                if file.read().strip() == "sleep": break
            time.sleep(0.001)
    def test_thread():
        kept.append(threading.Event())
        threading.Thread(target=kept[-1].wait, name="spinner", daemon=True).start()
    def test_shared_memory():
        kept.append(shared_memory.SharedMemory(create=True, size=10))
        kept[-1].close()
    def test_pool():
        kept.append(fdpool.Pool(1))
        kept[-1].submit(pow, 2, 3).result()
        assert kept[-1].worker_pids()  # which are told later than the result, perhaps
    def test_nothing(tmp_path):
        with open(tmp_path / "file", "w") as file, fdpool.Pool(1) as pool:
            assert pool.submit(file.write, "x").result() == 1
"""

#: What is left is left: the tests of the plugin do not wait for it.
HASTY = "fdpool_leaks_patience = 0.05\n"

CLEAN_UP = """
    import os, signal
    def pytest_sessionfinish():
        import test_it
        test_it.kept[3].kill(); test_it.kept[3].wait(); test_it.kept[4].wait(); test_it.kept[5].set()
        test_it.kept[6].unlink(); test_it.kept[7].shutdown()
        os.kill(int(open("daemon").read()), signal.SIGKILL)
"""


def test_each_kind_of_leak_fails_the_test_that_left_it_and_is_named(run_pytest: Run) -> None:
    """F4, all kinds in one run: it costs as much as one."""
    outcome = run_pytest(LEAKY, "--fdpool-leaks=fail", "--fdpool-trace", conftest=CLEAN_UP, ini=HASTY)
    outcome.assert_counts(passed=10, error=9)
    outcome.assert_says(
        "ERROR at teardown of test_file",
        "the test has left behind:",
        "  descriptor ",
        f"{os.__file__}\n      opened at test_it.py:7 in test_file",
        "ERROR at teardown of test_socket",
        "AF_INET SOCK_STREAM at ('127.0.0.1', ",
        "in test_socket",
        "ERROR at teardown of test_memory_file",
        "/memfd:mine (deleted)\n      opened at test_it.py:9 in test_memory_file",
        "ERROR at teardown of test_process",
        ": sleep 30\n",
        "ERROR at teardown of test_zombie",
        ": true, dead and not waited for",
        "ERROR at teardown of test_daemon",
        "sleep 30 (it has left this process's tree)",
        "ERROR at teardown of test_thread",
        "thread 'spinner', which runs Event.wait (a daemon)",
        "ERROR at teardown of test_shared_memory",
        "shared memory /dev/shm/psm_",
        "ERROR at teardown of test_pool",
        "pool of fdpool with the workers ",
        "shut it down, or use it in a `with` block",
    )
    assert "test_nothing" not in outcome.text


def test_a_place_is_not_told_of_what_has_its_number_by_now(tmp_path: Path) -> None:
    """What C code opens is not seen: the place would be that of something closed long ago."""
    trace.start()
    try:
        with open(os.devnull) as file:
            number = file.fileno()
            assert trace.opened_at(number)[0].endswith(f" in {sys._getframe().f_code.co_name}")
        assert trace.opened_at(number) == []
        with contextlib.closing(sqlite3.connect(tmp_path / "database")) as database:
            database.execute("create table opened (it)")
            assert census.descriptors()[number] == str(tmp_path / "database")
            assert trace.opened_at(number) == []
    finally:
        trace.stop()
    assert not trace.is_on()


def test_what_is_traced_can_be_used_as_ever(tmp_path: Path) -> None:
    originals = os.open, os.pipe, open
    trace.start()
    try:

        class Files:
            opener = os.open
            text = open

        assert io.open is open is not originals[2]
        for traced in (os.open, os.pipe, open):
            assert pickle.loads(pickle.dumps(traced)) is traced
            assert pickle.loads(cloudpickle.dumps(traced)) is traced
        for files in (Files, Files()):
            os.close(files.opener(os.devnull, os.O_RDONLY))  # type: ignore[operator]
            with files.text(os.devnull) as file:  # type: ignore[operator]
                assert trace.opened_at(file.fileno())
        with fdpool.Pool(1) as pool, pool.submit(open, os.devnull).result() as file:
            assert file.read() == ""
    finally:
        trace.stop()
    assert (os.open, os.pipe, open) == originals
    assert io.open is open


SMALL = """
    import os, pytest
    kept = []
    def test_leak(): kept.append(os.pipe())
"""


def test_warn_only_warns_and_off_says_nothing(run_pytest: Run) -> None:
    warned = run_pytest(SMALL, ini=HASTY + "fdpool_leaks = warn")
    warned.assert_counts(passed=1)
    warned.assert_says("LeakWarning: the test has left behind:", "descriptor", "(--fdpool-trace tells where")
    off = run_pytest(SMALL, "--fdpool-leaks=off", ini="fdpool_leaks = fail")
    off.assert_counts(passed=1)
    assert "left behind" not in off.text


@pytest.mark.parametrize(
    ("ini", "text"),
    [
        ("fdpool_leaks = yes", "fdpool_leaks must be one of off, warn, fail, not 'yes'"),
        (
            "fdpool_leaks = fail\nfdpool_leaks_patience = long",
            "fdpool_leaks_patience must be a number of seconds, not 'long'",
        ),
    ],
)
def test_an_option_that_makes_no_sense_is_a_usage_error(run_pytest: Run, ini: str, text: str) -> None:
    outcome = run_pytest(SMALL, ini=ini)
    assert outcome.status == 4
    outcome.assert_says(text)


def test_patterns_and_markers_let_things_be_and_the_fixture_is_strict_without_the_option(
    run_pytest: Run,
) -> None:
    outcome = run_pytest(
        """
        import os, pytest, threading
        kept = []
        @pytest.mark.leaks
        def test_marked(leak_check): kept.append(os.open(os.__file__, os.O_RDONLY))
        @pytest.mark.leaks("descriptor *os.py")
        def test_marked_by_pattern(leak_check): kept.append(os.open(os.__file__, os.O_RDONLY))
        @pytest.mark.leaks("thread *")
        def test_other_pattern(leak_check): kept.append(os.open(os.__file__, os.O_RDONLY))
        def test_allowed(leak_check):
            leak_check.allow("descriptor *os.py")
            kept.append(os.open(os.__file__, os.O_RDONLY))
        def test_ignored_by_ini(leak_check): kept.append(os.open("/etc/passwd", os.O_RDONLY))
        def test_misused(leak_check): leak_check.allow(12)
        def test_after_others(serve, listener_factory, leak_check): serve(len, kind="unix").wait(); listener_factory()
        def test_unchecked(): kept.append(os.open(os.__file__, os.O_RDONLY))
        """,
        ini=HASTY + "fdpool_leaks_ignore = descriptor */passwd",
    )
    outcome.assert_counts(passed=7, failed=1, error=1)
    outcome.assert_says("ERROR at teardown of test_other_pattern")
    outcome.assert_says("""leak_check.allow() takes a pattern such as "thread 'name'*", not 12""")


def test_the_check_comes_after_other_fixtures_and_not_after_a_failure(run_pytest: Run) -> None:
    """F6: errors in set-up and teardown, skips and expected failures are what they were."""
    outcome = run_pytest(
        """
        import os, pytest
        @pytest.fixture(scope="module")
        def lasting():
            fds = os.pipe()
            yield fds
            for fd in fds: os.close(fd)
        @pytest.fixture
        def passing():
            fds = os.pipe()
            yield fds
            for fd in fds: os.close(fd)
        @pytest.fixture
        def broken(passing): raise RuntimeError("broken")
        @pytest.fixture
        def breaks_later(passing):
            yield
            raise RuntimeError("later")
        def test_lasting(lasting, passing): pass
        def test_broken(broken): pass
        def test_breaks_later(breaks_later): pass
        def test_failing(): pipe = os.pipe(); assert pipe is None
        def test_skipped(passing): pytest.skip("no")
        @pytest.mark.xfail
        def test_expected(passing): assert 0
        """,
        "--fdpool-leaks=fail",
    )
    outcome.assert_counts(passed=2, failed=1, error=2, skipped=1, xfailed=1)
    assert "left behind" not in outcome.text


def test_what_other_plugins_set_up_for_every_test_is_torn_down_before_the_check(
    run_pytest: Run, tmp_path: Path
) -> None:
    """Their fixtures may come first; and those of a conftest that names the plugin always do."""
    (tmp_path / "early.py").write_text(
        "import pytest\n"
        "@pytest.fixture(autouse=True, scope='session')\n"
        "def lasting():\n    with open(__file__) as file: yield file\n"
        "@pytest.fixture(autouse=True)\n"
        "def server(serve):\n"
        "    return lambda: serve(lambda listening: listening.accept())\n"
    )
    outcome = run_pytest(
        """
        def test_it(server): server()
        def test_strict(server, leak_check): server()
        """,
        "--fdpool-leaks=fail",
        plugins=["early"],
    )
    outcome.assert_counts(passed=2)


def test_what_is_set_up_late_and_lasts_longer_is_no_leak_of_the_test(run_pytest: Run) -> None:
    """Its own things are, also those from before."""
    outcome = run_pytest(
        """
        import os, socket, pytest
        kept = []
        @pytest.fixture(scope="module")
        def lasting():
            with socket.create_server(("127.0.0.1", 0)) as server: yield server
        def test_dynamic(request): request.getfixturevalue("lasting")
        def test_servers(request): request.getfixturevalue("serve")
        def test_pool(request): request.getfixturevalue("shared_worker_pool").submit(int).result()
        @pytest.fixture(scope="class")
        def of_class():
            with open(os.__file__) as file: yield file
        class TestIt:
            def test_strict(self, leak_check, request): request.getfixturevalue("of_class")
        @pytest.fixture(scope="package")
        def of_package():
            with open(os.__file__) as file: yield file
        def test_its_own(request):
            kept.append(os.open("/etc/passwd", os.O_RDONLY))
            request.getfixturevalue("of_package")
        """,
        "--fdpool-leaks=fail",
        ini=HASTY,
    )
    outcome.assert_counts(passed=5, error=1)
    outcome.assert_says("ERROR at teardown of test_its_own", "/etc/passwd")
    assert os.__file__ not in outcome.text


def test_a_loop_of_the_session_is_no_leak_of_the_first_test_in_it(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        async def test_first(): pass
        async def test_second(): pass
        """,
        "--fdpool-leaks=fail",
        ini=HASTY
        + "asyncio_mode = auto\n"
        + "asyncio_default_fixture_loop_scope = session\nasyncio_default_test_loop_scope = session\n",
        plugins=["asyncio"],
    )
    outcome.assert_counts(passed=2)


def test_a_fixture_of_long_life_that_fails_is_shown_without_frames_of_the_plugin(run_pytest: Run) -> None:
    outcome = run_pytest(
        "def test_it(broken, leak_check): pass",
        conftest="""
        import pytest
        @pytest.fixture(scope="session")
        def broken(): raise LookupError("broken")
        """,
    )
    outcome.assert_counts(error=1)
    assert "pytest_plugin.py" not in outcome.text


def test_a_test_that_has_raised_is_not_checked_whatever_becomes_of_that(run_pytest: Run) -> None:
    """What it raised holds its frames, and what these had open, also where it is expected, or the test runs again."""
    outcome = run_pytest(
        """
        import os, unittest, pytest
        @pytest.mark.xfail
        def test_expected():
            file = open(os.__file__)
            assert 0
        @pytest.mark.flaky(reruns=1)
        def test_rerun():
            file = open(os.__file__)
            assert 0
        class TestOld(unittest.TestCase):
            def test_old(self):
                file = open(os.__file__)
                self.fail()
        kept = []
        @pytest.mark.flaky(reruns=1)
        def test_better_then():
            kept.append(os.open(os.__file__, os.O_RDONLY))
            assert len(kept) == 2
        """,
        "--fdpool-leaks=fail",
        ini=HASTY,
        plugins=["rerunfailures"],
    )
    outcome.assert_counts(xfailed=1, failed=2, passed=1, error=1, rerun=2)
    outcome.assert_says("ERROR at teardown of test_better_then")


def test_an_isolated_body_may_ask_what_is_left(run_pytest: Run) -> None:
    """What a worker has for itself is not the body's."""
    outcome = run_pytest(
        """
        import os, socket, pytest
        @pytest.fixture
        def opened(leak_check):
            with open("/etc/passwd") as file: yield file
        @pytest.mark.run_isolated
        def test_it(opened, leak_check):
            assert [leak.number for leak in leak_check.now()] == [opened.fileno()]
            one, two = os.pipe()
            assert [leak.number for leak in leak_check.now()] == sorted([opened.fileno(), one, two])
            os.close(one)
            os.close(two)
            opened.close()
            leak_check.assert_clean()
        """
    )
    outcome.assert_counts(passed=1)


def test_garbage_is_no_leak_but_what_is_there_is_told_at_once(leak_check: LeakCheck) -> None:
    cycle: list[object] = [open(os.devnull)]
    cycle.append(cycle)
    assert [leak.kind for leak in leak_check.now()] == ["descriptor"]
    cycle[0].close()  # type: ignore[attr-defined]
    leak_check.assert_clean()


def test_a_check_in_the_midst_fails_with_the_report(leak_check: LeakCheck) -> None:
    with open(os.devnull), pytest.raises(AssertionError, match=r"descriptor \d+: /dev/null"):
        leak_check.assert_clean(patience_s=0)
    leak_check.assert_clean()
    with open(os.devnull):
        leak_check.restart()
        assert leak_check.now() == []


def test_what_an_older_pool_takes_meanwhile_is_no_leak_of_the_test() -> None:
    with fdpool.Pool(2) as pool:
        pool.submit(pow, 2, 3).result()
        check = LeakCheck("some test")
        both = threading.Barrier(2)
        first, second = (pool.submit(os.getpid) for _ in range(2))
        assert {first.result(), second.result()} <= set(pool.worker_pids())
        list(pool.map(_nap, range(4), chunksize=1))
        # The first may have been done with all before the second came.
        wait_until(lambda: len(pool.worker_pids()) == 2)
        del both
        found = check.now()
        assert found == [], report(found)


def test_describing_what_has_become_something_else_meanwhile_opens_nothing_for_good(
    leak_check: LeakCheck,
) -> None:
    """A pool's thread closes a socket after the census has seen it, and receives a pidfd under its number."""
    with open(os.devnull) as other:
        number = other.fileno()
        assert census._describe_descriptor(number, "socket:[1]") == "socket:[1]"
    assert census._describe_descriptor(number, "socket:[1]") == "socket:[1]"
    assert leak_check.now() == []


def _nap(_: int) -> None:
    import time

    time.sleep(0.05)  # so that one worker alone will not do


def test_a_process_of_a_thread_is_found_as_well() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(["sleep", "30"]))
        done.set()
        go.wait()

    done, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=start)
    thread.start()
    done.wait()
    try:
        assert started[0].pid in census.descendants(os.getpid())
    finally:
        go.set()
        thread.join()
        started[0].kill()
        started[0].wait()


def test_the_same_test_of_another_run_is_not_taken_for_this(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = LeakCheck(request.node.nodeid)
    pids = []
    for mark in (os.environ[census.MARK], "another run"):
        monkeypatch.setenv(census.MARK, mark)
        orphan = subprocess.run(
            "setsid sleep 30 >/dev/null 2>&1 & echo $!", shell=True, capture_output=True, check=True
        )
        pids.append(int(orphan.stdout))
    monkeypatch.undo()
    try:
        assert [leak.number for leak in check.now()] == pids[:1]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_shared_memory_of_others_is_not_ours_and_that_of_a_child_is() -> None:
    check = LeakCheck("some test")
    program = (
        "import sys; from multiprocessing.shared_memory import SharedMemory as M; "
        "m = M(sys.argv[1], True, 8); input()"
    )
    names = [f"fdpool-test-{os.getpid()}-{number}" for number in range(2)]
    (Path("/dev/shm") / names[0]).touch()  # as somebody else would
    with subprocess.Popen(
        [sys.executable, "-c", program, names[1]], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        wait_until((Path("/dev/shm") / names[1]).exists)
        wait_until(lambda: _shared(check))
        found = _shared(check)
        child.communicate(b"\n")
    for name in names:
        (Path("/dev/shm") / name).unlink(missing_ok=True)  # the child's resource tracker does it as well
    assert found == [f"/dev/shm/{names[1]}"]


def _shared(check: LeakCheck) -> list[str]:
    return [leak.text for leak in check.now() if leak.kind == "shared memory"]


def test_a_socket_is_described_by_its_address(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        check = LeakCheck("some test")
        server.bind(str(tmp_path / "s"))
        assert check.now() == []
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "t"))
            (leak,) = check.now()
    assert str(leak).endswith(f"AF_UNIX SOCK_STREAM at {tmp_path}/t")
