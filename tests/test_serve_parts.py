"""The parts of `fdpool serve`, one by one: options, log lines, the pid file, noticing that files change."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import shutil
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from fdpool._serve import log, options
from fdpool._serve.pid_file import PidFile, PidFileRefused
from fdpool._serve.watch import Snapshot, Watcher, differing, is_watched, snapshot
from tests.process_state import wait_until

F_GETPIPE_SZ = 1032  # fcntl(2)

# -- options ---------------------------------------------------------------------------------------


def parse(*given: str, under_systemd: bool = False) -> options.Options:
    return options.parse(given, lambda: under_systemd)


def test_a_target_is_all_that_is_needed() -> None:
    options = parse("app:app")
    assert options.binds == ["127.0.0.1:8000"]
    assert (options.workers, options.dispatch, options.interface) == (None, "shared", None)
    assert options.app_dir == os.getcwd()


def test_under_systemd_its_sockets_are_the_default() -> None:
    assert parse("app:app", under_systemd=True).binds == ["systemd"]
    assert parse("-b", ":80", "app:app", under_systemd=True).binds == [":80"]


def test_what_is_given_arrives_in_the_servers_units(tmp_path: Path) -> None:
    given = "-b :80 -b unix:/x -w 3 --max-memory 1.5M --max-age 60 --grace 0.5 --preload a --preload b.c"
    options = parse(
        *given.split(), "--pid-file", "x.pid", "--app-dir", str(tmp_path), "--log-level", "debug", "m:f()"
    )
    assert options.binds == [":80", "unix:/x"]
    assert (options.workers, options.max_memory, options.max_age, options.grace) == (3, 1572864, 60.0, 0.5)
    assert options.preload == ("a", "b.c")
    assert options.pid_file == f"{os.getcwd()}/x.pid"
    assert options.reload_dirs == [options.app_dir] == [str(tmp_path)]
    assert options.log_level == "DEBUG"


def test_options_of_what_speaks_http_are_read_as_json_or_else_as_text() -> None:
    given = [
        "root_path=/shop",
        "timeout_keep_alive=20",
        "proxy_headers=false",
        'server_header="5"',
        "h11=",
        "eq=a=b",
    ]
    options = parse(*(word for each in given for word in ("--option", each)), "app:app")
    assert options.settings == {
        "root_path": "/shop",
        "timeout_keep_alive": 20,
        "proxy_headers": False,
        "server_header": "5",
        "h11": "",
        "eq": "a=b",
    }


def settings_of(given: str) -> dict[str, object]:
    """All that a server goes by which is asked for with these options."""
    server = options.server_of(parse(*given.split(), "shop:app"), None)
    _, on_worker_start, _ = server._pickled
    assert isinstance(on_worker_start, partial)
    seen = {f"order.{name}": value for name, value in server._order._asdict().items()}
    seen |= {f"settings.{name}": value for name, value in server._settings._asdict().items()}
    seen |= {
        name: value for name, value in vars(server).items() if not name.startswith(("_order", "_settings"))
    }
    seen["log"] = on_worker_start.args
    seen["_watch_for.request_timeout"], seen["_watch_for.max_memory"] = seen.pop("_watch_for")
    del seen["_pickled"], seen["_lock"]
    return seen


#: What each option changes; nothing else is to be another.
CHANGES: dict[str, dict[str, object]] = {
    "--interface handler": {"interface": "handler", "order.interface": "handler"},
    "--option a=1 --option b=x": {"order.options": {"a": 1, "b": "x"}},
    "--preload json --preload shop": {"_preload": ["fdpool._serve.log", "json", "shop"]},
    "--bind :80 -b unix:/x": {"_bind": [":80", "unix:/x"]},
    "--backlog 7": {"_backlog": 7, "order.backlog": 7},
    "--dispatch handoff": {"_dispatch": "handoff"},
    "--workers 77": {"_workers": 77},
    "--standby 7": {"settings.standby": 7},
    "--standby 0": {},
    "--threads 7": {"order.threads": 7},
    "--max-requests 7": {"order.max_requests": 7},
    "--max-age 7": {"settings.max_age_s": 7.0},
    "--max-memory 7K": {"_watch_for.max_memory": 7 * 1024},
    "--grace 7": {"_grace_s": 7.0, "settings.grace_s": 7.0},
    "--grace 0": {"_grace_s": 0.0, "settings.grace_s": 0.0},
    "--boot-timeout 7": {"settings.boot_timeout_s": 7.0},
    "--request-timeout 7": {"_watch_for.request_timeout": 7.0, "order.request_timeout_s": 7.0},
    "--reload-batch 7": {"settings.batch": 7},
    "--log-json": {"log": (True, "INFO")},
    "--log-level debug": {"log": (False, "DEBUG")},
}
#: Those that are the command's own.
NOT_OF_THE_SERVER = {"--help", "--check", "--app-dir", "--reload-on-change", "--reload-dir", "--pid-file"}


@pytest.mark.parametrize("given", CHANGES)
def test_each_option_changes_what_it_is_for_in_the_server_and_nothing_else(given: str) -> None:
    usual, seen = settings_of(""), settings_of(given)
    assert {name: value for name, value in seen.items() if value != usual[name]} == CHANGES[given]


def test_every_option_is_known_to_change_something_in_the_server_or_not_to() -> None:
    every = {action.option_strings[-1] for action in options.parser()._actions if action.option_strings}
    assert every == {given.split()[0] for given in CHANGES} | NOT_OF_THE_SERVER


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "required: TARGET"),
        ("app", "'module:attribute'"),
        ("app:", "'module:attribute'"),
        ("app.py:app:x", "'module:attribute'"),
        ("-w 0 app:app", "a whole number from 1, not '0'"),
        ("-w two app:app", "a whole number from 1, not 'two'"),
        ("--grace -1 app:app", "a number of seconds above 0, not '-1'"),
        ("--grace nan app:app", "a number of seconds above 0, not 'nan'"),
        ("--grace inf app:app", "a number of seconds above 0, not 'inf'"),
        ("--max-memory lots app:app", "a size such as 500M or 2G, not 'lots'"),
        ("--max-memory 0M app:app", "a size such as 500M or 2G, not '0M'"),
        ("-b 8000 app:app", "write 127.0.0.1:8000"),
        ("--dispatch random app:app", "invalid choice"),
        ("--interface cgi app:app", "invalid choice"),
        ("--app-dir /no/such app:app", "there is no folder '/no/such'"),
        ("--reload-dir . app:app", "--reload-on-change"),
        ("--work 2 app:app", "unrecognized arguments"),
        ("--option timeout app:app", "it must be NAME=VALUE, not 'timeout'"),
        ("--option a-b=1 app:app", "it must be NAME=VALUE, not 'a-b=1'"),
    ],
)
def test_bad_usage_is_said_at_once_with_status_2(
    given: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*given.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: fdpool serve [OPTION ...] TARGET\n")
    assert reason in said.splitlines()[-1]


def test_the_help_is_in_groups_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for heading in (
        "the application:",
        "where it listens:",
        "workers:",
        "reloading:",
        "the process:",
        "signals:",
    ):
        assert f"\n{heading}\n" in said
    assert max(map(len, said.splitlines())) <= 110


# -- the log ---------------------------------------------------------------------------------------


def record(**extra: object) -> logging.LogRecord:
    return logging.getLogger("fdpool.server").makeRecord(
        "fdpool.server", logging.INFO, __file__, 1, "worker %d is ready", (3,), None, extra=extra
    )


def test_a_line_of_json_has_the_events_own_fields() -> None:
    said = json.loads(log.Json().format(record(event="ready", slot=3, address=("::1", 80), odd={1})))
    assert said.pop("time") > 1.7e9
    assert said == {
        "level": "info",
        "logger": "fdpool.server",
        "pid": os.getpid(),
        "event": "ready",
        "slot": 3,
        "address": ["::1", 80],
        "odd": "{1}",
        "message": "worker 3 is ready",
    }


def test_a_line_for_people_says_when_who_and_what() -> None:
    said = log.Lines().format(record(event="ready"))
    assert said.endswith(f" [{os.getpid()}] worker 3 is ready")
    worse = record()
    worse.levelno, worse.levelname = logging.WARNING, "WARNING"
    assert log.Lines().format(worse).endswith("] warning: worker 3 is ready")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_is_part_of_the_record(as_json: bool) -> None:
    failed = record()
    try:
        raise ValueError("no")
    except ValueError:
        failed.exc_info = sys.exc_info()
    said = (log.Json() if as_json else log.Lines()).format(failed)
    assert "ValueError: no" in (json.loads(said)["traceback"] if as_json else said)
    assert not as_json or "\n" not in said


def test_configured_twice_it_says_everything_once() -> None:
    script = (
        "import logging, fdpool._serve.log as l\nfor _ in range(2): l.configure(True, 'INFO')\n"
        "logging.getLogger('fdpool.server').info('once'); logging.getLogger('fdpool.server').debug('never')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["once"]


def test_a_log_that_nobody_can_take_is_no_error() -> None:
    script = (
        "import logging, fdpool._serve.log as l\nl.configure(False, 'INFO')\n"
        "logging.getLogger('fdpool.server').info('lost'); print('went on')"
    )
    command = f'exec {sys.executable} -W error -c "$SCRIPT" 2>/dev/full'
    done = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "SCRIPT": script}, stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == b"went on\n"


LOGGING = """
import logging, os, signal, sys
import fdpool._serve.log as log

