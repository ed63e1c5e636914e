"""How the payload tests move an object: within this process, or through a fork and a real SCM_RIGHTS message."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable
from typing import Any

from fdpool import payload
from fdpool.payload import Payload


def deliver(sent: Payload) -> Any:
    """Load a payload as a receiver would; the descriptors are the payload's own."""
    return payload.loads(sent.body, sent.fds.detach() if sent.fds else [], sent.spilled)


def roundtrip(obj: object, **limits: int) -> Any:
    """`obj` as it comes out at the other end."""
    return deliver(payload.dumps(obj, **limits))


def deliver_failure(sent: Payload) -> BaseException:
    """Load a payload of `dumps_failure`."""
    return payload.loads_failure(sent.body, sent.fds.detach() if sent.fds else [], sent.spilled)


def in_another_process(fn: Callable[..., Any], *args: object) -> Any:
    """What `fn(*args)` returns when the call is sent to a forked process, and its result sent back."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        pid = os.fork()
        if pid == 0:
            try:
                here.close()
                called, values, keywords = _receive(there, payload.loads)
                result = called(*values, **keywords)
                del values
                _send(there, payload.dumps_result(result))
            except BaseException as error:
                _send(there, payload.dumps_failure(error), b"!")
            finally:
                os._exit(0)
        try:
            _send(here, payload.dumps_call(fn, args, {}))
            return _receive(here, payload.loads)
        finally:
            os.waitpid(pid, 0)


def _send(sock: socket.socket, sent: Payload, mark: bytes = b" ") -> None:
    fds = sent.fds.numbers if sent.fds else []
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([mark, b"S" if sent.spilled else b" ", sent.body], control)
    sent.close()


def _receive(sock: socket.socket, load: Callable[..., Any]) -> Any:
    data, control, _, _ = sock.recvmsg(200_000, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, part in control:
        fds.frombytes(part[: len(part) // 4 * 4])
    if data[:1] == b"!":
        raise payload.loads_failure(data[2:], list(fds), data[1:2] == b"S")
    return load(data[2:], list(fds), data[1:2] == b"S")


class Lock:
    """Something that cannot be pickled, and says so."""

    def __reduce__(self) -> Any:
        raise TypeError("a Lock stays where it is")


class Raises:
    """Raises `error` when unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return raise_it, (self.error,)


def raise_it(error: BaseException) -> None:
    raise error


class Boom:
    """Raises `error` when pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def same_description(a: int, b: int) -> bool:
    """True if two descriptors of seekable files share one open file description: they share its offset."""
    here = os.lseek(a, 0, os.SEEK_CUR)
    try:
        os.lseek(a, here + 7, os.SEEK_SET)
        return os.lseek(b, 0, os.SEEK_CUR) == here + 7
    finally:
        os.lseek(a, here, os.SEEK_SET)
