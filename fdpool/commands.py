"""Programs run on handed descriptors: what is asked of a worker, and how the worker does it.

The client builds a `Command` whose standard streams may be open files, pipes and sockets of its own; it
travels as any task does, descriptors and all, and `run` carries it out in the worker.

    commands   what is asked, and what comes back          _program   runs it: exits, pipes, clock
    _fdmap     which number each descriptor gets           _progeny   what descends from it, to be ended
    _launch    posix_spawn, or a fork                      _capture   what is collected, what is fed
"""

import codecs
import os
import resource
import select
import signal
import subprocess
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, Union

from . import _board, _options, _platform, _reducers
from ._capture import Sink
from ._completed import Arguments, CommandFailed, CommandTimedOut, CompletedCommand, SpawnError
from ._fdmap import check_targets
from ._launch import Launch
from ._leftovers import is_careful
from ._program import Ended, Run, Why
from ._trees import GRACE_S
from .errors import TaskTerminated
from .fds import Fd, HasFileno, OwnedFds, close_all
from .sockets import StreamSocket

__all__ = [
    "Arguments",
    "Command",
    "CommandFailed",
    "CommandTimedOut",
    "CompletedCommand",
    "Limit",
    "SpawnError",
    "Stream",
    "build",
    "run",
    "run_led",
]

#: What may stand for a standard stream: a number, anything with `fileno()`, or one of `subprocess`'s constants.
Stream = Union[int, HasFileno, None]
#: A resource limit: soft and hard, or one number for both.
Limit = Union[int, tuple[int, int]]

_CONSTANTS = (subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL)
_STREAMS = ("stdin", "stdout", "stderr")
_LEAST_INT = -(2**31)


class Text(NamedTuple):
    """How bytes become text."""

    encoding: str
    errors: str

    def decode(self, data: bytes, cut: bool) -> str:
        """As `subprocess` does it, line ends included; what a cut left of a character is dropped."""
        decoder = codecs.getincrementaldecoder(self.encoding)(self.errors)
        return decoder.decode(data, final=not cut).replace("\r\n", "\n").replace("\r", "\n")


class Command(NamedTuple):
    """A program to run in a worker; everything is checked, and every stream is a constant or a handle."""

    args: Arguments
    executable: bytes | None
    stdin: Any
    stdout: Any
    stderr: Any
    fds: dict[int, Any]
    input: bytes | None
    cwd: bytes | None
    env: dict[str, str] | None
    umask: int | None
    nice: int | None
    rlimits: dict[int, tuple[int, int]] | None
    new_session: bool
    timeout: float | None
    grace_s: float
    check: bool
    max_output: int | None
    text: Text | None

    def streams(self) -> Iterable[Any]:
        """Every handle that came along."""
        return [
            stream
            for stream in (self.stdin, self.stdout, self.stderr, *self.fds.values())
            if _is_handle(stream)
        ]


