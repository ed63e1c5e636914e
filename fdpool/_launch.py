"""Starting one program, in a worker: on which descriptors, where, and with what limits.

posix_spawn(3) wherever it can do what is asked: it copies no page tables, and says at once when the program
cannot be executed. It has no working directory and no umask (Python gives no access to the first), so this
process changes its own around it: a worker has one thread. What it cannot do at all (nice, resource
limits; cwd and umask beside threads that a task left running; cwd where there is no way back) is done in a
fork of the worker, which executes nothing but the few lines of `_become`.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from . import _platform
from ._completed import SpawnError
from ._fdmap import Action, Close, Dup, plan
from ._signals import EVERY
from ._trees import WORKER_MARK

_ALL_SIGNALS = [number for number in EVERY if number not in (signal.SIGKILL, signal.SIGSTOP)]
_O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
_CLOSE_FROM: int | None = getattr(os, "POSIX_SPAWN_CLOSEFROM", None)  # from Python 3.13 on, where libc has it
_STANDARD = {0, 1, 2}
_PASSED_OVER = (errno.ENOENT, errno.ENOTDIR)  # while PATH is searched


class Launch(NamedTuple):
    """One program to start.

    Attributes:
        argv: the program's name, and its arguments.
        numbers: number in the program -> descriptor here, borrowed.
        kept: descriptors that the program shares with this process under the same number.
        env: its environment, or None for this process's.
        group: the process group to join; 0 for its own.
        limits: resource -> (soft, hard), as setrlimit(2) takes them.
        executable: the program, looked up in the PATH that it will have; None for `argv[0]`.
    """

    argv: list[bytes]
    numbers: Mapping[int, int]
    kept: frozenset[int] = frozenset()
    env: Mapping[str, str] | None = None
    cwd: bytes | None = None
    umask: int | None = None
    nice: int | None = None
    limits: Mapping[int, tuple[int, int]] | None = None
    new_session: bool = False
    group: int = 0
    executable: bytes | None = None

    @property
    def program(self) -> bytes:
        return self.argv[0] if self.executable is None else self.executable


def start(launch: Launch) -> int:
    """Start the program; returns its pid, the caller's to reap.

    It has the descriptors that `launch` names and no other, default signal dispositions, an empty mask.
    The caller has blocked all signals, so that none is handled between the start and the note of the pid.

    Raises:
        SpawnError: it did not start, and no process is left of the attempt.
    """
    if any(b"\0" in argument for argument in (*launch.argv, launch.program)):
        raise SpawnError(errno.EINVAL, "there is NUL in an argument", launch.program.split(b"\0")[0])
    if not launch.program:
        raise SpawnError(errno.ENOENT, "No such file or directory (its name is empty)", b"''")
    environment = _environment(launch)
    moves = launch.cwd is not None or launch.umask is not None
    if not _must_fork(launch, moves):
        try:
            if not moves:
                return _spawn(launch, environment)
            with _placed(launch):
                return _spawn(launch, environment)
        except NotImplementedError:
            pass  # a C library whose posix_spawn has no sessions
    return _fork(launch, environment)


def _must_fork(launch: Launch, moves: bool) -> bool:
    if launch.nice is not None or launch.limits or not hasattr(os, "posix_spawn"):
        return True
    if not _platform.has("posix_spawn"):
        return True
    if not moves:
        return False
    threading = sys.modules.get("threading")
    if threading is not None and threading.active_count() > 1:
        return True
    return launch.cwd is not None and not _may_come_back()


def _may_come_back() -> bool:
    """False in a folder that is closed to this process's user: as of a daemon that was root where it was started."""
    try:
        os.stat(".")
    except OSError:
        return False
    return True


def _environment(launch: Launch) -> dict[bytes, bytes]:
    """What the program finds in its environment, always with the mark of the worker whose it is.

    Without the mark, a program in a session of its own would not be found when its worker is killed.
    """
    if launch.env is None:
        return dict(os.environb._data)  # type: ignore[attr-defined]  # as bytes: 0.1 us in place of 10
    environment = {os.fsencode(name): os.fsencode(value) for name, value in launch.env.items()}
    for name, value in environment.items():
        if not name or b"\0" in name or b"\0" in value or b"=" in name:
            raise SpawnError(
                errno.EINVAL, f"the environment has an impossible entry {name!r}", launch.program
            )
    mark = os.fsencode(WORKER_MARK)
    if mark in os.environb:
        environment[mark] = os.environb[mark]
    return environment


