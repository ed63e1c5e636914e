"""The options of `fdpool run`: how they are written, which go together, and what they come to."""

import argparse
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from .halt import Halt
from .output import shown
from .template import Program, Template

SEPARATOR = ":::"

_USAGE = """\
fdpool run [OPTION ...] PROGRAM [ARG ...] ::: FILE ...
       fdpool run [OPTION ...] [-0] PROGRAM [ARG ...]  < names"""
_DESCRIPTION = """\
Open each FILE, and run PROGRAM on it as standard input, several at a time. What
a program prints is shown whole, file by file, in the order of the files. In an
argument, {} stands for the file's name. Without ':::' the names are read from
standard input, one a line, and programs start as the names come.
"""
_EPILOG = """\
replacement strings, in arguments and in the TEMPLATE of an output:
  {}   the name             {/}   its last part              {#}  job, from 1
  {.}  without its suffix   {/.}  last part without suffix   {%}  place, 1 to -j
  {//} its folder

exit status:
  0 if every program succeeded, or as many as --halt success=N asks for, 1 if a
  file could not be opened or a program failed, 2 for bad usage, 130 after Ctrl-C
  (which stops everything at once)

examples:
  fdpool run wc -l ::: *.txt
  fdpool run --out '{}.gz' gzip -9 ::: *.log
  fdpool run --out '{.}.png' --joblog done.log --resume convert - png:- ::: *.tif
  find . -name '*.c' -print0 | fdpool run -0 -n 100 grep -l TODO
"""


class Options(NamedTuple):
    """What is to be done.

    Attributes:
        at_once: names for one job.
        reads: the job's one file is opened, and is its program's standard input.
        out, err: names of files for a program's output; None to have it printed.
        retries: how often a job that failed may be run again.
        timeout: seconds for one attempt.
    """

    program: Program
    jobs: int | None
    separator: bytes
    at_once: int
    reads: bool
    out: Template | None
    err: Template | None
    clobber: bool
    in_order: bool
    json: bool
    retries: int
    timeout: float | None
    halt: Halt | None
    joblog: bytes | None
    resume: bool
    dry_run: bool


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """`run` among the verbs."""
    run: argparse.ArgumentParser = verbs.add_parser(
        "run",
        help="run a program on many files, each handed over as its standard input",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    each = "programs at a time (default: one for each usable processor)"
    run.add_argument("-j", "--jobs", type=int, metavar="N", help=each)

    names = run.add_argument_group("the files")
    names.add_argument("-0", "--null", action="store_true", help="names on standard input end with NUL")
    names.add_argument(
        "--pipe",
        action=argparse.BooleanOptionalAction,
        help="hand the file over as standard input (the default), or only give its name as an argument, at "
        "the end unless {} says where; standard input is then empty",
    )
    names.add_argument(
        "-n",
        type=int,
        dest="at_once",
        metavar="N",
        help="as --no-pipe, with N names for one start of the program",
    )

    output = run.add_argument_group("the output")
    output.add_argument(
        "--out", metavar="TEMPLATE", help="a file for each standard output, such as '{/.}.gz'"
    )
    output.add_argument("--err", metavar="TEMPLATE", help="a file for each standard error")
    output.add_argument("--no-clobber", action="store_true", help="fail rather than replace a file")
    order = output.add_mutually_exclusive_group()
    order.add_argument("-k", "--keep-order", action="store_true", help="print in order (the default)")
    order.add_argument("--as-completed", action="store_true", help="print each as soon as it has ended")
    output.add_argument("--json", action="store_true", help="print a JSON object a line for each job instead")

    failures = run.add_argument_group("failures")
    failures.add_argument(
        "--retries", type=int, default=0, metavar="N", help="run what failed up to N more times"
    )
    failures.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end a program that takes longer, with all its children",
    )
    failures.add_argument(
        "--halt",
        metavar="WHEN",
        help="at the first failure, now: end what runs, or soon: start no more; or at another time, as in "
        "soon,fail=N soon,fail=P%% now,success=N",
    )
    failures.add_argument(
        "--joblog", metavar="FILE", help="append a line to FILE for each job that has ended"
    )
    failures.add_argument(
        "--resume", action="store_true", help="skip the jobs that have succeeded, as the joblog says"
    )
    run.add_argument("--dry-run", action="store_true", help="print the commands for a shell; run nothing")
    return run


