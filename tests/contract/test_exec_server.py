"""The exec hand-off: a server, its clients, and everything that may be wrong with a client (T14, T18)."""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import fdpool
from fdpool import Pool
from fdpool._exec_session import State
from fdpool.exec_server import VARIABLE, Deny, Escalate, ExecServer, Request, Run
from fdpool.fds import close_all, is_readable
from tests.conftest import seconds_until_gone, wait_until
from tests.contract.helpers_programs import warm_pool

CLIENT = [sys.executable, "-m", "fdpool.cli_exec"]
PIPE = subprocess.PIPE
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fdpool.__file__).parent.parent)}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with warm_pool(3) as pool:
        yield pool


@contextmanager
def serving(pool: Pool, decision: Any = Escalate(), **options: Any) -> Iterator[ExecServer]:  # noqa: B008
    policy: Any = decision if callable(decision) else lambda _: decision
    with ExecServer(pool, policy, **options) as server:
        yield server


class RawClient:
    """A client written by hand, as one in another language would be."""

    def __init__(self, server: ExecServer, queue_bytes: int | None = None) -> None:
        self.stream, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if queue_bytes is not None:  # of answers; the kernel has a least
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, queue_bytes)
        self.stream.settimeout(20)
        with theirs:
            shake(server, b"\0", [theirs.fileno()])

    def send(self, message: Any, fds: list[int] = []) -> None:  # noqa: B006
        body = json.dumps(message).encode()
        self.send_raw(struct.pack("<I", len(body)) + body, fds)

    def send_raw(self, data: bytes, fds: list[int] = []) -> None:  # noqa: B006
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.stream.sendmsg([data], ancillary)

    def receive(self) -> Any:
        """The next message; None at the end of the stream."""
        size = self._read(4)
        return None if size is None else json.loads(self._read(struct.unpack("<I", size)[0]) or b"")

    def _read(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            try:
                block = self.stream.recv(count - len(data))
            except ConnectionResetError:
                return None
            if not block:
                return None
            data += block
        return data

    def ask(self, argv: list[str], **changes: Any) -> Any:
        request = {"file": argv[0], "argv": argv, "workdir": "/", "env": {"PATH": os.environ["PATH"]}}
        self.send({**request, **changes})
        return self.receive()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def shake(server: ExecServer, data: bytes, fds: list[int]) -> None:
    """Send one datagram on the end that clients inherit."""
    with socket.socket(fileno=os.dup(server.fileno())) as door:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        door.sendmsg([data], ancillary)


def still_serves(server: ExecServer) -> None:
    with RawClient(server) as client:
        assert client.ask(["true"]) == {"action": "Escalate"}
        client.send({"fds": []})
        assert client.receive() == {"exit_code": 0}
        assert client.receive() is None


# -- a client in any language ----------------------------------------------------------------------


def test_a_client_written_by_hand_has_its_command_run_on_its_descriptors(pool: Pool, tmp_path: Path) -> None:
    with serving(pool) as server, RawClient(server) as client:
        assert client.ask(["sh", "-c", "pwd; cat; echo err >&2; exit 5"], workdir=str(tmp_path)) == {
            "action": "Escalate"
        }
        reading, writing = os.pipe()
        with open(tmp_path / "in", "w+") as source:
            source.write("input\n")
            source.flush()
            source.seek(0)
            client.send({"fds": [0, 1, 2]}, [source.fileno(), writing, writing])
        os.close(writing)
        assert client.receive() == {"exit_code": 5}
        with open(reading) as output:
            assert output.read() == f"{tmp_path}\ninput\nerr\n"
        assert client.receive() is None


def test_any_numbers_may_be_handed_over(pool: Pool) -> None:
    reading, writing = os.pipe()
    with serving(pool) as server, RawClient(server) as client:
        client.ask(["sh", "-c", "echo nine >&9; echo one; echo four >&4"])
        client.send({"fds": [9, 1, 4]}, [writing, writing, writing])
        os.close(writing)
        assert client.receive() == {"exit_code": 0}
    with open(reading) as output:
        assert output.read() == "nine\none\nfour\n"


def test_the_name_that_a_program_is_called_by_may_be_another_than_its_file(pool: Pool) -> None:
    reading, writing = os.pipe()
    with serving(pool) as server, RawClient(server) as client:
        client.ask(["called-so", "-c", "echo $0"], file="/bin/sh")
        client.send({"fds": [1]}, [writing])
        os.close(writing)
        assert client.receive() == {"exit_code": 0}
    with open(reading) as output:
        assert output.read() == "called-so\n"


def test_a_signal_is_told_as_shells_tell_it_and_by_name_of_its_number(pool: Pool) -> None:
    with serving(pool) as server, RawClient(server) as client:
        client.ask(["sh", "-c", "kill -USR1 $$"])
        client.send({"fds": []})
        assert client.receive() == {"exit_code": 128 + signal.SIGUSR1, "signal": signal.SIGUSR1}


def test_a_command_that_cannot_be_started_is_told_so(pool: Pool, tmp_path: Path) -> None:
    with serving(pool) as server:
        for argv, changes, code in (
            (["no-such-program"], {}, 127),
            ([str(tmp_path)], {}, 126),
            (["true"], {"workdir": "/no/such/folder"}, 126),
        ):
            with RawClient(server) as client:
                client.ask(argv, **changes)
                client.send({"fds": []})
                answer = client.receive()
                assert answer["exit_code"] == code
                assert "cannot run" in answer["error"]


def test_what_the_policy_says_is_what_the_client_is_told(pool: Pool) -> None:
    def policy(request: Request) -> Any:
        return {"ls": Run(), "rm": Deny("too dangerous")}.get(request.argv[0], "nonsense")

    with serving(pool, policy) as server:
        with RawClient(server) as client:
            assert client.ask(["ls"]) == {"action": "Run"}
            assert client.receive() is None
        with RawClient(server) as client:
            assert client.ask(["rm", "-rf"]) == {"action": {"Deny": {"reason": "too dangerous"}}}
        with RawClient(server) as client:
            assert "the policy failed" in client.ask(["cat"])["action"]["Deny"]["reason"]


def test_a_policy_may_be_a_coroutine(pool: Pool) -> None:
    async def policy(request: Request) -> Any:
        await asyncio.sleep(0)
        return Deny(request.file)

    with serving(pool, policy) as server, RawClient(server) as client:
        assert client.ask(["x"])["action"]["Deny"]["reason"] == "x"


def test_a_coroutine_may_run_in_the_callers_loop(pool: Pool) -> None:
    async def main() -> Any:
        here = asyncio.get_running_loop()

        async def policy(_: Request) -> Any:
            return Deny(str(asyncio.get_running_loop() is here))

        with serving(pool, policy, loop=here) as server, RawClient(server) as client:
            return await asyncio.to_thread(client.ask, ["x"])

    assert asyncio.run(main())["action"]["Deny"]["reason"] == "True"


# -- clients that are broken -------------------------------------------------------------------------


def test_bad_handshakes_are_turned_away_and_the_server_goes_on(pool: Pool) -> None:
    with serving(pool) as server, open(os.devnull) as null, socket.socket() as tcp:
        datagram, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stream, peer = socket.socketpair()
        before = len(os.listdir("/proc/self/fd"))
        with datagram, other, stream, peer:
            bad: list[tuple[bytes, list[int]]] = [
                (b"\0", []),
                (b"\0", [stream.fileno(), peer.fileno()]),
                (b"\0", [null.fileno()]),
                (b"\0", [tcp.fileno()]),
                (b"\0", [datagram.fileno()]),
                (b"", [stream.fileno()]),
                (b"", []),
                (b"garbage", [stream.fileno()]),
                (b"garbage" * 1000, []),
                (b"\0", [null.fileno()] * 200),
            ]
            for data, fds in bad:
                shake(server, data, fds)
            still_serves(server)
            wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)  # other threads are at work here


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",
        struct.pack("<I", (1 << 20) + 1) + b"{",
        struct.pack("<I", 7) + b"garbage",
        struct.pack("<I", 0),
        struct.pack("<I", 2) + b"\xff\xfe",
        struct.pack("<I", 4) + b"null",
        struct.pack("<I", 40_000) + b"[" * 40_000,
    ],
    ids=["length 2**32-1", "length over the limit", "no JSON", "empty", "no UTF-8", "null", "nested"],
)
def test_garbage_ends_its_own_session_only(pool: Pool, raw: bytes) -> None:
    with serving(pool) as server:
        with RawClient(server) as client:
            client.send_raw(raw)
            assert client.receive() is None
        still_serves(server)


