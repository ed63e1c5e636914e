"""Every message that crosses a process boundary: the datagrams of the task link, and the control link's.

Task link (client <-> worker): a header of 20 bytes, then the body. The header says everything that is
needed to own, route or refuse the message; the body is a payload that only its addressee unpickles.
Control link (client <-> supervisor): each frame is one of the records below, pickled. Both ends are
this package's own code, and no worker holds an end of it.
"""

import errno
import pickle
from collections.abc import Callable
from struct import Struct
from struct import error as StructError
from typing import NamedTuple, Union

from .errors import WireError

VERSION = 1

#: Largest datagram of the task link, in bytes: what `payload` keeps inline, and room for headers. Far below
#: SO_SNDBUF - 32 (212,960 by default, measured), so that no message can be too large to send; a receiver's
#: buffer of this size never truncates.
MAX_DATAGRAM = 68 * 1024

# -- task link -----------------------------------------------------------------------------------

_HEADER = Struct("<BBBxHHIQ")  # the fields of `Header`, and a byte of padding
HEADER_BYTES = _HEADER.size
MAX_BODY = MAX_DATAGRAM - HEADER_BYTES

# Flags:
SPILLED = 1  # the first descriptor is a memory file, which the rest of the payload is in
RELEASED = 2  # of an answer: nobody sees the memory file of the task any more
WAITED = 4  # of an answer: most of that time the worker did not run

# Kinds. To the worker:
TASK = 1  # body: the call
LEAVE = 2  # finish: no task follows
TASKS = 3  # body: several calls, each with a TASK header of its own; they are run in this order
CHUNK = 4  # body: SPAN, then (function, items, whether to unpack them): run these items of it
FORGET = 5  # body: the token of a shared object that no task takes any more
# To the client:
READY = 16  # the initializer is done, tasks are taken
DONE = 17  # body: the result
FAILED = 18  # body: the exception
REFUSED = 19  # the task never ran, as its descriptors did not all arrive; body: REFUSAL, then a reason
BOOT_FAILED = 20  # body: the exception that the initializer raised
ANSWERS = 21  # body: several answers, each with a header of its own, to tasks that came together
RETURNED = 22  # only in ANSWERS: the task was not begun, and will not be, as the client asked for it back
PIECE = 23  # body: results of a chunk, which are counted in `micros`; more will follow
CUT = 24  # the same, but the rest of the chunk has not begun, and will not
LEFT = 25  # what tasks have left behind in their worker; body: JSON
LOG = 26  # body: the fields of a log record
GOING = 27  # the worker takes no more tasks, and ends as soon as its threads and exit handlers let it

SPAN = Struct("<II")  # the first item, and the one behind the last
REFUSAL = Struct("<HH")  # descriptors wanted, descriptors got


#: Errors of sendmsg(2) that pass: too many descriptors in flight for this user, or no memory for the
#: message (unix(7)). What is in flight will land.
MAY_YET_LAND = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)


def explain_loss(wanted: int, got: int, receiver: str) -> str:
    """Say that descriptors were lost between processes, and why that may be."""
    return (
        f"{receiver} received {got} of {wanted} descriptors: it may be at its limit of open files "
        "(RLIMIT_NOFILE, `ulimit -n`), the control buffer was too small, or a security module (SELinux, "
        "AppArmor) forbids the transfer"
    )


class Header(NamedTuple):
    """The first 20 bytes of a datagram, as they are unpacked."""

    version: int
    kind: int
    flags: int
    fd_count: int
    micros: int  # of an answer: how long the worker was busy with it, 65535 for any longer
    body_bytes: int
    task: int

    @property
    def spilled(self) -> bool:
        """As in `Payload.spilled`."""
        return bool(self.flags & SPILLED)

    @property
    def released(self) -> bool:
        """Of an answer: nobody sees the memory file of the task any more."""
        return bool(self.flags & RELEASED)

    @property
    def waited(self) -> bool:
        """Of an answer: most of that time the worker did not run."""
        return bool(self.flags & WAITED)


_new: Callable[..., Header] = tuple.__new__  # half the cost of Header(...), which is a Python function


def pack_header(
    kind: int, task: int = 0, body_bytes: int = 0, fd_count: int = 0, flags: int = 0, micros: int = 0
) -> bytes:
    """The header of a datagram whose body and descriptors are those counted here."""
    return _HEADER.pack(
        VERSION, kind, flags, fd_count, micros if micros < 0xFFFF else 0xFFFF, body_bytes, task
    )


def unpack_header(data: bytes) -> Header:
    """Take a datagram's header apart, checked against the datagram's true length.

    Raises:
        WireError: too short, of another version, or its length is not what the header says.
    """
    try:
        header = _new(Header, _HEADER.unpack_from(data))
    except StructError:
        raise WireError(
            f"a datagram of {len(data)} bytes is shorter than its {HEADER_BYTES}-byte header"
        ) from None
    if header.version != VERSION:
        raise WireError(f"a datagram speaks version {header.version}, this side speaks {VERSION}")
    if header.body_bytes != len(data) - HEADER_BYTES:
        raise WireError(
            f"a header promises {header.body_bytes} bytes of body, the datagram has {len(data) - HEADER_BYTES}"
        )
    return header


