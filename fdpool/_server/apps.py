"""Which kind of application somebody gave to a server, and how one that is named is found.

handler        handler(connection, address), called for each connection
socketserver   a socketserver.BaseRequestHandler class, made for each connection
asgi, wsgi     an HTTP application, served by uvicorn or waitress
listeners      serve(listeners) or serve(listeners, worker): accepts for itself
"""

from __future__ import annotations

import importlib
import inspect
import socketserver
from typing import Any, Literal, get_args

Interface = Literal["handler", "socketserver", "asgi", "wsgi", "listeners"]
INTERFACES: tuple[str, ...] = get_args(Interface)

_LISTENERS_NAMES = ("listeners", "sockets")


def check_target(target: str) -> None:
    """Raise ValueError unless `target` reads "module:attribute", or "module:factory()"."""
    module, colon, attribute = target.partition(":")
    path = attribute.removesuffix("()")
    names = [*module.split("."), *path.split(".")]
    if not colon or not all(name.isidentifier() for name in names):
        raise ValueError(
            f"an application is named 'module:attribute', or 'module:factory()' to have it made, not {target!r}"
        )


def module_of(target: str) -> str:
    """The module that a named application is in."""
    return target.partition(":")[0]


def load(target: str) -> Any:
    """Import a named application, and call it if it is a factory.

    Raises:
        AttributeError: the module has no such thing; the message says what it has been asked for.
        BaseException: whatever the module raises as it is imported.
    """
    module_name, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in attribute.removesuffix("()").split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise AttributeError(
                f"{module_name!r} (from {getattr(found, '__file__', None) or 'no file'}) was imported, but it has no "
                f"{name!r}, which {target!r} asks for"
            ) from error
    return found() if attribute.endswith("()") else found


def interface_of(app: Any) -> str:
    """Which kind of application this is, by what it can be called with.

    Raises:
        TypeError: it cannot be told; the message says how to say it.
    """
    if inspect.isclass(app) and issubclass(app, socketserver.BaseRequestHandler):
        return "socketserver"
    if not callable(app):
        raise TypeError(f"an application is callable, and {app!r} is not")
    names = _positional(app)
    if names is not None:
        if len(names) == 3 and (_is_async(app) or names[0] == "scope"):
            return "asgi"
        if names[:1] and names[0] in _LISTENERS_NAMES and len(names) <= 2:
            return "listeners"
        if len(names) == 2 and not _is_async(app):
            return "wsgi" if names[0] in ("environ", "env") or names[1] == "start_response" else "handler"
    takes = "anything" if names is None else f"({', '.join(names)})"
    raise TypeError(
        f"it cannot be told what kind of application {app!r} is, as it takes {takes}: say interface= one of "
        f"{', '.join(INTERFACES)}"
    )


def _is_async(app: Any) -> bool:
    return inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(app, "__call__", None))  # noqa: B004


def _positional(app: Any) -> list[str] | None:
    """The names of the positional parameters that a call must or may give; None if it takes any, or nobody knows."""
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        return None
    found: list[str] = []
    for each in parameters:
        if each.kind is each.VAR_POSITIONAL:
            return None
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD):
            if each.default is not each.empty and len(found) >= 2:
                continue  # a third that need not be given makes no other kind
            found.append(each.name)
    return found


def takes_worker(app: Any) -> bool:
    """True if an application of the kind "listeners" wants the worker, too, and so says itself when it is ready."""
    names = _positional(app)
    return names is not None and len(names) >= 2
