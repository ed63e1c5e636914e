"""A server as a program: signals, upgrades, exit codes, and its end (S1, S3, S4, S12, S13, W1, W4, W7)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import psutil
import pytest

from fdpool._server.signals import Signals
from tests.process_state import seconds_until_gone, wait_until
from tests.server.helpers import Load, read_all
from tests.server.programs import Program, ask_port, port_in, program

PLAIN = 'sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=2).run())'


def begin_sleeping(port: int, seconds: float) -> socket.socket:
    """A connection that a worker has begun to serve, and that takes so long."""
    client = socket.create_connection(("127.0.0.1", port), 20)
    client.sendall(f"sleep{seconds}".encode())
    assert client.recv(1) == b"z"
    return client


HOLD = """
import threading
is_second = "FDPOOL_UPGRADE" in os.environ

def hold(connection, address):
    connection.sendall(b"z")
    while not os.path.exists("go"):
        time.sleep(0.01)
    connection.sendall(b"%d" % os.getpid())

def wait_while(name):
    while os.path.exists(name):
        time.sleep(0.01)

def boot_for_long(worker):
    if worker.slot == 1:
        wait_while("wait")
"""


def begin_holding(port: int) -> socket.socket:
    """A connection that a worker has begun to serve, until there is a file `go`."""
    client = socket.create_connection(("127.0.0.1", port), 20)
    assert client.recv(1) == b"z"
    return client


def test_sigterm_ends_it_when_requests_in_flight_are_done(tmp_path: Path) -> None:
    """W1."""
    with program(tmp_path, PLAIN) as server:
        port = port_in(server.expect("started"))
        tree = server.tree()
        with begin_sleeping(port, 0.4) as client:
            server.signal(signal.SIGTERM)
            assert int(read_all(client)) in [each.pid for each in tree]
        assert server.wait() == 0
        assert seconds_until_gone(tree) < 4
        server.expect("stopped")
        assert server.events()[-1] == "stopped"


@pytest.mark.parametrize(
    ("number", "event"), [(signal.SIGTERM, "stopping"), (signal.SIGUSR1, "logs_reopened")]
)
def test_what_is_sent_to_all_of_its_processes_at_once_cuts_off_no_request(
    tmp_path: Path, number: int, event: str
) -> None:
    """W7: `systemctl stop` does so, unless `KillMode=` says otherwise, and `systemctl kill`."""
    body = """
        def twice(connection, address):
            for _ in range(2):
                connection.recv(1)
                connection.sendall(b"z")

        sys.exit(fdpool.Server(twice, "127.0.0.1:0", workers=2).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        with socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"z"
            main, *others = server.tree()
            for process in (*others, main):  # the supervisor first, and the server last
                process.send_signal(number)
            server.expect(event)
            client.sendall(b"x")
            assert client.recv(1) == b"z"
        if number == signal.SIGUSR1:
            assert set(server.tree()) == {main, *others}
            server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_supervisor_ignores_what_a_server_heeds_and_its_workers_ignore_nothing(tmp_path: Path) -> None:
    """W7: whoever signals all of a server's processes means the server."""
    heeded = [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    heeded += [signal.SIGTTIN, signal.SIGTTOU]
    with program(tmp_path, PLAIN) as server:
        server.expect("started")
        main, supervisor, worker, _ = server.tree()
        assert (supervisor.ppid(), worker.ppid()) == (main.pid, supervisor.pid)
        ignored = int(Path(f"/proc/{worker.pid}/status").read_text().partition("SigIgn:")[2].split()[0], 16)
        assert not any(ignored >> (number - 1) & 1 for number in heeded)
        for number in heeded:
            supervisor.send_signal(number)
        worker.kill()
        replacement = server.expect("worker_ready")["worker_pid"]
        assert psutil.Process(replacement).ppid() == supervisor.pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_signal_cuts_off_after_a_second_and_the_second_one_at_once(
    tmp_path: Path, number: int
) -> None:
    """W1: even where a slow end has begun."""
    # The second is not to come after the first one's second, however busy the machine is; that is the next test's.
    patient = "from fdpool._server import signals\nsignals._QUICK_S = 30.0\n"
    with program(tmp_path, patient + PLAIN.replace("workers=2", "workers=1, grace=60")) as server:
        port = port_in(server.expect("started"))
        tree = server.tree()
        with begin_sleeping(port, 60):
            server.signal(signal.SIGTERM)
            server.expect("stopping")
            server.signal(number)
            server.expect("stopping")  # two that are pending at a time are one
            server.signal(number)
            assert "at once" in server.expect("worker_exited")["reason"]
            assert server.wait() == 0
        assert seconds_until_gone(tree) < 4


def test_a_second_quick_signal_counts_also_while_the_first_is_being_handled() -> None:
    """W1: a handler may begin anywhere in another one."""

    class Loop:
        graces: ClassVar[list[float]] = []

        def stop(self, grace_s: float) -> None:
            self.graces.append(grace_s)
            if len(self.graces) == 1:
                signal.raise_signal(signal.SIGINT)

    with Signals() as signals:
        signals.begin(cast("Any", Loop()))
        signal.raise_signal(signal.SIGINT)
    assert Loop.graces == [1.0, 0.0]


def test_one_quick_signal_leaves_a_second_for_what_is_in_flight(tmp_path: Path) -> None:
    """W1."""
    with program(tmp_path, PLAIN.replace("workers=2", "workers=1, grace=60")) as server:
        port = port_in(server.expect("started"))
        with begin_sleeping(port, 60):
            server.signal(signal.SIGINT)
            assert "grace" in server.expect("worker_killed")["reason"]
            assert server.wait() == 0


def test_sighup_reloads_and_ttin_and_ttou_scale(tmp_path: Path) -> None:
    """W1."""
    with program(tmp_path, PLAIN) as server:
        port = port_in(server.expect("started"))
        before = {ask_port(port) for _ in range(20)}
        server.signal(signal.SIGHUP)
        assert server.expect("reloaded")["generation"] == 2
        assert not before & {ask_port(port) for _ in range(20)}
        server.signal(signal.SIGTTIN)
        assert server.expect("scaled")["workers"] == 3
        server.expect("worker_ready")
        server.signal(signal.SIGTTOU)
        assert server.expect("scaled")["workers"] == 2
        server.expect("worker_exited")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_ttin_wants_no_more_workers_than_there_may_be_descriptors_for(tmp_path: Path) -> None:
    body = """
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    """
    with program(tmp_path, body + PLAIN) as server:
        port = port_in(server.expect("started"))
        server.signal(signal.SIGTTIN)
        assert "3 workers take about" in server.expect("scale_failed")["reason"]
        server.signal(signal.SIGTTOU)
        assert server.expect("scaled")["workers"] == 1
        server.expect("worker_exited")
        server.signal(signal.SIGTTIN)
        assert server.expect("scaled")["workers"] == 2
        server.expect("worker_ready")
        assert ask_port(port)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_flood_of_signals_ends_where_the_last_ones_point(tmp_path: Path) -> None:
    """S3."""
    with program(tmp_path, PLAIN) as server:
        port = port_in(server.expect("started"))
        for _ in range(30):
            for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGUSR1, signal.SIGTTOU):
                server.signal(number)
        wanted = None
        with Load(lambda: ask_port(port), clients=1) as load:
            server.expect("reloaded")
            load.go_on(5)
        assert load.failed == []
        server.signal(signal.SIGTERM)
        server.expect("stopped")
        wanted = [record["workers"] for record in server.heard if record["event"] == "scaled"]
        assert all(1 <= each <= 32 for each in wanted)
        assert server.wait() == 0


def test_usr1_opens_log_files_anew_here_and_in_the_workers(tmp_path: Path) -> None:
    body = """
    def start(worker):
        logging.basicConfig(filename="worker.log", level="INFO", format="%(message)s")

    def say(connection, address):
        connection.recv(100)
        logging.info("served")
        connection.sendall(b"%d" % os.getpid())

    logging.getLogger().addHandler(logging.FileHandler("server.log"))
    sys.exit(fdpool.Server(say, "127.0.0.1:0", workers=1, on_worker_start=start).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        ask_port(port)
        for name in ("worker", "server"):
            (tmp_path / f"{name}.log").rename(tmp_path / f"{name}.old")
        ask_port(port)
        assert not (tmp_path / "worker.log").exists()
        server.signal(signal.SIGUSR1)
        server.expect("logs_reopened")
        wait_until((tmp_path / "worker.log").exists)
        ask_port(port)
        assert (tmp_path / "worker.old").read_text().count("served") == 2
        wait_until(lambda: (tmp_path / "worker.log").read_text().count("served") == 1)
        wait_until(lambda: "anew" in (tmp_path / "server.log").read_text())


@pytest.mark.parametrize("how", ["preload=True", "start_method='fork'"])
def test_a_worker_that_comes_after_usr1_logs_to_the_new_file(tmp_path: Path, how: str) -> None:
    """What it is forked from has the file open that was moved away."""
    (tmp_path / "shop.py").write_text(
        "import logging, os\n"
        "logging.getLogger().addHandler(logging.FileHandler('shop.log'))\n"
        "def app(connection, address): connection.sendall(b'%d' % os.getpid())\n"
    )
    body = f"""
    import shop

    def start(worker):
        logging.getLogger("shop").error("%d begins", os.getpid())

    sys.exit(fdpool.Server("shop:app", "127.0.0.1:0", workers=1, on_worker_start=start, {how}).run())
    """
    with program(tmp_path, body) as server:
        first = server.expect("worker_ready")["worker_pid"]
        (tmp_path / "shop.log").rename(tmp_path / "shop.old")
        server.signal(signal.SIGUSR1)
        server.expect("logs_reopened")
        os.kill(first, signal.SIGKILL)
        second = server.expect("worker_ready")["worker_pid"]
        assert f"{second} begins" not in (tmp_path / "shop.old").read_text()
        assert f"{second} begins" in (tmp_path / "shop.log").read_text()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_usr1_to_a_worker_opens_its_log_files_anew_and_nobody_elses(tmp_path: Path) -> None:
    body = """
    def start(worker):
        logging.basicConfig(filename=f"{worker.slot}.log", level="INFO", format="%(message)s")
        logging.info("begun")

    logging.getLogger().addHandler(logging.FileHandler("server.log"))
    sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=2, on_worker_start=start).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        ready = {each["slot"]: each["worker_pid"] for each in server.heard if each["event"] == "worker_ready"}
        for name in ("0", "1", "server"):
            (tmp_path / f"{name}.log").rename(tmp_path / f"{name}.old")
        os.kill(ready[1], signal.SIGUSR1)
        wait_until((tmp_path / "1.log").exists)
        assert not (tmp_path / "0.log").exists()
        assert not (tmp_path / "server.log").exists()
        assert ask_port(port) in ready.values()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_log_file_that_cannot_be_opened_anew_is_told_and_tried_again_the_next_time(tmp_path: Path) -> None:
    """Nobody ends of it or goes deaf, here or in the workers, and what is logged meanwhile is in the file before."""
    body = """
    def start(worker):
        logging.basicConfig(filename="log/worker.log", level="INFO", format="%(message)s")

    os.mkdir("log")
    logging.getLogger().addHandler(logging.FileHandler("log/server.log"))
    sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=1, grace=60, on_worker_start=start).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        (tmp_path / "log").rename(tmp_path / "old")
        server.signal(signal.SIGUSR1)
        assert server.expect("reopen_failed")["file"] == str(tmp_path / "log" / "server.log")
        for name in ("server", "worker"):
            old = tmp_path / "old" / f"{name}.log"
            wait_until(lambda old=old: "cannot be opened anew" in old.read_text())
        (tmp_path / "log").mkdir()
        server.signal(signal.SIGUSR1)
        for name in ("server", "worker"):
            wait_until((tmp_path / "log" / f"{name}.log").exists)
        assert ask_port(port)
        server.signal(signal.SIGTERM)
        assert "drained" in server.expect("worker_exited")["reason"]
        assert server.wait() == 0


# -- what systemd is told ------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket that is NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(20)
        yield listening


def states_told(manager: socket.socket) -> list[str]:
    """What it is told until the server stops; the first word of each."""
    said = []
    while said[-1:] != ["STOPPING=1"]:
        said.append(manager.recv(10_000).decode().splitlines()[0])
    return said


def test_systemd_is_told_of_a_reload_that_a_hook_has_called_off(
    tmp_path: Path, manager: socket.socket
) -> None:
    """With Type=notify-reload it waits for its end, whatever that is."""
    body = 'sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=1, on_reload=lambda generation: 1 / 0).run())'
    with program(tmp_path, body, NOTIFY_SOCKET=manager.getsockname()) as server:
        server.expect("started")
        server.signal(signal.SIGHUP)
        server.expect("reload_failed")
        server.signal(signal.SIGTERM)
        assert states_told(manager) == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]
        assert server.wait() == 0


def test_systemd_is_told_that_a_reload_is_over_as_a_successor_serves_before_it_is(
    tmp_path: Path, manager: socket.socket
) -> None:
    """By the predecessor: with NotifyAccess=main the successor is heard from when it is the main process."""
    body = """
    def never(worker):
        while worker.generation == 2:
            time.sleep(0.01)

    sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=1, on_worker_start=never).run())
    """
    with program(tmp_path, body, NOTIFY_SOCKET=manager.getsockname()) as server:
        server.expect("started")
        server.signal(signal.SIGHUP)
        server.expect("reloading")
        server.signal(signal.SIGUSR2)
        successor = server.expect("upgraded")["successor_pid"]
        assert server.wait() == 0
        server.pid = successor
        server.signal(signal.SIGTERM)
        said = states_told(manager)
        assert said[:2] == ["READY=1", "RELOADING=1"]
        assert said[2:] == [
            "READY=1",
            "READY=1",
            f"MAINPID={successor}",
            "STOPPING=1",
        ]  # the first is the successor's


def test_systemd_is_told_of_a_start_when_all_serve_also_after_a_reload_that_was_given_up(
    tmp_path: Path, manager: socket.socket
) -> None:
    code = tmp_path / "served.py"
    code.write_text("def app(connection, address): pass\n")
    body = """
    def wait_until_told(worker):
        while worker.slot == 1 and not os.path.exists("go on"):
            time.sleep(0.01)

    options = {"interface": "handler", "workers": 2, "on_worker_start": wait_until_told}
    sys.exit(fdpool.Server("served:app", "127.0.0.1:0", **options).run())
    """
    with program(tmp_path, body, NOTIFY_SOCKET=manager.getsockname()) as server:
        server.expect("worker_ready")
        good = code.read_text()
        code.write_text("this is no python")
        server.signal(signal.SIGHUP)
        server.expect("reload_failed")
        code.write_text(good)
        (tmp_path / "go on").touch()
        server.expect("started")
        server.signal(signal.SIGTERM)
        assert states_told(manager) == ["RELOADING=1", "READY=1", "STOPPING=1"]
        assert server.wait() == 0


def test_systemd_is_told_again_and_again_that_the_server_is_alive(
    tmp_path: Path, manager: socket.socket
) -> None:
    """sd_watchdog_enabled(3)."""
    body = 'sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=1).run())'
    variables = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "200000"}
    with program(tmp_path, body, **variables) as server:
        server.expect("started")
        said = [manager.recv(10_000)]
        while said.count(b"WATCHDOG=1") < 3:
            said.append(manager.recv(10_000))
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


# -- upgrades ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", ", dispatch='reuseport'", ", dispatch='handoff'"])
def test_an_upgrade_puts_a_new_process_in_place_without_losing_a_connection(
    tmp_path: Path, options: str
) -> None:
    """S1: new code of the program itself, on the same port."""
    body = f'sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=2{options}).run())'
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        old = server.tree()
        with Load(lambda: ask_port(port), clients=2) as load:
            load.go_on(10)
            server.signal(signal.SIGUSR2)
            successor = server.expect("upgrading")["successor_pid"]
            server.expect("upgraded")
            assert server.wait() == 0
            server.pid = successor
            load.go_on(10)
        assert load.failed == []
        assert seconds_until_gone(old) < 5
        assert ask_port(port) in [each.pid for each in psutil.Process(successor).children(recursive=True)]
        server.signal(signal.SIGTERM)
        wait_until(lambda: server.expect("stopped")["at"] == successor)


@pytest.mark.parametrize("successor", ["workers=1, dispatch='reuseport'", "workers=2"])
def test_an_upgrade_to_fewer_listeners_apart_loses_no_connection_that_waits_at_one(
    tmp_path: Path, successor: str
) -> None:
    """S1: the worker that alone takes those stays until none is left."""
    body = "sys.exit(fdpool.Server(hold, '127.0.0.1:0', workers=2, dispatch='reuseport').run())"
    with program(tmp_path, HOLD + body) as server, contextlib.ExitStack() as clients:
        port = port_in(server.expect("started"))
        waiting = [
            clients.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(24)
        ]
        script = tmp_path / "program.py"
        script.write_text(script.read_text().replace("workers=2, dispatch='reuseport'", successor))
        server.signal(signal.SIGUSR2)
        server.pid = server.expect("upgraded")["successor_pid"]
        (tmp_path / "go").touch()
        assert all(read_all(client)[1:].isdigit() for client in waiting)
        assert server.wait() == 0
        with begin_holding(port):
            server.signal(signal.SIGTERM)
        wait_until(lambda: server.expect("stopped")["at"] == server.pid)


def test_an_upgrade_brings_new_code_and_keeps_a_unix_socket_and_its_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    body = f"""
    def version(connection, address):
        connection.sendall(b"1")

    sys.exit(fdpool.Server(version, "unix:{path}", workers=1).run())
    """

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            return read_all(client)

    with program(tmp_path, body) as server:
        server.expect("started")
        assert ask() == b"1"
        script = tmp_path / "program.py"
        script.write_text(script.read_text().replace('b"1"', 'b"2"'))
        inode = path.stat().st_ino
        server.signal(signal.SIGUSR2)
        successor = server.expect("upgrading")["successor_pid"]
        assert server.wait() == 0
        server.pid = successor
        assert ask() == b"2"
        assert path.stat().st_ino == inode
        server.signal(signal.SIGTERM)
        wait_until(lambda: not path.exists())


@pytest.mark.parametrize(
    ("broken", "why"),
    [("raise SystemExit(5)", "code 5"), ("not python", "code 1"), ("os.kill(os.getpid(), 9)", "SIGKILL")],
)
def test_a_successor_that_fails_changes_nothing(tmp_path: Path, broken: str, why: str) -> None:
    """S2, for the program itself."""
    with program(tmp_path, PLAIN) as server:
        port = port_in(server.expect("started"))
        script = tmp_path / "program.py"
        good = script.read_text()
        script.write_text(f"import os\n{broken}\n")
        server.signal(signal.SIGUSR2)
        assert why in server.expect("upgrade_failed")["reason"]
        assert ask_port(port)
        script.write_text(good)
        server.signal(signal.SIGUSR2)
        server.pid = server.expect("upgrading")["successor_pid"]
        assert server.wait() == 0
        assert ask_port(port)


def test_a_successor_that_takes_its_time_to_end_is_told_by_its_exit_code(tmp_path: Path) -> None:
    """It has cleaning up to do, say, or the machine is busy: it is not killed for that."""
    with program(
        tmp_path, f'sys.exit(fdpool.Server(pid, "unix:{tmp_path}/s.sock", workers=1).run())'
    ) as server:
        server.expect("started")
        script = tmp_path / "program.py"
        text = script.read_text().replace("Server(pid, ", 'Server("nothing:here", boot_limit=1, bind=')
        script.write_text(text.replace(".run()", ".run() and time.sleep(1.0) or 9"))
        server.signal(signal.SIGUSR2)
        assert server.expect("upgrade_failed")["reason"] == "it exited with code 9"


@pytest.mark.parametrize(
    "successor",
    [
        'fdpool.Server("nothing:here", "unix:{path}", workers=1, boot_limit=1)',
        'fdpool.Server("nothing:here", "127.0.0.1:0", workers=1, boot_limit=1)',
        'fdpool.Server(pid, "unix:{path}", workers=1, on_ready=lambda: 1 / 0)',
        'fdpool.Server(pid, ["unix:{path}", "unix:/nowhere/s.sock"], workers=1)',
    ],
    ids=["does not boot", "listens elsewhere", "on_ready", "cannot listen"],
)
def test_a_successor_that_fails_leaves_the_file_of_a_unix_socket(tmp_path: Path, successor: str) -> None:
    """S2: however far it has come."""
    path = tmp_path / "s.sock"
    with program(tmp_path, f'sys.exit(fdpool.Server(pid, "unix:{path}", workers=1).run())') as server:
        server.expect("started")
        script = tmp_path / "program.py"
        lines = script.read_text().splitlines()
        script.write_text("\n".join([*lines[:-1], f"sys.exit({successor.format(path=path)}.run())"]))
        server.signal(signal.SIGUSR2)
        server.expect("upgrade_failed")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"x")
            assert read_all(client)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not path.exists()


def test_of_a_program_with_two_servers_an_upgrade_replaces_the_one_that_was_asked(tmp_path: Path) -> None:
    """Also where the other one is started first, and comes to serve."""
    body = """
    with fdpool.Server(pid, "127.0.0.1:0", workers=1):
        sys.exit(fdpool.Server(pid, "localhost:0", workers=1).run())
    """
    with program(tmp_path, body) as server:
        server.expect("started")
        port = port_in(server.expect("started"))
        server.signal(signal.SIGUSR2)
        server.pid = server.expect("upgrading")["successor_pid"]
        server.expect("upgraded")
        assert server.wait() == 0
        assert ask_port(port) in [each.pid for each in server.tree()]


def test_a_stop_while_a_successor_boots_ends_both(tmp_path: Path) -> None:
    """What was asked for last counts: also where requests in flight leave the successor the time to come to serve."""
    body = """
    def wait_to_be_let(worker):
        while os.path.exists("wait"):
            time.sleep(0.01)

    sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=1, grace=60, on_worker_start=wait_to_be_let).run())
    """
    with program(tmp_path, body) as server:
        first, port = server.pid, port_in(server.expect("started"))
        with begin_sleeping(port, 60):
            (tmp_path / "wait").touch()  # until the server is told to stop, however late that is
            server.signal(signal.SIGUSR2)
            server.pid = server.expect("upgrading")["successor_pid"]
            os.kill(first, signal.SIGTERM)
            wait_until(lambda: server.expect("stopping")["at"] == first)
            (tmp_path / "wait").unlink()
            wait_until(lambda: not psutil.pid_exists(server.pid))
            os.kill(first, signal.SIGQUIT)
            wait_until(lambda: server.expect("stopping")["at"] == first)
            os.kill(first, signal.SIGQUIT)
            assert server.wait() == 0
            assert "upgraded" not in server.events()


def upgrade_half(server: Program, folder: Path) -> int:
    """Upgrade a server whose workers are all busy, until one worker of the successor serves; the pid of that."""
    (folder / "wait").touch()
    server.signal(signal.SIGUSR2)
    successor: int = server.expect("upgrading")["successor_pid"]
    wait_until(lambda: server.expect("worker_ready")["at"] == successor)
    return successor


def upgrade_half_with_requests(
    server: Program, port: int, folder: Path, clients: contextlib.ExitStack
) -> tuple[psutil.Process, list[socket.socket]]:
    """`upgrade_half` a server of two workers; the successor, and a client for each of the three that serve."""
    held = [clients.enter_context(begin_holding(port)) for _ in range(2)]
    successor = psutil.Process(upgrade_half(server, folder))
    held.append(clients.enter_context(begin_holding(port)))
    return successor, held


TWO_THAT_HOLD = 'sys.exit(fdpool.Server(hold, "127.0.0.1:0", workers=2, on_worker_start=boot_for_long).run())'


def test_a_stop_leaves_what_runs_in_a_successor_that_is_to_serve_its_grace(tmp_path: Path) -> None:
    """W1: also where not all of its workers serve."""
    with program(tmp_path, HOLD + TWO_THAT_HOLD) as server, contextlib.ExitStack() as clients:
        port = port_in(server.expect("started"))
        successor, held = upgrade_half_with_requests(server, port, tmp_path, clients)
        server.signal(signal.SIGTERM)
        assert {server.expect("stopping")["at"] for _ in range(2)} == {server.pid, successor.pid}
        (tmp_path / "go").touch()
        assert all(int(read_all(client)) for client in held)
        assert server.wait() == 0
        assert not successor.is_running()
        assert "upgraded" not in server.events()


def test_a_second_stop_ends_a_successor_that_finishes_what_runs_at_once(tmp_path: Path) -> None:
    """W1."""
    with program(tmp_path, HOLD + TWO_THAT_HOLD) as server, contextlib.ExitStack() as clients:
        port = port_in(server.expect("started"))
        successor, _ = upgrade_half_with_requests(server, port, tmp_path, clients)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            server.signal(number)
            wait_until(lambda: server.expect("stopping")["at"] == server.pid)
        assert server.wait() == 0
        assert not successor.is_running()


def test_a_successor_whose_time_is_over_finishes_what_runs(tmp_path: Path) -> None:
    """S2: one of its workers does not boot, and another has served for long."""
    body = """
    server = fdpool.Server(hold, "127.0.0.1:0", workers=2, on_worker_start=boot_for_long)

    def let_its_time_be_over():
        while not os.path.exists("over"):
            time.sleep(0.01)
        succession = server._loop.succession
        server._loop.turns.post(lambda: succession._give_up(succession._coming))

    if not is_second:
        threading.Thread(target=let_its_time_be_over, daemon=True).start()
    sys.exit(server.run())
    """
    with program(tmp_path, HOLD + textwrap.dedent(body)) as server, contextlib.ExitStack() as clients:
        port = port_in(server.expect("started"))
        successor, held = upgrade_half_with_requests(server, port, tmp_path, clients)
        (tmp_path / "over").touch()
        assert "did not serve after" in server.expect("upgrade_failed")["reason"]
        assert server.expect("stopping")["at"] == successor.pid
        (tmp_path / "go").touch()
        assert all(int(read_all(client)) for client in held)
        wait_until(lambda: not successor.is_running())
        with begin_holding(port):
            server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_successor_whose_on_ready_fails_finishes_what_runs(tmp_path: Path) -> None:
    """S2."""
    body = """
    def fail():
        if is_second:
            wait_while("wait")
            raise OSError("no room for the pid file")

    sys.exit(fdpool.Server(hold, "127.0.0.1:0", workers=1, on_ready=fail).run())
    """
    with program(tmp_path, HOLD + textwrap.dedent(body)) as server, contextlib.ExitStack() as clients:
        port = port_in(server.expect("started"))
        held = [clients.enter_context(begin_holding(port))]
        successor = upgrade_half(server, tmp_path)
        held.append(clients.enter_context(begin_holding(port)))
        (tmp_path / "wait").unlink()
        assert server.expect("gave_up")["at"] == successor
        (tmp_path / "go").touch()
        assert all(int(read_all(client)) for client in held)
        assert "code 3" in server.expect("upgrade_failed")["reason"]
        with begin_holding(port):
            server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix:s.sock"])
def test_a_successor_serves_also_where_its_predecessor_was_killed_before_it_has_looked(
    tmp_path: Path, bind: str
) -> None:
    """W4: at the same listeners, whose clients wait there."""
    body = f"""
    before = os.getppid()
    if is_second:
        log.info("begun", extra={{"event": "begun"}})
    while is_second and os.getppid() == before:
        time.sleep(0.01)
    sys.exit(fdpool.Server(pid, "{bind}", workers=1).run())
    """
    with program(tmp_path, HOLD + textwrap.dedent(body)) as server:
        addresses = server.expect("started")["addresses"]
        server.signal(signal.SIGUSR2)
        successor = server.expect("begun")["at"]
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        server.pid = successor
        again = server.expect("started")
        assert (again["at"], again["addresses"]) == (successor, addresses)
        if "tcp" in addresses[0]:
            assert ask_port(port_in(again)) in [each.pid for each in server.tree()]
        server.signal(signal.SIGTERM)
        assert server.expect("stopped")["exit_code"] == 0
        wait_until(lambda: not (tmp_path / "s.sock").exists())


def test_the_variable_of_an_upgrade_is_for_the_successor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else inherits it has not the stream that it names, or has another parent."""
    from fdpool._server import upgrade

    one, other = socket.socketpair()
    with one, other:
        mine, theirs = (
            [os.fstat(each.fileno()).st_dev, os.fstat(each.fileno()).st_ino] for each in (one, other)
        )
        for number, identity, parent in [
            (one.fileno(), theirs, os.getppid()),
            (10_000, theirs, os.getppid()),
            ("one", theirs, os.getppid()),
            (one.fileno(), mine, os.getpid()),
        ]:
            said = {"of": parent, "control": number, "identity": identity, "served": 1, "listeners": {}}
            monkeypatch.setenv("FDPOOL_UPGRADE", json.dumps(said))
            assert not upgrade.is_successor()
            assert upgrade.take(None) is None
            assert "FDPOOL_UPGRADE" not in os.environ
        monkeypatch.setenv("FDPOOL_UPGRADE", json.dumps(said))
        other.close()
        assert upgrade.is_successor()


