"""A program in a worker, with pipes of this process as its standard input and output.

The data flows between this process and `sort` directly; no Python reads it on the way.
"""

import os

import fdpool

WORDS = ["pear", "apple", "quince", "fig"]

program_reads, we_write = os.pipe()
we_read, program_writes = os.pipe()

with fdpool.Pool(1) as pool:
    future = pool.run(["sort"], stdin=program_reads, stdout=program_writes)

    # The pool has its own duplicates. Ours must be closed, or neither side would ever see the end.
    os.close(program_reads)
    os.close(program_writes)

    with open(we_write, "w") as feed:
        feed.writelines(f"{word}\n" for word in WORDS)
    with open(we_read) as answer:
        for line in answer:
            print("sorted:", line.rstrip())

    print("sort exited with status", future.result().returncode)
