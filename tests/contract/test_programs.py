"""`Pool.run`: programs on handed descriptors."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import Fd, Pool
from fdpool.commands import CommandFailed, SpawnError
from tests.contract import helpers
from tests.contract.helpers_programs import warm_pool
from tests.process_state import wait_until


@pytest.fixture(params=["posix_spawn", "fork"], scope="module")
def pool(request: pytest.FixtureRequest) -> Any:
    """A pool whose workers start programs in either way; one for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fork":
            patch.setenv("FDPOOL_WITHOUT", "posix_spawn,pidfd")
        with warm_pool(2) as pool:
            yield pool


def test_a_program_reads_and_writes_the_callers_files(pool: Pool, text_file: Path, tmp_path: Path) -> None:
    with open(text_file) as source, open(tmp_path / "out", "wb") as target:
        done = pool.run(["tr", "a-z", "A-Z"], stdin=source, stdout=target).result()
    assert done.returncode == 0
    assert done.args == ["tr", "a-z", "A-Z"]
    assert (tmp_path / "out").read_text() == text_file.read_text().upper()


def test_a_program_speaks_on_a_socket(pool: Pool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            future = pool.run(["cat"], stdin=theirs, stdout=theirs)
        ours.sendall(b"over a socket")
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == b"over a socket"
        assert future.result().returncode == 0


def test_output_is_captured_and_input_given(pool: Pool) -> None:
    done = pool.run(["sh", "-c", "cat; echo err >&2"], input=b"in", capture_output=True).result()
    assert (done.stdout, done.stderr) == (b"in", b"err\n")
    done = pool.run(["cat"], input="ä", stdout=subprocess.PIPE, text=True, encoding="utf-8").result()
    assert done.stdout == "ä"
    done = pool.run("echo $0; echo two >&2", stdout=subprocess.PIPE, stderr=subprocess.STDOUT).result()
    assert done.stdout.endswith(b"two\n")


def test_a_program_that_is_stopped_and_continued_has_not_ended(pool: Pool) -> None:
    """Neither one of the pool's nor one of a task's: a stopped child is news to whoever waits for it, and no death."""
    argv = ["sh", "-c", "kill -STOP $$; echo on; exit 3"]
    ours = pool.run(argv, stdout=subprocess.PIPE)
    theirs = pool.submit(helpers.run_program, argv)

    def stopped() -> list[psutil.Process]:
        below = [
            child for pid in pool.worker_pids() for child in psutil.Process(pid).children(recursive=True)
        ]
        return [each for each in below if each.status() == psutil.STATUS_STOPPED]

    wait_until(lambda: len(stopped()) == 2)
    assert not ours.done()
    assert not theirs.done()
    for process in stopped():
        process.resume()
    done = ours.result(timeout=20)
    assert (done.returncode, done.stdout) == (3, b"on\n")
    assert theirs.result(timeout=20) == (3, b"on\n")


def test_without_stdin_a_program_reads_nothing(pool: Pool) -> None:
    assert pool.run(["cat"], capture_output=True).result().stdout == b""


def test_megabytes_on_both_streams_at_once_do_not_block(pool: Pool) -> None:
    code = "import os\nfor _ in range(64): os.write(1, b'o' * 65536); os.write(2, b'e' * 65536)"
    done = pool.run([sys.executable, "-c", code], capture_output=True).result()
    assert (len(done.stdout), len(done.stderr)) == (64 * 65536, 64 * 65536)


def test_cwd_and_env_are_the_programs_alone(pool: Pool, tmp_path: Path) -> None:
    done = pool.run(
        "pwd; echo $FDPOOL_TEST", cwd=tmp_path, env={"FDPOOL_TEST": "set"}, capture_output=True
    ).result()
    assert done.stdout.decode().split() == [str(tmp_path), "set"]
    assert pool.submit(os.getcwd).result() == os.getcwd()


def test_a_failing_program_is_an_error_only_with_check(pool: Pool) -> None:
    assert pool.run(["false"]).result().returncode == 1
    with pytest.raises(subprocess.CalledProcessError) as caught:
        pool.run("echo why >&2; exit 3", check=True, capture_output=True).result()
    assert (caught.value.returncode, caught.value.stderr) == (3, b"why\n")
    assert caught.value.completed.returncode == 3
    assert isinstance(caught.value, CommandFailed)
    done = pool.run("kill -9 $$").result()
    assert (done.returncode, done.signal_name) == (-9, "SIGKILL")


def test_a_program_has_its_three_descriptors_and_no_other(pool: Pool) -> None:
    done = pool.run(["ls", "-l", "/proc/self/fd"], capture_output=True).result()
    numbers = sorted(
        int(line.split(b" -> ")[0].split()[-1]) for line in done.stdout.splitlines() if b"->" in line
    )
    assert numbers == [0, 1, 2, 3]  # 3 is the folder that ls reads


def test_a_program_starts_with_default_signals(pool: Pool) -> None:
    """W2."""
    done = pool.run(["cat", "/proc/self/status"], capture_output=True).result()
    masks = dict(line.split(b":\t") for line in done.stdout.splitlines() if line.startswith(b"Sig"))
    assert int(masks[b"SigBlk"], 16) == 0
    # The C library's own two, 32 and 33, are whatever this process was started with.
    assert int(masks[b"SigIgn"], 16) & ~(0b11 << 31) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stdin": subprocess.PIPE}, ValueError),
        ({"stdin": 0, "input": b""}, ValueError),
        ({"capture_output": True, "stdout": 1}, ValueError),
        ({"stdout": subprocess.STDOUT}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": 10**400}, ValueError),
        ({"timeout": "5"}, TypeError),
        ({"grace": -1}, ValueError),
        ({"grace": None}, TypeError),
        ({"max_output": -1}, ValueError),
        ({"max_output": 2.5}, TypeError),
        ({"umask": -1}, ValueError),
        ({"umask": "022"}, TypeError),
        ({"nice": 1.5}, TypeError),
        ({"nice": "5"}, TypeError),
        ({"nice": -(2**31) - 1}, ValueError),
        ({"fds": {-1: 0}}, ValueError),
        ({"fds": {True: 0}}, TypeError),
        ({"fds": {0: 0}, "stdin": 0}, ValueError),
        ({"fds": {2**31: 0}}, ValueError),
        ({"fds": {5: subprocess.PIPE}}, ValueError),
        ({"fds": {5: "a name"}}, TypeError),
        ({"fds": {5: 1023}}, ValueError),
        ({"input": "text"}, TypeError),
        ({"input": b"bytes", "text": True}, TypeError),
        ({"input": 5}, TypeError),
        ({"input": [5]}, TypeError),
        ({"encoding": "no-such"}, LookupError),
        ({"rlimits": {"NOFILE": 3}}, ValueError),
        ({"rlimits": {99: 3}}, ValueError),
        ({"rlimits": {-1: 3}}, ValueError),
        ({"rlimits": {2**40: 3}}, ValueError),
        ({"rlimits": {resource.RLIMIT_NOFILE: (10, 5)}}, ValueError),
        ({"rlimits": {resource.RLIMIT_NOFILE: (resource.RLIM_INFINITY, 5)}}, ValueError),
        ({"rlimits": {resource.RLIMIT_NOFILE: -2}}, ValueError),
        ({"rlimits": {resource.RLIMIT_NOFILE: 2**63}}, ValueError),
        ({"stdin": "a name"}, TypeError),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_at_once(
    pool: Pool, options: Any, error: Any
) -> None:
    with pytest.raises(error):
        pool.run(["cat"], **options)
    with pytest.raises(ValueError):
        pool.run([])


def test_a_timeout_may_be_longer_than_the_kernel_can_be_asked_to_wait(pool: Pool) -> None:
    """As poll(2) counts milliseconds in an int: 24 days."""
    assert pool.run("echo done", timeout=3e7, grace=3e7, capture_output=True).result().stdout == b"done\n"
    assert (
        pool.pipeline(["echo done", "cat"], timeout=3e7, stdout=subprocess.PIPE).result().stdout == b"done\n"
    )


def test_a_file_to_file_loop_equals_the_shells(pool: Pool, tmp_path: Path) -> None:
    futures = []
    for n in range(20):
        (tmp_path / f"{n}").write_bytes(os.urandom(1000 * n))
        with open(tmp_path / f"{n}", "rb") as source, open(tmp_path / f"{n}.gz", "wb") as target:
            futures.append(pool.run(["gzip", "-nc"], stdin=source, stdout=target, check=True))
    for future in futures:
        future.result()
    for n in range(20):
        with open(tmp_path / f"{n}", "rb") as source:
            expected = subprocess.run(["gzip", "-nc"], stdin=source, capture_output=True, check=True).stdout
        assert (tmp_path / f"{n}.gz").read_bytes() == expected


# -- what cannot be started (X2) -------------------------------------------------------------------


def test_a_program_that_cannot_be_started_is_an_error_of_its_own(pool: Pool, tmp_path: Path) -> None:
    plain, empty = tmp_path / "plain", tmp_path / "empty"
    plain.write_text("not a program")
    empty.write_text("neither")
    empty.chmod(0o755)
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/no/such/interpreter\n")
    orphan.chmod(0o755)
    cases: list[tuple[Any, dict[str, Any], int, type, str]] = [
        (["no-such-program-here"], {}, errno.ENOENT, FileNotFoundError, "no such program in PATH"),
        (["./no-such"], {}, errno.ENOENT, FileNotFoundError, "No such file"),
        (["true"], {"cwd": tmp_path / "missing"}, errno.ENOENT, FileNotFoundError, "missing"),
        (["true"], {"cwd": plain}, errno.ENOTDIR, NotADirectoryError, "plain"),
        ([plain], {}, errno.EACCES, PermissionError, "Permission denied"),
        ([tmp_path], {}, errno.EACCES, PermissionError, "Permission denied"),
        ([empty], {}, errno.ENOEXEC, OSError, "Exec format error"),
        ([orphan], {}, errno.ENOENT, FileNotFoundError, "interpreter"),
        (["true", "x" * (1 << 18)], {}, errno.E2BIG, OSError, "too long"),
        (["true", "a\0b"], {}, errno.EINVAL, ValueError, "NUL"),
        (["true"], {"env": {"A": "a\0b"}}, errno.EINVAL, ValueError, "environment"),
        (["true"], {"env": {"A=B": "a"}}, errno.EINVAL, ValueError, "environment"),
        (["true"], {"env": {"": "a"}}, errno.EINVAL, ValueError, "environment"),
        (["true"], {"env": {"PATH": "/nowhere"}}, errno.ENOENT, FileNotFoundError, "PATH"),
        ([""], {}, errno.ENOENT, FileNotFoundError, "No such file"),
    ]
    futures = [pool.run(args, **options) for args, options, *_ in cases]
    for future, (args, options, number, kind, reason) in zip(futures, cases):
        with pytest.raises(SpawnError, match=reason) as caught:
            future.result()
        assert caught.value.errno == number, args
        assert isinstance(caught.value, kind)
        assert caught.value.may_have_run is False
        assert caught.value.in_cwd == ("cwd" in options)
        assert os.fsdecode(caught.value.filename) in (os.fsdecode(args[0]), "''")


def test_a_program_that_is_being_written_cannot_be_started(pool: Pool, tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    with open(busy, "wb") as file:
        file.write(Path("/bin/true").read_bytes())
        file.flush()
        busy.chmod(0o755)
        with pytest.raises(SpawnError) as caught:
            pool.run([busy]).result()
    assert caught.value.errno == errno.ETXTBSY


def test_failed_starts_leave_nothing_in_the_worker(pool: Pool) -> None:
    workers = {pool.submit(os.getpid).result() for _ in range(4)}
    before = {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in workers}
    for future in [pool.run(["no-such"], capture_output=True, fds={7: 0}) for _ in range(20)]:
        assert isinstance(future.exception(), SpawnError)
    pool.run(["true"]).result()
    for pid, count in before.items():
        # It may be looking at its own descriptors this moment, which takes one.
        wait_until(lambda pid=pid, count=count: len(os.listdir(f"/proc/{pid}/fd")) <= count)  # type: ignore[misc]
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


_LIST = """
import sys
from fdpool import Pool
with Pool(1, start_method=sys.argv[1]) as pool:
    print(pool.run(["ls", "/proc/self/fd"], capture_output=True, text=True).result().stdout.split())
"""


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_descriptor_beyond_the_limit_is_no_obstacle(start_method: str) -> None:
    """As one is that was inherited, after which the limit was lowered."""
    high = os.dup2(0, 200)
    command = [sys.executable, "-c", _LIST, start_method]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *command],
        pass_fds=[high],
        capture_output=True,
        check=True,
    )
    os.close(high)
    assert (done.stdout, done.stderr) == (b"['0', '1', '2', '3']\n", b"")


# -- descriptors by number (X1) --------------------------------------------------------------------


_SHOW = r"""
import os, sys
for fd in range(int(sys.argv[1])):
    try: print(fd, os.fstat(fd).st_ino)
    except OSError: pass
"""


def shown(output: bytes) -> dict[int, int]:
    return {int(fd): int(inode) for fd, inode in (line.split() for line in output.splitlines())}


def test_any_arrangement_of_numbers_reaches_the_program(pool: Pool, tmp_path: Path) -> None:
    files = [open(tmp_path / f"{n}", "wb") for n in range(6)]
    inodes = [os.fstat(file.fileno()).st_ino for file in files]
    dice = random.Random(1)
    futures = []
    for _ in range(12):
        # In a worker the descriptors get low numbers, so these collide with them, and with its channels.
        targets = dice.sample(range(3, 16), 6)
        futures.append(
            (
                targets,
                pool.run(
                    [sys.executable, "-SIc", _SHOW, "40"],
                    fds=dict(zip(targets, files)),
                    stdout=subprocess.PIPE,
                ),
            )
        )
    for targets, future in futures:
        found = shown(future.result().stdout)
        assert {fd: inode for fd, inode in found.items() if fd > 2} == dict(zip(targets, inodes))
    for file in files:
        file.close()
    assert pool.submit(os.getpid).result()


def test_one_descriptor_may_have_many_numbers_and_the_standard_ones_too(pool: Pool, tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        done = pool.run("echo one; echo two >&2; echo nine >&9", fds={1: log, 2: log, 9: log}).result()
    assert done.returncode == 0
    assert (tmp_path / "log").read_text() == "one\ntwo\nnine\n"


def test_what_a_task_left_inheritable_does_not_reach_a_program(pool: Pool) -> None:
    def leave_open() -> int:
        return os.dup2(0, 33, inheritable=True)

    for future in [pool.submit(leave_open) for _ in range(4)]:
        future.result()
    done = pool.run([sys.executable, "-SIc", _SHOW, "64"], capture_output=True).result()
    assert sorted(shown(done.stdout)) == [0, 1, 2]


def test_an_object_with_nothing_but_a_fileno_is_handed_over(pool: Pool, tmp_path: Path) -> None:
    class Log:
        def __init__(self, file: Any) -> None:
            self.file = file

        def fileno(self) -> int:
            return int(self.file.fileno())

    with open(tmp_path / "log", "wb") as file:
        pool.run("echo to the log", stdout=Log(file)).result()
        pool.run("echo and more >&8", fds={8: Fd(file)}).result()
    assert (tmp_path / "log").read_text() == "to the log\nand more\n"


# -- streams (X4, X5, X8) --------------------------------------------------------------------------


def test_output_beyond_the_cap_is_dropped_and_marked(pool: Pool) -> None:
    done = pool.run("yes out | head -c 1M; yes err | head -c 1M >&2", capture_output=True, max_output=1000)
    result = done.result()
    assert (len(result.stdout), len(result.stderr)) == (1000, 1000)
    assert result.truncated
    assert not pool.run("echo short", capture_output=True, max_output=6).result().truncated


def test_half_a_gibibyte_on_both_streams_at_once_is_read_and_capped(pool: Pool) -> None:
    script = "head -c 256M /dev/zero & head -c 256M /dev/zero >&2; wait"
    done = pool.run(script, capture_output=True, max_output=10_000).result()
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 10_000, 10_000)


def test_text_is_decoded_as_subprocess_does_it(pool: Pool) -> None:
    done = pool.run([r"printf", r"a\r\nb\n\303\244"], text=True, encoding="utf-8", capture_output=True)
    assert done.result().stdout == "a\nb\nä"
    broken = pool.run(["printf", r"\377"], encoding="utf-8", capture_output=True)
    with pytest.raises(UnicodeDecodeError):
        broken.result()
    lenient = pool.run(["printf", r"\377"], encoding="utf-8", errors="replace", capture_output=True)
    assert lenient.result().stdout == "\ufffd"
    cut = pool.run(["printf", r"\303\244\303\244"], encoding="utf-8", capture_output=True, max_output=3)
    assert cut.result().stdout == "ä"


def test_input_larger_than_a_pipe_may_be_left_unread(pool: Pool) -> None:
    data = os.urandom(3 << 20)
    assert pool.run(["cat"], input=data, stdout=subprocess.PIPE).result().stdout == data
    assert pool.run(["true"], input=data).result().returncode == 0
    assert pool.run(["head", "-c", "3"], input=data, stdout=subprocess.PIPE).result().stdout == data[:3]


def test_a_nonblocking_stream_of_the_callers_stays_nonblocking(pool: Pool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    pool.run("echo written", stdout=writing).result()
    assert os.get_blocking(writing) is False
    os.close(writing)
    assert os.read(reading, 100) == b"written\n"
    os.close(reading)


# -- what is asked of the program's surroundings (X9) ----------------------------------------------


def test_limits_niceness_umask_and_session_are_the_programs_alone(pool: Pool, tmp_path: Path) -> None:
    script = "ulimit -n; ulimit -Hc; nice; umask; touch made; cat /proc/self/stat"
    done = pool.run(
        script,
        cwd=tmp_path,
        umask=0o027,
        nice=3,
        rlimits={resource.RLIMIT_NOFILE: (50, 60), resource.RLIMIT_CORE: 0},
        new_session=True,
        text=True,
        stdout=subprocess.PIPE,
    ).result()
    files, core, nice, umask, status = done.stdout.splitlines()
    assert (files, core, int(nice), int(umask, 8)) == ("50", "0", os.nice(0) + 3, 0o027)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o640
    _, _, _, _, group, session, *_ = status.split()
    assert group == session
    after = pool.run("umask; nice; pwd; ulimit -n", stdout=subprocess.PIPE, text=True).result().stdout
    mask = os.umask(0)
    os.umask(mask)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert after.split() == [f"{mask:04o}", str(os.nice(0)), os.getcwd(), str(soft)]


def test_umask_and_cwd_alone_are_put_back_in_the_worker(pool: Pool, tmp_path: Path) -> None:
    for _ in range(4):
        pool.run(["touch", "made"], cwd=tmp_path, umask=0o077).result()
        (tmp_path / "made").unlink()
        assert pool.submit(os.getcwd).result() == os.getcwd()
        mask = os.umask(0)
        os.umask(mask)
        assert pool.run("umask", stdout=subprocess.PIPE).result().stdout == f"{mask:04o}\n".encode()


def test_a_limit_that_cannot_be_set_is_a_failed_start(pool: Pool) -> None:
    """Nobody may have more open files than fs.nr_open says, root included."""
    with pytest.raises(SpawnError, match="rlimits: Operation not permitted"):
        pool.run(["true"], rlimits={resource.RLIMIT_NOFILE: 2**40}).result()


def test_a_limit_may_be_none_at_all(pool: Pool) -> None:
    soft_only = (1 << 20, resource.RLIM_INFINITY)
    limits = {resource.RLIMIT_CPU: resource.RLIM_INFINITY, resource.RLIMIT_FSIZE: soft_only}
    done = pool.run(["cat", "/proc/self/limits"], rlimits=limits, text=True, stdout=subprocess.PIPE).result()
    lines = [line.split()[2:] for line in done.stdout.splitlines()]
    assert ["time", "unlimited", "unlimited", "seconds"] in lines
    assert ["size", str(1 << 20), "unlimited", "bytes"] in lines


def test_a_program_leads_a_process_group_of_its_own(pool: Pool) -> None:
    done = pool.run("echo $$; cut -d' ' -f5 /proc/$$/stat", stdout=subprocess.PIPE).result()
    pid, group = done.stdout.split()
    assert pid == group


def test_signals_that_the_worker_ignores_or_blocks_are_default_in_the_program(pool: Pool) -> None:
    def ignore_and_block() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    for future in [pool.submit(ignore_and_block) for _ in range(4)]:
        future.result()
    # With SIGCHLD ignored, statuses would be lost (M38).
    assert pool.run("exit 5").result().returncode == 5
    done = pool.run(["cat", "/proc/self/status"], capture_output=True).result()
    masks = dict(line.split(b":\t") for line in done.stdout.splitlines() if line.startswith(b"Sig"))
    assert int(masks[b"SigBlk"], 16) == 0
    assert int(masks[b"SigIgn"], 16) & ~(0b11 << 31) == 0

    def undo() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])

    for future in [pool.submit(undo) for _ in range(4)]:
        future.result()


