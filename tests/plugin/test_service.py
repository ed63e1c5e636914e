"""`session_service`: one server for all processes of a run, started by the first and ended with the last."""

from __future__ import annotations

import enum
import fcntl
import functools
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import fdpool
from fdpool._fixtures.errors import ServerDied
from fdpool._fixtures.service import Services
from tests.plugin.conftest import Run
from tests.process_state import living, seconds_until_gone, wait_until


def tell_pid(listening: socket.socket) -> None:
    print("serving")
    while True:
        with listening.accept()[0] as connection:
            connection.sendall(str(os.getpid()).encode())


def test_all_holders_have_one_server_and_it_ends_with_the_last(tmp_path: Path) -> None:
    run = str(tmp_path)  # which no other process on this machine has
    first, second, other = Services(run), Services(run), Services(f"another than {run}")
    try:
        one, two, third = (services("pids", tell_pid) for services in (first, second, other))
        assert first("pids", tell_pid) is one
        assert one.pid == two.pid != third.pid
        assert one.address == two.address != third.address
        assert one.url == two.url
        for service in (one, two):
            with service.listener.connect() as client:
                assert int(client.recv(20)) == service.pid
        assert two.logs == "serving\n"
        server = psutil.Process(one.pid)
        first.close()
        with two.listener.connect() as client:
            assert int(client.recv(20)) == two.pid
        second.close()
        assert seconds_until_gone([server]) < 4
        assert psutil.pid_exists(third.pid)
    finally:
        for services in (first, second, other):
            services.close()
    wait_until(lambda: not any(os.path.exists(each._folder) for each in (first, other)))


