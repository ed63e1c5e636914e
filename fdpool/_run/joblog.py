"""The log of `--joblog`: one line for each job that has ended, and what `--resume` learns from it.

The columns are those of GNU parallel's, one more (Attempts) before the last. The last one tells a job from
all others: it is the line that `--dry-run` prints, with the file and the outputs in it, escaped so that it
is one line of printable UTF-8.
"""

import fcntl
import os
import re
import stat
from collections import Counter
from typing import NamedTuple

from .output import USAGE, Fatal, shown

_COLUMNS = (
    "Seq",
    "Host",
    "Starttime",
    "JobRuntime",
    "Send",
    "Receive",
    "Exitval",
    "Signal",
    "Attempts",
    "Command",
)
_HEADER = "\t".join(_COLUMNS).encode() + b"\n"
_NUMBER = rb"-?[0-9]+(?:\.[0-9]+)?"
_LINE = re.compile(rb"\d+\t:\t" + rb"\t".join([_NUMBER] * 4) + rb"\t(-?\d+)\t(\d+)\t\d+\t(.*)")
_BLOCK_BYTES = 1 << 20

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


class Entry(NamedTuple):
    """One line. `exit_code` is -1 for a program that has none: a signal ended it, or it never ran."""

    seq: int
    start: float
    wall_s: float
    sent: int
    received: int
    exit_code: int
    signal: int
    attempts: int
    command: bytes


class Done:
    """The jobs that a log says have succeeded, by their commands.

    A command that is there more than once counts so often; one that failed after a success is to run again.
    """

    def __init__(self) -> None:
        self._count: Counter[bytes] = Counter()

    def learn(self, command: bytes, succeeded: bool) -> None:
        """What a line says of the (escaped) command."""
        if succeeded:
            self._count[command] += 1
        elif self._count[command]:
            self._count[command] -= 1

    def take(self, command: bytes) -> bool:
        """True if this job has succeeded; to be asked once for each job."""
        escaped = escape(command) if self._count else b""
        done = self._count[escaped] > 0
        if done:
            self._count[escaped] -= 1
        return done


def read_done(path: bytes) -> Done:
    """What a log says, without touching it; a missing one says nothing.

    Raises:
        Fatal: it cannot be read, or is not one of ours.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return Done()
    except OSError as error:
        raise Fatal(f"cannot open the log {shown(path)}: {error.strerror}", USAGE) from error
    try:
        return _read(fd, shown(path))[0]
    except OSError as error:
        raise Fatal(f"cannot use the log {shown(path)}: {error.strerror}", USAGE) from error
    finally:
        os.close(fd)


def _read(fd: int, name: str) -> tuple[Done, int]:
    """What the log says, and how many bytes its whole lines take."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Fatal(f"cannot resume from {name}: it is not a regular file", USAGE)
    done = Done()
    with open(fd, "rb", buffering=_BLOCK_BYTES, closefd=False) as file:
        head = file.readline(len(_HEADER))
        if head != _HEADER:
            if _HEADER.startswith(head):
                return done, 0
            raise Fatal(f"{name} is no log of fdpool run: its first line is another", USAGE)
        whole = len(head)
        for number, line in enumerate(file, 2):
            if not line.endswith(b"\n"):
                break  # a crash has torn it
            whole += len(line)
            found = _LINE.fullmatch(line[:-1])
            if found is None:
                raise Fatal(f"line {number} of the log {name} is not as fdpool run writes it", USAGE)
            done.learn(found[3], succeeded=(found[1], found[2]) == (b"0", b"0"))
    return done, whole


def _is_fifo(path: bytes) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


class Joblog:
    """A log that is open; nobody else writes to it meanwhile.

    Args:
        path: of the file, made if there is none; lines are appended. A FIFO is waited for until somebody reads it.
        resume: learn from the lines that are there.

    Attributes:
        done: what has succeeded already; nothing without `resume`.

    Raises:
        Fatal: it cannot be used, and why.
    """

    def __init__(self, path: bytes, resume: bool) -> None:
        self._shown = shown(path)
        self.done = Done()
        try:
            # Of a FIFO one end alone: with the other here, too, a write would wait for room after its reader has gone.
            access = os.O_WRONLY if _is_fifo(path) and not resume else os.O_RDWR  # that is refused below
            self._fd = os.open(path, access | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
        except OSError as error:
            raise Fatal(f"cannot open the log {self._shown}: {error.strerror}", USAGE) from error
        try:
            self._take_up(resume)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise Fatal(f"cannot write to the log {self._shown}: {error.strerror}", USAGE) from error

    def _take_up(self, resume: bool) -> None:
        if not resume and not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self._append(_HEADER)  # a pipe, say: somebody follows
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fatal(f"another run is writing to the log {self._shown}", USAGE) from None
        done, whole = _read(self._fd, self._shown)
        if resume:
            self.done = done
        if os.fstat(self._fd).st_size > whole:
            os.ftruncate(self._fd, whole)  # what a crash has torn
        if whole == 0:
            self._append(_HEADER)

    def write(self, entry: Entry) -> None:
        """Append a line, in one system call.

        Raises:
            Fatal: it cannot be written.
        """
        numbers = (
            f"{entry.seq}\t:\t{entry.start:.3f}\t{entry.wall_s:.3f}\t{entry.sent}\t{entry.received}"
            f"\t{entry.exit_code}\t{entry.signal}\t{entry.attempts}\t"
        )
        try:
            self._append(numbers.encode() + escape(entry.command) + b"\n")
        except OSError as error:
            raise Fatal(f"cannot write to the log {self._shown}: {error.strerror}") from error

    def _append(self, line: bytes) -> None:
        while line:  # a disk that fills up takes a part first
            line = line[os.write(self._fd, line) :]

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def escape(text: bytes) -> bytes:
    """One line of printable UTF-8, from which the text can be had back: `\\\\`, `\\t`, `\\n`, `\\r`, `\\xNN`."""
    escaped = []
    for c in text.decode("utf-8", "surrogateescape"):
        if c in _ESCAPES:
            escaped.append(_ESCAPES[c])
        elif c.isprintable():
            escaped.append(c)
        else:
            escaped += [f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogateescape")]
    return "".join(escaped).encode()
