"""Programs run on handed descriptors: what is asked of a worker, and how the worker does it.

The client builds a `Command` whose standard streams may be open files, pipes and sockets of its own; it
travels as any task does, descriptors and all, and `run` carries it out in the worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union

from . import _trees
from .fds import Fd, HasFileno

#: What may stand for a standard stream: a number, anything with `fileno()`, or one of `subprocess`'s constants.
Stream = Union[int, HasFileno, None]

_AFTER_KILL_S = 2.0  # how long the pipes of a killed program may still be held by who escaped the kill


class Command(NamedTuple):
    """A program to run in a worker, as `subprocess.run` would."""

    args: Sequence[str | bytes | os.PathLike[str]] | str
    stdin: Any
    stdout: Any
    stderr: Any
    input: bytes | str | None
    cwd: str | bytes | os.PathLike[str] | None
    env: Mapping[str, str] | None
    timeout: float | None
    check: bool
    text: bool | None
    encoding: str | None
    errors: str | None


def build(
    args: Sequence[str | bytes | os.PathLike[str]] | str,
    *,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    input: bytes | str | None = None,  # noqa: A002 - the name that subprocess.run gave it
    capture_output: bool = False,
    cwd: str | bytes | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    check: bool = False,
    text: bool | None = None,
    encoding: str | None = None,
    errors: str | None = None,
) -> Command:
    """Check the arguments of `Pool.run` against each other.

    Raises:
        ValueError: they contradict each other, as for `subprocess.run`.
        TypeError: a stream is not a descriptor.
    """
    if capture_output:
        if stdout is not None or stderr is not None:
            raise ValueError("stdout and stderr may not be given with capture_output")
        stdout = stderr = subprocess.PIPE
    if input is not None:
        if stdin is not None:
            raise ValueError("stdin and input may not both be given")
        stdin = subprocess.PIPE
    elif stdin == subprocess.PIPE:
        raise ValueError("stdin=PIPE has no other end here; give input=, or one end of an os.pipe()")
    if stdin == subprocess.STDOUT or stdout == subprocess.STDOUT:
        raise ValueError("STDOUT can only stand for stderr")
    if not args:
        raise ValueError("args names no program")
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout must be a number of seconds >= 0, not {timeout!r}")
    return Command(
        args,
        stdin=_checked("stdin", stdin),
        stdout=_checked("stdout", stdout),
        stderr=_checked("stderr", stderr),
        input=input,
        cwd=cwd,
        env=env,
        timeout=timeout,
        check=check,
        text=text,
        encoding=encoding,
        errors=errors,
    )


def _checked(name: str, stream: Stream) -> Any:
    """What travels for a stream: a constant as it is, a number as an `Fd`, a file as itself."""
    if stream is None or stream in (subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL):
        return stream
    if isinstance(stream, int):
        return Fd(stream)
    if not hasattr(stream, "fileno"):
        raise TypeError(
            f"{name} must be a descriptor, an object with fileno(), or a subprocess constant, not {stream!r}"
        )
    return stream


def run(command: Command) -> subprocess.CompletedProcess[Any]:
    """Runs in: a worker. Run the program on the descriptors that came with the command, and wait for it.

    Its descriptors are those three and no other. If it overruns its timeout, it is killed with
    everything that descends from it.

    Raises:
        subprocess.CalledProcessError: with `check`, and the status is not zero.
        subprocess.TimeoutExpired: it was killed; what it had written is in the exception.
        OSError: it could not be started.
    """
    try:
        process = subprocess.Popen(
            command.args,
            shell=isinstance(command.args, str),
            stdin=command.stdin if command.stdin is not None else subprocess.DEVNULL,
            stdout=command.stdout,
            stderr=command.stderr,
            cwd=command.cwd,
            env=command.env,
            text=command.text,
            encoding=command.encoding,
            errors=command.errors,
        )
    finally:
        _close_streams(command)
    try:
        stdout, stderr = process.communicate(command.input, timeout=command.timeout)
    except subprocess.TimeoutExpired as expired:
        _kill(process)
        try:
            expired.output, expired.stderr = process.communicate(timeout=_AFTER_KILL_S)
        except subprocess.TimeoutExpired:
            pass  # somebody who is none of its descendants holds the pipes: keep what has come
        raise
    except BaseException:
        _kill(process)
        process.wait()
        raise
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    completed = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if command.check:
        completed.check_returncode()
    return completed


def _close_streams(command: Command) -> None:
    """Close the worker's copies: the program has its own, and whoever reads its output waits for the last to close."""
    for stream in (command.stdin, command.stdout, command.stderr):
        if stream is not None and not isinstance(stream, int):
            stream.close()


def _kill(process: subprocess.Popen[Any]) -> None:
    below = _trees.descendants(process.pid) if process.poll() is None else []
    process.kill()
    _trees.signal_all(below, signal.SIGKILL)
