"""Peers that are not fdpool: a plain socket that writes as it pleases, and a program in Rust."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from fdpool.aio import AsyncSocket
from fdpool.fds import close_all
from fdpool.sockets import DatagramSocket, StreamSocket

from .test_wire import files
from .test_wire import pipes as pipes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    #: A way of writing one frame: header, payload, descriptors.
    Style = Callable[[socket.socket, bytes, bytes, list[int]], None]


def at_once(sock: socket.socket, header: bytes, payload: bytes, fds: list[int]) -> None:
    socket.send_fds(sock, [header, payload], fds)


def header_apart(sock: socket.socket, header: bytes, payload: bytes, fds: list[int]) -> None:
    socket.send_fds(sock, [header], fds)
    sock.sendall(payload)


def fds_on_the_payload(sock: socket.socket, header: bytes, payload: bytes, fds: list[int]) -> None:
    sock.sendall(header)
    socket.send_fds(sock, [payload], fds)


def byte_by_byte(sock: socket.socket, header: bytes, payload: bytes, fds: list[int]) -> None:
    for position, byte in enumerate(header + payload):
        socket.send_fds(sock, [bytes([byte])], fds if position == 0 else [])


def each_byte_with_its_own(sock: socket.socket, header: bytes, payload: bytes, fds: list[int]) -> None:
    for position, byte in enumerate(header + payload):
        socket.send_fds(sock, [bytes([byte])], fds[position : position + 1])


STYLES = [at_once, header_apart, fds_on_the_payload, byte_by_byte, each_byte_with_its_own]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asyncio"])
@pytest.mark.parametrize("style", STYLES)
def test_frames_are_understood_however_a_peer_writes_them(
    pipes: list[int], style: Style, asynchronous: bool
) -> None:
    messages = [({"n": number}, pipes[:number]) for number in (0, 3, 0, 5, 1)]
    peer, ours = socket.socketpair()

    def write() -> None:
        with peer:
            for message, fds in messages:
                payload = json.dumps(message).encode()
                style(peer, struct.pack("<I", len(payload)), payload, fds)

    def check(received: tuple[object, list[int]], expected: tuple[object, list[int]]) -> None:
        assert received[0] == expected[0]
        assert files(received[1]) == files(expected[1])
        close_all(received[1])

    async def read() -> None:
        async with AsyncSocket.from_fd(ours.detach(), max_fds=16) as sock:
            for expected in messages:
                check(await sock.receive_with_fds(), expected)
            with pytest.raises(EOFError, match="between frames"):
                await sock.receive()

    writer = threading.Thread(target=write)
    writer.start()
    if asynchronous:
        asyncio.run(read())
    else:
        with StreamSocket.from_fd(ours.detach(), max_fds=16) as sock:
            for expected in messages:
                check(sock.receive_with_fds(), expected)
            with pytest.raises(EOFError, match="between frames"):
                sock.receive()
    writer.join()


def test_what_we_write_is_a_length_and_a_payload_with_descriptors_on_the_first_byte(pipes: list[int]) -> None:
    peer, ours = socket.socketpair()
    with peer, StreamSocket.from_fd(ours.detach(), max_fds=16) as sock:
        sock.send_with_fds({"ä": [1, None]}, pipes)
        first, fds, _, _ = socket.recv_fds(peer, 1, 16)
        rest = peer.recv(1000)
        assert files(fds) == files(pipes)
        close_all(fds)
        payload = '{"ä":[1,null]}'.encode()
        assert first + rest == struct.pack("<I", len(payload)) + payload


def test_datagrams_are_the_bytes_as_they_are(pipes: list[int]) -> None:
    peer, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with peer, DatagramSocket.from_fd(ours.detach(), max_bytes=8192, max_fds=16) as sock:
        sock.send_with_fds(b"\x00raw\xff", pipes)
        data, fds, _, _ = socket.recv_fds(peer, 9000, 16)
        assert (data, files(fds)) == (b"\x00raw\xff", files(pipes))
        socket.send_fds(peer, [bytes(8192)], fds)
        close_all(fds)
        back, fds = sock.receive_with_fds()
        assert (len(back), files(fds)) == (8192, files(pipes))
        close_all(fds)


# -- Rust ----------------------------------------------------------------------------------------

RUST_PEER = r"""
// Reads one frame on descriptor 0, answers with its payload reversed and the descriptors in reverse order,
// until the stream ends. Header and payload are written apart.
use std::os::raw::{c_int, c_void};
#[repr(C)] struct IoVec { base: *mut c_void, len: usize }
#[repr(C)] struct MsgHdr {
    name: *mut c_void, namelen: u32, iov: *mut IoVec, iovlen: usize,
    control: *mut c_void, controllen: usize, flags: c_int,
}
extern "C" {
    fn sendmsg(fd: c_int, msg: *const MsgHdr, flags: c_int) -> isize;
    fn recvmsg(fd: c_int, msg: *mut MsgHdr, flags: c_int) -> isize;
    fn close(fd: c_int) -> c_int;
}
const ROOM: usize = 16 + 4 * 16;

