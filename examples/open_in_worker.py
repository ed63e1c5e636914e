"""A file that a worker has opened comes back, open, as part of its result.

The file has no name, so nobody could open it again: what comes back is the open file itself, and it is the
caller's to close. A worker could as well have opened it with rights, or in a place, that this process lacks.
"""

import os
import tempfile

import fdpool


def write_report(title, rows):
    """Runs in a worker: write a file without a name, and give it away."""
    report = tempfile.TemporaryFile("w+")
    print(title, file=report)
    print("=" * len(title), file=report)
    for name, value in rows:
        print(f"{name:<8}{value:>4}", file=report)
    report.seek(0)  # the offset travels too
    return report, os.getpid()


with fdpool.Pool(1) as pool:
    report, writer = pool.submit(write_report, "Harvest", [("apples", 12), ("pears", 7)]).result()

with report:
    print(report.read(), end="")
    print("written by another process:", writer != os.getpid())
    print("names it has in the file system:", os.fstat(report.fileno()).st_nlink)
