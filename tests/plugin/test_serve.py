"""`serve`: functions and programs on listeners of the test; their readiness, their logs, and their ends (F2)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import fdpool
from fdpool._fixtures.errors import ServerDied
from fdpool._fixtures.listener import Kind, Listener, ListenerFactory
from fdpool._fixtures.serve import Serve
from fdpool._fixtures.served import Served
from tests.plugin.conftest import Run
from tests.process_state import seconds_until_gone, wait_until


def shout(listening: socket.socket, greeting: str = "") -> None:
    while True:
        connection, _ = listening.accept()
        with connection:
            data = connection.recv(100)
            print(greeting, data.decode(), flush=False)
            connection.sendall(data.upper())


def ask(served: Served, data: bytes) -> bytes:
    with served.listener.connect() as client:
        client.sendall(data)
        return client.recv(100)


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_a_function_serves_on_a_listener_of_each_kind(serve: Serve, kind: Kind) -> None:
    served = serve(shout, "heard", kind=kind)
    assert ask(served, b"hello") == b"HELLO"
    assert ask(served, b"again") == b"AGAIN"
    assert served.logs == "heard hello\nheard again\n"
    assert served.url == served.listener.url
    assert served.address == served.listener.address
    assert served.running


async def _shout_by_asyncio(listening: socket.socket, ready: Callable[[], None]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(100)).upper())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, sock=listening)
    ready()
    await server.serve_forever()


def test_a_coroutine_serves_and_says_itself_when_it_is_ready(serve: Serve) -> None:
    served = serve(_shout_by_asyncio)
    assert ask(served, b"hello") == b"HELLO"
    served.stop()
    assert not served.running
    assert served.end_in_words() == "the server _shout_by_asyncio was stopped"


def test_a_local_function_serves_with_what_it_has_closed_over(serve: Serve) -> None:
    answer = b"from here"

    def fixed(listening: socket.socket) -> None:
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(answer)

    assert ask(serve(fixed), b"x") == answer


def test_a_restart_goes_on_with_the_clients_that_wait(serve: Serve) -> None:
    served = serve(shout, "first")
    assert ask(served, b"a") == b"A"
    first = served.pid
    served.stop()
    with served.listener.connect() as early:
        early.sendall(b"b")
        served.restart()
        assert early.recv(100) == b"B"
    assert served.pid != first
    assert served.logs == "first a\nfirst b\n"


def test_a_signal_without_a_name_is_told_by_its_number(serve: Serve) -> None:
    """Of the real-time ones only the first and the last have a name. The first two are the C library's own."""
    nameless = signal.SIGRTMIN + 2
    for served in (serve(shout), serve.command(["sleep", "60"])):
        served.kill(nameless)
        assert served.wait() == f"the server {served.name} was killed by signal {nameless}"


def test_a_killed_server_may_be_started_again(serve: Serve) -> None:
    served = serve(shout)
    assert ask(served, b"a") == b"A"
    served.kill()
    assert served.wait() == "the server shout was killed by SIGKILL"
    served.restart()
    assert ask(served, b"b") == b"B"
    served.kill(signal.SIGTERM)
    assert served.wait() == "the server shout has ended at SIGTERM"
    assert not served.died


def test_a_signal_that_the_server_handles_is_no_end(serve: Serve) -> None:
    def answers_signals(listening: socket.socket, ready: Callable[[], None]) -> None:
        def answer(*_: object) -> None:
            with listening.accept()[0] as connection:
                connection.sendall(b"signal")

        signal.signal(signal.SIGUSR1, answer)
        ready()
        while True:
            time.sleep(0.01)  # pause(2) would wait on, with a signal that came just before it

    served = serve(answers_signals)
    with served.listener.connect() as client:
        served.kill(signal.SIGUSR1)
        assert client.recv(100) == b"signal"
    assert served.running


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace(serve: Serve) -> None:
    def stubborn(listening: socket.socket, ready: Callable[[], None]) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready()
        while True:
            time.sleep(1)

    served = serve(stubborn)
    process = psutil.Process(served.pid)
    served.stop(grace=0.05)
    assert not process.is_running()


