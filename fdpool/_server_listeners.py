"""A server's listeners: one set that all workers share, or one for each slot (SO_REUSEPORT).

A listener of a slot's own outlives the slot's workers, as a connection that the kernel has put into its queue can be
taken there and nowhere else: the next worker of the slot goes on with the same listener.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from . import _bind


class Listeners:
    """All listeners of a server; owned. Not thread-safe: made by the caller, then the loop's.

    Args:
        bind: as for `_bind.open_listeners`.
        slots: for how many to open them now, with `reuseport`.

    Raises: as `_bind.open_listeners`; nothing is left open.
    """

    def __init__(self, bind: _bind.Bind, backlog: int, reuseport: bool, slots: int) -> None:
        self._backlog = backlog
        self._by_slot: dict[int, list[_bind.Listener]] = {}
        self._shared = not reuseport
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            self._by_slot[0] = _bind.open_listeners(bind, backlog=backlog, reuseport=reuseport)
            if self._shared:
                for listener in self._by_slot[0]:
                    self._unblock(bind, listener)
            for slot in range(slots):
                self.of(slot)
            opened.pop_all()

    @staticmethod
    def _unblock(bind: _bind.Bind, listener: _bind.Listener) -> None:
        """Make a listener non-blocking that nobody else can rely on: one that was opened here.

        The mode of one that was given is not ours to change; `_server_accept` has a way for those.
        """
        given = [bind] if isinstance(bind, (str, int, socket.socket)) else bind
        if all(isinstance(each, int) or (isinstance(each, str) and not _is_given(each)) for each in given):
            os.set_blocking(listener.socket.fileno(), False)

    def of(self, slot: int) -> list[socket.socket]:
        """The sockets that a worker of this slot accepts from; borrowed.

        Raises:
            BindFailed: there is none yet for the slot, and none can be opened.
        """
        if self._shared:
            slot = 0
        elif slot not in self._by_slot:
            # At the same addresses: port 0 has become a port by now.
            addresses = [listener.address for listener in self._by_slot[0]]
            self._by_slot[slot] = _bind.open_listeners(addresses, backlog=self._backlog, reuseport=True)
        return [listener.socket for listener in self._by_slot[slot]]

    @property
    def first(self) -> Sequence[_bind.Listener]:
        """One listener for each address."""
        return self._by_slot[0]

    @property
    def all(self) -> list[tuple[int, _bind.Listener]]:
        """Every listener, with its slot."""
        return [(slot, listener) for slot, listeners in self._by_slot.items() for listener in listeners]

    def close(self, keep_path: bool = False) -> None:
        """Close them all; safe to call again.

        Args:
            keep_path: another process serves there now, so a Unix socket's file is to stay.
        """
        for listeners in self._by_slot.values():
            for listener in listeners:
                listener.close(keep_path=keep_path)


def _is_given(spec: str) -> bool:
    return spec.startswith(("fd:", "systemd"))
