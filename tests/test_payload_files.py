"""Files of every kind arrive as they were: same type, mode, position and settings, on the same description.

Rows: H1, H3, H4, H9, M17, M29, M31, P18, P19.
"""

from __future__ import annotations

import ctypes
import fcntl
import io
import os
import pty
import select
import selectors
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from fdpool import errors, payload
from fdpool.fds import Fd

from .payload_helpers import in_another_process, roundtrip, same_description

MODES = ["r", "w", "a", "r+", "w+", "a+", "x", "rb", "wb", "ab", "r+b", "w+b", "a+b", "xb"]


# -- type and settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "buffering"), [(mode, -1) for mode in MODES] + [(mode, 0) for mode in MODES if "b" in mode]
)
def test_a_file_arrives_with_its_type_mode_and_name(tmp_path: Path, mode: str, buffering: int) -> None:
    path = tmp_path / "file"
    if "x" not in mode:
        path.write_bytes(b"contents")
    with open(path, mode, buffering=buffering) as f, roundtrip(f) as copy:
        assert type(copy) is type(f)
        assert copy.mode == f.mode
        assert copy.name == f.name
        assert (copy.readable(), copy.writable(), copy.seekable()) == (f.readable(), f.writable(), True)
        assert same_description(f.fileno(), copy.fileno())
        if copy.writable():
            copy.write("!" if "b" not in mode else b"!")
    if mode.startswith(("r", "a")):
        assert path.read_bytes().startswith(b"!ontents" if mode.startswith("r+") else b"contents")


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
@pytest.mark.parametrize("mode", ["r", "r+", "w", "a+"])
def test_text_settings_arrive(tmp_path: Path, newline: str | None, mode: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"one\r\ntwo\rthree\nfour\n")
    with open(path, mode, newline=newline, encoding="latin-1", errors="replace") as f, roundtrip(f) as copy:
        assert (copy.encoding, copy.errors) == (f.encoding, f.errors)
        assert (copy.line_buffering, copy.write_through) == (False, False)
        if mode.startswith("r"):
            lines = copy.readlines()
            f.seek(0)
            assert lines == f.readlines()
        if mode != "r":
            copy.write("five\nsix\r\n")
            copy.flush()
            end = os.fstat(f.fileno()).st_size
            written = {"\r": b"five\rsix\r\r", "\r\n": b"five\r\nsix\r\r\n"}.get(
                newline or "", b"five\nsix\r\n"
            )
            assert path.read_bytes()[:end].endswith(written)


def test_line_buffering_and_write_through_arrive(tmp_path: Path) -> None:
    with open(tmp_path / "lines", "w", buffering=1) as f, roundtrip(f) as copy:
        assert copy.line_buffering
    raw = open(tmp_path / "through", "wb")
    with io.TextIOWrapper(raw, write_through=True) as f, roundtrip(f) as copy:
        assert copy.write_through
        assert not hasattr(copy, "mode"), "only open() sets it"


