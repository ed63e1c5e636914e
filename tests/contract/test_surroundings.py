"""Odd surroundings: no standard streams, a huge limit of open files or a small one, orphans, other reapers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_program(source: str, tmp_path: Path, shell: str = 'exec "$@"', limit_s: float = 60) -> str:
    """Run a program of its own, started by a line of shell; what it has written into the file `said`."""
    script, said = tmp_path / "program.py", tmp_path / "said"
    # What it raises is said in the same way: it may have no stderr.
    body = textwrap.indent(textwrap.dedent(source), "    ")
    script.write_text(
        f"import sys, traceback\ntry:\n{body}\nexcept BaseException:\n"
        "    open(sys.argv[1], 'w').write(traceback.format_exc())\n"
    )
    subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, str(script), str(said)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=limit_s,
        check=False,
    )
    return said.read_text()


def test_a_daemon_without_standard_streams_can_use_a_pool(tmp_path: Path) -> None:
    """R2: the numbers 0 to 2 are free in the client, and nothing of the pool's comes to lie there, on either side."""
    source = """
        import os, sys, tempfile, fdpool
        from tests.contract import helpers
        from tests.process_state import wait_until  # another thread may just have moved a descriptor up from there

        def low(numbers):
            return sorted(what for number, what in numbers.items() if number <= 2)

        def upper(file):
            return file.read().upper()

        said = sys.argv[1]
        before = low(helpers.open_numbers())  # what lists the folder, for a moment
        with fdpool.Pool(2) as pool:
            assert pool.submit(abs, -1).result(30) == 1
            wait_until(lambda: low(helpers.open_numbers()) == before)
            large = pool.submit(bytearray, 1_000_000).result(30)  # a mapping has a descriptor
            wait_until(lambda: low(helpers.open_numbers()) == before)
            file = tempfile.TemporaryFile("w+")
            file.write("text")
            file.seek(0)
            assert pool.submit(upper, file).result(30) == "TEXT"
            file.close()
            wait_until(lambda: low(helpers.open_numbers()) == before)
            assert low(pool.submit(helpers.open_numbers).result(30)) == [os.devnull] * 3
            done = pool.run(["sh", "-c", "echo out; echo err >&2"], capture_output=True).result(30)
            assert (done.stdout, done.stderr) == (b"out\\n", b"err\\n")
            assert pool.submit(print, "nobody hears").result(30) is None
            with pool.submit(open, "/etc/passwd").result(30) as got:
                assert got.read()
        with open(said, "w") as end:
            end.write("done")
        """
    assert run_program(source, tmp_path, 'exec "$@" <&- >&- 2>&-') == "done"