LONG = "long " * 40_000  # more than a pipe takes

def say(*texts):
    log.configure(True, "INFO")
    for text in texts:
        logging.getLogger("fdpool.server").info(text)
"""


@contextlib.contextmanager
def logging_program(script: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A program that logs by `say` to a pipe, as its input and what it logs."""
    command = [sys.executable, "-c", LOGGING + textwrap.dedent(script)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as program:
        assert program.stdin is not None
        assert program.stderr is not None
        try:
            yield program.stdin, program.stderr
        finally:
            os.killpg(program.pid, signal.SIGKILL)


def message(line: bytes) -> str:
    said: str = json.loads(line)["message"]
    return said


def test_long_lines_of_several_processes_do_not_mix() -> None:
    script = """
    log._PATIENCE_S = 100.0
    for _ in range(4):
        if os.fork() == 0:
            say(*[LONG, "short"] * 10)
            os._exit(0)
    """
    with logging_program(script) as (_, logged):
        said = Counter(message(line)[:5] for line in logged)
    assert said == {"long ": 40, "short": 40}


def test_a_pipe_that_does_not_block_gets_whole_lines_while_somebody_reads() -> None:
    script = "log._PATIENCE_S = 100.0; os.set_blocking(2, False); say(LONG, 'short')"
    with logging_program(script) as (_, logged):
        assert [message(line)[:5] for line in logged] == ["long ", "short"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_killed_or_stopped_as_it_logs_keeps_nobody_else_from_it(number: int, tmp_path: Path) -> None:
    script = f"""
    log._PATIENCE_S = 0.1
    other = os.fork()
    if other == 0:
        say(LONG)
    sys.stdin.read(1)
    os.kill(other, {int(number)})
    os.waitpid(other, os.WUNTRACED)
    os.mkdir({str(tmp_path / "done")!r})
    say("what comes upon half a line", "more")
    """
    with logging_program(script) as (order, logged):
        room = fcntl.fcntl(logged, F_GETPIPE_SZ)
        wait_until(lambda: unread(logged) == room)
        order.write(b"x")
        order.close()
        wait_until((tmp_path / "done").exists)
        assert b"what comes upon half a line" in logged.readline()
        assert message(logged.readline()) == "more"


def unread(pipe: IO[bytes]) -> int:
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


# -- the pid file ----------------------------------------------------------------------------------


def test_the_file_holds_the_process_id_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    held = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 == 0o644
    held.close()
    held.close()
    assert not list(tmp_path.iterdir())


def test_the_file_of_a_server_that_runs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    held = PidFile(str(path))
    with pytest.raises(PidFileRefused, match=f"a server that runs, process {os.getpid()}"):
        PidFile(str(path))
    held.close()


@pytest.mark.parametrize("left", ["1\n", "", "garbage"])
def test_what_a_dead_server_has_left_is_replaced_whoever_has_its_number_now(
    left: str, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    path.write_text(left)
    held = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    held.close()


def test_a_successor_takes_the_file_over_and_the_one_before_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    old = PidFile(str(path))
    new = PidFile(str(path), replace=True)
    old.close()
    assert path.exists()
    with pytest.raises(PidFileRefused):
        PidFile(str(path))
    new.close()
    assert not path.exists()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_left_alone(kind: str, replace: bool, tmp_path: Path) -> None:
    """As root it could be replaced (/dev/null), and a pipe that nobody writes to would be waited for."""
    path = tmp_path / "pid"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.mkdir()
    before = path.lstat()
    with pytest.raises(PidFileRefused, match="is no regular file"):
        PidFile(str(path), replace=replace)
    assert os.path.samestat(path.lstat(), before)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", ["no/such/folder/pid", "."])
def test_a_file_that_cannot_be_written_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(PidFileRefused, match="cannot"):
        PidFile(str(tmp_path / name))
    assert not list(tmp_path.iterdir())


# -- files that change -----------------------------------------------------------------------------


def test_only_python_files_count_and_not_those_of_environments(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "b/c.py",
        ".hidden.py",
        ".git/d.py",
        "b/__pycache__/c.py",
        "env/e.py",
        "f.txt",
        "g.so",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    found = {os.path.relpath(path, tmp_path) for path in snapshot([str(tmp_path)])}
    assert found == {"a.py", "b/c.py", "g.so"}
    assert snapshot(["/no/such/folder"]) == {}


@pytest.mark.parametrize(
    ("path", "watched"),
    [
        ("/srv/.app/a.py", True),
        ("/srv/.app/b/a.py", True),
        ("/srv/.app/.git/a.py", False),
        ("/srv/.app/__pycache__/a.py", False),
        ("/srv/.app/lib/site-packages/a.py", False),
        ("/srv/.app/a.txt", False),
        ("/srv/other/a.py", False),
    ],
)
def test_a_path_is_judged_by_what_is_below_the_folder(path: str, watched: bool) -> None:
    assert is_watched(path, ["/srv/.app"]) is watched


def test_what_has_come_gone_or_changed_differs() -> None:
    before = {"gone": (1, 1, 1), "same": (1, 1, 1), "changed": (1, 1, 1)}
    now = {"come": (1, 1, 1), "same": (1, 1, 1), "changed": (1, 1, 2)}
    assert differing(before, now) == ["changed", "come", "gone"]


@pytest.mark.parametrize("notified", [False, True])
def test_what_changes_is_told_and_several_files_together(notified: bool, tmp_path: Path) -> None:
    if notified:
        pytest.importorskip("watchfiles")
    first, second, other = (tmp_path / name for name in ("a.py", "b.py", "c.txt"))
    told: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    watcher = Watcher([str(tmp_path)], told.put, notified=notified)
    noticed = threading.Event()

    def write_until_noticed() -> None:  # the kernel's notifications may take a moment to begin
        while not noticed.is_set():
            first.write_text("1")
            noticed.wait(0.6)

    writing = threading.Thread(target=write_until_noticed)
    writing.start()
    try:
        assert told.get(timeout=20) == [str(first)]
        noticed.set()
        writing.join()
        for path in (first, second, other):
            path.write_text("2 3")
        while (paths := told.get(timeout=20)) == [str(first)]:
            continue
        assert paths in ([str(first), str(second)], [str(second)])
    finally:
        noticed.set()
        watcher.close()


def test_a_file_that_is_there_for_a_moment_is_no_change(tmp_path: Path) -> None:
    """An editor's scratch file, say, that is gone again once all is quiet."""
    scratch, other = tmp_path / "scratch.py", tmp_path / "a.py"
    settled = threading.Event()

    class Late(Watcher):
        def _settled(self, now: Snapshot) -> Snapshot:
            scratch.unlink(missing_ok=True)
            now = super()._settled(now)
            settled.set()
            return now

    told: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    watcher = Late([str(tmp_path)], told.put, notified=False)
    try:
        scratch.write_text("1")
        assert settled.wait(20)
        other.write_text("1")
        assert told.get(timeout=20) == [str(other)]
    finally:
        watcher.close()


def write_until_told(path: Path, told: queue.SimpleQueue[list[str]]) -> list[str]:
    """What is told of changes of a file; the kernel's notifications may take a moment to begin."""
    for attempt in range(30):
        path.write_text(str(attempt))
        with contextlib.suppress(queue.Empty):
            return told.get(timeout=0.6)
    raise AssertionError(f"nobody has noticed that {path} changed")


@pytest.mark.parametrize("how", ["moved away", "removed", "linked to"])
@pytest.mark.parametrize("notified", [False, True])
def test_a_watched_folder_that_is_replaced_is_watched_on(notified: bool, how: str, tmp_path: Path) -> None:
    """As by a deploy, or for another worktree."""
    if notified:
        pytest.importorskip("watchfiles")
    folder, old, new = (tmp_path / name for name in ("app", "old", "new"))
    for each in (old, new):
        each.mkdir()
    if how == "linked to":
        folder.symlink_to(old)
    else:
        old.rename(folder)
    told: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    watcher = Watcher([str(folder)], told.put, notified=notified)
    file = folder / "a.py"
    try:
        assert write_until_told(file, told) == [str(file)]
        if how == "moved away":
            folder.rename(old)
            new.rename(folder)
        elif how == "removed":
            shutil.rmtree(folder)
            folder.mkdir()
        else:
            folder.unlink()
            folder.symlink_to(new)
        while not told.empty():
            told.get()
        for _ in range(2):
            assert write_until_told(file, told) == [str(file)]
    finally:
        watcher.close()