def test_descriptors_that_nobody_asked_for_are_closed(pool: Pool) -> None:
    reading, writing = os.pipe()
    with serving(pool) as server, RawClient(server) as client, open(reading, "rb") as pipe:
        client.send({"file": "x", "argv": ["x"], "workdir": "/", "env": {}}, [writing])
        os.close(writing)
        assert client.receive() is None
        assert pipe.read() == b""


@pytest.mark.parametrize("state", ["before the policy is asked", "while it thinks", "while the command runs"])
def test_no_descriptor_is_held_that_comes_at_another_time_with_half_a_frame(pool: Pool, state: str) -> None:
    decide = threading.Event()

    def policy(_: Request) -> Escalate:
        decide.wait(20)
        return Escalate()

    reading, writing = os.pipe()
    with serving(pool, policy, patience_s=100) as server, RawClient(server) as client:
        if state != "before the policy is asked":
            client.send({"file": "sleep", "argv": ["sleep", "1000"], "workdir": "/", "env": {}})
        if state == "while the command runs":
            decide.set()
            assert client.receive() == {"action": "Escalate"}
            client.send({"fds": []})
        client.send_raw(b"\x10\0\0\0half", [writing] * 200)
        os.close(writing)
        with open(reading, "rb") as pipe:
            assert is_readable(pipe, 20)
            assert pipe.read() == b""
        assert len(server._sessions) == 1
        decide.set()