# -- exit codes, crash loops ----------------------------------------------------------------------------


def test_a_crash_loop_ends_with_an_exit_code_and_takes_little_time_of_the_processor(tmp_path: Path) -> None:
    """S4."""
    body = """
    (open("broken.py", "w")).write("raise ValueError('no settings')")
    server = fdpool.Server("broken:app", "127.0.0.1:0", workers=1, boot_limit=4)
    begun, before = time.monotonic(), time.process_time()
    code = server.run()
    times = {"cpu": time.process_time() - before, "took": time.monotonic() - begun}
    log.info("times", extra={"event": "times", **times})
    sys.exit(code)
    """
    with program(tmp_path, body) as server:
        assert "no settings" in server.expect("gave_up")["reason"]
        times = server.expect("times")
        assert times["took"] >= 0.1 + 0.2 + 0.4
        assert times["cpu"] < 0.5
        assert server.wait() == 3
        failed = [record for record in server.heard if record["event"] == "worker_failed"]
        assert len(failed) == 4
        assert "Traceback" in failed[0]["text"]
        assert "Traceback" in failed[0]["traceback"]
        assert all("as the one before" in each["text"] and each["traceback"] == "" for each in failed[1:])


def test_what_all_workers_lack_as_they_start_is_tried_again(tmp_path: Path) -> None:
    """S4: there are more of them than attempts."""
    (tmp_path / "shop.py").write_text(
        "import os\n"
        "with open('boots', 'ab', buffering=0) as boots:\n"
        "    boots.write(b'.')\n"
        "    if os.fstat(boots.fileno()).st_size <= 6:\n"
        "        raise ConnectionError('no database')\n"
        "def app(connection, address): connection.sendall(b'%d' % os.getpid())\n"
    )
    body = 'sys.exit(fdpool.Server("shop:app", "127.0.0.1:0", workers=6, boot_limit=5).run())'
    with program(tmp_path, body) as server:
        server.expect("started")
        assert server.events().count("worker_failed") == 6
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_an_address_in_use_is_an_error_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        body = f"""
        try:
            fdpool.Server(pid, "127.0.0.1:{port}").run()
        except fdpool.BindFailed as error:
            log.error(str(error), extra={{"event": "refused"}})
            sys.exit(1)
        """
        with program(tmp_path, body) as server:
            assert str(port) in server.expect("refused")["text"]
            assert server.wait() == 1


