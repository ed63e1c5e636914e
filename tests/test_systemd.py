"""`_systemd`: sockets that systemd passes, with everything about them that can be wrong (S6), and notifications."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from fdpool import BindFailed
from fdpool._systemd import Notifier, listen_sockets, passes_sockets, successor_environment
from tests.process_state import wait_until

# A child that finds the descriptors of its parent from 3 on; what it says at the end is what it found.
_BEGIN = """
import json, os, socket, sys
import fdpool
from fdpool import BindFailed
from fdpool._systemd import listen_sockets

numbers = json.loads(sys.argv[1])
for place, number in enumerate(numbers):  # all are far above 3
    os.dup2(number, 3 + place) if number >= 0 else os.closerange(3 + place, 4 + place)
if os.environ.get("LISTEN_PID") == "mine":
    os.environ["LISTEN_PID"] = str(os.getpid())
"""
CHILD = """
try:
    found = listen_sockets()
    said = {"sockets": [(name, each.fileno(), each.get_inheritable()) for name, each in found]}
    assert listen_sockets() == []
    for _, each in found:
        each.close()
except BindFailed as error:
    said = {"error": str(error)}
said["left"] = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps(said))
"""


def passed(variables: dict[str, str], *numbers: int, child: str = CHILD) -> dict[str, Any]:
    """What a process makes of `variables`, with these descriptors at 3, 4, ...; -1 for a closed one."""
    os.environ.pop("LISTEN_PID", None)
    high = [number if number < 0 else os.dup2(number, 100 + place) for place, number in enumerate(numbers)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BEGIN + child, json.dumps(high)],
            env={**os.environ, **variables},
            pass_fds=[number for number in high if number >= 0],
            stdout=subprocess.PIPE,
            check=True,
        )
    finally:
        for number in high:
            if number >= 0:
                os.close(number)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.fileno()


# -- listeners -------------------------------------------------------------------------------------


def test_sockets_come_with_their_names_close_on_exec_and_the_variables_are_gone(listening: int) -> None:
    """S6, as it should be; with an empty name, which a unit may have."""
    variables = {"LISTEN_PID": "mine", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "web::admin"}
    assert passed(variables, listening, listening, listening) == {
        "sockets": [["web", 3, False], ["", 4, False], ["admin", 5, False]],
        "left": [],
    }


def test_without_names_every_socket_is_unknown(listening: int) -> None:
    said = passed({"LISTEN_PID": "mine", "LISTEN_FDS": "1"}, listening)
    assert said["sockets"] == [["unknown", 3, False]]


@pytest.mark.parametrize(
    "variables",
    [
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "mine"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "garbage", "LISTEN_FDNAMES": "a:b:c"},
    ],
)
def test_what_is_meant_for_another_process_is_ignored_and_removed(
    variables: dict[str, str], listening: int
) -> None:
    """S6, wrong PID: sd_listen_fds(3) returns 0 then."""
    assert passed(variables, listening) == {"sockets": [], "left": []}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"LISTEN_FDS": "0"}, "LISTEN_FDS is 0"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS is -1"),
        ({"LISTEN_FDS": "abc"}, "LISTEN_FDS is 'abc'"),
        ({"LISTEN_FDS": ""}, "LISTEN_FDS is ''"),
        ({"LISTEN_FDS": "2147483647"}, "LISTEN_FDS is 2147483647"),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "abc"}, "LISTEN_PID is 'abc'"),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b"}, "1 sockets (LISTEN_FDS) and 2 names"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"}, "2 sockets (LISTEN_FDS) and 1 names"),
    ],
)
def test_variables_that_cannot_be_true_are_an_error(
    variables: dict[str, str], reason: str, listening: int
) -> None:
    """S6: 0, -1, abc, too many, names mismatch."""
    said = passed({"LISTEN_PID": "mine", **variables}, listening)
    assert reason in said["error"]
    assert said["left"] == []


def test_a_descriptor_that_is_not_open_is_an_error(listening: int) -> None:
    """S6, fd closed."""
    said = passed({"LISTEN_PID": "mine", "LISTEN_FDS": "2"}, listening, -1)
    assert said["error"].startswith("descriptor 4, which systemd has passed as 'unknown', is not open")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "is no socket: of a socket unit's lines only ListenStream="),
        ("datagram", "is a SOCK_DGRAM socket: write ListenStream="),
        ("seqpacket", "is a SOCK_SEQPACKET socket: write ListenStream="),
        ("connection", "does not listen: write Accept=no"),
    ],
)
def test_what_takes_no_connections_is_an_error_that_names_the_line_to_change(
    kind: str, reason: str, listening: int
) -> None:
    """S6: not a socket, datagram."""
    types = {
        "datagram": socket.SOCK_DGRAM,
        "seqpacket": socket.SOCK_SEQPACKET,
        "connection": socket.SOCK_STREAM,
    }
    ends = os.pipe() if kind == "pipe" else tuple(end.detach() for end in socket.socketpair(type=types[kind]))
    try:
        variables = {"LISTEN_PID": "mine", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:odd"}
        said = passed(variables, listening, ends[0])
    finally:
        for end in ends:
            os.close(end)
    assert said["error"].startswith(f"descriptor 4, which systemd has passed as 'odd', {reason}")


def test_after_an_error_nothing_has_been_taken_over(listening: int) -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(2**20)}
    with pytest.raises(BindFailed):
        listen_sockets(environment)
    assert environment == {}
    os.fstat(listening)


SERVE = """
import fdpool._bind as b
listeners = b.open_listeners(["systemd:admin", "systemd:web"])
print(*(each.address for each in listeners), flush=True)
for each in listeners:
    each.socket.accept()[0].sendall(each.address.encode())
