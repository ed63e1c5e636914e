"""The command line: `fdpool run` runs a program on many files, each opened here and handed to a worker.

One thread, one loop: names come from the arguments or, as they are written, from standard input; programs
are started in that order, a bounded number ahead; and what each wrote is printed in the same order. A
program writes into two unnamed temporary files of ours, so its output may be as large as the disk allows.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
from collections import deque
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from . import __version__, cli_exec, commands
from ._broken import PoolBroken, describe_status
from ._cpus import usable_cpus
from ._links import Waker
from .errors import FdpoolError
from .pool import Pool

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from concurrent.futures import Future

_SEPARATOR = ":::"
_OK, _FAILED, _USAGE, _INTERRUPTED = 0, 1, 2, 130  # 130: 128 + SIGINT, as shells have it

# What a pool costs of our descriptors: the control link, the pump and what an import or a fork needs for a
# moment; then for each worker its two sockets and its pidfd; then for each file on its way the two of its
# output and, until it is sent, three duplicates.
_FDS_OF_POOL, _FDS_OF_WORKER, _FDS_OF_JOB = 16, 3, 5

_BLOCK_BYTES = 256 * 1024

_DESCRIPTION = """\
Open each FILE, and run PROGRAM on it as standard input, several at a time. What
a program prints is shown whole, file by file, in the order of the files. In an
argument, {} stands for the file's name. Without ':::' the names are read from
standard input, one a line, and programs start as the names come.
"""
_EPILOG = """\
exit status:
  0 if every program succeeded, 1 if a file could not be opened or a program
  failed, 2 for bad usage, 130 after Ctrl-C (which stops everything at once)

examples:
  fdpool run wc -l ::: *.txt
  fdpool run sh -c 'gzip -9 > "$1.gz"' sh {} ::: *.log
  find . -name '*.c' -print0 | fdpool run -0 -j 4 grep -c TODO
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["exec"]:
        return cli_exec.main(given[1:])
    _fill_standard_descriptors()
    names: list[str] | None = None
    if _SEPARATOR in given:
        cut = given.index(_SEPARATOR)
        given, names = given[:cut], given[cut + 1 :]
    ours, program = _split(given)
    parser, run_parser = _parsers()
    options = parser.parse_args(ours)
    if options.jobs is not None and options.jobs < 1:
        run_parser.error(f"-j must be at least 1, not {options.jobs}")
    if not program:
        run_parser.error("no PROGRAM given")
    if names is not None and options.null:
        run_parser.error(f"-0 is for names from standard input, and {_SEPARATOR} gives them already")
    if "{}" not in program[0] and shutil.which(program[0]) is None:
        run_parser.error(_why_not_runnable(program[0]))
    return _run_all(
        [os.fsencode(argument) for argument in program],
        _Names(names, b"\0" if options.null else b"\n"),
        options.jobs,
    )


