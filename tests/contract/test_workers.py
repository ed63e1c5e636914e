"""Workers and the supervisor: starting, dying, being replaced, and leaving nothing."""

from __future__ import annotations

import concurrent.futures as cf
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import fdpool
from fdpool import Pool, _messages, wire
from fdpool._lifetime import Phase
from fdpool._spawn import BOOT
from fdpool._trees import WORKER_MARK
from tests.contract.helpers_workers import (
    begin_and_wait,
    fail_at,
    log_and_look,
    start_orphan,
    start_orphan_and_die,
    start_orphan_and_hang,
    start_two,
)
from tests.process_state import living, seconds_until_gone, wait_until

from . import helpers

START_METHODS = ["forkserver", "fork"]


def runs_a_task(pool: Pool) -> bool:
    """Its code has begun; that a future says so may be as its worker has the task in hand."""
    return any(worker.running for worker in pool.stats().workers)


def supervisor_of(pool: Pool) -> psutil.Process:
    """The supervisor: the parent of the pool's workers."""
    wait_until(pool.worker_pids)
    parent = psutil.Process(pool.worker_pids()[0]).parent()
    assert parent is not None
    return parent


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGABRT, "SIGABRT"),
        (-3, "code 3"),
        (0, "code 0"),
    ],
)
def test_a_dead_worker_fails_only_the_task_it_was_running(how: int, expected: str) -> None:
    """P4, T19: other tasks of the same worker, sent already, are run by the next one."""
    with Pool(1) as pool:
        before = pool.submit(helpers.square, 1)
        dying = pool.submit(helpers.die, how)
        behind = [pool.submit(helpers.square, n) for n in range(30)]
        assert before.result() == 1
        with pytest.raises(fdpool.WorkerLost, match=expected) as caught:
            dying.result()
        assert [future.result() for future in behind] == [n * n for n in range(30)]
    error = caught.value
    assert isinstance(error, cf.process.BrokenProcessPool)
    assert error.may_have_run is True
    assert error.slot == 0
    assert error.pid > 0
    assert (error.signal, error.exit_code) == ((how, None) if how > 0 else (None, -how))


