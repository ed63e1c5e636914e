"""`run_isolated`: whatever a body does, it is the failure of that test alone, told as if it had run here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdpool._fixtures.isolated import limits_of
from tests.plugin.conftest import Run

here = os.getpid()
touched: list[int] = []


@pytest.mark.run_isolated
def test_the_body_runs_elsewhere_with_the_fixtures_that_were_set_up_here(tmp_path: Path) -> None:
    assert os.getpid() != here
    (tmp_path / "file").write_text("x")
    touched.append(1)


def test_what_an_isolated_body_changed_did_not_change_here() -> None:
    assert touched == []


BODIES = """
    import ctypes, logging, os, sys, threading, time
    import pytest
    pytestmark = pytest.mark.run_isolated

    def test_passing(): pass
    def test_failing():
        print("to stdout")
        print("to stderr", file=sys.stderr)
        logging.getLogger("mine").warning("logged %s", "this")
        found = [1, 2]
        assert found == [1, 3]
    def test_crashing():
        print("before the crash")
        logging.getLogger("mine").warning("logged before")
        ctypes.string_at(0)
    def test_leaving():
        print("before leaving")
        sys.stdout.flush()
        os._exit(0)
    def test_exiting(): sys.exit(3)
    @pytest.mark.run_isolated(timeout=0.3)
    def test_hanging():
        print("before hanging")
        time.sleep(60)
    @pytest.mark.run_isolated(max_memory=300 << 20)
    def test_growing():
        kept = []
        while True:
            kept.append(bytes(1 << 20).replace(b"0", b"1") + b"x" * (1 << 20))
            time.sleep(0.001)
    def test_skipping(): pytest.skip("not today")
    @pytest.mark.xfail(raises=ZeroDivisionError)
    def test_expected(): 1 / 0
    @pytest.mark.xfail(raises=KeyError)
    def test_unexpected(): 1 / 0
    def test_capsys(capsys):
        print("read")
        assert capsys.readouterr().out == "read\\n"
    def test_capfd(capfd):
        os.write(1, b"read")
        assert capfd.readouterr().out == "read"
    def test_caplog(caplog):
        logging.getLogger("mine").error("seen")
        assert caplog.messages == ["seen"]
    def test_property(record_property): record_property("name", "value")
    def test_leaving_a_thread(): threading.Thread(target=time.sleep, args=(60,)).start()
    def test_unrelated(): pass
"""


@pytest.mark.parametrize("capture", ["fd", "sys"])
def test_every_end_of_a_body_is_an_outcome_of_its_test_alone(
    run_pytest: Run, tmp_path: Path, capture: str
) -> None:
    """F5 for isolated tests: output comes back however it is captured."""
    outcome = run_pytest(BODIES, f"--capture={capture}", "--junitxml=found.xml", "--fdpool-leaks=fail")
    outcome.assert_counts(failed=7, passed=7, skipped=1, xfailed=1)
    outcome.assert_says(
        "____ test_failing ____",
        ">       assert found == [1, 3]",
        "E         At index 1 diff: 2 != 3",
        "test_it.py:12: AssertionError",
        "Captured stdout call",
        "to stdout",
        "Captured stderr call",
        "to stderr",
        "Captured log call",
        "WARNING  mine:test_it.py:10 logged this",
        "____ test_crashing ____",
        "the isolated test did not come to its end: worker ",
        "was killed by SIGSEGV while it ran test_crashing",
        "Fatal Python error: Segmentation fault",
        "in test_crashing",
        "before the crash",
        "logged before",
        "____ test_leaving ____",
        "exited with code 0 while it ran test_leaving",
        "before leaving",
        "____ test_exiting ____",
        "SystemExit: 3",
        "____ test_hanging ____",
        "test_hanging had run for 0.3 seconds, which is its timeout",
        "in test_hanging",
        "before hanging",
        "____ test_growing ____",
        "its max_memory is 314,572,800",
        "____ test_unexpected ____",
        "ZeroDivisionError",
    )
    assert "_pytest/" not in outcome.text
    assert "During handling" not in outcome.text
    assert '<property name="name" value="value"' in (tmp_path / "found.xml").read_text()


def test_without_capture_output_goes_where_it_always_goes(run_pytest: Run) -> None:
    """F5: -s."""
    outcome = run_pytest(
        """
        import os, pytest
        @pytest.mark.run_isolated
        def test_talking():
            print("by print")
            os.write(2, b"by write")
        """,
        "-s",
    )
    outcome.assert_counts(passed=1)
    assert outcome.text.count("by print") == outcome.text.count("by write") == 1


def test_threads_beside_a_fork_are_named_where_it_hangs_and_nobody_warns_of_them(run_pytest: Run) -> None:
    """F8: a fork beside threads, with warnings as errors. The lock that a thread holds is held for ever there."""
    outcome = run_pytest(
        """
        import threading, pytest
        lock, held, go = threading.Lock(), threading.Event(), threading.Event()
        def hold():
            with lock:
                held.set()
                go.wait()
        @pytest.fixture
        def holder():
            thread = threading.Thread(target=hold, name="holder")
            thread.start()
            held.wait()
            yield
            go.set()
            thread.join()
        @pytest.mark.run_isolated(timeout=0.3)
        def test_waiting(holder):
            with lock: pass
        @pytest.mark.run_isolated
        def test_beside(holder): pass
        """,
        "-W",
        "error",
    )
    outcome.assert_counts(failed=1, passed=1)
    outcome.assert_says(
        "the isolated test did not come to its end: test_waiting had run for 0.3 seconds",
        "(threads beside it when it was forked, whose locks it may have waited for: ",
        "holder)",
    )


def test_the_fixture_isolates_too_and_wrong_arguments_are_a_usage_error(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import os, unittest, pytest
        here = os.getpid()
        def test_by_fixture(run_isolated): assert os.getpid() != here
        class TestOld(unittest.TestCase):
            @pytest.mark.run_isolated
            def test_passing(self): self.assertNotEqual(os.getpid(), here)
            @pytest.mark.run_isolated
            def test_failing(self): self.assertEqual(1, 2)
        @pytest.mark.run_isolated
        def test_server_of_here(serve): pass
        """
    )
    outcome.assert_counts(passed=3, failed=1)
    outcome.assert_says("AssertionError: 1 != 2")
    outcome = run_pytest(
        """
        import pytest
        @pytest.mark.run_isolated(5, memory=1)
        def test_it(): pass
        """
    )
    outcome.assert_says(
        "test_it.py::test_it: @pytest.mark.run_isolated takes timeout= (seconds) and max_memory= (bytes), not 5, memory"
    )
    outcome = run_pytest("def test_it(run_isolated): pass", ini="fdpool_isolated_timeout = soon")
    outcome.assert_says("fdpool_isolated_timeout must be a number of seconds, not 'soon'")


def test_pytest_exit_in_a_body_ends_the_run(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import pytest
        @pytest.mark.run_isolated
        def test_exit(): pytest.exit("enough", 7)
        def test_never(): pass
        """
    )
    assert outcome.status == 7
    outcome.assert_says("Exit: enough")


def test_an_unmarked_test_is_not_isolated(request: pytest.FixtureRequest) -> None:
    assert limits_of(request.node, 60.0) is None
