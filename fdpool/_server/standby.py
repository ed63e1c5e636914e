"""A worker that stands by: its application is loaded, and it serves once it is called.

Whoever is killed has a successor then that need not be forked, nor load an application for seconds. What serves is made
as it is called: until then it opens nothing, accepts nothing, and is nobody whom others leave connections to.

Runs in: a server worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .context import Face, ServerWorker


class Standby:
    """A face that becomes another one.

    Args:
        make: the face that serves.
        stands_by: says that it is ready to be called.
    """

    def __init__(
        self, worker: ServerWorker, make: Callable[[], Face], stands_by: Callable[[], object]
    ) -> None:
        self._worker = worker
        self._make = make
        self._stands_by = stands_by
        self._wanted = threading.Event()  # it is called, or to go
        self._lock = threading.Lock()
        self._face: Face | None = None
        self._told: tuple[float, bool] | None = None  # a drain that came before there was a face

    def call(self) -> None:
        """Runs in: the listening thread. Have it serve."""
        self._wanted.set()

    def serve(self, ready: Callable[[], None]) -> None:
        if not self._wanted.is_set():
            self._stands_by()
        self._wanted.wait()
        with self._lock:
            if self._told is not None:
                self._worker.closed()
                return
            face = self._face = self._make()
        face.serve(ready)

    def drain(self, grace_s: float, leaving: bool) -> None:
        with self._lock:
            face = self._face
            if face is None:
                self._told = grace_s, leaving
        if face is not None:
            face.drain(grace_s, leaving)
        self._wanted.set()

    def close(self) -> None:
        if self._face is not None:
            self._face.close()
