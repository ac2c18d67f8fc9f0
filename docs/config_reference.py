"""Writes ``docs/config.md`` from the option classes: names, types, defaults, and their docstrings.

    python docs/config_reference.py     (or: make docs)

A test compares the file with what this would write.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megagen.callbacks import CALLBACKS
from megagen.callbacks.builtin import EMAOptions, GradClipOptions
from megagen.config import schema
from megagen.core.registry import resolve
from megagen.data.codecs import CODECS
from megagen.data.options import DataOptions
from megagen.data.preprocess import PreprocessOptions
from megagen.data.prompts import PromptOptions
from megagen.data.text import TEXT_ENCODERS
from megagen.methods import METHODS
from megagen.models import MODELS

TARGET = Path(__file__).parent / "config.md"
HEAD = """# Configuration

This page is written by `make docs` from the option classes; do not edit it.

A run is one YAML file: `megagen train --config run.yaml`. Every key can be overridden on the
command line by its dotted path (`--training.optimizer.learning_rate 1e-4`). A key that nobody knows
is an error that names the nearest ones; 0 is a value, `null` is unset. `--dry-run` checks the whole
file, prints the plan and ends, without weights and without a GPU. `_target_` takes a short name or
a dotted path to a class of your own.
"""


def sections() -> list[tuple[str, str, type[BaseModel]]]:
    """(heading, introduction, class) of every section, in the order of the page."""
    found: list[tuple[str, str, type[BaseModel]]] = [
        ("models.&lt;role&gt;", "One network; a run has one or several.", schema.RoleOptions),
        ("models.&lt;role&gt;.attention", "", schema.AttentionOptions),
        ("models.&lt;role&gt;.attention.vsa", "", schema.VSAOptions),
        ("models.&lt;role&gt;.optimizer", "", schema.RoleOptimizerOptions),
        ("models.&lt;role&gt;.lora", "", schema.LoraOptions),
    ]
    for name, target in MODELS.items():
        options = resolve(target).Options
        found.append((f"models.&lt;role&gt;, _target_: {name}", "The model's own keys.", options))
        found += [
            (f"models.&lt;role&gt;.{key}, _target_: {name}", "", inner)
            for key, inner in nested(target).items()
        ]
    seen: set[type[BaseModel]] = set()
    for name, target in METHODS.items():
        options = resolve(target).Options
        found.append((f"method, _target_: {name}", "", options))
        for key, field in options.model_fields.items():
            inner = [
                c for c in (field.annotation, *typing.get_args(field.annotation)) if is_section(c)
            ]
            found += [(f"method.{key}", "", cls) for cls in inner if cls not in seen]
            seen.update(inner)
    found += [
        ("training", "", schema.TrainingOptions),
        ("training.distributed", "", schema.DistributedOptions),
        ("training.data", "", DataOptions),
        ("training.optimizer", "", schema.OptimizerOptions),
        ("training.loop", "", schema.LoopOptions),
        ("training.checkpoint", "", schema.CheckpointOptions),
        ("training.tracker", "", schema.TrackerOptions),
        ("callbacks.ema", "", EMAOptions),
        ("callbacks.grad_clip", "", GradClipOptions),
    ]
    for name, target in CALLBACKS.items():
        found.append((f"callbacks.{name}", "", resolve(target).Options))
    found.append(("pipeline", "", schema.PipelineOptions))
    note = "Flags and config file of `megagen preprocess`."
    found.append(("megagen preprocess", note, PreprocessOptions))
    prompts_note = "Flags and config file of `megagen preprocess --prompts FILE`."
    found.append(("megagen preprocess --prompts", prompts_note, PromptOptions))
    for title, table in (("codec", CODECS), ("text_encoder", TEXT_ENCODERS)):
        for name, target in table.items():
            found.append((f"{title}, name: {name}", "", resolve(target).Options))
    return found


def is_section(annotation: Any) -> bool:
    """Whether a field holds a mapping with a class of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def nested(target: str) -> dict[str, type[BaseModel]]:
    """Keys of a model that hold a mapping with a class of its own."""
    if target != MODELS["wan"]:
        return {}
    from megagen.models.wan.architecture import WanArchitecture

    return {"architecture": WanArchitecture}


def page() -> str:
    """The whole file."""
    parts = [HEAD]
    for heading, introduction, cls in sections():
        intro = introduction or summary(cls)
        parts.append(f"\n## {heading}\n\n{intro}\n\n{table_of(cls)}")
    return "".join(parts)


def summary(cls: type[BaseModel]) -> str:
    """First sentence of the docstring, without its path."""
    text = re.sub(r"\s+", " ", (cls.__doc__ or "").split("\n\n")[0]).strip()
    text = re.sub(r"^(``[^`]+``(?:,? and |, )?)+:\s*", "", text)
    return markdown(text[:1].upper() + text[1:])


def table_of(cls: type[BaseModel]) -> str:
    """One row a key."""
    texts = descriptions(cls)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        key = field.alias or name
        cells = [f"`{key}`", type_of(field.annotation), default_of(field), texts.get(name, "")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def descriptions(cls: type[BaseModel]) -> dict[str, str]:
    """Field name -> text, from the docstrings of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= own_descriptions(base.__doc__ or "")
    return found


def own_descriptions(docstring: str) -> dict[str, str]:
    """Field name -> text, from the ``Attributes:`` or ``Args:`` of a docstring."""
    lines = re.split(r"\n\s*(?:Attributes|Args):\n", docstring)
    if len(lines) < 2:
        return {}
    items = re.split(r"\n {8}(?=\S)", "\n" + lines[1].rstrip())
    found: dict[str, str] = {}
    for item in items[1:]:
        names, _, text = item.partition(":")
        for name in names.split(","):
            found[name.strip()] = markdown(re.sub(r"\s+", " ", text).strip())
    return found


def markdown(text: str) -> str:
    """Of a docstring: code in single quotes, values as YAML has them."""
    return re.sub(r"\bNone\b", "null", text.replace("``", "`"))


def type_of(annotation: Any) -> str:
    """A short name of a type."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return type_of(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (UnionType, typing.Union):
        return " or ".join(type_of(part) for part in inner)
    if origin is not None and inner:
        return f"{origin.__name__} of {', '.join(type_of(p) for p in inner if p is not ...)}"
    if is_section(annotation):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def default_of(field: FieldInfo) -> str:
    """The default as YAML would have it."""
    if field.default_factory is not None:
        return "empty"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, BaseModel):
        return "see below"
    if field.default is None or isinstance(field.default, bool):
        return f"`{str(field.default).lower().replace('none', 'null')}`"
    return f"`{field.default}`" if field.default != "" else '`""`'


if __name__ == "__main__":
    TARGET.write_text(page())