@pytest.mark.parametrize("mode", ["rb", "wb", "r+b"])
def test_the_size_of_the_buffer_arrives(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with open(path, mode, buffering=777) as f, roundtrip(f) as copy:
        assert copy.__sizeof__() == f.__sizeof__()


def test_what_the_user_attached_to_a_file_arrives(text_file: Path) -> None:
    with open(text_file) as f:
        f.label = "mine"  # type: ignore[attr-defined]
        with roundtrip(f) as copy:
            assert copy.label == "mine"


def test_a_file_opened_on_a_number_is_named_after_the_number_there(text_file: Path) -> None:
    with os.fdopen(os.open(text_file, os.O_RDONLY)) as f, roundtrip(f) as copy:
        assert copy.name == copy.fileno() != f.fileno()


def test_closing_the_copy_leaves_the_original_open(text_file: Path) -> None:
    with open(text_file) as f:
        roundtrip(f).close()
        assert f.readline() == "line 0\n"


def test_a_file_made_not_to_close_its_number_owns_the_one_there(text_file: Path) -> None:
    fd = os.open(text_file, os.O_RDONLY)
    with open(fd, closefd=False) as f:
        roundtrip(f).close()
    os.close(fd)


# -- position (H3, M29) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "rb", "r+", "r+b"])
def test_a_half_read_file_goes_on_where_its_reader_was(text_file: Path, mode: str) -> None:
    """H3, M29: not where the read-ahead of the buffer was."""
    with open(text_file, mode) as f:
        assert f.readline() in ("line 0\n", b"line 0\n")
        assert in_another_process(_readline, f) in ("line 1\n", b"line 1\n")


def _readline(file: Any) -> Any:
    line = file.readline()
    file.close()
    return line


def test_a_half_read_raw_file_goes_on_too(text_file: Path) -> None:
    """H3."""
    with open(text_file, "rb", buffering=0) as f:
        f.read(7)
        with roundtrip(f) as copy:
            assert copy.read(6) == b"line 1"


@pytest.mark.parametrize("mode", ["w", "wb", "a", "w+", "r+b"])
def test_what_was_written_before_lands_before_what_the_receiver_writes(text_file: Path, mode: str) -> None:
    """H3, M29: the writer is flushed."""
    first, second = ("first ", "second") if "b" not in mode else (b"first ", b"second")
    with open(text_file, mode) as f:
        f.write(first)
        in_another_process(_write, f, second)
    assert b"first second" in text_file.read_bytes()


def _write(file: Any, data: Any) -> None:
    file.write(data)
    file.flush()


def test_the_offset_is_shared_with_the_sender(text_file: Path) -> None:
    """M17."""
    with open(text_file, "rb", buffering=0) as f:
        assert in_another_process(_readline, f) == b"line 0\n"
        assert f.readline() == b"line 1\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-16-le", "utf-8"])
def test_a_decoder_goes_on_in_the_middle(tmp_path: Path, encoding: str) -> None:
    """H3: with the byte order that the start of the file gave it."""
    path = tmp_path / "text"
    text = "första\nandra ☃\ntredje\n"
    path.write_text(text, encoding=encoding)
    with open(path, encoding=encoding) as f:
        f.readline()
        with roundtrip(f) as copy:
            assert copy.read() == "andra ☃\ntredje\n"


def test_an_encoder_writes_no_second_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "text"
    with open(path, "w", encoding="utf-16") as f:
        f.write("first ")
        in_another_process(_write, f, "second")
    assert path.read_text(encoding="utf-16") == "first second"


def test_a_file_being_iterated_over_is_refused(text_file: Path) -> None:
    with open(text_file) as f:
        next(f)
        with pytest.raises(errors.DescriptorRefused, match=r"being iterated over, use readline\(\)"):
            payload.dumps(f)


@pytest.mark.parametrize("mode", ["ab", "a+b", "a", "a+"])
def test_an_appending_file_keeps_the_shared_offset(text_file: Path, mode: str) -> None:
    """H4: FileIO(fd, "ab") would seek to the end."""
    with open(text_file, mode) as f:
        os.lseek(f.fileno(), 7, os.SEEK_SET)
        with roundtrip(f) as copy:
            assert os.lseek(f.fileno(), 0, os.SEEK_CUR) == 7
            assert copy.mode == f.mode
            assert fcntl.fcntl(copy.fileno(), fcntl.F_GETFL) & os.O_APPEND
            assert not os.get_inheritable(copy.fileno())
            copy.write("end" if "b" not in mode else b"end")
    assert text_file.read_text().endswith("line 9\nend")


def test_a_file_without_seek_end_goes_on_too() -> None:
    with open("/proc/self/status", "rb") as f:
        f.readline()
        with roundtrip(f) as copy:
            assert copy.readline().startswith(b"Umask")


# -- pipes and buffers (P19) ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_a_fresh_pipe_is_handed_over_without_waiting_for_data(mode: str) -> None:
    r, w = os.pipe()
    with os.fdopen(r, mode) as reader, os.fdopen(w, "w" + mode[1:]) as writer:
        got_reader, got_writer = roundtrip((reader, writer))
        with got_reader:
            with got_writer:
                got_writer.write("hello" if mode == "r" else b"hello")
            writer.close()
            assert got_reader.read() in ("hello", b"hello")


