"""Where to listen, as it is written: `127.0.0.1:8000`, `unix:/run/x.sock?mode=660`, `fd:3`, `systemd:web`.

Pure: nothing is looked up or opened here. `_bind` does that.
"""

import os
import re
from typing import NamedTuple, NoReturn, Union

_MOST_PATH_BYTES = 107  # sun_path of unix(7), less its final NUL
_FORMS = (
    "HOST:PORT, [V6ADDRESS]:PORT, :PORT, unix:PATH, unix:PATH?mode=660, fd:NUMBER, systemd or systemd:NAME"
)


class Tcp(NamedTuple):
    """A port of a host; the host `""` is every address that this machine has, port 0 any that is free."""

    host: str
    port: int


class Unix(NamedTuple):
    """A path in the file system, or `@name` in Linux's abstract namespace; `mode` are permission bits."""

    path: str
    mode: int | None = None

    @property
    def is_abstract(self) -> bool:
        """True if no file stands for it."""
        return self.path.startswith("@")


class Inherited(NamedTuple):
    """A descriptor that was open when the process started.

    `owns` is the device and inode of the path that its listener has to remove at the end (`Listener.handover`).
    """

    number: int
    owns: tuple[int, int] | None = None


class FromSystemd(NamedTuple):
    """What the socket unit passed: all of it, or what has this name (FileDescriptorName=)."""

    name: str | None = None


Spec = Union[Tcp, Unix, Inherited, FromSystemd]


def parse(text: str) -> Spec:
    """What `text` asks for; it may have the form of a listener's address (`tcp://127.0.0.1:8000`), too.

    Raises:
        ValueError: it has none of the forms, or a part of it cannot be; the message says which.
    """
    if "\0" in text:
        _refuse(text, "it holds a NUL character")
    if text.startswith("unix:"):
        return _unix(text)
    if text.startswith("fd:"):
        return _inherited(text)
    if text == "systemd":
        return FromSystemd()
    if text.startswith("systemd:"):
        return FromSystemd(text[len("systemd:") :] or _refuse(text, "the name is missing"))
    return _tcp(text)


def _tcp(text: str) -> Tcp:
    place = text.removeprefix("tcp://")
    if "/" in place:
        _refuse(text, f"for a Unix socket write unix:{place}")
    host, colon, port = place.rpartition(":")
    if not colon:
        hint = (
            f"for a port of this machine write 127.0.0.1:{place}"
            if place.isdigit()
            else "the port is missing"
        )
        _refuse(text, hint)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            _refuse(text, "in brackets stands an IPv6 address")
    elif ":" in host:
        _refuse(text, f"an IPv6 address stands in brackets, as in [{host}]:{port or 8000}")
    elif any(character in host for character in "[]@? \t\n"):
        _refuse(text, f"{host!r} is no name of a host")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        _refuse(text, f"a port is a number from 0 to 65535, not {port!r}")
    return Tcp(host, int(port))


def _unix(text: str) -> Unix:
    path, mark, options = text[len("unix:") :].partition("?")
    if path.startswith("//"):  # as in a URL
        path = path[2:]
    if path in ("", "@"):
        _refuse(text, "the path is missing")
    if len(os.fsencode(path)) > _MOST_PATH_BYTES:
        _refuse(text, f"the path of a socket has at most {_MOST_PATH_BYTES} bytes (unix(7))")
    if not mark:
        return Unix(path)
    found = re.fullmatch("mode=([0-7]{3,4})", options)
    if found is None or int(found[1], 8) > 0o777:
        _refuse(text, f"after '?' stands mode= and three octal digits, as in mode=660, not {options!r}")
    if path.startswith("@"):
        _refuse(text, "an abstract socket has no file, so no mode either")
    return Unix(path, int(found[1], 8))


def _inherited(text: str) -> Inherited:
    found = re.fullmatch(r"fd:([0-9]{1,9})(?:\?owns=([0-9]+)-([0-9]+))?", text)
    if found is None:
        _refuse(text, "after 'fd:' stands the number of an open descriptor")
    number, device, inode = found.groups()
    return Inherited(int(number), None if device is None else (int(device), int(inode)))


def _refuse(text: str, reason: str) -> NoReturn:
    raise ValueError(f"cannot listen on {text!r}: {reason} (the forms are {_FORMS})")