def test_a_holder_that_is_killed_lets_go(tmp_path: Path) -> None:
    """F3."""
    program = (
        "import os, sys, time\n"
        "from fdpool._fixtures.service import Services\n"
        "from tests.plugin.test_service import tell_pid\n"
        "services = Services(sys.argv[1])\n"
        "print(services('pids', tell_pid).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.kill()
    assert seconds_until_gone([server]) < 4


def test_a_service_that_ends_takes_no_name_from_the_next(tmp_path: Path) -> None:
    """Who holds the name's lock, and is about to start a service, is at the door of the one that ends, or at none."""
    services = Services(str(tmp_path))
    services("pids", tell_pid)
    path = f"{services._folder}/pids"
    with open(f"{path}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waits = re.compile(rf"-> FLOCK .*:{os.fstat(lock.fileno()).st_ino} ")
        services.close()
        wait_until(lambda: not os.path.exists(path) or waits.search(Path("/proc/locks").read_text()))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    wait_until(lambda: not os.path.exists(services._folder))


def test_a_program_may_be_a_service(tmp_path: Path) -> None:
    services = Services(str(tmp_path))
    program = "import socket; s = socket.socket(fileno=3)\nwhile 1: s.accept()[0].sendall(b'program')"
    try:
        service = services.command("shouter", [sys.executable, "-c", program], kind="unix")
        with service.listener.connect() as client:
            assert client.recv(20) == b"program"
    finally:
        services.close()
    assert seconds_until_gone(living([service.pid])) < 4


def test_a_program_s_arguments_may_be_what_serve_takes(tmp_path: Path) -> None:
    """Paths and numbers, and names that are not UTF-8."""
    services = Services(str(tmp_path))
    program = tmp_path / "program.py"
    program.write_text(
        "import os, socket, sys; s = socket.socket(fileno=3)\n"
        "while 1: s.accept()[0].sendall(os.fsencode(sys.argv[1] + sys.argv[2]))"
    )
    try:
        service = services.command("teller", [sys.executable, program, 5, os.fsdecode(b"\xff")])  # type: ignore[list-item]
        with service.listener.connect() as client:
            assert client.recv(20) == b"5\xff"
    finally:
        services.close()


def test_the_folder_of_services_may_go_as_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = Services(str(tmp_path))
    mkdir, there = os.mkdir, iter([True])

    def mkdir_as_it_goes(path: str, mode: int) -> None:
        if next(there, False):
            raise FileExistsError(path)  # and it has gone by the time that it is looked at
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir_as_it_goes)
    services._make_folder()
    os.rmdir(services._folder)


def test_one_that_cannot_be_started_fails_every_holder_with_the_reason(tmp_path: Path) -> None:
    def fails(listening: socket.socket, ready: object) -> None:
        raise LookupError("no such database")

    services = Services(str(tmp_path))
    for _ in range(2):
        with pytest.raises(
            ServerDied, match="the service db could not be started: .*LookupError: no such database"
        ):
            services("db", fails)
    services.close()


def test_what_it_wrote_is_told_by_the_error(tmp_path: Path) -> None:
    services = Services(str(tmp_path))
    for _ in range(2):
        with pytest.raises(ServerDied) as caught:
            services.command("db", ["sh", "-c", "echo no such table; exit 3"], fds={})
        assert caught.value.logs == "no such table\n"
        assert str(caught.value).endswith(
            "exited with status 3 before it was ready; it had written:\nno such table"
        )
    services.close()


def test_misuse_is_refused(tmp_path: Path) -> None:
    services = Services(str(tmp_path))
    with pytest.raises(ValueError, match="a service is named by a string without slashes, not 'a/b'"):
        services("a/b", tell_pid)
    for name in (".", "..", "a.lock"):  # with a lock's, the service "a" would never end
        with pytest.raises(ValueError, match=f"a service cannot be called '{re.escape(name)}'"):
            services(name, tell_pid)
    with pytest.raises(ValueError, match="the service's name is too long for a Unix socket in /.*: 'xxx"):
        services("x" * 100, tell_pid)
    with pytest.raises(fdpool.NotPicklable, match="cannot travel to a process that keeps it"):
        services("x", tell_pid, (each for each in "x"))


def test_two_services_never_go_by_one_name(tmp_path: Path) -> None:
    """Whoever asks: the second would be given the server of the first, and not know."""
    first, second = Services(str(tmp_path)), Services(str(tmp_path))
    try:
        first("pids", tell_pid)
        for services in (first, second):
            with pytest.raises(
                ValueError, match=r"'pids' is tests\.plugin\.test_service\.tell_pid, and app:app needs a name"
            ):
                services("pids", "app:app")
    finally:
        first.close()
        second.close()


def tell(listening: socket.socket, *args: object) -> None:
    while True:
        with listening.accept()[0] as connection:
            connection.sendall(repr(args).encode())


class Color(enum.Enum):
    RED = 1


@dataclass
class Settings:
    port: int
    colors: set[object]


@pytest.mark.parametrize(
    ("alike", "other"),
    [
        ((1,), (2,)),
        ((), (None,)),
        (("/tmp", {"a": 1, "b": [Color.RED]}), (Path("/tmp"), {"b": [Color.RED], "a": 2})),
        ((Settings(1, {"x", "y", Color.RED}),), (Settings(1, {"x", "y"}),)),
    ],
)
def test_a_service_is_not_had_for_other_arguments(
    tmp_path: Path, alike: tuple[object, ...], other: tuple[object, ...]
) -> None:
    """Whoever asks: it would be given the server of other arguments, and not know. Of what cannot be compared between
    processes only the kind counts."""
    first, second = Services(str(tmp_path)), Services(str(tmp_path))
    try:
        held = first("it", tell, *alike, bytes)
        for services in (first, second):
            assert services("it", tell, *pickle.loads(pickle.dumps(alike)), bytes).pid == held.pid
            with pytest.raises(ValueError, match=r"'it' was started with .*, and with .*\.tell needs a name"):
                services("it", tell, *other, bytes)
            with pytest.raises(ValueError, match="'it' was started with .*kind='unix' .*tell needs a name"):
                services("it", tell, *alike, bytes, kind="unix")
            with pytest.raises(
                ValueError, match=r"'it' is .*\.tell, and .*\.tell\(3\) needs a name of its own"
            ):
                services("it", functools.partial(tell, 3))
    finally:
        first.close()
        second.close()


def test_a_test_may_ask_for_a_service_itself_and_is_not_blamed_for_it(run_pytest: Run) -> None:
    """It stays after that test, and is meant to."""
    outcome = run_pytest(
        """
        import socket
        def tell(listening):
            while True:
                with listening.accept()[0] as connection: connection.sendall(b"told")
        def test_first(session_service):
            with session_service("teller", tell).listener.connect() as client: assert client.recv(4) == b"told"
        def test_second(session_service):
            with session_service("teller", tell).listener.connect() as client: assert client.recv(4) == b"told"
        """,
        "--fdpool-leaks=fail",
    )
    outcome.assert_counts(passed=2)


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    services = Services(str(tmp_path))
    folder = Path(services._folder)
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not a folder that only this user may enter"):
        services("pids", tell_pid)
    folder.chmod(0o700)
    services("pids", tell_pid)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    services.close()
    wait_until(lambda: not folder.exists())


def test_processes_of_xdist_share_one_server(run_pytest: Run, tmp_path: Path) -> None:
    """F1: sixteen tests in three processes, all at one server that was started once."""
    outcome = run_pytest(
        """
        import os, socket, pytest
        def tell_pid(listening):
            while True:
                with listening.accept()[0] as connection:
                    connection.sendall(str(os.getpid()).encode())
        @pytest.fixture(scope="session")
        def service(session_service): return session_service("pids", tell_pid)
        @pytest.mark.parametrize("number", range(16))
        def test_it(service, number, worker_id):
            with service.listener.connect() as client:
                assert int(client.recv(20)) == service.pid
            with open("found", "a") as file: file.write(f"{service.pid} {worker_id}\\n")
        def test_last(): pass
        """,
        "-n3",
        "--fdpool-leaks=fail",
        plugins=["xdist"],
    )
    outcome.assert_counts(passed=17)
    lines = [line.split() for line in (tmp_path / "found").read_text().splitlines()]
    assert len({pid for pid, _ in lines}) == 1
    assert len({worker for _, worker in lines}) == 3


def test_a_run_inside_a_process_of_xdist_has_services_of_its_own(run_pytest: Run, tmp_path: Path) -> None:
    (tmp_path / "inner.py").write_text(
        "def other(listening): listening.accept()\n"
        "def test_inner(session_service): session_service('app', other)\n"
    )
    outcome = run_pytest(
        """
        import subprocess, sys
        def one(listening):
            while True: listening.accept()[0].close()
        def test_outer(session_service):
            session_service("app", one)
            command = [sys.executable, "-m", "pytest", "-p", "fdpool.pytest_plugin", "inner.py"]
            assert subprocess.run(command).returncode == 0
        """,
        "-n1",
        plugins=["xdist"],
    )
    outcome.assert_counts(passed=1)
