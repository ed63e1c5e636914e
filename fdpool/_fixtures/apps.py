"""Applications of a server, served by one worker of a test: what `fdpool.Server` serves, without what a test can do
without: other workers, reloads, draining. With any option of `Server` it is that which serves.

Runs in: a worker.
"""

from __future__ import annotations

import inspect
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from .._server import apps

#: A function with such a parameter is an application of `fdpool.Server`, and given its listeners in a list.
_LISTENERS_NAMES = ("listeners", "sockets")


def kind_of(app: Any, interface: str | None, args: int) -> str:
    """The interface of what is to be served; "function" for `fn(listening_socket, *args)`.

    Raises:
        TypeError: it cannot be told; the message says how to say it.
        ValueError: there is no such interface.
    """
    if interface is not None:
        if interface not in (*apps.INTERFACES, "function"):
            known = ", ".join(("function", *apps.INTERFACES))
            raise ValueError(f"interface= is one of {known}, not {interface!r}")
        return interface
    if isinstance(app, str):
        apps.check_target(app)
        return "named"
    if args:
        return "function"
    names = _required(app) if inspect.isroutine(app) or isinstance(app, partial) else None
    if names is not None and len(names) == 1 and names[0] not in _LISTENERS_NAMES:
        return "function"
    return apps.interface_of(app)


def serve_app(listening: socket.socket, app: Any, interface: str, options: dict[str, Any]) -> None:
    """Serve an application, or the one of that name, until SIGTERM."""
    named = app if isinstance(app, str) else None
    if options or interface == "listeners":
        from ..server import Server

        chosen: Any = None if interface == "named" else interface
        sys.exit(Server(app, bind=listening, interface=chosen, **{"workers": 1, **options}).run())
    if named is not None:
        app = apps.load(named)
    if interface == "named":
        interface = kind_of(app, None, 0)
    _FACES[interface](listening, app)


def _serve_function(listening: socket.socket, fn: Callable[[socket.socket], object]) -> None:
    fn(listening)


def _serve_connections(listening: socket.socket, handle: Callable[[socket.socket, Any], object]) -> None:
    """A thread for each connection, so that two clients of one test never wait for each other."""

    def answer(connection: socket.socket, address: Any) -> None:
        with connection:
            try:
                handle(connection, address)
            except Exception:
                traceback.print_exc()

    while True:
        connection, address = listening.accept()
        threading.Thread(target=answer, args=(connection, address), daemon=True).start()


def _serve_requests(listening: socket.socket, handler: Callable[[Any, Any, Any], object]) -> None:
    _serve_connections(listening, lambda connection, address: handler(connection, address, None))


def _serve_asgi(listening: socket.socket, app: Any) -> None:
    from .apps_asgi import Server

    Server.of(app).run_on(listening)


def _serve_wsgi(listening: socket.socket, app: Any) -> None:
    from waitress.server import create_server

    create_server(app, sockets=[listening], ident=None).run()


_FACES: dict[str, Callable[[socket.socket, Any], None]] = {
    "function": _serve_function,
    "handler": _serve_connections,
    "socketserver": _serve_requests,
    "asgi": _serve_asgi,
    "wsgi": _serve_wsgi,
}


def _required(app: Any) -> list[str] | None:
    """Names of the positional parameters that a call must give, but for `ready`; None if nobody knows."""
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        each.name
        for each in parameters
        if each.kind in kinds and each.default is each.empty and each.name != "ready"
    ]
