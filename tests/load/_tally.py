"""What became of every request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tally:
    """Counts of requests by what became of them; each is in exactly one.

    ok: answered with status 200, and with what this very request asked for.
    failed: answered otherwise, or not within the time limit.
    reset: the connection was refused, reset or closed while the request was on its way.
    raced: not counted among those above: sent on a kept connection in the moment in which the server closed it
        for being idle. Nothing of an answer had come, and the request was sent once more on a new connection
        (RFC 9112, 9.3.1); what became of that is counted above.
    cut: kept connections that were closed, without having been told so, while they had been idle for less than 4 s. A
        worker that drains keeps idle ones for 5 s: this is how a request comes to be raced, whether or not one was.
    opened: connections.
    seconds: how long requests were sent.
    latencies: seconds from when a request was due to its answer, of the ok ones.
    lost: tokens of what is not ok, with the reason.
    pids: ok answers of each worker.
    """

    ok: int = 0
    failed: int = 0
    reset: int = 0
    raced: int = 0
    cut: int = 0
    opened: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)

    def percentile_s(self, percent: float) -> float:
        """The latency that so many of a hundred requests were below; 0 if there were none."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0

    def as_json(self) -> dict[str, Any]:
        """For a report: no single latencies."""
        return {
            "ok": self.ok,
            "failed": self.failed,
            "reset": self.reset,
            "raced": self.raced,
            "cut": self.cut,
            "connections": self.opened,
            "requests_per_s": round(self.ok / self.seconds, 1) if self.seconds else 0.0,
            "p50_ms": round(self.percentile_s(50) * 1e3, 2),
            "p99_ms": round(self.percentile_s(99) * 1e3, 2),
            "workers": len(self.pids),
            "lost": dict(list(self.lost.items())[:20]),
        }
