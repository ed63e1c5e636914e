"""What is written of a job that has ended: its line in the log, and its object for `--json`."""

from __future__ import annotations

import os
from typing import Any

from .joblog import Entry
from .jobs import Job

_USAGE = ("utime", "stime", "maxrss", "minflt", "majflt", "inblock", "oublock", "nvcsw", "nivcsw")


def entry(job: Job, command: bytes) -> Entry:
    """The line for the log. Only a success has 0 for both exit code and signal."""
    assert job.outcome is not None
    done = job.outcome.completed
    code = -1 if done is None or done.timed_out or done.returncode < 0 else done.returncode
    if code == 0 and job.outcome.problem is not None:
        code = -1  # the program has succeeded, and its output is not in place
    return Entry(
        seq=job.seq,
        start=job.outcome.start,
        wall_s=0.0 if done is None else done.wall_s,
        sent=job.sent,
        received=job.received,
        exit_code=code,
        signal=-done.returncode if done is not None and done.returncode < 0 else 0,
        attempts=job.attempts,
        command=command,
    )


def json_line(job: Job) -> bytes:
    """One object; its keys are in the documentation."""
    import json  # 2 ms, and most runs print none; a descriptor is kept free for imports (`loop`)

    assert job.outcome is not None
    done = job.outcome.completed
    usage = None if done is None else done.rusage
    record = {
        "seq": job.seq,
        "names": [_text(name) for name in job.names],
        "command": [_text(argument) for argument in job.args],
        "exit_code": done.returncode if done is not None and done.returncode >= 0 else None,
        "signal": None if done is None else done.signal_name,
        "timed_out": done is not None and done.timed_out,
        "attempts": job.attempts,
        "error": job.outcome.problem,
        "start": round(job.outcome.start, 3),
        "wall_s": None if done is None else round(done.wall_s, 6),
        "rusage": None if usage is None else {name: getattr(usage, f"ru_{name}") for name in _USAGE},
        "stdout": _captured(job, 1),
        "stderr": _captured(job, 2),
        "out": _text(job.targets[1].path) if 1 in job.targets else None,
        "err": _text(job.targets[2].path) if 2 in job.targets else None,
    }
    return json.dumps(record).encode() + b"\n"


def _captured(job: Job, number: int) -> Any:
    if number not in job.captured:
        return None
    fd, size = job.captured[number].fileno(), job.size(number)
    blocks, offset = [], 0
    while offset < size and (block := os.pread(fd, size - offset, offset)):
        blocks.append(block)
        offset += len(block)
    return _text(b"".join(blocks))


def _text(data: bytes) -> Any:
    """JSON has no bytes: what is not UTF-8 is an object."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        import base64

        return {"base64": base64.b64encode(data).decode()}
