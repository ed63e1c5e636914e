"""The options of `fdpool run`, as real processes: each by itself, together, and when something goes wrong."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import fdpool
from fdpool import cli
from tests.conftest import wait_until
from tests.test_cli import COMMAND, finish, in_shell, is_alive, run, still_running, write_files

HERE = Path(fdpool.__file__).parents[1]
HEADER = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tAttempts\tCommand"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def log_lines(name: str = "log") -> list[list[str]]:
    """The fields of each line of a log but the first."""
    head, *lines = Path(name).read_text().splitlines()
    assert head == HEADER
    return [line.split("\t") for line in lines]


def leftovers() -> list[str]:
    return [name for name in os.listdir() if name.startswith(".")]


# -- bad usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("-n 0", "-n must be at least 1, not 0"),
        ("--retries=-1", "--retries must be at least 0, not -1"),
        ("--timeout 0", "--timeout must be a number of seconds above 0, not 0"),
        ("--timeout nan", "--timeout must be a number of seconds above 0, not nan"),
        ("--timeout inf", "--timeout must be a number of seconds above 0, not inf"),
        ("--pipe -n 2", "--pipe hands one file over, and -n gives names as arguments"),
        ("--resume", "--resume needs --joblog, to know what has succeeded"),
        ("--dry-run --json", "--dry-run prints commands, and --json what became of them"),
        ("--no-clobber", "--no-clobber is for --out and --err"),
        ("-n 2 --out {}", "--out cannot be named after a file with -n, as there are several; {#} is the job's number"),
        ("--err {%}", "--err cannot be named after a place, which serves many jobs; {#} is the job's number"),
        ("--halt later", "--halt later: it is now or soon, and may go on with ,fail=N ,fail=P% or ,success=N"),
        ("--halt now,fail=0%", "--halt now,fail=0%: a share of failures is from 1% to 100%, not 0%"),
        ("-k --as-completed", "argument --as-completed: not allowed with argument -k/--keep-order"),
        ("-n 2 -- ./{}", "the PROGRAM cannot be named after a file with -n: there are several"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    options: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *options.split(), "cat", ":::", "a"])
    assert capfd.readouterr().err.splitlines()[-1] == f"fdpool run: error: {reason}"
    assert ended.value.code == 2


def test_the_help_explains_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    said = capfd.readouterr().out
    for option in (
        "--out",
        "--no-pipe",
        "--halt",
        "--joblog",
        "--resume",
        "--retries",
        "{/.}",
        "soon,fail=P%",
    ):
        assert option in said


# -- order -----------------------------------------------------------------------------------------


def test_as_completed_prints_whole_jobs_as_they_end() -> None:
    write_files(2)
    os.mkfifo("gate")
    script = "echo begin $1; case $1 in 0000*) cat gate;; *) : ;; esac; echo end"
    command = [*COMMAND, "run", "-j", "2", "--as-completed", "sh", "-c", script, "sh", "{}", ":::"]
    with subprocess.Popen([*command, "0000.txt", "0001.txt"], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        first = [program.stdout.readline() for _ in range(2)]
        Path("gate").write_text("")  # only now the other may end
        assert [*first, *program.stdout] == [b"begin 0001.txt\n", b"end\n", b"begin 0000.txt\n", b"end\n"]
    assert program.returncode == 0


# -- names as arguments ----------------------------------------------------------------------------


def test_so_many_names_become_the_arguments_of_one_start_with_nothing_to_read() -> None:
    done = run("-n", "2", "sh", "-c", 'echo "$# $*"; cat', "sh", input=b"a\nb b\nc\n")
    assert (done.stdout, done.stderr, done.returncode) == (b"2 a b b\n1 c\n", b"", 0)


def test_names_stand_where_the_braces_do() -> None:
    assert run("-n", "3", "echo", "x={/.}", "and", "{#}", ":::", "d/a.c", "b.c").stdout == b"x=a x=b and 1\n"


def test_without_pipe_nothing_is_opened_and_the_name_comes_at_the_end() -> None:
    done = run("--no-pipe", "sh", "-c", "cat; echo $1", "sh", ":::", "missing", "0001.txt")
    assert (done.stdout, done.returncode) == (b"missing\n0001.txt\n", 0)


def test_a_name_with_nul_in_it_is_reported_where_it_is_an_argument_too() -> None:
    done = run("-n", "2", "echo", input=b"a\nb\0c\nd\n")
    assert done.stdout == b"d\n"
    assert done.stderr.startswith(b"fdpool: a and 1 more: there is NUL in this name")


def test_programs_that_run_together_have_different_places() -> None:
    write_files(6)
    script = 'mkdir "place$1" || exit 1; echo "$1"; rmdir "place$1"'
    done = run("-j", "2", "sh", "-c", script, "sh", "{%}", ":::", *sorted(os.listdir()))
    assert done.stderr == b""
    assert set(done.stdout.split()) <= {b"1", b"2"}
    assert len(done.stdout.split()) == 6


# -- dry run ---------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_a_shell_would_run_and_touches_nothing() -> None:
    Path("it's a.txt").write_text("one\n")
    Path("b.txt").write_text("two\n")
    before = sorted(os.listdir())
    arguments = ["--out", "{.}.up", "--joblog", "log", "tr", "a-z", "A-Z", ":::", "it's a.txt", "b.txt"]
    done = run("--dry-run", *arguments)
    assert done.stdout.splitlines()[1] == b"tr a-z A-Z < b.txt > b.up"
    assert sorted(os.listdir()) == before
    assert in_shell(done.stdout.decode()).returncode == 0
    by_shell = {name: Path(name).read_text() for name in ("it's a.up", "b.up")}
    for name in by_shell:
        Path(name).unlink()
    assert run(*arguments).returncode == 0
    assert (
        {name: Path(name).read_text() for name in by_shell}
        == by_shell
        == {"it's a.up": "ONE\n", "b.up": "TWO\n"}
    )


def test_a_dry_run_waits_for_names_also_where_reading_them_does_not() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    program = subprocess.Popen([*COMMAND, "run", "--dry-run", "cat"], stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    assert program.stdout is not None
    with program.stdout as said:
        os.write(writing, b"a\n")
        assert said.readline() == b"cat < a\n"
        waits = psutil.Process(program.pid)
        before = sum(waits.cpu_times()[:2])
        time.sleep(0.5)
        spent = sum(waits.cpu_times()[:2]) - before
        os.close(writing)
    assert program.wait(20) == 0
    assert spent < 0.05


def test_a_dry_run_leaves_out_what_the_log_says_is_done_and_does_not_write_to_it() -> None:
    write_files(2)
    assert run("--joblog", "log", "cat", ":::", "0000.txt").returncode == 0
    before = Path("log").read_bytes()
    done = run("--dry-run", "--joblog", "log", "--resume", "cat", ":::", "0000.txt", "0001.txt")
    assert done.stdout == b"cat < 0001.txt\n"
    assert Path("log").read_bytes() == before


# -- retries and time ------------------------------------------------------------------------------


def test_what_fails_is_tried_again_on_a_file_read_from_its_start_and_only_the_last_is_shown() -> None:
    write_files(2)
    script = 'cat; echo x >>"$1.tries"; test $(wc -l <"$1.tries") = 3 || { echo no >&2; exit 4; }'
    done = run(
        "--retries", "2", "--joblog", "log", "sh", "-c", script, "sh", "{}", ":::", "0000.txt", "0001.txt"
    )
    assert done.stdout == b"contents of 0000.txt\ncontents of 0001.txt\n"
    assert (done.stderr, done.returncode) == (b"", 0)
    assert [fields[6:9] for fields in log_lines()] == [["0", "0", "3"]] * 2


def test_a_job_that_fails_every_time_says_how_often() -> None:
    write_files(1)
    done = run("--retries", "1", "sh", "-c", "echo x >>tries; exit 4", ":::", "0000.txt")
    assert done.stderr == b"fdpool: 0000.txt: sh exited with code 4 (attempt 2)\n"
    assert Path("tries").read_text() == "x\nx\n"


def test_a_job_whose_worker_dies_is_tried_again() -> None:
    write_files(1)
    done = run(
        "--retries", "1", "sh", "-c", "test -e once || { : >once; kill -KILL $PPID; }; cat", ":::", "0000.txt"
    )
    assert (done.stdout, done.stderr) == (b"contents of 0000.txt\n", b"")


def test_what_was_never_started_is_not_tried_again() -> None:
    Path("empty").write_text("")
    Path("empty").chmod(0o755)
    done = run("--retries", "9", "--joblog", "log", "./{}", ":::", "missing", "empty")
    assert done.stderr.decode().splitlines() == [
        "fdpool: missing: cannot open it: No such file or directory",
        "fdpool: empty: cannot run ./empty: Exec format error",
    ]
    assert [fields[6:9] for fields in log_lines()] == [["-1", "0", "1"]] * 2


def test_at_the_end_of_its_time_a_job_goes_with_its_whole_tree_and_what_it_wrote_is_kept() -> None:
    write_files(2)
    script = "cat; case $1 in 0000*) setsid sleep 98765.6 & trap '' TERM; sleep 98765.6; sleep 98765.6;; esac"
    # Long enough for what is to be done within it, however busy the machine is.
    done = run(
        "--timeout", "5.0", "--joblog", "log", "sh", "-c", script, "sh", "{}", ":::", "0000.txt", "0001.txt"
    )
    assert done.stdout == b"contents of 0000.txt\ncontents of 0001.txt\n"
    assert done.stderr == b"fdpool: 0000.txt: sh timed out after 5 s\n"
    assert done.returncode == 1
    assert not still_running("98765.6")
    assert {fields[6] for fields in log_lines()} == {"-1", "0"}


# `fdpool`, which gives a program more than a second to end by itself.
PATIENT = """
import sys
from fdpool import cli, commands

