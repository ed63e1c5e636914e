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
        called: set as it is to serve; and here, as it is to go.
    """

    def __init__(
        self,
        worker: ServerWorker,
        make: Callable[[], Face],
        stands_by: Callable[[], object],
        called: threading.Event,
    ) -> None:
        self._worker = worker
        self._make = make
        self._stands_by = stands_by
        self._called = called
        self._lock = threading.Lock()
        self._face: Face | None = None
        self._is_to_go = False  # by a drain that came before there was a face

    def serve(self, ready: Callable[[], None]) -> None:
        if not self._called.is_set():
            self._stands_by()
        self._called.wait()
        with self._lock:
            if self._is_to_go:
                self._worker.closed()
                return
            face = self._face = self._make()
        face.serve(ready)

    def drain(self, grace_s: float, leaving: bool) -> None:
        with self._lock:
            face = self._face
            self._is_to_go = face is None
        if face is not None:
            face.drain(grace_s, leaving)
        self._called.set()

    def close(self) -> None:
        if self._face is not None:
            self._face.close()
