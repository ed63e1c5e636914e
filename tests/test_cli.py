"""`fdpool run`, as a real process: what it prints, how it ends, and what it survives."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import fdpool
from fdpool import cli
from fdpool._run import loop
from tests.conftest import wait_until

COMMAND = [sys.executable, "-W", "error", "-m", "fdpool"]
HERE = Path(fdpool.__file__).parents[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def finish(command: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; one that does not end is killed, with all that it started."""
    given = options.pop("input", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if given is not None:
        options["stdin"] = subprocess.PIPE
    with subprocess.Popen(command, **pipes, start_new_session=True, **options) as process:
        try:
            stdout, stderr = process.communicate(given, timeout=100)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def run(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`fdpool run` with these arguments."""
    options = {"stdin": None if "input" in options else subprocess.DEVNULL, **options}
    return finish([*COMMAND, "run", *arguments], **options)


def in_shell(line: str) -> subprocess.CompletedProcess[bytes]:
    """A shell command in which `fdpool` is this one."""
    return finish(line.replace("fdpool", shlex.join(COMMAND), 1), shell=True)


def write_files(count: int) -> list[str]:
    names = [f"{n:04}.txt" for n in range(count)]
    for name in names:
        Path(name).write_text(f"contents of {name}\n")
    return names


# -- output ----------------------------------------------------------------------------------------


def test_each_file_is_the_standard_input_of_a_program() -> None:
    names = write_files(3)
    done = run("cat", ":::", *names, env={**os.environ, "TERM": "xterm"})
    assert done.stdout.decode() == "".join(f"contents of {name}\n" for name in names)
    assert done.stderr == b""  # and no bar, as it is no terminal
    assert done.returncode == 0


def test_output_is_whole_and_in_the_order_of_the_files_whoever_ends_first() -> None:
    write_files(2)
    os.mkfifo("gate")
    script = """
        echo begin $1
        echo errors of $1 >&2
        case $1 in 0000*) cat gate;; *) : >gate;; esac
        echo end
    """
    done = run("-j", "2", "sh", "-c", script, "sh", "{}", ":::", "0000.txt", "0001.txt")
    assert done.stdout == b"begin 0000.txt\nend\nbegin 0001.txt\nend\n"
    assert done.stderr == b"errors of 0000.txt\nerrors of 0001.txt\n"


def test_braces_become_the_name_in_every_argument_and_in_the_program() -> None:
    Path("tool").write_text("#!/bin/sh\necho $*\n")
    Path("tool").chmod(0o755)
    assert run("./{}", "<{}>", "{}{}", "-j", ":::", "tool").stdout == b"<tool> tooltool -j\n"


def test_a_double_dash_ends_our_own_options() -> None:
    write_files(1)
    Path("-odd").write_text("#!/bin/sh\ncat\n")
    Path("-odd").chmod(0o755)
    done = run("-j1", "--", "-odd", ":::", "0000.txt", env={**os.environ, "PATH": f".:{os.environ['PATH']}"})
    assert (done.stdout, done.stderr) == (b"contents of 0000.txt\n", b"")


@pytest.mark.parametrize("options", ["-0n 2", "-0n2", "-0kj 1 -n 2", "-0kj1 -n2"])
def test_short_options_may_share_a_dash_and_the_last_have_a_value(options: str) -> None:
    done = run(*options.split(), "echo", "-n", input=b"a\0b\0c\0")
    assert (done.stdout, done.stderr) == (b"a bc", b"")


def test_many_mebibytes_of_output_pass_through_little_memory() -> None:
    size = 64 << 20
    command = [*COMMAND, "run", "head", "-c", f"{size}", "/dev/zero", ":::", *write_files(2)]
    # Started by a small process: what a program weighs at its most includes, for the kernel, what the one that
    # forked it weighed, and that would be this test's.
    small = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(done.returncode)"
    )
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            [sys.executable, "-c", small, *command], stdout=subprocess.PIPE, stderr=errors
        ) as program:
            assert program.stdout is not None
            total = 0
            while block := os.read(program.stdout.fileno(), 1 << 20):
                total += len(block)
        errors.seek(0)
        assert (total, program.returncode) == (2 * size, 0)
        assert int(errors.read()) < size // 1024


def test_a_process_left_behind_that_goes_on_writing_is_not_waited_for() -> None:
    write_files(1)
    done = run("sh", "-c", "echo said; yes 98765.3 & exit 0", ":::", "0000.txt")
    assert done.stdout.startswith(b"said\n")
    assert done.returncode == 0
    assert not still_running("98765.3")


def test_hundreds_of_files_need_few_descriptors() -> None:
    names = write_files(600)
    done = in_shell("ulimit -n 64; fdpool run -j 4 cat ::: *.txt")
    assert done.stderr == b""
    assert done.stdout.decode() == "".join(f"contents of {name}\n" for name in names)


def test_more_workers_than_descriptors_allow_are_not_started() -> None:
    write_files(40)
    done = in_shell("ulimit -n 64; fdpool run -j 50 cat ::: *.txt")
    assert b"running 5 at a time: the limit of 64 open files does not allow for -j 50\n" in done.stderr
    assert len(done.stdout.splitlines()) == 40
    assert done.returncode == 0


# -- names -----------------------------------------------------------------------------------------


def test_names_come_from_standard_input_one_a_line() -> None:
    write_files(3)
    done = run("sh", "-c", "cat; echo $1", "sh", "{}", input=b"0000.txt\n\n0002.txt")
    assert done.stdout == b"contents of 0000.txt\n0000.txt\ncontents of 0002.txt\n0002.txt\n"


def test_names_may_hold_newlines_and_need_not_be_utf_8_where_they_end_with_nul() -> None:
    names = [b"two\nlines", b"caf\xe9 \xff"]
    for name in names:
        Path(os.fsdecode(name)).write_text("contents ")
    done = run("-0", "sh", "-c", 'cat; printf "%s" "$1"', "sh", "{}", input=b"\0".join(names) + b"\0")
    assert (done.stdout, done.stderr) == (b"contents two\nlinescontents caf\xe9 \xff", b"")


def test_names_need_not_be_utf_8() -> None:
    name = b"caf\xe9 \xff"
    Path(os.fsdecode(name)).write_text("latin\n")
    done = run("sh", "-c", 'cat; printf "%s" "$1"', "sh", "{}", ":::", name, b"\xff\n\x1b[2J")
    assert done.stdout == b"latin\n" + name
    assert done.stderr == rb"fdpool: \xff\n\x1b[2J: cannot open it: No such file or directory" + b"\n"


def test_a_name_with_nul_in_it_is_reported_with_advice() -> None:
    write_files(1)
    done = run("cat", input=b"0000.txt\0000\n0000.txt\n")
    assert done.stdout == b"contents of 0000.txt\n"
    assert b"-0 is for names that end with it" in done.stderr
    assert done.returncode == 1


def test_what_is_no_list_of_names_is_refused_soon_and_in_few_words() -> None:
    done = run("cat", input=b"0000.txt\0" * 200_000)  # as of `find -print0`, without -0
    assert done.stderr.startswith(
        b"fdpool: cannot read names from standard input: one has more than 1048576 bytes"
    )
    assert (len(done.stderr) < 200, done.returncode) == (True, 2)
    assert len(run("cat", input=b"0000.txt\0" * 20_000).stderr) < 20_000


@pytest.mark.parametrize("arguments", [("cat", ":::"), ("-0", "cat")])
def test_no_names_are_no_work_and_no_failure(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


def test_programs_start_and_output_comes_while_names_are_still_being_written() -> None:
    write_files(2)
    with subprocess.Popen([*COMMAND, "run", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        for name in ("0000.txt", "0001.txt"):
            program.stdin.write(f"{name}\n".encode())
            program.stdin.flush()
            assert program.stdout.readline() == f"contents of {name}\n".encode()
        program.stdin.close()
        assert program.wait(10) == 0


# -- files that are odd ----------------------------------------------------------------------------


def test_what_cannot_be_opened_is_reported_in_its_place_and_stops_nobody() -> None:
    write_files(2)
    Path("folder").mkdir()
    done = in_shell("fdpool run cat ::: 0000.txt missing folder 0001.txt 2>&1")
    assert done.stdout.decode().splitlines() == [
        "contents of 0000.txt",
        "fdpool: missing: cannot open it: No such file or directory",
        "fdpool: folder: cannot open it: Is a directory",
        "contents of 0001.txt",
    ]
    assert done.returncode == 1


def test_a_fifo_is_waited_for_by_its_own_program_alone() -> None:
    write_files(1)
    os.mkfifo("fifo")
    # The second program is the first one's writer.
    script = "case $1 in fifo) cat;; *) echo through the fifo >fifo; echo written;; esac"
    done = run("-j", "2", "sh", "-c", script, "sh", "{}", ":::", "fifo", "0000.txt")
    assert (done.stdout, done.returncode) == (b"through the fifo\nwritten\n", 0)


def test_a_pipe_that_has_lost_its_writer_is_at_its_end() -> None:
    assert in_shell(": | fdpool run wc -c ::: /dev/stdin /dev/stdin").stdout.split() == [b"0", b"0"]


# -- failures --------------------------------------------------------------------------------------


def test_a_program_that_fails_is_named_and_stops_nobody() -> None:
    names = write_files(3)
    script = "cat; case $1 in 0000*) exit 3;; 0001*) kill -SEGV $$;; esac"
    done = run("sh", "-c", script, "sh", "{}", ":::", *names)
    assert done.stdout.decode() == "".join(f"contents of {name}\n" for name in names)
    assert done.stderr.decode().splitlines() == [
        "fdpool: 0000.txt: sh exited with code 3",
        "fdpool: 0001.txt: sh was killed by SIGSEGV",
    ]
    assert done.returncode == 1


def test_a_program_that_kills_its_worker_costs_only_its_own_file() -> None:
    names = write_files(6)
    script = "cat; case $1 in 0000*) kill -KILL $PPID;; esac"
    done = run("-j", "1", "sh", "-c", script, "sh", "{}", ":::", *names)
    assert done.stdout.decode() == "".join(f"contents of {name}\n" for name in names)
    assert done.stderr.startswith(b"fdpool: 0000.txt: worker ")
    assert done.stderr.count(b"\n") == 1
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("no-such-program", "cannot find the program no-such-program"),
        ("./missing", "cannot find the program ./missing"),
        ("./0000.txt", "cannot run ./0000.txt: it is not executable"),
        ("./folder", "cannot run ./folder: it is a directory"),
    ],
)
def test_a_program_that_cannot_be_executed_is_said_at_once(
    program: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_files(1)
    Path("folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", program, ":::", "0000.txt"])
    assert capfd.readouterr().err.splitlines()[-1] == f"fdpool run: error: {reason}"
    assert ended.value.code == 2


def test_a_program_that_turns_out_not_to_be_one_fails_for_its_file() -> None:
    write_files(2)
    Path("0000.txt").chmod(0o755)
    done = run("./{}", ":::", "0000.txt", "0001.txt", "./0002.txt")
    assert done.stderr.decode().splitlines() == [
        "fdpool: 0000.txt: cannot run ./0000.txt: Exec format error",
        "fdpool: 0001.txt: cannot run ./0001.txt: Permission denied",
        "fdpool: ./0002.txt: cannot open it: No such file or directory",
    ]
    assert done.returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "run",
        "run ::: a",
        "run -j 0 cat",
        "run -j many cat",
        "run -j",
        "run -0 cat ::: a",
        "run --odd cat",
        "go",
    ],
)
def test_bad_usage_is_explained_with_status_2(arguments: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    assert capfd.readouterr().err.startswith("usage: fdpool")
    assert ended.value.code == 2


def test_help_and_version_are_there(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", "--help"], ["--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    said = capfd.readouterr().out
    assert "{} stands for the file's name" in said
    assert said.endswith(f"\nfdpool {fdpool.__version__}\n")


# -- standard streams ------------------------------------------------------------------------------


def still_running(text: str) -> list[psutil.Process]:
    """Processes that have `text` in their command line."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if any(text in argument for argument in each.info["cmdline"] or ())]


