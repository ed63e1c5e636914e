"""One open log, several workers: each counts the lines of its own part.

The log is opened once, here, and has no name by the time the workers see it: they get the open file itself.
Its offset is shared by all who hold it, so each worker reads at positions of its own, with `pread`.
"""

import os
import tempfile
from itertools import pairwise

import fdpool

PARTS = 4


def count_lines(log, begin, end):
    """Runs in a worker: count the newlines between two positions of the file."""
    lines = 0
    with log:  # this worker's copy; all the others stay open
        while begin < end:
            block = os.pread(log.fileno(), min(65536, end - begin), begin)
            lines += block.count(b"\n")
            begin += len(block)
    return lines


with tempfile.TemporaryFile() as log, fdpool.Pool(2) as pool:
    for number in range(100_000):
        log.write(b"%06d GET /index.html 200\n" % number)
    size = log.tell()
    edges = [size * part // PARTS for part in range(PARTS + 1)]

    # What is still in the buffer of `log` is written before the file is handed over.
    futures = [pool.submit(count_lines, log, begin, end) for begin, end in pairwise(edges)]
    counts = [future.result() for future in futures]

for part, count in enumerate(counts):
    print(f"part {part}: {count} lines")
print(f"the log: {sum(counts)} lines in {size} bytes")
