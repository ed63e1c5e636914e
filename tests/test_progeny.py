"""`_progeny`: a program that has been reaped is never signalled (X7)."""

from __future__ import annotations

import os
import signal

import pytest

from fdpool._progeny import Progeny


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
