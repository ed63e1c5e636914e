"""`_children`: what fdpool has started is told from what it has not (S12)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fdpool

# In a process of its own: here it would reap what other tests have started.
PROGRAM = """
import os
from fdpool import _children

def exits(code):
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    return pid

def is_there(pid):
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid

own, stranger = is_there(_children.start(lambda: exits(7))), is_there(exits(8))
alive = _children.start(lambda: os.posix_spawn("/bin/sleep", ["sleep", "600"], {}))
strange_and_alive = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
_children.reap_adopted()

try:
    os.waitpid(stranger, os.WNOHANG)
except ChildProcessError:
    print("the stranger was reaped")
print("own", os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]))
_children.forget(own)
for pid in alive, strange_and_alive:
    os.kill(pid, 9)
    print("lived", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

# A forked child owns nothing, and may start what it likes, also in the midst of a start.
def forks():
    pid = os.fork()
    if pid == 0:
        is_there(exits(7))
        _children.start(lambda: is_there(exits(8)))
        _children.reap_adopted()
        status = os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1])
        os._exit(status)
    return pid

print("left", os.waitstatus_to_exitcode(os.waitpid(_children.start(forks), 0)[1]))
"""


def test_the_dead_that_it_has_not_started_are_reaped_and_no_other() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(Path(fdpool.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "the stranger was reaped",
        "own 7",
        "lived -9",
        "lived -9",
        "left 8",
    ], done.stderr
