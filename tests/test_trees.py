"""Processes are found and ended with what descends from them; where there are none, nothing is loaded to find any."""

from __future__ import annotations

import subprocess
import sys


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