def is_alive(process: psutil.Process) -> bool:
    """False for a zombie too: whoever became its parent may take its time."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_who_reads_no_further_ends_it_quietly_and_at_once() -> None:
    write_files(20)
    script = "cat; case $1 in 0000*) ;; *) exec sleep 98765.4;; esac"
    line = f"fdpool run -j 2 sh -c {shlex.quote(script)} sh {{}} ::: *.txt"
    assert in_shell(line + " | head -c 5").stdout == b"conte"
    # Here a complaint is what is said first.
    done = in_shell(f"{line.replace(':::', '::: missing')} 2>&1 | :")
    assert (done.stdout, done.stderr) == (b"", b"")
    assert not still_running("98765.4")


def test_output_that_cannot_be_written_ends_it_with_the_reason() -> None:
    write_files(50)
    done = in_shell("fdpool run cat ::: *.txt > /dev/full")
    assert done.stderr == b"fdpool: cannot write to standard output: No space left on device\n"
    assert done.returncode == 1


def test_a_standard_output_that_does_not_wait_is_waited_for() -> None:
    """X8: O_NONBLOCK is shared by all who hold the pipe."""
    write_files(1)
    read, write = os.pipe()
    os.set_blocking(write, False)
    command = [*COMMAND, "run", "head", "-c", "300000", "/dev/zero", ":::", "0000.txt"]
    with subprocess.Popen(command, stdout=write) as program:
        os.close(write)
        with open(read, "rb") as output:
            assert len(output.read()) == 300_000
    assert program.returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_never_mistaken_for_what_is_opened(closed: str) -> None:
    """R2: the program's own three are right, and no channel of the pool lands on 0 to 2."""
    names = write_files(4)
    script = """
        cat >"$1.copy"; echo >&2
        for pid in $PPID $(cut -d ' ' -f 4 /proc/$PPID/stat); do
            for fd in 0 1 2; do readlink /proc/$pid/fd/$fd; done
        done >"$1.streams"
    """
    done = in_shell(f"fdpool run sh -c {shlex.quote(script)} sh {{}} ::: *.txt {closed}")
    assert done.returncode == 0
    for name in names:
        assert Path(f"{name}.copy").read_text() == f"contents of {name}\n"
        streams = Path(f"{name}.streams").read_text().splitlines()
        assert len(streams) == 6
        assert not [each for each in streams if each.startswith(("socket", "anon_inode", "/tmp"))], streams


