"""Several programs, each reading what the one before writes: one task, in one worker.

In one, because stages in different workers would wait for each other: a pool with fewer free workers than
there are stages would start the first, which fills its pipe, and never the last.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import commands
from ._capture import Sink
from ._completed import CommandFailed, CommandTimedOut, CompletedCommand
from ._leftovers import is_careful
from ._program import Run, Why
from .commands import Command
from .fds import Fd


class CompletedPipeline(subprocess.CompletedProcess[Any]):
    """A pipeline that has run: each stage's record, and the whole as a `subprocess.CompletedProcess`.

    Attributes:
        stages: a `CompletedCommand` each, in order.
        stdout: what was captured of the last stage.
        stderr: what was captured of all, one after the other.
        returncode: 0 if every stage succeeded, else that of the last that failed. A stage that was ended
            by SIGPIPE has not failed if another comes after it: that one had read enough.
        timed_out, truncated: of any stage.
    """

    def __init__(self, stages: Sequence[CompletedCommand]) -> None:
        self.stages = list(stages)
        failed = [stage for stage in stages if has_failed(stage, last=stage is stages[-1])]
        errors = [stage.stderr for stage in stages if stage.stderr is not None]
        super().__init__(
            [stage.args for stage in stages],
            failed[-1].returncode if failed else 0,
            stages[-1].stdout,
            type(errors[0])().join(errors) if errors else None,
        )
        self.timed_out = any(stage.timed_out for stage in stages)
        self.truncated = any(stage.truncated for stage in stages)

    def __reduce__(self) -> Any:
        return CompletedPipeline, (self.stages,)

    def check_returncode(self) -> None:
        """Raise `PipelineFailed` unless every stage succeeded."""
        if self.returncode:
            raise PipelineFailed(self)


def has_failed(stage: CompletedCommand, last: bool) -> bool:
    """True if a stage's status is an error, in its place."""
    return stage.returncode != 0 and (last or stage.returncode != -signal.SIGPIPE)


class PipelineFailed(CommandFailed):
    """A pipeline that was run with `check`, and of which a stage failed; `completed` is the whole record."""

    completed: CompletedPipeline  # type: ignore[assignment]

    def __init__(self, completed: CompletedPipeline) -> None:
        super().__init__(completed)  # type: ignore[arg-type]


class PipelineTimedOut(CommandTimedOut):
    """A pipeline that overran its timeout, and was ended; `completed` is the whole record."""

    completed: CompletedPipeline  # type: ignore[assignment]

    def __init__(self, completed: CompletedPipeline, timeout: float) -> None:
        super().__init__(completed, timeout)  # type: ignore[arg-type]


class Pipeline(NamedTuple):
    """What travels: the stages, of which only the first has a stdin and only the last a stdout of its own."""

    stages: list[Command]
    timeout: float | None
    grace_s: float
    check: bool


@is_careful
def run(pipeline: Pipeline) -> CompletedPipeline:
    """Runs in: a worker. Run all stages at once, joined by pipes, and wait for all of them.

    Raises:
        PipelineFailed, PipelineTimedOut: as `commands.run`.
        SpawnError: a stage could not be started; those before it have been ended.
        TaskTerminated: its end was asked for.
    """
    with commands.supervised(pipeline.timeout, pipeline.grace_s) as running:
        sinks = _begin_all(running, pipeline.stages)
        why = running.until_over()
        ends = running.reap()
    commands.raise_if_stopped(why)
    stages = [
        commands.record(stage, end, caught, why) for stage, end, caught in zip(pipeline.stages, ends, sinks)
    ]
    completed = CompletedPipeline(stages)
    if why is Why.TIMED_OUT:
        assert pipeline.timeout is not None
        raise PipelineTimedOut(completed, pipeline.timeout)
    if pipeline.check:
        completed.check_returncode()
    return completed


def _begin_all(running: Run, stages: Sequence[Command]) -> list[dict[int, Sink]]:
    """Start each stage in the group of the first, and keep no end of a pipe between two of them."""
    sinks: list[dict[int, Sink]] = []
    group = 0
    source: Fd | None = None
    try:
        for number, each in enumerate(stages):
            stage = each
            if source is not None:
                stage = stage._replace(stdin=source)
                source = None
            if number < len(stages) - 1:
                reading, writing = os.pipe()
                source = Fd.take(reading)
                stage = stage._replace(stdout=Fd.take(writing))
            # A file that was given for several stages is one file here, as it was there: the last one closes it.
            later = [handle for other in stages[number + 1 :] for handle in other.streams()]
            sinks.append(commands.begin(running, stage, group, later))
            group = group or running.progeny.leaders[0]
    except BaseException:
        for stage in stages[len(sinks) :]:
            for handle in stage.streams():
                handle.close()
        raise
    finally:
        if source is not None:
            source.close()
    return sinks


def join(stages: Sequence[Command], timeout: float | None, grace_s: float, check: bool) -> Pipeline:
    """The pipeline of these commands.

    Raises:
        ValueError: there is none.
    """
    if not stages:
        raise ValueError("a pipeline has at least one command")
    return Pipeline(list(stages), timeout, grace_s, check)
