"""Processes are found and ended with what descends from them; where there are none, nothing is loaded to find any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fdpool import _children, _trees
from tests.chaos.disorder import room_for


def test_the_end_of_a_worker_that_has_left_nothing_needs_no_psutil() -> None:
    code = (
        "import signal, sys\n"
        "sys.modules['psutil'] = None\n"  # whoever imports it fails
        "from fdpool import _trees\n"
        "strays = _trees.strays('1.token.0.1', set())\n"
        "_trees.signal_all(strays, signal.SIGKILL)\n"
        "print(strays, _trees.kill_descendants())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[] True"


def test_where_nobody_can_look_it_is_not_said_that_nothing_lives(tmp_path: Path) -> None:
    supervisor = _trees.supervisor_mark(1 << 30, "token")
    environment = {**os.environ, _trees.WORKER_MARK: f"{supervisor}0.1"}
    board = os.open(tmp_path, os.O_RDONLY)
    with subprocess.Popen(["sleep", "1000"], env=environment) as program:
        try:
            with room_for(0):
                assert not _trees.kill_marked(supervisor, board, limit_s=0.02)
                with pytest.raises(_trees.CANNOT_LOOK):
                    _trees.strays(f"{supervisor}0.1", set())
                assert not _trees.kill_descendants(limit_s=0.02)
                _children.reap_adopted()
                assert program.poll() is None
            with room_for(1):  # as where a supervisor has kept one back
                assert psutil.Process(program.pid) in _trees.strays(f"{supervisor}0.1", set())
                assert _trees.kill_marked(supervisor, board)
        finally:
            os.close(board)
            program.kill()


def test_what_looks_can_be_loaded_with_one_descriptor() -> None:
    code = (
        "from tests.process_state import open_descriptors\n"
        "import os, resource\n"
        "limit = max(3, *open_descriptors()) + 2\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))\n"
        "taken = []\n"
        "try:\n"
        "    while True:\n"
        "        taken.append(os.dup(0))\n"
        "except OSError:\n"
        "    os.close(taken.pop())\n"
        "from fdpool import _trees\n"
        "print(len(_trees.tree(os.getpid())))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"
