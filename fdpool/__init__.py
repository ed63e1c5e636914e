"""fdpool: a process pool whose tasks carry open files, pipes and sockets.

Names are imported when first used: the supervisor and the workers need few of them, and their start-up
is somebody's waiting time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._broken import PoisonTask as PoisonTask
    from ._broken import PoolBroken as PoolBroken
    from ._broken import WorkerLost as WorkerLost
    from ._completed import CommandFailed as CommandFailed
    from ._completed import CommandTimedOut as CommandTimedOut
    from ._completed import CompletedCommand as CompletedCommand
    from ._completed import SpawnError as SpawnError
    from ._pipeline import CompletedPipeline as CompletedPipeline
    from ._shared import Shared as Shared
    from ._tasks import TaskFuture as TaskFuture
    from .aio import AsyncDatagramSocket as AsyncDatagramSocket
    from .aio import AsyncSocket as AsyncSocket
    from .errors import BindFailed as BindFailed
    from .errors import DescriptorRefused as DescriptorRefused
    from .errors import DescriptorsExhausted as DescriptorsExhausted
    from .errors import FdpoolError as FdpoolError
    from .errors import FdTransferError as FdTransferError
    from .errors import ForkedPool as ForkedPool
    from .errors import MemoryLimitExceeded as MemoryLimitExceeded
    from .errors import NotLoadable as NotLoadable
    from .errors import NotPicklable as NotPicklable
    from .errors import PayloadTooLarge as PayloadTooLarge
    from .errors import PoolShutDown as PoolShutDown
    from .errors import ReloadFailed as ReloadFailed
    from .errors import RemoteError as RemoteError
    from .errors import RemoteTraceback as RemoteTraceback
    from .errors import ServerFailed as ServerFailed
    from .errors import TaskTerminated as TaskTerminated
    from .errors import TaskTimeout as TaskTimeout
    from .errors import WireError as WireError
    from .exec_server import ExecServer as ExecServer
    from .fds import Fd as Fd
    from .pool import Pool as Pool
    from .running import RunningCommand as RunningCommand
    from .server import Server as Server
    from .server import ServerStats as ServerStats
    from .server import ServerWorker as ServerWorker
    from .server import WorkerStats as WorkerStats
    from .server import current_worker as current_worker
    from .sockets import DatagramSocket as DatagramSocket
    from .sockets import StreamSocket as StreamSocket
    from .stats import LeftStats as LeftStats
    from .stats import PoolStats as PoolStats
    from .stats import PoolWorkerStats as PoolWorkerStats

__version__ = "0.1.0"

_HOMES = {
    "aio": ("AsyncDatagramSocket", "AsyncSocket"),
    "_broken": ("PoisonTask", "PoolBroken", "WorkerLost"),
    "_completed": ("CommandFailed", "CommandTimedOut", "CompletedCommand", "SpawnError"),
    "_pipeline": ("CompletedPipeline",),
    "_shared": ("Shared",),
    "_tasks": ("TaskFuture",),
    "errors": (
        "BindFailed",
        "DescriptorRefused",
        "DescriptorsExhausted",
        "FdTransferError",
        "FdpoolError",
        "ForkedPool",
        "MemoryLimitExceeded",
        "NotLoadable",
        "NotPicklable",
        "PayloadTooLarge",
        "PoolShutDown",
        "ReloadFailed",
        "RemoteError",
        "RemoteTraceback",
        "ServerFailed",
        "TaskTerminated",
        "TaskTimeout",
        "WireError",
    ),
    "exec_server": ("ExecServer",),
    "fds": ("Fd",),
    "pool": ("Pool",),
    "running": ("RunningCommand",),
    "server": ("Server", "ServerStats", "ServerWorker", "WorkerStats", "current_worker"),
    "sockets": ("DatagramSocket", "StreamSocket"),
    "stats": ("LeftStats", "PoolStats", "PoolWorkerStats"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - made from the table, so that no name is in one and not the other


if not TYPE_CHECKING:  # to a type checker any name would be there

    def __getattr__(name: str) -> Any:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f".{home}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