commands.build.__kwdefaults__["grace"] = 60.0
sys.exit(cli.main())
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_that_ends_by_itself_when_its_time_is_over_has_failed_all_the_same(code: int) -> None:
    write_files(1)
    # The trap is set long before its time is over, however busy the machine is.
    script = f"trap 'exit {code}' TERM; sleep 98765.7 & wait"
    arguments = ["--timeout", "5", "--joblog", "log", "sh", "-c", script, ":::", "0000.txt"]
    done = finish([sys.executable, "-W", "error", "-c", PATIENT, "run", *arguments], stdin=subprocess.DEVNULL)
    assert done.stderr == b"fdpool: 0000.txt: sh timed out after 5 s\n"
    assert done.returncode == 1
    assert log_lines()[0][6:8] == ["-1", "0"]


def test_waiting_for_a_fifo_is_part_of_a_job_s_time() -> None:
    os.mkfifo("fifo")
    done = run("--timeout", "0.2", "cat", ":::", "fifo")
    assert done.stderr == b"fdpool: fifo: cat timed out after 0.2 s\n"


def test_a_job_s_time_may_be_longer_than_the_kernel_can_be_asked_to_wait() -> None:
    """As poll(2) counts milliseconds in an int: 24 days."""
    os.mkfifo("fifo")
    writer = threading.Thread(target=lambda: Path("fifo").write_text("through the fifo\n"))
    writer.start()
    done = run("--timeout", "31536000", "cat", ":::", "fifo")
    writer.join()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"through the fifo\n", b"")


