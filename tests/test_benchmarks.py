"""The benchmarks run, and say what they are meant to say; not how fast anything is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks import _cpu, _http_load, measures, servers
from tests.benchmarks._measure import ahead_of, at_most
from tests.benchmarks._report import goals_table, table
from tests.benchmarks._results import MeasureResult, SideResult
from tests.modules import run_module

ROOT = Path(__file__).parents[1]


def test_a_quick_run_gives_rounds_and_goals_of_each_side(tmp_path: Path) -> None:
    saved = tmp_path / "figures.json"
    chosen = ("round-trip", "flood", "--quick", "--peers", "ppe,mp")
    done = run_module("tests.benchmarks", *chosen, "--json", str(saved))
    assert done.returncode == 0, done.stderr
    figures = json.loads(saved.read_text())
    assert figures["machine"]["cpus"] == len(os.sched_getaffinity(0))
    assert all(
        f"{len(os.sched_getaffinity(0))} CPUs" in measure["machine"] for measure in figures["measures"]
    )
    assert [measure["name"] for measure in figures["measures"]] == ["round-trip", "flood"]
    for measure in figures["measures"]:
        assert measure["skipped"] == {}
        assert measure["notes"] == {}
        assert {"fdpool", "ppe", "mp"} <= set(measure["sides"]) <= {"fdpool", "ppe", "mp", "kernel"}
        for side in measure["sides"].values():
            assert len(side["values"]) == len(side["cpus"]) == 2
            assert min(side["values"] + side["cpus"]) > 0
    assert (
        0
        < figures["measures"][0]["sides"]["kernel"]["p50"]
        <= figures["measures"][0]["sides"]["kernel"]["p99"]
    )
    assert "fdpool is ahead by" in done.stdout


def test_a_ratio_is_of_one_round_and_a_goal_is_held_against_their_median() -> None:
    result = MeasureResult(
        "x", "X", "x", "µs", 1e6, 1, [ahead_of("ppe", 2), ahead_of("mp", 2), at_most(2)], {}
    )
    result.sides["fdpool"] = SideResult([1e-6, 2e-6, 3e-6])
    result.sides["ppe"] = SideResult([3e-6, 4e-6, 3e-6])
    spread = result.ratio("ppe")
    assert spread is not None
    assert (spread.low, spread.median, spread.high) == (1.5, 2.0, 2.5)
    assert [result.reached(goal)[1] for goal in result.goals] == ["yes", "–", "yes"]
    others = [ahead_of("ppe", 3), ahead_of("ppe", 3.2), at_most(1), at_most(0.8)]
    assert [result.reached(goal)[1] for goal in others] == ["level", "no", "level", "no"]
    assert MeasureResult.from_json(json.loads(json.dumps(result.as_json()))) == result


def test_what_few_rounds_lose_is_not_hidden_by_a_median() -> None:
    def result(mean: bool) -> MeasureResult:
        found = MeasureResult("x", "X", "x", "requests", 1, 1, [at_most(0)], {}, mean=mean)
        found.sides = {
            "fdpool": SideResult([0.4, 0, 0, 0, 0], [0] * 5),
            "gunicorn": SideResult([0, 1], [0] * 2),
        }
        return found

    assert "| fdpool | 0.08 |  | ≤ 0 requests **no** |" in table(result(True))
    assert "| gunicorn | 0.5 |" in table(result(True))
    assert "| 0.08 requests | **no** |" in goals_table([result(True)])
    assert "| 0 requests | yes |" in goals_table([result(False)])
    lost = [measure for measure in measures.every() if measure.unit == "requests"]
    assert lost
    assert all(measure.mean for measure in lost)


def test_the_measures_have_names_of_their_own_and_each_has_fdpool() -> None:
    names = [measure.name for measure in measures.every()]
    assert len(set(names)) == len(names)
    for measure in measures.every():
        assert "fdpool" in measure.sides
        assert {goal.rival for goal in measure.goals} - {None} <= set(measure.sides)


def test_the_cpu_of_a_tree_has_that_of_living_and_of_dead_children() -> None:
    program = "import time\nwhile time.process_time() < 0.05: pass\nprint(flush=True)\ninput()"
    before = _cpu.tree_cpu_s()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        living = _cpu.tree_cpu_s()
        process.communicate(b"\n")
    dead = _cpu.tree_cpu_s()
    assert living - before >= 0.05
    assert dead - before >= 0.05


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(0.5, id="ours"),
        pytest.param(
            1.0, id="wrk", marks=pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not here")
        ),
    ],
)
@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_server_is_loaded_and_what_comes_of_it_is_counted(seconds: float, keep_alive: bool) -> None:
    with servers.serving("fdpool", "asgi") as server:
        begun = time.perf_counter()
        load = _http_load.load(server.address, connections=4, keep_alive=keep_alive, seconds=seconds)
        whole_s = time.perf_counter() - begun  # also what was waited for at the end
    assert load.answered > 4
    assert seconds <= load.seconds < seconds + 5
    assert 0 < load.cpu_s < load.seconds
    assert 4 < len(load.latencies) <= 200
    assert 0 < min(load.latencies) <= max(load.latencies) <= whole_s


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not here")
def test_clients_that_wait_between_requests_send_as_many_as_that_makes() -> None:
    with servers.serving("fdpool", "asgi") as server:
        load = _http_load.load(server.address, connections=4, keep_alive=True, seconds=1.0, pause_ms=10)
    assert (
        4 < load.answered < 4 * 100 * load.seconds * 1.5
    )  # a hundred a second each, where nothing takes time


def test_a_load_that_nobody_answers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="requests were lost"):
        _http_load.load("tcp://127.0.0.1:1", connections=1, keep_alive=True, seconds=0.1)
