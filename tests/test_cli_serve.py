"""`fdpool serve` as its users run it: real processes, real clients, its log, its exit status."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.load._served import ROOT, Served, is_alive, served
from tests.process_state import wait_until

HANDLER = """
import os

TEXT = "first"

def handle(connection, address):
    connection.recv(65536)
    body = f"{TEXT} {os.getpid()}".encode()
    head = f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n"
    connection.sendall(head.encode() + body)

def fail(connection, address):
    raise ValueError("that went wrong")
"""


@pytest.fixture
def app_dir(tmp_path: Path) -> Path:
    """A folder with the module `shop`."""
    (tmp_path / "shop.py").write_text(HANDLER)
    return tmp_path


def serve(app_dir: Path, *arguments: str, target: str = "shop:handle", **options: Any) -> Any:
    """A server of `target` on a free port with two workers, as a context."""
    given = ("--app-dir", str(app_dir), "-b", "127.0.0.1:0", "-w", "2", *arguments, target)
    return served(*given, **options)


def answer(address: str) -> str:
    """What a GET of / gives."""
    if address.startswith("unix:"):
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(address.removeprefix("unix:"))
    else:
        connection = http.client.HTTPConnection(address.removeprefix("tcp://"), timeout=10)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()
    finally:
        connection.close()


def put(path: Path, text: str) -> None:
    """A file has this text from one moment to the next: who looks meanwhile does not find it empty, a change before."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def names(server: Served) -> list[str]:
    return [event["event"] for event in server.events]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A server that is expected to end by itself."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "fdpool", "serve", *arguments]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=60, check=False, **options
    )
    return done


# -- the life of a server --------------------------------------------------------------------------


def test_it_says_what_it_does_from_its_start_to_its_end(app_dir: Path) -> None:
    with serve(app_dir) as server:
        assert answer(server.address).startswith("first ")
        assert len(server.workers()) == 2
        assert server.stop() == 0
    said = names(server)
    assert said[0] == "starting"
    assert sorted(said[1:4]) == ["started", "worker_ready", "worker_ready"]
    assert said[4] == "stopping"
    assert said[-1] == "stopped"
    assert server.events[0]["target"] == "shop:handle"
    assert server.text == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_told_to_stop_it_ends_with_status_0_and_leaves_nothing(number: signal.Signals, app_dir: Path) -> None:
    with serve(app_dir) as server:
        workers = server.workers()
        assert server.stop(number) == 0
    assert not any(map(is_alive, workers))


def test_a_request_that_runs_is_finished_before_it_ends(app_dir: Path) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    slow = f"connection.recv(4); connection.sendall({interim!r}); connection.recv(4)"
    (app_dir / "shop.py").write_text(HANDLER.replace("connection.recv(65536)", slow))
    with serve(app_dir) as server, socket.create_connection(_place(server.address)) as client:
        client.sendall(b"GET ")
        assert client.recv(100) == interim
        server.tell(signal.SIGTERM)
        server.wait_for("stopping")
        client.sendall(b"/ HT")
        assert client.makefile("rb").read().partition(b"\r\n\r\n")[2].startswith(b"first ")
        assert server.stop() == 0


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def test_killed_it_leaves_nothing(app_dir: Path) -> None:
    """W4: whatever kills it, workers go within a second, or a few on a machine that is busy with other things."""
    with serve(app_dir) as server:
        tree = psutil.Process(server.pid).children(recursive=True)
        assert len(tree) >= 3
        begun = time.monotonic()
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(each.pid) for each in tree))
        assert time.monotonic() - begun < 10.0


def test_a_line_for_people_is_the_default(app_dir: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fdpool",
        "serve",
        "--app-dir",
        str(app_dir),
        "-b",
        "127.0.0.1:0",
        "shop:handle",
    ]
    with killed_at_last(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)) as program:
        assert program.stderr is not None
        lines = [program.stderr.readline()]
        while " serve at " not in lines[-1]:
            lines.append(program.stderr.readline())
        program.terminate()
        lines += program.stderr.readlines()
        assert program.wait(20) == 0
    assert f"[{program.pid}] fdpool " in lines[0]
    assert "shop:handle" in lines[0]
    assert not any(line.startswith("{") for line in lines)


def test_what_goes_wrong_in_a_worker_is_a_line_of_json_too(app_dir: Path) -> None:
    with serve(app_dir, target="shop:fail") as server:
        with socket.create_connection(_place(server.address)) as client:
            assert client.recv(100) == b""
        failed = server.wait_for("handler_failed")
        assert "ValueError: that went wrong" in failed["traceback"]
        assert failed["pid"] in server.workers()
    assert server.text == []


