"""`_progeny`: a program that has been reaped is never signalled (X7), and none of its descendants is passed over."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from fdpool import _platform, _trees
from fdpool._progeny import Progeny
from tests.chaos.disorder import room_for
from tests.process_state import wait_until


def test_nothing_is_sent_to_a_program_that_has_been_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    progeny = Progeny()
    try:
        pid = os.posix_spawn("/bin/true", ["true"], {}, setpgroup=0)
        progeny.add(pid, leads_group=True)
        assert progeny.reap(pid) is not None
        sent: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
        monkeypatch.setattr(os, "killpg", lambda *arguments: sent.append(arguments))
        progeny.signal(signal.SIGKILL)
        assert progeny.signal_one(pid, signal.SIGKILL, group=True) is False
        assert sent == []
    finally:
        progeny.close()


@pytest.mark.skipif(not _platform.has("subreaper"), reason="orphans are init's here")
def test_who_loses_its_parent_as_one_looks_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither below that one any more, nor was it a child of ours when these were listed."""
    read, write = os.pipe()
    progeny = Progeny()
    left: list[psutil.Process] = []
    descendants = _trees.descendants

    def descendants_of_who_dies(pid: int) -> list[psutil.Process]:
        if pid == program and child.is_running():
            child.kill()
            wait_until(lambda: grandchild.ppid() == os.getpid())
        return descendants(pid)

    try:
        script = "sh -c 'sleep 1000 & echo $$ $!; wait'; exec sleep 1000"
        program = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", script],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
            setpgroup=0,
        )
        progeny.add(program, leads_group=True)
        os.close(write)
        with open(read) as said:
            child, grandchild = map(psutil.Process, map(int, said.readline().split()))
        left.append(grandchild)
        monkeypatch.setattr(_trees, "descendants", descendants_of_who_dies)
        assert grandchild in progeny.others()
    finally:
        os.killpg(program, signal.SIGKILL)
        for process in left:
            process.kill()
            os.waitpid(process.pid, 0)
        progeny.reap(program)
        progeny.close()


def test_where_nobody_can_look_groups_are_signalled_and_there_may_be_others() -> None:
    progeny = Progeny()
    try:
        pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}, setpgroup=0)
        progeny.add(pid, leads_group=True)
        with room_for(0):
            assert progeny.has_others
            progeny.signal(signal.SIGKILL)
        ended = progeny.reap(pid)
        assert ended is not None
        assert os.WTERMSIG(ended[0]) == signal.SIGKILL
        assert not progeny.has_others
    finally:
        progeny.close()