@pytest.mark.parametrize("mode", ["r", "rb"])
def test_a_pipe_with_bytes_read_ahead_is_refused(mode: str) -> None:
    """P19: they would be lost."""
    r, w = os.pipe()
    os.write(w, b"one\ntwo\n")
    with os.fdopen(r, mode) as reader, os.fdopen(w, "w"):
        first = reader.readline()
        with pytest.raises(errors.DescriptorRefused, match="cannot seek back"):
            payload.dumps(reader)
        assert (first, reader.readline()) in [("one\n", "two\n"), (b"one\n", b"two\n")], (
            "nothing was consumed"
        )


def test_a_pipe_read_exactly_to_the_end_of_its_buffer_can_go_on() -> None:
    r, w = os.pipe()
    os.write(w, b"one\n")
    with os.fdopen(r, "rb") as reader, os.fdopen(w, "wb", buffering=0) as writer:
        assert reader.readline() == b"one\n"
        with roundtrip(reader) as copy:
            writer.write(b"two\n")
            assert copy.readline() == b"two\n"


def test_half_a_character_in_the_decoder_is_refused() -> None:
    r, w = os.pipe()
    with os.fdopen(r, "r", encoding="utf-8", newline="\n") as reader:
        os.write(w, b"x" + "€".encode()[:2])
        assert reader.read(1) == "x"
        with pytest.raises(errors.DescriptorRefused, match="cannot seek back"):
            payload.dumps(reader)
        os.write(w, "€".encode()[2:])
        os.close(w)
        assert reader.read() == "€"


def test_looking_into_the_buffer_does_not_disturb_a_reader_in_another_thread() -> None:
    r, w = os.pipe()
    with os.fdopen(r, "rb") as reader, os.fdopen(w, "wb", buffering=0) as writer:
        lines: list[bytes] = []

        def read() -> None:
            while line := reader.readline():
                lines.append(line)

        def write() -> None:
            for number in range(200):
                writer.write(b"%d\n" % number)
            writer.close()

        threads = [threading.Thread(target=read), threading.Thread(target=write)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            try:
                roundtrip(reader).close()
            except errors.DescriptorRefused:
                pass
        assert lines == [b"%d\n" % number for number in range(200)]


def test_a_buffer_that_cannot_be_flushed_is_refused() -> None:
    with open("/dev/full", "wb") as f:
        f.write(b"x")
        with pytest.raises(errors.DescriptorRefused, match="cannot be written: .*No space left"):
            payload.dumps(f)
        with pytest.raises(OSError, match="No space left"):
            f.close()


def test_wrappers_around_memory_are_just_objects() -> None:
    text = io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"one\ntwo\n")))  # type: ignore[arg-type]
    assert text.readline() == "one\n"
    copy = roundtrip(text)
    assert copy.readline() == "two\n"
    assert roundtrip(io.StringIO("x")).read() == "x"


