"""As many requests as a server bears, or so many as are wanted: by wrk where it is here, else by a client of ours.

wrk is written in C and leaves the processors to the server. Our client checks each answer, and takes as much of them as
the server does: a fast server waits for it. Latencies of wrk count who would have come while others waited, too
(`stats_correct` of its source), so a pause of the machine is in many of them.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass

from tests.load._client import Client

_SAMPLES = 200

# One line at the end: what there was, and latencies at so many equal steps, in µs.
_SCRIPT = """
local samples = SAMPLES
done = function(summary, latency, requests)
  local errors, at = summary.errors, {}
  for step = 1, samples do at[step] = latency:percentile((step - 0.5) / samples * 100) end
  io.write(string.format('\\n{"requests": %d, "us": %d, "lost": %d, "latencies": [%s]}\\n', summary.requests,
    summary.duration, errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    table.concat(at, ", ")))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What came of it: `seconds` is how long it took; of the latencies some 200; `cpu_s` is the client's own."""

    answered: int
    seconds: float
    latencies: list[float]
    cpu_s: float


def client() -> str:
    """What loads here, and its version."""
    if shutil.which("wrk") is None:
        return "a client of ours"
    said = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(said.split()[:2])


def load(address: str, *, connections: int, keep_alive: bool, seconds: float, pause_ms: int = 0) -> Load:
    """Have `connections` requests on their way for so long; wrk knows whole seconds only.

    Args:
        pause_ms: for how long a client waits after an answer, on average, before it asks again.

    Raises:
        RuntimeError: a request was lost, or none was answered.
    """
    if shutil.which("wrk") is not None and seconds >= 1:
        return _by_wrk(address, connections, keep_alive, seconds, pause_ms)
    return _by_ours(address, connections, keep_alive, seconds, pause_ms)


def _by_ours(address: str, connections: int, keep_alive: bool, seconds: float, pause_ms: int) -> Load:
    before_s = time.process_time()
    # It bears some thousands a second itself, and is not to wait for itself.
    rps = min(1000.0, connections * 1000 / pause_ms) if pause_ms else None
    tally = Client(address, rps=rps, connections=connections, keep_alive=float(keep_alive)).run(seconds)
    if tally.lost or not tally.ok:
        raise RuntimeError(f"requests were lost: {tally.as_json()}")
    samples = tally.latencies[:: len(tally.latencies) // _SAMPLES + 1]
    return Load(tally.ok, tally.seconds, samples, time.process_time() - before_s)


def _by_wrk(address: str, connections: int, keep_alive: bool, seconds: float, pause_ms: int) -> Load:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT.replace("SAMPLES", str(_SAMPLES)))
        if pause_ms:
            script.write(f"function delay() return math.random(0, {2 * pause_ms}) end\n")
        script.flush()
        command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{round(seconds)}s"]
        command += [] if keep_alive else ["-H", "Connection: close"]
        command += ["-s", script.name, f"{address.replace('tcp', 'http', 1)}/token"]
        before_s = _children_s()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    if said["lost"] or not said["requests"]:
        raise RuntimeError(f"requests were lost: {said}")
    latencies = [us / 1e6 for us in said["latencies"]]
    return Load(said["requests"], said["us"] / 1e6, latencies, _children_s() - before_s)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
