"""`Pool.pipeline`: programs joined by pipes, in one worker (X6)."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fdpool import Pool
from fdpool._pipeline import PipelineFailed, PipelineTimedOut
from fdpool.commands import SpawnError
from tests.conftest import seconds_until_gone, wait_until
from tests.contract.helpers_programs import warm_pool

PIPE = subprocess.PIPE


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with warm_pool(1) as pool:  # one is enough for any number of stages
        yield pool


def test_stages_read_what_the_one_before_writes(pool: Pool, text_file: Path, tmp_path: Path) -> None:
    with open(text_file) as source, open(tmp_path / "out.gz", "wb") as target:
        stages = [["grep", "-v", "5"], ["tr", "a-z", "A-Z"], ["gzip", "-c"]]
        done = pool.pipeline(stages, stdin=source, stdout=target).result()
    assert [stage.returncode for stage in done.stages] == [0, 0, 0]
    assert (done.returncode, done.args) == (0, stages)
    expected = "".join(f"LINE {n}\n" for n in range(10) if n != 5)
    assert gzip.decompress((tmp_path / "out.gz").read_bytes()).decode() == expected


def test_one_stage_is_a_pipeline(pool: Pool) -> None:
    assert pool.pipeline([["cat"]], input=b"x", capture_output=True).result().stdout == b"x"


def test_megabytes_pass_through_many_stages_without_blocking(pool: Pool) -> None:
    data = os.urandom(2 << 20)
    done = pool.pipeline([["cat"]] * 6, input=data, stdout=PIPE).result()
    assert done.stdout == data


def test_a_stage_that_dies_of_sigpipe_is_no_failure_unless_it_is_the_last(pool: Pool) -> None:
    done = pool.pipeline([["yes"], ["head", "-1"]], stdout=PIPE, check=True, text=True).result()
    assert [stage.signal_name for stage in done.stages] == ["SIGPIPE", None]
    assert (done.returncode, done.stdout) == (0, "y\n")
    last = pool.pipeline([["true"], "kill -PIPE $$"]).result()
    assert last.returncode == -signal.SIGPIPE


def test_every_stages_status_is_told_and_one_in_the_middle_fails_the_whole(pool: Pool) -> None:
    stages = ["echo one >&2; echo 1", "cat; echo two >&2; exit 3", ["cat"]]
    done = pool.pipeline(stages, capture_output=True).result()
    assert [stage.returncode for stage in done.stages] == [0, 3, 0]
    assert (done.returncode, done.stdout, done.stderr) == (3, b"1\n", b"one\ntwo\n")
    assert [stage.stderr for stage in done.stages] == [b"one\n", b"two\n", b""]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        pool.pipeline(stages, capture_output=True, check=True).result()
    assert isinstance(caught.value, PipelineFailed)
    assert [stage.returncode for stage in caught.value.completed.stages] == [0, 3, 0]


def test_a_stage_that_cannot_be_started_ends_those_before_it(pool: Pool) -> None:
    begun = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(SpawnError, match="no-such"):
        pool.pipeline([["sleep", "1000"], ["no-such"], ["cat"]], capture_output=True).result()
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= begun


def test_a_deadline_ends_all_stages_and_keeps_what_came_through(pool: Pool) -> None:
    for timeout in (1.0, 5.0, 25.0):  # longer if they had not begun by then
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            pool.pipeline(
                ["echo begun; sleep 1000", ["cat"]], timeout=timeout, grace=0.2, stdout=PIPE
            ).result()
        if caught.value.output:
            break
    assert isinstance(caught.value, PipelineTimedOut)
    assert caught.value.output == b"begun\n"
    assert caught.value.completed.timed_out


def test_cancelling_ends_all_stages(pool: Pool, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    future = pool.pipeline([f"echo $$ >> {pids}; sleep 1000; :", f"echo $$ >> {pids}; cat; :"], grace=0.1)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    processes = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    assert future.cancel()
    seconds_until_gone(processes)


def test_all_stages_write_to_the_one_file_that_is_given_for_stderr(pool: Pool, tmp_path: Path) -> None:
    stages = ["echo one >&2; echo 1", "cat; echo two >&2", "cat; echo three >&2"]
    with open(tmp_path / "errors", "w") as errors:
        done = pool.pipeline(stages, stdout=errors, stderr=errors).result()
    assert [stage.returncode for stage in done.stages] == [0, 0, 0]
    assert sorted((tmp_path / "errors").read_text().split()) == ["1", "one", "three", "two"]


def test_a_file_given_for_every_stage_is_closed_once_they_run(pool: Pool) -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as reader:
        with open(writing, "wb") as errors:
            future = pool.pipeline(
                ["echo one >&2", "cat; echo two >&2; exec 2>&-; sleep 1000"], stderr=errors
            )
        assert reader.read() == b"one\ntwo\n"  # nobody writes any more, though a stage still runs
    assert future.cancel()
    pool.run(["true"]).result()  # by the one worker, once that stage has been ended


def test_stages_share_one_process_group(pool: Pool) -> None:
    show = "cut -d' ' -f5 /proc/$$/stat"
    done = pool.pipeline([f"{show} >&2", f"{show} >&2; cat"], capture_output=True).result()
    first, second = done.stderr.split()
    assert first == second


@pytest.mark.parametrize(
    ("stages", "options", "error"),
    [
        ([], {}, ValueError),
        ("a | b", {}, TypeError),
        ([[]], {}, ValueError),
        ([["cat"]], {"timeout": -1}, ValueError),
        ([["cat"]], {"stdin": 0, "input": b""}, ValueError),
        ([["cat"]], {"stdout": 1, "capture_output": True}, ValueError),
    ],
)
def test_an_impossible_pipeline_is_refused_at_once(
    pool: Pool, stages: Any, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        pool.pipeline(stages, **options)