def test_a_buffered_pair_is_refused() -> None:
    pair = io.BufferedRWPair(io.BytesIO(), io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(errors.DescriptorRefused, match="does not tell what its two ends are"):
        payload.dumps(pair)


# -- refusals (H1, H9, M31) -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "rb", "wb", "r+b"])
@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_closed_file_is_refused(text_file: Path, mode: str, buffering: int) -> None:
    """H1."""
    with open(text_file, mode, buffering=buffering if "b" in mode else -1) as f:
        pass
    with pytest.raises(errors.DescriptorRefused, match=r"argument 1 of print\(...\): .*it is closed"):
        payload.dumps_call(print, (f,), {})


def test_a_detached_wrapper_is_refused(text_file: Path) -> None:
    """H1."""
    f = open(text_file)
    buffer = f.detach()
    with pytest.raises(errors.DescriptorRefused, match="detached"):
        payload.dumps(f)
    raw = buffer.detach()
    with pytest.raises(errors.DescriptorRefused, match="detached"):
        payload.dumps(buffer)
    raw.close()


@pytest.mark.parametrize(
    ("flags", "mode", "says"), [(os.O_RDONLY, "w", "writable"), (os.O_WRONLY, "r", "readable")]
)
@pytest.mark.parametrize("kind", ["", "b"])
def test_a_mode_that_the_descriptor_does_not_have_is_refused(
    text_file: Path, flags: int, mode: str, says: str, kind: str
) -> None:
    """H9, M31: Python accepts it, and fails with EBADF much later."""
    with os.fdopen(os.open(text_file, flags), mode + kind) as f:
        with pytest.raises(
            errors.DescriptorRefused, match=f"it is {says}, but its descriptor was opened for"
        ):
            payload.dumps(f)


def test_a_closed_number_is_refused() -> None:
    """H1."""
    fd = os.dup(0)
    os.close(fd)
    with pytest.raises(errors.DescriptorRefused, match=f"{fd} is not an open descriptor") as e:
        payload.dumps(Fd(fd))
    assert isinstance(e.value, ValueError)
    handle = Fd(0)
    handle.close()
    with pytest.raises(errors.DescriptorRefused, match="<Fd closed> cannot be handed .* it is closed"):
        payload.dumps(handle)
    with pytest.raises(errors.DescriptorRefused):
        payload.dumps(Fd(2**31 - 1))


def test_the_pools_own_descriptors_are_refused(text_file: Path) -> None:
    with open(text_file) as f:
        payload.reserve(f.fileno())
        try:
            for own in (f, Fd(f), Fd(f, reopen=False)):
                with pytest.raises(errors.DescriptorRefused, match="belongs to the pool itself"):
                    payload.dumps(own)
        finally:
            payload.release(f.fileno())
        roundtrip(f).close()


def test_a_bare_number_is_a_number() -> None:
    assert roundtrip(0) == 0


def test_directory_iterators_are_not_picklable_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with os.scandir(tmp_path) as entries:
        with pytest.raises(errors.NotPicklable, match="ScandirIterator"):
            payload.dumps(entries)
        with pytest.raises(errors.NotPicklable, match="DirEntry"):
            payload.dumps(next(entries))


# -- every other kind of descriptor (H4) -------------------------------------------------------------------


def _timerfd() -> int:
    return int(ctypes.CDLL(None).timerfd_create(1, 0o2000000))


def _signalfd() -> int:
    mask = ctypes.create_string_buffer(128)
    return int(ctypes.CDLL(None).signalfd(-1, mask, 0o2000000))


def _eventfd() -> int:
    return os.eventfd(3) if hasattr(os, "eventfd") else int(ctypes.CDLL(None).eventfd(3, 0))


def _epoll() -> int:
    epoll = select.epoll()
    fd = os.dup(epoll.fileno())
    epoll.close()
    return fd


def _pty() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


def _direct(folder: Path) -> int:
    path = folder / "direct"
    path.touch()
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")


def _fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDWR)


