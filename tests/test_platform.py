"""`_platform`: what the kernel tells of this process's children."""

from __future__ import annotations

import os

from fdpool import _platform


def test_a_child_is_one_until_it_is_reaped() -> None:
    before = _platform.child_pids()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert _platform.has_children()
        assert before is None or _platform.child_pids() == {*before, pid}
    finally:
        os.waitpid(pid, 0)
    assert _platform.child_pids() == before
