"""`fds`: waiting for one descriptor, whatever the time; and numbers above the standard streams."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fdpool import fds


def test_a_wait_may_be_longer_than_the_kernel_can_be_asked_for() -> None:
    """As poll(2) counts milliseconds in an int: 24 days."""
    reading, writing = os.pipe()
    os.close(writing)
    assert fds.is_readable(reading, 3e7)
    os.close(reading)


def test_a_wait_in_parts_ends_with_the_last_of_them_or_with_what_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fds, "LONGEST_POLL_S", 0.001)
    reading, writing = os.pipe()
    assert not fds.is_readable(reading, 0.0105)
    os.close(writing)
    assert fds.is_readable(reading, float("inf"))
    os.close(reading)


# -- closed standard streams -------------------------------------------------------------------------------

# Another thread has a number for a moment, and lets go of it just before what is looked at takes the lowest free one.
_LETS_GO = """
import mmap, os, select, selectors, sys
from fdpool import _board
from fdpool._server import progress, turns

def lets_go(real):
    def call(*args, **options):
        for number in passing:
            os.close(number)
        passing.clear()
        return real(*args, **options)
    return staticmethod(call)

def numbers():
    return {number for number in range(100) if os.path.exists(f"/proc/self/fd/{number}")}

mmap.mmap = lets_go(mmap.mmap)
selectors.EpollSelector._selector_cls = lets_go(select.epoll)
os.close(0), os.close(2)
sys.stderr = sys.stdout
passing = []
before = numbers() - {0, 2}
for make in (lambda: _board.Board(1), progress.SeenPage, turns.Turns):
    for number in (0, 2):
        if number == 2:
            held = os.dup(1)
        passing.append(os.dup(1))
        assert passing == [number]
        made = make()
        if number == 2:
            os.close(held)
        assert not numbers() & {0, 2}, (make, number)
        made.close()
        assert numbers() == before, (make, number)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="epoll(7), proc(5)")
def test_what_another_thread_lets_go_of_meanwhile_is_not_taken_for_good() -> None:
    """R2: a mapping's duplicate, or an epoll instance, would stay there: a `print` would write into it."""
    program = [sys.executable, "-c", _LETS_GO]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_number_that_cannot_be_moved_for_want_of_another_is_closed() -> None:
    script = """
import os, resource
from fdpool import fds
os.close(0)
fd = os.dup(1)
assert fd == 0
resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    fds.above_stdio(fd)
except OSError:
    assert os.dup(1) == 0
else:
    raise AssertionError("it was moved")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