def _strays(launch: Launch) -> list[int]:
    """Descriptors that would survive exec, as tasks have left them so, and that the program is not to have.

    One beyond the limit of open files, which a process can only inherit, is made close-on-exec and left out:
    posix_spawn(3) takes no such number, not even to close it.
    """
    found = []
    limit = 0
    for fd in set(map(int, os.listdir("/dev/fd"))).difference(launch.numbers, launch.kept):
        try:
            if not os.get_inheritable(fd):
                continue
            limit = limit or os.sysconf("SC_OPEN_MAX")
            if 0 < limit <= fd:
                os.set_inheritable(fd, False)
            else:
                found.append(fd)
        except OSError:
            continue  # the one that listed the folder
    return found


# -- the usual way -------------------------------------------------------------------------------


@contextmanager
def _placed(launch: Launch) -> Iterator[None]:
    """In this block, this process has the program's working directory and umask."""
    here = None
    if launch.cwd is not None:
        # By descriptor: the way back leads also to a folder that has been moved or deleted.
        here = os.open(".", _O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(launch.cwd)
        except (OSError, ValueError) as error:
            os.close(here)
            raise _bad_cwd(launch, error) from None
    umask = None if launch.umask is None else os.umask(launch.umask)
    try:
        yield
    finally:
        if umask is not None:
            os.umask(umask)
        if here is not None:
            os.fchdir(here)
            os.close(here)


def _bad_cwd(launch: Launch, error: OSError | ValueError) -> SpawnError:
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
    reason = os.strerror(number) if isinstance(error, OSError) else str(error)
    folder = os.fsdecode(launch.cwd or b"")
    bad = SpawnError(number, f"in the folder {folder!r}: {reason}", launch.program)
    bad.in_cwd = True
    return bad


def _spawn(launch: Launch, environment: dict[bytes, bytes]) -> int:
    actions = _file_actions(launch)
    problem: OSError | None = None
    for path in _candidates(launch.program, environment):
        try:
            if launch.new_session:
                return os.posix_spawn(
                    path,
                    launch.argv,
                    environment,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=(),
                    setsigdef=_ALL_SIGNALS,
                )
            return os.posix_spawn(
                path,
                launch.argv,
                environment,
                file_actions=actions,
                setpgroup=launch.group,
                setsigmask=(),
                setsigdef=_ALL_SIGNALS,
            )
        except OSError as error:
            problem = _worse(problem, error)
    raise _explained(launch, problem, environment)


def _file_actions(launch: Launch) -> list[tuple[int, ...]]:
    """What gives the program its descriptors, as posix_spawn(3) takes it."""
    rest: list[tuple[int, ...]] = []
    strays: list[int] = []
    if _CLOSE_FROM is not None and launch.numbers.keys() | launch.kept == _STANDARD:
        rest.append((_CLOSE_FROM, 3))  # in place of a look at the folder: 20 microseconds a program
    else:
        strays = _strays(launch)
    return [
        (os.POSIX_SPAWN_DUP2, *action) if isinstance(action, Dup) else (os.POSIX_SPAWN_CLOSE, action.fd)
        for action in plan(launch.numbers, strays)
    ] + rest


def _candidates(name: bytes, environment: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """The paths that execvpe(3) would try, without those where nothing is."""
    if b"/" in name:
        yield name
        return
    for folder in environment.get(b"PATH", os.fsencode(os.defpath)).split(b":"):
        path = os.path.join(folder, name)
        try:
            os.stat(path)
        except OSError as error:
            if error.errno in _PASSED_OVER:
                continue
        except ValueError:
            continue
        yield path


def _worse(before: OSError | None, error: OSError) -> OSError:
    """Of two failures the one to tell: the first that is more than "there is no such file"."""
    return error if before is None or before.errno in _PASSED_OVER else before


def _explained(launch: Launch, problem: OSError | None, environment: Mapping[bytes, bytes]) -> SpawnError:
    name = launch.program
    number = errno.ENOENT if problem is None or problem.errno is None else problem.errno
    reason = os.strerror(number)
    if problem is None and b"/" not in name:
        reason = "there is no such program in PATH"
    elif number == errno.ENOENT and os.path.exists(name):
        reason = "it is there, but the interpreter that it names (its #! line, or its loader) is not"
    elif number == errno.EBADF:
        reason = "a descriptor's number is beyond the limit (RLIMIT_NOFILE), or its descriptor is not open"
    return SpawnError(number, reason, name)


# -- by way of a fork ----------------------------------------------------------------------------


def _fork(launch: Launch, environment: dict[bytes, bytes]) -> int:
    """As `_spawn`, for what only a process can do to itself; its failure comes back over a pipe."""
    told, tells = os.pipe()
    try:
        # The child's end must be nowhere that the plan puts a descriptor to.
        tells = _moved_away(tells, {*launch.numbers, *launch.numbers.values(), *launch.kept})
        paths = list(_candidates(launch.program, environment)) if launch.cwd is None else None
        actions = plan(launch.numbers, _strays(launch), (tells,))
        pid = _quiet_fork()
        if pid == 0:
            _become(launch, environment, paths, actions, tells)
    except OSError as error:
        os.close(told)
        os.close(tells)
        raise SpawnError(error.errno or errno.EAGAIN, f"fork: {error.strerror}", launch.program) from None
    os.close(tells)
    with open(told, "rb") as reader:
        answer = reader.read().decode()
    if not answer:
        return pid
    os.waitpid(pid, 0)
    stage, number = answer.split()[:2]
    problem = OSError(int(number), os.strerror(int(number)))
    if stage == "exec":
        raise _explained(launch, problem if int(number) != errno.ENOENT or paths else None, environment)
    if stage == "cwd":
        raise _bad_cwd(launch, problem)
    raise SpawnError(int(number), f"{stage}: {problem.strerror}", launch.program)


def _moved_away(fd: int, taken: set[int]) -> int:
    """`fd` itself, or a duplicate under a number that is not taken, and `fd` closed."""
    import fcntl

    held = [fd]
    while held[-1] in taken:
        held.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, held[-1] + 1))
    for other in held[:-1]:
        os.close(other)
    return held[-1]


