"""The facts about descriptors in messages that the design rests on, each proved on the running kernel.

No fdpool code in here. The ids (M1, ...) are those of the design's notes; the numbers were measured on
Linux 6.18. A failure means that the kernel (or CPython) has changed, and that `wire` must be looked at.
"""

from __future__ import annotations

import array
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="facts about Linux")

DGRAM, STREAM, SEQPACKET = socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET
EVERY_KIND = pytest.mark.parametrize("kind", [DGRAM, STREAM, SEQPACKET], ids=["dgram", "stream", "seqpacket"])
SO_PASSPIDFD, SO_PASSRIGHTS, SCM_PIDFD = 76, 83, 4
ROOMY = socket.CMSG_SPACE(4 * 300)

Pair = Callable[[int], tuple[socket.socket, socket.socket]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made: list[socket.socket] = []

    def make(kind: int) -> tuple[socket.socket, socket.socket]:
        ends = socket.socketpair(socket.AF_UNIX, kind)
        made.extend(ends)
        return ends

    yield make
    for end in made:
        end.close()


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDONLY)
    yield fd
    os.close(fd)


def rights(*groups: list[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", group)) for group in groups]


def numbers(ancillary: list[tuple[int, int, bytes]], kind: int = socket.SCM_RIGHTS) -> list[int]:
    found: list[int] = []
    for level, this_kind, data in ancillary:
        if (level, this_kind) == (socket.SOL_SOCKET, kind):
            found += struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
    return found


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_fds() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if is_open(int(name))}


@contextmanager
def free_slots(count: int) -> Iterator[None]:
    """Lower RLIMIT_NOFILE so that exactly `count` more descriptors can be opened."""
    taken, limit, free = open_fds(), 0, 0
    while free < count or limit in taken:
        free += limit not in taken
        limit += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run(script: str) -> str:
    """What a fresh interpreter prints; there forking is safe, whatever threads run here."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- what recvmsg says and does not say ----------------------------------------------------------


def test_a_received_descriptor_is_inheritable_unless_recvmsg_is_told_otherwise(pair: Pair, null: int) -> None:
    """M16"""
    a, b = pair(DGRAM)
    for flags, inheritable in ((0, True), (socket.MSG_CMSG_CLOEXEC, False)):
        a.sendmsg([b"x"], rights([null]))
        got = numbers(b.recvmsg(10, ROOMY, flags)[1])
        assert [os.get_inheritable(fd) for fd in got] == [inheritable]
        close(got)


def test_the_close_on_exec_flag_comes_back_in_the_returned_flags(pair: Pair, null: int) -> None:
    """M16: so `if flags:` is no test for truncation."""
    a, b = pair(DGRAM)
    a.sendmsg([b"x"], rights([null]))
    _, ancillary, flags, _ = b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)
    close(numbers(ancillary))
    assert flags & socket.MSG_CMSG_CLOEXEC
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def test_recv_fds_gives_inheritable_descriptors(pair: Pair, null: int) -> None:
    """M16, P2: `socket.recv_fds` cannot be told otherwise on the versions that ignore its flags."""
    a, b = pair(DGRAM)
    socket.send_fds(a, [b"x"], [null])
    _, got, _, _ = socket.recv_fds(b, 10, 1)
    assert [os.get_inheritable(fd) for fd in got] == [True]
    close(got)


@EVERY_KIND
def test_too_small_a_control_buffer_loses_descriptors_but_no_bytes(pair: Pair, null: int, kind: int) -> None:
    """M2: 5 sent, room for 2: two are open, the others never were, MSG_CTRUNC is the only sign."""
    a, b = pair(kind)
    before = open_fds()
    a.sendmsg([b"bytes"], rights([null] * 5))
    data, ancillary, flags, _ = b.recvmsg(10, socket.CMSG_LEN(8), socket.MSG_CMSG_CLOEXEC)
    got = numbers(ancillary)
    assert (data, len(got)) == (b"bytes", 2)
    assert flags & socket.MSG_CTRUNC
    assert open_fds() - before == set(got)
    close(got)


@pytest.mark.parametrize("free", [0, 2])
@EVERY_KIND
def test_a_receiver_without_free_descriptors_gets_the_bytes_and_what_fits(
    pair: Pair, null: int, kind: int, free: int
) -> None:
    """M5"""
    a, b = pair(kind)
    a.sendmsg([b"bytes"], rights([null] * 5))
    with free_slots(free):
        data, ancillary, flags, _ = b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)
    got = numbers(ancillary)
    close(got)
    assert (data, len(got)) == (b"bytes", free)
    assert flags & socket.MSG_CTRUNC


def test_253_descriptors_pass_and_254_do_not(pair: Pair, null: int) -> None:
    """M1"""
    a, b = pair(DGRAM)
    a.sendmsg([b"x"], rights([null] * 253))
    got = numbers(b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)[1])
    close(got)
    assert len(got) == 253
    with pytest.raises(OSError) as failure:
        a.sendmsg([b"x"], rights([null] * 254))
    assert failure.value.errno == errno.EINVAL


def test_the_limit_of_253_is_on_the_sum_of_control_messages_which_arrive_as_one(
    pair: Pair, null: int
) -> None:
    """M1"""
    a, b = pair(DGRAM)
    a.sendmsg([b"x"], rights([null] * 100, [null] * 100))
    ancillary = b.recvmsg(10, 2 * ROOMY, socket.MSG_CMSG_CLOEXEC)[1]
    close(numbers(ancillary))
    assert [len(data) for _, _, data in ancillary] == [200 * 4]
    with pytest.raises(OSError) as failure:
        a.sendmsg([b"x"], rights([null] * 100, [null] * 100, [null] * 100))
    assert failure.value.errno == errno.EINVAL


@pytest.mark.parametrize(("asked", "let_in"), [(1, 2), (2, 2), (3, 4)])
def test_the_padding_of_cmsg_space_lets_one_more_in(pair: Pair, null: int, asked: int, let_in: int) -> None:
    """M3: CMSG_LEN is exact, CMSG_SPACE rounds up to 8 bytes."""
    a, b = pair(DGRAM)
    for room, count in ((socket.CMSG_SPACE(4 * asked), let_in), (socket.CMSG_LEN(4 * asked), asked)):
        a.sendmsg([b"x"], rights([null] * 8))
        got = numbers(b.recvmsg(10, room, socket.MSG_CMSG_CLOEXEC)[1])
        close(got)
        assert len(got) == count


def test_a_cut_message_still_installs_its_descriptors(pair: Pair, null: int) -> None:
    """M14: raising on MSG_TRUNC without closing them would leak."""
    a, b = pair(DGRAM)
    a.sendmsg([b"long message"], rights([null]))
    data, ancillary, flags, _ = b.recvmsg(4, ROOMY, socket.MSG_CMSG_CLOEXEC)
    got = numbers(ancillary)
    close(got)
    assert (data, len(got)) == (b"long", 1)
    assert flags & socket.MSG_TRUNC


def test_a_peek_duplicates_descriptors(pair: Pair, null: int) -> None:
    """M15"""
    a, b = pair(DGRAM)
    a.sendmsg([b"x"], rights([null]))
    peeked = numbers(b.recvmsg(10, ROOMY, socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC)[1])
    received = numbers(b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)[1])
    assert len(set(peeked + received)) == 2
    close(peeked + received)


def test_a_peek_by_plain_recv_opens_no_descriptor_and_drops_none(pair: Pair, null: int) -> None:
    a, b = pair(DGRAM)
    a.sendmsg([b"x"], rights([null]))
    before = open_fds()
    assert b.recv(10, socket.MSG_PEEK) == b"x"
    assert open_fds() == before
    received = numbers(b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)[1])
    close(received)
    assert len(received) == 1


def test_a_plain_recv_drops_descriptors(pair: Pair, null: int) -> None:
    """M4: on a stream even for the bytes that are read with recvmsg afterwards."""
    a, b = pair(STREAM)
    before = open_fds()
    a.sendmsg([b"xy"], rights([null]))
    assert b.recv(1) == b"x"
    data, ancillary, _, _ = b.recvmsg(10, ROOMY)
    assert (data, ancillary) == (b"y", [])
    assert open_fds() == before


def test_credentials_take_the_room_of_descriptors(pair: Pair, null: int) -> None:
    """M23: with SO_PASSCRED a buffer for one descriptor brings cut credentials and no descriptor."""
    a, b = pair(DGRAM)
    b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    a.sendmsg([b"x"], rights([null]))
    _, ancillary, flags, _ = b.recvmsg(10, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    assert flags & socket.MSG_CTRUNC
    assert numbers(ancillary) == []


def test_a_socket_with_passpidfd_gets_an_uninvited_descriptor_with_each_message(pair: Pair) -> None:
    """M24"""
    a, b = pair(DGRAM)
    try:
        b.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
    except OSError:
        pytest.skip("needs Linux 6.5")
    a.send(b"x")
    pidfds = numbers(b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)[1], SCM_PIDFD)
    assert len(pidfds) == 1
    close(pidfds)


@EVERY_KIND
def test_a_socket_with_passrights_off_makes_its_peers_send_fail(pair: Pair, null: int, kind: int) -> None:
    """M24"""
    a, b = pair(kind)
    try:
        b.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        pytest.skip("needs Linux 6.16")
    with pytest.raises(PermissionError):
        a.sendmsg([b"x"], rights([null]))
    a.send(b"without")
    assert b.recv(10) == b"without"


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, 4608, 100_000])
def test_the_largest_datagram_is_sndbuf_minus_32(pair: Pair, asked: int | None) -> None:
    """M13"""
    a, b = pair(DGRAM)
    if asked is not None:
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, asked)
    largest = a.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - 32
    a.send(bytes(largest))
    assert len(b.recv(2 * largest)) == largest
    with pytest.raises(OSError) as failure:
        a.send(bytes(largest + 1))
    assert failure.value.errno == errno.EMSGSIZE


def test_the_queue_of_a_pair_is_bounded_by_sndbuf_and_a_full_one_is_not_writable(pair: Pair) -> None:
    """M12: net.unix.max_dgram_qlen (10, or 512 on newer systems) does not count, SO_SNDBUF does."""
    counts = []
    for size in (4608, 212_992):
        a, _b = pair(DGRAM)
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size // 2)
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                a.send(b"x", socket.MSG_DONTWAIT)
                sent += 1
        poll = select.poll()
        poll.register(a, select.POLLOUT)
        assert poll.poll(0) == []
        counts.append(sent)
    assert counts[0] < 10 < 100 < counts[1]


def test_too_many_descriptors_in_flight_are_refused_until_some_have_landed() -> None:
    """M18: per user, against RLIMIT_NOFILE; root is exempt, so the script becomes somebody else."""
    script = """
        import array, errno, os, resource, socket
        if os.getuid() == 0:
            os.setgid(54321)
            os.setuid(54321)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        message = ([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
        sent = 0
        try:
            while True:
                a.sendmsg(*message, socket.MSG_DONTWAIT)
                sent += 1
        except OSError as error:
            name = errno.errorcode[error.errno]
        received = b.recvmsg(1, 1000)[1]
        for _ in range(10):
            b.recv(1)
        a.sendmsg(*message, socket.MSG_DONTWAIT)
        print(name, 60 <= sent <= 80)
    """
    assert run(script) == "ETOOMANYREFS True"


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (100, [(b"CCCCAAAA", 1), (b"BBBB", 0)]),
        (3, [(b"CCC", 0), (b"CAA", 1), (b"AAB", 0), (b"BBB", 0)]),
    ],
)
def test_a_stream_read_may_begin_with_an_earlier_frame_and_bring_a_later_ones_descriptors(
    pair: Pair, null: int, size: int, expected: list[tuple[bytes, int]]
) -> None:
    """M6: a read stops after bytes that bring descriptors, but not before them."""
    a, b = pair(STREAM)
    a.send(b"CCCC")
    a.sendmsg([b"AAAA"], rights([null]))
    a.send(b"BBBB")
    reads = []
    for _ in expected:
        data, ancillary, _, _ = b.recvmsg(size, ROOMY, socket.MSG_CMSG_CLOEXEC)
        got = numbers(ancillary)
        close(got)
        reads.append((data, len(got)))
    assert reads == expected


def test_descriptors_on_an_empty_stream_write_vanish(pair: Pair, null: int) -> None:
    """M7"""
    a, b = pair(STREAM)
    assert a.sendmsg([b""], rights([null])) == 0
    a.send(b"x")
    data, ancillary, _, _ = b.recvmsg(10, ROOMY)
    assert (data, ancillary) == (b"x", [])


@pytest.mark.parametrize("kind", [DGRAM, SEQPACKET])
def test_an_empty_datagram_is_legal_and_carries_descriptors(pair: Pair, null: int, kind: int) -> None:
    """M7, M11: so b"" is no message one can tell from the end of a stream."""
    a, b = pair(kind)
    a.sendmsg([b""], rights([null]))
    a.send(b"next")
    data, ancillary, _, _ = b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)
    got = numbers(ancillary)
    close(got)
    assert (data, len(got)) == (b"", 1)
    assert b.recv(10) == b"next"


# -- a peer that has gone ------------------------------------------------------------------------


def test_a_datagram_socket_does_not_notice_that_its_peer_has_gone(pair: Pair) -> None:
    """M8: writable, not readable, no error pending; only a send tells."""
    a, b = pair(DGRAM)
    b.close()
    poll = select.poll()
    poll.register(a, select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == [(a.fileno(), select.POLLOUT)]
    with pytest.raises(BlockingIOError):
        a.recv(1, socket.MSG_DONTWAIT)
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    with pytest.raises(ConnectionRefusedError):
        a.send(b"x")


def test_a_stream_whose_peer_left_input_unread_gives_its_data_then_a_reset_then_the_end(pair: Pair) -> None:
    """M9"""
    a, b = pair(STREAM)
    a.send(b"never read")
    b.send(b"last words")
    b.close()
    assert a.recv(100) == b"last words"
    with pytest.raises(ConnectionResetError):
        a.recv(100)
    assert a.recv(100) == b""


def test_shutting_down_the_writing_side_says_nothing_to_a_datagram_peer(pair: Pair) -> None:
    """M10"""
    a, b = pair(DGRAM)
    a.shutdown(socket.SHUT_WR)
    with pytest.raises(BlockingIOError):
        b.recv(1, socket.MSG_DONTWAIT)


def test_a_waiting_datagram_sender_is_refused_when_the_last_receiver_closes(pair: Pair) -> None:
    """M21"""
    a, b = pair(DGRAM)
    with pytest.raises(BlockingIOError):
        while True:
            a.send(b"x", socket.MSG_DONTWAIT)
    errors: list[OSError] = []

    def wait_for_room() -> None:
        try:
            a.send(b"x")
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait_for_room)
    thread.start()
    b.close()
    thread.join()
    assert [error.errno for error in errors] == [errno.ECONNREFUSED]


def test_shutting_down_the_reading_side_through_a_duplicate_wakes_a_waiting_receiver(pair: Pair) -> None:
    """The "go home" for idle workers: b"", for every holder, for ever."""
    _a, b = pair(DGRAM)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(b.recv(10)))
    thread.start()
    duplicate = b.dup()
    duplicate.shutdown(socket.SHUT_RD)
    thread.join()
    duplicate.close()
    assert got == [b""]
    assert b.recv(10) == b""


# -- lives of descriptors ------------------------------------------------------------------------


def test_an_inbox_outlives_the_process_that_served_it() -> None:
    """A datagram that a dead worker had not received comes whole to whoever holds the socket."""
    script = """
        import array, os, socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        go, gone = os.pipe()
        pid = os.fork()
        if pid == 0:
            b.recv(1)
            os._exit(0)
        a.send(b"1")
        os.waitpid(pid, 0)
        r, w = os.pipe()
        a.sendmsg([b"2"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [w]))])
        os.close(w)
        data, ancillary, _, _ = b.recvmsg(10, 100)
        os.write(int.from_bytes(ancillary[0][2], "little"), b"whole")
        print(data.decode(), os.read(r, 10).decode())
    """
    assert run(script) == "2 whole"


def test_a_descriptor_in_flight_is_open_until_its_carriers_are_closed(pair: Pair) -> None:
    """M20"""
    a, b = pair(DGRAM)
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    a.sendmsg([b"x"], rights([write_end]))
    os.close(write_end)
    with pytest.raises(BlockingIOError):
        os.read(read_end, 1)
    a.close()
    b.close()
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_nonblocking_mode_and_offset_belong_to_the_open_file_not_to_the_descriptor(
    pair: Pair, tmp_path: os.PathLike[str]
) -> None:
    """M17: shared with whoever was sent the descriptor; reopening through /proc gives private ones."""
    path = os.path.join(tmp_path, "file")
    with open(path, "wb") as file:
        file.write(b"0123456789")
    a, b = pair(DGRAM)
    mine = os.open(path, os.O_RDONLY)
    a.sendmsg([b"x"], rights([mine]))
    (theirs,) = numbers(b.recvmsg(10, ROOMY, socket.MSG_CMSG_CLOEXEC)[1])
    private = os.open(f"/proc/self/fd/{mine}", os.O_RDONLY)
    os.set_blocking(theirs, False)
    os.read(theirs, 4)
    assert not os.get_blocking(mine)
    assert os.read(mine, 2) == b"45"
    assert os.get_blocking(private)
    assert os.read(private, 2) == b"01"
    close([mine, theirs, private])


@pytest.mark.parametrize("what", ["pipe", "socket"])
def test_a_lock_on_a_pipe_or_socket_is_the_processs_and_goes_with_it(what: str, pair: Pair) -> None:
    """fcntl(2): whoever else holds the description; POSIX leaves open which files take one."""
    held = os.pipe()[::-1] if what == "pipe" else [end.detach() for end in pair(STREAM)]
    telling, told = os.pipe()
    child = os.fork()
    if child == 0:
        fcntl.lockf(held[0], fcntl.LOCK_EX)
        os.write(told, b"x")
        signal.pause()
    os.read(telling, 1)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    fcntl.lockf(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    close([*held, telling, told])


def test_a_python_timeout_makes_the_socket_nonblocking_for_all_who_hold_it(pair: Pair) -> None:
    """M30: and the other socket object does not know."""
    a, _b = pair(DGRAM)
    twin = socket.socket(fileno=os.dup(a.fileno()))
    a.settimeout(5)
    assert twin.gettimeout() is None
    with pytest.raises(BlockingIOError):
        twin.recv(1)
    twin.close()


def test_a_closed_number_is_refused_at_send(pair: Pair) -> None:
    """M19"""
    a, _b = pair(DGRAM)
    number = fcntl.fcntl(a, fcntl.F_DUPFD_CLOEXEC, 500)
    os.close(number)
    with pytest.raises(OSError) as failure:
        a.sendmsg([b"x"], rights([number]))
    assert failure.value.errno == errno.EBADF


def test_epoll_goes_on_reporting_a_number_closed_while_another_holder_exists() -> None:
    """H11, M27: the ghost can neither be read nor unregistered."""
    read_end, write_end = os.pipe()
    holder = os.dup(read_end)
    with select.epoll() as epoll:
        epoll.register(read_end, select.EPOLLIN)
        os.write(write_end, b"x")
        os.close(read_end)
        assert epoll.poll(0) == [(read_end, select.EPOLLIN)]
        with pytest.raises(OSError) as failure:
            epoll.unregister(read_end)
        assert failure.value.errno == errno.EBADF
        assert epoll.poll(0) == [(read_end, select.EPOLLIN)]
    close([holder, write_end])


def test_close_of_a_duplicate_is_silent_and_shutdown_of_one_acts_on_all(pair: Pair) -> None:
    """M28"""
    a, b = pair(STREAM)
    a.dup().close()
    with pytest.raises(BlockingIOError):
        b.recv(1, socket.MSG_DONTWAIT)
    duplicate = a.dup()
    duplicate.shutdown(socket.SHUT_RDWR)
    duplicate.close()
    assert b.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        a.send(b"x")


def test_shutdown_of_a_duplicate_breaks_accept_for_every_holder_of_a_listener() -> None:
    """M28"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with listener.dup() as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError) as failure:
            listener.accept()
    assert failure.value.errno == errno.EINVAL


def test_children_forked_in_a_loop_hold_their_siblings_ends_and_mask_the_end_of_stream() -> None:
    """M22"""
    script = """
        import os, socket, stat
        pairs, pids = [], []
        def sockets():
            def is_socket(name):
                try:
                    return stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode)
                except OSError:
                    return False
            return sum(map(is_socket, os.listdir("/proc/self/fd")))
        for _ in range(4):
            mine, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                mine.close()  # the end it knows of
                theirs.send(bytes([sockets()]))
                theirs.recv(1)
                os._exit(0)
            theirs.close()
            pairs.append(mine)
            pids.append(pid)
        counts = [mine.recv(1)[0] for mine in pairs]
        pairs[0].close()  # its worker should see the end, but its siblings hold this socket too
        masked = os.waitpid(pids[0], os.WNOHANG) == (0, 0)
        for mine in pairs[1:]:
            mine.send(b"x")
        for pid in pids[1:]:
            os.waitpid(pid, 0)
        freed = os.waitpid(pids[0], 0)[0] == pids[0]
        print(counts, masked, freed)
    """
    assert run(script) == "[1, 2, 3, 4] True True"


class Alarm(Exception):
    pass


@pytest.mark.timeout(60, method="thread")  # SIGALRM and its timer are the test's
def test_a_raising_signal_handler_loses_the_message_that_recvmsg_has_just_taken(
    pair: Pair, null: int
) -> None:
    """M25: the handler runs after the call and before the assignment."""
    a, b = pair(DGRAM)
    before = open_fds()

    def on_alarm(*_: object) -> None:
        raise Alarm

    old = signal.signal(signal.SIGALRM, on_alarm)
    lost = 0
    gc.disable()  # what a handler raises in the midst of a collection is dropped, and no other alarm would come
    try:
        for _ in range(1000):
            for _ in range(100):
                a.sendmsg([b"x"], rights([null]))
            got: list[object] = []
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001)
                while True:
                    got.append(b.recvmsg(1, ROOMY, socket.MSG_CMSG_CLOEXEC))
                    if len(got) == 100:
                        while True:  # the alarm is still to come
                            pass
            except Alarm:
                pass
            left = 0
            with pytest.raises(BlockingIOError):
                while b.recv(1, socket.MSG_DONTWAIT):
                    left += 1
            lost += 100 - len(got) - left
            leaked = open_fds() - before - {fd for item in got for fd in numbers(item[1])}  # type: ignore[index]
            for fd in open_fds() - before:
                os.close(fd)
            if lost:
                break
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, old)
    assert lost == 1
    assert len(leaked) == 1