# -- the end of the server itself -------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["server", "supervisor"])
def test_nothing_outlives_a_killed_server_and_a_killed_supervisor_is_replaced(
    tmp_path: Path, victim: str
) -> None:
    """W4: workers and the programs that they have started are gone within a second."""
    body = """
    import subprocess
    def start(connection, address):
        connection.recv(100)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        connection.sendall(b"%d" % os.getpid())

    sys.exit(fdpool.Server(start, "127.0.0.1:0", workers=2).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        ask_port(port)
        below = psutil.Process(server.pid).children(recursive=True)
        assert any(each.name() == "sleep" for each in below)
        supervisor = psutil.Process(server.pid).children()[0]
        if victim == "server":
            server.signal(signal.SIGKILL)
        else:
            supervisor.kill()
        seconds_until_gone(below, 30)  # on a busy machine; they would be there for ten minutes
        if victim == "supervisor":
            server.expect("worker_ready")
            assert ask_port(port) not in [each.pid for each in below]


def test_it_serves_as_a_process_that_adopts_strangers_and_reaps_its_own_only(tmp_path: Path) -> None:
    """S12: orphans are not harmed; S13: another thread of the program reaps everything, the server's own included."""
    body = """
    import ctypes, subprocess, threading
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    subprocess.run(["sh", "-c", "sleep 60 & echo $! > stranger"])

    def reap():
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                time.sleep(0.01)

    threading.Thread(target=reap, daemon=True).start()
    sys.exit(fdpool.Server(pid, "127.0.0.1:0", workers=2).run())
    """
    with program(tmp_path, body) as server:
        port = port_in(server.expect("started"))
        stranger = psutil.Process(int((tmp_path / "stranger").read_text()))
        try:
            os.kill(ask_port(port), signal.SIGKILL)
            server.expect("worker_exited")
            server.expect("worker_ready")
            server.signal(signal.SIGHUP)
            server.expect("reloaded")
            assert stranger.ppid() == server.pid
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            assert stranger.is_running()
        finally:
            stranger.kill()


def test_the_interpreters_exit_ends_a_server_that_nobody_has_stopped(tmp_path: Path) -> None:
    body = """
    server = fdpool.Server(pid, "127.0.0.1:0", workers=1)
    server.start()
    """
    with program(tmp_path, body) as server:
        server.expect("started")
        assert server.wait() == 0
        server.expect("stopped")


def test_signals_come_as_they_like_from_several_threads(tmp_path: Path) -> None:
    """S3: whoever sends them."""
    with program(tmp_path, PLAIN) as server:
        port_in(server.expect("started"))
        threads = [
            threading.Thread(target=lambda: [server.signal(signal.SIGHUP) for _ in range(5)])
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.expect("reloaded")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
