"""The only fork and exec of the pool's own processes, and what a child must reset and close first.

spawn_supervisor   a fresh interpreter, from any client, however many threads it runs
fork_supervisor    a fork of the client, for `start_method="fork"`
fork_worker        always from the single-threaded supervisor
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from . import _platform, _signals, _trees, fds

#: What the interpreter runs first: the client's own search path, so that the same fdpool is found, and
#: nothing from the working directory that the client would not have found either. While it imports nothing becomes
#: garbage, and looking for some takes a sixth of the time; or a millisecond afterwards, if it were not frozen.
BOOT = """import gc, sys
gc.disable()
sys.path[:] = sys.argv[2:]
from fdpool._supervisor import main_fresh
gc.freeze()
gc.enable()
main_fresh(int(sys.argv[1]))
"""

# As Python does at its start.
_IGNORED = [int(getattr(signal, name)) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name)]
_RESET = [number for number in _signals.EVERY if number not in (signal.SIGKILL, signal.SIGSTOP, *_IGNORED)]


def spawn_supervisor(control_fd: int) -> int:
    """Start a fresh interpreter as supervisor; returns its pid, the caller's to reap.

    It inherits the standard streams (its stdin is the null device) and `control_fd`, which stays the
    caller's here; it has default signal dispositions, an empty mask, and a process group of its own, so
    that the terminal's signals do not reach it.

    Raises:
        OSError: the interpreter cannot be started.
    """
    import subprocess

    if not sys.executable:
        raise OSError(
            "sys.executable is not known, so no fresh supervisor can start; use start_method='fork'"
        )
    # The public way to pass on -W, -X, -E ... of this interpreter does not exist; multiprocessing uses
    # the same function (multiprocessing/util.py).
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if sys.version_info >= (3, 13) and not _has_folder():
        # CPython 3.13.0: an AttributeError of an extension module is a SystemError then, as one looks whether a file of
        # the working directory has been taken for it; so `import socket` fails. Not with a safe path.
        flags = [*flags, "-P"]
    arguments = [sys.executable, *flags, "-c", BOOT, str(control_fd), *map(str, sys.path)]
    # dup2 of a descriptor onto itself clears close-on-exec in posix_spawn(3), which is all that is wanted.
    # Missing standard streams become the null device, or the first file opened would be taken for stdout.
    actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    actions += [
        (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2) if not is_passed_on(fd)
    ]
    actions.append((os.POSIX_SPAWN_DUP2, control_fd, control_fd))
    return os.posix_spawn(
        sys.executable,
        arguments,
        os.environ,
        file_actions=actions,
        setpgroup=0,
        setsigmask=(),
        setsigdef=[number for number in _signals.EVERY if number not in (signal.SIGKILL, signal.SIGSTOP)],
    )


def _has_folder() -> bool:
    """False where the working directory has been removed, or cannot be named."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def fork_supervisor(main: Callable[[], NoReturn]) -> int:
    """Fork this process as supervisor and run `main()` there; returns the pid, the caller's to reap.

    For a client, or for the supervisor of another pool.

    The child keeps the caller's memory and open files, as any fork does; the caller's at-fork hooks have
    closed what belongs to its pools. Threads do not survive a fork, and a lock that one of them holds
    stays held: the price of inherited memory, the caller's choice.
    """
    flush_standard_streams()
    import warnings

    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads. The caller asked for this one by name.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = _fork_masked()
    if pid == 0:

        def child() -> None:
            for number in _RESET:  # also what C code has set, of which Python does not know
                _signals.set_handler(number, _signals.DEFAULT)
            main()

        _run_child(child)
    _set_group(pid)
    return pid


def fork_worker(main: Callable[[], None], close: Iterable[int]) -> int:
    """Fork a worker that runs `main()`; returns its pid.

    In the child: its own process group, default signal dispositions, an empty mask, none of the
    descriptors `close`, and the kernel's promise of a SIGHUP should the supervisor die, which takes its
    programs along.

    Raises:
        OSError: the fork failed (EAGAIN at RLIMIT_NPROC, ENOMEM).
    """
    parent = os.getpid()
    pid = _fork_masked()
    if pid == 0:

        def child() -> None:
            fds.close_all(close)
            # On a signal of its own: a Python handler runs only between bytecodes, so that with one on SIGTERM
            # nobody could end a task in C code, or one about to sleep, in the usual way.
            _trees.end_with_parent(parent)
            _platform.signal_when_parent_dies(signal.SIGHUP)
            if os.getppid() != parent:  # it died before the kernel had our wish
                os._exit(1)
            main()

        _run_child(child)
    _set_group(pid)
    return pid


def _fork_masked() -> int:
    """Fork with every signal blocked, so that no handler of the parent's ever runs in the child."""
    before = _signals.sigmask(signal.SIG_BLOCK, _signals.EVERY)
    try:
        pid = os.fork()
    except BaseException:
        _signals.sigmask(signal.SIG_SETMASK, before)
        raise
    if pid:
        _signals.sigmask(signal.SIG_SETMASK, before)
    return pid


def _run_child(main: Callable[[], object]) -> NoReturn:
    """Runs in: a forked child. Reset what was inherited, run `main`, and never return into the parent's stack."""
    failure: BaseException | None = None
    try:
        os.setpgid(0, 0)
        _reset_signals()
        atexit._clear()  # the parent's
        main()
    except BaseException as error:
        failure = error
    leave(failure)


def leave(error: BaseException | None) -> NoReturn:
    """End a forked child at once, with what an interpreter has to say of how it ended."""
    status = 1
    try:
        if error is None:
            status = 0
        elif isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if status and not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
        else:
            import traceback

            traceback.print_exception(error)
    finally:
        flush_standard_streams()
        os._exit(status & 0xFF)


def flush_standard_streams() -> None:
    """Flush what `print` has buffered; a stream that is closed or gone is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError, OSError):
            continue


def _reset_signals() -> None:
    """The dispositions of a fresh interpreter, and an empty mask."""
    signal.set_wakeup_fd(-1)
    for number in _RESET:
        if _signals.getsignal(number) != _signals.DEFAULT:
            _signals.set_handler(number, _signals.DEFAULT)
    for number in _IGNORED:
        if _signals.getsignal(number) != _signals.IGNORE:
            _signals.set_handler(number, _signals.IGNORE)
    _signals.sigmask(signal.SIG_SETMASK, ())


def reset_stdin() -> None:
    """Runs in: a fork of a client. Forget the parent's half-read stdin: there is nothing to read."""
    null = os.open(os.devnull, os.O_RDONLY)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    sys.stdin = open(0, encoding="utf-8", closefd=False)


def _set_group(pid: int) -> None:
    """The parent's half of setpgid, so that the group exists whoever runs first (as shells do it)."""
    try:
        os.setpgid(pid, pid)
    except (ProcessLookupError, PermissionError):
        pass  # it has died, or has set its group itself and gone on


def is_passed_on(fd: int) -> bool:
    """True for a standard stream; False where there is none, or where a file of the client's has its number."""
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False
