"""How an application that is an object gets to the workers: as any task's argument does, or by a name to import.

Those of most frameworks cannot be pickled, or not be rebuilt: Flask's hold weak references, Starlette's and FastAPI's
recurse without end. But whoever writes one gives it a name in a module.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import FunctionType, ModuleType
from typing import Any

from .. import payload
from ..errors import NotLoadable, NotPicklable


def target_of(app: Any) -> str | None:
    """The name, "module:attribute", by which workers are to import an application; None if it can travel.

    Raises:
        NotPicklable: it cannot, and has no such name.
    """
    try:
        dumped = payload.dumps(app)
        if not isinstance(app, (FunctionType, type)):
            # There are objects that find out only as they are rebuilt; of functions cloudpickle knows all.
            payload.loads(dumped.body, dumped.fds.detach() if dumped.fds else [], dumped.spilled)
        dumped.close()
    except (NotPicklable, NotLoadable) as error:
        named = name_of(app)
        if named is None:
            raise NotPicklable(
                f"the application cannot travel to a worker: {error}. Nor is it an attribute of a module that workers "
                "could import: give it by its name, 'module:attribute', or 'module:factory()'"
            ) from error
        return named
    return None


def name_of(app: Any) -> str | None:
    """The name, "module:attribute", under which an application can be imported; None if it has none.

    One of a script is found by the script's file, which is a module, too, in another process.
    """
    # The module in which it was made, or one that has it from there; the script itself only if there is no other.
    for module in sorted(sys.modules.values(), key=lambda each: each is sys.modules.get("__main__")):
        try:
            names = [name for name, value in list(vars(module).items()) if value is app]
        except TypeError:
            continue  # it is no module, whatever has put it there
        for name in names:
            imported_as = _importable_as(module)
            if imported_as is not None and name.isidentifier():
                return f"{imported_as}:{name}"
    return None


def _importable_as(module: ModuleType) -> str | None:
    if module.__name__ != "__main__":
        return module.__name__
    if module.__spec__ is not None:  # `python -m package.module`
        return module.__spec__.name
    path = getattr(module, "__file__", None)
    name = os.path.splitext(os.path.basename(path or ""))[0]
    if path is None or not name.isidentifier():
        return None
    found = importlib.util.find_spec(name)
    is_same = found is not None and found.origin is not None and _is_same_file(found.origin, path)
    return name if is_same else None


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
