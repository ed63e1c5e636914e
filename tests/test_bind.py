"""`_bind`: what is written becomes listening sockets, and nothing is left where it cannot (S5)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fdpool import BindFailed, _bind_sockets
from fdpool._bind import Listener, open_listeners
from fdpool._bind_spec import FromSystemd, Inherited, Tcp, Unix, parse
from tests.process_state import open_descriptors, wait_until

# -- the forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("127.0.0.1:8000", Tcp("127.0.0.1", 8000)),
        ("tcp://127.0.0.1:8000", Tcp("127.0.0.1", 8000)),
        ("localhost:0", Tcp("localhost", 0)),
        (":65535", Tcp("", 65535)),
        ("[::1]:80", Tcp("::1", 80)),
        ("tcp://[fe80::1%eth0]:80", Tcp("fe80::1%eth0", 80)),
        ("unix:/run/x.sock", Unix("/run/x.sock")),
        ("unix:///run/x.sock", Unix("/run/x.sock")),
        ("unix:x.sock?mode=660", Unix("x.sock", 0o660)),
        ("unix:@name", Unix("@name")),
        ("fd:0", Inherited(0)),
        ("fd:7?owns=26-1234", Inherited(7, (26, 1234))),
        ("systemd", FromSystemd()),
        ("systemd:web", FromSystemd("web")),
    ],
)
def test_a_bind_is_understood(text: str, spec: object) -> None:
    understood = parse(text)
    assert (type(understood), understood) == (type(spec), spec)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the port is missing"),
        ("8000", "write 127.0.0.1:8000"),
        ("localhost", "the port is missing"),
        ("localhost:", "a port is a number from 0 to 65535, not ''"),
        ("localhost:http", "a port is a number from 0 to 65535, not 'http'"),
        ("localhost:65536", "a port is a number from 0 to 65535"),
        ("localhost:-1", "a port is a number from 0 to 65535"),
        ("localhost:٨٠", "a port is a number from 0 to 65535"),
        ("::1:8000", "as in [::1]:8000"),
        ("[localhost]:80", "in brackets stands an IPv6 address"),
        ("a b:80", "'a b' is no name of a host"),
        ("/run/x.sock", "write unix:/run/x.sock"),
        ("http://host:80", "write unix:http://host:80"),
        ("unix:", "the path is missing"),
        ("unix:@", "the path is missing"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
        ("unix:/x?mode=999", "three octal digits"),
        ("unix:/x?mode=7777", "three octal digits"),
        ("unix:/x?user=me", "not 'user=me'"),
        ("unix:@x?mode=600", "no mode either"),
        ("fd:", "the number of an open descriptor"),
        ("fd:-1", "the number of an open descriptor"),
        ("fd:three", "the number of an open descriptor"),
        ("systemd:", "the name is missing"),
        ("unix:/a\0b", "a NUL character"),
    ],
)
def test_a_bind_that_cannot_be_understood_says_what_is_wrong_with_it(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="cannot listen on") as refused:
        parse(text)
    assert reason in str(refused.value)


@pytest.mark.parametrize("bind", [None, 1.5, True, [b"127.0.0.1:80"], [None]])
def test_what_is_no_bind_at_all_is_refused(bind: object) -> None:
    with pytest.raises(TypeError):
        open_listeners(bind)  # type: ignore[arg-type]


@pytest.mark.parametrize("bind", [b"\xff\xfe", bytearray(b"127.0.0.1:80"), b""])
def test_bytes_are_not_taken_for_ports(bind: bytes) -> None:
    with pytest.raises(TypeError, match="a bind is a string such as 'HOST:PORT', a port or a socket"):
        open_listeners(bind)  # type: ignore[arg-type]


def test_nothing_to_listen_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no bind was given"):
        open_listeners([])


# -- TCP -------------------------------------------------------------------------------------------


def answers(listener: Listener) -> bool:
    """True if who connects to the listener's address is accepted by its socket."""
    with socket.socket(listener.socket.family, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect(listener.socket.getsockname())
        # What was sent may be on its way for a moment, in which nobody else comes.
        while client not in (ready := select.select([client, listener.socket], [], [], 30)[0]):
            assert ready, "nobody has come to the listener"
            connection, _ = listener.socket.accept()
            with connection, contextlib.suppress(BrokenPipeError):  # one that only looked who is there
                connection.sendall(b"x")
        return client.recv(1) == b"x"


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def close_all(listeners: list[Listener]) -> None:
    for listener in listeners:
        listener.close()


def test_a_free_port_is_chosen_and_told() -> None:
    (listener,) = open_listeners("127.0.0.1:0")
    with listener:
        assert listener.address == f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
        assert not listener.socket.get_inheritable()
        assert answers(listener)


def test_a_number_is_a_port_of_this_machine_alone() -> None:
    (listener,) = open_listeners(0)
    with listener:
        assert listener.address.startswith("tcp://127.0.0.1:")


def test_all_addresses_of_a_name_have_the_same_port() -> None:
    listeners = open_listeners("localhost:0")
    try:
        assert len({each.socket.getsockname()[1] for each in listeners}) == 1
        assert {each.socket.getsockname()[0] for each in listeners} <= {"127.0.0.1", "::1"}
        assert all(map(answers, listeners))
    finally:
        close_all(listeners)


def everywhere_on_one_port() -> tuple[Listener, Listener]:
    """Listeners for all of IPv6 and all of IPv4; a port that is free for the one may be in use for the other."""
    attempts = 0
    while True:
        (six,) = open_listeners("[::]:0")
        attempts += 1
        try:
            return six, open_listeners(f"0.0.0.0:{six.socket.getsockname()[1]}")[0]
        except BindFailed:
            six.close()
            if attempts == 20:
                raise


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_ipv6_is_given_in_brackets_and_leaves_ipv4_alone() -> None:
    with open_listeners("[::1]:0")[0] as listener:
        port = listener.socket.getsockname()[1]
        assert listener.address == f"tcp://[::1]:{port}"
        assert answers(listener)
    six, four = everywhere_on_one_port()
    with six, four:
        assert four.address == f"tcp://0.0.0.0:{six.socket.getsockname()[1]}"


def test_a_port_without_a_host_is_every_address_in_one_socket() -> None:
    (listener,) = open_listeners(":0")
    with listener:
        port = listener.socket.getsockname()[1]
        places = ["127.0.0.1", *(["::1"] if has_ipv6() else [])]
        for place in places:
            with socket.create_connection((place, port), timeout=5):
                listener.socket.accept()[0].close()


def test_several_binds_are_opened_in_their_order(tmp_path: Path) -> None:
    listeners = open_listeners(["127.0.0.1:0", f"unix:{tmp_path}/s"])
    try:
        assert [each.address.partition(":")[0] for each in listeners] == ["tcp", "unix"]
    finally:
        close_all(listeners)


def test_more_listeners_can_share_an_address_if_all_ask_for_it() -> None:
    (first,) = open_listeners("127.0.0.1:0", reuseport=True)
    with first, open_listeners(first.address, reuseport=True)[0] as second:
        assert second.address == first.address
        with pytest.raises(BindFailed):
            open_listeners(first.address)


def test_an_address_in_use_is_said_and_what_was_opened_before_is_closed(tmp_path: Path) -> None:
    before = open_descriptors()
    with open_listeners("127.0.0.1:0")[0] as taken:
        with pytest.raises(BindFailed, match="another process listens there") as failed:
            open_listeners([f"unix:{tmp_path}/s", "127.0.0.1:0", taken.address])
        assert taken.address in str(failed.value)
        assert failed.value.errno == errno.EADDRINUSE
    assert open_descriptors() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bind", "reason"),
    [
        ("192.0.2.1:0", "this machine has no such address"),
        ("host.invalid:80", "the host's name cannot be resolved"),
        ("x" * 64 + ".org:80", "is no name of a host"),
        ("unix:/no/such/folder/s", "its folder does not exist"),
        ("unix:/dev/null/s", "Not a directory"),
        ("fd:999", "it is not open"),
        ("fd:0", "it is no socket"),
    ],
)
def test_where_it_cannot_listen_it_says_why(bind: str, reason: str) -> None:
    with pytest.raises(BindFailed, match="cannot listen on") as failed:
        open_listeners(bind)
    assert reason in str(failed.value)