# -- arguments -----------------------------------------------------------------------------------


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    about = "A process pool whose tasks carry open files."
    parser = argparse.ArgumentParser(prog="fdpool", description=about)
    parser.add_argument("--version", action="version", version=f"fdpool {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    run = verbs.add_parser(
        "run",
        help="run a program on many files, each handed over as its standard input",
        usage="fdpool run [-j N] PROGRAM [ARG ...] ::: FILE ...\n"
        "       fdpool run [-j N] [-0] PROGRAM [ARG ...]  < names",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs.add_parser("exec", help="run a command here, or have it run outside", add_help=False)
    each = "programs at a time (default: one for each usable processor)"
    run.add_argument("-j", "--jobs", type=int, metavar="N", help=each)
    run.add_argument("-0", "--null", action="store_true", help="names on standard input end with NUL")
    return parser, run


def _split(given: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the program's, which argparse must not see: its options may look like ours."""
    if given[:1] != ["run"]:
        return given, []
    end = 1
    while end < len(given) and given[end].startswith("-"):
        if given[end] == "--":
            return given[:end], given[end + 1 :]
        end += 2 if given[end] in ("-j", "--jobs") else 1
    return given[:end], given[end:]


def _why_not_runnable(program: str) -> str:
    name = _shown(os.fsencode(program))
    if os.path.isdir(program) and os.path.dirname(program):
        return f"cannot run {name}: it is a directory"
    if os.path.exists(program) and os.path.dirname(program):
        return f"cannot run {name}: it is not executable"
    return f"cannot find the program {name}"


def _fill_standard_descriptors() -> None:
    """Occupy what is closed of 0, 1 and 2, or the first files opened would be taken for them.

    Opened the wrong way round, so that reading or writing there still fails (as GNU's programs do it).
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        if not _is_open(fd):
            os.open(os.devnull, flags)  # gets the lowest number that is free, which is this one
            os.set_inheritable(fd, True)
    for name in ("stdout", "stderr"):  # for argparse, which prints to them
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())


# -- names ---------------------------------------------------------------------------------------


class _Names:
    """The names of the files: given, or read from standard input as they come.

    Attributes:
        ready: names to be used next.
        ended: no more will come than are ready.
        total: how many there are, or None if nobody knows yet.
    """

    def __init__(self, given: list[str] | None, separator: bytes) -> None:
        self.ready = deque(os.fsencode(name) for name in given or ())
        self.ended = given is not None
        self.total = None if given is None else len(given)
        self._separator = separator
        self._rest = b""
        if given is None and os.isatty(0):
            _complain("reading names of files from the terminal, one a line; Ctrl-D ends them")

    def read(self) -> None:
        """Take what standard input has now; waits if that is nothing.

        Raises:
            OSError: it cannot be read.
        """
        try:
            block = os.read(0, _BLOCK_BYTES)
        except BlockingIOError:
            return
        *whole, self._rest = (self._rest + block).split(self._separator)
        if not block:
            self.ended = True
            whole = [self._rest]
        self.ready.extend(name for name in whole if name)


# -- running -------------------------------------------------------------------------------------


class _Fatal(Exception):
    """What ends the whole run, and the exit status that it ends with."""

    def __init__(self, message: str, status: int = _FAILED) -> None:
        super().__init__(message)
        self.status = status


def _run_all(program: list[bytes], names: _Names, jobs: int | None) -> int:
    """Run the program on every file; returns the exit status."""
    workers, ahead = _affordable(jobs)
    pool = Pool(workers)
    run = _Run(pool, program, names, ahead)
    try:
        status = _FAILED if run.until_done() else _OK
        pool.shutdown()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not disturb the clearing up
        status = _INTERRUPTED
    except BrokenPipeError:
        status = _FAILED  # whoever read our output has gone, as `| head` does: nobody is left to be told
    except _Fatal as error:
        _complain(str(error))
        status = error.status
    pool.kill_workers()  # of a pool that has been shut down there are none
    pool.shutdown()
    run.close()
    return status


def _affordable(wanted: int | None) -> tuple[int, int]:
    """How many workers, and how many files on their way at a time, our limit of descriptors allows."""
    workers = wanted or usable_cpus()
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return workers, 4 * workers + 16
    try:
        taken = len(os.listdir("/dev/fd"))
    except OSError:
        taken = 8
    free = limit - taken - _FDS_OF_POOL
    most = max(1, free // (_FDS_OF_WORKER + _FDS_OF_JOB))
    if wanted is not None and wanted > most:
        _complain(f"running {most} at a time: the limit of {limit} open files does not allow for -j {wanted}")
    workers = min(workers, most)
    ahead = (free - _FDS_OF_WORKER * workers) // _FDS_OF_JOB
    # A few more than can run, so that workers are busy behind a slow file.
    return workers, max(1, min(ahead, 4 * workers + 16))


class _Job:
    """One file on its way.

    Attributes:
        problem: why no program was started on it, or None.
        future: of the program, unless there is a problem.
        ended: there is nothing more to wait for.
        streams: what the program writes to its standard output and standard error.
    """

    __slots__ = ("ended", "future", "name", "problem", "streams")

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.ended = False
        self.problem: str | None = None
        self.future: Future[subprocess.CompletedProcess[Any]] | None = None
        self.streams: list[IO[bytes]] = []

    def close(self) -> None:
        """Drop what it wrote."""
        while self.streams:
            self.streams.pop().close()


class _Run:
    """The loop: start programs while there is room, print the first as soon as it has ended, else wait.

    Args:
        ahead: most files opened and not yet printed.
    """

    def __init__(self, pool: Pool, program: list[bytes], names: _Names, ahead: int) -> None:
        self._pool = pool
        self._program = program
        self._names = names
        self._ahead = ahead
        self._pending: deque[_Job] = deque()
        self._failures = 0
        self._just_ended: deque[bool] = deque()  # filled by callbacks, one for each job: did it fail?
        self._waker = Waker()
        self._poll = select.poll()
        self._poll.register(self._waker, select.POLLIN)
        self._progress = _Progress(names.total)

    def until_done(self) -> int:
        """Run the program on every name; returns how many failed.

        Raises:
            BrokenPipeError: nobody reads our output any more.
            _Fatal: no name can be read, no output written, or the pool is broken.
        """
        names, pending = self._names, self._pending
        while True:
            while names.ready and len(pending) < self._ahead:
                pending.append(self._start(names.ready.popleft()))
            if pending and pending[0].ended:
                self._print(pending.popleft())
            elif pending or not names.ended:
                self._wait(for_names=not (names.ready or names.ended))
            else:
                self._count()
                return self._failures

    def close(self) -> None:
        """Give up what has not been printed. The pool has ended."""
        for job in self._pending:
            job.close()
        self._progress.close()
        self._waker.close()

    def _wait(self, for_names: bool) -> None:
        """Wait until a job has ended or, if wanted, names have come."""
        if for_names:
            self._poll.register(0, select.POLLIN)
        ready = [fd for fd, _ in self._poll.poll()]
        if for_names:
            self._poll.unregister(0)
        self._waker.clear()
        self._count()
        if 1 in ready or 2 in ready:
            raise BrokenPipeError
        if 0 in ready:
            try:
                self._names.read()
            except OSError as error:
                raise _Fatal(f"cannot read names from standard input: {error.strerror}", _USAGE) from error

    def _count(self) -> None:
        while self._just_ended:
            self._progress.advance(failed=self._just_ended.popleft())

    def _start(self, name: bytes) -> _Job:
        """Open the file, hand it over and have the program started."""
        job = _Job(name)
        try:
            with open(name, "rb", buffering=0, opener=_open_at_once) as file:
                self._hand_over(job, file)
        except PoolBroken as error:
            raise _Fatal(str(error)) from error
        except ValueError:  # open(2) cannot be told such a name
            job.problem = "there is NUL in this name; -0 is for names that end with it"
        except OSError as error:
            job.problem = f"cannot open it: {error.strerror}"
        if job.problem is not None:
            job.close()
            job.ended = True
            self._progress.advance(failed=True)
        return job

    def _hand_over(self, job: _Job, file: IO[bytes]) -> None:
        args = [argument.replace(b"{}", job.name) for argument in self._program]
        waits = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
        try:
            job.streams += (tempfile.TemporaryFile(), tempfile.TemporaryFile())
            command = commands.build(args, stdin=file, stdout=job.streams[0], stderr=job.streams[1])
            job.future = self._pool.submit(_run_once_written if waits else commands.run, command)
        except OSError as error:
            job.problem = f"cannot hand it over: {_said(error)}"
        else:
            job.future.add_done_callback(partial(self._note_end, job))

    def _note_end(self, job: _Job, future: Future[subprocess.CompletedProcess[Any]]) -> None:
        """Runs in: the pool's own thread."""
        failed = future.cancelled() or future.exception() is not None or future.result().returncode != 0
        self._just_ended.append(failed)
        job.ended = True
        self._waker.wake()

    def _print(self, job: _Job) -> None:
        """Print what an ended job wrote, and then why it failed, if it did."""
        problem = job.problem or self._failure(job)
        sizes = [os.fstat(stream.fileno()).st_size for stream in job.streams]
        if any(sizes) or problem is not None:
            self._progress.hide()
        try:
            for stream, size, target in zip(job.streams, sizes, (1, 2)):
                _copy(stream.fileno(), size, target)
        finally:
            job.close()
        if problem is not None:
            self._failures += 1
            _complain(f"{_shown(job.name)}: {problem}")
        self._progress.show()
        # Who has been given something to read, and goes away, wants no more; poll(2) tells of it whatever is
        # asked for. Who never got anything may still want the programs to be run.
        if sizes and sizes[0]:
            self._poll.register(1, 0)
        if problem is not None or sizes[1]:
            self._poll.register(2, 0)

    def _failure(self, job: _Job) -> str | None:
        assert job.future is not None
        error = job.future.exception()
        if isinstance(error, PoolBroken):
            raise _Fatal(str(error)) from error
        program = _shown(self._program[0].replace(b"{}", job.name))
        if isinstance(error, FdpoolError) and not isinstance(error, commands.SpawnError):
            return str(error)
        if error is not None:
            return f"cannot run {program}: {_said(error)}"
        status = job.future.result().returncode
        # As waitpid(2) would give it.
        return f"{program} {describe_status(-status if status < 0 else status << 8)}" if status else None


def _open_at_once(name: str | bytes, flags: int) -> int:
    """Open without waiting for a FIFO's writer: it is the program on this file that waits, not all others.

    O_NONBLOCK is taken off again at once; this description is nobody else's yet.
    """
    fd = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
    os.set_blocking(fd, True)
    return fd


def _run_once_written(command: commands.Command) -> subprocess.CompletedProcess[Any]:
    """Runs in: a worker. Wait for a FIFO's first writer, as opening it usually does, then run the program.

    Kernel: a reader that opened a FIFO before its writer reads "end of file" until that comes, but poll(2)
    says nothing, and POLLHUP only if one was there and has gone. A pipe (/dev/stdin may be one) is no FIFO:
    it can have lost its writers long ago, and is not waited for.
    """
    fd = command.stdin.fileno()
    ends = os.pipe()
    anonymous = os.fstat(ends[0]).st_dev
    for end in ends:
        os.close(end)
    if os.fstat(fd).st_dev != anonymous:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
    return commands.run(command)


# -- standard streams, by number: nothing of ours is buffered, and nothing fails at exit -----------


def _copy(source: int, size: int, target: int) -> None:
    """Copy `size` bytes, and not what somebody left behind may still append.

    Raises:
        BrokenPipeError: nobody reads `target`.
        _Fatal: standard output cannot be written.
    """
    offset = 0
    while offset < size and (block := os.pread(source, min(_BLOCK_BYTES, size - offset), offset)):
        offset += len(block)
        _write(target, block)


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[_write_some(target, view) :]
    except OSError as error:
        if target != 1:
            return  # who has closed standard error wants none of it
        if isinstance(error, BrokenPipeError):
            raise
        raise _Fatal(f"cannot write to standard output: {error.strerror}") from error
        # Who closes standard error wants none of it.


def _write_some(target: int, data: memoryview) -> int:
    try:
        return os.write(target, data)
    except (
        BlockingIOError
    ):  # somebody has set O_NONBLOCK, which belongs to all who share the terminal or pipe
        poll = select.poll()
        poll.register(target, select.POLLOUT)
        poll.poll()
        return 0


def _complain(text: str) -> None:
    _write(2, f"fdpool: {text}\n".encode(errors="backslashreplace"))


def _shown(name: bytes) -> str:
    """A name for a message: what cannot be printed is escaped, as `ls -b` does it."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _said(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class _Progress:
    """A bar on standard error, if that is a terminal that knows how to clear a line.

    Args:
        total: how many files there are, or None if nobody knows.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._done = self._failed = 0
        self._wanted = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
        self._visible = False
        if total:
            self.show()

    def advance(self, failed: bool) -> None:
        """One more file is done."""
        self._done += 1
        self._failed += failed
        self.show()

    def show(self) -> None:
        """Draw the bar."""
        if self._wanted:
            self._visible = True
            _write(2, b"\r" + self._line().encode() + b"\x1b[K")

    def hide(self) -> None:
        """Clear the line, for output that is about to be printed."""
        if self._visible:
            self._visible = False
            _write(2, b"\r\x1b[K")

    def close(self) -> None:
        """Leave the last count standing."""
        if self._visible:
            self._visible = False
            _write(2, b"\n")

    def _line(self) -> str:
        count = f"{self._done} files" if self._total is None else f"{self._done} of {self._total} files"
        if self._failed:
            count += f", {self._failed} failed"
        try:
            columns = os.get_terminal_size(2).columns or 80
        except OSError:  # it has hung up
            columns = 80
        width = min(30, columns - len(count) - 4)
        if not self._total or width < 5:
            return count[: columns - 1]
        filled = width * self._done // self._total
        return f"[{'#' * filled}{'.' * (width - filled)}] {count}"
