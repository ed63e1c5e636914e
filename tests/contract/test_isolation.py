"""What docs/security.md says: what is sealed, what is close-on-exec, what has a name, what is unpickled by whom."""

from __future__ import annotations

import fcntl
import os
import pickle
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fdpool import Pool, _board, _messages
from tests.fuzz.targets import send
from tests.process_state import open_descriptors, wait_until

from . import helpers

_GET_SEALS, _SEAL, _SHRINK, _GROW, _WRITE = 1034, 1, 2, 4, 8


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        assert pool.submit(helpers.square, 2).result(20) == 4
        yield pool


def refused(act: Any, *args: Any) -> bool:
    try:
        act(*args)
    except PermissionError:
        return True
    return False


def test_nobody_can_cut_what_worker_and_client_share(pool: Pool) -> None:
    """A shrunk file under a mapping is SIGBUS for who reads it."""
    board = pool._client.board
    assert board is not None
    assert fcntl.fcntl(board.fd, _GET_SEALS) == _SEAL | _SHRINK | _GROW
    assert refused(os.ftruncate, board.fd, 0)
    assert refused(os.ftruncate, board.fd, 1 << 30)


def test_nobody_can_write_to_a_shared_object(pool: Pool) -> None:
    with pool.share(b"x" * 100_000) as shared:
        assert fcntl.fcntl(shared._fd, _GET_SEALS) == _SEAL | _SHRINK | _GROW | _WRITE
        assert refused(os.pwrite, shared._fd, b"y", 0)
        assert refused(os.ftruncate, shared._fd, 0)
        assert pool.submit(len, shared).result(20) == 100_000


def seals_of_payloads(_data: bytes) -> list[int]:
    """Of the memory files that this worker maps; it has no descriptor of them but this one of the folder's."""
    with open("/proc/self/maps") as lines:
        areas = [line.split()[0] for line in lines if "fdpool-payload" in line]
    fds = [os.open(f"/proc/self/map_files/{area}", os.O_RDONLY) for area in areas]
    try:
        return [fcntl.fcntl(fd, _GET_SEALS) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.skipif(os.getuid() != 0, reason="/proc/self/map_files is root's")
def test_the_size_of_a_large_argument_is_sealed(pool: Pool) -> None:
    numpy = pytest.importorskip("numpy")
    found = pool.submit(seals_of_payloads, numpy.zeros(100_000)).result(20)
    assert found
    assert all(seals & _SHRINK and seals & _GROW for seals in found)


def own_descriptors() -> dict[int, tuple[str, bool]]:
    """What each is, and whether a program would inherit it."""
    return {n: (what, os.get_inheritable(n)) for n, what in open_descriptors().items() if _is_open(n)}


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_a_worker_has_its_own_end_and_nobody_elses_and_a_program_has_neither(pool: Pool) -> None:
    """P12, T21: what it could reach is counted, one by one."""
    found = pool.submit(own_descriptors).result(20)
    above = {number: what for number, what in found.items() if number > 2}
    assert not any(inheritable for _, inheritable in above.values())
    sockets = [what for what, _ in above.values() if what.startswith("socket:")]
    mine = {os.readlink(f"/proc/self/fd/{link.theirs.fileno()}") for link in pool._client.links.values()}
    assert len(sockets) == 1
    assert sockets[0] in mine
    assert not [what for what, _ in above.values() if "pidfd" in what or "eventpoll" in what]
    assert [what.split()[0] for what, _ in above.values() if "fdpool" in what] == ["/memfd:fdpool-stacks"]
    program = pool.submit(
        lambda: (
            subprocess.run(["ls", "/proc/self/fd"], check=False, close_fds=False, capture_output=True).stdout
        )
    ).result(20)
    assert len(program.split()) == 4  # 0 to 2, and what lists the folder


def of_boards() -> tuple[list[str], list[int]]:
    """The descriptors of any, and where in it the part of one begins that is mapped."""
    with open("/proc/self/maps") as lines:
        mapped = [int(line.split()[2], 16) for line in lines if "fdpool-board" in line]
    return [what for what in open_descriptors().values() if "fdpool-board" in what], mapped


def of_boards_here_and_in_a_child() -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, pickle.dumps(of_boards()))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        in_child = pickle.load(pipe)
    os.waitpid(child, 0)
    assert _board.here is not None
    return _board.here.slot, of_boards(), in_child


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_worker_can_reach_its_own_part_of_the_board_only(pool: Pool, start_method: Any) -> None:
    """Not those of others of its pool, nor (in a fork of the program) what is of the program's other pools."""
    assert pool._client.board is not None
    with Pool(3, start_method=start_method) as another:
        slot, *found = another.submit(of_boards_here_and_in_a_child).result(20)
    assert found == [([], [slot * _board.AREA_BYTES])] * 2


def test_everything_that_a_pool_opens_in_its_program_is_close_on_exec_and_has_no_name() -> None:
    before = open_descriptors()
    with Pool(2, start_method="forkserver") as pool:
        assert pool.submit(helpers.square, 2).result(20) == 4
        wait_until(pool.worker_pids)
        ours = {n: what for n, what in open_descriptors().items() if before.get(n) != what and _is_open(n)}
        assert ours
        assert not [what for number, what in ours.items() if os.get_inheritable(number)]
        assert not [what for what in ours.values() if what.startswith("/") and not what.startswith("/memfd:")]
        for number, what in ours.items():
            if what.startswith("socket:"):
                with socket.socket(fileno=os.dup(number)) as sock:
                    assert sock.family == socket.AF_UNIX
                    assert sock.getsockname() == sock.getpeername() == ""


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_answers_no_task_is_never_unpickled(pool: Pool, tmp_path: Path) -> None:
    """P34: a header alone says whether a message is wanted."""
    mark = tmp_path / "exploded"
    body = pickle.dumps(Bomb(mark))
    for kind in (_messages.DONE, _messages.FAILED, _messages.BOOT_FAILED, _messages.PIECE, 99):
        data = _messages.pack_header(kind, 10**12, len(body)) + body
        send(pool._client.links[0].theirs, data, 0, 0)
    assert pool.submit(helpers.square, 3).result(20) == 9
    inner = _messages.pack_header(_messages.DONE, 10**12, len(body)) + body
    send(pool._client.links[0].theirs, _messages.pack_header(_messages.ANSWERS, 0, len(inner)) + inner, 0, 0)
    assert pool.submit(helpers.square, 3).result(20) == 9
    assert not mark.exists()