def test_a_privileged_port_is_explained_to_who_may_not_have_it(as_other_uid: int) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80:
        pytest.skip("every user may have port 80 here")
    script = (  # what may not be readable to that user is imported before
        "import encodings.idna, os, fdpool._bind as b; "
        f"os.setuid({as_other_uid}); b.open_listeners('127.0.0.1:80')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "a port below 1024 is for root" in done.stderr


def test_no_listener_lands_on_a_standard_stream() -> None:
    """R2: with 0 to 2 closed, the next socket would be standard input."""
    script = (
        "import os, sys, fdpool._bind as b; os.closerange(0, 3); l = b.open_listeners(['127.0.0.1:0', 'unix:@fdp%d' % "
        "os.getpid()]); sys.exit(sum(each.socket.fileno() < 3 for each in l))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# -- Unix sockets ----------------------------------------------------------------------------------


def test_a_path_listens_with_the_permissions_asked_for_and_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (listener,) = open_listeners(f"unix:{path}?mode=640")
    with listener:
        assert listener.address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert answers(listener)
    assert not path.exists()
    listener.close()


def test_a_relative_path_is_removed_from_wherever_the_process_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_listeners("unix:s")[0] as listener:
        assert listener.address == f"unix:{tmp_path}/s"
        monkeypatch.chdir("/")
    assert not (tmp_path / "s").exists()


def test_a_path_that_may_not_be_removed_any_more_is_left_to_the_next(as_other_uid: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (listener,) = open_listeners(f"unix:{folder}/s")
        os.seteuid(as_other_uid)
        try:
            listener.close()
        finally:
            os.seteuid(0)
        assert listener.socket.fileno() == -1
        with open_listeners(f"unix:{folder}/s")[0] as successor:
            assert answers(successor)


def test_an_abstract_name_has_no_file() -> None:
    with open_listeners(f"unix:@fdpool-{os.getpid()}")[0] as listener:
        assert listener.address == f"unix:@fdpool-{os.getpid()}"
        assert answers(listener)
        with pytest.raises(BindFailed, match="another process listens there"):
            open_listeners(listener.address)


def test_what_a_dead_server_has_left_is_replaced(tmp_path: Path) -> None:
    """S5, stale."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    with open_listeners(f"unix:{path}")[0] as listener:
        assert answers(listener)


@pytest.mark.parametrize("kind", ["idle", "full", "datagram"])
def test_a_live_socket_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    """S5, live: also where its queue is full, or takes datagrams."""
    path = str(tmp_path / "s")
    waiting = []
    with socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
    ) as live:
        live.bind(path)
        if kind != "datagram":
            live.listen(0)
        if kind == "full":
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[0].connect(path)
        inode = os.stat(path).st_ino
        with pytest.raises(BindFailed, match="another process listens there"):
            open_listeners(f"unix:{path}")
        assert os.stat(path).st_ino == inode
    for each in waiting:
        each.close()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_never_replaced(kind: str, tmp_path: Path) -> None:
    """S5, not a socket: nor what a link points to."""
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(BindFailed, match="something that is no socket"):
        open_listeners(f"unix:{path}")
    assert os.path.lexists(path)


def test_a_listener_never_removes_the_socket_of_its_successor(tmp_path: Path) -> None:
    """S5, unlink by the old generation."""
    path = tmp_path / "s"
    (old,) = open_listeners(f"unix:{path}")
    path.unlink()
    (new,) = open_listeners(f"unix:{path}")
    old.close()
    assert path.exists()
    assert answers(new)
    new.close()
    assert not path.exists()


def test_a_forked_child_closes_its_copy_and_removes_nothing(tmp_path: Path) -> None:
    with open_listeners(f"unix:{tmp_path}/s")[0] as listener:
        pid = os.fork()
        if pid == 0:
            listener.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert answers(listener)


def started_at_once(path: Path) -> tuple[list[Listener], list[BindFailed]]:
    """What becomes of eight threads that open listeners at the same path at the same time."""
    listening: list[Listener] = []
    refused: list[BindFailed] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        try:
            listening.extend(open_listeners(f"unix:{path}"))
        except BindFailed as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return listening, refused


def test_of_many_that_start_at_once_on_a_stale_path_one_listens_and_the_others_are_refused(
    tmp_path: Path,
) -> None:
    """S5: between bind and listen a socket looks stale; nobody may take it for that."""
    path = tmp_path / "s"
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        listening, refused = started_at_once(path)
        assert (len(listening), len(refused)) == (1, 7)
        assert answers(listening[0])
        listening[0].close()


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Whoever may read a folder may lock it, for as long as they like."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def test_a_folder_that_stays_locked_is_told_and_a_lock_that_goes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, folder_locked(tmp_path):
        patch.setattr(_bind_sockets, "_BEGINNING_S", 0.05)
        with pytest.raises(BindFailed, match=r"s: another process .* \(flock\) for 0\.05 seconds"):
            open_listeners(f"unix:{tmp_path}/s")
    assert not (tmp_path / "s").exists()
    with ThreadPoolExecutor(1) as executor:
        with folder_locked(tmp_path):
            opened = executor.submit(open_listeners, f"unix:{tmp_path}/s")
            wait_until(opened.running)
        (listener,) = opened.result()
    with listener:
        assert answers(listener)


def test_a_listener_removes_its_file_also_from_a_folder_that_stays_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (listener,) = open_listeners(f"unix:{tmp_path}/s")
    monkeypatch.setattr(_bind_sockets, "_END_S", 0.05)
    with folder_locked(tmp_path):
        listener.close()
    assert not (tmp_path / "s").exists()
    [told] = caplog.records
    assert (told.levelno, told.event) == (logging.WARNING, "folder_locked")  # type: ignore[attr-defined]
    assert f"unix:{tmp_path}/s" in told.getMessage()


# -- what is open already --------------------------------------------------------------------------


def test_an_open_socket_is_borrowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        (listener,) = open_listeners(mine)
        assert listener.socket.fileno() != mine.fileno()
        assert answers(listener)
        listener.close()
        with socket.create_connection(mine.getsockname(), timeout=5):
            mine.accept()[0].close()


def test_a_descriptor_is_borrowed_by_its_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine, open_listeners(f"fd:{mine.fileno()}")[0] as listener:
        assert listener.address == f"tcp://127.0.0.1:{mine.getsockname()[1]}"
        assert answers(listener)


def test_a_bound_socket_is_told_to_listen() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        with open_listeners(mine)[0] as listener:
            assert answers(listener)


def test_the_blocking_mode_of_an_open_socket_is_left_as_it_is() -> None:
    """O_NONBLOCK belongs to the open file description, which its owner goes on using."""
    with socket.create_server(("127.0.0.1", 0)) as mine:
        mine.setblocking(False)
        with open_listeners(mine)[0] as listener:
            assert not os.get_blocking(listener.socket.fileno())
        with pytest.raises(BlockingIOError):
            mine.accept()


def test_open_sockets_that_cannot_listen_are_refused_with_the_reason() -> None:
    import ssl

    here, there = socket.socketpair()
    with here, there, socket.socket() as unbound, socket.socket(type=socket.SOCK_DGRAM) as datagram:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()) as connection, server.accept()[0]:
                cases = [
                    (here, "it is"),
                    (unbound, "not bound"),
                    (datagram, "SOCK_DGRAM"),
                    (connection, "it is a connection"),
                ]
                for given, reason in cases:
                    with pytest.raises(BindFailed, match=reason):
                        open_listeners(given)
            with pytest.raises(BindFailed, match="without SO_REUSEPORT"):
                open_listeners(server, reuseport=True)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            with context.wrap_socket(server, server_side=True) as encrypted:
                with pytest.raises(BindFailed, match="its TLS lives in this process alone"):
                    open_listeners(encrypted)


def test_a_closed_socket_is_refused() -> None:
    closed = socket.socket()
    closed.close()
    with pytest.raises((BindFailed, ValueError)):
        open_listeners(closed)


# -- handing over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tcp", "unix"])
def test_a_listener_is_handed_over_to_another_process_with_its_path(form: str, tmp_path: Path) -> None:
    """The port is never closed, and the path is removed by its new owner, not by the old one."""
    (listener,) = open_listeners("127.0.0.1:0" if form == "tcp" else f"unix:{tmp_path}/s")
    script = (
        "import sys, fdpool._bind as b; (l,) = b.open_listeners(sys.argv[1]); print(l.address, flush=True); "
        "l.socket.accept()[0].sendall(b'new'); sys.stdin.read(); l.close()"
    )
    number = os.dup(listener.socket.fileno())
    successor = subprocess.Popen(
        [sys.executable, "-c", script, listener.handover(number)],
        pass_fds=[number],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with successor:
        assert successor.stdin is not None
        assert successor.stdout is not None
        assert successor.stdout.readline().strip() == listener.address
        address = listener.socket.getsockname()
        family = listener.socket.family
        listener.close(keep_path=True)
        os.close(number)
        with socket.socket(family) as client:
            client.connect(address)
            assert client.recv(3) == b"new"
        assert form == "tcp" or Path(address).exists()
        successor.stdin.close()
    assert successor.returncode == 0
    assert form == "tcp" or not Path(address).exists()