@pytest.mark.parametrize(
    ("app", "logger", "library"),
    [("app", "uvicorn.error", "uvicorn"), ("wsgi", "waitress", "waitress")],
)
def test_what_speaks_http_logs_in_the_same_form(app: str, logger: str, library: str, app_dir: Path) -> None:
    pytest.importorskip(library)
    (app_dir / "shop.py").write_text(
        "async def app(scope, receive, send):\n    raise ValueError('that went wrong')\n"
        "def wsgi(environ, start_response):\n    raise ValueError('that went wrong')\n"
    )
    options = ["--option", "lifespan=off"] if app == "app" else []
    with serve(app_dir, *options, target=f"shop:{app}") as server:
        with socket.create_connection(_place(server.address)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b" 500 " in client.recv(1000)
        wait_until(lambda: any(each.get("logger") == logger for each in server.events))
        [failed] = [each for each in server.events if each.get("logger") == logger]
        assert "ValueError: that went wrong" in failed["traceback"]
        assert (failed["level"], failed["pid"] in server.workers()) == ("error", True)
    assert server.text == []


def test_an_application_that_configures_logging_is_left_to_it(app_dir: Path) -> None:
    (app_dir / "shop.py").write_text(
        "import logging\nlogging.basicConfig(format='its own form: %(message)s')\n"
        "def handle(connection, address): logging.getLogger('shop').warning('said')\n"
    )
    with serve(app_dir) as server:
        with socket.create_connection(_place(server.address)) as client:
            assert client.recv(100) == b""
        wait_until(lambda: bool(server.text))
        assert server.text == ["its own form: said\n"]


# -- reloading -------------------------------------------------------------------------------------


def test_a_reload_by_the_pid_file_brings_new_code(app_dir: Path) -> None:
    pid_file = app_dir / "run" / "shop.pid"
    pid_file.parent.mkdir()
    with serve(app_dir, "--pid-file", str(pid_file)) as server:
        (app_dir / "shop.py").write_text(HANDLER.replace("first", "second"))
        os.kill(int(pid_file.read_text()), signal.SIGHUP)
        server.wait_for("reloaded")
        assert answer(server.address).startswith("second ")
    assert not pid_file.exists()


def test_a_release_that_is_put_in_place_by_a_symbolic_link_is_what_comes_next(tmp_path: Path) -> None:
    """By a reload, and by an upgrade, of which the program itself is begun in the new one."""
    link = tmp_path / "current"
    for release in ("first", "second", "third"):
        (tmp_path / release).mkdir()
        body = HANDLER.replace('TEXT = "first"', f'TEXT = "{release} " + os.path.basename(os.getcwd())')
        (tmp_path / release / "shop.py").write_text(body)

    def put_in_place(release: str) -> None:
        (tmp_path / "new").symlink_to(release)
        (tmp_path / "new").rename(link)

    put_in_place("first")
    in_link = ("/bin/sh", "-c", 'cd "$0" && exec "$@"', str(link))
    with served("-b", "127.0.0.1:0", "-w", "1", "shop:handle", under=in_link) as server:
        assert answer(server.address).startswith("first first ")
        put_in_place("second")
        server.tell(signal.SIGHUP)
        server.wait_for("reloaded")
        assert answer(server.address).startswith("second first ")
        put_in_place("third")
        upgraded(server)
        assert answer(server.address).startswith("third third ")


def test_a_folder_that_is_named_wrongly_in_the_environment_is_not_looked_at(app_dir: Path) -> None:
    """PWD is that of a program whose child was started elsewhere."""
    (app_dir / "elsewhere").mkdir()
    (app_dir / "elsewhere" / "shop.py").write_text("this is no Python")
    in_folder = ("/bin/sh", "-c", 'cd "$0" && PWD=$0/elsewhere exec "$@"', str(app_dir))
    with served("-b", "127.0.0.1:0", "-w", "1", "shop:handle", under=in_folder) as server:
        assert answer(server.address).startswith("first ")
        upgraded(server)
        assert answer(server.address).startswith("first ")


def test_a_file_that_changes_reloads_and_broken_code_does_not_get_in(app_dir: Path) -> None:
    """S2, as somebody who develops meets it."""
    with serve(app_dir, "--reload-on-change") as server:
        since = len(server.events)
        put(app_dir / "shop.py", "this is no Python")
        assert server.wait_for("files_changed", since)["files"] == [str(app_dir / "shop.py")]
        server.wait_for("reload_failed", since)
        assert answer(server.address).startswith("first ")
        since = len(server.events)
        put(app_dir / "shop.py", HANDLER.replace("first", "mended"))
        server.wait_for("reloaded", since)
        assert answer(server.address).startswith("mended ")


def test_a_file_that_changes_reloads_where_the_working_directory_has_been_removed(app_dir: Path) -> None:
    gone = app_dir / "gone"
    gone.mkdir()
    there = ("sh", "-c", 'cd "$0" && exec "$@"', str(gone))
    with serve(app_dir, "--reload-on-change", under=there) as server:
        gone.rmdir()
        for word in ("second", "third"):
            since = len(server.events)
            put(app_dir / "shop.py", HANDLER.replace("first", word))
            server.wait_for("reloaded", since)
            assert answer(server.address).startswith(f"{word} ")


# -- upgrading -------------------------------------------------------------------------------------


def upgraded(server: Served) -> None:
    """Send SIGUSR2, and wait until another process has taken the place of this one, which leaves with status 0."""
    before = server.pid
    since = server.tell(signal.SIGUSR2)
    wait_until(lambda: any(each.get("event") == "started" for each in server.events[since:]), 30.0)
    server.pid = next(each["pid"] for each in server.events[since:] if each.get("event") == "started")
    assert server.process.wait(30) == 0
    assert server.pid != before


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix:{app_dir}/s"])
def test_an_upgrade_is_another_process_with_new_code_on_the_same_socket(bind: str, app_dir: Path) -> None:
    """The pid file and the path of the socket are the successor's, and go with that."""
    pid_file = app_dir / "pid"
    given = ["-b", bind.format(app_dir=app_dir), "-w", "1", "--pid-file", str(pid_file)]
    with served("--app-dir", str(app_dir), *given, "shop:handle") as server:
        assert answer(server.address).startswith("first ")
        (app_dir / "shop.py").write_text(HANDLER.replace("first", "second"))
        upgraded(server)
        assert answer(server.address).startswith("second ")
        assert int(pid_file.read_text()) == server.pid
        upgraded_again = server.pid
        server.stop()
        assert not is_alive(upgraded_again)
    assert not pid_file.exists()
    assert not (app_dir / "s").exists()


def test_an_upgrade_that_does_not_come_to_serve_changes_nothing(app_dir: Path) -> None:
    pid_file = app_dir / "pid"
    with serve(app_dir, "--pid-file", str(pid_file)) as server:
        since = len(server.events)
        (app_dir / "shop.py").write_text("this is no Python")
        server.tell(signal.SIGUSR2)
        server.wait_for("upgrade_failed", since)
        assert answer(server.address).startswith("first ")
        assert int(pid_file.read_text()) == server.pid
        assert server.stop() == 0
    assert not pid_file.exists()


# -- as process 1 of a container ------------------------------------------------------------------

CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
# Becomes the server, with a child that it has not started: as from `sh -c "helper & exec fdpool serve"`.
WITH_A_STRANGER = ["sh", "-c", 'sleep 600 & exec "$@"', "sh"]
# The same of a process that adopts orphans (PR_SET_CHILD_SUBREAPER), whose stranger comes later.
SUBREAPER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
if os.fork() == 0:
    os.execvp("sh", ["sh", "-c", "sleep 600 & wait", "sh"])
os.execv(sys.argv[1], sys.argv[1:])
"""


def stranger_of(pid: int) -> psutil.Process:
    """The `sleep` below a process, once the shell's child has become it."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found[:] = [each for each in psutil.Process(pid).children(recursive=True) if each.name() == "sleep"]
        return bool(found)

    wait_until(is_there)
    (stranger,) = found
    return stranger


def test_as_process_1_it_reaps_strangers_and_is_not_upgraded(app_dir: Path) -> None:
    """S12: a successor would be killed with the container, which ends with its process 1."""
    if subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    with serve(app_dir, under=[*CONTAINER, *WITH_A_STRANGER]) as server:
        (server.pid,) = [each.pid for each in psutil.Process(server.process.pid).children()]
        stranger = stranger_of(server.pid)
        assert stranger.ppid() == server.pid
        stranger.kill()
        wait_until(lambda: not psutil.pid_exists(stranger.pid))
        server.wait_for("upgrade_refused", server.tell(signal.SIGUSR2))
        server.wait_for("reloaded", server.tell(signal.SIGHUP))
        assert answer(server.address).startswith("first ")
        server.stop()
        assert server.process.returncode == 0


def test_as_a_parent_of_orphans_it_reaps_them_and_takes_no_status_that_it_waits_for(app_dir: Path) -> None:
    """S12: they come to a subreaper as they come to process 1."""
    with serve(app_dir, under=[sys.executable, "-c", SUBREAPER]) as server:
        stranger = stranger_of(server.pid)
        (parent,) = [each for each in psutil.Process(server.pid).children() if each.pid == stranger.ppid()]
        parent.kill()
        wait_until(lambda: stranger.ppid() == server.pid)
        assert stranger.is_running()
        wait_until(lambda: not psutil.pid_exists(parent.pid))
        stranger.kill()
        wait_until(lambda: not psutil.pid_exists(stranger.pid))
        (app_dir / "shop.py").write_text("this is no Python")
        failed = server.wait_for("upgrade_failed", server.tell(signal.SIGUSR2))
        assert failed["reason"] == "it exited with code 3"
        assert server.stop() == 0


# -- the pid file of a successor -----------------------------------------------------------------------


def test_a_successor_that_cannot_write_the_pid_file_leaves_it_to_the_server_that_there_is(
    app_dir: Path,
) -> None:
    """The disk may be full: then nobody would know whom to send signals to."""
    folder = app_dir / "run"
    folder.mkdir()
    pid_file = folder / "pid"
    with serve(app_dir, "--pid-file", str(pid_file)) as server:
        since = len(server.events)
        folder.rename(app_dir / "elsewhere")
        server.tell(signal.SIGUSR2)
        server.wait_for("upgrade_failed", since)
        (app_dir / "elsewhere").rename(folder)
        assert answer(server.address).startswith("first ")
        assert int(pid_file.read_text()) == server.pid
        assert server.stop() == 0
    assert not pid_file.exists()


# -- exit status -----------------------------------------------------------------------------------


def test_bad_usage_is_status_2() -> None:
    done = run("no-target")
    assert done.returncode == 2
    assert "'module:attribute'" in done.stderr


def test_started_in_a_folder_that_has_been_removed_it_says_so(app_dir: Path) -> None:
    gone = app_dir / "gone"
    gone.mkdir()
    command = 'rmdir "$PWD"; exec "$0" "$@"'
    serving = [sys.executable, "-m", "fdpool", "serve", "-b", "127.0.0.1:0", "shop:handle"]
    done = subprocess.run(
        ["sh", "-c", command, *serving],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "has been removed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_status_1_and_says_so(app_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("--app-dir", str(app_dir), "-b", place, "--pid-file", str(app_dir / "pid"), "shop:handle")
    assert done.returncode == 1
    assert f"cannot listen on tcp://{place}: another process listens there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (app_dir / "pid").exists()


def test_the_pid_file_of_another_server_is_status_1(app_dir: Path) -> None:
    pid_file = str(app_dir / "pid")
    with serve(app_dir, "--pid-file", pid_file) as server:
        done = run("--app-dir", str(app_dir), "-b", "127.0.0.1:0", "--pid-file", pid_file, "shop:handle")
        assert done.returncode == 1
        assert f"a server that runs, process {server.pid}" in done.stderr
        assert Path(pid_file).read_text() == f"{server.pid}\n"


SIGNALLED = """
import os, signal, sys
from fdpool._serve import command

class Signalled(command.PidFile):
    def __init__(self, path, **options):
        super().__init__(path, **options)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        super().close()

command.PidFile = Signalled
status = command.main(sys.argv[1:])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
    os.kill(os.getpid(), number)
sys.exit(status)
"""


def test_signals_are_heeded_from_when_the_pid_file_is_there_until_the_end_and_ignored_then(
    app_dir: Path,
) -> None:
    """W1: whoever finds the number in it may use it at once, and nobody waits for a line of the log first. And who asks
    twice does not make a server look killed that has ended well."""
    pid_file = app_dir / "pid"
    arguments = (
        "--app-dir",
        str(app_dir),
        "-b",
        "127.0.0.1:0",
        "-w",
        "1",
        "--pid-file",
        str(pid_file),
        "shop:handle",
    )
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "the server has ended" in done.stderr
    assert not pid_file.exists()


def test_code_that_never_boots_is_status_3_with_its_traceback(app_dir: Path) -> None:
    """S4: for an orchestrator, which need not try for ever either."""
    done = run("--app-dir", str(app_dir), "-b", "127.0.0.1:0", "-w", "1", "shop:nothing")
    assert done.returncode == 3
    assert "it has no 'nothing', which 'shop:nothing' asks for" in done.stderr


def test_a_failed_boot_is_told_from_where_the_application_begins(app_dir: Path) -> None:
    """S4: no frame of ours, or of the import system, stands before the line that somebody has to mend."""
    (app_dir / "shop.py").write_text("def make():\n    raise RuntimeError('no database')\n")
    done = run("--app-dir", str(app_dir), "-b", "127.0.0.1:0", "-w", "1", "shop:make()")
    first = done.stderr.partition("failed to boot")[2].splitlines()
    assert first[0] == ": RuntimeError: no database"
    assert first[1] == "Traceback (most recent call last):"
    assert first[2] == f'  File "{app_dir}/shop.py", line 2, in make'


def test_a_module_that_is_not_there_is_told_with_where_it_was_looked_for(app_dir: Path) -> None:
    done = run("--app-dir", str(app_dir), "-b", "127.0.0.1:0", "-w", "1", "shopp.web:app")
    assert (
        f"there is no module 'shopp', which 'shopp.web:app' asks for: it was looked for in '{app_dir}'"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit('no settings')", "it exited: no settings"),
        ("class App: pass\nhandle = App()", "an application is callable, and an object of shop.App is not"),
        (
            "def handle(one): pass",
            "it cannot be told what kind of application shop.handle is, as it takes (one)",
        ),
    ],
)
def test_the_reason_of_a_failed_boot_is_the_same_for_every_worker(
    source: str, reason: str, app_dir: Path
) -> None:
    """S4: no address of an object is in it, which would make each look like news."""
    (app_dir / "shop.py").write_text(source)
    done = run("--app-dir", str(app_dir), "-b", "127.0.0.1:0", "-w", "1", "shop:handle")
    assert f"failed to boot: {reason}" in done.stderr or f"failed to boot: TypeError: {reason}" in done.stderr
    assert " at 0x" not in done.stderr


def test_what_cannot_be_preloaded_is_told_once_with_its_traceback(app_dir: Path) -> None:
    """S4."""
    done = run(
        "--app-dir", str(app_dir), "-b", "127.0.0.1:0", "-w", "1", "--preload", "nowhere", "shop:handle"
    )
    assert done.returncode == 3
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.count("(as the one before)") == 4


@pytest.mark.parametrize(("interface", "library"), [("asgi", "uvicorn"), ("wsgi", "waitress")])
def test_what_serves_http_is_named_where_it_is_not_installed(
    interface: str, library: str, app_dir: Path
) -> None:
    (app_dir / "sitecustomize.py").write_text(f"import sys\nsys.modules['{library}'] = None\n")
    env = {"PYTHONPATH": f"{app_dir}:{ROOT}"}
    done = run("-b", "127.0.0.1:0", "-w", "1", "--interface", interface, "shop:handle", env=env)
    assert done.returncode == 1
    assert f"is served by {library}, which is not installed: pip install 'fdpool[{interface}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_serves_http_is_named_also_where_the_application_was_not_said_to_need_it(app_dir: Path) -> None:
    (app_dir / "sitecustomize.py").write_text("import sys\nsys.modules['waitress'] = None\n")
    (app_dir / "shop.py").write_text("def app(environ, start_response): pass\n")
    env = {"PYTHONPATH": f"{app_dir}:{ROOT}"}
    done = run("-b", "127.0.0.1:0", "-w", "1", "shop:app", env=env)
    assert done.returncode == 3
    assert (
        "failed to boot: ModuleNotFoundError: an application of the kind 'wsgi' is served by waitress, "
        in done.stderr
    )
    assert "pip install 'fdpool[wsgi]'" in done.stderr


# -- --check ---------------------------------------------------------------------------------------


def test_a_check_says_what_would_be_done_and_does_none_of_it(app_dir: Path) -> None:
    done = run("--check", "--app-dir", str(app_dir), "-b", f"unix:{app_dir}/s", "-w", "3", "shop:handle")
    assert done.stdout.splitlines() == [
        "shop:handle loads, and is served as handler",
        f"would listen on unix:{app_dir}/s",
        "would start 3 workers, dispatch shared",
    ]
    assert (done.stderr, done.returncode) == ("", 0)
    assert not (app_dir / "s").exists()


def test_a_check_finds_everything_that_is_wrong(app_dir: Path) -> None:
    (app_dir / "broken.py").write_text("import no_such_module")
    done = run("--check", "--app-dir", str(app_dir), "-b", "unix:/no/folder/s", "-b", "fd:99", "broken:app")
    assert done.returncode == 1
    assert "cannot load broken:app: ModuleNotFoundError: No module named 'no_such_module'" in done.stderr
    assert f'File "{app_dir}/broken.py", line 1' in done.stderr
    assert "cannot listen on unix:/no/folder/s: its folder does not exist" in done.stderr
    assert "cannot listen on fd:99: it is not open" in done.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def make():\n    raise RuntimeError('no database')", "RuntimeError: no database"),
        ("import sys\nsys.exit('no settings')", "it exited: no settings"),
        ("import os\nos._exit(9)", "it exited with code 9"),
    ],
)
def test_a_check_tells_a_failure_as_the_server_would(source: str, reason: str, app_dir: Path) -> None:
    """S4: from where the application begins, and not as the loss of a task."""
    (app_dir / "failing.py").write_text(source)
    done = run("--check", "--app-dir", str(app_dir), "-b", "127.0.0.1:0", "failing:make()")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == f"fdpool serve: cannot load failing:make(): {reason}"
    frames = [line for line in lines if line.startswith("  File ")]
    assert all(line.startswith(f'  File "{app_dir}/failing.py", line 2') for line in frames)
    assert len(frames) == (0 if "_exit" in source else 1)


