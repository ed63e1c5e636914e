"""What the tests of upkeep run in workers; without pytest, which each worker would import."""

from __future__ import annotations

import io
import locale
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

from tests.contract import helpers


def state() -> dict[str, Any]:
    """All that a task may have changed, and its worker's pid."""
    umask = os.umask(0o22)
    os.umask(umask)
    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "umask": umask,
        "handlers": [
            str(signal.getsignal(number)).partition(" object at ")[0]
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        ],
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "alarm": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
        "stdout": type(sys.stdout).__name__,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("FDPOOL_TEST")},
        "locale": locale.setlocale(locale.LC_ALL),
        "ids": (os.geteuid(), os.getegid()),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "files": [os.fstat(fd).st_ino for fd in (0, 1, 2)],
    }


def change_directory() -> None:
    os.chdir("/")


def change_umask() -> None:
    os.umask(0o777)


def change_handler() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, print)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def change_mask() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})


def set_alarm() -> None:
    signal.alarm(1000)


def lower_limit() -> None:
    helpers.spin(0.002)  # such are followed by a closer look
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def change_locale() -> None:
    helpers.spin(0.002)  # as above
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C" if before != "C" else "C.UTF-8")
    assert locale.setlocale(locale.LC_ALL) != before


def replace_stdout() -> None:
    import io

    sys.stdout = io.StringIO()


def change_environment() -> None:
    os.environ["FDPOOL_TEST_NEW"] = "1"


def close_stdout() -> None:
    os.close(1)


def wrap_stdout() -> None:
    """So as to have another encoding, say; as the wrapper goes it closes what it wraps."""
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer)


def wrap_detached_stderr() -> None:
    sys.stderr = io.TextIOWrapper(sys.stderr.detach())


def lower_limit_for_good() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))


def lower_priority() -> None:
    helpers.spin(0.002)
    os.nice(1)


def become_somebody_else() -> None:
    os.seteuid(65534)


UNDONE = [
    change_directory,
    change_umask,
    change_handler,
    change_mask,
    set_alarm,
    lower_limit,
    change_locale,
    replace_stdout,
    change_environment,
]


REPLACED = [
    close_stdout,
    wrap_stdout,
    wrap_detached_stderr,
    lower_limit_for_good,
    lower_priority,
    become_somebody_else,
]


def leave_descriptor() -> None:
    helpers.TAKEN.append(os.open("/etc/passwd", os.O_RDONLY))


def leave_thread() -> None:
    threading.Thread(target=threading.Event().wait, name="left-behind", daemon=True).start()


def leave_child() -> None:
    import subprocess

    subprocess.Popen(["sleep", "1000"])


def leave_child_of_thread() -> None:
    import concurrent.futures
    import subprocess

    helpers.EXECUTORS.append(concurrent.futures.ThreadPoolExecutor(2))
    helpers.EXECUTORS[-1].submit(subprocess.Popen, ["sleep", "1000"]).result()


def grow() -> int:
    helpers.KEPT.append(bytearray(100 << 20))
    return os.getpid()


def have_few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))


def grow_and_take_all_descriptors() -> int:
    import contextlib

    with contextlib.suppress(OSError):
        while True:
            helpers.TAKEN.append(os.dup(0))
    return grow()


def close_taken() -> int:
    while helpers.TAKEN:
        os.close(helpers.TAKEN.pop())
    return os.getpid()


def leave_endless_thread() -> int:
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return os.getpid()


def replace_environment() -> None:
    os.environ = {"FDPOOL_TEST": "a plain dict"}  # type: ignore[assignment]  # noqa: B003


def ring_every_second() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)


def leave_many(folder: str) -> None:
    sys._fdpool_left = [open(f"{folder}/{'x' * 200}") for _ in range(800)]  # type: ignore[attr-defined]


def keep_signal_waiting() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR1)
