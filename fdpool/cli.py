"""The command line: what `fdpool` is told, and the verb that does it.

What a verb needs is imported by it, where a Ctrl-C during those 0.2 s ends it as at any later time.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import __version__

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["exec"]:
        # It stands for its command, and dies of Ctrl-C as that would, unless it is to ignore it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        from . import cli_exec

        _fill_standard_streams()
        return cli_exec.main(given[1:])
    try:
        if given[:1] == ["serve"]:
            from ._serve import command

            _fill_standard_descriptors()
            return command.main(given[1:])
        with _told_once():
            return _run(given)
    except KeyboardInterrupt as told:
        return _end_as(told)


class _Told(KeyboardInterrupt):
    """A signal that asks for the end has come: its number."""


@contextmanager
def _told_once() -> Iterator[None]:
    """In this block the first signal that asks for the end raises `_Told`; what comes after is passed over, for good.

    Whoever started us may send Ctrl-C on (`timeout` does), so that it comes twice within a millisecond. Then the second
    would end the clearing up after the first, and the exit would wait for the programs. One that is ignored stays so.
    """
    import threading  # `exec` does without

    before = {number: signal.getsignal(number) for number in _ENDING}
    heeded = [n for n in _ENDING if before[n] in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        heeded = []  # no other may set handlers, or runs any

    def tell(number: int, _frame: object) -> None:
        # One that comes before this is done does it in here, and raises through it: once in any case. Not SIG_IGN, as
        # Python would complain of one that has come, and is ignored by the time it is handled.
        for each in heeded:
            signal.signal(each, lambda *_: None)
        raise _Told(number)

    for number in heeded:
        signal.signal(number, tell)
    try:
        yield
    finally:
        for number in heeded:
            if signal.getsignal(number) is tell:
                signal.signal(number, before[number])


def _end_as(told: KeyboardInterrupt) -> int:
    """The status of who was told to end by Ctrl-C; by another signal, this process dies of it."""
    number = told.args[0] if isinstance(told, _Told) else signal.SIGINT
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return _INTERRUPTED


def _run(given: list[str]) -> int:
    from ._run import options
    from ._run.loop import run_all
    from ._run.names import Names

    _fill_standard_descriptors()
    parser = argparse.ArgumentParser(
        prog="fdpool", description="A process pool whose tasks carry open files."
    )
    parser.add_argument("--version", action="version", version=f"fdpool {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    run = options.add_parser(verbs)
    verbs.add_parser("serve", help="serve an application with several processes", add_help=False)
    verbs.add_parser("exec", help="run a command here, or have it run outside", add_help=False)
    names: list[str] | None = None
    if options.SEPARATOR in given:
        cut = given.index(options.SEPARATOR)
        given, names = given[:cut], given[cut + 1 :]
    program: list[str] = []
    if given[:1] == ["run"]:
        ours, program = options.split(run, given[1:])
        given = ["run", *ours]
    chosen = options.check(run, parser.parse_args(given), program, names is not None)
    return run_all(chosen, Names(names, chosen.separator, chosen.at_once))


def _fill_standard_descriptors() -> None:
    """Occupy what is closed of 0, 1 and 2, or the first files opened would be taken for them.

    Opened the wrong way round, so that reading or writing there still fails (as GNU's programs do it).
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        if not _is_open(fd):
            os.open(os.devnull, flags)  # gets the lowest number that is free, which is this one
            os.set_inheritable(fd, True)
    _fill_standard_streams()


def _fill_standard_streams() -> None:
    """For argparse: without a standard error it prints to standard output, or (Python 3.10) fails."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