@pytest.mark.parametrize("dispatch", ["shared", "reuseport"])
def test_a_check_beside_the_server_that_runs_is_no_failure_and_gets_none_of_its_connections(
    dispatch: str, app_dir: Path
) -> None:
    """The address is in use then, by what is to be reloaded."""
    with serve(app_dir, "--dispatch", dispatch) as server:
        place = server.address.removeprefix("tcp://")
        done = run("--check", "--app-dir", str(app_dir), "--dispatch", dispatch, "-b", place, "shop:handle")
        assert done.returncode == 0
        assert f"would listen on {place}, which is in use now" in done.stdout


def test_a_check_of_listeners_apart_says_where_they_cannot_be(app_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        where = ("-b", f"unix:{app_dir}/s", "-b", f"fd:{given.fileno()}")
        arguments = ("--check", "--app-dir", str(app_dir), "--dispatch", "reuseport", *where, "shop:handle")
        done = run(*arguments, pass_fds=(given.fileno(),))
    assert done.returncode == 1
    assert "SO_REUSEPORT is for TCP, not for unix:" in done.stderr
    assert "it was bound without SO_REUSEPORT" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "target", "reason"),
    [
        (
            ("--option", "bogus=1"),
            "shop:asgi",
            "cannot serve shop:asgi as asgi: TypeError: Config.__init__() got an unexpected keyword argument 'bogus'",
        ),
        (("--option", "http=nonsense"), "shop:asgi", "cannot serve shop:asgi as asgi: "),
        (("--option", "ws=nonsense"), "shop:asgi", "cannot serve shop:asgi as asgi: "),
        (("--option", "lifespan=bogus"), "shop:asgi", "cannot serve shop:asgi as asgi: KeyError: 'bogus'"),
        (
            ("--option", "ssl_certfile=/nowhere"),
            "shop:asgi",
            "cannot serve shop:asgi as asgi: FileNotFoundError: ",
        ),
        (
            ("--option", "bogus=1"),
            "shop:wsgi",
            "cannot serve shop:wsgi as wsgi: ValueError: Unknown adjustment 'bogus'",
        ),
        (
            ("--option", "workers=4"),
            "shop:asgi",
            "cannot serve shop:asgi as asgi: ValueError: option workers is of no effect here: how many there are",
        ),
        (
            ("--option", "proxy_headers=False"),
            "shop:asgi",
            "cannot serve shop:asgi as asgi: TypeError: option proxy_headers is true or false, not 'False'",
        ),
        (
            ("--option", "timeout_keep_alive=20s"),
            "shop:asgi",
            "cannot serve shop:asgi as asgi: TypeError: option timeout_keep_alive is a number, not '20s'",
        ),
        (
            ("--dispatch", "handoff"),
            "shop:serve",
            "cannot serve shop:serve as listeners: ValueError: an application that accepts for itself",
        ),
        (("-w", "513"), "shop:handle", "a server has 512 workers at most, not 513"),
    ],
)
def test_a_check_finds_what_would_keep_the_server_from_beginning(
    arguments: tuple[str, ...], target: str, reason: str, app_dir: Path
) -> None:
    for needed in ("uvicorn", "waitress"):
        pytest.importorskip(needed)
    kinds = "async def asgi(scope, receive, send): pass\ndef wsgi(environ, start_response): pass\n"
    (app_dir / "shop.py").write_text(f"{HANDLER}\n{kinds}\ndef serve(listeners): pass\n")
    done = run("--check", "--app-dir", str(app_dir), "-b", "127.0.0.1:0", *arguments, target)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fdpool serve: {reason}")


