"""A short form of `python -m tests.fuzz`: the decoders by Hypothesis, which shrinks what fails; live ones by seed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fdpool
from fdpool import _leftovers, _messages
from fdpool._answers import open_answer
from fdpool.errors import FdTransferError, WireError

from .fuzz import targets
from .fuzz.__main__ import FromBytes, fuzz
from .modules import run_module


@pytest.fixture(scope="module")
def header() -> Iterator[targets.Target]:
    with targets.Header() as target:
        yield target


@settings(deadline=None, max_examples=300)
@given(dice=st.randoms(use_true_random=False))
def test_a_header_is_read_as_it_was_packed_or_refused(header: targets.Target, dice: random.Random) -> None:
    """T14, T18."""
    header.feed(dice)


@settings(deadline=None, max_examples=100)
@given(dice=st.randoms(use_true_random=False))
def test_a_session_ends_once_whatever_its_client_says(header: targets.Target, dice: random.Random) -> None:
    targets.Session().feed(dice)


def test_bytes_can_be_the_dice() -> None:
    """For a fuzzer that is guided by coverage (`--atheris`); zeros follow their end."""
    dice = FromBytes(bytes(range(64)))
    assert {dice.randrange(7) for _ in range(100)} <= set(range(7))
    assert FromBytes(b"").random() == 0.0
    targets.Session().feed(FromBytes(b"\xff" * 40))


def test_coverage_guides_the_inputs_where_atheris_is_there() -> None:
    pytest.importorskip("atheris")
    done = run_module("tests.fuzz", "--atheris", "--target", "session", "--inputs", "5000")
    assert done.returncode == 0, done.stderr
    assert "Done 5000 runs" in done.stderr
    covered = [int(count) for count in re.findall(r"cov: (\d+)", done.stderr)]
    assert covered[-1] > covered[0], "of fdpool nothing is instrumented"


@pytest.mark.parametrize(
    ("kind", "count"),
    [(targets.Stream, 1500), (targets.Worker, 2500), (targets.Client, 4000), (targets.Exec, 300)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_fed_garbage_goes_on_and_loses_no_descriptor(kind: type[targets.Target], count: int) -> None:
    """T13, T14, T15, T18, T24: a stream's reader, a worker, a client and an `ExecServer`."""
    fuzz(kind, count, seed=20)


# -- found by it ------------------------------------------------------------------------------------------


def test_a_refusal_that_is_cut_is_an_error_of_its_task() -> None:
    for body in (b"", b"\1", b"\2\0\1\0\xff\xfe"):
        header = _messages.unpack_header(_messages.pack_header(_messages.REFUSED, 1, len(body)) + body)
        result, error = open_answer(header, body, [])
        assert result is None
        assert isinstance(error, FdTransferError)


def test_messages_in_one_datagram_that_do_not_add_up_are_refused_whole() -> None:
    """T18: a length of 2**32 - 1 is held against what is there, and nothing is allocated for it."""
    good = _messages.pack_header(_messages.TASK, 1, 3) + b"abc"
    lying = _messages._HEADER.pack(_messages.VERSION, _messages.TASK, 0, 0, 0, 2**32 - 1, 2)
    assert [body for _, _, body in _messages.split(good + good, 0)] == [b"abc", b"abc"]
    for data in (good + good[:-1], good + good[:5], good + lying):
        with pytest.raises(WireError):
            _messages.split(data, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        _messages.SPAN.pack(0, 2)[:5],
        _messages.SPAN.pack(0, 2) + pickle.dumps((abs, 3, False)),
        _messages.SPAN.pack(2, 1) + pickle.dumps((abs, [1, 2], False)),
        _messages.SPAN.pack(0, 2**32 - 1) + pickle.dumps((abs, [1, 2], False)),
    ],
)
def test_a_chunk_that_is_none_does_not_end_its_worker(body: bytes) -> None:
    with fdpool.Pool(1) as pool:
        before = pool.submit(os.getpid).result()
        data = _messages.pack_header(_messages.CHUNK, 10**12, len(body)) + body
        targets.send(pool._client.links[0].mine, data, 0, 0)
        assert pool.submit(os.getpid).result() == before