@pytest.mark.parametrize("fds", [[0], [0, 0], [-1, 1], ["0", "1"], [0, 2**40], "01"])
def test_a_wrong_list_of_descriptors_starts_nothing(pool: Pool, fds: Any, tmp_path: Path) -> None:
    with serving(pool) as server, RawClient(server) as client, open(os.devnull) as null:
        client.ask(["touch", str(tmp_path / "made")])
        client.send({"fds": fds}, [null.fileno(), null.fileno()])
        assert client.receive() is None
        still_serves(server)
    assert not (tmp_path / "made").exists()


def test_a_number_that_no_process_can_have_is_a_command_that_does_not_start(pool: Pool) -> None:
    with serving(pool) as server, RawClient(server) as client, open(os.devnull) as null:
        client.ask(["true"])
        client.send({"fds": [2**31 - 1]}, [null.fileno()])
        assert client.receive()["exit_code"] == 126


def test_silent_sessions_hold_up_no_other_and_are_closed_in_time(pool: Pool) -> None:
    with serving(pool, patience_s=5.0) as server:  # for those that do speak as well
        with RawClient(server) as silent, RawClient(server) as half, RawClient(server) as undecided:
            half.send_raw(b"\x10\0")
            undecided.ask(["true"])
            still_serves(server)
            assert silent.receive() is None
            assert half.receive() is None
            assert undecided.receive() is None


def test_a_policy_that_thinks_holds_up_no_other_session(pool: Pool) -> None:
    thought = threading.Event()

    def policy(request: Request) -> Any:
        if request.argv[0] == "slow":
            thought.wait(20)
        return Escalate()

    with serving(pool, policy) as server, RawClient(server) as slow:
        slow.send({"file": "slow", "argv": ["slow"], "workdir": "/", "env": {}})
        still_serves(server)
        thought.set()
        assert slow.receive() == {"action": "Escalate"}


def test_too_many_sessions_are_turned_away(pool: Pool) -> None:
    with serving(pool, max_sessions=2) as server:
        with RawClient(server), RawClient(server), RawClient(server) as third:
            assert third.receive() is None
        wait_until(lambda: not server._sessions)
        still_serves(server)


def test_who_asks_and_goes_does_not_have_the_policy_called_without_limit(pool: Pool) -> None:
    decide = threading.Event()
    called = []

    def policy(request: Request) -> Deny:
        called.append(request)
        decide.wait(20)
        return Deny("no")

    with serving(pool, policy, max_sessions=3) as server:
        for _ in range(8):
            with RawClient(server) as client, suppress(ConnectionError):
                client.send({"file": "x", "argv": ["x"], "workdir": "/", "env": {}})
        with RawClient(server) as client:
            assert client.receive() is None
        wait_until(lambda: not server._sessions)
        assert len(called) == 3
        decide.set()
        wait_until(lambda: not server._deciding)
        with RawClient(server) as client:
            client.send({"file": "x", "argv": ["x"], "workdir": "/", "env": {}})
            assert client.receive() == {"action": {"Deny": {"reason": "no"}}}


