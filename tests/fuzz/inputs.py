"""What the fuzzer feeds: near misses of every message, made from nothing but the dice that it is given."""

from __future__ import annotations

import json
import logging
import pickle
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from fdpool import _messages
from fdpool._messages import HEADER_BYTES, MAX_DATAGRAM

MOST_FDS = 5

#: Task ids that no pool has reached.
STRANGERS = (0, 10**12, 2**63, 2**64 - 1)

TO_WORKER = (
    _messages.TASK,
    _messages.TASKS,
    _messages.CHUNK,
    _messages.FORGET,
)
TO_CLIENT = (
    _messages.READY,
    _messages.DONE,
    _messages.FAILED,
    _messages.REFUSED,
    _messages.BOOT_FAILED,
    _messages.ANSWERS,
    _messages.PIECE,
    _messages.CUT,
    _messages.LEFT,
    _messages.LOG,
    _messages.GOING,
)
_NESTED = {
    _messages.TASKS: (_messages.TASK, _messages.CHUNK, 77),
    _messages.ANSWERS: (_messages.DONE, _messages.FAILED, _messages.REFUSED, _messages.RETURNED, 77),
}
_HEADER = struct.Struct("<BBBxHHIQ")
_LENGTHS = (0, 1, HEADER_BYTES, 2**16, 2**31 - 1, 2**32 - 1)

# Pickles of what a body may hold, and of what it may not: wrong types, too few, too many.
_OBJECTS: tuple[Any, ...] = (
    None,
    0,
    "text",
    (),
    [],
    [1, 2, 3],
    {"a": 1},
    (abs, (-3,), {}),
    (abs, (), {}),
    (abs, 3, 4),
    (None, (), {}),
    (abs, [1, 2, 3], False),
    (abs, [1], True),
    ("ValueError", "text", [], "traceback", None, None),
    ("ValueError", "text", [], "traceback", b"no pickle", None),
)
_PICKLES = tuple(pickle.dumps(each, protocol=5) for each in _OBJECTS)
_RECORDS = tuple(
    pickle.dumps({**vars(logging.makeLogRecord({"name": "fuzz", "levelno": 40, "msg": "text"})), **wrong})
    for wrong in (
        {},
        {"name": None},
        {"name": 3},
        {"name": "fuzz.\0"},
        {"levelno": "40"},
        {"levelno": 2**70},
        {"msg": None, "args": (1, 2)},
        {"args": 3},
        {"exc_info": True},
        {"exc_text": 3},
        {"created": "today"},
        {"getMessage": None},
        {"__class__": 3},
    )
)
_NUMBERS = (0, 1, 3, 10, 11, 10**9, 2**31, 10**300, -1, 1.5, True, "1", None)
_TEXTS = ([], [""], ["3: /x"] * 3, ["x" * 300] * 10, [3], "text", None)


def noise(dice: random.Random, most: int) -> bytes:
    """Random bytes, but for one value that makes `pickle` allocate as much as it says: LONG_BINPUT.

    That is why a body is for its addressee alone, and comes from the user's own code (docs/security.md).
    """
    return dice.randbytes(dice.randint(0, most)).replace(b"r", b"q")


def body(dice: random.Random, kind: int, tasks: Sequence[int]) -> bytes:
    """A body as a message of this kind has it, or nearly."""
    if dice.random() < 0.1:
        return noise(dice, 30)
    if kind in _NESTED:
        parts = [message(dice, _NESTED[kind], tasks, 0) for _ in range(dice.randint(0, 4))]
        return b"".join(parts)
    if kind in (_messages.FORGET, _messages.GOING):
        return noise(dice, 20)
    if kind == _messages.LEFT:
        return leftovers(dice)
    if kind == _messages.LOG and dice.random() < 0.7:
        return dice.choice(_RECORDS)
    if kind == _messages.REFUSED:
        return _messages.REFUSAL.pack(dice.randint(0, 9), dice.randint(0, 9)) + noise(dice, 9)
    pickled = dice.choice(_PICKLES)
    if dice.random() < 0.3:
        pickled = pickled[: dice.randint(0, len(pickled))]
    if kind == _messages.CHUNK:
        return _messages.SPAN.pack(dice.randint(0, 5), dice.choice((0, 1, 3, 5, 2**32 - 1))) + pickled
    return pickled


