"""Runs a fresh client, and reads what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from ._measure import Outcome


def ask(verb: str, *arguments: str) -> Any:
    """What `_fresh_client` prints for this verb."""
    command = [sys.executable, "-m", f"{__package__}._fresh_client", verb, *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def outcome(verb: str, *arguments: str) -> Outcome:
    said = ask(verb, *arguments)
    return Outcome(value=said["value"], cpu_s=said["cpu"])