def begun(client: RawClient, pids: Path) -> list[psutil.Process]:
    """Have a command with a detached descendant run; returns both processes."""
    assert client.ask(
        ["sh", "-c", f"(setsid sleep 1000 & echo $! > {pids}); echo $$ >> {pids}; sleep 1000; :"]
    )
    client.send({"fds": []})
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    return [psutil.Process(int(pid)) for pid in pids.read_text().split()]


def test_a_client_that_dies_ends_its_command_and_all_below(pool: Pool, tmp_path: Path) -> None:
    with serving(pool, grace=0.2) as server:
        with RawClient(server) as client:
            processes = begun(client, tmp_path / "pids")
        seconds_until_gone(processes)
        still_serves(server)


def test_a_frame_that_is_no_signal_ends_the_command(pool: Pool, tmp_path: Path) -> None:
    with serving(pool, grace=0.2) as server, RawClient(server) as client:
        processes = begun(client, tmp_path / "pids")
        client.send({"signal": signal.SIGKILL})
        assert client.receive() is None
        seconds_until_gone(processes)


def test_a_flood_of_signals_stops_nobody_else(pool: Pool) -> None:
    with serving(pool, grace=0.2) as server, RawClient(server) as client:
        client.ask(["sh", "-c", "trap '' USR1; echo $$; kill -STOP $$; echo on; read _"])
        (reading, writing), (gate, open_gate) = os.pipe(), os.pipe()
        client.send({"fds": [0, 1]}, [gate, writing])
        os.close(gate)
        os.close(writing)
        with open(open_gate, "wb"), open(reading, "rb", buffering=0) as told:
            command = psutil.Process(int(told.readline()))
            wait_until(lambda: command.status() == psutil.STATUS_STOPPED)
            for _ in range(3000):
                client.send({"signal": signal.SIGUSR1})
            still_serves(server)

            def goes_on() -> bool:
                """Again: there may be no room for one more, as long as the worker has not read the others."""
                client.send({"signal": signal.SIGCONT})
                return bool(select.select([told], [], [], 0.1)[0])

            wait_until(goes_on)
            assert told.readline() == b"on\n"
        assert client.receive() == {"exit_code": 1}  # of `read`, at the end of the gate


def test_closing_the_server_ends_its_commands(pool: Pool, tmp_path: Path) -> None:
    with ExecServer(pool, lambda _: Escalate(), grace=0.2) as server:
        client = RawClient(server)
        processes = begun(client, tmp_path / "pids")
    assert not any(process.is_running() for process in processes)
    client.stream.close()
    server.close()


# -- our own client ------------------------------------------------------------------------------------


def start(server: ExecServer, *command: str, **options: Any) -> subprocess.Popen[Any]:
    return server.start([*CLIENT, *command], env=ENVIRONMENT, **options)


def outcome(program: subprocess.Popen[Any], given: bytes | None = None) -> tuple[int, bytes, bytes]:
    out, err = program.communicate(given, timeout=30)
    return program.returncode, out, err


def test_a_command_runs_in_place_if_it_may(pool: Pool) -> None:
    pids = []

    def policy(_: Request) -> Any:
        return Run()

    with serving(pool, policy) as server:
        program = start(server, "--", "sh", "-c", "echo $$; cat; exit 3", stdin=PIPE, stdout=PIPE)
        code, out, _ = outcome(program, b"input")
        pids.append(program.pid)
    assert (code, out) == (3, f"{pids[0]}\ninput".encode())


def test_a_command_runs_outside_on_the_clients_descriptors(pool: Pool, tmp_path: Path) -> None:
    with serving(pool) as server:
        script = "pwd; echo $PPID; cat; echo err >&2; exit 4"
        program = start(server, "sh", "-c", script, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=tmp_path)
        code, out, err = outcome(program, b"input")
    folder, parent, given = out.decode().splitlines()
    assert (code, folder, given, err) == (4, str(tmp_path), "input", b"err\n")
    assert int(parent) in pool.worker_pids()


