"""Which listeners of a SO_REUSEPORT group get connections, where the kernel can be told (Linux 4.5).

A listener that nobody accepts from goes on getting its share, and closing it resets what it has. So the listeners of
slots that are given up stay open, and the kernel is told to choose among the others (socket(7),
SO_ATTACH_REUSEPORT_CBPF).
"""

from __future__ import annotations

import socket
import struct
import sys

_ATTACH_CBPF = 51  # asm-generic/socket.h
_ANCILLARY, _RANDOM = -0x1000, 56  # SKF_AD_OFF, SKF_AD_RANDOM (linux/filter.h)
_LOAD_WORD, _MODULO, _RETURN = 0x20, 0x94, 0x16  # BPF_LD|W|ABS, BPF_ALU|MOD|K, BPF_RET|A
_UNACKED_AT = 24  # of tcpi_unacked in tcp_info, which for a listener is the length of its queue


def steer(member: socket.socket, count: int) -> bool:
    """Have the kernel choose, at random, among the first `count` listeners of the group; False if it cannot be told.

    Args:
        member: any listener of the group. The first are those that have listened for longest.
    """
    if sys.platform != "linux" or member.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    import ctypes

    steps = ((_LOAD_WORD, (_ANCILLARY + _RANDOM) & 0xFFFFFFFF), (_MODULO, count), (_RETURN, 0))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", name, 0, 0, k) for name, k in steps))
    try:
        member.setsockopt(
            socket.SOL_SOCKET, _ATTACH_CBPF, struct.pack("HP", len(steps), ctypes.addressof(code))
        )
    except OSError:
        return False
    return True


def queued(listener: socket.socket) -> int:
    """How many connections wait to be accepted; 0 if nobody can tell."""
    try:
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED_AT + 4)
    except (OSError, AttributeError):
        return 0
    return int(struct.unpack_from("I", info, _UNACKED_AT)[0])
