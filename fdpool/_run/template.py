"""Replacement strings: what `{}` and its kin stand for in an argument or in the name of an output file.

{}    the name          {/}   its last part             {#}  number of the job, from 1
{.}   without its end   {/.}  last part without its end  {%}  number of the program's place, 1 to -j
{//}  its folder
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence

# `${#}` is the shell's count of its arguments, and stays.
_STRING = re.compile(rb"((?<!\$)\{#\}|\{(?:%|//|/?\.?)\})")


def _folder(name: bytes) -> bytes:
    return os.path.dirname(name.rstrip(b"/") or name) or b"."


def _last(name: bytes) -> bytes:
    return os.path.basename(name.rstrip(b"/")) or name[:1]


# As dirname(1) and basename(1); and a name that only begins with a dot has no end.
_OF_NAME: dict[bytes, Callable[[bytes], bytes]] = {
    b"{}": lambda name: name,
    b"{.}": lambda name: os.path.splitext(name)[0],
    b"{/}": _last,
    b"{//}": _folder,
    b"{/.}": lambda name: os.path.splitext(_last(name))[0],
}


class Template:
    """A text with replacement strings.

    Attributes:
        of_name: one of them stands for a name, or for a part of it.
        of_slot: one of them is `{%}`.
    """

    __slots__ = ("_parts", "of_name", "of_slot")

    def __init__(self, text: bytes) -> None:
        self._parts = _STRING.split(text)  # every second one is a replacement string
        self.of_name = any(part in _OF_NAME for part in self._parts[1::2])
        self.of_slot = b"{%}" in self._parts[1::2]

    @property
    def is_constant(self) -> bool:
        """True without any replacement string."""
        return len(self._parts) == 1

    def fill(self, name: bytes, seq: int, slot: int | None) -> bytes:
        """The text for one name. Without a slot, `{%}` stays as it is."""
        parts = self._parts.copy()
        for at in range(1, len(parts), 2):
            if parts[at] in _OF_NAME:
                parts[at] = _OF_NAME[parts[at]](name)
            elif parts[at] == b"{#}":
                parts[at] = b"%d" % seq
            elif slot is not None:
                parts[at] = b"%d" % slot
        return b"".join(parts)


class Program:
    """A program and its arguments, to be filled in for each job.

    Args:
        append: names that no argument has a place for come at the end.
    """

    def __init__(self, arguments: Sequence[bytes], append: bool) -> None:
        self._templates = [Template(argument) for argument in arguments]
        self._appends = append and not any(template.of_name for template in self._templates)
        self.name = self._templates[0]

    @property
    def of_slot(self) -> bool:
        """True if an argument depends on the program's place."""
        return any(template.of_slot for template in self._templates)

    def fill(self, names: Sequence[bytes], seq: int, slot: int | None) -> list[bytes]:
        """The arguments for one job; one that a name stands in is there once for each name."""
        filled: list[bytes] = []
        for template in self._templates:
            filled += [template.fill(name, seq, slot) for name in (names if template.of_name else names[:1])]
        return filled + list(names) if self._appends else filled


def quoted(argument: bytes) -> bytes:
    """As a shell reads it back."""
    return os.fsencode(shlex.quote(os.fsdecode(argument)))