def test_a_shell_in_between_passes_the_socket_on(pool: Pool) -> None:
    with serving(pool) as server:
        inner = " ".join(CLIENT) + " sh -c 'echo \\$PPID'"
        shell = server.start(["sh", "-c", f'sh -c "{inner}" && echo after'], stdout=PIPE, env=ENVIRONMENT)
        code, out, _ = outcome(shell)
    parent, after = out.decode().split()
    assert (code, after, int(parent) in pool.worker_pids()) == (0, "after", True)


def test_more_descriptors_can_be_handed_over(pool: Pool) -> None:
    with serving(pool) as server:
        shell = " ".join(CLIENT) + " --fd 7 sh -c 'echo seven >&7' 7>&1 >/dev/null"
        assert outcome(server.start(["sh", "-c", shell], stdout=PIPE)) == (0, b"seven\n", None)


def test_a_denied_command_says_why_and_exits_with_126(pool: Pool) -> None:
    with serving(pool, Deny("not on a Sunday")) as server:
        program = start(server, "true", stderr=PIPE)
        assert outcome(program) == (126, None, b"fdpool exec: denied: not on a Sunday\n")


@pytest.mark.parametrize("decision", [Run(), Escalate()])
def test_a_command_that_is_not_found_is_127_and_one_that_is_no_program_126(pool: Pool, decision: Any) -> None:
    with serving(pool, decision) as server:
        code, _, err = outcome(start(server, "no-such-program", stderr=PIPE))
        assert code == 127
        assert b"cannot run no-such-program" in err
        code, _, err = outcome(start(server, "/etc", stderr=PIPE))
        assert code == 126
        assert b"Permission denied" in err


def test_without_a_server_the_client_says_so_and_exits_with_125(pool: Pool) -> None:
    def run(**environment: str) -> tuple[int, bytes]:
        env = {**ENVIRONMENT, **environment}
        done = subprocess.run([*CLIENT, "true"], env=env, stderr=PIPE, check=False)
        return done.returncode, done.stderr

    assert run() == (
        125,
        f"fdpool exec: {VARIABLE} is not set: no server has started this program\n".encode(),
    )
    for number in ("77", "-1", "x", "0", ""):
        code, err = run(**{VARIABLE: number})
        assert code == 125
        assert b"not a socket that was inherited" in err
    with serving(pool) as server:
        gone = server.start(
            ["sh", "-c", f"read _; exec {' '.join(CLIENT)} true"], stdin=PIPE, stderr=PIPE, env=ENVIRONMENT
        )
    code, _, err = outcome(gone, b"\n")
    assert code == 125
    assert b"cannot be reached" in err


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("decision", "command", "code"),
    [(Deny("no"), "true", 126), (Run(), "no-such", 127), (Escalate(), "no-such", 127), (None, "true", 125)],
    ids=["denied", "not found here", "not found there", "no server"],
)
def test_where_nothing_can_be_told_the_status_still_says_it(
    pool: Pool, decision: Any, command: str, code: int, redirection: str
) -> None:
    unset = f"unset {VARIABLE};" if decision is None else ""
    with serving(pool, decision) as server:
        shell = f"{unset} exec {' '.join(CLIENT)} {command} {redirection}"
        assert outcome(server.start(["sh", "-c", shell], env=ENVIRONMENT))[0] == code


@pytest.mark.parametrize("number", ["999", "-1", "99999999999"])
def test_a_descriptor_that_is_not_open_is_bad_usage(number: str) -> None:
    done = subprocess.run([*CLIENT, f"--fd={number}", "true"], env=ENVIRONMENT, stderr=PIPE, check=False)
    assert done.returncode == 2
    assert f"--fd {number}: no such descriptor is open".encode() in done.stderr


def test_more_descriptors_than_a_message_carries_are_bad_usage() -> None:
    with open(os.devnull) as null:
        numbers = [os.dup(null.fileno()) for _ in range(251)]
    try:
        options = [f"--fd={number}" for number in numbers]
        done = subprocess.run(
            [*CLIENT, *options, "true"],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=numbers,
            check=False,
        )
    finally:
        close_all(numbers)
    assert done.returncode == 2
    assert b"--fd: 254 descriptors, with the standard ones, are above the limit of 253" in done.stderr


