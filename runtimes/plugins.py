"""Plug-ins: a file in a plug-in folder is one, its name is that of the file, and one constant declares it."""

import importlib
import pkgutil
from typing import Any

from runtimes.errors import unknown_name


def names(package: str) -> list[str]:
    """The plug-ins of `package`, sorted: every public module in its folders."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load(package: str, name: str, constant: str) -> Any:
    """The `constant` that plug-in `name` of `package` declares; `InputError` names the nearest plug-in."""
    if name not in (known := names(package)):
        kind = package.rpartition(".")[2].removesuffix("s")
        raise unknown_name(kind, name, known, "install the plug-in that declares it")
    return getattr(importlib.import_module(f"{package}.{name}"), constant)
