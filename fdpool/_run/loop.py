"""The loop of `fdpool run`: one thread that starts jobs while there is room, settles and prints them, or waits.

    names ──start──► running ──ended──► settled ──its turn──► printed
                        ▲         │
                        └─retries─┘

Settled: outputs in place, counted, and `--halt` asked. What has nothing to print needs no turn.
"""

from __future__ import annotations

import heapq
import os
import resource
import select
from collections import deque

from .._cpus import usable_cpus
from .._links import Waker
from ..fds import is_readable
from ..pool import Pool
from .joblog import Done, Joblog, read_done
from .jobs import Job, Starter, line_of
from .names import Names
from .options import Options
from .output import FAILED, Fatal, Progress, complain, copy, write
from .report import entry, json_line
from .targets import Targets

OK = 0

# What a pool costs of our descriptors: the control link, the pump and what an import or a fork needs for a
# moment; then for each worker its two sockets and its pidfd; then for each job on its way the two of its
# output, wherever that goes, and, until it is sent, three duplicates.
_FDS_OF_POOL, _FDS_OF_WORKER, _FDS_OF_JOB = 16, 3, 5


def run_all(options: Options, names: Names) -> int:
    """Run the program on every file; returns the exit status."""
    log = None
    try:
        if options.dry_run:
            return _print_commands(options, names)
        if options.joblog is not None:
            log = Joblog(options.joblog, options.resume)
        return _run_in_pool(options, names, log)
    except BrokenPipeError:
        return FAILED
    except Fatal as error:
        complain(str(error))
        return error.status
    finally:
        if log is not None:
            log.close()


def _run_in_pool(options: Options, names: Names, log: Joblog | None) -> int:
    workers, ahead = _affordable(options.jobs)
    pool = Pool(workers)
    run = _Run(pool, options, names, log, ahead)
    try:
        status = run.until_done()
        pool.shutdown()
    except BrokenPipeError:
        status = FAILED  # whoever read our output has gone, as `| head` does: nobody is left to be told
    except Fatal as error:
        complain(str(error))
        status = error.status
    finally:  # also where Ctrl-C has come, or another signal; there is no second one (`cli`)
        pool.kill_workers()  # of a pool that has been shut down there are none
        pool.shutdown()
        run.close()
    return status


def _print_commands(options: Options, names: Names) -> int:
    done = read_done(options.joblog) if options.joblog is not None and options.resume else Done()
    seq = 0
    while names.has_batch() or not names.ended:
        if not names.has_batch():
            is_readable(
                0, None
            )  # read(2) does not wait where somebody has set O_NONBLOCK, which all who share it find set
            names.read()
            continue
        seq += 1
        line = line_of(options, names.take_batch(), seq)
        if not done.take(line):
            write(1, line + b"\n")
    return OK


def _affordable(wanted: int | None) -> tuple[int, int]:
    """How many workers, and how many jobs on their way at a time, our limit of descriptors allows."""
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
        complain(f"running {most} at a time: the limit of {limit} open files does not allow for -j {wanted}")
    workers = min(workers, most)
    ahead = (free - _FDS_OF_WORKER * workers) // _FDS_OF_JOB
    # A few more than can run, so that workers are busy behind a slow file.
    return workers, max(1, min(ahead, 4 * workers + 16))


