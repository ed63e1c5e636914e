"""What tests import to annotate fixtures, and to catch what these raise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fdpool import pytest_plugin

ANNOTATED = """
from __future__ import annotations

import pytest

from fdpool.pytest_plugin import LeakCheck, LeakWarning, Listener, ListenerFactory, PoolFactory
from fdpool.pytest_plugin import Serve, Served, ServerDied, Service, Services


@pytest.fixture
def server(serve: Serve, listener: Listener) -> Served:
    return serve(len, listener=listener)


def test_it(server: Served, leak_check: LeakCheck, listener_factory: ListenerFactory) -> None:
    with pytest.raises(ServerDied) as caught:
        server.stop()
    assert caught.value.logs == ""


def test_others(worker_pool_factory: PoolFactory, session_service: Services) -> Service:
    with pytest.warns(LeakWarning):
        return session_service("len", len, max(worker_pool_factory(1).worker_pids()))
"""

#: What fdpool uses inside, and is large to read: none of it is in the types that are checked here.
SKIPPED = """
[mypy]
strict = True
python_version = 3.10
follow_imports = silent

[mypy-asyncio.*,numpy.*,psutil.*]
follow_imports = skip
follow_imports_for_stubs = True
"""


def test_every_public_name_is_there_for_who_runs_it_and_for_who_checks_types(tmp_path: Path) -> None:
    for name in pytest_plugin._HOME_OF:
        assert getattr(pytest_plugin, name).__name__ == name
        assert name in ANNOTATED
    with pytest.raises(AttributeError, match="module 'fdpool.pytest_plugin' has no attribute 'Server'"):
        pytest_plugin.Server  # type: ignore[attr-defined]
    (tmp_path / "annotated.py").write_text(ANNOTATED)
    (tmp_path / "mypy.ini").write_text(SKIPPED)
    arguments = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", os.devnull]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, str(tmp_path / "annotated.py")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