# -- the log ---------------------------------------------------------------------------------------


def test_the_log_tells_when_how_long_how_much_and_what() -> None:
    write_files(2)
    Path("odd\tname\n\\").write_text("abc")
    run("--joblog", "log", "sh", "-c", "cat; kill -9 $$", ":::", "0000.txt", "odd\tname\n\\", b"\xff")
    first, odd, bad = sorted(log_lines(), key=lambda fields: int(fields[0]))
    assert float(first[2]) > 1e9
    assert float(first[3]) < 30
    assert [first[0], first[1], *first[4:]] == [
        "1", ":", "21", "21", "-1", "9", "1", "sh -c 'cat; kill -9 $$' < 0000.txt"
    ]  # fmt: skip
    assert odd[4:6] == ["3", "3"]
    assert odd[9].endswith(r" < 'odd\tname\n\\'")
    assert bad[6:] == ["-1", "0", "1", r"sh -c 'cat; kill -9 $$' < '\xff'"]


def test_resume_skips_what_succeeded_wherever_it_now_stands_and_runs_the_rest() -> None:
    write_files(3)
    script = "echo $1 >>ran; test $1 != 0001.txt || test -e mended"
    command = ["--joblog", "log", "sh", "-c", script, "sh", "{}", ":::"]
    assert run(*command, "0000.txt", "0001.txt").returncode == 1
    Path("mended").touch()
    with open("log", "ab") as log:
        log.write(b"9\t:\t17")  # a crash
    assert run("--resume", *command, "0002.txt", "0001.txt", "0000.txt").returncode == 0
    assert sorted(Path("ran").read_text().split()) == ["0000.txt", "0001.txt", "0001.txt", "0002.txt"]
    assert run("--resume", *command, "0002.txt", "0001.txt", "0000.txt").returncode == 0
    assert len(Path("ran").read_text().split()) == 4


def test_another_program_on_the_same_file_is_another_job() -> None:
    write_files(1)
    assert run("--joblog", "log", "cat", ":::", "0000.txt").returncode == 0
    assert run("--joblog", "log", "--resume", "wc", "-c", ":::", "0000.txt").stdout == b"21\n"


