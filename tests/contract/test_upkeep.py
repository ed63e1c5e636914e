"""What a task changes of its worker is undone, what it leaves is named, and a worker that has had its time is replaced.

Rows P6, P7, P8 and P15 of the hazards.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fdpool import Pool, WorkerLost, _leftovers
from tests.chaos.disorder import room_for
from tests.contract import helpers
from tests.contract.helpers_upkeep import (
    REPLACED,
    UNDONE,
    become_somebody_else,
    change_directory,
    close_taken,
    grow,
    grow_and_take_all_descriptors,
    have_few_descriptors,
    keep_signal_waiting,
    leave_child,
    leave_child_of_thread,
    leave_descriptor,
    leave_endless_thread,
    leave_many,
    leave_thread,
    replace_environment,
    ring_every_second,
    state,
)
from tests.process_state import wait_until


@pytest.mark.parametrize("change", UNDONE, ids=lambda change: change.__name__)
def test_what_a_task_changes_is_undone(change: Callable[[], None]) -> None:
    """P7."""
    with Pool(1) as pool:
        before = pool.submit(state).result(timeout=20)
        pool.submit(change).result(timeout=20)
        assert pool.submit(state).result(timeout=20) == before


@pytest.mark.parametrize("change", REPLACED, ids=lambda change: change.__name__)
def test_a_worker_that_cannot_be_put_back_is_replaced(change: Callable[[], None]) -> None:
    """P7."""
    if change is become_somebody_else and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with warnings.catch_warnings(), Pool(1) as pool:
        warnings.simplefilter("ignore", ResourceWarning)
        before = pool.submit(state).result(timeout=20)
        pool.submit(change).result(timeout=20)
        wait_until(lambda: pool.worker_pids() != [before["pid"]])
        after = pool.submit(state).result(timeout=20)
        assert after.pop("pid") != before.pop("pid")
        assert after == before


def test_what_an_import_sets_in_the_environment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_environment.py").write_text("import os\nos.environ['FDPOOL_TEST_IMPORT'] = 'yes'\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def use() -> str | None:
        import sets_environment  # type: ignore[import-not-found]  # noqa: F401

        return os.environ.get("FDPOOL_TEST_IMPORT")

    with Pool(1) as pool:
        assert [pool.submit(use).result(timeout=20) for _ in range(3)] == ["yes"] * 3


def test_what_the_initializer_sets_is_what_tasks_find() -> None:
    with Pool(1, initializer=change_directory) as pool:
        assert pool.submit(os.getcwd).result(timeout=20) == "/"
        pool.submit(os.chdir, "/tmp").result(timeout=20)
        assert pool.submit(os.getcwd).result(timeout=20) == "/"


def test_a_task_that_closes_everything_costs_its_worker_and_says_why() -> None:
    """P6."""
    with Pool(1) as pool:
        pid = pool.submit(os.getpid).result(timeout=20)
        with pytest.raises(WorkerLost, match="closed descriptors of its worker's own"):
            pool.submit(os.closerange, 3, 1000).result(timeout=20)
        assert pool.submit(os.getpid).result(timeout=20) != pid


# -- leftovers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leave", "text", "kind"),
    [
        (leave_descriptor, "left 1 descriptor (", "descriptors"),
        (leave_thread, "left 1 thread (left-behind)", "threads"),
        (leave_child, "left 1 child (", "children"),
        (leave_child_of_thread, "and 1 child (", "children"),
    ],
    ids=["descriptor", "thread", "child", "child of a thread"],
)
def test_what_a_task_leaves_is_named(leave: Callable[[], None], text: str, kind: str) -> None:
    """P8. The short task before it may be among those that may have done it."""
    with warnings.catch_warnings(record=True) as caught, Pool(1) as pool:
        warnings.simplefilter("always")
        pool.submit(helpers.square, 2).result(timeout=20)
        pool.submit(leave).result(timeout=20)
        wait_until(lambda: getattr(pool.stats().left, kind) == 1)
        assert text in "; ".join(pool.stats().left.latest)
        [told] = [each for each in pool.stats().left.latest if text in each]
        assert leave.__name__ in told
        wait_until(lambda: told in [str(each.message) for each in caught])


def test_what_the_last_task_of_a_worker_leaves_is_no_news() -> None:
    with Pool(1, max_tasks_per_child=1) as pool:
        for _ in range(3):
            pool.submit(leave_descriptor).result(timeout=20)
    assert pool.stats().recycled >= 2  # the last one was dismissed, perhaps
    assert not pool.stats().left.latest


def test_a_warning_that_is_an_error_does_not_hurt_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    with Pool(1) as pool:
        pool.submit(leave_descriptor).result(timeout=20)
        wait_until(lambda: "leave_descriptor" in caplog.text)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_with_too_many_descriptors_is_replaced() -> None:
    with Pool(1, max_fds_growth=5) as pool:
        pid = pool.submit(os.getpid).result(timeout=20)
        for _ in range(5):
            pool.submit(leave_descriptor).result(timeout=20)
        assert pool.submit(os.getpid).result(timeout=20) == pid
        pool.submit(leave_descriptor).result(timeout=20)
        wait_until(lambda: pool.submit(os.getpid).result(timeout=20) != pid)


# -- recycling -------------------------------------------------------------------------------------------


def test_a_worker_that_has_grown_too_large_is_replaced_after_the_task() -> None:
    with Pool(1, max_memory=90 << 20) as pool:
        small = [pool.submit(os.getpid).result(timeout=20) for _ in range(3)]
        assert len(set(small)) == 1
        assert pool.submit(grow).result(timeout=20) == small[0]
        wait_until(lambda: pool.submit(os.getpid).result(timeout=20) != small[0])


def test_how_large_a_worker_is_waits_where_it_has_no_descriptor_left_to_look_with() -> None:
    with warnings.catch_warnings(), Pool(1, initializer=have_few_descriptors, max_memory=90 << 20) as pool:
        warnings.simplefilter("ignore", ResourceWarning)
        large = pool.submit(grow_and_take_all_descriptors).result(timeout=20)
        assert pool.submit(close_taken).result(timeout=20) == large
        wait_until(lambda: pool.submit(os.getpid).result(timeout=20) != large)
        assert pool.stats().lost_workers == 0


def test_a_worker_that_is_too_old_is_replaced_and_no_task_is_lost() -> None:
    """P15."""
    with Pool(2, max_age=0.3) as pool:
        deadline = time.monotonic() + 20
        pids: set[int] = set()
        while len(pids) < 4 or pool.stats().recycled < 2:
            assert time.monotonic() < deadline
            futures = [pool.submit(helpers.spin, 0.001) for _ in range(50)]
            pids.update(future.result(timeout=20) for future in futures)


def test_nothing_is_kept_of_workers_that_were_not_there_for_long() -> None:
    """P15: nor is the last of them kept for too long."""
    with Pool(1, max_tasks_per_child=1, max_age=1000) as pool:
        for n in range(5):
            pool.submit(helpers.square, n).result(timeout=20)
        at_their_age = time.monotonic() + 500
        assert sum(timer[0] > at_their_age for timer in pool._client.limits._timers) == 1
    with Pool(1, max_tasks_per_child=2, max_age=0.3) as pool:
        for n in range(4):
            pool.submit(helpers.square, n).result(timeout=20)
        idle = pool.submit(os.getpid).result(timeout=20)
        wait_until(lambda: idle not in pool.worker_pids())


@pytest.mark.parametrize(
    "replaced",
    [{"max_tasks_per_child": 1}, {"max_tasks_per_child": 7}, {"max_age": 0.05}, {"max_memory": 1}],
    ids=["each task", "each 7", "age", "size"],
)
def test_no_task_is_lost_while_workers_are_replaced_under_load(replaced: dict[str, Any]) -> None:
    """P15."""
    with Pool(2, **replaced) as pool:
        futures = [pool.submit(helpers.wait_and_tell, n, 0.01) for n in range(60)]
        assert [future.result(timeout=60) for future in futures] == list(range(60))
        wait_until(
            lambda: pool.submit(helpers.square, 2).result(timeout=20) == 4 and pool.stats().recycled > 2
        )


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_that_cannot_leave_for_a_thread_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: tasks that come meanwhile are not given to it."""
    monkeypatch.setattr("fdpool._staffing._LEAVE_S", 0.3)
    with Pool(1, max_tasks_per_child=1) as pool:
        pid = pool.submit(leave_endless_thread).result(timeout=20)
        assert pool.submit(os.getpid).result(timeout=20) != pid


