"""A program that gevent has patched: what a pool does in it, as lines. Run by `test_own_sockets`."""

from gevent import monkey  # type: ignore[import-not-found,import-untyped,unused-ignore]

monkey.patch_all()

import os  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from typing import BinaryIO  # noqa: E402

import gevent  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: E402

import fdpool  # noqa: E402


def read(file: BinaryIO) -> bytes:
    return file.read()


def use_a_pool() -> None:
    with fdpool.Pool(2) as pool:
        # A greenlet that waits for a task lets others run, who have what that task waits for.
        reading, writing = os.pipe()
        with open(reading, "rb") as file:
            waits = gevent.spawn(pool.submit(read, file).result)
        os.write(writing, b"said meanwhile")
        os.close(writing)
        print(waits.get().decode())
        print(sum(pool.map(abs, range(-1000, 0))))
        try:
            pool.with_options(timeout=0.1).submit(time.sleep, 60).result()
        except fdpool.TaskTimeout:
            print("timed out")
        print(pool.run(["echo", "a program"], capture_output=True, text=True).result().stdout.strip())
        print("SIGINT blocked:", signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        try:
            pool.submit(os.kill, os.getpid(), signal.SIGINT)
            pool.submit(time.sleep, 60).result()
        except KeyboardInterrupt:
            print("interrupted")
            pool.shutdown(cancel_futures=True, wait=False)
            pool.kill_workers()


if __name__ == "__main__":
    use_a_pool()
    try:
        fdpool.Pool(start_method="fork")
    except ValueError as error:
        print("gevent" in str(error))
