"""The application that is loaded, in each form that a server takes. `GET /TOKEN` is answered with pid and token.

`GET /TOKEN/20` takes 20 ms of sleep first. While the file that TEST_LOAD_BROKEN names is there, the import fails: a
bad deploy. The file that TEST_LOAD_LEDGER names gets a line with the token of each request that has begun.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

_BROKEN = os.environ.get("TEST_LOAD_BROKEN")

if _BROKEN and os.path.exists(_BROKEN):
    raise RuntimeError("this code is broken")

_LEDGER = os.environ.get("TEST_LOAD_LEDGER")
_ledger_fd = os.open(_LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC) if _LEDGER else None


def _begun(path: str) -> tuple[str, float]:
    """Token, and seconds to take. From here on the request may be lost with its worker."""
    _, token, *rest = path.split("/")
    if _ledger_fd is not None:
        os.write(_ledger_fd, f"{token}\n".encode())  # one write, so that lines of several workers do not mix
    return token, int(rest[0]) / 1000 if rest and rest[0].isdigit() else 0.0


def _body(token: str) -> bytes:
    return f"{os.getpid()} {token}\n".encode()


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """As a WSGI application (PEP 3333)."""
    token, seconds = _begun(environ["PATH_INFO"])
    if seconds:
        time.sleep(seconds)
    body = _body(token)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """As an ASGI application."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    token, seconds = _begun(scope["path"])
    if seconds:
        import asyncio  # 3 MiB, which a server of the other forms need not have

        await asyncio.sleep(seconds)
    body = _body(token)
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def handler(connection: socket.socket, _address: object) -> None:
    """As a function that is given each connection: one request, one answer, and the end."""
    with connection:
        received = b""
        while b"\r\n\r\n" not in received:
            data = connection.recv(65536)
            if not data:
                return
            received += data
        token, seconds = _begun(received.split()[1].decode())
        if seconds:
            time.sleep(seconds)
        body = _body(token)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)
