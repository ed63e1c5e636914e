"""Runs a fresh client, and reads what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from ._cpu import Meter
from ._measure import Outcome


def ask(verb: str, *arguments: str) -> Any:
    """What `_fresh_client` prints for this verb."""
    with _client(verb, *arguments) as process:
        said, _ = process.communicate()
    return json.loads(said)


def outcome(verb: str, *arguments: str) -> Outcome:
    """The cost that it says."""
    said = ask(verb, *arguments)
    return Outcome(value=said["value"], cpu_s=said["cpu"])


def until_it_speaks(verb: str, *arguments: str) -> Outcome:
    """The cost from its start to its first line, imports and all."""
    with Meter() as meter:
        process = _client(verb, *arguments)
        assert process.stdout is not None
        process.stdout.readline()
    with process:
        process.communicate()
    return Outcome(value=meter.wall_s, cpu_s=meter.cpu_s)


def _client(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{__package__}._fresh_client", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE)