def test_a_server_that_ignores_sigterm_is_killed_without_pidfds_too(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import signal, time
        def deaf(listening, ready):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ready()
            while True: time.sleep(60)
        def test_it(serve):
            serve(deaf).stop(grace=0.05)
        """,
        env={"FDPOOL_WITHOUT": "pidfd"},
    )
    outcome.assert_counts(passed=1)


# -- ends that nobody wanted (F2) ------------------------------------------------------------------------


def _raises(listening: socket.socket, ready: Callable[[], None]) -> None:
    print("about to raise", file=sys.stderr)
    raise LookupError("no such table")


def _exits(listening: socket.socket, ready: Callable[[], None]) -> None:
    print("about to exit")
    sys.exit(3)


def _vanishes(listening: socket.socket, ready: Callable[[], None]) -> None:
    os.write(2, b"about to vanish")
    os._exit(4)


def _crashes(listening: socket.socket, ready: Callable[[], None]) -> None:
    ctypes.string_at(0)


def _returns(listening: socket.socket, ready: Callable[[], None]) -> None:
    pass


@pytest.mark.parametrize(
    ("fn", "what", "logs"),
    [
        (_raises, "raised LookupError: no such table", "about to raise"),
        (_exits, "exited with 3", "about to exit"),
        (_vanishes, "exited with status 4", "about to vanish"),
        (_crashes, "was killed by SIGSEGV", "Fatal Python error: Segmentation fault"),
        (_returns, "has returned", "nothing"),
    ],
)
def test_one_that_dies_before_it_is_ready_fails_at_once_with_what_it_wrote(
    serve: Serve, fn: Callable[..., None], what: str, logs: str
) -> None:
    """F2: the ready timeout is a minute, and the test's is not reached."""
    with pytest.raises(ServerDied) as caught:
        serve(fn, ready_timeout=60)
    text = str(caught.value)
    assert text.startswith(f"the server {fn.__name__} {what}")
    assert "before it was ready; it had written" in text
    assert logs in text


def test_times_may_be_longer_than_the_kernel_can_be_asked_to_wait(serve: Serve) -> None:
    """As poll(2) counts milliseconds in an int: 24 days."""
    serve(shout, ready_timeout=3e7).stop(grace=3e7)


def test_one_that_never_becomes_ready_is_ended_and_fails_with_what_it_wrote(serve: Serve) -> None:
    def hangs(listening: socket.socket, ready: Callable[[], None]) -> None:
        print("pid", os.getpid())
        time.sleep(60)

    serve(shout).stop()  # what the first server of a process takes is not of the time that the next one has
    timeout_s, logs = 0.5, ""
    while not logs:  # on a busy machine it may not even have begun
        assert timeout_s < 60
        with pytest.raises(
            ServerDied, match=f"the server hangs was not ready within {timeout_s:g} s; it had written"
        ) as caught:
            serve(hangs, ready_timeout=timeout_s)
        timeout_s, logs = 2 * timeout_s, caught.value.logs
    assert str(caught.value).endswith(f"; it had written:\n{logs.rstrip()}")
    assert logs.startswith("pid ")
    pid = int(logs.split()[1])
    wait_until(lambda: not psutil.pid_exists(pid))  # it has ended; its supervisor may have yet to reap it


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_clients_of_a_server_that_dies_are_turned_away_at_once(serve: Serve, kind: Kind) -> None:
    def accepts_one(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        connection.recv(1)
        raise LookupError("no such table")

    served = serve(accepts_one, kind=kind)
    with served.listener.connect() as first, served.listener.connect() as waiting:
        first.sendall(b"x")
        assert _end_of(first) in (b"", "reset")
        assert _end_of(waiting) in (b"", "reset")
    wait_until(lambda: served.died)
    wait_until(lambda: _refuses(served))
    with pytest.raises(ServerDied, match="the server accepts_one raised LookupError: no such table"):
        served.stop()
    assert not served.died


def _refuses(served: Served) -> bool:
    try:
        served.listener.connect().close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return False


def _end_of(connection: socket.socket) -> bytes | str:
    try:
        return connection.recv(1)
    except ConnectionResetError:
        return "reset"


def test_the_failure_of_a_test_is_that_its_server_died(run_pytest: Run) -> None:
    """F2: binds, then crashes. What the client saw is the cause, and a test that saw nothing fails as well."""
    outcome = run_pytest(
        """
        import urllib.request
        def crashes(listening):
            connection, _ = listening.accept()
            print("got", connection.recv(3))
            raise LookupError("no such table")
        def test_client(serve):
            urllib.request.urlopen(serve(crashes).url, timeout=50)
        def test_blind(serve):
            served = serve(crashes)
            with served.listener.connect() as client:
                client.sendall(b"GET")
                client.recv(1)
            served._run.future.exception()
        def test_aware(serve):
            served = serve(crashes)
            with served.listener.connect() as client:
                client.sendall(b"GET")
            assert "raised LookupError" in served.wait()
        def test_failing(serve):
            def fine(listening, ready):
                print("all is well")
                ready()
                listening.accept()
            serve(fine)
            assert 0
        """
    )
    outcome.assert_counts(failed=2, passed=2, error=1)
    outcome.assert_says(
        "ERROR at teardown of test_blind",
        "the server crashes raised LookupError: no such table",
        "it had written:\ngot b'GET'",
        "____ test_client ____",
        "The above exception was the direct cause of the following exception:",
        "ServerDied: the server crashes raised LookupError: no such table",
        "in crashes",
        "it had written:",
        "got b'GET'",
        "____ test_failing ____",
        "assert 0",
        "Captured output call",
        "the server fine is running:\nall is well",
    )


def test_a_server_that_dies_some_time_after_its_client_has_noticed_is_the_cause(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import time, urllib.request
        def crashes(listening):
            connection, _ = listening.accept()
            connection.recv(3)
            connection.close()
            time.sleep(0.4)
            raise LookupError("no such table")
        def test_client(serve):
            urllib.request.urlopen(serve(crashes).url, timeout=50)
        """
    )
    outcome.assert_counts(failed=1)
    outcome.assert_says("ServerDied: the server crashes raised LookupError: no such table")


def test_what_servers_wrote_is_shown_however_the_test_has_failed(run_pytest: Run) -> None:
    outcome = run_pytest(
        """
        import unittest, pytest
        def crashes(listening):
            print("dying words")
            raise LookupError("no such table")
        def fine(listening, ready):
            print("all is well")
            ready()
            listening.accept()
        def test_fail(serve):
            serve(fine)
            pytest.fail("no")
        def test_not_raised(serve):
            serve(fine)
            with pytest.raises(ValueError): pass
        @pytest.mark.timeout(0.5, func_only=True)
        def test_timeout(serve):
            serve(fine)
            while True: pass
        class TestOld(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def served(self, serve): serve(fine)
            def test_old(self): self.fail("no")
        @pytest.mark.run_isolated
        def test_isolated(serve): assert 0
        @pytest.fixture
        def serve(serve):
            serve(fine)
            return serve
        def test_death(serve):
            serve(crashes)._run.future.exception()
            pytest.fail("no")
        @pytest.mark.parametrize("leave", [pytest.skip, pytest.xfail])
        def test_left(serve, leave):
            serve(crashes).wait()
            leave("on purpose")
        """,
        plugins=["timeout"],
    )
    outcome.assert_counts(failed=6, skipped=1, xfailed=1)
    for name in ("test_fail", "test_not_raised", "test_timeout", "TestOld.test_old", "test_isolated"):
        outcome.assert_says(
            f"____ {name} ____", "Captured output call", "the server fine is running:\nall is well"
        )
    outcome.assert_says(
        "____ test_death ____", "ServerDied: the server crashes raised LookupError", "dying words"
    )


# -- programs ------------------------------------------------------------------------------------------

ACTIVATED = """
import os, socket, sys
assert os.environ["LISTEN_PID"] == str(os.getpid()), os.environ
assert os.environ["LISTEN_FDS"] == "1"
print("serving on", sys.argv[1], flush=True)
listening = socket.socket(fileno=3)
while True:
    connection, _ = listening.accept()
    with connection:
        connection.sendall(connection.recv(100).upper())
"""


def test_a_program_inherits_the_listener_as_systemd_would_hand_it(serve: Serve) -> None:
    served = serve.command([sys.executable, "-c", ACTIVATED, "{url}"])
    assert ask(served, b"hello") == b"HELLO"
    assert served.logs == f"serving on {served.url}\n"
    assert psutil.Process(served.pid).cmdline()[0] == sys.executable
    first = served.pid
    served.restart()
    assert ask(served, b"again") == b"AGAIN"
    assert served.pid != first


def test_a_program_may_have_the_listener_under_any_number(
    serve: Serve, listener_factory: ListenerFactory
) -> None:
    program = "import socket; socket.socket(fileno=9).accept()[0].sendall(b'nine')"
    listener = listener_factory("unix")
    served = serve.command([sys.executable, "-c", program], fds={9: listener})
    assert served.listener is listener
    with listener.connect() as client:
        assert client.recv(100) == b"nine"
    assert served.wait() == f"the server {sys.executable} -c {program} exited with status 0"


def test_a_program_that_must_bind_for_itself_has_its_port_kept(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("text")
    served = serve.command(
        [sys.executable, "-m", "http.server", "--bind", "{host}", "{port}"],
        fds={},
        cwd=tmp_path,
        ready_timeout=60,
    )
    with urllib.request.urlopen(f"{served.url}/page.txt", timeout=10) as answer:
        assert answer.read() == b"text"
    assert "GET /page.txt" in served.logs
    served.kill(signal.SIGTERM)
    assert served.wait().endswith("was killed by SIGTERM")


def test_a_program_that_cannot_start_or_dies_fails_at_once(serve: Serve) -> None:
    """F2, for programs."""
    with pytest.raises(ServerDied, match="could not run: .*No such file.*before it was ready"):
        serve.command(["/no/such/program", "{port}"], fds={}, ready_timeout=60)
    program = ["/bin/sh", "-c", "echo cannot bind >&2; exit 5"]
    with pytest.raises(
        ServerDied, match="exited with status 5 before it was ready; it had written:\ncannot bind"
    ):
        serve.command(program, ready=lambda served: False, ready_timeout=60)
    with pytest.raises(ServerDied, match="was not ready within 0.2 s"):
        serve.command(["sleep", "60"], ready=lambda served: False, ready_timeout=0.2)


def test_a_programs_children_go_with_it(serve: Serve) -> None:
    served = serve.command(["/bin/sh", "-c", "sleep 60 & echo $!; wait"])
    wait_until(lambda: served.logs.endswith("\n"))
    child = psutil.Process(int(served.logs))
    served.stop()
    assert seconds_until_gone([child]) < 4


def test_a_log_can_be_what_a_test_waits_for(serve: Serve) -> None:
    def is_up(served: Served) -> bool:
        return "up" in served.logs

    served = serve.command(["/bin/sh", "-c", "sleep 0.05; echo up; exec sleep 60"], ready=is_up)
    assert served.logs == "up\n"


# -- misuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_server_that_returns_has_not_failed_and_may_be_started_again(serve: Serve, kind: Kind) -> None:
    def once(listening: socket.socket) -> None:
        with listening.accept()[0] as connection:
            connection.sendall(connection.recv(100))

    served = serve(once, kind=kind)
    for _ in range(2):
        with served.listener.connect() as client, served.listener.connect() as waiting:
            client.sendall(b"once")
            assert client.recv(100) == b"once"
            assert _end_of(waiting) in (b"", "reset")
        assert served.wait() == "the server once has returned"
        served.restart()


def test_what_cannot_serve_is_refused_with_the_way_out(serve: Serve) -> None:
    with pytest.raises(
        TypeError, match=r"serve\(\) takes a function or an application, not 8; serve.command"
    ):
        serve(8)
    with pytest.raises(TypeError, match=r"serve.command\(\) takes a list of arguments, not the string 'a b'"):
        serve.command("a b")
    with pytest.raises(TypeError, match="listener= takes what the fixture listener_factory makes, not 8000"):
        serve(shout, listener=8000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Unix socket has no port"):
        serve.command(["x", "{port}"], kind="unix")
    with pytest.raises(ValueError, match="only a TCP port can be kept for a program, not 'unix'"):
        serve.command(["x"], kind="unix", fds={})
    with pytest.raises(fdpool.NotPicklable):
        serve(shout, (each for each in "x"))
    with pytest.raises(TypeError, match="ready_timeout must be a number of seconds, not 'soon'"):
        serve(shout, ready_timeout="soon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes a program and its arguments, and this list is empty"):
        serve.command([])
    with pytest.raises(
        TypeError, match=r"fds= maps numbers in the program .* such as {3: listener}, not \[3\]"
    ):
        serve.command(["true"], fds=[3])  # type: ignore[arg-type]
    closed = Listener.open()
    closed.close()
    with pytest.raises(ValueError, match="nothing can be served on <Listener tcp 127.0.0.1:.* closed>"):
        serve(shout, listener=closed)


def test_a_signal_that_is_none_is_refused(serve: Serve) -> None:
    served = serve(shout)
    with pytest.raises(TypeError, match="takes a signal's number such as signal.SIGTERM, not 'TERM'"):
        served.kill("TERM")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no signal 4000"):
        served.kill(4000)
    assert ask(served, b"still here") == b"STILL HERE"


@pytest.mark.run_isolated
def test_an_isolated_test_is_told_to_start_its_servers_in_a_fixture(serve: Serve) -> None:
    with pytest.raises(RuntimeError, match=r"this is an isolated test, a fork .*\. Start it in a fixture"):
        serve(shout)
    with pytest.raises(RuntimeError, match="serve cannot start a server here"):
        serve.command(["true"])


def test_everything_of_a_server_goes_with_its_factory(listener_factory: ListenerFactory) -> None:
    with fdpool.Pool(4, max_tasks_per_child=1) as pool:
        servers = Serve(pool)
        mine: Listener = listener_factory()
        served = [servers(shout, listener=mine), servers(shout), servers.command(["sleep", "60"])]
        processes = [psutil.Process(each.pid) for each in served]
        servers.close()
        assert seconds_until_gone(processes) < 4
        assert mine.fileno() > 0
        assert served[1].listener.fileno() < 0
        assert served[0].logs == ""
        assert "ended" in repr(served[0])
        with pytest.raises(ServerDied):
            served[0].pid


def test_curl_and_others_may_be_the_client(serve: Serve) -> None:
    def page(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\npage")

    program = f"import urllib.request as r; print(r.urlopen({serve(page).url!r}).read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "b'page'\n"