def test_the_record_tells_time_and_resources(pool: Pool) -> None:
    done = pool.run([sys.executable, "-c", "sum(range(1_000_000))"]).result()
    assert done.wall_s > 0
    assert done.rusage.ru_utime > 0
    assert (done.timed_out, done.truncated, done.signal_name) == (False, False, None)


def test_the_time_of_a_program_has_its_start() -> None:
    with Pool(1) as pool:
        pool.submit(helpers.take_long_to_start).result()
        assert pool.run(["true"]).result().wall_s >= 0.05


def test_an_environment_is_exactly_what_was_given_and_the_mark(pool: Pool) -> None:
    done = pool.run(["/usr/bin/env"], env={"A": "1"}, stdout=subprocess.PIPE, text=True).result()
    names = [line.split("=")[0] for line in done.stdout.splitlines()]
    assert sorted(names) == ["A", "FDPOOL_WORKER"]


def test_what_is_not_given_is_as_it_was_at_the_pools_first_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def set_more() -> None:
        os.environ["FDPOOL_TEST_OF"] += ", initializer"

    show = ["sh", "-c", "echo $FDPOOL_TEST_OF; pwd"]
    before = Path.cwd()
    with Pool(1, initializer=set_more) as pool:
        monkeypatch.setenv("FDPOOL_TEST_OF", "first task")
        first = pool.run(show, stdout=subprocess.PIPE, text=True).result().stdout
        monkeypatch.setenv("FDPOOL_TEST_OF", "later")
        monkeypatch.chdir(tmp_path)
        assert pool.run(show, stdout=subprocess.PIPE, text=True).result().stdout == first
        now = pool.run(show, env=os.environ, cwd=Path.cwd(), stdout=subprocess.PIPE, text=True).result()
    assert first == f"first task, initializer\n{before}\n"
    assert now.stdout == f"later\n{tmp_path}\n"


def test_standard_output_that_is_not_given_is_what_it_was_at_the_pools_first_task(tmp_path: Path) -> None:
    saved = os.dup(1)
    try:
        with Pool(1) as pool:
            for name in ("first", "later"):
                with open(tmp_path / name, "wb") as file:
                    os.dup2(file.fileno(), 1)
                pool.run(["echo", name]).result()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert (tmp_path / "first").read_text() == "first\nlater\n"
    assert (tmp_path / "later").read_text() == ""


def test_thousands_of_queued_commands_need_no_descriptors(pool: Pool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    futures = [pool.run(["true"]) for _ in range(150)]
    assert len(os.listdir("/proc/self/fd")) <= before + 12
    assert {future.result().returncode for future in futures} == {0}