def leftovers(dice: random.Random) -> bytes:
    """What tasks have left behind, in the form in which a worker tells, or nearly."""
    each: tuple[Any, ...] = ([0, []], [1, ["3: /x"]], [1, ["3: /x"]], [12, ["x"] * 10])
    fields: list[Any] = ["task", 1, *(dice.choice(each) for _ in range(3)), ""]
    wrong = dice.randint(0, 11)
    if wrong < len(fields):
        fields[wrong] = dice.choice((*_NUMBERS, *_TEXTS, [dice.choice(_NUMBERS), dice.choice(_TEXTS)]))
    content = json.dumps(fields[: dice.randint(0, 5)] if wrong == 6 else fields).encode()
    return content[: dice.randint(0, len(content))] if wrong == 7 else content


def message(dice: random.Random, kinds: Sequence[int], tasks: Sequence[int], fd_count: int) -> bytes:
    """A header and its body, one of them perhaps wrong in one place."""
    kind = dice.choice(kinds)
    content = body(dice, kind, tasks)
    fields = [_messages.VERSION, kind, 0, fd_count, dice.randint(0, 6), len(content), dice.choice(tasks)]
    wrong = dice.randint(0, 11)
    if wrong < len(fields):
        fields[wrong] = (
            dice.randint(0, 255),
            dice.choice((*kinds, 0, 99)),
            dice.randint(0, 255),
            dice.randint(0, 300),
            0xFFFF,
            dice.choice(_LENGTHS),
            dice.choice(tasks),
        )[wrong]
    data = _HEADER.pack(*fields) + content
    if wrong == 7:
        return data[: dice.randint(0, len(data))]
    if wrong == 8:
        return data + noise(dice, 9)
    return data


def datagram(
    dice: random.Random, kinds: Sequence[int], tasks: Sequence[int] = STRANGERS
) -> tuple[bytes, int]:
    """A datagram of the task link, or nearly, and how many descriptors it is to carry."""
    fd_count = dice.choice((0, 0, 0, 0, 1, 2, 3, 4, MOST_FDS))
    what = dice.random()
    if what < 0.1:
        return noise(dice, 60), fd_count
    if what < 0.101:  # cut by the receiver
        return message(dice, kinds, tasks, fd_count) + bytes(MAX_DATAGRAM), fd_count
    return message(dice, kinds, tasks, fd_count), fd_count


def pieces(dice: random.Random, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """A stream of frames, one of which may lie about its length, cut anywhere; descriptors on any piece."""
    frames = []
    for _ in range(dice.randint(1, 4)):
        content = dice.randbytes(dice.randint(0, max_bytes + 2))
        told = len(content) if dice.random() < 0.8 else dice.choice(_LENGTHS)
        frames.append(told.to_bytes(4, "little") + content)
    data = b"".join(frames)
    while data:
        size = dice.randint(1, 40)
        yield data[:size], dice.choice((0, 0, 0, 1, MOST_FDS))
        data = data[size:]


def session_message(dice: random.Random, programs: Sequence[str]) -> object:
    """What a client of the exec hand-off might say, or nearly."""
    request: dict[str, Any] = {
        "file": dice.choice(programs),
        "argv": dice.choice((["x"], ["x", "y"], [], "x", [1], None)),
        "workdir": dice.choice(("/", "/", "/no such folder", "", 3)),
        "env": dice.choice(({}, {"A": "1"}, {"A": 1}, {"A=B": "1"}, [], {"A": "\0"})),
    }
    if dice.random() < 0.2:
        del request[dice.choice(sorted(request))]
    return dice.choice(
        (
            request,
            request,
            {"fds": dice.choice(([], [0], [0, 1, 2], [1, 1], [-1], [2**40], "0", [True], [200]))},
            {"signal": dice.choice((2, 15, 9, 0, -1, "2", 2**40, True))},
            dice.choice((None, 1, "text", [], {}, [[]])),
        )
    )


def session_frame(dice: random.Random, programs: Sequence[str]) -> tuple[bytes, int]:
    """The bytes of such a frame, with descriptors; now and then no JSON, or no frame."""
    content = json.dumps(session_message(dice, programs)).encode()
    what = dice.random()
    if what < 0.1:
        content = noise(dice, 40)
    told = len(content) if what < 0.95 else dice.choice(_LENGTHS)
    return told.to_bytes(4, "little") + content, dice.choice((0, 0, 1, 3, MOST_FDS))
