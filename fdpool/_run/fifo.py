"""FIFOs as inputs of `fdpool run`: each is waited for by its own program alone, in the worker."""

from __future__ import annotations

import os
import signal

from .. import commands
from .._clock import CLOCK
from ..fds import is_readable


def open_at_once(name: str | bytes, flags: int) -> int:
    """Open without waiting for a FIFO's writer: it is the program on this file that waits, not all others.

    O_NONBLOCK is taken off again at once; this description is nobody else's yet.
    """
    fd = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
    os.set_blocking(fd, True)
    return fd


def run_once_written(command: commands.Command) -> commands.CompletedCommand:
    """Runs in: a worker. Wait for a FIFO's first writer, as opening it usually does, then run the program.

    Kernel: a reader that opened a FIFO before its writer reads "end of file" until that comes, but poll(2)
    says nothing, and POLLHUP only if one was there and has gone. A pipe (/dev/stdin may be one) is no FIFO:
    it can have lost its writers long ago, and is not waited for.

    Raises: as `commands.run`. The wait is part of the command's time.
    """
    fd = command.stdin.fileno()
    ends = os.pipe()
    anonymous = os.fstat(ends[0]).st_dev
    for end in ends:
        os.close(end)
    if os.fstat(fd).st_dev == anonymous:
        return commands.run(command)
    begun = CLOCK.monotonic()
    came = is_readable(fd, command.timeout)
    if command.timeout is None:
        return commands.run(command)
    waited_s = CLOCK.monotonic() - begun
    if came:
        return commands.run(command._replace(timeout=max(0.0, command.timeout - waited_s)))
    for stream in command.streams():
        stream.close()
    ended = commands.CompletedCommand(command.args, -signal.SIGTERM, wall_s=waited_s, timed_out=True)
    raise commands.CommandTimedOut(ended, command.timeout)
