"""`Pool`: the executor that people use. It pickles calls, makes futures and maps; `_client` does the rest."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Executor, Future
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from typing_extensions import ParamSpec

    from ._pipeline import CompletedPipeline
    from .commands import Arguments, CompletedCommand, Limit, Stream
    from .running import RunningCommand

    P = ParamSpec("P")

from . import _process, payload
from ._budget import FULL, exhausted, near_limit
from ._chunks import is_plain, run_together
from ._client import Client
from ._clock import CLOCK
from ._cpus import usable_cpus
from ._map import Results, dumped_chunk, flatten, gathered, in_order, in_parts, keeps_nothing
from ._messages import Recycling
from ._naming import name_of
from ._options import TaskOptions, changed, check_count, check_seconds, whole_number
from ._shared import Shared
from ._staffing import Staff
from ._supervision import Setup
from ._tasks import ChunkFuture, CommandFuture, TaskFuture
from ._trees import GRACE_S
from .errors import DescriptorRefused, FdpoolError, NotPicklable, PoolShutDown
from .fds import Fd, HasFileno, close_all
from .sockets import StreamSocket
from .stats import PoolStats

# What runs programs (`commands` and what is below it) is imported by the methods that do: a third of the time that
# importing this module would take, and most pools run none.

T = TypeVar("T")

StartMethod = Literal["forkserver", "fork"]


class Unchanged(Enum):
    """Stands for an option that is not given, where None says something."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED

#: A map's items are submitted in so many chunks, if these are not too large: what a worker does not get done in a few
#: milliseconds it hands back.
_CHUNKS_PER_WORKER = 8
_LARGEST_CHUNK = 4096

#: How long descriptors may take to be closed that no task holds any more.
_LET_GO_S = 0.2


