"""String tables: short names and dotted paths to classes, resolved when asked for.

A table is one literal dict (``{"finetune": "megagen.methods.finetune:FineTuneMethod"}``), so it can
be grepped, costs no import, and shared tests can loop over it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from megagen.core.errors import ConfigError, suggest


def target_of(instance: object) -> str:
    """The dotted path by which ``resolve`` finds the class of ``instance``."""
    return f"{type(instance).__module__}:{type(instance).__qualname__}"


def resolve(target: str, table: Mapping[str, str] | None = None, *, where: str = "") -> Any:
    """The object that ``target`` names.

    Args:
        target: a key of ``table``, ``package.module:Name`` or ``package.module.Name``.
        table: short names allowed here.
        where: config key path, for the error.

    Raises:
        ConfigError: no such name, module or attribute.
    """
    table = table or {}
    path = table.get(target, target)
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name:
        raise ConfigError(f"unknown name {target!r};", remedy=suggest(target, table), where=where)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise  # the module is there; something that it imports is not
        raise ConfigError(
            f"no module {module_name!r} for {target!r};",
            remedy=suggest(target, [*table, *table.values()]),
            where=where,
        ) from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [n for n in dir(module) if not n.startswith("_")]
        raise ConfigError(
            f"module {module_name!r} has no {attribute!r};",
            remedy=suggest(attribute, names),
            where=where,
        ) from None
