"""`run_isolated`: whatever a body does, it is the failure of that test alone, told as if it had run here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdpool._fixtures.isolated import limits_of
from fdpool._fixtures.isolated_worker import Channel
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


def test_a_note_that_the_death_of_its_writer_has_torn_is_passed_over() -> None:
    """Kernel: SIGKILL ends a write(2) between any two pages."""
    with Channel() as channel:
        channel.note("record", 1, 1)
        whole = os.fstat(channel._files["notes"].fileno()).st_size
        channel.note("record", 2, 2)
        for size in reversed(range(whole, 2 * whole)):
            os.truncate(channel._files["notes"].fileno(), size)
            assert list(channel.notes("record")) == [1]


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
    @pytest.mark.run_isolated(timeout=2)
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
        "test_hanging had run for 2 seconds, which is its timeout",
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


def test_a_debugger_has_a_terminal_where_nothing_is_isolated(run_pytest: Run, tmp_path: Path) -> None:
    text = """
        import os, pytest
        here = os.getpid()
        @pytest.mark.run_isolated
        def test_it():
            breakpoint()
            assert os.getpid() == here
        """
    run_pytest(text).assert_says("breakpoint()", "Failed: a test that is run isolated has no terminal")
    for option, typed in (("--pdb", "continue\n"), ("--trace", "continue\ncontinue\n")):
        (tmp_path / "typed").write_text(typed)
        with (tmp_path / "typed").open() as stdin:
            run_pytest(text, option, stdin=stdin).assert_counts(passed=1)


@pytest.mark.parametrize("as_usual", [False, True])
def test_a_body_may_say_itself_that_it_is_expected_to_fail(run_pytest: Run, as_usual: bool) -> None:
    outcome = run_pytest(
        """
        import pytest
        pytestmark = pytest.mark.run_isolated

        def test_failing(request):
            request.applymarker(pytest.mark.xfail(reason="known"))
            assert 0
        def test_failing_otherwise(request):
            request.node.add_marker(pytest.mark.xfail(raises=KeyError))
            assert 0
        def test_passing(request):
            request.applymarker(pytest.mark.xfail(strict=True))
        """,
        *(["--runxfail"] if as_usual else []),
    )
    if as_usual:
        outcome.assert_counts(failed=2, passed=1)
    else:
        outcome.assert_counts(failed=2, xfailed=1)
        outcome.assert_says("[XPASS(strict)]")


@pytest.mark.parametrize("how", ["-s", "--capture=tee-sys"])
def test_output_that_is_seen_at_once_is_seen_once(run_pytest: Run, how: str) -> None:
    """F5."""
    outcome = run_pytest(
        """
        import os, pytest
        @pytest.mark.run_isolated
        def test_talking():
            print("by print")
            os.write(2, b"by write")
        """,
        how,
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


@pytest.mark.skipif(not hasattr(pytest, "Subtests"), reason="this pytest has no subtests")
@pytest.mark.parametrize("processes", [0, 1])
def test_subtests_of_a_body_are_reported_and_fail_it(run_pytest: Run, processes: int) -> None:
    """Once each, whoever is told of them; and those before a crash."""
    outcome = run_pytest(
        """
        import os, unittest, pytest
        pytestmark = pytest.mark.run_isolated
        def test_fixture(subtests):
            for number in range(3):
                with subtests.test(number=number): assert number != 1
        class TestOld(unittest.TestCase):
            def test_old(self):
                for number in range(3):
                    with self.subTest(number=number): assert number != 1
        def test_crashing(subtests):
            with subtests.test("before"): assert 0
            os._exit(3)
        def test_passing(subtests):
            with subtests.test(): pass
        @pytest.mark.xfail
        def test_expected(subtests):
            with subtests.test(): assert 0
        """,
        f"-n{processes}",
        plugins=["xdist"],
    )
    outcome.assert_counts(failed=5, passed=2, xpassed=1)
    outcome.assert_says("test_fixture (number=", "assert 1 != 1", "____ test_fixture ____")
    outcome.assert_says("contains 1 failed subtest", "TestOld.test_old (number=", "test_crashing [before]")


STRAY = """
    import gc, threading, warnings, pytest
    pytestmark = pytest.mark.run_isolated
    def test_thread():
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    class Faulty:
        def __del__(self): raise ValueError("in a finalizer")
    def test_garbage():
        cycle = Faulty()
        cycle.itself = cycle
    def test_warning():
        class OwnWarning(Warning): pass
        warnings.warn("of the body", OwnWarning)
    def test_caught():
        with pytest.warns(UserWarning): warnings.warn("caught")