def build(
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
    executable: str | bytes | os.PathLike[str] | None = None,
) -> Command:
    """Check the arguments of `Pool.run` against each other, and put the command together.

    Raises:
        ValueError: they contradict each other, as for `subprocess.run`, or are out of range.
        TypeError: a stream is not a descriptor, a number is none, or input is not of the kind that `text` asks for.
        LookupError: there is no such encoding.
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
    if timeout is not None:
        _options.check_seconds("timeout", timeout, zero=True)
    _options.check_seconds("grace", grace, zero=True)
    for name, number, least in (
        ("max_output", max_output, 0),
        ("umask", umask, 0),
        ("nice", nice, _LEAST_INT),
    ):
        if number is not None:
            _options.check_count(name, number, least)
    how = _text(text, encoding, errors)
    given = (stdin, stdout, stderr)
    return Command(
        args,
        executable=None if executable is None else os.fsencode(executable),
        stdin=_handle("stdin", stdin),
        stdout=_handle("stdout", stdout),
        stderr=_handle("stderr", stderr),
        fds=_mapped(fds, given) if fds else {},
        input=_input_bytes(input, how),
        cwd=None if cwd is None else os.fsencode(cwd),
        env=None if env is None else dict(env),
        umask=umask,
        nice=nice,
        rlimits=_pairs(rlimits),
        new_session=bool(new_session),
        timeout=timeout,
        grace_s=grace,
        check=check,
        max_output=max_output,
        text=how,
    )


# -- checking what was asked ---------------------------------------------------------------------


def _text(text: bool | None, encoding: str | None, errors: str | None) -> Text | None:
    if not (text or encoding or errors):
        return None
    if encoding is None:
        import locale

        encoding = locale.getpreferredencoding(False)
    codecs.lookup(encoding)
    codecs.lookup_error(errors or "strict")
    return Text(encoding, errors or "strict")


def _input_bytes(given: bytes | str | None, how: Text | None) -> bytes | None:
    if isinstance(given, str):
        if how is None:
            raise TypeError("input is a str, which needs text=True or an encoding")
        return given.replace("\n", os.linesep).encode(how.encoding, how.errors)
    if given is not None and how is not None:
        raise TypeError(f"input must be a str with text=True or an encoding, not {type(given).__name__}")
    return None if given is None else bytes(memoryview(given))  # bytes(5) would be five of them


def _pairs(rlimits: Mapping[int, Limit] | None) -> dict[int, tuple[int, int]] | None:
    if not rlimits:
        return None
    found = {}
    for kind, limit in rlimits.items():
        soft, hard = (limit, limit) if isinstance(limit, int) else (int(limit[0]), int(limit[1]))
        if not isinstance(kind, int) or not _is_resource(kind):
            raise ValueError(f"{kind!r} is no resource; use the RLIMIT_ numbers of the resource module")
        for number in (soft, hard):
            if not (0 <= number < 2**63 or number == resource.RLIM_INFINITY):
                raise ValueError(f"rlimits[{kind}] cannot be {number}; resource.RLIM_INFINITY is no limit")
        if hard != resource.RLIM_INFINITY and not 0 <= soft <= hard:
            raise ValueError(f"rlimits[{kind}] is (soft, hard), and a soft limit of {soft} is above {hard}")
        found[int(kind)] = (soft, hard)
    return found


def _is_resource(kind: int) -> bool:
    try:
        resource.getrlimit(kind)
    except (ValueError, OverflowError):
        return False
    return True


def _mapped(fds: Mapping[int, int | HasFileno], given: tuple[Stream, ...]) -> dict[int, Any]:
    taken = {n: name for n, (name, stream) in enumerate(zip(_STREAMS, given)) if stream is not None}
    check_targets(fds, taken, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31)
    for number, source in fds.items():
        if source is None or (isinstance(source, int) and source in _CONSTANTS):
            raise ValueError(f"fds[{number}] must be an open descriptor; PIPE, STDOUT and DEVNULL are not")
    return {number: _handle(f"fds[{number}]", source) for number, source in fds.items()}


def _is_handle(stream: Any) -> bool:
    return stream is not None and not isinstance(stream, int)


def _handle(name: str, stream: Stream) -> Any:
    """What travels for a stream: a constant as it is, a number as an `Fd`, a file as itself."""
    if stream is None or (isinstance(stream, int) and stream in _CONSTANTS):
        return stream
    if isinstance(stream, int):
        return Fd(stream)
    if not hasattr(stream, "fileno"):
        raise TypeError(
            f"{name} must be a descriptor, an object with fileno(), or a subprocess constant, not {stream!r}"
        )
    if _reducers.find(type(stream)) is None:
        # Nobody knows how to make another of its kind, and nobody needs one: its descriptor is what counts.
        flush = getattr(stream, "flush", None)
        if callable(flush):
            flush()
        return Fd(stream.fileno())
    return stream


# -- in the worker -------------------------------------------------------------------------------


@is_careful
def run(command: Command) -> CompletedCommand:
    """Runs in: a worker. Run the program on the descriptors that came with the command, and wait for it.

    Raises:
        CommandFailed: with `check`, and the status is not zero.
        CommandTimedOut: it was ended; what it had written is in the exception.
        SpawnError: it could not be started.
        TaskTerminated: its end was asked for.
    """
    with supervised(command.timeout, command.grace_s) as running:
        sinks = begin(running, command)
        why = running.until_over()
        (end,) = running.reap()
    raise_if_stopped(why)
    return _judged(command, record(command, end, sinks, why))


def raise_if_stopped(why: Why) -> None:
    """Raise what says that the client has asked for the end of a `supervised` run, and wants no record of it."""
    if why is Why.TOLD:
        raise TaskTerminated


def supervised(timeout: float | None, grace_s: float) -> Run:
    """A run that ends when the client asks for the end of the present task."""
    return Run(timeout, grace_s, [signal.SIGURG], _stop_if_asked)


def _stop_if_asked(running: Run) -> None:
    if _board.here is not None and _board.here.is_to_stop():
        running.end(Why.TOLD)


@is_careful
def run_led(command: Command, leash: Fd) -> CompletedCommand:
    """As `run`, on a leash: the client learns of the start, and may send signals or end it.

    Args:
        leash: one end of a Unix stream pair, of which the client has the other; taken. From here goes
            `{"pid": n}` with a pidfd, if there are such; from there `{"signal": n, "group": bool}` and
            `{"end": grace}`. When the client lets go of its end, the program is ended.
    """
    link = StreamSocket.from_fd(leash.detach(), max_bytes=4096)
    with link, Run(command.timeout, command.grace_s) as running:
        sinks = begin(running, command)
        pid = running.progeny.leaders[0]
        running.watch(link.fileno(), select.POLLIN, lambda: _obey(running, link, pid))
        _announce(link, pid)
        why = running.until_over()
        (end,) = running.reap()
    return _judged(command, record(command, end, sinks, why))


def _announce(link: StreamSocket, pid: int) -> None:
    pidfd = _platform.open_pidfd(pid)
    owned = OwnedFds([] if pidfd is None else [pidfd])
    try:
        link.send_with_fds({"pid": pid}, owned.numbers)
    except OSError:
        pass  # the client has let go: the next poll says so
    finally:
        owned.close()


def _obey(running: Run, link: StreamSocket, pid: int) -> None:
    """Do what the client says. The program is not reaped yet, so its pid is still its own."""
    try:
        while (received := link.try_receive_with_fds()) is not None:
            close_all(received[1])
            wish = received[0]
            if "end" in wish:
                running.end(Why.TOLD, wish["end"])
            else:
                running.progeny.signal_one(pid, wish["signal"], group=bool(wish.get("group")))
    except (EOFError, ConnectionError):
        running.forget(link.fileno())
        running.end(Why.TOLD)


def _judged(command: Command, completed: CompletedCommand) -> CompletedCommand:
    """The record, or the error that it is."""
    if completed.timed_out:
        assert command.timeout is not None
        raise CommandTimedOut(completed, command.timeout)
    if command.check:
        completed.check_returncode()
    return completed


def begin(
    running: Run, command: Command, group: int = 0, still_wanted: Collection[Any] = ()
) -> dict[int, Sink]:
    """Start the command's program; what is captured of it, by the number of the stream.

    The command's descriptors are closed here, save those handles that are `still_wanted`: the program has its
    own, and whoever reads its output waits for the last writer to go.
    """
    numbers: dict[int, int] = {}
    theirs: list[int] = []  # ends for the program, and the null device: closed once it has them
    sinks: dict[int, Sink] = {}
    try:
        for number, stream in enumerate((command.stdin, command.stdout, command.stderr)):
            if stream is None and number:
                continue  # its worker's
            if stream is None or stream == subprocess.DEVNULL:
                theirs.append(os.open(os.devnull, os.O_WRONLY if number else os.O_RDONLY))
                numbers[number] = theirs[-1]
            elif stream == subprocess.PIPE:
                theirs.append(_pipe_end(running, command, number, sinks))
                numbers[number] = theirs[-1]
            elif _is_handle(stream):
                numbers[number] = stream.fileno()
        for number, handle in command.fds.items():
            numbers[number] = handle.fileno()
        if command.stderr == subprocess.STDOUT:
            numbers[2] = numbers.get(1, 1)
        running.start(_launch(command, numbers, group))
    finally:
        close_all(theirs)
        for handle in command.streams():
            if handle not in still_wanted:
                handle.close()
    return sinks


def _pipe_end(running: Run, command: Command, number: int, sinks: dict[int, Sink]) -> int:
    """A pipe for a standard stream, whose other end the run takes; the program's end."""
    reading, writing = os.pipe()
    if number == 0:
        running.feed(writing, command.input or b"")
        return reading
    sinks[number] = running.capture(reading, command.max_output)
    return writing