def test_a_worker_that_returns_a_task_that_it_runs_is_not_believed() -> None:
    """The board knows better: the task would be run twice, or, with descriptors, be lost."""
    with fdpool.Pool(1) as pool, targets.Client() as target:
        assert isinstance(target, targets.Client)
        client = target.pool._client
        target._hold(chunk=False)
        [task] = client.tasks
        targets.wait_until(lambda: client.board is not None and client.board.begun(0) == task)
        returned = _messages.pack_header(_messages.RETURNED, task)
        data = _messages.pack_header(_messages.ANSWERS, 0, len(returned)) + returned
        targets.send(target.link.theirs, data, 0, 0)
        held: Any = target.held
        target._release()
        assert held.result(20) == 0
        assert pool.submit(os.getpid).result() > 0


def test_news_of_a_failed_boot_from_a_worker_that_is_ready_are_passed_over() -> None:
    """Such a datagram can only be a stray one: of a child that a task has forked, say."""
    with fdpool.Pool(1) as pool:
        assert pool.submit(os.getpid).result() > 0
        body = pickle.dumps(("ValueError", "", [], "", None, None))
        data = _messages.pack_header(_messages.BOOT_FAILED, 0, len(body)) + body
        targets.send(pool._client.links[0].theirs, data, 0, 0)
        assert pool.submit(os.getpid).result() > 0


# -- what a child that a task has forked could send, or who was handed the wrong descriptor ----------------


def stray(pool: fdpool.Pool, kind: int, body: bytes) -> None:
    """Send a message to the client that its worker has no reason to send."""
    targets.send(pool._client.links[0].theirs, _messages.pack_header(kind, 0, len(body)) + body, 0, 0)


def left(**fields: Any) -> bytes:
    """The body of a LEFT message, in which some fields are other than usual."""
    usual = {"task": "x", "tasks": 1, "descriptors": [1, ["3: x"]], "threads": [0, []], "children": [0, []]}
    return json.dumps([*{**usual, **fields}.values(), ""]).encode()


class Tells:
    """Loaded from a pickle, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_log_record_that_nobody_has_asked_for_is_dropped_unread(tmp_path: Path) -> None:
    with fdpool.Pool(1) as pool:
        assert pool.submit(os.getpid).result() > 0
        stray(pool, _messages.LOG, pickle.dumps(Tells(tmp_path / "read")))
        stray(pool, _messages.LEFT, left())
        targets.wait_until(lambda: pool.stats().left.descriptors)  # what comes later is told later
        assert pool.stats().strays == 1
    assert list(tmp_path.iterdir()) == []


def test_of_what_is_said_to_be_left_only_the_number_can_be_large() -> None:
    tracemalloc.start()
    try:
        decoded = _leftovers.decode(left(descriptors=[10**7, ["3: x"] * 10]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert decoded.describe().startswith("x left 10000000 descriptors (3: x, 3: x, 3: x, 3: x, 3: x, ...) in")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_says_in_no_form_of_ours_what_was_left_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    bodies = [
        b"",
        b"[",
        b"[" * 60_000,
        b"{}",
        b"[1, 2, 3, 4, 5, 6]",
        left(task=3),
        left(tasks="1"),
        left(tasks=10**300),
        *(
            left(threads=wrong)
            for wrong in (
                None,
                [1],
                [1, "x"],
                [1, [1]],
                [1, []],
                [0, ["x"]],
                ["1", ["x"]],
                [True, ["x"]],
                [1.0, ["x"]],
                [-1, []],
                [10**300, ["x"] * 10],
            )
        ),
    ]
    for body in bodies:
        with pytest.raises(ValueError, match=r"."):
            _leftovers.decode(body)
    with fdpool.Pool(1) as pool:
        assert pool.submit(os.getpid).result() > 0
        for body in bodies:
            stray(pool, _messages.LEFT, body)
        stray(pool, _messages.LEFT, left())
        targets.wait_until(lambda: pool.stats().left.descriptors)
        assert len(pool.stats().left.latest) == 1
        assert pool.stats().strays == len(bodies)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_news_that_a_worker_goes_are_passed_over_where_it_does_not(tmp_path: Path) -> None:
    """It was given nothing more, and ended five seconds later, with what it ran."""
    gate = tmp_path / "gate"
    with fdpool.Pool(1) as pool:
        future = pool.submit(targets.wait_until, gate.exists)
        targets.wait_until(future.running)
        stray(pool, _messages.GOING, b"")
        stray(pool, _messages.LEFT, left())  # once that is told, what came before has been heeded or not
        targets.wait_until(lambda: pool.stats().left.descriptors)
        stats = pool.stats()
        gate.touch()
        future.result(20)
    assert [worker.state for worker in stats.workers] == ["ready"]
    assert stats.recycled == 0
    assert stats.strays == 1