def test_a_check_that_nobody_reads_to_its_end_says_nothing_of_that(app_dir: Path) -> None:
    command = f"{sys.executable} -m fdpool serve --check --app-dir {app_dir} -b 127.0.0.1:0 shop:handle"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command.split(), env=env, stdout=nobody, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_file_that_is_named_in_place_of_its_module_is_told(app_dir: Path) -> None:
    done = run("--check", "--app-dir", str(app_dir), "-b", "127.0.0.1:0", "shop.py:handle")
    assert done.returncode == 1
    assert "a module is named without its '.py': shop:handle" in done.stderr


def test_a_check_finds_that_there_is_no_such_event_loop(app_dir: Path) -> None:
    pytest.importorskip("uvicorn", "0.36")
    (app_dir / "shop.py").write_text("async def asgi(scope, receive, send): pass\n")
    where = ("--app-dir", str(app_dir), "-b", "127.0.0.1:0")
    done = run("--check", *where, "--option", "loop=nonsense", "shop:asgi")
    assert done.returncode == 1
    assert "fdpool serve: cannot serve shop:asgi as asgi: " in done.stderr
    assert 'Import string "nonsense" must be in format' in done.stderr


@pytest.mark.parametrize("target", ["shop:asgi", "shop:wsgi", "shop:Handle", "shop:serve"])
def test_a_check_of_every_kind_of_application_leaves_nothing_to_be_warned_of(
    target: str, app_dir: Path
) -> None:
    for needed in ("uvicorn", "waitress"):
        pytest.importorskip(needed)
    (app_dir / "shop.py").write_text(
        "import socketserver\n"
        "async def asgi(scope, receive, send): pass\n"
        "def wsgi(environ, start_response): pass\n"
        "class Handle(socketserver.BaseRequestHandler): pass\n"
        "def serve(listeners): pass\n"
    )
    where = ("--app-dir", str(app_dir), "-b", "127.0.0.1:0")
    done = run("--check", *where, target, env={"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"})
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_check_of_code_that_hangs_ends(app_dir: Path) -> None:
    (app_dir / "hangs.py").write_text("import time\ntime.sleep(1000)")
    done = run(
        "--check", "--app-dir", str(app_dir), "-b", "127.0.0.1:0", "--boot-timeout", "0.5", "hangs:app"
    )
    assert done.returncode == 1
    assert "hangs:app is not loaded within 0.5 s" in done.stderr