@pytest.mark.parametrize("decision", [Run(), Escalate()])
def test_a_command_is_looked_for_as_execvp_does(pool: Pool, decision: Any, tmp_path: Path) -> None:
    for folder in ("here", "bad", "good"):
        (tmp_path / folder).mkdir()
    for tool in ("here/local", "bad/later", "good/later", "bad/text"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 7\n")
    for tool in ("here/local", "good/later"):
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "bad" / "folder").mkdir()
    path = f":{tmp_path}/bad:{tmp_path}/good:{os.environ['PATH']}"
    with serving(pool, decision) as server:
        for command, code in (("local", 7), ("later", 7), ("text", 126), ("folder", 126), ("", 127)):
            env = {**ENVIRONMENT, "PATH": path}
            program = server.start([*CLIENT, command], env=env, cwd=tmp_path / "here", stderr=PIPE)
            assert (command, outcome(program)[0]) == (command, code)


def test_a_request_that_cannot_be_put_is_told_why(pool: Pool) -> None:
    with serving(pool, max_request=8_000) as server:
        code, _, err = outcome(start(server, "true", "x" * 9_000, stderr=PIPE))
        assert code == 125
        assert b"max_request" in err
        env = {**ENVIRONMENT, "TITLE": "\udcff"}
        code, _, err = outcome(server.start([*CLIENT, "true"], env=env, stderr=PIPE))
        assert code == 125
        assert b"the environment variable TITLE is not UTF-8" in err
        code, _, err = outcome(start(server, "true", "caf\udce9", stderr=PIPE))
        assert code == 125
        assert rb"the command's caf\udce9 is not UTF-8" in err


@pytest.mark.usefixtures("heeding_the_terminal")
def test_an_interrupt_while_the_policy_thinks_ends_the_client_without_a_word(pool: Pool) -> None:
    asked, decide = threading.Event(), threading.Event()

    def policy(_: Request) -> Any:
        asked.set()
        decide.wait(20)
        return Escalate()

    with serving(pool, policy) as server:
        program = server.start([sys.executable, "-m", "fdpool", "exec", "true"], env=ENVIRONMENT, stderr=PIPE)
        assert asked.wait(20)
        program.send_signal(signal.SIGINT)
        assert outcome(program) == (-signal.SIGINT, None, b"")
        decide.set()


@pytest.mark.usefixtures("heeding_the_terminal")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
)
def test_signals_are_passed_on_and_the_client_dies_of_what_killed_the_command(
    pool: Pool, number: int
) -> None:
    with serving(pool) as server:
        # Not a shell: dash loses a SIGINT that comes while it starts a program (3 of 9, measured without fdpool).
        code = "import signal; signal.signal(2, signal.SIG_DFL); print('begun', flush=True); signal.pause()"
        program = start(server, sys.executable, "-SIc", code, stdout=PIPE)
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        program.send_signal(number)
        assert outcome(program)[0] == -number


@pytest.mark.usefixtures("heeding_the_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_command_that_no_worker_has_begun_is_dropped_by_a_signal_of_which_its_client_dies(
    number: int, tmp_path: Path
) -> None:
    with Pool(1) as pool, serving(pool) as server:
        reading, writing = os.pipe()
        busy = pool.run(["cat"], stdin=reading)
        os.close(reading)
        program = start(server, "touch", str(tmp_path / "made"))
        wait_until(lambda: any(each._command is not None for each in list(server._sessions)))
        program.send_signal(signal.SIGWINCH)
        program.send_signal(number)
        assert outcome(program)[0] == -number
        assert not busy.done()
        os.close(writing)
        assert pool.submit(len, ()).result(20) == 0
    assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("heeding_the_terminal")
def test_a_command_that_handles_a_signal_goes_on(pool: Pool) -> None:
    with serving(pool) as server:
        script = (
            "trap 'echo winch' WINCH; trap 'echo int; exit 9' INT; echo begun; while :; do sleep 0.01; done"
        )
        program = start(server, "sh", "-c", script, stdout=PIPE)
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        program.send_signal(signal.SIGWINCH)
        assert program.stdout.readline() == b"winch\n"
        program.send_signal(signal.SIGINT)
        assert program.stdout.readline() == b"int\n"
        assert outcome(program)[0] == 9


