"""`fdpool exec`: run a command here, or have it run by a server outside on our own terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import exec_client
from ._exec_session import Request, Run
from .exec_client import ExecRefused
from .fds import SCM_MAX_FD

_VARIABLE = "FDPOOL_EXEC_SOCKET"
_DESCRIPTION = """\
Ask the server that started this program's tree whether COMMAND may run. It runs
here, or there on these very descriptors, and this program passes on its signals
and ends as the command does. Or it is denied.
"""
_EPILOG = """\
exit status:
  that of the command, and by the same signal if it was one; 126 if it was
  denied or cannot be executed, 127 if it is not found, 125 if there is no server
  or that has lost the command, which may have run; 2 for bad usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status, for the caller to exit with; does not return if the command runs in place."""
    parser = argparse.ArgumentParser(
        prog="fdpool exec",
        usage="fdpool exec [--variable NAME] [--fd N] [--] COMMAND [ARG ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--variable", default=_VARIABLE, metavar="NAME", help=f"where the socket's number is ({_VARIABLE})"
    )
    parser.add_argument(
        "--fd", type=int, action="append", default=[], metavar="N", help="hand over descriptor N as well"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="and its arguments")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no COMMAND given")
    for fd in options.fd:
        if not _is_open(fd):
            parser.error(f"--fd {fd}: no such descriptor is open here")
    numbers = list(dict.fromkeys([*filter(_is_open, (0, 1, 2)), *options.fd]))
    if len(numbers) > SCM_MAX_FD:
        parser.error(
            f"--fd: {len(numbers)} descriptors, with the standard ones, are above the limit of {SCM_MAX_FD}"
        )
    request = Request(_found(command[0]), command, _here(), dict(os.environ))
    try:
        with exec_client.connect(options.variable) as session:
            if not isinstance(exec_client.ask(session, request), Run):
                outcome = exec_client.hand_over(session, numbers)
                if outcome.error is not None:
                    exec_client.complain(outcome.error)
                return exec_client.exit_as(outcome)
    except ExecRefused as refused:
        exec_client.complain(str(refused))
        return refused.status
    return exec_client.run_in_place(request)


def _found(name: str) -> str:
    """The file in PATH that execvp(3) would execute, or else complain of; `name` itself if there is none."""
    if "/" in name or not name:
        return name
    paths = [os.path.join(folder or os.curdir, name) for folder in os.get_exec_path()]
    there = list(filter(os.path.exists, paths))
    runnable = [path for path in there if os.access(path, os.X_OK) and not os.path.isdir(path)]
    return next(iter(runnable + there), name)


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been deleted
        return os.environ.get("PWD", "/")


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
