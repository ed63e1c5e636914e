"""How many processors a process may use, read from made-up control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fdpool._cpus import usable_cpus


def cgroup(tmp_path: Path, membership: str, files: dict[str, str]) -> int:
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "membership").write_text(membership)
    return usable_cpus(str(tmp_path / "fs"), str(tmp_path / "membership"))


@pytest.fixture(autouse=True)
def sixteen_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 16, raising=False)


def test_without_a_quota_the_affinity_counts(tmp_path: Path) -> None:
    assert cgroup(tmp_path, "", {}) == 16
    assert cgroup(tmp_path, "0::/a\n", {"a/cpu.max": "max 100000\n"}) == 16


def test_a_quota_of_version_2_is_a_limit_and_a_fraction_counts_as_one_more(tmp_path: Path) -> None:
    assert cgroup(tmp_path, "0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}) == 4
    assert cgroup(tmp_path, "0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}) == 2
    assert cgroup(tmp_path, "0::/a/b\n", {"a/b/cpu.max": "5000 100000\n"}) == 1


def test_the_parents_quota_binds_its_children(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}
    assert cgroup(tmp_path, "0::/a/b\n", files) == 3


def test_a_quota_of_version_1_is_a_limit(tmp_path: Path) -> None:
    files = {"cpu/job/cpu.cfs_quota_us": "200000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}
    assert cgroup(tmp_path, "4:cpu,cpuacct:/job\n1:name=systemd:/\n", files) == 2
    files["cpu/job/cpu.cfs_quota_us"] = "-1\n"
    assert cgroup(tmp_path, "4:cpu,cpuacct:/job\n", files) == 16