class _Run:
    """The loop.

    Args:
        ahead: most jobs started and not yet printed.
    """

    def __init__(self, pool: Pool, options: Options, names: Names, log: Joblog | None, ahead: int) -> None:
        self._pool = pool
        self._options = options
        self._names = names
        self._log = log
        self._ahead = ahead
        self._seq = 0
        self._pending: dict[int, Job] = {}  # by number, which is their order
        # One job to a worker, where it counts: for the place's number; and a worker that had its next job at
        # hand would begin that before we hear of the failure that is to stop us.
        one_each = options.program.of_slot or options.halt is not None
        self._slots = list(range(1, pool.max_workers + 1)) if one_each else None
        self._failed = self._succeeded = 0
        self._halted = False
        self._given_up: set[int] = set()  # jobs that --halt has cancelled or ended
        self._just_ended: deque[Job] = deque()  # filled by callbacks
        self._waker = Waker()
        self._poll = select.poll()
        self._poll.register(self._waker, select.POLLIN)
        self._targets = Targets(options.clobber, options.joblog)
        self._guards_inputs = options.out is not None or options.err is not None
        if self._guards_inputs:
            self._targets.note_inputs(names.known())
        self._starter = Starter(pool, options, self._targets, self._note_end)
        self._progress = Progress(names.total)

    def until_done(self) -> int:
        """Run the program on every name; returns the exit status.

        Raises:
            BrokenPipeError: nobody reads our output any more.
            Fatal: no name can be read, no output or log written, or the pool is broken.
        """
        names, pending = self._names, self._pending
        while True:
            while names.has_batch() and self._has_room():
                self._start_next()
            first = next(iter(pending.values()), None)
            if self._just_ended:
                self._settle(self._just_ended.popleft())
            elif first is not None and first.outcome is not None:
                self._print(first)
            elif pending or not names.ended:
                self._wait(for_names=not (names.has_batch() or names.ended))
            elif not names.has_batch():
                break
        if self._halted and self._options.halt is not None and self._options.halt.successes is not None:
            return OK
        return FAILED if self._failed else OK

    def close(self) -> None:
        """Give up what has not been printed. The pool has ended."""
        for job in self._pending.values():
            job.close()
        self._progress.close()
        self._waker.close()

    # -- starting --------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        return len(self._pending) < self._ahead and (self._slots is None or bool(self._slots))

    def _start_next(self) -> None:
        self._seq += 1
        names = self._names.take_batch()
        if self._log is not None and self._log.done.take(line_of(self._options, names, self._seq)):
            self._progress.advance(len(names), failed=False)
            return
        job = Job(self._seq, names, heapq.heappop(self._slots) if self._slots is not None else None)
        self._pending[job.seq] = job  # before anything is opened for it: what is pending gets closed
        self._attempt(job)

    def _attempt(self, job: Job) -> None:
        if not self._starter.start(job):
            self._settle(job)

    def _note_end(self, job: Job) -> None:
        """Runs in: the pool's own thread."""
        self._just_ended.append(job)
        self._waker.wake()

    # -- waiting ---------------------------------------------------------------------------------------

    def _wait(self, for_names: bool) -> None:
        """Wait until an attempt has ended or, if wanted, names have come."""
        if for_names:
            self._poll.register(0, select.POLLIN)
        ready = [fd for fd, _ in self._poll.poll()]
        if for_names:
            self._poll.unregister(0)
        self._waker.clear()
        if 1 in ready or 2 in ready:
            raise BrokenPipeError
        if 0 in ready:
            new = self._names.read()
            if self._guards_inputs:
                self._targets.note_inputs(new)

    # -- ending ----------------------------------------------------------------------------------------

    def _settle(self, job: Job) -> None:
        """An attempt has ended: see how, and have another or leave it at that."""
        if job.seq in self._given_up:
            del self._pending[job.seq]
            job.close()
            return
        outcome = self._starter.judge(job)
        left = 0 if self._halted or not outcome.again else self._options.retries + 1 - job.attempts
        if outcome.problem is not None and left > 0:
            self._attempt(job)
            return
        if self._slots is not None and job.slot is not None:
            heapq.heappush(self._slots, job.slot)
        job.outcome = self._starter.keep(job, outcome)
        failed = job.outcome.problem is not None
        self._failed += failed
        self._succeeded += not failed
        self._progress.advance(len(job.names), failed)
        if not self._options.in_order or self._is_silent(job):
            self._print(job)
        elif self._options.out is not None:
            self._log_end(job)  # what it made is where it belongs, whatever becomes of this run
        halt = self._options.halt
        if halt is not None and not self._halted and halt.is_due(self._failed, self._succeeded):
            self._halt(halt.now)

    def _halt(self, now: bool) -> None:
        """Start nothing more; what runs is ended or waited for."""
        self._halted = True
        dropped = self._names.drop()
        running = 0
        for job in self._pending.values():
            if job.outcome is not None or job.future is None or job.future.done():
                continue
            if job.future.cancel():
                dropped = True
                self._given_up.add(job.seq)
            elif not job.future.done():
                running += 1
                if now:
                    self._given_up.add(job.seq)
        if running and now:
            self._tell(f"halting: ending the {running} that run")
            self._pool.terminate_workers()
        elif running:
            self._tell(f"halting: starting nothing more, waiting for the {running} that run")
        elif dropped:
            self._tell("halting: starting nothing more")

    # -- printing --------------------------------------------------------------------------------------

    def _is_silent(self, job: Job) -> bool:
        assert job.outcome is not None
        says = self._options.json or job.outcome.problem is not None
        return not says and not (job.size(1) or job.size(2))

    def _print(self, job: Job) -> None:
        """Print what a job wrote, and then why it failed, if it did."""
        assert job.outcome is not None
        problem = job.outcome.problem
        if self._options.json:
            self._progress.hide()
            write(1, json_line(job))
            self._watch_reader(1)
        else:
            self._print_captured(job)
            if problem is not None:
                tries = f" (attempt {job.attempts})" if job.attempts > 1 else ""
                self._tell(f"{job.shown}: {problem}{tries}")
        self._log_end(job)
        del self._pending[job.seq]
        job.close()
        self._progress.show()

    def _print_captured(self, job: Job) -> None:
        for number in (1, 2):
            if size := job.size(number):
                source = job.captured[number].fileno()
                self._progress.hide()
                copy(source, size, number)
                self._progress.note_output(number, os.pread(source, 1, size - 1))
                self._watch_reader(number)

    def _tell(self, text: str) -> None:
        self._progress.hide()
        self._progress.begin_line()
        complain(text)
        self._watch_reader(2)

    def _watch_reader(self, number: int) -> None:
        """Who has been given something to read, and goes away, wants no more; poll(2) tells of it whatever is
        asked for. Who never got anything may still want the programs to be run."""
        self._poll.register(number, 0)

    def _log_end(self, job: Job) -> None:
        if self._log is not None and not job.logged:
            job.logged = True
            self._log.write(entry(job, line_of(self._options, job.names, job.seq)))
