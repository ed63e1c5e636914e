"""A control group with little memory, for tests of what becomes of those for whom it is not enough."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.process_state import wait_until

# Where groups are made, the file of their limit, and that of their limit with swap: version 2, and version 1.
_KINDS = (
    ("/sys/fs/cgroup", "memory.max", "memory.swap.max", "0"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", None),
)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A group whose processes may have so much together; skips the test if this process may not make one.

    Yields its `cgroup.procs`: who writes a process id there, puts that process in. At the end it must be empty soon.
    """
    group = _new_group(limit_bytes)
    if group is None:
        pytest.skip(
            "a control group with a limit of memory cannot be made here: that takes root, and a writable one"
        )
    try:
        yield group / "cgroup.procs"
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _new_group(limit_bytes: int) -> Path | None:
    for root, limit, with_swap, swap in _KINDS:
        group = Path(root) / f"fdpool-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _write(group / limit, str(limit_bytes))
            with suppress(FileNotFoundError):  # where swap is not counted
                _write(group / with_swap, swap or str(limit_bytes))
            return group
        except OSError:
            group.rmdir()  # a plain folder, or one of another kind
    return None


def _write(path: Path, text: str) -> None:
    """Write to a file that is there already."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
