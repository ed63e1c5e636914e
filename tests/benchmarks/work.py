"""What the tasks do. Cheap to import: every worker imports it, and a cold start pays for it."""

from __future__ import annotations

import fcntl
import os


def noop(*_args):
    return None


def same(value):
    return value


def spin(steps):
    """Use CPU for as long as `steps` turns take; not for a time, which would hide what the pool takes away."""
    for _ in range(steps):
        pass


def pid_after(steps):
    """The worker's pid, after so much work that no one worker can do all."""
    spin(steps)
    return os.getpid()


def first_of(array):
    """Look at an array without reading all of it, so that the way it came is what is measured."""
    return float(array[0]) + len(array)


def wait_at(gate):
    """Return when the file named `gate` is no longer locked."""
    with open(gate) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def tell_and_wait_at(fifo, gate):
    """Write the worker's pid into `fifo`, and wait at `gate`."""
    with open(fifo, "w") as file:
        file.write(f"{os.getpid()}\n")
    wait_at(gate)


def touch_and_wait_at(array, fifo, gate):
    """Read all of an array, say so by a line in `fifo`, and keep the array until `gate` opens."""
    total = float(array.sum())
    with open(fifo, "w") as file:
        file.write("read\n")
    wait_at(gate)
    return total


def close_it(sock):
    sock.close()


def modules():
    """Names of all that a worker has imported, in order."""
    import sys

    return list(sys.modules)