def _launch(command: Command, numbers: dict[int, int], group: int) -> Launch:
    args = command.args
    if isinstance(args, str):
        args = ["/bin/sh", "-c", args]
    elif isinstance(args, (bytes, os.PathLike)):
        args = [args]
    return Launch(
        argv=[os.fsencode(argument) for argument in args],
        numbers=numbers,
        kept=frozenset({1, 2} - set(numbers)),
        env=command.env,
        cwd=command.cwd,
        umask=command.umask,
        nice=command.nice,
        limits=command.rlimits,
        new_session=command.new_session,
        group=group,
        executable=command.executable,
    )


def record(command: Command, end: Ended, sinks: Mapping[int, Sink], why: Why) -> CompletedCommand:
    """The record of one program's completion.

    Raises:
        ChildProcessError: something else in the worker has reaped it, so nobody knows how it ended.
    """
    if end.status is None and why is Why.RUNNING:
        raise ChildProcessError(
            f"{command.args!r} has ended, and something else in its worker has taken its exit status: "
            "do not wait there for children that are not yours"
        )
    code = -9 if end.status is None else os.waitstatus_to_exitcode(end.status)
    outputs = {number: _output(command, sink, why) for number, sink in sinks.items()}
    return CompletedCommand(
        command.args,
        code,
        outputs.get(1),
        outputs.get(2),
        wall_s=end.wall_s,
        rusage=end.rusage,
        timed_out=why is Why.TIMED_OUT,
        truncated=any(sink.truncated for sink in sinks.values()),
    )


def _output(command: Command, sink: Sink, why: Why) -> bytes | str:
    data, how = sink.data(), command.text
    if how is None:
        return data
    # What was ended may have been in the middle of a character.
    return how.decode(data, cut=sink.truncated or why is not Why.RUNNING)
