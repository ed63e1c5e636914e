"""Descriptors through the pool: what arrives, what is refused, what is lost, and that nothing leaks."""

from __future__ import annotations

import dataclasses
import os
import resource
import select
import socket
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fdpool
from fdpool import Fd, Pool, _messages
from fdpool._fixtures.pools import PoolFactory
from fdpool._messages import HEADER_BYTES
from tests.process_state import open_descriptors, wait_until

from . import helpers


@pytest.fixture
def pool(worker_pool_factory: PoolFactory) -> Pool:
    return worker_pool_factory(1)


def test_an_open_file_arrives_with_its_offset(pool: Pool, text_file: Path) -> None:
    """H3."""
    with open(text_file) as file:
        assert file.readline() == "line 0\n"
        assert pool.submit(helpers.read_all, file).result().startswith("line 1\n")
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == text_file.stat().st_size  # one offset for both


def test_what_was_written_but_not_flushed_comes_before_what_the_worker_writes(
    pool: Pool, tmp_path: Path
) -> None:
    """H3."""
    with open(tmp_path / "out", "w") as file:
        file.write("client ")
        pool.submit(lambda f: print("worker", file=f), file).result()
        file.write("client again\n")
    assert (tmp_path / "out").read_text() == "client worker\nclient again\n"


def test_the_caller_may_close_its_own_as_soon_as_submit_returns(
    pool: Pool, text_file: Path, tmp_path: Path
) -> None:
    """H2: even if the number is used again at once, and the task waits behind others."""
    other = tmp_path / "other"
    other.write_text("the wrong file")
    read, write = os.pipe()
    with open(write, "wb"), open(read, "rb") as gate:
        held = pool.submit(helpers.read_all, gate)
        futures = []
        for _ in range(40):
            with open(text_file) as file:
                futures.append(pool.submit(helpers.read_all, file))
            with open(other) as _:
                pass
    assert held.result() == b""
    assert {future.result() for future in futures} == {text_file.read_text()}


@dataclasses.dataclass
class Holder:
    name: str
    inside: list[Any]


def test_files_are_found_wherever_they_are(pool: Pool, text_file: Path) -> None:
    """H13."""

    def open_it() -> Any:
        return open(text_file, "rb", buffering=0)

    expected = text_file.read_bytes()
    with open_it() as file:
        assert pool.submit(lambda: [file.read()]).result() == [expected]
    with open_it() as file:
        assert pool.submit(partial(helpers.read_all, file)).result() == expected
    with open_it() as file:
        assert (
            pool.submit(lambda holder: holder.inside[0]["f"].read(), Holder("h", [{"f": file}])).result()
            == expected
        )
    with open_it() as file:
        assert pool.submit(lambda *, deep: deep[0][1].read(), deep=[(0, file)]).result() == expected


