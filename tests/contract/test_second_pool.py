"""A second pool of the same client: its supervisor is a fork of the first one's where nobody could tell, and its own in
every other way."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import fdpool
from fdpool import Pool, _control, _lending, _messages, fds
from fdpool.fds import OwnedFds
from fdpool.sockets import StreamSocket
from tests.contract import helpers
from tests.contract.helpers_second_pool import has_colorsys, name_found, what_a_task_finds
from tests.process_state import seconds_until_gone, wait_until

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="such forks are known by pidfd"),
    pytest.mark.usefixtures("fresh_supervisors"),
]


def supervisor_of(pool: Pool) -> psutil.Process:
    assert pool._client.control is not None
    return psutil.Process(pool._client.control.pid)


def is_borrowed(pool: Pool) -> bool:
    return supervisor_of(pool).ppid() != os.getpid()


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool that serves, and whose supervisor has spoken; it has time to answer, however busy the machine is."""
    monkeypatch.setattr(_control, "_BIRTH_S", 20.0)
    with Pool(1) as pool:
        pool.submit(helpers.nothing).result(timeout=20)
        wait_until(lambda: pool._client.control is not None and pool._client.control.was_heard)
        yield pool


def test_the_supervisor_of_a_second_pool_is_a_fork_of_the_first_ones(first: Pool) -> None:
    with Pool(2) as second:
        assert second.submit(helpers.square, 3).result(timeout=20) == 9
        assert supervisor_of(second).ppid() == supervisor_of(first).pid
        with Pool(1) as third:
            assert third.submit(helpers.square, 4).result(timeout=20) == 16
            assert is_borrowed(third)
    assert first.submit(helpers.square, 5).result(timeout=20) == 25


def test_what_a_borrowed_one_is_told_first_is_there_before_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it need not wait for who waits for its answer."""
    monkeypatch.setattr(_control, "_BIRTH_S", 20.0)
    told = []

    def be_born(owned: OwnedFds) -> None:
        with contextlib.closing(owned), StreamSocket.from_fd(fds.duplicate(owned.numbers[0])) as control:
            told.append(control.receive_bytes()[0])
            born = _messages.encode_control(_messages.Born(os.getpid()))
            control.send_bytes(born, [owned.numbers[1]])

    def lend(_message: _messages.Lend, owned: OwnedFds) -> None:
        threads.append(threading.Thread(target=be_born, args=(owned,)))
        threads[0].start()

    threads: list[threading.Thread] = []
    started = _control._borrow(lend, lambda sock: sock.send_bytes(b"what it is to be"))
    threads[0].join()
    assert told == [b"what it is to be"]
    assert started is not None
    sock, _, pidfd = started
    sock.close()
    os.close(pidfd)


def test_a_borrowed_one_lends_nothing_or_the_first_would_take_its_forks_along(first: Pool) -> None:
    with Pool(1) as second:
        second.submit(helpers.nothing).result(timeout=20)
        assert is_borrowed(second)
        first.shutdown()
        with Pool(1) as third:
            assert third.submit(helpers.square, 3).result(timeout=20) == 9
            assert not is_borrowed(third)


def test_where_no_descriptor_is_left_to_lend_both_pools_work(
    first: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2."""

    def refuse(_self: object, message: object, _numbers: object = ()) -> bool:
        if isinstance(message, _messages.Lend):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return tell(_self, message, _numbers)  # type: ignore[arg-type]

    tell = _control.ControlLink.tell
    monkeypatch.setattr(_control.ControlLink, "tell", refuse)
    monkeypatch.setattr(_control, "_BIRTH_S", 0.25)
    with Pool(1) as second:
        assert second.submit(helpers.square, 3).result(timeout=20) == 9
        assert not is_borrowed(second)
    assert first.submit(helpers.square, 4).result(timeout=20) == 16


def test_relative_entries_of_the_search_path_lead_where_they_lead_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_control, "_BIRTH_S", 20.0)
    for name in ("one", "two"):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "lib" / "found_by_relative_path.py").write_text(f"NAME = {name!r}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, "lib"])
    with contextlib.ExitStack() as pools:
        for name in ("one", "two"):
            monkeypatch.chdir(tmp_path / name)
            pool = pools.enter_context(Pool(1, preload=["found_by_relative_path"] if name == "two" else []))
            assert pool.submit(name_found).result(timeout=20) == name
            wait_until(lambda pool=pool: pool._client.control.was_heard)  # type: ignore[misc]
        assert is_borrowed(pool)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_module_that_was_written_meanwhile_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_there: bool
) -> None:
    monkeypatch.setattr(_control, "_BIRTH_S", 20.0)
    folder = tmp_path / "lib"
    if was_there:
        folder.mkdir()
    times = os.stat(folder if was_there else tmp_path)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])  # ahead of all that a supervisor looks for
    with Pool(1) as first:
        first.submit(helpers.nothing).result(timeout=20)
        wait_until(lambda: first._client.control is not None and first._client.control.was_heard)
        folder.mkdir(exist_ok=True)
        (folder / "found_by_relative_path.py").write_text("NAME = 'later'\n")
        os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if within the clock's resolution
        with Pool(1) as second:
            assert second.submit(name_found).result(timeout=20) == "later"
            assert is_borrowed(second)