"""


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="it comes with systemd")
def test_systemds_own_program_passes_its_sockets(tmp_path: Path) -> None:
    """By name, in the order of the binds."""
    command = ["systemd-socket-activate", "-l", f"{tmp_path}/web", "-l", f"{tmp_path}/admin"]
    command += ["--fdname=web:admin", "-E", f"PYTHONPATH={Path(__file__).parents[1]}"]
    with subprocess.Popen(
        [*command, sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout is not None
        clients = []
        for name in ("admin", "web"):
            client = connected(f"{tmp_path}/{name}")
            clients.append(client)
        assert program.stdout.read().split() == [f"unix:{tmp_path}/admin", f"unix:{tmp_path}/web"]
        for client, name in zip(clients, ("admin", "web")):
            with client:
                assert client.recv(1000).decode() == f"unix:{tmp_path}/{name}"
    assert program.returncode == 0


def connected(path: str) -> socket.socket:
    """Connected to `path` as soon as somebody listens there."""
    deadline = time.monotonic() + 10
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
            return client
        except OSError:
            client.close()
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_a_bind_of_systemd_where_nothing_was_passed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdpool._bind import open_listeners

    monkeypatch.delenv("LISTEN_FDS", raising=False)
    with pytest.raises(BindFailed, match="systemd has passed no socket to this process"):
        open_listeners("systemd")


TWO_SERVERS = """
from tests.server.applications import echo_pid as app

found = []
try:
    fdpool.Server(app, ["systemd:admin", "unix:/nowhere/s.sock"], workers=1).start()
except BindFailed as error:
    found.append(str(error))
for name in ("web", "admin"):
    server = fdpool.Server(app, f"systemd:{name}", workers=1)
    server.start()
    found.append([server.addresses, {each.get_inheritable() for each in server.sockets} == {False}])
print(json.dumps({"found": found}))
"""


def test_several_servers_of_a_program_each_find_their_sockets() -> None:
    """S6: also after one that could not be started, for another reason."""
    with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as admin:
        variables = {"LISTEN_PID": "mine", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:admin"}
        said = passed(variables, web.fileno(), admin.fileno(), child=TWO_SERVERS)
        addresses = [[f"tcp://127.0.0.1:{each.getsockname()[1]}"] for each in (web, admin)]
    failed, *served = said["found"]
    assert "its folder does not exist" in failed
    assert served == [[address, True] for address in addresses]


RUN = """
import signal
from tests.server.applications import echo_pid as app

