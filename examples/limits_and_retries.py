"""Limit tasks, try them again, end one that runs, and see why a worker died."""

import ctypes
import os
import time
from concurrent.futures import CancelledError

import fdpool


def reads_nowhere():
    ctypes.string_at(0)


def fails_at_first(name):
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        os.unlink(name)
        return "done, in the second attempt"
    os._exit(1)


with fdpool.Pool(2) as pool:
    try:
        pool.with_options(timeout=0.3).submit(time.sleep, 60).result()
    except fdpool.TaskTimeout as error:
        print("timed out after", error.timeout, "seconds")

    print(pool.with_options(retries=1, retry_delay=0).submit(fails_at_first, "attempt").result())

    endless = pool.submit(time.sleep, 60)
    while not endless.running():
        time.sleep(0.01)
    endless.terminate(grace=20)
    try:
        endless.result()
    except CancelledError:
        print("terminated")

    try:
        pool.submit(reads_nowhere).result()
    except fdpool.WorkerLost as error:
        print(
            f"lost to signal {error.signal}, and its stacks show where:", "in reads_nowhere" in error.stacks
        )

    stats = pool.stats()
    print(f"{stats.submitted} tasks, {stats.retried} retry, {stats.lost_workers} workers lost")