@pytest.mark.usefixtures("heeding_the_terminal")
def test_after_ctrl_c_resume_does_what_was_not_done() -> None:
    write_files(3)
    script = "case $1 in 0001*) test -e go || { : >begun; exec sleep 98765.8; };; esac; cat"
    command = [*COMMAND, "run", "-j1", "--out", "{.}.out", "--joblog", "log"]
    rest = ["sh", "-c", script, "sh", "{}", ":::", "0000.txt", "0001.txt", "0002.txt"]
    with subprocess.Popen([*command, *rest], start_new_session=True, stderr=subprocess.PIPE) as program:
        wait_until(Path("begun").exists)
        wait_until(lambda: len(log_lines()) == 1)
        os.killpg(program.pid, signal.SIGINT)
        assert program.wait(10) == 130
        assert program.stderr is not None
        assert program.stderr.read() == b""
    assert not still_running("98765.8")
    assert sorted(name for name in os.listdir() if name.endswith(".out")) == ["0000.out"]
    assert leftovers() == []
    Path("go").touch()
    before = os.stat("0000.out").st_ino
    done = run(*command[len(COMMAND) + 1 :], "--resume", *rest)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert os.stat("0000.out").st_ino == before
    assert [Path(f"000{n}.out").read_text() for n in range(3)] == [
        f"contents of 000{n}.txt\n" for n in range(3)
    ]


@pytest.mark.usefixtures("heeding_the_terminal")
def test_a_job_whose_file_is_in_place_is_logged_also_if_what_it_said_waits_for_its_turn() -> None:
    write_files(2)
    script = "case $1 in 0000*) exec sleep 98766.4;; esac; echo said >&2"
    command = [
        *COMMAND,
        "run",
        "-j2",
        "--out",
        "{.}.out",
        "--joblog",
        "log",
        "sh",
        "-c",
        script,
        "sh",
        "{}",
        ":::",
    ]
    with subprocess.Popen([*command, "0000.txt", "0001.txt"], stderr=subprocess.PIPE) as program:
        wait_until(lambda: Path("log").exists() and Path("log").read_text().count("\n") == 2)
        program.send_signal(signal.SIGINT)
        assert program.stderr is not None
        assert program.stderr.read() == b""
    assert program.returncode == 130
    assert [fields[0] for fields in log_lines()] == ["2"]
    assert Path("0001.out").exists()


def test_a_file_that_is_no_log_is_not_written_to() -> None:
    write_files(1)
    done = run("--joblog", "0000.txt", "cat", ":::", "0000.txt")
    assert done.stderr == b"fdpool: 0000.txt is no log of fdpool run: its first line is another\n"
    assert (done.stdout, done.returncode) == (b"", 2)
    assert Path("0000.txt").read_text() == "contents of 0000.txt\n"


def test_a_log_that_cannot_be_opened_or_written_is_said_before_anything_runs() -> None:
    write_files(1)
    done = run("--joblog", "no/log", "touch", "ran", ":::", "0000.txt")
    assert done.stderr == b"fdpool: cannot open the log no/log: No such file or directory\n"
    assert done.returncode == 2
    done = run("--joblog", "/dev/full", "touch", "ran", ":::", "0000.txt")
    assert done.stderr == b"fdpool: cannot write to the log /dev/full: No space left on device\n"
    assert not Path("ran").exists()


