"""Applications that tests serve. A worker imports no more than it needs to serve them, as each worker does so anew."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


def echo_pid(connection: socket.socket, _address: object) -> None:
    """Answer one line with this worker's pid, and the line."""
    data = connection.recv(1000)
    if data:
        connection.sendall(b"%d %s" % (os.getpid(), data))


def keep_echoing(connection: socket.socket, _address: object) -> None:
    """Echo until the client has enough."""
    while data := connection.recv(65536):
        connection.sendall(data)


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that answers with its worker's pid; `/sleep/0.5` takes its time, `/stream/5` goes on."""
    import asyncio

    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    _, verb, *rest = [*scope["path"].split("/"), ""]
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": f"{os.getpid()} {message['text']}"})
        return
    if verb == "sleep":
        await asyncio.sleep(float(rest[0]))
    elif verb == "block":
        time.sleep(float(rest[0]))  # noqa: ASYNC251 - the point of it
    body = str(os.getpid()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for _ in range(int(rest[0]) if verb == "stream" else 0):
        await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
        await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": body})


async def asgi_in_asyncio(scope: Any, receive: Any, send: Any) -> None:
    """The same, for tests that serve it in asyncio's own loop."""
    await asgi(scope, receive, send)


def asgi_answering(body_of: Callable[[Any], bytes]) -> Any:
    """An ASGI application that answers with `body_of(scope)`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await asgi(scope, receive, send)
            return
        body = body_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    """A WSGI application that answers with its worker's pid; `/sleep/0.5` takes its time."""
    _, verb, *rest = [*environ["PATH_INFO"].split("/"), ""]
    if verb == "sleep":
        time.sleep(float(rest[0]))
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
