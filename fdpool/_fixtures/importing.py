"""Test modules in the workers of pools, where pytest alone knows how to import them.

With `--import-mode=importlib` they are in no folder of `sys.path`, and a worker would not find what a task refers to.
It imports them by their files then, as any other module: so what its initializer has set there, its tasks find.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: By name, a module's file, or None, and the folders of its submodules, if it is a package.
Places = dict[str, tuple["str | None", "list[str] | None"]]

_is_needed = False
_inherited: Places | None = None  # in a process that finds them with the help of another


def begin() -> None:
    """Have the workers of pools that are made from now on find test modules."""
    global _is_needed
    _is_needed = True


def is_of_tests(module: ModuleType) -> bool:
    """True for what pytest has imported with its assertions rewritten: test modules and conftests."""
    loader = getattr(module, "__loader__", None)
    return type(loader).__module__.startswith("_pytest.")


def with_pool_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a pool, with an initializer that finds test modules before it does what it did."""
    finder = finder_for_others()
    if finder is None:
        return options
    first = options.get("initializer"), options.get("initargs", ())
    return {**options, "initializer": _initialize, "initargs": (finder, *first)}


def finder_for_others() -> _Finder | None:
    """What has another process find test modules, once it is loaded there: what comes behind it in the same pickle may
    refer to them. None if that process finds them in any case."""
    if _inherited is not None:
        return _Finder(_inherited)
    return _Finder(_places()) if _is_needed else None


def _places() -> Places:
    """Where the test modules are that are imported, and the packages that they are in."""
    found: Places = {}
    for name, module in list(sys.modules.items()):
        if is_of_tests(module):
            found[name] = _place(module)
            while name := name.rpartition(".")[0]:
                if name in sys.modules:
                    file, folders = _place(sys.modules[name])
                    found[name] = file, folders or []
    return found


def _place(module: ModuleType) -> tuple[str | None, list[str] | None]:
    folders = getattr(module, "__path__", None)
    return getattr(module, "__file__", None), None if folders is None else list(folders)


class _Finder:
    """Finds modules by their files."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def __reduce__(self) -> tuple[Any, ...]:
        return _installed, (self._places,)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the import system asks for."""
        if name not in self._places:
            return None
        file, folders = self._places[name]
        if file is not None:
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = folders or []
        return spec


def _installed(places: Places) -> _Finder:
    """Runs in: another process, as it loads a finder."""
    global _inherited
    _inherited = places
    finder = _Finder(places)
    sys.meta_path.insert(0, finder)
    return finder


def _initialize(_: _Finder, first: Callable[..., object] | None, args: tuple[Any, ...]) -> None:
    if first is not None:
        first(*args)