def test_bad_usage_of_the_real_command_ends_with_status_2_whatever_is_closed() -> None:
    done = in_shell("fdpool run :::")
    assert done.stderr.endswith(b"fdpool run: error: no PROGRAM given\n")
    assert done.returncode == 2
    assert in_shell("fdpool run ::: <&- >&- 2>&-").returncode == 2
    done = in_shell("fdpool exec 2>&-")
    assert (done.stdout, done.returncode) == (b"", 2)


def test_names_cannot_come_from_a_closed_standard_input() -> None:
    done = in_shell("fdpool run cat <&-")
    assert done.stderr == b"fdpool: cannot read names from standard input: Bad file descriptor\n"
    assert done.returncode == 2


def test_output_to_a_closed_standard_output_is_a_failure_that_is_told() -> None:
    write_files(1)
    done = in_shell("fdpool run cat ::: 0000.txt >&-")
    assert done.stderr == b"fdpool: cannot write to standard output: Bad file descriptor\n"
    assert done.returncode == 1


# -- the terminal ----------------------------------------------------------------------------------


def on_terminal(*arguments: str, columns: int = 80, output: bool = False) -> str:
    """What `fdpool run` writes to a terminal that is its standard error and, if it is to be, its standard output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": theirs}
    options["env"] = {**os.environ, "TERM": "xterm"}
    if output:
        options["stdout"] = theirs
    with subprocess.Popen([*COMMAND, "run", *arguments], **options):
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 65536):
                seen += block
        except OSError:
            pass  # EIO: the last holder of the other end has closed it
    os.close(ours)
    return seen.decode()


def test_a_terminal_shows_a_bar_that_gives_way_to_messages() -> None:
    names = write_files(3)
    seen = on_terminal("-j1", "cat", ":::", *names, "missing")
    drawn = [line for line in seen.replace("\x1b[K", "").split("\r") if line.strip()]
    assert drawn[0] == "[" + "." * 30 + "] 0 of 4 files"
    assert "fdpool: missing: cannot open it: No such file or directory" in drawn
    assert drawn[-1] == "[" + "#" * 30 + "] 4 of 4 files, 1 failed"
    assert seen.endswith("\r\n")


def test_the_bar_is_not_written_over_a_line_that_a_program_has_not_ended() -> None:
    seen = on_terminal("-j1", "sh", "-c", "printf shown; exit 3", ":::", "/dev/null", output=True)
    assert "shown\r\nfdpool: /dev/null: sh exited with code" in seen
    seen = on_terminal("-j1", "printf", "shown", ":::", *write_files(2), output=True)
    assert seen.count("shown\r\n\r[") == 2
    assert on_terminal("-j1", "echo", "shown", ":::", *write_files(2), output=True).count("shown\r\n\r[") == 2


def test_the_bar_fits_into_a_narrow_terminal() -> None:
    seen = on_terminal("cat", ":::", *write_files(3), columns=20)
    assert max(len(line) for line in seen.replace("\x1b[K", "").split("\r")) < 20


def test_no_program_is_stopped_for_asking_on_the_terminal() -> None:
    ours, theirs = pty.openpty()
    controlled = 'exec <"$0"; exec "$@"'  # the terminal that the leader of a session opens first is its own
    asks = "(read password </dev/tty) || echo no terminal; read line; echo got $line"
    with subprocess.Popen(
        ["sh", "-c", controlled, os.ttyname(theirs), *COMMAND, "run", "sh", "-c", asks, ":::", "/dev/stdin"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as program:
        os.write(ours, b"typed\n")
        try:
            output, _ = program.communicate(timeout=20)
        finally:
            program.kill()
    os.close(theirs)
    os.close(ours)
    assert (output, program.returncode) == (b"no terminal\ngot typed\n", 0)


@pytest.mark.usefixtures("heeding_the_terminal")
@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_stops_everything_at_once(twice: bool) -> None:
    write_files(50)
    script = ': >"$1.begun"; sleep 1000 & exec sleep 1000'
    with subprocess.Popen(
        [*COMMAND, "run", "-j", "2", "sh", "-c", script, "sh", "{}", ":::", *sorted(os.listdir())],
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as program:
        wait_until(lambda: Path("0000.txt.begun").exists() and Path("0001.txt.begun").exists())
        client = psutil.Process(program.pid)
        wait_until(lambda: len(client.children(recursive=True)) >= 7)
        tree = client.children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: the foreground group
        if twice:
            os.killpg(program.pid, signal.SIGINT)
        assert program.wait(10) == 130
        assert program.stderr is not None
        assert program.stderr.read() == b""
    assert not any(process.is_running() for process in tree)


@pytest.mark.usefixtures("heeding_the_terminal")
def test_a_second_ctrl_c_does_not_disturb_what_the_first_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def interrupted_twice(*_: object) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            said.append("cleared up")
        return 130

    monkeypatch.setattr(loop, "run_all", interrupted_twice)
    assert cli.main(["run", "cat", ":::"]) == 130
    assert said == ["cleared up"]


def test_it_may_be_called_in_any_thread() -> None:
    ended = []
    thread = threading.Thread(target=lambda: ended.append(cli.main(["run", "true", ":::"])))
    thread.start()
    thread.join()
    assert ended == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_it_was_started_with_ignored_it_ignores(number: signal.Signals) -> None:
    """As POSIX's tools do: a script's `&` has them ignore SIGINT, and nohup SIGHUP."""
    write_files(2)
    script = ': >"$1.begun"; until test -e go; do sleep 0.05; done; echo done'
    before = signal.signal(number, signal.SIG_IGN)
    try:
        program = subprocess.Popen(
            [*COMMAND, "run", "-j", "2", "sh", "-c", script, "sh", "{}", ":::", *sorted(os.listdir())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    finally:
        signal.signal(number, before)
    with program:
        wait_until(lambda: Path("0000.txt.begun").exists() and Path("0001.txt.begun").exists())
        for _ in range(2):
            os.killpg(program.pid, number)
        Path("go").touch()
        output, errors = program.communicate(timeout=20)
    assert (output, errors, program.returncode) == (b"done\ndone\n", b"", 0)


def test_killed_it_leaves_nothing() -> None:
    write_files(1)
    script = ': >"$1.begun"; setsid sleep 1000 & exec sleep 1000'
    command = [*COMMAND, "run", "sh", "-c", script, "sh", "{}", ":::", "0000.txt"]
    with subprocess.Popen(command) as program:
        wait_until(Path("0000.txt.begun").exists)
        client = psutil.Process(program.pid)
        wait_until(lambda: len(client.children(recursive=True)) >= 4)
        tree = client.children(recursive=True)
        program.kill()
    wait_until(lambda: not any(is_alive(process) for process in tree), limit_s=10.0)
