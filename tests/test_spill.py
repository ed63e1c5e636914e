"""Large payloads go to a memory file: arrays arrive without a copy and writable, and bad lengths are refused.

Row: M44; design section 6.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import pickle
import resource
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdpool import _spill, errors, payload
from fdpool.fds import Fd
from fdpool.payload import SPILL_BYTES
from tests.process_state import open_descriptors

from .payload_helpers import deliver, in_another_process, roundtrip

np = pytest.importorskip("numpy")


def mapped(how: str = "") -> int:
    """How many mappings of payload files this process has, or of these permissions (proc(5), [pid]/maps)."""
    with open("/proc/self/maps") as maps:
        return sum("fdpool-payload" in line and how in line for line in maps)


# -- when ------------------------------------------------------------------------------------------------


def test_up_to_the_threshold_a_payload_is_inline() -> None:
    overhead = len(payload.dumps(b"x" * 1000).body) - 1000
    assert not payload.dumps(b"x" * (SPILL_BYTES - overhead - 100)).spilled
    over = payload.dumps(b"x" * SPILL_BYTES)
    assert over.spilled
    assert len(over.body) < 100
    assert len(over.fds or ()) == 1
    assert deliver(over) == b"x" * SPILL_BYTES


@pytest.mark.parametrize("spill_bytes", [0, 1, 5000, 10**9])
def test_the_threshold_is_the_callers(spill_bytes: int) -> None:
    value = ["x" * 3000, np.arange(4000), bytearray(100)]
    sent = payload.dumps(value, spill_bytes=spill_bytes)
    assert sent.spilled == (spill_bytes < 30_000)
    got = deliver(sent)
    assert got[0] == value[0]
    assert (got[1] == value[1]).all()


def test_small_arrays_of_a_small_payload_need_no_memory_file() -> None:
    sent = payload.dumps([np.arange(1000), np.arange(1000)])
    assert not sent.spilled
    assert [array.sum() for array in deliver(sent)] == [499500, 499500]


# -- what arrives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"b" * 300_000,
        "é" * 200_000,
        bytearray(b"a" * 300_000),
        list(range(100_000)),
        {"k": b"x" * 100_000, "l": "y" * 100_000},
    ],
    ids=["bytes", "str", "bytearray", "list", "dict"],
)
def test_large_objects_arrive_equal(value: object) -> None:
    got = roundtrip(value)
    assert got == value
    assert type(got) is type(value)
    gc.collect()
    assert mapped() == 0, "nothing refers to the mapping any more"


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(100_000),
        lambda: np.arange(120_000, dtype="f4").reshape(3, 400, 100),
        lambda: np.asfortranarray(np.arange(120_000).reshape(300, 400)),
        lambda: np.arange(200_000)[::2],
        lambda: np.arange(120_000).reshape(300, 400)[:, ::3],
        lambda: np.zeros(0),
        lambda: np.zeros((0, 5)),
        lambda: np.array([{"o": 1}, None] * 5000, dtype=object),
        lambda: np.zeros(10_000, dtype=[("a", "i4"), ("b", "f8")]),
    ],
    ids=["1d", "3d", "fortran", "strided", "columns", "empty", "empty 2d", "objects", "records"],
)
def test_arrays_of_any_layout_arrive(make: Callable[[], Any]) -> None:
    array = make()
    got, filler = roundtrip((array, b"x" * 100_000))
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert np.array_equal(got, array)
    assert len(filler) == 100_000


def test_an_array_is_mapped_not_copied_and_writable() -> None:
    array = np.arange(1_000_000)
    sent = payload.dumps(array)
    assert sent.fds is not None
    assert os.fstat(sent.fds.numbers[0]).st_size >= array.nbytes
    got = deliver(sent)
    assert mapped() == 1
    assert got.flags.writeable
    assert got.ctypes.data % os.sysconf("SC_PAGESIZE") == 0
    got[0] = 7
    assert array[0] == 0
    del got
    gc.collect()
    assert mapped() == 0


def test_a_read_only_array_arrives_read_only() -> None:
    array = np.arange(100_000)
    array.flags.writeable = False
    assert not roundtrip(array).flags.writeable


def test_writes_of_one_receiver_are_seen_by_no_other() -> None:
    sent = payload.dumps(np.zeros(100_000))
    assert sent.fds is not None
    fd = sent.fds.numbers[0]
    one = payload.loads(sent.body, [os.dup(fd)], True)
    other = payload.loads(sent.body, [os.dup(fd)], True)
    one += 5
    assert other.sum() == 0
    sent.close()


def test_an_array_outlives_everything_else_of_its_payload() -> None:
    first, second = roundtrip((np.full(50_000, 1), np.full(50_000, 2)))
    del first
    gc.collect()
    assert second.sum() == 100_000
    assert mapped() == 1


def test_no_descriptor_stays_open_for_a_mapping() -> None:
    before = len(os.listdir("/proc/self/fd"))
    array = roundtrip(np.arange(100_000))
    # Before 3.13 the mmap object keeps a duplicate of its own, as long as an array is left.
    assert len(os.listdir("/proc/self/fd")) - before == (0 if sys.version_info >= (3, 13) else 1)
    assert array[5] == 5


def test_who_keeps_many_arrays_keeps_few_descriptors() -> None:
    before = set(open_descriptors())
    kept = [roundtrip(np.full(2 * SPILL_BYTES, number, np.uint8)) for number in range(100)]
    assert len(set(open_descriptors()) - before) <= 16
    assert [int(array[-1]) for array in kept] == list(range(100))
    for array in kept:
        np.add(array, 1, out=array)
    assert [int(array[0]) for array in kept] == list(range(1, 101))


def test_where_no_descriptor_is_left_for_a_mapping_an_array_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(_spill, "mapped", full)
    array = roundtrip(np.arange(SPILL_BYTES))
    array += 1
    assert array[-1] == SPILL_BYTES
    assert mapped() == 0


def test_many_buffers_and_descriptors_travel_together() -> None:
    """More buffers than one writev takes."""
    arrays = [np.full(1024 + n % 7, n) for n in range(2500)]
    got_arrays, handle, blob = roundtrip((arrays, Fd(0), b"z" * 70_000))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, got_arrays))
    assert blob == b"z" * 70_000
    assert os.path.samestat(os.fstat(handle.fileno()), os.fstat(0))
    handle.close()


def test_picklebuffers_of_any_shape_arrive() -> None:
    view = memoryview(bytearray(range(256)) * 400).cast("B", shape=[400, 256])
    small, large = roundtrip((pickle.PickleBuffer(b"tiny"), pickle.PickleBuffer(view)))
    assert bytes(small) == b"tiny"
    assert bytes(large) == view.tobytes()
    with pytest.raises(errors.NotPicklable, match="non-contiguous"):
        payload.dumps(pickle.PickleBuffer(memoryview(bytes(100))[::2]))


def test_arrays_go_to_another_process_and_back() -> None:
    array = np.random.default_rng(1).random(300_000)
    assert np.array_equal(in_another_process(_double, array), array * 2)


def _double(array: Any) -> Any:
    array *= 2
    return array


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 511, 512, 513, 1024, 1025, 2048, 5000, 20_000]), max_size=12),
    spill_bytes=st.sampled_from([0, 4096, 65536]),
    blob=st.sampled_from([0, 100, 70_000]),
)
def test_any_mix_of_buffers_arrives(sizes: list[int], spill_bytes: int, blob: int) -> None:
    arrays = [np.full(size, number) for number, size in enumerate(sizes)]
    got, extra = roundtrip((arrays, b"b" * blob), spill_bytes=spill_bytes)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, got))
    assert len(extra) == blob


# -- the file --------------------------------------------------------------------------------------------


def test_the_memory_file_is_sealed_close_on_exec_and_not_a_standard_stream() -> None:
    sent = payload.dumps(b"x" * 100_000)
    assert sent.fds is not None
    (fd,) = sent.fds.numbers
    assert fd > 2
    assert not os.get_inheritable(fd)
    assert fcntl.fcntl(fd, 1034) & 6 == 6  # F_GET_SEALS: F_SEAL_SHRINK and F_SEAL_GROW
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 10)
    sent.close()


def test_without_memfd_a_plain_unlinked_file_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDPOOL_WITHOUT", "memfd")
    got = roundtrip([np.arange(100_000), b"x" * 100_000])
    assert got[0].sum() == 4999950000


def _spilled() -> tuple[bytes, int]:
    sent = payload.dumps([np.arange(100_000), np.arange(50_000)])
    assert sent.fds is not None
    return sent.body, sent.fds.detach()[0]


@pytest.mark.parametrize(
    ("pickled", "buffers"),
    [(2**63, 0), (2**64 - 1, 2**64 - 1), (0, 0), (0, 2), (100, 2**61), (10**7, 0), (1, 10**6)],
)
def test_lengths_beyond_the_file_are_refused_before_anything_is_mapped(pickled: int, buffers: int) -> None:
    """They would be SIGBUS."""
    _, fd = _spilled()
    with pytest.raises(errors.NotLoadable, match="a memory file of .* cannot hold"):
        payload.loads(struct.pack("<QQ", pickled, buffers), [fd], True)
    assert mapped() == 0


def test_a_buffer_beyond_the_file_is_refused() -> None:
    body, fd = _spilled()
    pickled, _ = _spill.HEAD.unpack(body)
    table = -(-pickled // 8) * 8
    for length in (2**63, 1_000_000, 400_001):
        os.pwrite(fd, struct.pack("<Q", length), table + 8)
        with pytest.raises(errors.NotLoadable, match="buffers reach to"):
            payload.loads(body, [os.dup(fd)], True)
    os.close(fd)


@pytest.mark.parametrize("body", [b"", b"x", b"x" * 15, b"x" * 17])
def test_a_head_of_the_wrong_size_is_refused(body: bytes) -> None:
    _, fd = _spilled()
    with pytest.raises(errors.NotLoadable, match="the head of a memory file has 16 bytes"):
        payload.loads(body, [fd], True)


def test_a_memory_file_that_did_not_come_is_missed() -> None:
    with pytest.raises(errors.NotLoadable, match="none came with it"):
        payload.loads(_spill.HEAD.pack(1, 0), [], True)


def test_something_else_than_a_file_is_refused() -> None:
    r, w = os.pipe()
    os.close(w)
    with pytest.raises(errors.NotLoadable, match="a memory file of 0 bytes"):
        payload.loads(_spill.HEAD.pack(1, 0), [r], True)


def test_a_failed_load_leaves_no_mapping_behind() -> None:
    class Poison:
        def __setstate__(self, state: object) -> None:
            raise ValueError("no")

        def __getstate__(self) -> object:
            return 1

    with pytest.raises(errors.NotLoadable) as e:
        roundtrip([np.arange(100_000), Poison()])
    gc.collect()
    assert mapped() == 0
    assert "ValueError: no" in str(e.value)


def test_a_full_file_system_is_an_oserror_and_leaks_nothing() -> None:
    """EFBIG through RLIMIT_FSIZE, as ENOSPC needs a full /dev/shm."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"no room for a payload of 1000\d\d\d bytes in memory: File too large"
        ):
            payload.dumps_result([Fd(0), b"x" * 1_000_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def used_file() -> Iterator[None]:
    """A memory file of more than 1 MiB has come back, and is kept."""
    sent = payload.dumps(bytes(1_200_000))
    assert sent.fds is not None
    assert _spill.recycle(sent.fds.numbers.pop(0), sent.mapping)
    yield
    _spill.expire()


@pytest.mark.usefixtures("used_file")
def test_a_file_that_is_used_again_is_copied_to() -> None:
    dice = np.random.default_rng(1)
    for size in (131_000, 80_000, 131_000, 1, 100_000):
        array = dice.random(size)
        sent = payload.dumps((array, [str(size)], array[:5000]), spill_bytes=0)
        assert sent.fds is not None
        mapping, sent.mapping = sent.mapping, None
        assert (mapping is not None) == (size > 60_000)  # of a small one it is not worth it
        number = os.dup(sent.fds.numbers[0])
        one, text, other = deliver(sent)
        assert np.array_equal(one, array)
        assert (text, list(other)) == ([str(size)], list(array[:5000]))
        del one, other
        _spill.recycle(number, mapping)


@pytest.mark.usefixtures("used_file")
def test_what_is_to_be_sealed_gets_a_file_of_its_own() -> None:
    """A child that was forked meanwhile may have a used one mapped; then it cannot be sealed."""
    kept = os.fstat(_spill._kept[0][1]).st_ino
    sent = payload.dumps(bytes(1_200_000), spill_bytes=0, fresh=True)
    assert sent.fds is not None
    assert os.fstat(sent.fds.numbers[0]).st_ino != kept
    sent.close()


@pytest.mark.usefixtures("used_file")
def test_a_forked_child_has_no_file_mapped_to_write_to() -> None:
    sent = payload.dumps(bytes(1_200_000))
    assert sent.mapping is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does without
        pid = os.fork()
    if pid == 0:
        os._exit(mapped(" rw-s "))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mapped(" rw-s ") == 1
    sent.close()
    assert mapped(" rw-s ") == 0


@pytest.mark.usefixtures("used_file")
def test_a_handler_that_raises_while_a_file_is_mapped_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_spill.mmap, "mmap", interrupt)
    with pytest.raises(KeyboardInterrupt):
        payload.dumps(bytes(1_200_000))
    monkeypatch.undo()
    assert not _spill._kept


def test_only_a_few_files_are_mapped_at_a_time() -> None:
    held = []
    for _ in range(6):
        first = payload.dumps(bytes(1 << 20))
        assert first.fds is not None
        assert _spill.recycle(first.fds.numbers.pop(0), first.mapping)
        held.append(payload.dumps(bytes(1 << 20)))
    assert [sent.mapping is not None for sent in held] == [True] * 4 + [False] * 2
    for sent in held:
        sent.close()
    _spill.expire()


@pytest.mark.usefixtures("used_file")
def test_a_file_that_cannot_be_mapped_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(_spill.mmap, "mmap", fail)
    sent = payload.dumps(b"x" * (1 << 20))
    monkeypatch.undo()
    assert sent.mapping is None
    assert deliver(sent) == b"x" * (1 << 20)


def test_a_file_that_others_could_cut_is_not_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDPOOL_WITHOUT", "memfd")
    for _ in range(2):
        sent = payload.dumps(bytes(1 << 20))
        assert sent.fds is not None
        assert sent.mapping is None
        assert _spill.recycle(sent.fds.numbers.pop(0))
    _spill.expire()


def test_short_writes_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: genuine(fd, [views[0][:999]], at))
    got = roundtrip([np.arange(5_000), b"x" * 100_000])
    assert got[0].sum() == 12497500
    assert got[1] == b"x" * 100_000


def test_threads_spill_at_once_without_mixing() -> None:
    wrong: list[int] = []

    def many(number: int) -> None:
        wrong.extend(
            number for _ in range(20) if set(np.unique(roundtrip(np.full(30_000, number)))) != {number}
        )

    threads = [threading.Thread(target=many, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