def test_idle_workers_go_and_the_least_number_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fdpool._staffing._LEAVE_S", 0.1)
    with Pool(4, min_workers=2, idle_timeout=0.2) as pool:
        together = [
            pool.submit(helpers.meet, str(tmp_path), n, 4) for n in range(4)
        ]  # so all four have started
        assert all(future.result(timeout=30) for future in together)
        wait_until(lambda: len(pool.worker_pids()) == 2)
        left = pool.worker_pids()
        wait_until(lambda: pool._client.limits.next_look() is None)
        assert pool.worker_pids() == left
        for future in [pool.submit(helpers.spin, 0.3) for _ in range(4)]:
            future.result(timeout=20)


def test_the_least_number_of_workers_is_there_with_the_first_task() -> None:
    with Pool(3, min_workers=3) as pool:
        pool.submit(helpers.square, 2).result(timeout=20)
        wait_until(lambda: len(pool.worker_pids()) == 3)
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: pool.stats().lost_workers == 1)
        wait_until(lambda: len(pool.worker_pids()) == 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_memory": 0},
        {"max_age": 0},
        {"max_age": -1.0},
        {"max_fds_growth": 0},
        {"min_workers": -1},
        {"min_workers": 3},
        {"idle_timeout": 0},
        {"log_level": "LOUD"},
    ],
)
def test_a_rule_of_no_use_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pool(2, **wrong)