def _quiet_fork() -> int:
    """Fork, without Python 3.12's warning of threads: the child runs none of what their locks may guard."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(
    launch: Launch,
    environment: dict[bytes, bytes],
    paths: list[bytes] | None,
    actions: list[Action],
    tells: int,
) -> NoReturn:
    """Runs in: a fork of the worker, signals blocked. Become the program, or say why not and exit."""
    stage = "session"
    number = errno.EIO
    try:
        os.setsid() if launch.new_session else os.setpgid(0, launch.group)
        for each in _ALL_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        stage = "cwd"
        if launch.cwd is not None:
            os.chdir(launch.cwd)
        stage = "umask"
        if launch.umask is not None:
            os.umask(launch.umask)
        stage = "descriptors"
        _perform(actions)
        if paths is None:
            paths = list(_candidates(launch.program, environment))
        _restrict(launch)
        stage = "exec"
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        number = _exec(launch.argv, paths, environment)
    except _Refused as error:
        stage, number = error.args
    except OSError as error:
        number = error.errno or errno.EIO
    except BaseException:
        pass
    os.write(tells, f"{stage} {number}".encode())
    os._exit(255)


class _Refused(Exception):
    """What was asked for, and the errno of its refusal."""


def _perform(actions: list[Action]) -> None:
    for action in actions:
        if isinstance(action, Close):
            try:
                os.close(action.fd)
            except OSError:
                continue  # nothing is there, which is what was wanted
        else:
            os.dup2(action.source, action.target)


def _restrict(launch: Launch) -> None:
    """Niceness and limits; last, as the next allocation may be one too many."""
    import resource

    stage = "nice"
    try:
        if launch.nice is not None:
            os.nice(launch.nice)
        for kind, (soft, hard) in (launch.limits or {}).items():
            stage = "rlimits"
            resource.setrlimit(kind, (soft, hard))
    except (OSError, ValueError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise _Refused(stage, number or errno.EPERM) from None


def _exec(argv: list[bytes], paths: list[bytes], environment: dict[bytes, bytes]) -> int:
    """Execute the first of `paths` that can be; the errno to tell if none can."""
    problem: OSError | None = None
    for path in paths:
        try:
            os.execve(path, argv, environment)
        except OSError as error:
            problem = _worse(problem, error)
    return errno.ENOENT if problem is None or problem.errno is None else problem.errno