def split(parser: argparse.ArgumentParser, given: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the program's arguments, which argparse must not see: they may look like ours."""
    takes_value = {
        option for action in parser._actions if action.nargs != 0 for option in action.option_strings
    }
    end = 0
    while end < len(given) and given[end].startswith("-"):
        if given[end] == "--":
            return given[:end], given[end + 1 :]
        end += 2 if _wants_next(given[end], takes_value) else 1
    return given[:end], given[end:]


def _wants_next(word: str, takes_value: set[str]) -> bool:
    """True if the value of an option comes as the next word: of the last one in `-0n`, and not in `-0n4`."""
    if word.startswith("--"):
        return word in takes_value
    first = next((at for at, letter in enumerate(word) if f"-{letter}" in takes_value), None)
    return first == len(word) - 1


def check(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    program: Sequence[str],
    names_given: bool,
) -> Options:
    """What the options come to; ends the process, with a message, where they contradict each other."""
    error = parser.error
    for name, value, least in (
        ("-j", options.jobs, 1),
        ("-n", options.at_once, 1),
        ("--retries", options.retries, 0),
    ):
        if value is not None and value < least:
            error(f"{name} must be at least {least}, not {value}")
    if options.timeout is not None and not (0 < options.timeout < math.inf):
        error(f"--timeout must be a number of seconds above 0, not {options.timeout:g}")
    if not program:
        error("no PROGRAM given")
    if names_given and options.null:
        error(f"-0 is for names from standard input, and {SEPARATOR} gives them already")
    if options.pipe and options.at_once is not None:
        error("--pipe hands one file over, and -n gives names as arguments")
    if options.resume and options.joblog is None:
        error("--resume needs --joblog, to know what has succeeded")
    if options.dry_run and options.json:
        error("--dry-run prints commands, and --json what became of them")
    if options.no_clobber and options.out is None and options.err is None:
        error("--no-clobber is for --out and --err")
    at_once = options.at_once or 1
    reads = options.at_once is None and options.pipe is not False
    filled = Program([os.fsencode(argument) for argument in program], append=not reads)
    if filled.name.is_constant and shutil.which(program[0]) is None:
        error(_why_not_runnable(program[0]))
    if at_once > 1 and filled.name.of_name:
        error("the PROGRAM cannot be named after a file with -n: there are several")
    return Options(
        program=filled,
        jobs=options.jobs,
        separator=b"\0" if options.null else b"\n",
        at_once=at_once,
        reads=reads,
        out=_target(error, "--out", options.out, at_once),
        err=_target(error, "--err", options.err, at_once),
        clobber=not options.no_clobber,
        in_order=not options.as_completed,
        json=options.json,
        retries=options.retries,
        timeout=options.timeout,
        halt=_halt(error, options.halt),
        joblog=None if options.joblog is None else os.fsencode(options.joblog),
        resume=options.resume,
        dry_run=options.dry_run,
    )


def _target(error: Any, option: str, given: str | None, at_once: int) -> Template | None:
    if given is None:
        return None
    template = Template(os.fsencode(given))
    if at_once > 1 and template.of_name:
        error(
            f"{option} cannot be named after a file with -n, as there are several; {{#}} is the job's number"
        )
    if template.of_slot:
        error(f"{option} cannot be named after a place, which serves many jobs; {{#}} is the job's number")
    return template


def _halt(error: Any, given: str | None) -> Halt | None:
    if given is None:
        return None
    try:
        return Halt.parse(given)
    except ValueError as reason:
        error(f"--halt {shown(os.fsencode(given))}: {reason}")
        raise


def _why_not_runnable(program: str) -> str:
    name = shown(os.fsencode(program))
    if os.path.isdir(program) and os.path.dirname(program):
        return f"cannot run {name}: it is a directory"
    if os.path.exists(program) and os.path.dirname(program):
        return f"cannot run {name}: it is not executable"
    return f"cannot find the program {name}"