def test_stopping_the_client_stops_the_command_and_continuing_continues_it(pool: Pool) -> None:
    with serving(pool) as server:
        # Not a shell that starts programs: stopped inside vfork(2), it would not look stopped.
        program = start(server, "sh", "-c", "echo $$; exec cat", stdin=PIPE, stdout=PIPE)
        assert program.stdout is not None
        command = psutil.Process(int(program.stdout.readline()))
        client = psutil.Process(program.pid)
        program.send_signal(signal.SIGTSTP)
        wait_until(lambda: command.status() == client.status() == psutil.STATUS_STOPPED)
        program.send_signal(signal.SIGCONT)
        wait_until(lambda: psutil.STATUS_STOPPED not in (command.status(), client.status()))
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == -signal.SIGTERM
        outcome(program)


def test_killing_the_client_ends_the_command(pool: Pool) -> None:
    with serving(pool, grace=0.2) as server:
        program = start(server, "sh", "-c", "echo $$; sleep 1000; :", stdout=PIPE)
        assert program.stdout is not None
        command = psutil.Process(int(program.stdout.readline()))
        program.kill()
        seconds_until_gone([command])
        assert outcome(program)[0] == -signal.SIGKILL


def test_a_command_that_was_lost_with_its_worker_is_not_said_never_to_have_run() -> None:
    with Pool(1) as pool, serving(pool) as server:
        program = start(server, "sh", "-c", "echo begun; exec sleep 1000", stdout=PIPE, stderr=PIPE)
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        code, _, err = outcome(program)
    assert (code, b"WorkerLost" in err) == (125, True)


def test_a_command_reads_from_and_writes_to_the_clients_terminal(pool: Pool) -> None:
    ours, theirs = pty.openpty()
    with serving(pool) as server:
        program = start(
            server,
            "sh",
            "-c",
            "test -t 0 && read line && echo got $line",
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        os.write(ours, b"typed\n")
        code = program.wait(30)
    output = b""
    while b"got" not in output:
        output += os.read(ours, 1000)
    os.close(ours)
    assert (code, b"got typed" in output) == (0, True)


def test_many_clients_at_once_each_get_their_own(pool: Pool) -> None:
    with serving(pool) as server:
        programs = [start(server, "sh", "-c", f"echo {n}; exit {n}", stdout=PIPE) for n in range(6)]
        for n, program in enumerate(programs):
            assert outcome(program)[:2] == (n, f"{n}\n".encode())


def test_a_client_that_reads_no_answer_and_goes_is_forgotten_at_once(pool: Pool) -> None:
    """T13: the answer cannot be sent, and what ends the session then comes when it is over already."""
    decide = threading.Event()

    def policy(_: Request) -> Deny:
        decide.wait(20)
        return Deny("no")

    with serving(pool, policy, patience_s=100) as server:
        with RawClient(server) as client:
            client.send({"file": "x", "argv": ["x"], "workdir": "/", "env": {}})
            client.stream.shutdown(socket.SHUT_RD)
            wait_until(lambda: server._sessions)
            decide.set()
            wait_until(lambda: all(each._session.state is State.OVER for each in list(server._sessions)))
        wait_until(lambda: not server._sessions)


def test_a_client_that_talks_on_instead_of_reading_the_end_gains_no_time(pool: Pool) -> None:
    with serving(pool, Deny("n" * 10_000), patience_s=3.0) as server:
        with RawClient(server, queue_bytes=1) as client:
            client.send({"file": "x", "argv": ["x"], "workdir": "/", "env": {}})

            def over() -> bool:
                try:
                    client.send({"signal": 2})
                except OSError:
                    return True
                return False

            wait_until(over)
        wait_until(lambda: not server._sessions)


def test_no_text_of_an_answer_stops_the_server(pool: Pool) -> None:
    """T14: what is quoted in it was chosen by a client, or by the policy."""
    with serving(pool, max_request=200_000) as server:
        for file in ("\ud800", "x" * 90_000, "/no/" + "\x01" * 15_000):
            with RawClient(server) as client:
                assert client.ask([file]) == {"action": "Escalate"}
                client.send({"fds": []})
                told = client.receive()
                assert told["exit_code"] in (126, 127)
                assert told["error"]
        still_serves(server)
    for reason in ("\udfff" * 10, "n" * 1_000_000):
        with serving(pool, Deny(reason)) as server, RawClient(server) as client:
            assert client.ask(["true"])["action"]["Deny"]["reason"]


def test_an_answer_above_the_limit_of_a_frame_ends_its_session_only(pool: Pool) -> None:
    def policy(request: Request) -> Any:
        return Escalate() if request.argv == ["true"] else Deny("n" * 5_000)

    with serving(pool, policy, max_request=4_000) as server:
        with RawClient(server) as client:
            assert client.ask(["x"]) is None
        still_serves(server)


# -- what may go wrong with the policy, or with the server -----------------------------------------------


async def cancelled() -> Any:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (lambda _: Deny(PermissionError("not you")), "TypeError: Deny(reason) takes a text"),  # type: ignore[arg-type]
        (lambda _: Deny(None), "TypeError: Deny(reason) takes a text"),  # type: ignore[arg-type]
        (lambda _: sys.exit("bad configuration"), "SystemExit: bad configuration"),
        (lambda _: cancelled(), "CancelledError"),
    ],
    ids=["no text", "None", "SystemExit", "CancelledError"],
)
def test_whatever_a_policy_raises_its_request_is_denied(pool: Pool, policy: Any, reason: str) -> None:
    def only_x(request: Request) -> Any:
        return policy(request) if request.argv == ["x"] else Escalate()

    with serving(pool, only_x) as server:
        with RawClient(server) as client:
            told = client.ask(["x"])["action"]["Deny"]["reason"]
            assert "the policy failed: " in told
            assert reason in told
        still_serves(server)


