"""Plug-ins: a file in a folder is a plug-in, its file name is its name, one constant declares it."""

import importlib
import pkgutil
from typing import Any

from runtimes.errors import InputError


def names(package: str) -> list[str]:
    """The plug-ins of `package`, sorted: every public module in its folders."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load(package: str, name: str, constant: str) -> Any:
    """The `constant` that plug-in `name` of `package` declares; `InputError` names the plug-ins there are."""
    if name not in names(package):
        kind = package.rpartition(".")[2].removesuffix("s")
        raise InputError(f"expected a {kind} of {', '.join(names(package))}; found '{name}'")
    return getattr(importlib.import_module(f"{package}.{name}"), constant)