# -- where it listens ------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_answered_over_tcp_and_a_unix_socket(app_dir: Path) -> None:
    path = f"{app_dir}/s"
    with serve(app_dir, "-b", f"unix:{path}?mode=600") as server:
        assert os.stat(path).st_mode & 0o777 == 0o600
        for where in (["--unix-socket", path, "http://x/"], [server.address.replace("tcp", "http")]):
            done = subprocess.run(["curl", "-sS", *where], capture_output=True, text=True, check=True)
            assert done.stdout.startswith("first ")
    assert not os.path.exists(path)


def ask_as_soon_as_it_listens(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        wait_until(lambda: client.connect_ex(path) == 0)
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK")


@contextlib.contextmanager
def killed_at_last(program: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """A process that does not outlive the test, whatever becomes of that."""
    with program:
        try:
            yield program
        finally:
            program.kill()


@pytest.fixture
def told(tmp_path: Path) -> Iterator[list[str]]:
    """What a service manager has been told at `tmp_path / "notify"`: it takes everything at once, as systemd does."""
    said: list[str] = []
    enough = threading.Event()

    def listen() -> None:
        while not enough.is_set():
            try:
                said.extend(manager.recv(10_000).decode().splitlines())
            except TimeoutError:
                continue

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(0.05)
        listening = threading.Thread(target=listen)
        listening.start()
        yield said
        enough.set()
        listening.join()


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="it comes with systemd")
def test_under_systemd_it_takes_the_sockets_and_tells_its_states(app_dir: Path, told: list[str]) -> None:
    """Activated by the first connection, which is answered; then a reload, and the end."""
    command = ["systemd-socket-activate", "-l", f"{app_dir}/s", "-E", f"PYTHONPATH={ROOT}"]
    command += ["-E", f"NOTIFY_SOCKET={app_dir}/notify", "-E", "WATCHDOG_USEC=200000"]
    command += [sys.executable, "-m", "fdpool", "serve", "--app-dir", str(app_dir), "-w", "1", "shop:handle"]
    with killed_at_last(subprocess.Popen(command, stderr=subprocess.DEVNULL)) as program:
        ask_as_soon_as_it_listens(f"{app_dir}/s")
        wait_until(lambda: "READY=1" in told and "WATCHDOG=1" in told)
        program.send_signal(signal.SIGHUP)
        wait_until(lambda: "RELOADING=1" in told and "READY=1" in told[told.index("RELOADING=1") :])
        assert told[told.index("RELOADING=1") + 1].startswith("MONOTONIC_USEC=")
        program.terminate()
        assert program.wait(20) == 0
        wait_until(lambda: "STOPPING=1" in told)
    assert os.path.exists(f"{app_dir}/s")  # it is systemd's


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="it comes with systemd")
def test_under_systemd_an_upgrade_goes_on_with_its_sockets_and_says_who_is_the_main_process(
    app_dir: Path, told: list[str]
) -> None:
    """LISTEN_PID named the process before, and so did WATCHDOG_PID."""
    pid_file = app_dir / "pid"
    command = ["systemd-socket-activate", "-l", f"{app_dir}/s", "-E", f"PYTHONPATH={ROOT}"]
    command += ["-E", f"NOTIFY_SOCKET={app_dir}/notify", sys.executable, "-m", "fdpool", "serve"]
    command += ["--app-dir", str(app_dir), "-w", "1", "--pid-file", str(pid_file), "shop:handle"]
    with killed_at_last(subprocess.Popen(command, stderr=subprocess.DEVNULL)) as program:
        ask_as_soon_as_it_listens(f"{app_dir}/s")
        wait_until(lambda: "READY=1" in told)
        program.send_signal(signal.SIGUSR2)
        assert program.wait(30) == 0
        successor = int(pid_file.read_text())
        try:
            assert successor != program.pid
            wait_until(lambda: f"MAINPID={successor}" in told)
            assert answer(f"unix:{app_dir}/s").startswith("first ")
        finally:
            os.kill(successor, signal.SIGTERM)
            wait_until(lambda: not is_alive(successor), 30.0)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_never_mistaken_for_sockets(closed: str, app_dir: Path) -> None:
    """R2."""
    line = f"exec {sys.executable} -m fdpool serve --app-dir {app_dir} -b unix:{app_dir}/s -w 1 shop:handle {closed}"
    with killed_at_last(subprocess.Popen(["sh", "-c", line], cwd=ROOT)) as program:
        ask_as_soon_as_it_listens(f"{app_dir}/s")
        for each in [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]:
            for fd in (0, 1, 2):
                assert "socket" not in os.readlink(f"/proc/{each.pid}/fd/{fd}")
        program.terminate()
        assert program.wait(20) == 0


