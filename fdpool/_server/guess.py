"""Which kind of application a named one probably is, read from source text: nothing is imported, nothing is run.

A generation's supervisor is to import what serves before it forks, and that is known for sure only when a worker has
loaded the application. So this is a guess, on which nothing but that depends: where it is wrong the worker imports what
it needs, and where there is none the supervisor imports all that it could be.

    shop.web:app        app = Flask(__name__)         what Flask's own __call__ takes
    shop.web:make()     def make(): return App()      what is returned
    shop:app            from .web import app          is followed, into libraries, too
"""

from __future__ import annotations

import ast
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from typing import NamedTuple

from . import apps

_DEEPEST = 12  # names and calls that are followed one from the other
_LARGEST = 256 * 1024

# Frameworks whose sources it would take long to read, by what is imported of them; the rest is found out.
_KNOWN = {
    "flask.Flask": "wsgi",
    "starlette.applications.Starlette": "asgi",
    "fastapi.FastAPI": "asgi",
    "quart.Quart": "asgi",
    "bottle.Bottle": "wsgi",
    "django.core.wsgi.get_wsgi_application": "wsgi",
    "django.core.asgi.get_asgi_application": "asgi",
}
_HANDLERS = (
    "BaseRequestHandler",
    "StreamRequestHandler",
    "BaseHTTPRequestHandler",
    "SimpleHTTPRequestHandler",
)

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def interface_of(target: str) -> str | None:
    """The probable kind of a target that `apps.check_target` lets pass, looked for in `sys.path`; None if not seen."""
    module, _, attribute = target.partition(":")
    calls = int(attribute.endswith("()"))
    name, *rest = attribute.removesuffix("()").split(".")
    if rest:
        return None
    try:
        return _of_name(_read(module), name, calls, _DEEPEST)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None  # whoever imports it says what is wrong


class _Source(NamedTuple):
    """A module's text.

    Attributes:
        module: its name.
        is_package: names are relative to it, not to its parent.
        body: its statements, or those of a function within it.
        outer: where names are looked for that are not bound there.
    """

    module: str
    is_package: bool
    body: Sequence[ast.stmt]
    outer: _Source | None = None


# -- modules -----------------------------------------------------------------------------------------------


def _read(module: str) -> _Source | None:
    """A module's source, found as an import would find it; None if it has none, or too much."""
    path: list[str] | None = sys.path
    origin = None
    for part in module.split("."):
        # By its last part alone: of a dotted name the parent would have to be imported.
        spec = None if path is None else PathFinder.find_spec(part, path)
        if spec is None:
            return None
        origin = spec.origin
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    if origin is None or not origin.endswith(".py") or os.path.getsize(origin) > _LARGEST:
        return None
    with open(origin, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those are for whoever imports it
        return _Source(module, path is not None, ast.parse(file.read(), origin).body)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that bind names where they stand: also those under `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            yield from _statements(statement.body)
            yield from _statements(getattr(statement, "orelse", ()))


def _absolute(source: _Source, statement: ast.ImportFrom) -> str:
    """The full name of the module that something is imported from."""
    if not statement.level:
        return statement.module or ""
    parts = source.module.split(".")
    parts = parts[: len(parts) - statement.level + int(source.is_package)]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


# -- what a name, or an expression, is ---------------------------------------------------------------------
#
# `calls` is how often it is called until it is what serves: 1 for a class of whose objects it is one, or a factory.


def _of_name(source: _Source | None, name: str, calls: int, depth: int) -> str | None:
    """The kind of what `name` is bound to last; None if that is not seen."""
    if source is None or depth == 0:
        return None
    for statement in reversed(list(_statements(source.body))):
        if isinstance(statement, _Function) and statement.name == name:
            return _of_function(source, statement, calls, depth)
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return _of_class(source, statement, calls, depth)
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return _of_value(source, statement.value, calls, depth - 1)
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _of_other(_absolute(source, statement), alias.name, calls, depth - 1)
    return _of_name(source.outer, name, calls, depth)


def _of_other(module: str, name: str, calls: int, depth: int) -> str | None:
    """The kind of what another module has by that name."""
    known = _KNOWN.get(f"{module}.{name}") if calls else None
    return known or _of_name(_read(module), name, calls, depth)


def _of_value(source: _Source, value: ast.expr, calls: int, depth: int) -> str | None:
    if depth <= 0:
        return None
    if isinstance(value, ast.Name):
        return _of_name(source, value.id, calls, depth - 1)
    if isinstance(value, ast.Lambda) and not calls:
        return _by_parameters(value)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        module = _module_named(source, value.value.id)
        return None if module is None else _of_other(module, value.attr, calls, depth - 1)
    if isinstance(value, ast.Call):
        kind = _of_value(source, value.func, calls + 1, depth - 1)
        if kind is None and value.args:
            kind = _of_value(source, value.args[0], calls, depth - 1)  # wrapped in something
        return kind
    return None


def _module_named(source: _Source, name: str) -> str | None:
    """The module that a name stands for, by `import a`, `import a as b` or `from a import b`."""
    for statement in reversed(list(_statements(source.body))):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return alias.name
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return f"{_absolute(source, statement)}.{alias.name}"
    return None if source.outer is None else _module_named(source.outer, name)


def _of_function(
    source: _Source, function: ast.FunctionDef | ast.AsyncFunctionDef, calls: int, depth: int
) -> str | None:
    if not calls:
        if function.decorator_list:
            return None  # it may take anything
        return _by_parameters(function)
    inside = _Source(source.module, source.is_package, function.body, source)
    for statement in reversed(list(_statements(function.body))):
        if isinstance(statement, ast.Return) and statement.value is not None:
            return _of_value(inside, statement.value, calls - 1, depth - 1)
    return None


def _of_class(source: _Source, made: ast.ClassDef, calls: int, depth: int) -> str | None:
    """The kind of its objects; or of the class, if it is a handler's."""
    bases = [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in made.bases]
    if not calls:
        return "socketserver" if any(base in _HANDLERS for base in bases) else None
    for statement in reversed(list(_statements(made.body))):
        if isinstance(statement, _Function) and statement.name == "__call__":
            return _by_parameters(statement, skip=1)
    for base in made.bases:
        kind = _of_value(source, base, calls, depth - 1)
        if kind is not None:
            return kind
    return None


def _by_parameters(
    function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, skip: int = 0
) -> str | None:
    """The kind of what takes these, counted as `apps` does; the first `skip` are bound already."""
    arguments = function.args
    if arguments.vararg is not None:
        return None
    every = [each.arg for each in (*arguments.posonlyargs, *arguments.args)][skip:]
    names = every[: max(2, len(every) - len(arguments.defaults))]
    return apps.interface_by_names(names, isinstance(function, ast.AsyncFunctionDef))