"""


def test_what_pytest_warns_of_after_a_body_is_warned_of(run_pytest: Run) -> None:
    """Exceptions of its threads and finalizers, too; once each."""
    outcome = run_pytest(STRAY)
    outcome.assert_counts(passed=4)
    assert outcome.counts["warning"] == 3, outcome.text
    outcome.assert_says("PytestUnhandledThreadExceptionWarning", "ZeroDivisionError")
    outcome.assert_says("PytestUnraisableExceptionWarning", "ValueError: in a finalizer")
    outcome.assert_says("test_it.py::test_warning", "OwnWarning: of the body")
    run_pytest(STRAY, "-W", "error").assert_counts(passed=1, failed=3)
    unrecorded = run_pytest(STRAY, "-p", "no:warnings", "-rP")
    assert unrecorded.text.count("OwnWarning: of the body") == 1


def test_what_cannot_travel_from_a_body_is_told_in_plain_words_and_costs_nothing_else(
    run_pytest: Run,
) -> None:
    """What does not load here, or does not even pickle there."""
    outcome = run_pytest(
        """
        import logging, sys, threading, types, warnings, pytest
        log = logging.getLogger("mine")
        class Stubborn(Exception):
            def __init__(self, one, two): super().__init__(f"{one} and {two}")
        @pytest.fixture
        def logged(caplog):
            yield
            records = caplog.get_records("call")
            assert [each.getMessage() for each in records] == ["stubborn 1", "a lock", "kept"]
            assert records[-1].extra == {"an": "extra"}
        @pytest.mark.run_isolated
        def test_log(logged):
            log.warning("stubborn %d", 1, extra={"error": Stubborn(1, 2)})
            log.warning("a lock", extra={"lock": threading.Lock()})
            log.warning("kept", extra={"extra": {"an": "extra"}})
        @pytest.mark.run_isolated
        def test_warning(tmp_path, monkeypatch):
            (tmp_path / "only_there.py").write_text("class There(Warning): pass")
            monkeypatch.syspath_prepend(tmp_path)
            import only_there
            warnings.warn("one", only_there.There)
            warnings.warn("other")
        """
    )
    outcome.assert_counts(passed=2)
    assert outcome.counts["warning"] == 2, outcome.text
    outcome.assert_says("Warning: There: one", "UserWarning: other")


def test_a_fixture_sees_what_its_isolated_test_was_warned_of(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import warnings, pytest
        @pytest.fixture
        def one(recwarn):
            yield recwarn
            assert [str(each.message) for each in recwarn] == ["careful"]
        @pytest.mark.run_isolated
        def test_it(one):
            warnings.warn("careful")
            assert len(one) == 1
        """
    )
    outcome.assert_counts(passed=1)


def test_what_a_body_sets_up_for_itself_is_torn_down_and_nothing_else(
    run_pytest: Run, tmp_path: Path
) -> None:
    outcome = run_pytest(
        """
        import pytest
        def say(text):
            with open("said", "a") as file: file.write(text + " ")
        @pytest.fixture(scope="session")
        def early():
            yield
            say("early")
        @pytest.fixture(scope="session")
        def late():
            yield
            say("late")
        @pytest.fixture
        def dynamic(late):
            yield
            say("dynamic")
        @pytest.fixture
        def broken():
            yield
            raise LookupError("in the teardown")
        def test_first(early): pass
        @pytest.mark.run_isolated
        def test_dynamic(request):
            request.getfixturevalue("early")
            request.getfixturevalue("dynamic")
            request.addfinalizer(lambda: say("finalizer"))
            say("body")
        @pytest.mark.run_isolated
        def test_broken(request): request.getfixturevalue("broken")
        """
    )
    outcome.assert_counts(passed=2, failed=1)
    outcome.assert_says("LookupError: in the teardown")
    assert (tmp_path / "said").read_text() == "body finalizer dynamic late early "


def test_other_plugins_see_what_was_raised_and_what_became_of_it(run_pytest: Run, tmp_path: Path) -> None:
    outcome = run_pytest(
        """
        import os, sys, pytest
        pytestmark = pytest.mark.run_isolated
        class Stubborn(Exception):
            def __init__(self, one, two): super().__init__(f"{one} and {two}")
        def test_skip(): pytest.skip("not today")
        def test_xfail(): pytest.xfail("known")
        @pytest.mark.xfail(raises=KeyError)
        def test_expected(): {}["it"]
        @pytest.mark.xfail(strict=True)
        def test_strict(): pass
        def test_error(): raise ConnectionError("flaky")
        def test_own():
            class Own(ValueError): pass
            raise Own("own")
        def test_stubborn(): raise Stubborn(1, 2)
        def test_exit(): sys.exit(3)
        """,
        conftest="""
        import os, pytest
        here = os.getpid()
        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_makereport(item, call):
            report = yield
            if call.when == "call" and os.getpid() == here:
                error = call.excinfo and f"{call.excinfo.typename}({call.excinfo.value})"
                print(item.name, report.outcome, hasattr(report, "wasxfail"), error, file=open("seen", "a"))
            return report
        """,
    )
    outcome.assert_counts(skipped=1, xfailed=2, failed=5)
    assert (tmp_path / "seen").read_text().splitlines() == [
        "test_skip skipped False Skipped(not today)",
        "test_xfail skipped True XFailed(known)",
        "test_expected skipped True KeyError('it')",
        "test_strict failed False None",
        "test_error failed False ConnectionError(flaky)",
        "test_own failed False Own(own)",
        "test_stubborn failed False IsolatedFailure(Stubborn: 1 and 2)",
        "test_exit failed False IsolatedFailure(SystemExit: 3)",
    ]


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