def test_a_log_that_nobody_reads_any_more_ends_the_run_with_the_reason() -> None:
    os.mkfifo("log")
    names = "".join(f"{n}-{'x' * 200}\n" for n in range(1000))  # more than the FIFO has room for
    command = [*COMMAND, "run", "--no-pipe", "--joblog", "log", "true"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        with open("log", encoding="ascii") as log:
            assert log.readline() == HEADER + "\n"
        try:
            _, errors = program.communicate(names.encode(), timeout=20)
        finally:
            program.kill()
    assert (errors, program.returncode) == (b"fdpool: cannot write to the log log: Broken pipe\n", 1)


def test_a_log_that_cannot_grow_any_more_ends_the_run_with_the_reason_and_can_be_resumed() -> None:
    names = write_files(60)
    script = "test $1 = 0000.txt || cat gate; : "
    assert run("--joblog", "log", "true", ":::", names[0]).returncode == 0
    line = Path("log").read_bytes().splitlines(keepends=True)[1]
    with open("log", "ab") as log:  # up to a little below the limit that follows
        while log.tell() < 1_000_000:
            log.write(line)
    done = in_shell(f"ulimit -f $((1000448 / 512)); fdpool run --joblog log true ::: {shlex.join(names)}")
    assert done.stderr == b"fdpool: cannot write to the log log: File too large\n", script
    assert done.returncode == 1
    again = run("--joblog", "log", "--resume", "true", ":::", *names)
    assert (again.stderr, again.returncode) == (b"", 0)
    assert len({fields[9] for fields in log_lines()}) == 60


# -- --halt ----------------------------------------------------------------------------------------


def test_halt_now_ends_what_runs_with_its_children_and_keeps_what_has_ended() -> None:
    names = write_files(9)
    script = """
        echo $1
        case $1 in
            0000*) ;;
            0001*) setsid sleep 98765.9 & : >begun; exec sleep 98765.9;;
            *) while ! test -e begun; do :; done; exit 3;;
        esac
    """
    done = run("-j", "2", "--halt", "now", "--joblog", "log", "--out", "{.}.out", "sh", "-c", script, "sh", "{}",
               ":::", *names)  # fmt: skip
    assert done.stderr.decode().splitlines() == [
        "fdpool: halting: ending the 1 that run",
        "fdpool: 0002.txt: sh exited with code 3",
    ]
    assert done.returncode == 1
    assert not still_running("98765.9")
    assert [fields[0] for fields in log_lines()] == ["1", "3"]
    assert sorted(name for name in os.listdir() if name.endswith(".out")) == ["0000.out"]
    assert leftovers() == []


def test_halt_soon_waits_for_what_runs_and_starts_no_more() -> None:
    names = write_files(9)
    os.mkfifo("gate")
    script = "echo $1; case $1 in 0000*) cat gate;; *) exit 3;; esac"
    command = [
        *COMMAND,
        "run",
        "-j",
        "2",
        "--halt",
        "soon,fail=2",
        "sh",
        "-c",
        script,
        "sh",
        "{}",
        ":::",
        *names,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        halting = program.stderr.readline()
        Path("gate").write_text("done\n")
        assert program.stdout.read() == b"0000.txt\ndone\n0001.txt\n0002.txt\n"
        assert halting == b"fdpool: halting: starting nothing more, waiting for the 1 that run\n"
        assert len(program.stderr.readlines()) == 2
    assert program.returncode == 1


def test_as_many_successes_as_wanted_are_a_success_whatever_failed() -> None:
    names = write_files(9)
    done = run(
        "-j1", "--halt", "soon,success=2", "sh", "-c", "test $1 != 1 && echo $1", "sh", "{#}", ":::", *names
    )
    assert (done.stdout, done.returncode) == (b"2\n3\n", 0)


def test_a_halt_that_comes_too_late_to_stop_anything_says_nothing() -> None:
    write_files(1)
    done = run("--halt", "now", "false", ":::", "0000.txt")
    assert done.stderr == b"fdpool: 0000.txt: false exited with code 1\n"


def test_a_job_counts_as_failed_after_its_last_attempt() -> None:
    names = write_files(3)
    script = 'mkdir "$1.tried" 2>/dev/null && exit 1; cat'
    done = run("-j1", "--retries", "1", "--halt", "now", "sh", "-c", script, "sh", "{}", ":::", *names)
    assert (len(done.stdout.splitlines()), done.stderr, done.returncode) == (3, b"", 0)


# -- --json ----------------------------------------------------------------------------------------


def test_a_json_object_a_line_says_all_about_a_job() -> None:
    write_files(3)
    script = "cat; case $1 in 0000*) echo e >&2; exit 3;; 0001*) printf '\\377' ; kill -TERM $$;; esac"
    done = run("--json", "sh", "-c", script, "sh", "{}", ":::", "0000.txt", "0001.txt", "0002.txt", b"\xe9")
    first, second, third, missing = (json.loads(line) for line in done.stdout.splitlines())
    assert (done.stderr, done.returncode) == (b"", 1)
    assert first.pop("start") > 1e9
    assert 0 < first.pop("wall_s") < 30
    assert first.pop("rusage")["maxrss"] > 0
    assert first == {
        "seq": 1, "names": ["0000.txt"], "command": ["sh", "-c", script, "sh", "0000.txt"],
        "exit_code": 3, "signal": None, "timed_out": False, "attempts": 1, "error": "sh exited with code 3",
        "stdout": "contents of 0000.txt\n", "stderr": "e\n", "out": None, "err": None,
    }  # fmt: skip
    assert (second["exit_code"], second["signal"]) == (None, "SIGTERM")
    assert base64.b64decode(second["stdout"]["base64"]) == b"contents of 0001.txt\n\xff"
    assert (third["exit_code"], third["error"]) == (0, None)
    assert missing["names"] == [{"base64": base64.b64encode(b"\xe9").decode()}]
    assert (missing["exit_code"], missing["rusage"]) == (None, None)
    assert missing["error"] == "cannot open it: No such file or directory"


def test_json_of_a_job_that_overran_its_time_and_of_one_that_writes_to_a_file() -> None:
    write_files(1)
    done = run(
        "--json", "--timeout", "0.3", "--out", "{#}", "--err", "e{#}", "sleep", "98765.5", ":::", "0000.txt"
    )
    (only,) = (json.loads(line) for line in done.stdout.splitlines())
    assert only["timed_out"]
    assert (only["out"], only["err"], only["stdout"], only["stderr"]) == ("1", "e1", None, None)
    assert not Path("1").exists()


# -- output to files -------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["", "tmpfile"])
def test_files_through_gzip_are_byte_for_byte_those_of_a_shell_loop(without: str) -> None:
    names = write_files(20)
    Path("large.txt").write_bytes(os.urandom(1 << 20) * 3)
    Path("an odd name.txt").write_bytes(b"")
    assert in_shell('mkdir loop; for f in *.txt; do gzip -c <"$f" >"loop/${f%.txt}.gz"; done').returncode == 0
    everything = sorted(name for name in os.listdir() if name.endswith(".txt"))
    assert len(everything) == len(names) + 2
    Path("ours").mkdir()
    done = run(
        "--out",
        "ours/{/.}.gz",
        "gzip",
        "-c",
        ":::",
        *everything,
        env={**os.environ, "FDPOOL_WITHOUT": without},
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)
    assert sorted(os.listdir("ours")) == sorted(os.listdir("loop"))
    for name in os.listdir("loop"):
        assert Path("ours", name).read_bytes() == Path("loop", name).read_bytes()
        assert os.stat(f"ours/{name}").st_mode == os.stat(f"loop/{name}").st_mode


@pytest.mark.parametrize("without", ["", "tmpfile"])
def test_what_fails_leaves_no_file_and_the_old_one_as_it_was(without: str) -> None:
    write_files(2)
    Path("0001.out").write_text("old\n")
    script = "cat; echo why >&2; exit 3"
    done = run("--out", "{.}.out", "--err", "{.}.err", "sh", "-c", script, ":::", "0000.txt", "0001.txt",
               env={**os.environ, "FDPOOL_WITHOUT": without})  # fmt: skip
    assert done.returncode == 1
    assert (done.stdout, Path("0001.out").read_text()) == (b"", "old\n")
    assert sorted(set(os.listdir()) - {"0000.txt", "0001.txt"}) == ["0000.err", "0001.err", "0001.out"]
    assert Path("0000.err").read_text() == "why\n"


@pytest.mark.parametrize("without", ["", "tmpfile"])
def test_a_file_has_no_name_until_its_program_has_succeeded_then_it_takes_the_old_one_s_place(
    without: str,
) -> None:
    write_files(1)
    Path("old.out").write_text("old\n")
    Path("old.out").chmod(0o604)
    os.symlink("old.out", "0000.out")
    script = "cat; cat 0000.out >seen"
    env = {**os.environ, "FDPOOL_WITHOUT": without}
    assert run("--out", "{.}.out", "sh", "-c", script, ":::", "0000.txt", env=env).returncode == 0
    assert Path("seen").read_text() == "old\n"
    assert Path("old.out").read_text() == "contents of 0000.txt\n"
    assert Path("0000.out").is_symlink()
    assert stat.S_IMODE(os.stat("old.out").st_mode) == 0o604
    assert leftovers() == []


@pytest.mark.parametrize("without", ["", "tmpfile"])
def test_no_clobber_fails_before_the_program_runs_and_also_if_the_file_comes_meanwhile(without: str) -> None:
    write_files(2)
    Path("0000.out").write_text("old\n")
    script = "cat; : >$1.ran; echo new >0001.out"
    done = run("--no-clobber", "--out", "{.}.out", "sh", "-c", script, "sh", "{}", ":::", "0000.txt", "0001.txt",
               env={**os.environ, "FDPOOL_WITHOUT": without})  # fmt: skip
    assert done.stderr.decode().splitlines() == [
        "fdpool: 0000.txt: will not write to 0000.out: it is there already, and --no-clobber is given",
        "fdpool: 0001.txt: cannot put 0001.out in place: File exists",
    ]
    assert (Path("0000.out").read_text(), Path("0001.out").read_text()) == ("old\n", "new\n")
    assert not Path("0000.txt.ran").exists()
    assert leftovers() == []


def test_no_job_writes_to_the_log_of_its_run() -> None:
    """Under whatever name: the log would be replaced, and what is resumed from it done again."""
    write_files(1)
    os.symlink("0000.log", "link.err")
    done = run("--joblog", "0000.log", "--out", "{.}.log", "cat", ":::", "0000.txt")
    assert (done.returncode, done.stderr) == (
        1,
        b"fdpool: 0000.txt: will not write to 0000.log: it is the log of this run\n",
    )
    done = run("--joblog", "0000.log", "--err", "link.err", "cat", ":::", "0000.txt")
    assert done.stderr == b"fdpool: 0000.txt: will not write to link.err: it is the log of this run\n"
    assert len(Path("0000.log").read_text().splitlines()) == 3


def test_two_jobs_never_write_to_one_file_nor_a_job_to_an_input_of_this_run() -> None:
    write_files(3)
    os.link("0002.txt", "linked.out")
    os.symlink("0001.txt", "b.out")
    Path("a.txt").touch()
    Path("b.txt").touch()
    Path("linked.txt").touch()
    done = run("--out", "./{/.}.out", "cat", ":::", "a.txt", "../" + Path.cwd().name + "/a.txt", "b.txt",
               "0001.txt", "linked.txt", "0002.txt")  # fmt: skip
    assert done.stderr.decode().splitlines()[1:] == [
        "fdpool: b.txt: will not write to ./b.out: it is an input of this run",
        "fdpool: linked.txt: will not write to ./linked.out: it is an input of this run",
    ]
    assert b"will not write to ./a.out: it is the output of job 1 already\n" in done.stderr
    assert Path("0001.txt").read_text() == "contents of 0001.txt\n"
    same = run("--out", "{/.}.x", "--err", "{/.}.x", "cat", ":::", "0000.txt")
    assert same.stderr == b"fdpool: 0000.txt: will not write to 0000.x: it is the output of job 1 already\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("no/{}", "cannot write to no/0000.txt: No such file or directory"),
        ("{//}", "cannot write to .: Is a directory"),
        ("x/", "cannot write to x/: Is a directory"),
        ("0000.txt/{}", "cannot write to 0000.txt/0000.txt: Not a directory"),
        ("fifo", "cannot write to fifo: No such device or address"),
        ("/dev/full", "cat exited with code 1"),
    ],
)
def test_an_output_that_cannot_be_written_is_said(template: str, reason: str) -> None:
    write_files(1)
    os.mkfifo("fifo")
    done = run("--out", template, "cat", ":::", "0000.txt")
    assert done.stderr.decode().splitlines()[-1] == f"fdpool: 0000.txt: {reason}"
    assert done.returncode == 1


