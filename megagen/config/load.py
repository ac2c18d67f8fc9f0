"""From a YAML file and dotted overrides to a checked ``RunConfig``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError
from megagen.core.options import parse_options


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two mends: a repeated key is an error, and 1e-4 is a number."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"the key {key!r} stands twice (line {line});", remedy="Keep one.")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def parse_scalar(text: str) -> Any:
    """A command-line value: YAML's reading, and numbers such as ``1e-4`` as numbers.

    >>> parse_scalar("true"), parse_scalar("1e-4"), parse_scalar("[1, 2]"), parse_scalar("none")
    (True, 0.0001, [1, 2], None)
    """
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text) if _is_exponent(text) else yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _is_exponent(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "e" in text.lower()


def _numbers(value: Any) -> Any:
    """Strings such as ``1e-4`` (a YAML 1.1 string) as numbers, in a whole tree."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _is_exponent(value) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is no YAML, or is no mapping.
    """
    try:
        data = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(
            f"cannot read it ({error.strerror}).",
            remedy="Give an existing YAML file.",
            where=str(path),
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"is no valid YAML: {' '.join(str(error).split())}", where=str(path)
        ) from None
    except ConfigError as error:
        raise ConfigError(error.message, remedy=error.remedy, where=str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"holds {type(data).__name__}, not a mapping.",
            remedy="It needs the keys models, method and training.",
            where=str(path),
        )
    return _numbers(data)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``["--a.b", "1", "--c.d=x"]`` as ``{"a.b": 1, "c.d": "x"}``.

    Raises:
        ConfigError: something that is no ``--dotted.key value`` pair.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            raise ConfigError(
                f"unknown argument {word!r}.", remedy="Overrides look like --training.seed 1."
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError("has no value.", remedy=f"Write {word} VALUE.", where=key)
            value = rest.pop(0)
        found[key] = parse_scalar(value)
    return found


def apply_overrides(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` with dotted keys set; unknown ones are found by the schema afterwards."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
    for path, value in overrides.items():
        node = result
        *parents, leaf = path.split(".")
        for i, part in enumerate(parents):
            child = node.get(part)
            if child is not None and not isinstance(child, dict):
                here = ".".join(parents[: i + 1])
                raise ConfigError(f"is {child!r}, it has no key {leaf!r}.", where=here)
            node[part] = dict(child or {})
            node = node[part]
        node[leaf] = value
    return result


def load_run_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run config in ``path`` with ``overrides`` (dotted key -> value) applied.

    Raises:
        ConfigError: unknown keys (with a suggestion), wrong values, contradictions.
    """
    tree = apply_overrides(read_yaml(Path(path)), overrides or {})
    return parse_options(RunConfig, tree, "")


def to_yaml(config: RunConfig) -> str:
    """The fully resolved config, every default written out."""
    tree = config.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False)