def test_an_accepted_connection_is_answered_by_a_worker(pool: Pool) -> None:
    """H5."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        connection, _ = listener.accept()
        with connection:
            answered = pool.submit(helpers.echo_once, connection)
        client.sendall(b"hello")
        assert client.recv(100) == b"HELLO"
        assert answered.result() == 5
        assert client.recv(100) == b""  # the worker's was the last


def test_a_worker_may_return_what_only_it_opened(pool: Pool, tmp_path: Path) -> None:
    """H12."""
    path = str(tmp_path / "made")

    def make() -> Any:
        file = open(path, "w+")
        file.write("made in a worker")
        file.seek(0)
        os.unlink(path)
        return [file, Fd.take(os.open("/", os.O_RDONLY | os.O_DIRECTORY))]

    file, folder = pool.submit(make).result()
    with file, folder:
        assert file.read() == "made in a worker"
        assert not os.get_inheritable(file.fileno())
        assert "tmp" in os.listdir(folder.fileno())


def test_descriptors_in_a_result_that_nobody_takes_are_closed(pool: Pool) -> None:
    """H12."""
    pool.submit(helpers.square, 1).result()
    before = open_descriptors()
    for _ in range(20):
        pool.submit(lambda: open("/dev/null")).result().close()
        pool.submit(lambda: Fd.take(os.open("/dev/null", os.O_RDONLY)))
    pool.submit(helpers.square, 1).result()
    wait_until(lambda: open_descriptors().keys() == before.keys())


def test_the_same_file_twice_in_a_task_is_one_file_and_two_handles_are_two(
    pool: Pool, text_file: Path
) -> None:
    """H8."""

    def look(a: Any, b: Any, c: Fd, d: Fd) -> tuple[bool, bool]:
        c.close()
        return a is b, os.fstat(d.fileno()).st_size > 0

    with open(text_file, "rb") as file:
        number = file.fileno()
        assert pool.submit(look, file, file, Fd(number), Fd(number)).result() == (True, True)


@pytest.mark.parametrize("count", [0, 1, 199, 253])
def test_up_to_253_descriptors_travel_in_order(pool: Pool, count: int) -> None:
    """T1."""
    pipes = [os.pipe() for _ in range(count)]
    try:
        handles = [Fd(write) for _, write in pipes]
        assert pool.submit(
            lambda hs: [os.write(h.fileno(), bytes([n])) for n, h in enumerate(hs)], handles
        ).result() == ([1] * count)
        assert [os.read(read, 10) for read, _ in pipes] == [bytes([n]) for n in range(count)]
    finally:
        for pair in pipes:
            for fd in pair:
                os.close(fd)


@pytest.mark.parametrize("count", [254, 1000])
def test_one_descriptor_more_is_refused_at_submit(pool: Pool, count: int) -> None:
    """T1."""
    with open(os.devnull) as null, pytest.raises(fdpool.PayloadTooLarge, match="253"):
        pool.submit(print, [Fd(null) for _ in range(count)])
    assert pool.submit(helpers.square, 2).result() == 4


def test_the_pools_own_sockets_cannot_be_handed_over(pool: Pool) -> None:
    """T25."""
    pool.submit(helpers.square, 1).result()
    for end in (pool._client.links[0].mine, pool._client.links[0].theirs):
        with pytest.raises(fdpool.DescriptorRefused):
            pool.submit(print, Fd(end.fileno()))


def test_what_cannot_be_handed_over_is_refused_at_submit(pool: Pool, text_file: Path) -> None:
    """H1."""
    assert pool.submit(helpers.square, 1).result() == 1  # what the pool opens has its numbers
    with open(text_file) as file:
        number = file.fileno()
    with pytest.raises(fdpool.DescriptorRefused, match="closed"):
        pool.submit(print, file)
    with pytest.raises((fdpool.DescriptorRefused, OSError)):
        pool.submit(print, Fd(number))
    for wrong in (-1, True, 2**31, "3", 1.0, None):
        with pytest.raises((TypeError, ValueError)):
            Fd(wrong)  # type: ignore[arg-type]
    assert pool.submit(helpers.square, 2).result() == 4


@pytest.mark.parametrize("free", [0, 2])
def test_a_worker_at_its_limit_of_files_says_so_and_recovers(free: int) -> None:
    """T3. The limit is the worker's own, so that no task undoes it."""

    def squeeze(free: int) -> None:
        helpers.square(1)  # what it imports needs descriptors too
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(entry) for entry in os.listdir("/proc/self/fd")[:-1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + free + 10, hard))
        helpers.TAKEN.clear()
        try:
            while True:
                helpers.TAKEN.append(os.dup(0))
        except OSError:
            pass
        for _ in range(free):
            os.close(helpers.TAKEN.pop())

    def release() -> None:
        while helpers.TAKEN:
            os.close(helpers.TAKEN.pop())

    with Pool(1, initializer=squeeze, initargs=(free,)) as pool, open(os.devnull) as null:
        handles = [Fd(null) for _ in range(5)]
        with pytest.raises(fdpool.FdTransferError, match="RLIMIT_NOFILE") as caught:
            pool.submit(len, handles).result()
        assert (caught.value.wanted, caught.value.may_have_run) == (5, False)
        assert caught.value.got <= free + 1
        assert pool.submit(helpers.square, 3).result() == 9
        pool.submit(release).result()
        assert pool.submit(len, handles).result() == 5


