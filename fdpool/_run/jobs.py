"""One job of `fdpool run`: its names, its attempts with the files opened for them, and how it ended."""

import os
import stat
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import IO, Any, NamedTuple

from .. import commands
from .._broken import PoolBroken, describe_status
from ..commands import CommandTimedOut, CompletedCommand, SpawnError
from ..errors import FdpoolError
from ..pool import Pool
from .fifo import open_at_once, run_once_written
from .options import Options
from .output import Fatal, said, shown
from .targets import Refused, Target, Targets
from .template import quoted

_KINDS = {1: "the output", 2: "the error output"}


class Outcome(NamedTuple):
    """How an attempt ended.

    Attributes:
        problem: why it is a failure, or None.
        completed: the record of the program, if it ran to any end.
        again: another attempt might fare better.
        start: when the program started, in seconds since 1970.
    """

    problem: str | None
    completed: CompletedCommand | None
    again: bool
    start: float


class Job:
    """Some names, usually one, on their way.

    Attributes:
        seq: its number, from 1.
        slot: the place of its program, from 1; None if nobody wants to know.
        args: what is run, in the latest attempt.
        sent, received: size of the file that was handed over, and of the standard output.
        logged: it has its line in the log.
        captured: what the program writes, to be printed: number of the stream -> file.
        targets: what it writes into files of the user's: number of the stream -> target.
        ended_at: when its latest future was settled.
        outcome: its last one; None until then.
    """

    __slots__ = (
        "args", "attempts", "captured", "ended_at", "future", "logged", "names", "outcome", "problem", "received",
        "sent", "seq", "slot", "started_at", "targets",
    )  # fmt: skip

    def __init__(self, seq: int, names: list[bytes], slot: int | None) -> None:
        self.seq = seq
        self.names = names
        self.slot = slot
        self.attempts = 0
        self.args: list[bytes] = []
        self.sent = self.received = 0
        self.logged = False
        self.captured: dict[int, IO[bytes]] = {}
        self.targets: dict[int, Target] = {}
        self.future: Future[CompletedCommand] | None = None
        self.problem: str | None = None
        self.started_at = self.ended_at = 0.0
        self.outcome: Outcome | None = None

    @property
    def shown(self) -> str:
        """Its names, for a message."""
        more = len(self.names) - 1
        return shown(self.names[0]) + (f" and {more} more" if more else "")

    def size(self, number: int) -> int:
        """Bytes that the program wrote to this stream, so far as they are here."""
        return os.fstat(self.captured[number].fileno()).st_size if number in self.captured else 0

    def close(self) -> None:
        """Drop what it wrote and what is not in place."""
        while self.captured:
            self.captured.popitem()[1].close()
        while self.targets:
            self.targets.popitem()[1].discard()


def line_of(options: Options, names: list[bytes], seq: int) -> bytes:
    """A job as a shell's command, with the file and the outputs in it."""
    words = [quoted(argument) for argument in options.program.fill(names, seq, None)]
    words += [b"<", quoted(names[0]) if options.reads else b"/dev/null"]
    for sign, template in ((b">", options.out), (b"2>", options.err)):
        if template is not None:
            words += [sign, quoted(template.fill(names[0], seq, None))]
    return b" ".join(words)