@pytest.mark.usefixtures("raising_log")
def test_a_log_handler_that_raises_leaves_no_client_without_an_answer(pool: Pool) -> None:
    with serving(pool, lambda request: Escalate() if request.argv == ["true"] else 1 / 0) as server:
        with RawClient(server) as client:
            assert "ZeroDivisionError" in client.ask(["x"])["action"]["Deny"]["reason"]
        still_serves(server)


@pytest.mark.parametrize(
    ("number", "value", "error"),
    [
        ("patience_s", float("inf"), ValueError),
        ("patience_s", None, TypeError),
        ("patience_s", 0, ValueError),
        ("max_sessions", 0, ValueError),
        ("max_request", "1", TypeError),
        ("grace", -1, ValueError),
    ],
)
def test_a_number_of_no_use_is_refused_at_once(pool: Pool, number: str, value: Any, error: Any) -> None:
    with pytest.raises(error, match=number):
        ExecServer(pool, lambda _: Run(), **{number: value})


def test_patience_may_last_longer_than_the_kernel_waits(pool: Pool) -> None:
    with serving(pool, patience_s=2_200_000) as server:
        still_serves(server)


def test_an_error_of_the_servers_own_costs_one_session_only(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with serving(pool) as server:
        with RawClient(server) as client, monkeypatch.context() as patched:
            client.ask(["true"])
            patched.setattr(pool, "popen", failing)
            client.send({"fds": []})
            assert client.receive() is None
        still_serves(server)
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_the_kernel_lets_nobody_watch_costs_no_other_session(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the user watches all that `fs.epoll.max_user_watches` allows (epoll(7))."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serving(pool) as server, RawClient(server) as client:
        client.ask(["cat"])
        with monkeypatch.context() as patch:
            patch.setattr(server._selector, "register", refuse)
            with RawClient(server) as refused:
                assert refused.receive() is None
        client.send({"fds": []})
        assert client.receive() == {"exit_code": 0}
        still_serves(server)


def test_a_server_whose_thread_dies_leaves_nobody_waiting(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with serving(pool, grace=0.2) as server, RawClient(server) as client, RawClient(server) as silent:
        processes = begun(client, tmp_path / "pids")
        monkeypatch.setattr(server, "_receive_handshakes", None)
        with RawClient(server):
            assert client.receive() is None
            assert silent.receive() is None
            seconds_until_gone(processes)


def test_a_fork_of_the_servers_process_keeps_no_client_waiting() -> None:
    with Pool(1, start_method="fork") as pool:
        with serving(pool) as server, RawClient(server) as idle:
            door = socket.socket(fileno=os.dup(server.fileno()))
            still_serves(server)  # the first command, which forks
            idle.send("garbage")
            assert idle.receive() is None
        with door, pytest.raises(ConnectionRefusedError):
            door.send(b"\0")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_program_may_be_started_by_way_of_a_fork(pool: Pool) -> None:
    with serving(pool) as server:
        assert start(server, "true", preexec_fn=os.setpgrp).wait(30) == 0