def test_a_worker_that_receives_too_little_refuses_the_task(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2, T15: the header counts one more than the datagram carries."""
    real = _messages.pack_header

    def lie(kind: int, task: int = 0, body: int = 0, fd_count: int = 0, flags: int = 0) -> bytes:
        return real(kind, task, body, fd_count + (kind == _messages.TASK and fd_count > 0), flags)

    pool.submit(helpers.square, 1).result()
    with open(os.devnull) as null:
        with monkeypatch.context() as patch:
            patch.setattr(_messages, "pack_header", lie)
            future = pool.submit(len, [Fd(null)])
            with pytest.raises(fdpool.FdTransferError) as caught:
                future.result()
        assert (caught.value.wanted, caught.value.got) == (2, 1)
        assert pool.submit(len, [Fd(null)]).result() == 1


def test_garbage_on_the_task_link_is_closed_and_passed_over(pool: Pool) -> None:
    """T13, T14, T24: at the worker and at the client, with descriptors; and the client counts it."""
    strays = pool.stats().strays
    before = pool.submit(helpers.open_numbers).result()
    mine_before = open_descriptors()
    link = pool._client.links[0]
    good = _messages.pack_header(_messages.TASK, 10**9, 4, 0)
    garbage = [
        b"",
        b"x",
        os.urandom(HEADER_BYTES),
        b"\x02" + good[1:] + b"abcd",  # another version
        good + b"abc",  # a byte too few
        good + b"abcde",  # a byte too many
        _messages.pack_header(99, 1, 0, 0),  # no such kind
        b"\x01" * (_messages.MAX_DATAGRAM + 1000),  # cut by the receiver
    ]
    with open(os.devnull) as null:
        for data in garbage:
            for count in (0, 1, 5):
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null.fileno().to_bytes(4, "little") * count)]
                for end in (link.mine, link.theirs):
                    end.sendmsg([data], rights if count else [])
                assert pool.submit(helpers.square, 3).result() == 9
    assert pool.submit(helpers.open_numbers).result() == before
    wait_until(lambda: open_descriptors().keys() == mine_before.keys())
    assert pool.stats().strays == strays + 3 * len(garbage)


def test_arrays_arrive_without_a_copy_writable_and_private(pool: Pool) -> None:
    numpy = pytest.importorskip("numpy")

    def change(array: Any) -> Any:
        array[0] = 7.0
        return array

    mine = numpy.zeros(1_000_000)
    theirs = pool.submit(change, mine).result()
    assert mine[0] == 0.0
    assert theirs[0] == 7.0
    assert theirs[1:].sum() == 0.0
    theirs[1] = 1.0  # writable here, too
    assert not theirs.flags.owndata


def test_no_epoll_goes_on_reporting_what_was_handed_over_once_the_task_has_closed_it(pool: Pool) -> None:
    """H11, M27: it would if anybody still held a copy."""
    read, write = os.pipe()
    with select.epoll() as epoll, open(write, "wb", buffering=0) as end:
        with open(read, "rb", buffering=0) as file:
            epoll.register(file, select.EPOLLIN)
            end.write(b"x")
            assert epoll.poll(0) == [(read, select.EPOLLIN)]
            future = pool.submit(helpers.read_and_close, file, 1)
        assert future.result(timeout=20) == b"x"
        readers = select.poll()
        readers.register(end, 0)
        # POLLERR; the thread here that has sent it may just be about to close its own.
        wait_until(lambda: readers.poll(0))
        assert epoll.poll(0) == []
        with pytest.raises(BrokenPipeError):
            end.write(b"x")


def test_a_pipe_end_handed_to_a_task_is_held_by_nobody_else(pool: Pool) -> None:
    """H10."""
    read, write = os.pipe()
    with open(write, "wb") as end:
        pool.submit(lambda f: f.close(), end)
    with open(read, "rb") as other:
        assert other.read() == b""


@pytest.mark.parametrize("flags", [["-W", "error"], ["-X", "dev"]])
def test_a_file_that_a_task_leaves_to_be_closed_is_no_warning(flags: list[str]) -> None:
    source = """
        import fdpool, warnings
        def fail(file): raise LookupError
        with fdpool.Pool(1) as pool, open("/etc/passwd") as file:
            print(pool.submit(len, [file]).result())
            pool.submit(warnings.filterwarnings, "ignore", message="numpy.ndarray size").result()  # as numpy does
            try:
                pool.submit(fail, file).result()
            except LookupError:
                print("failed")
        """
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1\nfailed\n", "", 0)


@pytest.mark.parametrize("flags", [["-W", "error"], ["-X", "dev"]])
@pytest.mark.parametrize(
    ("initializer", "opening"),
    [
        ("look", "[]"),
        ("None", "[pool.submit(opened, 127).result()]"),
        ("None", "pool.map(opened, range(127, 130))"),
        # The first ones open nothing: so others run, and go, together.
        ("None", "pool.map(opened, range(2100))"),
    ],
    ids=["initargs", "result", "results", "many results"],
)
def test_a_file_that_has_travelled_is_no_warning_where_it_came_from(
    initializer: str, opening: str, flags: list[str]
) -> None:
    """What an initializer was handed, and what a task has returned."""
    source = f"""
        import fdpool
        def look(file): file.tell()
        def opened(number): return [open("/etc/passwd") for _ in range(3)] if 127 <= number < 255 else ()
        with open("/etc/passwd") as file, fdpool.Pool(1, initializer={initializer}, initargs=(file,)) as pool:
            print(pool.submit(len, "four").result())
            for files in {opening}:
                for file in files:
                    file.close()
        """
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(source)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 0)


def test_with_a_standard_stream_closed_no_file_of_ours_takes_its_place() -> None:
    """R2: what the client opens lands on the free number, and is handed to nobody as a standard stream."""
    source = """
        import os, sys
        os.close(1)
        kept = os.open("/etc/passwd", os.O_RDONLY)
        assert kept == 1
        import fdpool
        def look(): return [os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)]
        with fdpool.Pool(1) as pool:
            names = pool.submit(look).result()
            done = pool.run(["sh", "-c", "echo unheard"]).result()
        print(names[:2], done.returncode, file=sys.stderr)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.stderr == "['/dev/null', '/dev/null'] 0\n"


def test_descriptors_of_tasks_submitted_from_many_threads_never_cross(tmp_path: Path) -> None:
    """T26, with descriptors."""
    wrong: list[tuple[str, str]] = []
    with Pool(2) as pool:

        def work(base: int) -> None:
            for n in range(base, base + 20):
                path = tmp_path / str(n)
                path.write_text(str(n))
                with open(path) as file:
                    future = pool.submit(helpers.read_all, file)
                if future.result() != str(n):
                    wrong.append((str(n), future.result()))

        threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