@pytest.mark.parametrize("before", ["folder", "archive"])
@pytest.mark.parametrize("now", ["folder", "archive"])
def test_an_entry_of_the_search_path_may_be_put_in_place_of_another(
    before: str, now: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(kind: str, name: str) -> None:
        source = f"NAME = {name!r}\n"
        if kind == "folder":
            entry.mkdir()
            (entry / "found_by_relative_path.py").write_text(source)
        else:
            with zipfile.ZipFile(entry, "w") as archive:
                archive.writestr(f"{name}.py", name)  # so that what follows is elsewhere in each
                archive.writestr("found_by_relative_path.py", source)

    monkeypatch.setattr(_control, "_BIRTH_S", 20.0)
    entry = tmp_path / "lib.zip"
    put(before, "before")
    monkeypatch.setattr(sys, "path", [str(entry), *sys.path])
    with Pool(1) as first:
        first.submit(helpers.nothing).result(timeout=20)
        wait_until(lambda: first._client.control is not None and first._client.control.was_heard)
        entry.rename(tmp_path / "away")
        put(now, "now")
        with Pool(1) as second:
            assert second.submit(name_found).result(timeout=20) == "now"
            assert is_borrowed(second)


def test_a_finder_that_cannot_read_its_entry_any_more_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        path = str(tmp_path)

        def invalidate_caches(self) -> None:
            raise EOFError("the archive has been cut short")

    monkeypatch.setattr(sys, "path_importer_cache", {str(tmp_path): Finder()})
    _lending._forget_search_path()
    assert not sys.path_importer_cache


def test_it_goes_on_when_the_first_pool_ends(first: Pool) -> None:
    with Pool(1) as second:
        second.submit(helpers.nothing).result(timeout=20)
        gone = [supervisor_of(first), *supervisor_of(first).children()]
        running = second.submit(os.getpid)
        first.shutdown()
        assert running.result(timeout=20)
        supervisor = supervisor_of(second)
        assert seconds_until_gone([each for each in gone if each != supervisor]) < 10
        with pytest.raises(fdpool.WorkerLost):
            second.submit(os._exit, 3).result(timeout=20)
        assert second.submit(helpers.square, 3).result(timeout=20) == 9
        assert supervisor_of(second) == supervisor
    assert seconds_until_gone([supervisor]) < 10


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_killed_supervisor_is_its_own_pools_affair(
    first: Pool, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """H9."""
    with Pool(1) as second:
        second.submit(helpers.nothing).result(timeout=20)
        victim, other = (first, second) if which == "first" else (second, first)
        before = supervisor_of(other)
        workers = other.submit(os.getpid).result(timeout=20)
        supervisor_of(victim).kill()
        wait_until(lambda: victim.stats().supervisor_restarts == 1)
        assert victim.submit(helpers.square, 3).result(timeout=20) == 9
        assert other.submit(os.getpid).result(timeout=20) == workers
        assert supervisor_of(other) == before
        wait_until(lambda: "supervisor" in caplog.text)  # by a thread that others may overtake


def test_it_inherits_what_there_is_when_it_is_made(
    first: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment, working directory, umask, standard streams."""
    monkeypatch.setenv("FDPOOL_TEST", "set since")
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o027)
    stdout = os.dup(1)
    try:
        with open(tmp_path / "stdout", "wb") as file:
            os.dup2(file.fileno(), 1)
            here = (os.fstat(1).st_dev, os.fstat(1).st_ino)
        with Pool(1) as second:
            found = second.submit(what_a_task_finds).result(timeout=20)
            assert is_borrowed(second)
            second.submit(os.write, 1, b"said\n").result(timeout=20)
            second.submit(print, "printed").result(timeout=20)
            program = second.run(["sh", "-c", "echo $FDPOOL_TEST; umask"]).result(timeout=20)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.umask(umask)
    assert found == (str(tmp_path), "set since", 0o027, here)
    assert program.returncode == 0
    assert sorted((tmp_path / "stdout").read_text().split("\n")) == [
        "",
        "0027",
        "printed",
        "said",
        "set since",
    ]


def test_a_stream_that_is_closed_by_then_is_the_null_device() -> None:
    program = """if True:
        import os, fdpool
        from fdpool import _control
        _control._BIRTH_S = 20.0
        with fdpool.Pool(1) as first:
            first.submit(int).result()
            while not first._client.control.was_heard:
                pass
            os.close(1)
            with fdpool.Pool(1) as second:
                found = second.submit(os.readlink, "/proc/self/fd/1").result()
                os.write(2, f"{found} {second._client.control._is_child}".encode())
    """
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=False, timeout=60)
    assert done.stderr.decode() == "/dev/null False"


def test_where_something_differs_that_cannot_be_handed_over_it_is_fresh(
    first: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        with Pool(1) as second:
            assert second.submit(resource.getrlimit, resource.RLIMIT_NOFILE).result(timeout=20)[0] == soft - 1
            assert not is_borrowed(second)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setenv("PYTHONFDPOOLTEST", "1")
    with Pool(1) as second:
        second.submit(helpers.nothing).result(timeout=20)
        assert not is_borrowed(second)


def test_after_a_change_of_the_io_priority_it_is_fresh(first: Pool) -> None:
    me = psutil.Process()
    before = me.ionice()
    me.ionice(psutil.IOPRIO_CLASS_BE, 7)
    try:
        with Pool(1) as second:
            second.submit(helpers.nothing).result(timeout=20)
            [worker] = second.worker_pids()
            assert psutil.Process(worker).ionice() == (psutil.IOPRIO_CLASS_BE, 7)
            assert not is_borrowed(second)
    finally:
        me.ionice(before.ioclass, before.value if before.ioclass else None)
    with Pool(1) as third:
        third.submit(helpers.nothing).result(timeout=20)
        assert is_borrowed(third)


CONFINED = """if True:
    import ctypes, socket, sys, fdpool
    from fdpool import _control
    _control._BIRTH_S = 20.0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    make_sock = (ctypes.c_uint64 * 1)(1 << 9)  # LANDLOCK_ACCESS_FS_MAKE_SOCK, nowhere allowed
    rules = libc.syscall(444, make_sock, 8, 0)
    if rules < 0:
        print("no Landlock", end="")
        sys.exit()
    with fdpool.Pool(1) as first:
        first.submit(int).result()
        while not first._client.control.was_heard:
            pass
        if libc.syscall(446, rules, 0):
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        with fdpool.Pool(1) as second:
            made = second.submit(socket.socket(socket.AF_UNIX).bind, sys.argv[1])
            print(type(made.exception()).__name__, second._client.control._is_child, end="")
"""


def test_who_has_confined_itself_since_has_workers_that_are_confined(tmp_path: Path) -> None:
    """A fork of a supervisor that was started before would be out of the Landlock domain."""
    done = subprocess.run(
        [sys.executable, "-c", CONFINED, str(tmp_path / "made")], capture_output=True, check=False, timeout=60
    )
    if done.stdout == b"no Landlock":
        pytest.skip("this kernel has no Landlock")
    assert (done.stdout, done.stderr) == (b"PermissionError True", b"")


def test_a_pool_with_modules_of_its_own_lends_nothing_and_may_borrow(first: Pool) -> None:
    with Pool(1, preload=["this_is_none"]) as broken, pytest.raises(fdpool.PoolBroken, match="this_is_none"):
        broken.submit(helpers.nothing).result(timeout=20)
    with Pool(1, preload=["colorsys"]) as second:
        assert second.submit(has_colorsys).result(timeout=20)
        assert is_borrowed(second)
        assert second._client.control is not None
        assert second._client.control.likeness is None
    assert not first.submit(has_colorsys).result(timeout=20)


def test_where_the_first_ones_supervisor_does_not_answer_it_is_fresh(
    first: Pool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_control, "_BIRTH_S", 0.25)
    supervisor = supervisor_of(first)
    supervisor.send_signal(signal.SIGSTOP)
    try:
        with Pool(1) as second:
            assert second.submit(helpers.square, 3).result(timeout=20) == 9
            assert not is_borrowed(second)
    finally:
        supervisor.send_signal(signal.SIGCONT)
    # Who comes too late finds nobody, and goes.
    wait_until(lambda: first.submit(helpers.square, 2).result(timeout=20) == 4)
    wait_until(lambda: len(supervisor.children()) <= 1)
    assert "Traceback" not in capfd.readouterr().err


def test_pools_that_are_made_at_the_same_time_by_many_threads_all_work(first: Pool) -> None:
    results: list[int] = []

    def use_one(number: int) -> None:
        with Pool(1) as pool:
            results.append(pool.submit(helpers.square, number).result(timeout=30))

    threads = [threading.Thread(target=use_one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [n * n for n in range(12)]


CLIENT = """if True:
    import os, sys, time, fdpool
    from fdpool import _control
    _control._BIRTH_S = 20.0
    first = fdpool.Pool(1)
    first.submit(int).result()
    while not first._client.control.was_heard:
        time.sleep(0.001)
    second = fdpool.Pool(1)
    running = second.submit(time.sleep, 60)
    others = first.submit(time.sleep, 60)
    while not (running.running() and others.running()):
        time.sleep(0.001)
    assert not second._client.control._is_child
    if {ends}:
        others.terminate()
        first.shutdown()
    print(*(pool._client.control.pid for pool in (first, second) if pool._client.control), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("ends", [False, True], ids=["both there", "the first one ended"])
def test_nothing_outlives_a_killed_client(ends: bool) -> None:
    """H1."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT.format(ends=ends)], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    with client, client.stdout:
        tree = [psutil.Process(int(word)) for word in client.stdout.readline().split()]
        assert len(tree) == (1 if ends else 2)
        tree += [child for process in list(tree) for child in process.children(recursive=True)]
        client.kill()
        client.wait()
    assert seconds_until_gone(tree) < 10