class Starter:
    """Starts attempts, and judges how they ended.

    Args:
        note_end: called with the job when an attempt has ended that was started; in the pool's own thread.
    """

    def __init__(
        self, pool: Pool, options: Options, targets: Targets, note_end: Callable[[Job], None]
    ) -> None:
        self._pool = pool
        self._options = options
        self._targets = targets
        self._note_end = note_end

    def start(self, job: Job) -> bool:
        """Open the files, hand them over and have the program started; False if that cannot be.

        Raises:
            Fatal: the pool is broken.
        """
        job.close()
        job.attempts += 1
        job.future = job.problem = None
        job.started_at = job.ended_at = time.time()
        job.args = self._options.program.fill(job.names, job.seq, job.slot)
        if any(b"\0" in name for name in job.names):  # execve(2) and open(2) cannot be told such a name
            job.problem = "there is NUL in this name; -0 is for names that end with it"
            return False
        try:
            file = open(job.names[0], "rb", buffering=0, opener=open_at_once) if self._options.reads else None
        except OSError as error:
            job.problem = f"cannot open it: {error.strerror}"
            return False
        with nullcontext() if file is None else file:
            job.problem = self._open_outputs(job)
            if job.problem is None:
                job.problem = self._hand_over(job, file)
        return job.problem is None

    def _open_outputs(self, job: Job) -> str | None:
        for number, template in ((1, self._options.out), (2, self._options.err)):
            try:
                if template is None:
                    job.captured[number] = tempfile.TemporaryFile()
                    continue
                path = template.fill(job.names[0], job.seq, None)
                job.targets[number] = target = Target(path, self._options.clobber)
                self._targets.claim(target, job.seq, _KINDS[number])
            except Refused as error:
                return f"will not write to {shown(path)}: {error}"
            except OSError as error:
                where = "a temporary file" if template is None else shown(path)
                return f"cannot write to {where}: {error.strerror}"
        return None

    def _hand_over(self, job: Job, file: IO[bytes] | None) -> str | None:
        status = None if file is None else os.fstat(file.fileno())
        waits = status is not None and stat.S_ISFIFO(status.st_mode)
        job.sent = status.st_size if status is not None and stat.S_ISREG(status.st_mode) else 0
        outputs: list[Any] = [job.captured.get(n) or job.targets[n].fd for n in (1, 2)]
        try:
            # In a session of its own: in the terminal's session, but not in its foreground, a program that asks for a
            # password there would be stopped (SIGTTIN), and waited for in vain.
            command = commands.build(
                job.args,
                stdin=file,
                stdout=outputs[0],
                stderr=outputs[1],
                new_session=True,
                timeout=self._options.timeout,
            )
            job.future = self._pool.submit(run_once_written if waits else commands.run, command)
        except PoolBroken as error:
            raise Fatal(str(error)) from error
        except OSError as error:
            return f"cannot hand it over: {said(error)}"
        job.future.add_done_callback(partial(self._ended, job))
        return None

    def _ended(self, job: Job, _: Future[CompletedCommand]) -> None:
        """Runs in: the pool's own thread."""
        job.ended_at = time.time()
        self._note_end(job)

    def judge(self, job: Job) -> Outcome:
        """How the latest attempt ended.

        Raises:
            Fatal: the pool is broken.
        """
        if job.future is None:
            return Outcome(job.problem, None, False, job.started_at)
        error = job.future.exception()
        if isinstance(error, PoolBroken):
            raise Fatal(str(error)) from error
        completed = error.completed if isinstance(error, CommandTimedOut) else None
        if error is None:
            completed = job.future.result()
        problem = self._problem(job, error, completed)
        start = job.started_at if completed is None else job.ended_at - completed.wall_s
        return Outcome(problem, completed, not isinstance(error, SpawnError), start)

    def _problem(
        self, job: Job, error: BaseException | None, completed: CompletedCommand | None
    ) -> str | None:
        program = shown(job.args[0])
        if completed is not None and completed.timed_out:
            return f"{program} timed out after {self._options.timeout:g} s"
        if completed is not None:
            status = completed.returncode
            # As waitpid(2) would give it.
            return f"{program} {describe_status(-status if status < 0 else status << 8)}" if status else None
        if isinstance(error, FdpoolError) and not isinstance(error, SpawnError):
            return str(error)
        assert error is not None
        return f"cannot run {program}: {said(error)}"

    def keep(self, job: Job, outcome: Outcome) -> Outcome:
        """Put a job's outputs in place: the standard output if it succeeded, the error output in any case.

        What a failed program said of it is worth most; half of what it was to make is worth nothing.
        """
        job.received = job.size(1)
        for number, target in sorted(job.targets.items(), reverse=True):
            if target.fd < 0 or job.future is None:
                target.discard()  # nothing has written to it
                continue
            if number == 1:
                job.received = target.size
            if number == 1 and outcome.problem is not None:
                target.discard()
                continue
            try:
                target.commit()
            except OSError as error:
                problem = f"cannot put {shown(target.path)} in place: {error.strerror}"
                outcome = outcome._replace(problem=outcome.problem or problem, again=False)
        return outcome