def test_a_huge_limit_of_open_files_costs_no_time(tmp_path: Path) -> None:
    """R3, with as many as are allowed here: closing what was inherited takes as long as there is something open."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    source = f"""
        import resource, sys, fdpool
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        with fdpool.Pool(2) as pool:
            assert pool.submit(pow, 3, 2).result(30) == 9
            assert pool.run(["true"]).result(30).returncode == 0
        open(sys.argv[1], "w").write("done")
        """
    begun = time.monotonic()
    assert run_program(source, tmp_path, limit_s=30) == "done"
    assert time.monotonic() - begun < 15  # one close(2) for each possible number takes a minute


def test_a_small_limit_of_open_files_is_named_where_a_pool_is_too_large_for_it(tmp_path: Path) -> None:
    """S14, smaller: as 300 workers are under the 256 files that macOS allows."""
    source = """
        import resource, sys, time, fdpool
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        said = []
        with fdpool.Pool(75) as pool:
            futures = []
            for _ in range(75):
                try:
                    futures.append(pool.submit(time.sleep, 0.2))
                except (fdpool.PoolBroken, OSError) as error:
                    said.append(str(error))
            for future in futures:
                error = future.exception(60)
                if error is not None:
                    said.append(str(error))
        assert all("open files" in each for each in said), said
        open(sys.argv[1], "w").write("done")
        """
    assert run_program(source, tmp_path) == "done"


def test_the_pool_leaves_the_orphans_of_its_program_alone(tmp_path: Path) -> None:
    """As in a container, where the program is the parent of whatever loses its own (S12)."""
    source = """
        import ctypes, os, signal, subprocess, sys, psutil, fdpool

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        orphan = int(subprocess.check_output(["sh", "-c", "sleep 1000 >/dev/null & echo $!"]))
        assert psutil.Process(orphan).ppid() == os.getpid()

        def leave_behind():
            return int(subprocess.check_output(["sh", "-c", "setsid sleep 1000 >/dev/null & echo $!"]))

        with fdpool.Pool(2) as pool:
            left = pool.submit(leave_behind).result(30)
            os.kill(pool.worker_pids()[0], signal.SIGKILL)
            assert pool.submit(pow, 3, 2).result(30) == 9
        assert not psutil.pid_exists(left)
        assert psutil.Process(orphan).status() != psutil.STATUS_ZOMBIE
        os.kill(orphan, signal.SIGKILL)
        assert os.waitpid(-1, 0) == (orphan, signal.SIGKILL)
        assert not psutil.Process().children()
        open(sys.argv[1], "w").write("done")
        """
    assert run_program(source, tmp_path) == "done"


def test_a_program_that_adopts_orphans_reaps_the_supervisor_that_one_of_its_pools_has_borrowed(
    tmp_path: Path,
) -> None:
    """As process 1 of a container (S12): the lender is gone by then."""
    source = """
        import ctypes, os, sys, time, psutil, fdpool
        from fdpool import _control

        _control._BIRTH_S = 20.0
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        with fdpool.Pool(1) as first:
            first.submit(int).result(30)
            while not first._client.control.was_heard:
                time.sleep(0.001)
            second = fdpool.Pool(1)
            second.submit(int).result(30)
            assert not second._client.control._is_child
            borrowed = psutil.Process(second._client.control.pid)
        assert borrowed.ppid() == os.getpid()
        second.shutdown()
        assert not psutil.Process().children(), psutil.Process().children()
        open(sys.argv[1], "w").write("done")
        """
    assert run_program(source, tmp_path) == "done"


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_what_a_program_ignores_or_blocks_its_workers_and_their_programs_do_not(
    start_method: str, tmp_path: Path
) -> None:
    """W2: by signal.signal, and by C code that Python knows nothing of. Those that Python ignores, workers do."""
    source = f"""
        import ctypes, signal, sys, fdpool

        def own(status):
            return [line for line in status.splitlines() if line.startswith(("SigBlk", "SigIgn"))]

        def look():
            return own(open("/proc/self/status").read())

        ignore = ctypes.CDLL(None).signal
        ignore.argtypes, ignore.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGUSR1, signal.SIGQUIT):
            ignore(number, 1)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM])
        with fdpool.Pool(1, start_method={start_method!r}) as pool:
            worker = pool.submit(look).result(30)
            done = pool.run(["cat", "/proc/self/status"], capture_output=True).result(30)
        internal = 0b11 << 31  # the C library's own two
        python = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
        for lines, ignored in ((worker, python), (own(done.stdout.decode()), 0)):
            masks = [int(line.split()[1], 16) & ~internal for line in lines]
            assert masks == [0, ignored], (lines, ignored)
        open(sys.argv[1], "w").write("done")
        """
    assert run_program(source, tmp_path) == "done"


def test_somebody_else_may_reap_the_supervisor(tmp_path: Path) -> None:
    """W2, S13: a library that waits for any child, and SIGCHLD ignored, which has the kernel reap."""
    source = """
        import os, signal, sys, threading, time, fdpool

        def reap():
            while not stop.wait(0.001):
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    pass

        stop = threading.Event()
        thread = threading.Thread(target=reap)
        thread.start()
        for ignored in (False, True):
            if ignored:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            with fdpool.Pool(2) as pool:
                assert pool.submit(pow, 3, 2).result(30) == 9
                os.kill(pool.worker_pids()[0], signal.SIGKILL)
                assert pool.submit(pow, 3, 3).result(30) == 27
                assert pool.run(["sh", "-c", "exit 5"]).result(30).returncode == 5
        stop.set()
        thread.join()
        open(sys.argv[1], "w").write("done")
        """
    assert run_program(source, tmp_path) == "done"
