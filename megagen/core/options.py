"""Strict option classes: a component's options sit in its owner and reject unknown keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from megagen.core.errors import ConfigError, suggest


class StrictOptions(BaseModel):
    """Base of every options class: unknown keys are errors, values are checked, 0 is a value."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)


def _read_betas(value: Any) -> Any:
    return tuple(float(v) for v in value.split(",")) if isinstance(value, str) else value


def _check_betas(value: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= b < 1 for b in value):
        raise ValueError("each beta must be in [0, 1)")
    return value


Betas = Annotated[tuple[float, float], BeforeValidator(_read_betas), AfterValidator(_check_betas)]
"""Adam's two decay rates, each in [0, 1); the text "0.9,0.999" is understood."""

OptionsT = TypeVar("OptionsT", bound=BaseModel)


def parse_options(cls: type[OptionsT], data: Mapping[str, Any], where: str) -> OptionsT:
    """Build ``cls`` from a mapping.

    Args:
        cls: a pydantic class.
        data: keys and values, nested.
        where: key path of ``data`` in the config, for the error.

    Raises:
        ConfigError: names every wrong key path with the value found and what would be right.
    """
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        problems = [_explain(cls, item, where) for item in error.errors()]
        raise ConfigError("; ".join(problems)) from None


def _explain(cls: type[BaseModel], item: ErrorDetails, where: str) -> str:
    location = [str(part) for part in item["loc"]]
    path = ".".join([where, *location]) if where else ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key; {suggest(location[-1], _fields(cls, location[:-1]))}"
    if item["type"] == "missing":
        return f"{path}: required, not given"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{path}: found {item['input']!r}; {message}"


def _fields(cls: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Field names of the class reached from ``cls`` by ``path``, through optional types."""
    current: type[BaseModel] | None = cls
    for part in path:
        field = current.model_fields.get(part) if current else None
        if field is None:
            continue  # a union's branch tag, or a dict key
        options = [field.annotation, *get_args(field.annotation)]
        current = next(
            (o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None
        )
    return list(current.model_fields) if current else []
