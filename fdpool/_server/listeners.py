"""A server's listeners: one set that all workers share, or one for each slot (SO_REUSEPORT).

A listener of a slot's own outlives the slot's workers, as a connection that the kernel has put into its queue can be
taken there and nowhere else: the next worker of the slot goes on with the same listener.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from .. import _bind
from .._bind_spec import Spec, Tcp, Unix, parse
from . import steering

Given = str | int | socket.socket


class Listeners:
    """All listeners of a server; owned. Not thread-safe: made by the caller, then the loop's.

    Args:
        bind: as for `_bind.open_listeners`.
        reuseport: each slot has its own.
        slots: for how many to open them now, with `reuseport`.
        inherited: of the process that this one is to replace, by the bind they were opened for (`keys_of`): slot, and
            the bind that makes each here. They are taken instead of opening others; until `take_over` that process
            serves there, too, and the files of its Unix sockets are left alone.
        served: of how many slots those get connections.

    Attributes:
        served: of how many slots the listeners get connections, where each has its own.

    Raises: as `_bind.open_listeners`; nothing is left open.
    """

    def __init__(
        self,
        bind: _bind.Bind,
        backlog: int,
        reuseport: bool,
        slots: int,
        inherited: Mapping[str, Sequence[tuple[int, str]]] = {},
        served: int = 1,
    ) -> None:
        self._backlog = backlog
        self._shared = not reuseport
        self._by_slot: dict[int, dict[str, list[_bind.Listener]]] = {}
        # Whose files are those of the process that is to be replaced; and where nobody serves once it is.
        self._theirs: list[_bind.Listener] = []
        self._unwanted: list[_bind.Listener] = []
        groups = dict(_groups(bind))
        if not groups:
            raise ValueError("there is nothing to listen on: no bind was given")
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            for key, given in groups.items():
                self._open_first(key, given, inherited.get(key, ()))
            for key in inherited.keys() - groups.keys():
                self._unwanted += _bind.open_listeners([bind for _, bind in inherited[key]])
            self.served = slots if reuseport else 1
            if inherited:
                self.steer(min(self.served, served))
            elif reuseport:
                self.prepare(slots)
            opened.pop_all()

    def _open_first(self, key: str, given: list[Given], handed: Sequence[tuple[int, str]]) -> None:
        """Have the listeners of one bind: those that were handed to us, or else new ones in slot 0."""
        slots = sorted({slot for slot, _ in handed})
        for slot in slots:
            binds = [bind for each, bind in handed if each == slot]
            found = _bind.open_listeners(binds, backlog=self._backlog, reuseport=not self._shared)
            self._theirs += found
            self._add(slot, key, found)
        if not slots:
            found = _bind.open_listeners(given, backlog=self._backlog, reuseport=not self._shared)
            self._add(0, key, found)
            if not _is_given(given):
                for listener in found:
                    # Ours alone. The mode of a socket that was given is not ours to change; `_server.accept` has a way
                    # for those.
                    os.set_blocking(listener.socket.fileno(), False)

    def _add(self, slot: int, key: str, listeners: list[_bind.Listener]) -> None:
        self._by_slot.setdefault(slot, {}).setdefault(key, []).extend(listeners)

    def of(self, slot: int) -> list[socket.socket]:
        """The sockets that a worker of this slot accepts from; borrowed.

        Raises:
            BindFailed: there is none yet for the slot, and none can be opened.
        """
        slot = 0 if self._shared else slot
        for number in range(slot + 1):  # in their order, which is how `steer` counts them
            self._have(number)
        return [listener.socket for _, each, listener in self.all() if each == slot]

    def _have(self, slot: int) -> None:
        missing = [
            (key, listener)
            for key, listeners in self._by_slot[0].items()
            if key not in self._by_slot.get(slot, {})  # also a bind that the process before did not have
            for listener in listeners
        ]
        with contextlib.ExitStack() as opened:
            found = [
                (key, opened.enter_context(_bind.open_beside(listener, backlog=self._backlog)))
                for key, listener in missing
            ]
            opened.pop_all()
        for key, listener in found:
            os.set_blocking(listener.socket.fileno(), False)
            self._add(slot, key, [listener])

    def prepare(self, slots: int) -> None:
        """Have the listeners of so many slots. Those that are new get connections as soon as `steer` says so; where
        that cannot be, at once.

        Raises:
            BindFailed: one cannot be opened.
        """
        self.of(slots - 1)

    def steer(self, slots: int) -> bool:
        """With a listener for each slot: have only those of the first `slots` get connections. False if that cannot be.

        The others stay open, for when they are wanted again. Who opens more has steered before, or those are chosen.
        """
        if len(self._by_slot) == 1 and self._shared:
            return True
        steered = all(steering.steer(listener.socket, slots) for listener in self.first)
        if steered:
            self.served = slots
        return steered

    def queued_above(self, slots: int) -> int:
        """How many connections wait at listeners of slots from `slots` on."""
        if self._shared:
            return 0
        return sum(steering.queued(each.socket) for _, slot, each in self.all() if slot >= slots)

    @property
    def slots(self) -> int:
        """How many have listeners of their own; 1 where all share the same."""
        return 1 if self._shared else len(self._by_slot)

    @property
    def are_apart(self) -> bool:
        """True if each slot has its own."""
        return not self._shared

    @property
    def first(self) -> list[_bind.Listener]:
        """One listener for each address."""
        return [listener for _, slot, listener in self.all() if slot == 0]

    def all(self) -> Iterator[tuple[str, int, _bind.Listener]]:
        """Every listener, with its bind (as in `keys_of`) and its slot."""
        for slot, groups in list(self._by_slot.items()):
            for key, listeners in groups.items():
                for listener in listeners:
                    yield key, slot, listener

    def take_over(self) -> None:
        """The process that handed some to this one is about to leave: the files of their Unix sockets are ours now, and
        which of them get connections is ours to say."""
        self.steer(self.served)
        self._theirs.clear()
        while self._unwanted:
            self._unwanted.pop().close()

    def close(self, keep_path: bool = False) -> None:
        """Close them all; safe to call again.

        Args:
            keep_path: another process serves there now, so a Unix socket's file is to stay.
        """
        for _, _, listener in self.all():
            listener.close(keep_path=keep_path or listener in self._theirs)
        for listener in self._unwanted:
            listener.close(keep_path=True)


def keys_of(bind: _bind.Bind) -> list[str]:
    """By which texts the listeners of a bind are handed on."""
    return [key for key, _ in _groups(bind)]


def _groups(bind: _bind.Bind) -> Iterator[tuple[str, list[Given]]]:
    """What is to be opened together, each with a text by which the same program finds it again in its next process."""
    # Bytes are refused as they are opened: they are a sequence of numbers, too, which would be taken for ports.
    is_one = isinstance(bind, (str, bytes, bytearray, int, socket.socket))
    given: list[Given] = [bind] if is_one else list(bind)  # type: ignore[list-item, arg-type]
    passed = [each for each in given if isinstance(each, str) and each.startswith("systemd")]
    seen: Counter[str] = Counter()
    for number, each in enumerate(given):
        if isinstance(each, str) and each in passed:
            if each == passed[0]:
                # In one call, as each of them takes what the others leave.
                yield " ".join(sorted(set(passed))), list(passed)
        elif isinstance(each, (str, int)):
            spec = parse(each) if isinstance(each, str) else Tcp("127.0.0.1", each)
            key = _in_one_way(spec, str(each))
            seen[key] += 1
            # A free port is another one each time; what else is asked for twice is the same listener.
            is_another = seen[key] > 1 and isinstance(spec, Tcp) and spec.port == 0
            yield f"{key} ({seen[key]})" if is_another else key, [each]
        else:
            yield f"socket {number}", [each]


def _in_one_way(spec: Spec, text: str) -> str:
    """The bind, in the same words however it is written: the program's next code may write it in another way."""
    if isinstance(spec, Tcp):
        host = f"[{spec.host}]" if ":" in spec.host else spec.host
        return f"{host.lower()}:{spec.port}"
    if isinstance(spec, Unix):
        with contextlib.suppress(FileNotFoundError):  # the working directory has been removed
            mode = "" if spec.mode is None else f"?mode={spec.mode:o}"
            return f"unix:{spec.path if spec.is_abstract else os.path.abspath(spec.path)}{mode}"
    return text


def _is_given(group: Sequence[Given]) -> bool:
    """True for sockets that somebody else has opened, and may rely on."""
    return any(isinstance(each, socket.socket) or str(each).startswith(("fd:", "systemd")) for each in group)
