"""A pool's supervisor, as the client deals with it: started, or borrowed from another pool; lent to one; replaced after
it was killed; buried.

Nothing here waits, save `bury`. With the client's lock held, where it does not say otherwise.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import _control, _lending, _messages, _process, _trees
from ._clock import CLOCK
from ._dispatch import Action
from .fds import OwnedFds
from .payload import Payload

if TYPE_CHECKING:
    from ._client import Client

_RESTARTS_AFTER_S = 60.0  # a supervisor is replaced if none was in so long; else something is wrong for good


class Setup(NamedTuple):
    """How a pool's workers come to be.

    Attributes:
        fork: start the supervisor by forking this process.
        preload: names of modules that it imports before it forks.
        idle_imports: names of modules that it imports in its first idle moment, for the workers that it forks later.
        initializer: payload of a call that each worker runs first, or None; owned by whoever has this.
        inherited: with `fork`, that call as it stands, if there is no payload of it.
        recycling: when a worker leaves by itself.
        log_level: from which log records of workers are handled here, or None.
        client_heeds_signals: this process does, of those that would end the supervisor.
    """

    fork: bool
    preload: tuple[str, ...]
    idle_imports: tuple[str, ...]
    initializer: Payload | None
    inherited: Callable[[], object] | None
    recycling: _messages.Recycling
    log_level: int | None
    client_heeds_signals: bool


class Supervision:
    """The supervisor of `client`, which is to be made as `setup` says.

    Attributes:
        control: the link to it; None before it is started.
        restarts: how often it had to be replaced.
        given_up: why this one was killed from here, or empty.
    """

    def __init__(self, client: "Client", setup: Setup) -> None:
        self._client = client
        self._setup: Setup | None = setup
        self.control: _control.ControlLink | None = None
        self.restarts = 0
        self.given_up = ""
        self._restarted_at = -_RESTARTS_AFTER_S

    def start(self) -> None:
        """Start one.

        Raises:
            OSError: it cannot be started.
        """
        board, setup = self._client.board, self._setup
        assert board is not None
        assert setup is not None
        self.control = _control.ControlLink(
            setup.fork,
            _control.configuration(
                setup.preload,
                setup.idle_imports,
                setup.initializer,
                setup.recycling,
                setup.log_level,
                setup.client_heeds_signals,
            ),
            board.fd,
            setup.initializer,
            setup.inherited,
            self._lender,
        )
        self._setup = setup._replace(inherited=None)

    def replace(self, wanted: bool) -> bool:
        """Kill what is left of the supervisor, which is dead, and if one is `wanted` start another; True if so.

        Not if it was a fork of this process: that would have to be forked again, has changed, and has threads. Nor if
        anything of it may still live, as it might take tasks from the same inboxes. Nor twice in a minute.
        """
        board, setup = self._client.board, self._setup
        assert board is not None
        assert setup is not None
        assert self.control is not None
        now = CLOCK.monotonic()
        nothing_lives = _trees.kill_marked(self.control.mark, board.fd)
        soon = now - self._restarted_at < _RESTARTS_AFTER_S
        if not wanted or setup.fork or not nothing_lives or soon:
            return False
        try:
            self.start()
        except (OSError, RuntimeError):
            return False
        self._restarted_at = now
        self.restarts += 1
        self.given_up = ""
        return True

    def give_up(self, why: str) -> None:
        """Kill it, as it does not do what it is for: that it has gone is dealt with as ever."""
        if self.control is not None:
            self.given_up = why
            self.control.kill()

    def tell(self, message: _messages.ToSupervisor, numbers: Sequence[int] = ()) -> bool:
        """Send a message; False if some of it could not go at once, and `flush` is to be called."""
        return self.control is None or self.control.tell(message, numbers)

    def flush(self) -> bool:
        """Send what could not go at once; True if nothing is left of it."""
        return self.control is None or self.control.flush()

    def bury(self, limit_s: float) -> int | None:
        """Wait for its end, kill it after `limit_s` seconds; its wait status, if that is known."""
        return None if self.control is None else self.control.bury(limit_s)

    def close(self) -> None:
        """Close what is held for it. Safe to call again."""
        for owned in (self.control, self._setup and self._setup.initializer):
            if owned is not None:
                owned.close()
        self.control = self._setup = None

    # -- among the pools of this process -------------------------------------------------------------------

    def may_lend(self, likeness: _lending.Likeness) -> bool:
        """From any thread. True if a fork of this one is as good as a fresh one would be."""
        control = self.control
        if control is None or not self._client.life.runs_tasks:
            return False
        return control.was_heard and control.likeness == likeness and _lending.is_as_confined(control.pid)

    def lend(self, message: _messages.Lend, owned: OwnedFds) -> None:
        """From any thread. Have this one forked for another pool."""
        self._client.critical.post(self._tell_and_close, message, owned)

    def _tell_and_close(self, message: _messages.Lend, owned: OwnedFds) -> Sequence[Action]:
        try:
            self._client.tell(message, owned.numbers)
        except OSError:
            pass  # no descriptor is left for that: nothing to this pool, and the other one does without
        finally:
            owned.close()
        return ()

    def _lender(self, likeness: _lending.Likeness) -> _control.Lender | None:
        """What asks a supervisor of another pool to be forked for this one; None if there is none."""
        for owner in _process.owners():
            other = getattr(owner, "supervision", None)
            if isinstance(other, Supervision) and other is not self and other.may_lend(likeness):
                return other.lend
        return None