fn read_some(buf: &mut [u8], fds: &mut Vec<c_int>) -> usize {
    let mut control = [0u64; ROOM / 8];
    let mut iov = IoVec { base: buf.as_mut_ptr() as *mut c_void, len: buf.len() };
    let mut msg = MsgHdr { name: std::ptr::null_mut(), namelen: 0, iov: &mut iov, iovlen: 1,
        control: control.as_mut_ptr() as *mut c_void, controllen: ROOM, flags: 0 };
    let n = unsafe { recvmsg(0, &mut msg, 0x4000_0000) };
    assert!(n >= 0 && msg.flags & 0x8 == 0);
    if msg.controllen >= 16 {
        let count = (control[0] as usize - 16) / 4;
        let numbers = unsafe { (control.as_ptr() as *const c_int).add(4) };
        for i in 0..count { fds.push(unsafe { *numbers.add(i) }); }
    }
    n as usize
}

fn read_exactly(buf: &mut [u8], fds: &mut Vec<c_int>) -> bool {
    let mut at = 0;
    while at < buf.len() {
        let n = read_some(&mut buf[at..], fds);
        if n == 0 { return false; }
        at += n;
    }
    true
}

fn write_all(buf: &[u8], fds: &[c_int]) {
    let mut at = 0;
    while at < buf.len() {
        let mut control = [0u64; ROOM / 8];
        let len = if at == 0 && !fds.is_empty() { 16 + 4 * fds.len() } else { 0 };
        if len > 0 {
            control[0] = len as u64;
            control[1] = 1 | (1 << 32);  // SOL_SOCKET, SCM_RIGHTS
            let numbers = unsafe { (control.as_mut_ptr() as *mut c_int).add(4) };
            for (i, fd) in fds.iter().enumerate() { unsafe { *numbers.add(i) = *fd; } }
        }
        let mut iov = IoVec { base: buf[at..].as_ptr() as *mut c_void, len: buf.len() - at };
        let msg = MsgHdr { name: std::ptr::null_mut(), namelen: 0, iov: &mut iov, iovlen: 1,
            control: if len > 0 { control.as_mut_ptr() as *mut c_void } else { std::ptr::null_mut() },
            controllen: (len + 7) / 8 * 8, flags: 0 };
        let n = unsafe { sendmsg(0, &msg, 0) };
        assert!(n > 0);
        at += n as usize;
    }
}

fn main() {
    loop {
        let mut header = [0u8; 4];
        let mut fds = Vec::new();
        if !read_exactly(&mut header, &mut fds) { return; }
        let mut payload = vec![0u8; u32::from_le_bytes(header) as usize];
        assert!(read_exactly(&mut payload, &mut fds));
        payload.reverse();
        fds.reverse();
        write_all(&header, &fds);
        write_all(&payload, &[]);
        for fd in fds { unsafe { close(fd); } }
    }
}
"""


@pytest.fixture(scope="module")
def rust_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rustc = shutil.which("rustc")
    if rustc is None or os.uname().sysname != "Linux" or struct.calcsize("P") != 8:
        pytest.skip("needs rustc, and the structures are those of 64-bit Linux")
    folder = tmp_path_factory.mktemp("rust")
    (folder / "peer.rs").write_text(RUST_PEER)
    done = subprocess.run(
        [rustc, "--edition", "2021", "-o", "peer", "peer.rs"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"rustc does not work here: {done.stderr[:200]}")
    return folder / "peer"


def test_a_peer_in_rust_understands_our_frames_and_we_its(rust_peer: Path, pipes: list[int]) -> None:
    ours, theirs = StreamSocket.pair(max_fds=16)
    with ours:
        with theirs:
            peer = subprocess.Popen([rust_peer], stdin=theirs.fileno())
        for payload, fds in ((b"abc", pipes), (b"", []), (bytes(range(256)) * 4000, pipes * 3), (b"x", [])):
            sender = threading.Thread(target=ours.send_bytes, args=(payload, fds))
            sender.start()
            answer, got = ours.receive_bytes()
            sender.join()
            assert answer == payload[::-1]
            assert files(got) == files(fds)[::-1]
            close_all(got)
    assert peer.wait(timeout=30) == 0
