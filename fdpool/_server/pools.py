"""The pools of a server: one for each generation of its code, so that new code comes in a fresh supervisor."""

from __future__ import annotations

from collections.abc import Sequence

from ..pool import Pool, StartMethod
from . import checks


class _Workers(Pool):
    """A pool whose every task is a server's worker, which has no use for what other tasks are likely to need: that
    costs its supervisor 80 ms, and each worker 0.2 MiB that it would share (measured)."""

    _IDLE_IMPORTS = ()
    _CLIENT_HEEDS_SIGNALS = True

    @property
    def is_over(self) -> bool:
        """True once nothing of it is left."""
        return self._client.life.is_over


class Pools:
    """Makes a generation's pool when its first worker is wanted. Not thread-safe, but for `close`.

    Args:
        preload: names of modules to import in each pool's supervisor.
        start_method: as for `Pool`.

    Attributes:
        interface: which kind of application it is, if that is known or guessed: what that needs is imported there, too.
    """

    #: Most workers of one generation at a time, the draining ones included. A slot costs nothing before it is used.
    MOST_WORKERS = 2 * checks.MOST_WORKERS

    def __init__(
        self, interface: str | None, preload: Sequence[str], start_method: StartMethod | None
    ) -> None:
        self.interface = interface
        self._preload = tuple(preload)
        self._start_method = start_method
        self._pools: dict[int, _Workers] = {}
        self._closing: list[_Workers] = []  # but for those that are over: a thousand slots take 0.6 MiB

    def of(self, generation: int, anew: bool = False) -> Pool:
        """The generation's pool; with `anew`, another one, as the one that there was is broken."""
        if anew:
            self.close(generation)
        pool = self._pools.get(generation)
        if pool is None:
            preload = [*checks.modules_to_serve(self.interface), *self._preload]
            # One task a worker: each server worker is to be a fresh process.
            pool = _Workers(
                self.MOST_WORKERS,
                max_tasks_per_child=1,
                preload=preload,
                start_method=self._start_method,
            )
            self._pools[generation] = pool
        return pool

    def kill(self, generation: int) -> None:
        """Kill what the generation's pool runs, its supervisor too if that does not do as it is told."""
        pool = self._pools.pop(generation, None)
        if pool is not None:
            pool.kill_workers()
            self._keep_until_over(pool)

    def close(self, generation: int) -> None:
        """The generation is over; its pool ends by itself. Does not wait."""
        pool = self._pools.pop(generation, None)
        if pool is not None:
            pool.shutdown(wait=False)
            self._keep_until_over(pool)

    def _keep_until_over(self, pool: _Workers) -> None:
        self._closing = [*(each for each in self._closing if not each.is_over), pool]

    def join(self, kill: bool = False) -> None:
        """End every pool, and wait until nothing of any is left.

        Args:
            kill: kill what still runs.
        """
        for generation in list(self._pools):
            self.close(generation)
        for pool in self._closing:
            if kill:
                pool.kill_workers()
            pool.shutdown(wait=True)
        self._closing.clear()
