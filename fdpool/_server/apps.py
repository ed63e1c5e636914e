"""Which kind of application somebody gave to a server, and how one that is named is found.

handler        handler(connection, address), called for each connection
socketserver   a socketserver.BaseRequestHandler class, made for each connection
asgi, wsgi     an HTTP application, served by uvicorn or waitress
listeners      serve(listeners) or serve(listeners, worker): accepts for itself
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, Literal, get_args

Interface = Literal["handler", "socketserver", "asgi", "wsgi", "listeners"]
INTERFACES: tuple[str, ...] = get_args(Interface)
#: Those that speak HTTP: clients speak first, and what says nothing for long is no usual request.
HTTP = ("asgi", "wsgi")

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
        ModuleNotFoundError: there is no such module; the message says where it was looked for.
        AttributeError: the module has no such thing; the message says what it has been asked for.
        BaseException: whatever the module raises as it is imported.
    """
    module_name, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # one that it imports itself
        is_file = module_name.endswith(".py")
        raise ModuleNotFoundError(
            f"there is no module {error.name!r}, which {target!r} asks for: it was looked for in "
            f"{sys.path[0] or os.getcwd()!r} (--app-dir) and the rest of sys.path"
            + (f"; a module is named without its '.py': {module_name[:-3]}:{attribute}" if is_file else ""),
            name=error.name,
        ) from None
    for name in attribute.removesuffix("()").split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raised_there = error.__traceback__ is not None and error.__traceback__.tb_next is not None
            raise AttributeError(
                f"{module_name!r} (from {getattr(found, '__file__', None) or 'no file'}) was imported, but it has no "
                f"{name!r}, which {target!r} asks for"
            ) from (error if raised_there else None)
    return found() if attribute.endswith("()") else found


def interface_of(app: Any) -> str:
    """Which kind of application this is, by what it can be called with.

    Raises:
        TypeError: it cannot be told; the message says how to say it.
    """
    # Where that module is not loaded, which takes 1 ms, nobody has such a class.
    handlers = getattr(sys.modules.get("socketserver"), "BaseRequestHandler", ())
    if isinstance(app, type) and issubclass(app, handlers):
        return "socketserver"
    if not callable(app):
        raise TypeError(f"an application is callable, and {_described(app)} is not")
    names = _positional(app)
    found = interface_by_names(names, _is_async(app))
    if found is not None:
        return found
    takes = "anything" if names is None else f"({', '.join(names)})"
    raise TypeError(
        f"it cannot be told what kind of application {_described(app)} is, as it takes {takes}: say interface= "
        f"(--interface) one of {', '.join(INTERFACES)}"
    )


def interface_by_names(names: list[str] | None, is_async: bool) -> str | None:
    """Which kind of application takes these; None if it cannot be told.

    Args:
        names: of the positional parameters that a call must or may give; None if it takes any.
    """
    if names is None:
        return None
    if len(names) == 3 and (is_async or names[0] == "scope"):
        return "asgi"
    if names[:1] and names[0] in _LISTENERS_NAMES and len(names) <= 2:
        return "listeners"
    if len(names) == 2 and not is_async:
        return "wsgi" if names[0] in ("environ", "env") or names[1] == "start_response" else "handler"
    return None


def _described(app: Any) -> str:
    """What it is, without its address, which differs from worker to worker: the log tells what is the same."""
    name = getattr(app, "__qualname__", None)
    if name is not None:
        return f"{getattr(app, '__module__', '?')}.{name}"
    described, kind = repr(app), type(app)
    return f"an object of {kind.__module__}.{kind.__qualname__}" if " at 0x" in described else described


def _is_async(app: Any) -> bool:
    import inspect  # 7 ms, and who is told which kind it is asks nothing

    return inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(app, "__call__", None))  # noqa: B004


def _positional(app: Any) -> list[str] | None:
    """The names of the positional parameters that a call must or may give; None if it takes any, or nobody knows."""
    import inspect

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