class Pool(Executor):
    """A pool of worker processes whose tasks may carry open files, pipes and sockets.

    A `concurrent.futures.Executor` with the contract of `ProcessPoolExecutor`, and more: functions may be
    lambdas, closures, or defined in `__main__` (no `if __name__ == "__main__":` guard is needed);
    arguments and results may hold open descriptors; and a worker that dies fails the one task it was running.

    Nothing is started before the first task, and workers only as tasks need them. The pool must be shut
    down: by `with`, by `shutdown()`, or at the latest at interpreter exit.

    Args:
        max_workers: most workers at a time; by default as many as the process may use processors (its
            affinity, and its cgroup's quota).
        mp_context: accepted so that `ProcessPoolExecutor` can be replaced as it stands; only its start method
            counts: "fork" is `start_method="fork"`, every other is the default.
        initializer: called in each worker before its first task. If it raises, the pool is broken. It may take any
            time: only `queue_timeout` (see `with_options`) ends the waiting of a task for one that hangs.
        initargs: its arguments. May hold descriptors, and what `multiprocessing` lets pass to children only
            (locks, queues; of a context other than "fork"). With `start_method="fork"` they are inherited
            if they cannot be pickled, as `initializer` itself is: anything will do.
        max_tasks_per_child: tasks after which a worker is replaced by a fresh one; None for never.
        max_memory: bytes of resident memory; a worker that has more after a task is replaced. For a limit
            while a task runs, see `with_options`.
        max_age: seconds after which a worker is replaced, when it has done what it runs; a tenth of it earlier at
            most, so that not all go together.
        max_fds_growth: a worker that has more than so many descriptors beyond those that it started with is replaced.
        min_workers: so many workers are started with the first task, and kept. By default none before they are needed.
        idle_timeout: a worker beyond `min_workers` ends when it has had nothing to do for so many seconds; None for
            never.
        log_level: a level of `logging`, as a number or by name: what workers log from that level up is handled by
            this process's loggers, in order for each worker. None: workers log as a new interpreter does, to stderr.
        start_method: "forkserver": workers are forked from a fresh, single-threaded interpreter, so it
            does not matter what this process's threads do. "fork": from a fork of this process, made at the
            first submit, so that workers inherit its memory.
        preload: names of modules to import once, before workers are forked.

    Raises:
        ValueError, TypeError: an argument is of no use; nothing was started.

    Thread-safe throughout. In a forked child of this process whatever takes work raises `ForkedPool`, and the parent's
    pool is left alone.
    """

    #: Without it each worker pays 32 ms for cloudpickle at its first lambda, 34 for psutil at the first tree to be
    #: ended, and 15 for `commands` at its first program (measured).
    _IDLE_IMPORTS: tuple[str, ...] = ("cloudpickle", "psutil", "fdpool.commands")
    _CLIENT_HEEDS_SIGNALS = False

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        max_memory: int | None = None,
        max_age: float | None = None,
        max_fds_growth: int | None = None,
        min_workers: int = 0,
        idle_timeout: float | None = None,
        log_level: int | str | None = None,
        start_method: StartMethod | None = None,
        preload: Iterable[str] = (),
    ) -> None:
        processors = usable_cpus()
        if max_workers is None:
            max_workers = processors
        max_workers = whole_number("max_workers", max_workers)
        if max_workers <= 0:
            raise ValueError(f"max_workers must be greater than 0, not {max_workers}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, not {initializer!r}")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError(f"max_tasks_per_child must be an integer, not {max_tasks_per_child!r}")
            if max_tasks_per_child <= 0:
                raise ValueError(f"max_tasks_per_child must be >= 1, not {max_tasks_per_child}")
        for name, count in (("max_memory", max_memory), ("max_fds_growth", max_fds_growth)):
            if count is not None:
                check_count(name, count, 1)
        for name, seconds in (("max_age", max_age), ("idle_timeout", idle_timeout)):
            if seconds is not None:
                check_seconds(name, seconds, zero=False)
        check_count("min_workers", min_workers, 0)
        if min_workers > max_workers:
            raise ValueError(f"min_workers must be at most max_workers, {max_workers}, not {min_workers}")
        if log_level is not None:
            log_level = _level(log_level)
        if mp_context is not None and not hasattr(mp_context, "get_start_method"):
            raise TypeError(
                f"mp_context must be a context of multiprocessing, as get_context() returns it, not {mp_context!r}"
            )
        if start_method is None:
            inherits = mp_context is not None and mp_context.get_start_method() == "fork"
            start_method = "fork" if inherits else "forkserver"
        if start_method not in ("forkserver", "fork"):
            raise ValueError(f"start_method must be 'forkserver' or 'fork', not {start_method!r}")
        gevent = sys.modules.get("gevent.monkey")
        if start_method == "fork" and gevent is not None and gevent.is_module_patched("select"):
            raise ValueError(
                "start_method='fork' would fork gevent's hub, which has patched this process: use the default"
            )
        if isinstance(preload, str):
            raise TypeError(f"preload must be an iterable of module names, not the string {preload!r}")
        preload = tuple(preload)
        for module in preload:
            if not isinstance(module, str):
                raise TypeError(f"preload must be an iterable of module names, of which {module!r} is none")
        self._max_workers = max_workers
        self._options: TaskOptions | None = None
        self._chunking = max_tasks_per_child is None
        fork = start_method == "fork"
        # Kept: a lock or queue among the arguments ends when its maker lets go of it.
        self._first_call = None if initializer is None else partial(initializer, *initargs)
        boot = _pickled(self._first_call, fork)
        inherited = self._first_call if boot is None else None
        recycling = Recycling(max_tasks_per_child, max_memory, max_fds_growth)
        idle_imports = self._IDLE_IMPORTS if log_level is None else (*self._IDLE_IMPORTS, "fdpool._logs")
        setup = Setup(
            fork, preload, idle_imports, boot, inherited, recycling, log_level, self._CLIENT_HEEDS_SIGNALS
        )
        self._client = Client(max_workers, processors, setup, Staff(min_workers, idle_timeout, max_age))
        # A pool that is dropped without shutdown finishes what it was given, as ProcessPoolExecutor does.
        weakref.finalize(self, self._client.life.let_go).atexit = False

    def __reduce__(self) -> Any:
        raise TypeError(
            "a pool cannot leave its process; a task that is to submit others makes a Pool of its own"
        )

    @property
    def max_workers(self) -> int:
        """Most workers at a time."""
        return self._max_workers

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are there now; may be out of date as soon as it is returned."""
        return self._client.worker_pids()

    def stats(self) -> PoolStats:
        """A snapshot: workers and what they run, tasks that wait, what was lost, replaced and left behind.

        Of a pool that is over, the counts are still there. Thread-safe; not to be called from a finalizer.
        """
        return self._client.stats()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Run `fn(*args, **kwargs)` in a worker; returns the future of its result.

        Descriptors among the arguments are borrowed until this returns: the caller keeps its own, and may
        close them at once. Descriptors in the result belong to the caller.

        Raises:
            DescriptorRefused: an argument holds a file or socket that cannot be handed over.
            PayloadTooLarge: more than 253 descriptors in one task.
            PoolShutDown, PoolBroken, ForkedPool: this pool takes no tasks.
            DescriptorsExhausted: no descriptor is left here for what it carries, and none becomes free.
            OSError: no memory is left here.

        The future fails with:
            what the task raised, with the worker's traceback as its `__cause__`;
            RemoteError: that exception cannot be rebuilt here;
            NotPicklable, NotLoadable: an argument or the result could not travel;
            FdTransferError: descriptors were lost on the way, and the task did not run (or its result's were);
            WorkerLost: the worker died while it ran this task;
            PoolBroken: the pool broke or was ended before.
        """
        label = name_of(fn)
        return self._submit(fn, args, kwargs, label, TaskFuture())

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        label: str,
        future: TaskFuture[T],
    ) -> TaskFuture[T]:
        """Pickle a call and hand it on; `label` is what errors call it."""
        give_up_at: float | None = None
        while True:
            self._begin()
            try:
                call = payload.dumps_call(fn, args, kwargs)
                if call.fds is not None and near_limit(call.fds.numbers):
                    self._make_room(call, label)
                break
            except NotPicklable as error:
                # Through their frames it would keep the arguments, and the future itself in a cycle.
                payload.keep_in_words(error)
                future.set_exception(error)
                return future
            except OSError as error:
                if error.errno not in FULL or isinstance(error, FdpoolError):
                    raise
                if self._client.wait_for_descriptors(label):
                    give_up_at = None
                    continue
                # No task holds any now; but the last ones may just be closed, by a thread that waits for its turn.
                now = CLOCK.monotonic()
                give_up_at = give_up_at or now + _LET_GO_S
                if now >= give_up_at:
                    raise exhausted(label, 0, 0.0) from error
                time.sleep(_LET_GO_S / 100)
        if self._options is not None:
            future.options, future.grace_s = self._options, self._options.grace
            label = self._options.name or label
        return self._client.submit(call, label, future)

    def _begin(self) -> None:
        """Before anything is opened for a task: start the pool if it is new; raise if it takes none."""
        self._client.begin()

    def with_options(
        self,
        *,
        timeout: float | Unchanged | None = UNCHANGED,
        queue_timeout: float | Unchanged | None = UNCHANGED,
        retries: int | Unchanged = UNCHANGED,
        retry_delay: float | Unchanged = UNCHANGED,
        max_memory: int | Unchanged | None = UNCHANGED,
        grace: float | Unchanged = UNCHANGED,
        name: str | Unchanged | None = UNCHANGED,
    ) -> Pool:
        """A view on this pool, on the same workers, whose tasks have these options; what is not given stays as it is.

        Args:
            timeout: seconds that a task may run, counted from its start in a worker. Then its worker is ended, with all
                that descends from it, and the future fails with `TaskTimeout`, which holds the worker's stacks.
            queue_timeout: seconds from submit within which it must have begun; else it fails with `TaskTimeout`, and
                never runs.
            retries: how often a task is tried again that timed out, took too much memory, or whose worker died. It then
                may have run more than once. One that still kills its worker fails with `PoisonTask`. Descriptors among
                its arguments are kept open here meanwhile.
            retry_delay: seconds before the first of these, twice as many before each further one, 30 at most.
            max_memory: bytes of resident memory that its worker, with all that descends from it, may have while it
                runs, looked at 20 times a second; then it is ended, and the future fails with `MemoryLimitExceeded`.
            grace: seconds from SIGTERM to SIGKILL where a worker is ended for its task's sake.
            name: what errors and statistics call its tasks.

        The view has all methods of a pool. `shutdown()` of the view, and leaving its `with` block, waits for the tasks
        that were submitted through it; the pool goes on.

        Raises:
            TypeError, ValueError: an option is of no use.
        """
        given = {name: value for name, value in locals().items() if value is not UNCHANGED and name != "self"}
        return _View(self, changed(self._options, given))

    def _make_room(self, call: payload.Payload, label: str) -> None:
        """Wait for others to let go of descriptors, as `call` has taken some of the last."""
        try:
            self._client.wait_for_descriptors(label, near=True)
        except BaseException:
            call.close()
            raise

    def share(self, obj: T) -> Shared[T]:
        """Put an object into memory once, for many tasks to take: submit the handle in its place.

        Each worker maps it when it first meets it: a task costs the same whatever the object's size. Buffers in it
        (NumPy arrays, bytes of `pickle.PickleBuffer`) are one copy for all workers, and read-only for tasks.

        Raises:
            NotPicklable: as for an argument of `submit`.
            DescriptorRefused: it holds a descriptor; those travel in tasks only.
            OSError: no memory, or no descriptor, is left.
        """
        self._client.life.check_usable()
        call = payload.dumps(obj, spill_bytes=0, fresh=True)
        assert call.fds is not None
        if call.carries_fds or call.lent:
            call.close()
            raise DescriptorRefused(f"{type(obj).__qualname__} cannot be shared, as it holds a descriptor")
        return Shared(call.fds.numbers[0], call.body, call.close, self._client.forget)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """An iterator of `fn(*args)` for each `args` of `zip(*iterables)`, in order.

        Args:
            timeout: seconds from this call within which each result must be there; else `TimeoutError`.
            chunksize: how many items travel as one task, and fail as one if their worker dies. None: as many as is
                best, which is judged again and again by how long they take; each item succeeds or fails by itself,
                and none waits long behind another while a worker is idle. Only plain data (numbers, strings, bytes,
                None, tuples of these) travels so, with a function that carries nothing along that it can change; else,
                and with `timeout`, `buffersize` or `max_tasks_per_child`, or in a subclass with its own `submit`, each
                item is a task.
            buffersize: most tasks submitted and not yet yielded; then `iterables` are read as results are
                taken. None, the default, reads them all and submits everything at once.

        Raises:
            ValueError, TypeError: a size is not a positive integer.

        An exception that a call raised is raised when its result is reached. Tasks not yet begun are
        cancelled when the iterator is closed or fails, or if reading the iterables raises.
        """
        if chunksize is not None:
            chunksize = whole_number("chunksize", chunksize)
            if chunksize < 1:
                raise ValueError(f"chunksize must be >= 1, not {chunksize}")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError(f"buffersize must be an integer or None, not {buffersize!r}")
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize must be None or > 0, not {buffersize}")
        deadline = None if timeout is None else CLOCK.monotonic() + timeout
        if chunksize is None:
            together = buffersize is None and timeout is None and self._chunking and self._options is None
            # A subclass that has a `submit` of its own sees every item.
            if together and type(self).submit is Pool.submit and iterables and keeps_nothing(fn):
                chunks = gathered(self._submit_chunks(fn, iterables))
                return Results(in_parts(chunks), chunks)
            chunksize = 1
        items = zip(*iterables)
        calls: Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]
        if chunksize == 1:
            calls = ((fn, item) for item in items)
        else:
            calls = (
                (run_together, (fn, chunk))
                for chunk in iter(lambda: list(itertools.islice(items, chunksize)), [])
            )
        first = calls if buffersize is None else itertools.islice(calls, buffersize)
        pending = gathered(self.submit(call, *args) for call, args in first)
        # Only a weak reference: a dropped pool must not be kept by iterators that nobody reads.
        results = in_order(pending, calls, self._reference(), deadline)
        return Results(results if chunksize == 1 else flatten(results), pending)

    def _reference(self) -> Callable[[], Pool | None]:
        """What returns this pool as long as it is not dropped, and does not keep it."""
        return weakref.ref(self)

    def _submit_chunks(
        self, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...]
    ) -> Iterator[Future[Any]]:
        """Submit a map's items in chunks, which their workers cut if they take long."""
        star = len(iterables) != 1
        items: Sequence[Any]
        if star:
            items = list(zip(*iterables))
        elif isinstance(iterables[0], range):
            # It travels as three numbers, which saves a third of the time of a million calls that do nothing.
            items = iterables[0]
        else:
            items = list(iterables[0])
        label = f"items of a map of {name_of(fn)}"
        size = min(_LARGEST_CHUNK, -(-len(items) // (_CHUNKS_PER_WORKER * self._max_workers)))
        start = 0
        while start < len(items):
            self._begin()
            part: Sequence[Any] = items[start : start + size]
            start += size
            # Copies of an item that can change must not be shared with others, as in one pickle they would be.
            together = len(part) > 1 and is_plain(list(itertools.chain.from_iterable(part)) if star else part)
            chunk = dumped_chunk(fn, part, star) if together else None
            if chunk is None:
                for item in part:
                    yield self.submit(fn, *(item if star else (item,)))
                continue
            if chunk.carries_fds:
                chunk.close()
                size, start = 1, start - size
                continue
            if chunk.spilled:  # the next is to fit into a message
                size = -(-size // 4)
            future = ChunkFuture(0, len(part))
            self._client.submit(chunk, label, future)
            yield future

    def run(
        self,
        args: Arguments,
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        fds: Mapping[int, int | HasFileno] | None = None,
        input: bytes | str | None = None,  # noqa: A002 - the name that subprocess.run gave it
        capture_output: bool = False,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        cwd: str | bytes | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        umask: int | None = None,
        nice: int | None = None,
        rlimits: Mapping[int, Limit] | None = None,
        new_session: bool = False,
        timeout: float | None = None,
        grace: float = GRACE_S,
        check: bool = False,
        max_output: int | None = None,
    ) -> TaskFuture[CompletedCommand]:
        """Run a program in a worker, on this process's own descriptors; the future of its completion.

        The arguments that `subprocess.run` has mean what they mean there. A string is a shell command.
        `stdin`, `stdout`, `stderr` and `fds` may be files, sockets or numbers that are open here: they are
        borrowed until this returns, and data flows between them and the program without passing through
        Python. The program has these descriptors and no other, default signal dispositions, and a process
        group of its own.

        Args:
            stdin: None is the null device.
            stdout, stderr: None is its worker's: what this process had as such at the pool's first task.
            fds: number in the program -> descriptor here, in any arrangement: swaps are no problem.
            cwd, env: its working directory, and its whole environment; None for its worker's, as they were here at the
                pool's first task, with what the initializer has changed. `FDPOOL_WORKER` is added, by which the
                program is found when its worker is killed.
            umask, nice: of the program; `nice` is added to the worker's.
            rlimits: `resource.RLIMIT_*` -> (soft, hard), or one number for both.
            new_session: make it the leader of a session as well (setsid(2)).
            timeout: seconds, once it has started; then it is ended with everything that descends from it,
                whatever group or session that has moved to.
            grace: seconds from the SIGTERM of that end to its SIGKILL.
            max_output: most bytes kept of each captured stream; the rest is read and dropped, and
                the result's `truncated` says so.

        Raises:
            ValueError, TypeError, DescriptorRefused: nothing was run.
            LookupError: there is no such encoding.

        The future fails with `CommandFailed` (with `check`; a `subprocess.CalledProcessError`),
        `CommandTimedOut` (a `subprocess.TimeoutExpired`, with what was captured until then),
        `SpawnError` (an `OSError`: the program could not be started), and as for `submit`. Its `cancel()` and
        `terminate()` also end a program that runs, as its timeout would.
        """
        from .commands import build, run  # a microsecond sooner than the module itself

        command = build(
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            fds=fds,
            input=input,
            capture_output=capture_output,
            text=text,
            encoding=encoding,
            errors=errors,
            cwd=cwd,
            env=env,
            umask=umask,
            nice=nice,
            rlimits=rlimits,
            new_session=new_session,
            timeout=timeout,
            grace=grace,
            check=check,
            max_output=max_output,
        )
        return self._submit_command(run, command, f"the program {args!r}")

    def pipeline(
        self,
        stages: Sequence[Arguments],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        input: bytes | str | None = None,  # noqa: A002 - as in run
        capture_output: bool = False,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        cwd: str | bytes | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        grace: float = GRACE_S,
        check: bool = False,
        max_output: int | None = None,
    ) -> TaskFuture[CompletedPipeline]:
        """Run programs joined by pipes, all in one worker; the future of every stage's record.

        Args:
            stages: the programs, each as for `run`.
            stdin: of the first; `input` goes there.
            stdout: of the last.
            stderr: of each; with PIPE each is captured by itself, and STDOUT joins a stage's to its output.
            timeout, grace: of the whole.
            check: fail with `CommandFailed` if a stage fails. A stage that is ended by SIGPIPE has not,
                if another comes after it.

        The other arguments, and the errors, are those of `run`; `cancel()` of the future ends all stages.
        """
        import subprocess

        from . import _pipeline, commands

        if isinstance(stages, (str, bytes)):
            raise TypeError("stages is a sequence of programs, not a string; run() takes a shell's pipeline")
        if capture_output:
            if stdout is not None or stderr is not None:
                raise ValueError("stdout and stderr may not be given with capture_output")
            stdout = stderr = subprocess.PIPE
        built = [
            commands.build(
                args,
                stdin=stdin if number == 0 else None,
                stdout=stdout if number == len(stages) - 1 else None,
                stderr=stderr,
                input=input if number == 0 else None,
                text=text,
                encoding=encoding,
                errors=errors,
                cwd=cwd,
                env=env,
                timeout=timeout,
                grace=grace,
                max_output=max_output,
            )
            for number, args in enumerate(stages)
        ]
        joined = _pipeline.join(built, timeout, grace, check)
        return self._submit_command(_pipeline.run, joined, f"the pipeline {list(stages)!r}")

    def _submit_command(self, fn: Callable[[Any], T], command: Any, label: str) -> TaskFuture[T]:
        """As `submit`, with a future whose `cancel` ends the running program too."""
        return self._submit(fn, (command,), {}, label, CommandFuture())

    def popen(
        self,
        args: Arguments,
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        fds: Mapping[int, int | HasFileno] | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        cwd: str | bytes | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        umask: int | None = None,
        nice: int | None = None,
        rlimits: Mapping[int, Limit] | None = None,
        new_session: bool = False,
        timeout: float | None = None,
        grace: float = GRACE_S,
        executable: str | bytes | os.PathLike[str] | None = None,
    ) -> RunningCommand:
        """Run a program in a worker, and have a handle of it meanwhile: its pid, signals, pipes to talk to it.

        The arguments are those of `run`; PIPE makes a pipe whose other end is the handle's. It occupies
        its worker as long as it runs.

        Args:
            executable: the program, if its `argv[0]` is to be another name.

        Raises: as `run`. OSError: no descriptors left for the pipes.
        """
        from . import commands
        from .running import RunningCommand, pipes_for

        self._begin()
        streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        given, pipes, theirs = pipes_for(streams, text, encoding, errors)
        ends: list[StreamSocket] = []
        try:
            command = commands.build(
                args,
                **given,
                fds=fds,
                cwd=cwd,
                env=env,
                umask=umask,
                nice=nice,
                rlimits=rlimits,
                new_session=new_session,
                timeout=timeout,
                grace=grace,
                executable=executable,
            )
            ends += StreamSocket.pair(max_bytes=4096)
            call = (command, Fd(ends[1]))
            future = self._submit(commands.run_led, call, {}, f"the program {args!r}", TaskFuture())
            return RunningCommand(args, future, ends.pop(0), pipes, grace)
        except BaseException:
            for pipe in pipes.values():
                pipe.close()
            raise
        finally:
            close_all(theirs)
            for end in ends:
                end.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, finish those submitted, and free everything.

        Args:
            wait: return only when every task is settled and no process, thread or descriptor of the pool is left.
            cancel_futures: cancel the tasks that no worker has begun.

        Safe to call again, and from any thread. In a forked child it does nothing.
        """
        self._client.life.shut_down(cancel_futures)
        if wait:
            self._client.life.join()

    def terminate_workers(self) -> None:
        """Send SIGTERM to every worker and all that descends from it, SIGKILL after a second; shut down.

        Tasks not begun are cancelled, those that run fail with `PoolBroken`. Does not wait; `shutdown()` does.
        """
        self._client.life.end(1.0, "the pool was ended by terminate_workers()")

    def kill_workers(self) -> None:
        """As `terminate_workers`, with SIGKILL at once."""
        self._client.life.end(0.0, "the pool was ended by kill_workers()")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Shut down and wait; but if Ctrl-C ended the block, kill the workers rather than wait for them."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._client.life.end(0.0, "the pool's block was interrupted")
        self.shutdown(wait=True)


class _View(Pool):
    """A pool whose tasks have options, on the workers of another."""

    def __init__(self, pool: Pool, options: TaskOptions, closed: threading.Event | None = None) -> None:
        self._pool = pool  # which must not be taken for dropped
        self._client = pool._client
        self._max_workers = pool._max_workers
        self._chunking = pool._chunking
        self._options = options
        self._closed = closed or threading.Event()

    def _begin(self) -> None:
        if self._closed.is_set():
            raise PoolShutDown("cannot schedule new futures after shutdown of this view of a pool")
        super()._begin()

    def _reference(self) -> Callable[[], Pool | None]:
        # Of the pool: most views are dropped as soon as something was submitted.
        pool, options, closed = self._pool._reference(), self._options, self._closed

        def again() -> Pool | None:
            parent = pool()
            return None if parent is None or options is None else _View(parent, options, closed)

        return again

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks through this view, and wait for those that were; the pool goes on.

        From a callback, or in a forked child, it returns at once, as a pool's does.
        """
        self._closed.set()
        mine = self._client.tasks_with(self._options)
        if cancel_futures:
            for future in reversed(mine):
                future.withdraw(running=False)  # a program that runs shall finish
        if wait and self._client.life.may_wait:
            futures.wait(mine)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for this view's tasks; but if Ctrl-C ended the block, end them rather than wait for them."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            for future in self._client.tasks_with(self._options):
                future.terminate()
        self.shutdown(wait=True)


def _level(level: int | str) -> int:
    """The number of a level of `logging`."""
    if isinstance(level, int) and not isinstance(level, bool):
        return level
    import logging

    number = logging.getLevelName(level) if isinstance(level, str) else None
    if not isinstance(number, int):
        raise ValueError(f"log_level must be a level of logging, not {level!r}")
    return number


def _pickled(first_call: partial[object] | None, fork: bool) -> payload.Payload | None:
    """The payload of what each worker calls first; None if there is no such call, or if it cannot be pickled and
    need not be, as workers inherit it."""
    if first_call is None:
        return None
    if not fork:
        with _process.for_children():
            return payload.dumps_call(first_call.func, first_call.args, {})
    try:
        return payload.dumps_call(first_call.func, first_call.args, {})
    except NotPicklable:
        return None