def tell():
    left = [name for name in os.environ if name.startswith("LISTEN_")]
    print(json.dumps({"left": left, "inheritable": os.get_inheritable(3)}), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

sys.exit(fdpool.Server(app, "127.0.0.1:0", workers=1, on_ready=tell).run())
"""


@pytest.mark.parametrize("names", ["web", "one:too:many"])
def test_what_no_bind_asks_for_is_not_left_to_children(listening: int, names: str) -> None:
    """S6: of a server that runs until a signal ends it; whatever was passed is no error of its."""
    variables = {"LISTEN_PID": "mine", "LISTEN_FDS": "1", "LISTEN_FDNAMES": names}
    assert passed(variables, listening, child=RUN) == {"left": [], "inheritable": names != "web"}


def test_the_name_that_a_bind_asks_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdpool import _systemd
    from fdpool._bind import open_listeners

    with socket.create_server(("127.0.0.1", 0)) as given:
        monkeypatch.setattr(_systemd, "_passed", [("web", given)])
        with pytest.raises(BindFailed, match="no socket named 'admin'; what is left of them: web"):
            open_listeners("systemd:admin")
        with pytest.raises(BindFailed, match="is each of its sockets bound once"):
            open_listeners(["systemd:web", "systemd"])
        [listener] = open_listeners("systemd:web")
        listener.close()
        assert given.fileno() >= 0


@pytest.mark.parametrize(
    ("variables", "passes"),
    [
        ({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}, True),
        ({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, False),
        ({"LISTEN_FDS": "1"}, False),
        ({"LISTEN_PID": str(os.getpid())}, False),
        ({}, False),
    ],
)
def test_whether_sockets_are_passed_is_told_without_taking_them(
    variables: dict[str, str], passes: bool
) -> None:
    given = dict(variables)
    assert passes_sockets(given) is passes
    assert given == variables


# -- notifications ---------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/notify" if request.param == "path" else f"@fdpool-notify-{os.getpid()}"


@pytest.fixture
def manager(place: str) -> Iterator[socket.socket]:
    """What listens at NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(place.replace("@", "\0", 1))
        receiver.setblocking(False)
        yield receiver


def test_each_state_is_told_as_sd_notify_has_it(manager: socket.socket, place: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": place})
    assert notifier.ready()
    assert notifier.stopping()
    assert notifier.watchdog()
    assert notifier.main_pid(17)
    assert notifier.status("two\nlines,  äöü")
    told = [manager.recv(1000).decode() for _ in range(5)]
    assert told == ["READY=1", "STOPPING=1", "WATCHDOG=1", "MAINPID=17", "STATUS=two lines, äöü"]


def test_a_reload_is_told_with_the_time_of_its_beginning(manager: socket.socket, place: str) -> None:
    before = time.monotonic_ns() // 1000
    assert Notifier({"NOTIFY_SOCKET": place}).reloading()
    state, moment = manager.recv(1000).decode().splitlines()
    assert state == "RELOADING=1"
    assert before <= int(moment.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("where", ["", "@", "relative", "vsock:2:1234", "/no/such/socket", "@nobody-is-here"])
def test_where_nobody_listens_nothing_happens(where: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": where, "WATCHDOG_USEC": "5000000"})
    assert not notifier.ready()
    assert (notifier.watchdog_interval_s is None) is (not notifier.enabled)


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.enabled
    assert not any([notifier.ready(), notifier.reloading(), notifier.stopping(), notifier.watchdog()])


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of state waits for as long as a test may take."""
    monkeypatch.setattr(Notifier, "_send", partialmethod(Notifier._send, patience_s=1000.0))


def fill(notifier: Notifier) -> int:
    """Notify until the manager's queue is full (M12: it has room for a few messages); how often that was."""
    for count in range(1000):
        if not notifier.watchdog():
            return count
    pytest.fail("its queue has no bound")


@pytest.mark.usefixtures("patient")
def test_what_comes_again_does_not_wait_for_a_manager_that_does_not_look(
    manager: socket.socket, place: str
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": place})
    count = fill(notifier)
    assert not notifier.status("here I am")
    assert [manager.recv(1000) for _ in range(count)] == [b"WATCHDOG=1"] * count


@pytest.mark.usefixtures("patient")
def test_a_change_of_state_waits_for_a_manager_that_is_busy_without_using_the_processor(
    manager: socket.socket, place: str
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": place})
    count = fill(notifier)
    told: list[bool] = []
    used_s: list[float] = []

    def tell() -> None:
        told.append(notifier.ready())
        used_s.append(time.thread_time())

    waiting = threading.Thread(target=tell)
    waiting.start()
    wait_until(lambda: blocked_in_poll(waiting))
    waiting.join(0.2)
    assert told == []
    assert [manager.recv(1000) for _ in range(count)] == [b"WATCHDOG=1"] * count
    waiting.join()
    assert (told, manager.recv(1000)) == ([True], b"READY=1")
    assert used_s[0] < 0.1


def blocked_in_poll(thread: threading.Thread) -> bool:
    """True while the kernel has the thread sleep."""
    if thread.native_id is None:
        return False
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize(
    ("variables", "interval_s"),
    [
        ({"WATCHDOG_USEC": "5000000"}, 2.5),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "abc"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time_if_it_watches_this_process(
    variables: dict[str, str], interval_s: float | None
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/notify", **variables}).watchdog_interval_s == interval_s


def test_a_successor_is_watched_and_has_no_sockets_of_ours_to_look_for() -> None:
    mine = {
        "PATH": "/bin",
        "NOTIFY_SOCKET": "/run/notify",
        "WATCHDOG_USEC": "1",
        "WATCHDOG_PID": "2",
        "LISTEN_PID": "2",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "web",
    }
    assert successor_environment(mine) == {
        "PATH": "/bin",
        "NOTIFY_SOCKET": "/run/notify",
        "WATCHDOG_USEC": "1",
    }