def test_what_is_no_regular_file_is_written_as_it_is_by_any_number_of_jobs() -> None:
    names = write_files(3)
    os.mkfifo("fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("fifo").read_text()))
    reader.start()
    holder = os.open("fifo", os.O_WRONLY)  # waits for the reader
    assert run("--out", "fifo", "-j1", "cat", ":::", *names).returncode == 0
    os.close(holder)
    reader.join()
    assert read == ["".join(f"contents of {name}\n" for name in names)]
    assert run("--out", "/dev/null", "cat", ":::", *names).stderr == b""


@pytest.mark.parametrize("name", ["/dev/stderr", "/dev/fd/2", "/proc/self/fd/2", "log"])
def test_a_file_that_standard_error_goes_to_is_written_where_it_stands(name: str) -> None:
    write_files(2)
    # By write(2), which takes turns with others of the same open file; cat of coreutils copies by copy_file_range(2),
    # which does not, so a line that fdpool writes meanwhile would be written over.
    script = shlex.quote('read -r line; echo "$line" >&2; exit 3')
    line = f"fdpool run -j1 --no-clobber --joblog jobs --err {name} sh -c {script} ::: *.txt; echo after >&2"
    in_shell(f"exec 2> log; echo before >&2; {line}")
    first, second = (f"contents of {n:04}.txt\n" for n in range(2))
    said = [f"fdpool: {n:04}.txt: sh exited with code 3\n" for n in range(2)]
    assert sorted(Path("log").read_text().splitlines(True)) == sorted(
        ["before\n", first, second, *said, "after\n"]
    )
    assert Path("log").read_text().startswith("before\n" + first)
    assert Path("log").read_text().endswith("after\n")


def test_a_descriptor_that_was_inherited_takes_outputs_where_it_stands() -> None:
    write_files(2)
    in_shell("exec >> made 3> other; echo before; fdpool run -j1 --joblog log --out /dev/stdout cat ::: *.txt;"
             f" {shlex.join(COMMAND)} run --out /dev/fd/3 cat ::: 0001.txt; echo after; echo after >&3")  # fmt: skip
    contents = [f"contents of {n:04}.txt\n" for n in range(2)]
    assert Path("made").read_text() == "".join(["before\n", *contents, "after\n"])
    assert Path("other").read_text() == contents[1] + "after\n"
    assert [line[5] for line in log_lines()] == ["0", "0"]  # received: nobody knows how much of it is whose


@pytest.mark.parametrize("name", ["/dev/stderr", "/dev/fd/2"])
def test_a_socket_that_standard_error_is_takes_errors_as_well(name: str) -> None:
    """As where systemd has started it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*COMMAND, "run", "--err", name, "sh", "-c", "echo said >&2", ":::", os.devnull]
        subprocess.run(command, stderr=theirs, timeout=60, check=True)
        assert ours.recv(1000) == b"said\n"


def test_what_was_not_inherited_takes_no_output() -> None:
    for number in range(3, 12):
        done = run("--no-pipe", "--out", f"/dev/fd/{number}", "echo", ":::", "x")
        assert done.returncode == 1
        assert done.stderr.startswith(b"fdpool: x: cannot write to /dev/fd/")


@pytest.mark.parametrize("without", ["", "tmpfile"])
def test_a_folder_that_vanishes_under_an_output_is_said(without: str) -> None:
    write_files(1)
    Path("folder").mkdir()
    done = run("--joblog", "log", "--out", "folder/{}", "sh", "-c", "cat; rm -r folder", ":::", "0000.txt",
               env={**os.environ, "FDPOOL_WITHOUT": without})  # fmt: skip
    assert (
        done.stderr == b"fdpool: 0000.txt: cannot put folder/0000.txt in place: No such file or directory\n"
    )
    assert done.returncode == 1
    assert log_lines()[0][6] == "-1"


def test_hundreds_of_outputs_need_few_descriptors() -> None:
    names = write_files(300)
    done = in_shell(
        "ulimit -n 64; fdpool run -j 4 --joblog log --out '{.}.out' --err '{.}.err' cat ::: *.txt"
    )
    assert done.stderr == b""
    assert [Path(name).with_suffix(".out").read_text() for name in names] == [
        f"contents of {n}\n" for n in names
    ]


@pytest.mark.usefixtures("heeding_the_terminal")
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
)
@pytest.mark.parametrize("without", ["", "tmpfile"])
def test_who_is_told_to_end_leaves_no_half_file_and_no_process(
    number: signal.Signals, status: int, without: str
) -> None:
    names = write_files(8)
    seconds = f"9876{6 + bool(without)}.1{number}"  # all may run at the same time
    script = f"echo half; : >$1.begun; sleep {seconds} & exec sleep {seconds}"
    with subprocess.Popen(
        [*COMMAND, "run", "-j", "2", "--out", "{.}.out", "sh", "-c", script, "sh", "{}", ":::", *names],
        env={**os.environ, "FDPOOL_WITHOUT": without},
        start_new_session=True,
    ) as program:
        wait_until(lambda: sum(name.endswith(".begun") for name in os.listdir()) == 2)
        os.killpg(program.pid, number)
        assert program.wait(10) == status
    assert not still_running(seconds)
    assert [name for name in os.listdir() if name.endswith(".out")] == []
    assert leftovers() == []


def test_ctrl_c_before_anything_has_begun_is_as_quiet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        """Stands for a module in whose import Ctrl-C comes."""

        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fdpool._run.loop", Interrupted())  # type: ignore[arg-type]
    assert cli.main(["run", "cat", ":::"]) == 130
    assert capfd.readouterr() == ("", "")


def test_killed_it_leaves_no_half_file() -> None:
    write_files(1)
    script = "echo half; : >begun; exec sleep 98766.2"
    command = [*COMMAND, "run", "--out", "{.}.out", "sh", "-c", script, ":::", "0000.txt"]
    with subprocess.Popen(command) as program:
        wait_until(Path("begun").exists)
        tree = psutil.Process(program.pid).children(recursive=True)
        program.kill()
    wait_until(lambda: not any(is_alive(process) for process in tree))
    assert sorted(os.listdir()) == ["0000.txt", "begun"]


def test_who_reads_no_further_leaves_no_half_file() -> None:
    write_files(9)
    script = "echo said >&2; case $1 in 0000*) ;; *) exec sleep 98766.3;; esac"
    line = f"fdpool run -j 2 --json --out {{.}}.out sh -c {shlex.quote(script)} sh {{}} ::: *.txt | head -c 9"
    assert in_shell(line).stdout == b'{"seq": 1'
    assert not still_running("98766.3")
    assert [name for name in os.listdir() if name.endswith(".out")] == ["0000.out"]
    assert leftovers() == []


@pytest.mark.parametrize("option", ["--json", "--as-completed", "--dry-run"])
def test_a_full_disk_under_standard_output_is_said(option: str) -> None:
    write_files(20)
    done = in_shell(f"fdpool run {option} cat ::: *.txt >/dev/full")
    assert done.stderr == b"fdpool: cannot write to standard output: No space left on device\n"
    assert done.returncode == 1
