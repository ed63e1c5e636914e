"""What the fixtures for servers raise."""

from __future__ import annotations

from ..errors import FdpoolError


class ServerDied(FdpoolError, AssertionError):
    """A server of a test has ended by itself, or never became ready. The message says how, and what it had written.

    Attributes:
        what: how it ended.
        logs: what it had written to its standard output and error.
    """

    def __init__(self, what: str, logs: str = "") -> None:
        shown = f"; it had written:\n{logs.rstrip()}" if logs.strip() else "; it had written nothing"
        super().__init__(what + shown)
        self.what = what
        self.logs = logs
