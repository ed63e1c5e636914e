"""Functions that contract tests run in workers, importable there by reference."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fdpool import TaskTerminated, payload

TAKEN: list[int] = []  # descriptors that a test has a worker hold
KEPT: list[bytearray] = []
EXECUTORS: list[Any] = []


def square(number: int) -> int:
    return number * number


def read_all(file: Any) -> Any:
    return file.read()


def read_and_close(file: Any, count: int) -> bytes:
    with file:
        data: bytes = file.read(count)
    return data


def die(how: int) -> None:
    """End this worker by a signal (positive) or exit code (zero or negative)."""
    if how > 0:
        os.kill(os.getpid(), how)
        signal.pause()
    os._exit(-how)


def touch_and_wait(path: str, gate: Any) -> str:
    """Say that we run by making a file, then wait until the gate (a pipe's reading end) ends."""
    Path(path).touch()
    gate.read()
    return path


def echo_once(connection: socket.socket) -> int:
    with connection:
        data = connection.recv(1024)
        connection.sendall(data.upper())
        return len(data)


def open_numbers() -> dict[int, str]:
    """This worker's open descriptors and what they are."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
    return found


def spin(seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass
    return os.getpid()


class NeedsTwo(Exception):
    """An exception that its own `args` cannot rebuild."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first} and {second}")


def raise_needs_two() -> None:
    raise NeedsTwo("left", "right")


class ExplodesOnLoad:
    """Pickles well, and raises when loaded."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return _explode, (self.what,)


def _explode(what: str) -> None:
    if what == "exit":
        raise SystemExit(5)
    if what == "os._exit":
        os._exit(7)
    if what == "recursion":
        return _explode(what)
    raise RuntimeError(f"cannot be loaded: {what}")


def nothing() -> None:
    """A task that is over as soon as it begins."""


def note(path: str, number: int) -> int:
    """Write down that this has run."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"%d\n" % number)
    os.close(fd)
    return number


def fail_with(number: int) -> None:
    raise ValueError(str(number))


def many_bytes(number: int) -> bytes:
    return bytes(number * 200)


def open_null(_number: int) -> Any:
    return open(os.devnull, "rb")


def wait_at(fifo: str) -> None:
    """Say that we run, then wait until the FIFO has had a writer; carries no descriptor, so may travel with others."""
    Path(f"{fifo}.begun").touch()
    with open(fifo, "rb") as end:
        end.read()


def wait_and_tell(number: int, seconds: float) -> int:
    if seconds:
        time.sleep(seconds)
    return number


def note_or_fail(path: str, number: int) -> int:
    note(path, number)
    if number == 7:
        raise ValueError(str(number))
    return number


def note_fail_or_wait(path: str, gate: str, number: int) -> int:
    """At 2000, wait until there is a file `gate`."""
    while number == 2000 and not os.path.exists(gate):
        time.sleep(0.001)
    return note_or_fail(path, number)


def note_or_die(path: str, number: int) -> int:
    if number == 150:
        os._exit(1)
    return note(path, number)


def note_slowly(path: str, number: int) -> int:
    time.sleep(0.001)
    return note(path, number)


def odd_one_out(number: int, how: str) -> tuple[int, Any]:
    if number != 63:
        return number, None
    if how == "stop":
        raise StopIteration
    if how == "exit":
        raise SystemExit(4)
    return number, (lambda: 5) if how == "lambda" else (n for n in range(3))


def note_or_wait(path: str, gate: str, number: int) -> int:
    """Item 3 waits until the gate has had a writer; the others take long enough to be claimed one by one."""
    if number == 3:
        with open(gate, "rb") as end:
            end.read()
    spin(300e-6)
    return note(path, number)


def first_and_length(data: bytes) -> tuple[int, int]:
    return data[0], len(data)


def interrupt_me_at(number: int, at: int) -> int:
    if number == at:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    return number


def sum_of(holder: dict[str, Any]) -> int:
    return int(holder["array"].sum())


def nth_of(holder: dict[str, Any], number: int) -> int:
    return int(holder["array"][number])


def write_first(array: Any) -> None:
    array[0] = 1


def _mappings_of_payloads() -> set[str]:
    with open("/proc/self/maps") as lines:
        return {line.split()[4] for line in lines if "fdpool-payload" in line}


def inode_of_mapping(_shared: Any) -> str:
    """Of the one memory file that this worker has mapped."""
    time.sleep(0.01)
    [found] = _mappings_of_payloads()
    return found


def maps_shared_memory() -> bool:
    return bool(_mappings_of_payloads())


_kept: list[Any] = []


def keep_array(array: Any, how: str) -> int:
    """Keep it in this worker, or in a child that looks at it when it is asked."""
    first = int(array[0])
    if how == "keep":
        _kept.append(array)
    elif how == "cycle":
        cycle: list[Any] = [array]
        cycle.append(cycle)
        import gc

        gc.disable()
        _kept.append(cycle)
    elif how == "thread":
        import threading

        asked, told = threading.Event(), []
        thread = threading.Thread(target=lambda: (asked.wait(), told.append(int(array.sum()))), daemon=True)
        thread.start()
        _kept.extend((asked, thread, told))
    else:
        ask, tell = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.read(ask[0], 1)
            os.write(tell[1], str(int(array.sum())).encode())
            os._exit(0)
        _kept.extend((ask[1], tell[0]))
    return first


