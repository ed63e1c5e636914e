"""What a worker leaves for those who ask why it died: its Python stacks, and the end of what it wrote to stderr.

The stacks are written by `faulthandler`, from a signal handler in C: at a fault, and when the supervisor asks for
them (`ask`), which works while the interpreter's lock is held or the task waits for ever. They go to a file that the
supervisor made and reads when the worker is dead.
"""

from __future__ import annotations

import faulthandler  # here, and so in the supervisor: each worker would load it for itself, at 0.3 ms
import io
import os
import signal
import sys
from collections.abc import Callable

from ._spawn import BOOT

#: Asks a worker for its stacks. One that programs do not use: the last but one of the real-time signals, as valgrind
#: keeps the last for itself; or SIGINFO, where there are none of these, which does nothing to who does not know it.
ASK_SIGNAL: int | None = (
    signal.SIGRTMAX - 1 if hasattr(signal, "SIGRTMAX") else getattr(signal, "SIGINFO", None)
)

_MOST_BYTES = 32 * 1024

#: The line of a fresh supervisor that calls its loop, in what `_spawn` has the interpreter run.
_BOOT_LINE = f'File "<string>", line {len(BOOT.splitlines())} in <module>'


def write_stacks_to(fd: int) -> None:
    """Runs in: a worker. Write the stacks of all threads to `fd` at a fault (SIGSEGV and its like), or when asked.

    The last call counts. `fd` is kept: it must stay open.
    """
    # A fork of a program that has it on would take it to be on here; but handlers are reset in a fork (`_spawn`).
    faulthandler.disable()
    faulthandler.enable(fd)
    if ASK_SIGNAL is not None:
        faulthandler.register(ASK_SIGNAL, fd, all_threads=True, chain=False)


def ask(pid: int) -> bool:
    """Runs in: the supervisor. Ask a worker, which must be an unreaped child, for its stacks; False if it cannot be."""
    if ASK_SIGNAL is None:
        return False
    try:
        os.kill(pid, ASK_SIGNAL)
    except OSError:
        return False
    return True


def read_stacks(fd: int) -> str:
    """What was written to `fd`, without the lines that are the worker's own loop."""
    text = os.pread(fd, _MOST_BYTES, 0).decode("utf-8", "replace")
    return "\n".join(line for line in text.splitlines() if not _is_ours(line))


def without_ours(stacks: str) -> str:
    """Stacks without the threads that do nothing but wait in this package, and elsewhere without its frames.

    Whoever reads them looks for a place in their own code. A main thread that is in none of that stays whole.
    """
    kept = []
    for thread in stacks.split("\n\n"):
        head, *frames = thread.splitlines() or [""]
        if head.startswith("Thread ") and frames and _is_ours(frames[0]):
            continue
        theirs = [frame for frame in frames if not _is_ours(frame)]
        kept.append("\n".join([head, *(theirs or frames)]))
    return "\n\n".join(kept)


def _is_ours(line: str) -> bool:
    at = line.lstrip()
    return at.startswith(f'File "{os.path.dirname(__file__)}{os.sep}') or at == _BOOT_LINE


class _Overheard(io.FileIO):
    """The descriptor of stderr, with somebody who hears what Python writes to it, where `pid` is this process."""

    hear: Callable[[bytes], None]
    pid = 0  # not in a child that a task forked

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        written = super().write(data)
        if written and os.getpid() == self.pid:
            self.hear(bytes(memoryview(data)[:written]))
        return written


_stderr: io.TextIOWrapper | None = None  # as `make_audible` has made it
_overheard: _Overheard | None = None
#: What was `sys.stderr` before, and what was made of it: one that is collected closes what is below it, by which others
#: may write.
_kept: list[io.TextIOWrapper] = []


def make_audible() -> None:
    """Make of `sys.stderr` what can be overheard; a worker that did so for itself would copy 35 pages: 0.15 ms.

    Not what libraries in C or programs write: their stderr is the client's, and nobody is put in between.
    """
    global _stderr, _overheard
    stream = sys.stderr
    if stream is _stderr:
        return
    try:
        usual = isinstance(stream, io.TextIOWrapper) and stream.fileno() == 2
    except (OSError, ValueError):
        return
    if usual and isinstance(stream, io.TextIOWrapper):
        _overheard = _Overheard(2, "w", closefd=False)
        _overheard.name = "<stderr>"
        raw: io.FileIO = _overheard
        sys.stderr = _stderr = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),
            stream.encoding,
            stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        _kept.extend((stream, _stderr))


def overhear_stderr(hear: Callable[[bytes], None]) -> None:
    """Runs in: a worker. Call `hear` with what Python code writes to stderr from now on, as it is written."""
    make_audible()  # what was preloaded may have put another stream there
    if _overheard is not None:
        _overheard.hear, _overheard.pid = hear, os.getpid()