@pytest.mark.parametrize("running", [True, False], ids=["running", "idle"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGPIPE"])
def test_a_worker_dies_of_any_signal_that_is_not_ignored_and_its_task_alone_with_it(
    name: str, running: bool, tmp_path: Path
) -> None:
    """W1. Python ignores SIGPIPE."""
    number, ignored = signal.Signals[name], name == "SIGPIPE"
    with Pool(1) as pool:
        pid = pool.submit(os.getpid).result(timeout=20)
        gate = fifo(tmp_path / "gate")
        future = pool.submit(helpers.wait_at, gate) if running else None
        wait_until(lambda: future is None or runs_a_task(pool))
        behind = [pool.submit(helpers.square, n) for n in range(5)] if running else []
        worker = psutil.Process(pid)
        os.kill(pid, number)
        if not ignored:
            assert seconds_until_gone([worker]) < 10
        elif running:
            open(gate, "wb").close()
        if future is not None:
            error = future.exception(timeout=20)
            assert getattr(error, "signal", None) == (None if ignored else number)
            assert ignored or (isinstance(error, fdpool.WorkerLost) and name in str(error))
        assert [each.result(timeout=20) for each in behind] == [n * n for n in range(len(behind))]
        assert (pool.submit(os.getpid).result(timeout=20) == pid) is ignored


def test_what_waits_behind_a_long_task_is_run_by_a_new_worker_when_another_has_died(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    os.mkfifo(tmp_path / "other")
    with Pool(2) as pool:
        tasks = {}
        for name in ("gate", "other"):
            tasks[name] = pool.submit(helpers.wait_at, str(tmp_path / name))
            wait_until((tmp_path / f"{name}.begun").exists)
        behind = pool.submit(helpers.square, 3)
        slot_of = pool._client.dispatcher.slot_of
        wait_until(lambda: slot_of(behind._task) is not None)
        wait_until(lambda: all(each.pid is not None for each in pool.stats().workers))
        [dies] = [name for name, task in tasks.items() if slot_of(task._task) != slot_of(behind._task)]
        dead = next(each for each in pool.stats().workers if each.slot == slot_of(tasks[dies]._task))
        assert dead.pid is not None
        os.kill(dead.pid, signal.SIGKILL)
        assert behind.result(timeout=20) == 9
        lives = "gate" if dies == "other" else "other"
        assert not tasks[lives].done()
        (tmp_path / lives).write_text("")


def test_a_worker_killed_while_idle_is_noticed_by_nobody() -> None:
    """T20."""
    with Pool(2) as pool:
        for _ in range(20):
            cf.wait([pool.submit(helpers.spin, 0.001) for _ in range(2)])
            for pid in pool.worker_pids():
                os.kill(pid, signal.SIGKILL)
            # At once: the signal and the next task reach the worker at the same time.
            assert [pool.submit(helpers.square, n).result(timeout=10) for n in range(4)] == [0, 1, 4, 9]


def test_a_finished_result_is_not_lost_when_its_worker_dies_after_sending_it() -> None:
    """T19: the answer is in the kernel's queue before the death is reported."""
    with Pool(1, max_tasks_per_child=1) as pool:
        assert [pool.submit(helpers.square, n).result() for n in range(20)] == [n * n for n in range(20)]


def test_workers_are_replaced_after_their_number_of_tasks() -> None:
    with Pool(1, max_tasks_per_child=3) as pool:
        pids = [pool.submit(os.getpid).result() for _ in range(9)]
    assert [pids[n : n + 3].count(pids[n]) for n in (0, 3, 6)] == [3, 3, 3]
    assert len(set(pids)) == 3


def test_a_stopped_worker_delays_only_its_own_task() -> None:
    """W5."""
    with Pool(2) as pool:
        cf.wait([pool.submit(helpers.spin, 0.05) for _ in range(2)])
        wait_until(lambda: len(pool.worker_pids()) == 2)
        stopped = pool.worker_pids()[0]
        os.kill(stopped, signal.SIGSTOP)
        futures = [pool.submit(helpers.square, n) for n in range(100)]
        wait_until(lambda: sum(future.done() for future in futures) >= 99)
        os.kill(stopped, signal.SIGCONT)
        assert [future.result() for future in futures] == [n * n for n in range(100)]


@pytest.mark.parametrize("start_method", START_METHODS)
def test_the_initializer_runs_once_in_each_worker(start_method: Any) -> None:
    def initialize(value: int, file: Any) -> None:
        import builtins

        builtins.fdpool_test_value = (value, file.read(4))  # type: ignore[attr-defined]

    def look() -> Any:
        import builtins

        return builtins.fdpool_test_value  # type: ignore[attr-defined]

    with open(__file__, "rb", buffering=0) as file:
        pool = Pool(1, initializer=initialize, initargs=(5, file), start_method=start_method)
    with pool:
        assert pool.submit(look).result() == (5, b'"""W')
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        assert pool.submit(look).result() == (5, b"orke")  # the replacement has it too; the offset is shared


def test_a_failing_initializer_breaks_the_pool_and_says_with_what(tmp_path: Path) -> None:
    gate = fifo(tmp_path / "gate")
    with Pool(2, initializer=fail_at, initargs=(gate,)) as pool:
        futures = [pool.submit(helpers.square, n) for n in range(10)]
        open(gate, "wb").close()  # a broken pool would take none of them
        for future in futures:
            with pytest.raises(fdpool.PoolBroken, match="initializer failed: LookupError: no configuration"):
                future.result()
        with pytest.raises(fdpool.PoolBroken, match="no configuration") as caught:
            pool.submit(helpers.square, 1)
        assert isinstance(caught.value.__cause__, LookupError)
    assert len({id(future.exception()) for future in futures}) == 10


class _PickledAtLast:
    """Its pickling begins, and ends when it may."""

    def __init__(self) -> None:
        self.begins, self.ends = threading.Event(), threading.Event()

    def __reduce__(self) -> Any:
        self.begins.set()
        self.ends.wait(20)
        return int, ()


def test_a_task_that_is_submitted_as_the_pool_breaks_is_refused_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its payload is done just as those that are there are failed."""
    os.mkfifo(tmp_path / "gate")
    slow, outcome = _PickledAtLast(), []

    def submit() -> None:
        try:
            outcome.append(pool.submit(helpers.square, slow))
        except fdpool.PoolBroken as error:
            outcome.append(error)

    with Pool(1, initializer=fail_at, initargs=(str(tmp_path / "gate"),)) as pool:
        first = pool.submit(helpers.square, 1)
        thread = threading.Thread(target=submit)
        thread.start()
        assert slow.begins.wait(20)
        fail = pool._client.fail

        def fail_late(task: int, error: BaseException) -> None:
            slow.ends.set()
            thread.join(20)
            fail(task, error)

        monkeypatch.setattr(pool._client, "fail", fail_late)
        (tmp_path / "gate").write_text("")
        assert isinstance(first.exception(timeout=20), fdpool.PoolBroken)
        [late] = outcome
        if isinstance(late, cf.Future):
            late = late.exception(timeout=20)
        assert isinstance(late, fdpool.PoolBroken)


def test_workers_that_die_again_and_again_before_they_are_ready_break_the_pool() -> None:
    with Pool(2, initializer=os._exit, initargs=(9,)) as pool:
        with pytest.raises(fdpool.PoolBroken, match="before they were ready.*exited with code 9"):
            pool.submit(helpers.square, 1).result(timeout=30)


def test_a_module_that_cannot_be_preloaded_breaks_the_pool_and_is_named() -> None:
    with Pool(1, preload=["no_such_module_here"]) as pool:
        with pytest.raises(fdpool.PoolBroken, match="no_such_module_here.*ModuleNotFoundError") as caught:
            pool.submit(helpers.square, 1).result()
        assert str(caught.value.__cause__).startswith("Traceback")


def test_a_worker_collects_garbage_as_any_process_does() -> None:
    with Pool(1) as pool:
        assert pool.submit(gc.isenabled).result()


@pytest.mark.parametrize("preload", [[], ["json"]])
def test_the_collector_leaves_alone_what_workers_share_with_their_supervisor(preload: list[str]) -> None:
    """It would write to each object that it looks at, and so have each worker copy all of them."""
    with Pool(2, preload=preload, max_tasks_per_child=1) as pool:
        frozen = [future.result() for future in [pool.submit(gc.get_freeze_count) for _ in range(4)]]
    assert min(frozen) > 1000


def test_nobody_looks_for_garbage_in_what_a_supervisor_has_imported() -> None:
    """There is none, and a look at all of it takes a millisecond."""
    main = "made = [[] for _ in range(10)]; print(gc.get_stats()[0]['collections'] - before, gc.get_freeze_count())"
    boot = BOOT.replace("gc.enable()", "before = gc.get_stats()[0]['collections']; gc.enable()")
    boot = boot.replace("main_fresh(int(sys.argv[1]))", main)
    done = subprocess.run(
        [sys.executable, "-c", boot, "0", *sys.path], capture_output=True, text=True, check=True
    )
    collections, frozen = map(int, done.stdout.split())
    assert collections == 0
    assert frozen > 1000


def test_preloaded_modules_are_there_when_a_worker_starts() -> None:
    def loaded() -> bool:
        import sys

        return "wave" in sys.modules

    with Pool(1, preload=["wave"]) as pool:
        assert pool.submit(loaded).result()
    with Pool(1) as pool:
        assert not pool.submit(loaded).result()


inherited = {"value": 0}


def test_by_default_nothing_is_forked_beside_threads_nor_with_a_lock_that_one_holds() -> None:
    """W6, M43: a lock that another thread holds would stay taken in a fork of this process."""
    let_go, held = threading.Event(), threading.Event()

    def hold() -> None:
        with logging._lock:  # type: ignore[attr-defined]
            held.set()
            let_go.wait(60)

    pool = Pool(2)  # which may import, and so log, here
    with pool:
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(20)
        try:
            found = [pool.submit(log_and_look).result(timeout=20) for _ in range(2)]
        finally:
            let_go.set()
            holder.join()
    assert found == [(1, ["MainThread"])] * 2


def test_start_method_fork_inherits_memory_and_the_default_does_not() -> None:
    """W6."""
    inherited["value"] = 42

    def look() -> int:
        from tests.contract import test_workers

        return test_workers.inherited["value"]

    with Pool(1, start_method="fork") as pool:
        assert pool.submit(look).result() == 42
    with Pool(1) as pool:
        assert pool.submit(look).result() == 0
    inherited["value"] = 0


def test_a_fork_of_the_client_has_nothing_left_to_import() -> None:
    """It would copy the client's pages for it, once for each pool; and a lock of an import may be held in a fork."""
    script = (
        "import sys, fdpool\n"
        "with fdpool.Pool(1, start_method='fork') as pool:\n"
        "    there = pool.submit(eval, 'set(__import__(\"sys\").modules)').result()\n"
        "print(sorted(there - set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("chunked", [False, True])
def test_what_the_first_call_of_a_forked_pool_carries_is_not_inherited(chunked: bool) -> None:
    with Pool(1, start_method="fork") as pool:
        items = [bytes(1 << 20)]
        for _ in pool.map(len, items * 2) if chunked else [pool.submit(len, *items).result()]:
            continue
        for pid in (supervisor_of(pool).pid, *pool.worker_pids()):
            assert not [target for target in _targets(pid) if "fdpool-payload" in target]


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_holds_its_own_channel_and_no_other(start_method: Any, tmp_path: Path) -> None:
    """P12, T21: what else it has open, it has from its client's standard streams."""
    with Pool(3, start_method=start_method) as pool:
        # Each runs one: so each has closed what it had from its supervisor.
        together = [pool.submit(helpers.meet, str(tmp_path), n, 3) for n in range(3)]
        assert all(future.result(timeout=30) for future in together)
        wait_until(lambda: len(pool.worker_pids()) == 3)
        for pid in pool.worker_pids():
            assert os.getpgid(pid) == pid
            sockets = [target for target in _targets(pid) if target.startswith("socket:")]
            ours = [target for target in _targets(os.getpid()) if target.startswith("socket:")]
            if start_method == "forkserver":
                assert len(sockets) == 1
                assert not [target for target in _targets(pid) if "pidfd" in target or "eventpoll" in target]
            else:
                links = [target for link in pool._client.links.values() for target in _names(link)]
                assert len([target for target in sockets if target in links]) == 1
                assert len(ours) >= len(sockets)


def _targets(pid: int) -> list[str]:
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return found


def _names(link: Any) -> list[str]:
    return [os.readlink(f"/proc/self/fd/{end.fileno()}") for end in (link.mine, link.theirs)]


BUSY = """
import os, subprocess, sys, time
import fdpool
def busy(subprocess=subprocess, os=os):
    here = subprocess.Popen(["sleep", "1000"])
    elsewhere = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    os.write(1, f"{here.pid} {elsewhere.pid}\\n".encode())
    while True: pass
pool = fdpool.Pool(3, start_method=sys.argv[1])
for _ in range(2):
    pool.submit(busy)
pool.submit(time.sleep, 1000)
time.sleep(1000)
"""


def seconds_that_ending_takes(start_method: str, who: str, how: int) -> float:
    """From the end of a program that uses a pool, or of the pool's supervisor, to that of all that is below."""
    command = [sys.executable, "-c", BUSY, start_method]
    environment = {**os.environ, "PYTHONPATH": str(Path(fdpool.__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as program:
        assert program.stdout is not None
        after: list[psutil.Process] = []
        try:
            started = [int(pid) for _ in range(2) for pid in program.stdout.readline().split()]
            me = psutil.Process(program.pid)
            tree = me.children(recursive=True)
            assert len(tree) >= 7
            assert {process.pid for process in tree} >= set(started)
            os.kill(program.pid if who == "client" else me.children()[0].pid, how)
            took = seconds_until_gone(tree)
            after = me.children(recursive=True) if who == "supervisor" else []  # it has been replaced
        finally:
            program.kill()
        seconds_until_gone(after)
    return took


@pytest.mark.parametrize(
    ("who", "how"),
    [("client", signal.SIGKILL), ("client", signal.SIGTERM), ("supervisor", signal.SIGKILL)],
    ids=["client-killed", "client-terminated", "supervisor-killed"],
)
@pytest.mark.parametrize("start_method", START_METHODS)
def test_nothing_is_left_within_a_second_of_a_clients_or_supervisors_end(
    start_method: str, who: str, how: int
) -> None:
    """W4. Of five tries one at least: a busy machine may be slower, but what has to wait for something always is."""
    took = [seconds_that_ending_takes(start_method, who, how)]
    while min(took) >= 1 and len(took) < 5:
        took.append(seconds_that_ending_takes(start_method, who, how))
    assert min(took) < 1, took


@pytest.mark.usefixtures("fresh_supervisors")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_supervisor_is_replaced_and_only_what_ran_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """W4. Nothing of the old one is left, and what waited is run; the second time in a minute the pool breaks."""
    with Pool(2) as pool:
        started = pool.submit(start_two).result()
        running = [pool.submit(time.sleep, 1000) for _ in range(2)]
        waiting = [pool.submit(helpers.square, n) for n in range(40)]
        with open(os.devnull) as null:
            carrying = pool.submit(helpers.read_all, null)
        wait_until(lambda: all(worker.running == "sleep" for worker in pool.stats().workers))
        supervisor = supervisor_of(pool)
        tree = supervisor.children(recursive=True)
        supervisor.kill()
        assert seconds_until_gone(tree) < 10, started
        for future in running:
            with pytest.raises(
                fdpool.WorkerLost, match="because the pool's supervisor was killed by SIGKILL"
            ):
                future.result(timeout=20)
        assert [future.result(timeout=20) for future in waiting] == [n * n for n in range(40)]
        assert carrying.result(timeout=20) == ""
        wait_until(lambda: "a new one was started" in caplog.text)  # by a thread that others may overtake
        assert pool.stats().supervisor_restarts == 1

        supervisor_of(pool).kill()
        wait_until(lambda: breaks(pool))


@pytest.mark.skipif(sys.platform != "linux", reason="found in /proc")
@pytest.mark.parametrize("start_method", START_METHODS)
def test_what_a_task_has_forked_and_hidden_dies_with_the_supervisor(start_method: Any) -> None:
    """W4."""
    with Pool(1, start_method=start_method) as pool:
        orphan = psutil.Process(pool.submit(start_orphan).result(timeout=20))
        supervisor_of(pool).kill()
        assert seconds_until_gone([orphan]) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="found in /proc")
@pytest.mark.parametrize("start_method", START_METHODS)
def test_what_a_task_has_forked_and_hidden_dies_with_its_worker(start_method: Any, tmp_path: Path) -> None:
    """P8: killed by anybody, or ended as it is to be terminated. Of others with such children nothing is touched."""
    killed, ended, others = (tmp_path / name for name in ("killed", "ended", "others"))
    with Pool(2, start_method=start_method) as pool:
        try:
            keeper = pool.submit(start_orphan_and_hang, str(others))
            with pytest.raises(fdpool.WorkerLost):
                pool.submit(start_orphan_and_die, str(killed)).result(timeout=20)
            future = pool.submit(start_orphan_and_hang, str(ended))
            wait_until(lambda: all(path.exists() and path.read_text() for path in (ended, others)))
            future.terminate(grace=0)
            cf.wait([future], timeout=20)
            orphans = living(int(path.read_text()) for path in (killed, ended))
            assert seconds_until_gone(orphans) < 10
            assert psutil.Process(int(others.read_text())).is_running()
            assert keeper.running()
        finally:
            pool.kill_workers()


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_another_process_of_the_same_number_has_left_is_not_touched() -> None:
    """M40 for marks: a supervisor's pid may have been another's, whose workers' programs are still there."""
    with Pool(1) as pool:
        started = pool.submit(start_two).result(timeout=20)
        supervisor = supervisor_of(pool)
        marks = [f"{supervisor.pid}.0.1", f"{supervisor.pid}.{16 * '0'}.0.1"]
        others = [
            subprocess.Popen(["sleep", "1000"], env={**os.environ, WORKER_MARK: mark}) for mark in marks
        ]
        try:
            tree = supervisor.children(recursive=True)
            assert {process.pid for process in tree} >= set(started)
            supervisor.kill()
            assert seconds_until_gone(tree) < 10
            wait_until(lambda: pool.stats().supervisor_restarts == 1)
            assert [other.poll() for other in others] == [None, None]
        finally:
            for other in others:
                other.kill()
                other.wait()


def test_a_worker_whose_inbox_is_full_is_told_to_leave_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T9: and so leaves by itself, in place of being killed when it has had its time."""
    monkeypatch.setattr("fdpool._lifetime._LEAVE_S", 20.0)
    gate = fifo(tmp_path / "gate")
    with Pool(1, initializer=begin_and_wait, initargs=(str(tmp_path),)) as pool:
        assert pool.submit(helpers.nothing).cancel()
        wait_until((tmp_path / "begun").exists, 20)
        inbox = pool._client.links[0].mine
        while wire.try_send(inbox, (_messages.pack_header(_messages.FORGET),)):
            continue
        pool.shutdown(wait=False)
        wait_until(lambda: pool._client.life.phase is Phase.LEAVING)
        os.close(os.open(gate, os.O_WRONLY))
    assert (tmp_path / "left").exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_killed_supervisor_takes_a_pool_of_forks_along_and_nothing_hangs() -> None:
    """W4: it cannot be forked again, as this process is not what it was."""
    pool = Pool(2, start_method="fork")
    started = pool.submit(start_two).result()
    running = pool.submit(time.sleep, 1000)
    waiting = [pool.submit(helpers.square, n) for n in range(40)]
    supervisor = supervisor_of(pool)
    tree = supervisor.children(recursive=True)
    supervisor.kill()
    assert seconds_until_gone(tree) < 10, started
    with pytest.raises(fdpool.PoolBroken, match=r"supervisor was killed by SIGKILL"):
        running.result(timeout=20)
    for future in waiting:
        if future.exception(timeout=20) is not None:
            assert isinstance(future.exception(), fdpool.PoolBroken)
    assert breaks(pool)
    pool.shutdown()


def breaks(pool: Pool) -> bool:
    try:
        pool.submit(helpers.square, 1).result(timeout=20)
    except fdpool.PoolBroken as error:
        return "supervisor was killed by SIGKILL" in str(error)
    except fdpool.WorkerLost:
        pass
    return False


@pytest.mark.parametrize("pause_s", [0.0, 0.0005, 0.002, 0.005, 0.02, 0.05])
def test_a_supervisor_may_die_at_any_moment_of_a_workers_start(pause_s: float) -> None:
    """Each task has one outcome, and none hangs."""
    with Pool(3) as pool:
        pool.submit(helpers.square, 1).result(timeout=20)
        supervisor = supervisor_of(pool)
        futures = [pool.submit(helpers.spin, 0.01) for _ in range(12)]  # two more workers are started
        time.sleep(pause_s)  # the moment is what is tried
        supervisor.kill()
        errors = [future.exception(timeout=30) for future in futures]
        assert sum(error is not None for error in errors) <= 3
        assert all(isinstance(error, (fdpool.WorkerLost, type(None))) for error in errors)
        assert pool.submit(helpers.square, 3).result(timeout=20) == 9


def test_what_a_killed_worker_had_started_is_killed_too() -> None:
    def start() -> tuple[int, int]:
        here = subprocess.Popen(["sleep", "1000"])
        elsewhere = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        return here.pid, elsewhere.pid

    with Pool(1) as pool:
        started = pool.submit(start).result()
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in started))


def test_recovery_from_a_killed_worker_takes_no_noticeable_time() -> None:
    """T20."""
    with Pool(1) as pool:
        pool.submit(helpers.square, 1).result()
        silent = pool.submit(time.sleep, 1000)
        wait_until(lambda: runs_a_task(pool))
        begun = time.monotonic()
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        with pytest.raises(fdpool.WorkerLost):
            silent.result(timeout=20)
        assert pool.submit(helpers.square, 3).result() == 9
        assert time.monotonic() - begun < 10


def test_killing_workers_from_outside_loses_no_more_tasks_than_workers() -> None:
    stop = threading.Event()
    kills = 0
    with Pool(2) as pool:

        def assassin() -> None:
            nonlocal kills
            while kills < 30 and not stop.wait(0.01):  # the longer a run takes, the more there would be
                # Only who is ready: a busy machine takes longer than this to start a worker, and the pool gives up on
                # workers that all die as they start.
                workers = pool.stats().workers
                for pid in [each.pid for each in workers if each.state == "ready" and each.pid is not None][
                    :1
                ]:
                    try:
                        os.kill(pid, signal.SIGKILL)
                        kills += 1
                    except ProcessLookupError:
                        continue

        killer = threading.Thread(target=assassin)
        killer.start()
        futures = {n: pool.submit(helpers.square, n) for n in range(3000)}
        lost = [n for n, future in futures.items() if isinstance(future.exception(), fdpool.WorkerLost)]
        stop.set()
        killer.join()
        assert all(future.result() == n * n for n, future in futures.items() if n not in lost)
    assert len(lost) <= kills


@pytest.mark.parametrize(
    "without", ["memfd", "pidfd", "subreaper", "pdeathsig", "epoll", "memfd,pidfd,subreaper,pdeathsig,epoll"]
)
def test_the_pool_works_without_what_only_linux_has(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1."""
    monkeypatch.setenv("FDPOOL_WITHOUT", without)
    with Pool(2) as pool:
        assert list(pool.map(helpers.square, range(20))) == [n * n for n in range(20)]
        assert pool.submit(len, b"x" * 1_000_000).result() == 1_000_000
        with pytest.raises(fdpool.WorkerLost):
            pool.submit(helpers.die, signal.SIGKILL).result()
        assert pool.submit(helpers.square, 3).result() == 9


def test_a_supervisor_that_hangs_in_an_import_does_not_outlive_its_client(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(
        "import threading\nopen('importing', 'w').close()\nthreading.Event().wait()\n"
    )
    source = "import fdpool; fdpool.Pool(1, preload=['hangs']).submit(print).result()"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", source], cwd=tmp_path, env=environment) as program:
        try:
            wait_until((tmp_path / "importing").exists)
            tree = psutil.Process(program.pid).children(recursive=True)
            assert tree
        finally:
            program.kill()
    assert seconds_until_gone(tree) < 10


def test_what_a_preloaded_module_writes_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "writes.py").write_text(
        "import sys\nprint('out', end='.')\nprint('err', end='.', file=sys.stderr)\n"
    )
    source = """
import os, sys, fdpool
def write_and_die():
    print("a task", flush=True)
    print("a task", file=sys.stderr)
    os._exit(3)
with fdpool.Pool(1, preload=["writes"]) as pool:
    assert [pool.submit(write_and_die).exception(20).stderr for _ in range(2)] == 2 * ["a task\\n"]
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), str(tmp_path)])
    program = [sys.executable, "-c", source]
    done = subprocess.run(program, check=False, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("out.a task\na task\n", "err.a task\na task\n")


def test_a_preloaded_module_that_takes_the_signal_of_dead_children_leaves_the_supervisor_hearing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And workers have the dispositions of a fresh interpreter."""
    (tmp_path / "takes_signals.py").write_text(
        "import signal\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_DFL)\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "signal.set_wakeup_fd(-1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(1, preload=["takes_signals"]) as pool:
        with pytest.raises(fdpool.WorkerLost):
            pool.submit(os._exit, 1).result(timeout=20)
        assert pool.submit(signal.getsignal, signal.SIGPIPE).result(timeout=20) is signal.SIG_IGN


def test_a_worker_that_runs_a_task_is_among_the_pids_however_late_its_report_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpool._client._REPORT_S", 20.0)
    with Pool(2) as pool:
        pool.submit(helpers.note_and_hang, str(tmp_path / "first"))
        wait_until(pool.worker_pids)
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with (
                pool._client.receiver.undisturbed
            ):  # so the pump, which reads reports as well, comes no further
                held.set()
                release.wait(30)

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(30)
        second = tmp_path / "second"
        pool.submit(helpers.note_and_hang, str(second))
        wait_until(lambda: second.exists() and second.read_text())
        threading.Timer(0.1, release.set).start()
        assert int(second.read_text()) in pool.worker_pids()
        holder.join()
        pool.kill_workers()