# -- HTTP ------------------------------------------------------------------------------------------

ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"].upper()})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})
"""

WSGI = """
def make():
    def app(environ, start_response):
        body = environ["wsgi.input"].read().upper() or b"hello"
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
    return app
"""


def test_an_asgi_application_is_served_and_connections_are_kept(app_dir: Path) -> None:
    pytest.importorskip("uvicorn")
    (app_dir / "shop.py").write_text(ASGI)
    with serve(app_dir, "--option", "server_header=false", target="shop:app") as server:
        connection = http.client.HTTPConnection(server.address.removeprefix("tcp://"), timeout=10)
        for _ in range(3):
            connection.request("GET", "/")
            response = connection.getresponse()
            assert response.read() == b"hello"
            assert response.getheader("server") is None  # as uvicorn was told
        connection.close()


def test_a_websocket_talks_to_its_worker(app_dir: Path) -> None:
    pytest.importorskip("uvicorn")
    client = pytest.importorskip("websockets.sync.client")
    (app_dir / "shop.py").write_text(ASGI)
    with serve(app_dir, target="shop:app") as server:
        with client.connect(server.address.replace("tcp", "ws") + "/") as talking:
            for text in ("one", "two"):
                talking.send(text)
                assert talking.recv(timeout=10) == text.upper()


def test_a_wsgi_application_from_a_factory_is_served(app_dir: Path) -> None:
    pytest.importorskip("waitress")
    (app_dir / "shop.py").write_text(WSGI)
    with serve(app_dir, "--threads", "4", target="shop:make()") as server:
        assert answer(server.address) == "hello"
        connection = http.client.HTTPConnection(server.address.removeprefix("tcp://"), timeout=10)
        connection.request("POST", "/", body=b"x" * 300_000)
        assert connection.getresponse().read() == b"X" * 300_000
        connection.close()