def test_the_environment_is_undone_where_a_task_has_put_something_else_in_its_place() -> None:
    with Pool(1) as pool:
        before = pool.submit(state).result(timeout=20)
        pool.submit(replace_environment).result(timeout=20)
        assert pool.submit(state).result(timeout=20) == before


def test_a_timer_of_the_initializers_goes_on() -> None:
    with Pool(1, initializer=ring_every_second) as pool:
        pool.submit(helpers.square, 3).result(timeout=20)
        assert pool.submit(state).result(timeout=20)["alarm"]


def test_what_a_task_leaves_is_counted_where_it_is_too_much_to_be_told(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["y" * 200] * 3)
    folder.mkdir(parents=True)
    (folder / ("x" * 200)).touch()
    with warnings.catch_warnings(), Pool(1) as pool:
        warnings.simplefilter("ignore", ResourceWarning)
        pid = pool.submit(os.getpid).result(timeout=20)
        pool.submit(leave_many, str(folder)).result(timeout=20)
        wait_until(lambda: pool.stats().left.descriptors)
        assert pool.stats().left.descriptors == 800
        assert "left 800 descriptors" in pool.stats().left.latest[-1]
        assert pool.submit(os.getpid).result(timeout=20) == pid


def test_a_look_for_which_no_descriptor_was_left_blames_nobody() -> None:
    """Neither for what was there before, nor for all that is there after it."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            watch = _leftovers.Watch()
            with room_for(0):
                blind = _leftovers.Watch()
                assert watch.look("task", 1) is None
            assert watch.look("task", 1) is None
            assert blind.look("task", 1) is None
            assert watch.descriptors_more == blind.descriptors_more == 0
            with subprocess.Popen(["sleep", "1000"]) as second:
                try:
                    for each in (watch, blind):
                        found = each.look("task", 1)
                        assert found is not None
                        assert [text.partition(", ")[2] for text in found.children.texts] == [
                            f"pid {second.pid}"
                        ]
                finally:
                    second.kill()
        finally:
            child.kill()


def test_a_child_stays_known_as_the_thread_that_has_started_it_ends() -> None:
    started: list[subprocess.Popen[bytes]] = []
    go_on, begun = threading.Event(), threading.Event()

    def start() -> None:
        started.append(subprocess.Popen(["sleep", "1000"]))
        begun.set()
        go_on.wait()

    watch = _leftovers.Watch()
    thread = threading.Thread(target=start)
    thread.start()
    begun.wait()
    with started[0] as child:
        try:
            found = watch.look("task", 1)
            assert found is not None
            # Just after execve(2) it may have its parent's name still.
            assert [text.partition(", ")[2] for text in found.children.texts] == [f"pid {child.pid}"]
            go_on.set()
            thread.join()
            assert watch.look("task", 1) is None
        finally:
            go_on.set()
            child.kill()


def test_a_signal_that_a_task_has_blocked_does_not_end_its_worker_afterwards() -> None:
    with Pool(1) as pool:
        before = pool.submit(state).result(timeout=20)
        pool.submit(keep_signal_waiting).result(timeout=20)
        assert pool.submit(state).result(timeout=20) == before