def split(data: bytes, start: int = HEADER_BYTES) -> list[tuple[int, int, bytes]]:
    """The (kind, task, body) of each message in `data`, which holds one after the other from `start`.

    Raises:
        WireError: the lengths do not add up.
    """
    found: list[tuple[int, int, bytes]] = []
    end = len(data)
    while start < end:
        if end - start < HEADER_BYTES:
            raise WireError(f"{end - start} bytes after the last of {len(found)} messages in one datagram")
        _, kind, _, _, _, body_bytes, task = _HEADER.unpack_from(data, start)
        start += HEADER_BYTES + body_bytes
        found.append((kind, task, data[start - body_bytes : start]))
    if start > end:
        raise WireError(f"a message in a datagram of {end} bytes claims to reach to {start}")
    return found


def is_sound(data: bytes) -> bool:
    """True if a datagram is one of ours."""
    try:
        return unpack_header(data).kind != TASKS or bool(split(data))
    except WireError:
        return False


def tasks_in(data: bytes) -> list[int]:
    """The tasks that a sound datagram to a worker holds calls of."""
    header = unpack_header(data)
    if header.kind == TASKS:
        return [task for _, task, _ in split(data)]
    return [header.task] if header.kind in (TASK, CHUNK) else []


def split_chunk(data: bytes) -> tuple[int, int, bytes]:
    """The first item of a CHUNK datagram, the one behind its last, and the pickle; an empty one if it is too short."""
    head = HEADER_BYTES + SPAN.size
    start, stop = SPAN.unpack_from(data, HEADER_BYTES) if len(data) >= head else (0, 0)
    return start, stop, data[head:]


def split_refusal(body: bytes) -> tuple[int, int, str]:
    """Of the body of a REFUSED message: descriptors wanted, descriptors got, and the reason."""
    wanted, got = REFUSAL.unpack_from(body) if len(body) >= REFUSAL.size else (0, 0)
    return wanted, got, body[REFUSAL.size :].decode(errors="replace")


# -- control link: to the supervisor ---------------------------------------------------------------


class Recycling(NamedTuple):
    """When a worker leaves by itself, to be replaced by a fresh one; None for never."""

    max_tasks: int | None = None  # after so many
    max_memory: int | None = None  # bytes of resident memory that it has more than after a task
    max_fds_growth: int | None = None  # descriptors that it has more than at first


class Configure(NamedTuple):
    """The first frame: what every worker is to be.

    Its first descriptor is the file of the `Board`, the others belong to the initializer's payload.
    """

    token: str  # which no other supervisor has, in the marks of its workers
    argv: list[str]
    path: list[str]
    preload: tuple[str, ...]
    idle_imports: tuple[str, ...]  # names of modules, too, for the first idle moment
    initializer: bytes | None  # payload body of the call, or None
    initializer_spilled: bool
    recycling: Recycling
    log_level: int | None  # from which log records are sent to the client, if at all
    client_heeds_signals: bool  # and so the supervisor is to ignore them


class StartWorker(NamedTuple):
    """Fork a worker for `slot`; the frame's one descriptor is the worker's end of the slot's pair."""

    slot: int
    generation: int


class EndWorker(NamedTuple):
    """End a worker and all its descendants: SIGTERM, `grace_s` seconds, then SIGKILL; its `stacks` first, if wanted."""

    slot: int
    generation: int
    grace_s: float
    stacks: bool = False


class Lend(NamedTuple):
    """Fork this supervisor for another pool of the same client.

    The descriptors are its control link, its working directory, and those of its standard streams that are named.
    """

    environment: list[tuple[bytes, bytes]]
    umask: int
    streams: list[int]


class Quit(NamedTuple):
    """Every worker has gone or is to go now: kill what is left of the tree, then exit."""


# -- control link: to the client ---------------------------------------------------------------------


class Born(NamedTuple):
    """The first frame of a supervisor that was forked from another one; its descriptor is the supervisor's pidfd."""

    pid: int


class WorkerStarted(NamedTuple):
    """A worker runs; the frame's descriptor, if there is one, is its pidfd."""

    slot: int
    generation: int
    pid: int


class WorkerExited(NamedTuple):
    """A worker has died and was reaped; what was left of its process group has been killed."""

    slot: int
    generation: int
    pid: int
    status: int | None  # as waitpid(2) gives it; None if unknown
    stacks: str = ""  # what it left of them, at a fault or as it was asked
    hint: str = ""  # who may have killed it, if it was not the supervisor


class StartFailed(NamedTuple):
    """No worker could be forked for the slot."""

    slot: int
    generation: int
    reason: str
    for_now: bool  # it is for want of what may come again: processes, memory, descriptors


class PreloadFailed(NamedTuple):
    """A module of `preload` could not be imported: no worker will ever start."""

    module: str
    reason: str
    traceback: str


ToSupervisor = Union[Configure, StartWorker, EndWorker, Lend, Quit]
ToClient = Union[WorkerStarted, WorkerExited, StartFailed, PreloadFailed]


def encode_control(message: ToSupervisor | ToClient | Born) -> bytes:
    """The frame body of one control message."""
    return pickle.dumps(message, protocol=5)


def decode_control(data: bytes) -> ToSupervisor | ToClient | Born:
    """The control message of one frame body; only for frames of the pool's own processes."""
    message: ToSupervisor | ToClient | Born = pickle.loads(data)
    return message
