"""`Patch`: functions of another package replaced in every module that holds them, and put back."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

PACKAGE = __package__


class Patch:
    """A host's functions replaced by foveal's, until `undo` or the end of a `with` block.

    Args:
        replacements: (holder, name, function) each: the function that takes the place of `holder.name`. Where the
            holder is a module, other modules' references to the same function are replaced as well, and `undo` also
            finds those that were imported while the patch was in place.
        also: what `undo` does besides, last.
    """

    def __init__(
        self, replacements: list[tuple[Any, str, Callable[..., Any]]], *, also: Callable[[], None] | None = None
    ) -> None:
        self._undo: list[Callable[[], None]] = [] if also is None else [also]
        for holder, name, function in replacements:
            original = getattr(holder, name)
            if isinstance(holder, ModuleType):
                _rebind(original, function)
                self._undo.append(functools.partial(_rebind, function, original))
            else:
                setattr(holder, name, function)
                self._undo.append(functools.partial(setattr, holder, name, original))

    def undo(self) -> None:
        """Put the host's own functions back. Does nothing the second time."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _rebind(old: Callable, new: Callable) -> None:
    """Let every name at the top of a loaded module that refers to `old` refer to `new`."""
    for module in list(sys.modules.values()):
        # A loaded "module" may be any object, and its attributes may load other things when asked for: read its dict.
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name in [name for name, value in list(names.items()) if value is old]:
            names[name] = new


def import_host(module: str, package: str, how_to_install: str) -> ModuleType:
    """The host's module; an ImportError that says how to install it if it is absent, or why it did not load."""
    host = module.partition(".")[0]
    try:
        importlib.import_module(host)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == host:
            raise ImportError(f"{package} is not installed, and patching needs it: {how_to_install}") from error
        raise ImportError(f"{package} is installed, but needs {error.name}, which is not: {error}") from error
    except Exception as error:
        raise ImportError(f"{package} is installed, but importing {module} failed: {error}") from error


def check_host_function(host: str, package: str, holder: Any, name: str, like: Callable) -> None:
    """An ImportError unless `holder.name` takes the parameters of `like`; a ValueError if it is foveal's already."""
    found = getattr(holder, name, None)
    if found is None:
        raise ImportError(f"{package} has no {name}; foveal knows the one with {inspect.signature(like)}")
    if getattr(found, "__module__", "").startswith(f"{PACKAGE}."):
        raise ValueError(f"host {host!r} is patched already: undo that patch first")
    expected, got = (list(inspect.signature(function).parameters) for function in (like, found))
    if got != expected:
        raise ImportError(f"{name} of {package} takes {got}, but foveal knows the one that takes {expected}")