class LoadsAnother:
    """An argument that keeps its array, and loads another large payload as it is made (another pool's result, say)."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        return _keep_and_load, (self.array,)


def _keep_and_load(array: Any) -> int:
    _kept.append(array)
    other = payload.dumps(bytes(1 << 20))
    assert other.fds is not None
    payload.loads(other.body, other.fds.detach(), other.spilled)
    return int(array[0])


def kept_array() -> int:
    if len(_kept) == 1 and isinstance(_kept[0], list):
        return int(_kept[0][0].sum())
    if len(_kept) == 1:
        return int(_kept[0].sum())
    if len(_kept) == 2:
        os.write(_kept[0], b"?")
        return int(os.read(_kept[1], 100))
    _kept[0].set()
    _kept[1].join()
    return int(_kept[2][0])


def note_or_fork(path: str, number: int) -> int:
    """Nearly always nothing, so that many items are run in one go; the child of one of them returns, too."""
    if number == 1500:
        os.fork()
    if 1500 < number < 1510:
        note(path, number)
    return number


def keep_first(array: Any, _other: Any) -> int:
    return keep_array(array, "keep")


def note_slower_or_wait(path: str, gate: str, number: int) -> int:
    """Longer than a worker goes on with a chunk; after 0, wait until there is a file `gate`."""
    while number > 0 and not os.path.exists(gate):
        time.sleep(0.001)
    time.sleep(0.03)
    return note(path, number)


def throw(_number: int, dice: Any) -> float:
    return float(dice.random())


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def count(self, _number: int) -> int:
        self.calls += 1
        return self.calls


_again: list[int] = [0]


def same_list_again(number: int) -> list[int]:
    _again[0] = number
    return _again


def stuck(ledger: str) -> None:
    with open(ledger, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(1000)


class SlowToLoad:
    """Takes its time where it is loaded, until that is `released` there."""

    released = threading.Event()

    def __reduce__(self) -> Any:
        return _load_slowly, ()


def _load_slowly() -> SlowToLoad:
    SlowToLoad.released.wait(0.02)
    return SlowToLoad()


def sleep_on(_data: bytes) -> None:
    time.sleep(1000)


def end_when_told(ledger: str) -> None:
    """Runs until its worker is told to end (SIGTERM), which that survives; no interrupt of its own ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGURG])
    try:
        with open(ledger, "a") as file:
            file.write(f"{os.getpid()}\n")
        signal.sigwait([signal.SIGTERM])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pid_with(_file: Any) -> int:
    return os.getpid()


def count_and_die_before(ledger: str, survives: int) -> int:
    with open(ledger, "a") as file:
        file.write("x")
    count = os.stat(ledger).st_size
    if count < survives:
        os._exit(3)
    return count


def count_and_die_of(ledger: str, cause: str) -> None:
    """As a fault in C code does it, or whoever is to kill; without a core dump of it."""
    with open(ledger, "a") as file:
        file.write("x")
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    import ctypes  # for this alone

    if cause == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif cause == "SIGSEGV":
        ctypes.string_at(0)
    elif cause == "SIGABRT":
        os.abort()
    os._exit(3)


def note_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


def note_and_hang(path: str) -> None:
    """In one call of C, which no exception ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
    Path(path).write_text(str(os.getpid()))
    time.sleep(1000)


def clean_up(path: str) -> str:
    try:
        note_and_sleep(path)
    except TaskTerminated:
        return "cleaned up"
    return "never"


def count_descriptors(handles: list[Any]) -> int:
    return sum(os.fstat(handle.fileno()) is not None for handle in handles)


def spin_with(seconds: float, _file: Any) -> int:
    return spin(seconds)


def note_at_last(_handle: Any, path: str) -> None:
    time.sleep(1000)
    Path(path).write_text("ran")


def meet(folder: str, number: int, count: int) -> bool:
    """Say that we run, and wait until so many run; False if they never do. Carries no descriptor."""
    (Path(folder) / f"{number}.begun").touch()
    deadline = time.monotonic() + 50
    while len(list(Path(folder).glob("*.begun"))) < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def allocated_blocks() -> int:
    """Runs in: a worker."""
    gc.collect()
    return sys.getallocatedblocks()


def read_nowhere() -> None:
    import ctypes

    ctypes.string_at(0)


def leave_no_descriptor_for_alarms() -> None:
    from fdpool import _program

    def fail(numbers: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    vars(_program)["Alarm"] = fail


def adopts_orphans() -> bool:
    import ctypes

    found = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(37, ctypes.byref(found)) == 0  # PR_GET_CHILD_SUBREAPER
    return bool(found.value)


def run_program(argv: list[str]) -> tuple[int, bytes]:
    import subprocess

    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False)
    return done.returncode, done.stdout


def take_long_to_start() -> None:
    from fdpool import _program

    start = _program.start

    def slow(launch: Any) -> int:
        pid = start(launch)
        time.sleep(0.05)  # what the worker may wait for a processor, as the program runs on another
        return pid

    _program.start = slow


def change_first(arrays: Any) -> None:
    arrays[0][0] = 1


def fork_and_end(how: str) -> int:
    pid = os.fork()
    if pid == 0:
        if how == "exit":
            raise SystemExit(3)
        if how == "raise":
            raise LookupError("in the child")
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hear_only_the_second(noted: Path, gate: Any) -> None:
    heard: list[int] = []
    heed: Any = signal.getsignal(signal.SIGURG)

    def handler(number: int, frame: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            heed(number, frame)

    signal.signal(signal.SIGURG, handler)
    noted.touch()
    gate.read()


def count_and_note(files: list[Any], noted: Path, number: int) -> int:
    with noted.open("a") as file:
        file.write(f"{number}\n")
    return count_descriptors(files)


def sleep_with(_files: list[Any], seconds: float) -> None:
    time.sleep(seconds)


def hoard_when_told(gate: str) -> None:
    """Takes 400 MiB once there is a file `gate`, and keeps them."""
    while not os.path.exists(gate):
        time.sleep(0.005)
    kept = bytearray(400 << 20)
    time.sleep(1000)
    del kept