DESCRIPTORS: dict[str, Any] = {
    "regular": lambda folder: os.open(folder / "file", os.O_RDWR | os.O_CREAT),
    "append": lambda folder: os.open(folder / "file", os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    "path": lambda folder: os.open(folder, os.O_PATH),
    "direct": _direct,
    "directory": lambda folder: os.open(folder, os.O_RDONLY | os.O_DIRECTORY),
    "epoll": lambda _: _epoll(),
    "eventfd": lambda _: _eventfd(),
    "timerfd": lambda _: _timerfd(),
    "signalfd": lambda _: _signalfd(),
    "memfd": lambda _: os.memfd_create("test"),
    "pidfd": lambda _: os.pidfd_open(os.getpid()),
    "pty": lambda _: _pty(),
    "fifo": _fifo,
    "null": lambda _: os.open(os.devnull, os.O_RDWR),
}


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_a_handle_carries_any_descriptor(tmp_path: Path, kind: str) -> None:
    """H4: the receiver owns one of the same description."""
    fd = DESCRIPTORS[kind](tmp_path)
    try:
        with roundtrip(Fd(fd)) as handle:
            assert os.readlink(f"/proc/self/fd/{fd}") == os.readlink(f"/proc/self/fd/{handle.fileno()}")
            assert os.fstat(handle.fileno()).st_mode == os.fstat(fd).st_mode
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            assert fcntl.fcntl(handle.fileno(), fcntl.F_GETFL) == flags
            mine = handle.fileno()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(mine)
        os.fstat(fd)
    finally:
        os.close(fd)


def test_a_handle_works_in_another_process(tmp_path: Path) -> None:
    """H4: a directory to open in, an eventfd to read."""
    (tmp_path / "inside").write_text("found")
    folder = os.open(tmp_path, os.O_RDONLY)
    event = _eventfd()
    try:
        assert in_another_process(_use_handles, Fd(folder), Fd(event)) == ("found", 3)
    finally:
        os.close(folder)
        os.close(event)


def _use_handles(folder: Fd, event: Fd) -> tuple[str, int]:
    inside = os.open("inside", os.O_RDONLY, dir_fd=folder.fileno())
    return os.read(inside, 10).decode(), int.from_bytes(os.read(event.fileno(), 8), sys.byteorder)


@pytest.mark.parametrize("kind", ["null", "fifo"])
def test_files_on_devices_arrive(tmp_path: Path, kind: str) -> None:
    """H4."""
    with os.fdopen(DESCRIPTORS[kind](tmp_path), "r+b", buffering=0) as f, roundtrip(f) as copy:
        assert os.path.samestat(os.fstat(copy.fileno()), os.fstat(f.fileno()))


def test_a_terminal_is_a_terminal_there() -> None:
    """H4."""
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as f, roundtrip(f) as copy:
        assert copy.isatty()
        copy.write("shown")
        copy.flush()
        assert screen.read(5) == b"shown"


def test_a_file_on_an_o_path_descriptor_is_refused(text_file: Path) -> None:
    """H4."""
    with os.fdopen(os.open(text_file, os.O_PATH), "rb") as f:
        with pytest.raises(errors.DescriptorRefused, match="opened with O_PATH; send fdpool.Fd"):
            payload.dumps(f)


def test_an_epoll_object_is_refused_but_its_handle_is_not() -> None:
    """H4."""
    with select.epoll() as epoll:
        with pytest.raises(
            errors.DescriptorRefused, match=r"two processes on one epoll .* fdpool.Fd\(epoll\)"
        ):
            payload.dumps(epoll)
        with roundtrip(Fd(epoll)) as handle:
            assert os.readlink(f"/proc/self/fd/{handle.fileno()}") == "anon_inode:[eventpoll]"


@pytest.mark.parametrize("kind", [selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector])
def test_a_selector_is_refused(kind: Any) -> None:
    """It would carry descriptor numbers."""
    with kind() as selector:
        selector.register(0, selectors.EVENT_READ) if kind is not selectors.EpollSelector else None
        with pytest.raises(errors.DescriptorRefused):
            payload.dumps(selector)


def test_a_subclass_of_fd_is_found_though_plain_pickle_would_send_its_number() -> None:
    class Tagged(Fd):
        __slots__ = ()

    handle = roundtrip(Tagged(0))
    assert type(handle).__name__ == "Tagged"
    assert handle.fileno() > 2
    handle.close()


# -- a private description (P18) --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND])
def test_a_reopened_handle_has_its_own_offset_and_the_same_access(text_file: Path, flags: int) -> None:
    """P18, M17."""
    fd = os.open(text_file, flags)
    try:
        os.lseek(fd, 5, os.SEEK_SET)
        with roundtrip(Fd(fd, reopen=True)) as handle:
            assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == 0
            assert os.lseek(fd, 0, os.SEEK_CUR) == 5
            assert os.path.samestat(os.fstat(fd), os.fstat(handle.fileno()))
            assert fcntl.fcntl(handle.fileno(), fcntl.F_GETFL) == fcntl.fcntl(fd, fcntl.F_GETFL)
            assert not handle.reopen
    finally:
        os.close(fd)


def test_an_unlinked_temporary_file_can_be_reopened() -> None:
    with tempfile.TemporaryFile() as f:
        f.write(b"contents")
        f.flush()
        with roundtrip(Fd(f, reopen=True)) as handle:
            assert os.read(handle.fileno(), 20) == b"contents"


def test_only_regular_files_can_be_reopened(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(errors.DescriptorRefused, match="reopen=True is for regular files"):
            payload.dumps(Fd(fd, reopen=True))
    finally:
        os.close(fd)


# -- temporary files -------------------------------------------------------------------------------------


def test_a_temporary_file_arrives() -> None:
    with tempfile.TemporaryFile() as f:
        f.write(b"contents")
        f.seek(0)
        with roundtrip(f) as copy:
            assert type(copy) is type(f)
            assert copy.read() == b"contents"


def test_a_named_temporary_file_is_deleted_by_its_maker_only() -> None:
    with tempfile.NamedTemporaryFile("w+") as f:
        f.write("contents")
        with roundtrip(f) as copy:
            assert type(copy) is type(f)
            assert copy.name == f.name
            copy.seek(0)
            assert copy.read() == "contents"
        assert os.path.exists(f.name)
    assert not os.path.exists(f.name)


@pytest.mark.parametrize("mode", ["w+b", "w+"])
@pytest.mark.parametrize("rolled", [False, True])
def test_a_spooled_temporary_file_is_shared_not_copied(mode: str, rolled: bool) -> None:
    data, more = ("contents", "more") if mode == "w+" else (b"contents", b"more")
    with tempfile.SpooledTemporaryFile(max_size=1 if rolled else 1000, mode=mode) as f:
        f.write(data)
        f.seek(0)
        with roundtrip(f) as copy:
            assert type(copy) is type(f)
            assert copy.read() == data
            copy.write(more)
            copy.flush()
            assert copy.mode == f.mode
        f.seek(0)
        assert f.read() == data + more


def test_a_subclass_of_a_spooled_file_is_shared_too() -> None:
    class Spool(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        pass

    with Spool() as f:
        with roundtrip(f) as copy:
            copy.write(b"there")
            copy.flush()
        f.seek(0)
        assert f.read() == b"there"


# -- standard streams ------------------------------------------------------------------------------------


def test_a_standard_stream_arrives_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    r, w = os.pipe()
    stream = io.TextIOWrapper(os.fdopen(w, "wb"), line_buffering=True)
    stream.buffer.raw.name = "<stdout>"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", stream)
    with os.fdopen(r) as reader:
        print("before")
        in_another_process(_say, sys.stdout)
        print("after")
        stream.close()
        assert reader.read() == "before\nsaid to <stdout>\nafter\n"


def _say(stream: io.TextIOWrapper) -> None:
    print("said to", stream.name, file=stream)


def test_a_text_file_is_never_turned_into_its_contents(text_file: Path) -> None:
    """cloudpickle alone would send a StringIO."""
    with open(text_file) as f:
        with roundtrip(lambda: f)() as copy:
            assert type(copy) is io.TextIOWrapper
            assert same_description(f.fileno(), copy.fileno())


def test_a_stream_without_descriptor_that_cannot_be_pickled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Console(io.TextIOBase):
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("no console over there")

    monkeypatch.setattr(sys, "stdout", Console())
    with pytest.raises(errors.NotPicklable, match=r"argument 1 of print\(...\): .*Console"):
        payload.dumps_call(print, (sys.stdout,), {})


# -- subclasses ------------------------------------------------------------------------------------------


class Raw(io.FileIO):
    """A subclass that changes nothing in how it is made."""


class Text(io.TextIOWrapper):
    """Likewise."""


class Reader(io.BufferedReader):
    """Likewise."""


class Logged(io.FileIO):
    """A subclass with a constructor of its own."""

    def __init__(self, path: Any, log: Any) -> None:
        super().__init__(path)
        self.log = log


class Reopens(Logged):
    """A subclass that says itself how it is pickled."""

    def __reduce__(self) -> Any:
        return Reopens, (self.name, self.log)


def test_plain_subclasses_arrive_as_themselves(text_file: Path) -> None:
    with Text(Reader(Raw(text_file))) as f:
        f.buffer.label = "mine"  # type: ignore[attr-defined]
        with roundtrip(f) as copy:
            kinds = type(copy), type(copy.buffer), type(copy.buffer.raw)
            assert kinds == (Text, Reader, Raw)
            assert copy.readline() == "line 0\n"
            assert copy.buffer.label == "mine"


def test_a_subclass_with_a_constructor_of_its_own_is_refused(text_file: Path) -> None:
    with Logged(text_file, []) as f:
        with pytest.raises(errors.DescriptorRefused, match="Logged is a FileIO with an __init__"):
            payload.dumps(f)


def test_a_subclass_that_knows_how_to_be_pickled_is_left_alone(text_file: Path) -> None:
    with Reopens(text_file, ["log"]) as f, roundtrip((f, lambda: 0))[0] as copy:
        assert copy.log == ["log"]
        assert not same_description(f.fileno(), copy.fileno())
