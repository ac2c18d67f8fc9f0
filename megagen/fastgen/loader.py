"""Configs from YAML: the recipes that come with the package first, then the file system.

A recipe goes by its name (``dmd2_qwen_image``) or by its path in ModelOpt's recipe library
(``general/distillation/dmd2_qwen_image``).
"""

from __future__ import annotations

import difflib
import logging
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megagen.fastgen.config import DistillationConfig, DMDConfig

__all__ = ["load_config", "load_dmd_config"]

Config = TypeVar("Config", bound=DistillationConfig)

_LOG = logging.getLogger(__name__)
_SUFFIXES = (".yml", ".yaml")
_LIBRARY = "general/distillation/"
"""Where ModelOpt's recipe library keeps its recipes of distillation."""


def load_config(config_file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    A built-in recipe is taken before a file of the same name, with a warning where there are both:
    ``"./name"`` is always a file. Where the name does not end in ``.yml`` or ``.yaml``, first the
    one and then the other is appended (so ``dot.v1`` finds ``dot.v1.yaml``).

    Args:
        config_file: a recipe's name, or a path, absolute or from the working directory.

    Returns:
        Its content as plain Python objects; ``{}`` for a file that holds nothing but comments.

    Raises:
        TypeError: ``config_file`` is neither a string nor a path.
        FileNotFoundError: there is no such recipe and no such file.
        ValueError: the content is not a mapping.
    """
    found = _locate(config_file)
    content = yaml.safe_load(found.read_text(encoding="utf-8"))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{found} holds a {type(content).__name__}, not a mapping of keys")
    return content


def load_dmd_config(config_file: str | Path, config_class: type[Config] = DMDConfig) -> Config:  # type: ignore[assignment]
    """A config from a built-in recipe or a YAML file, checked.

    Args:
        config_file: see ``load_config``.
        config_class: what to make of it; ``ExtendedDMDConfig`` reads a key ``extensions`` as well.

    Raises:
        TypeError: ``config_file`` is neither a string nor a path.
        FileNotFoundError: there is no such recipe and no such file.
        ValueError: (pydantic's ``ValidationError`` too) not a mapping, an unknown key, a value that
            ``config_class`` rejects.
    """
    return config_class.model_validate(load_config(config_file))


def _locate(config_file: str | Path) -> Traversable:
    if not isinstance(config_file, str | Path):
        raise TypeError(f"a str or a Path, found a {type(config_file).__name__}: {config_file!r}")
    name = config_file.as_posix() if isinstance(config_file, Path) else config_file
    names = [name] if name.endswith(_SUFFIXES) else [name + suffix for suffix in _SUFFIXES]
    folder = _recipes()
    recipes = {entry.name: entry for entry in folder.iterdir()} if folder.is_dir() else {}
    built_in = [recipes[n] for n in (n.removeprefix(_LIBRARY) for n in names) if n in recipes]
    on_disk = [path for path in map(Path, names) if path.is_file()]
    if built_in and on_disk:
        _LOG.warning("%s is a built-in recipe, taken instead of the file %s", name, on_disk[0])
    if built_in or on_disk:
        return [*built_in, *on_disk][0]
    known = sorted(recipe.removesuffix(".yaml") for recipe in recipes)
    close = difflib.get_close_matches(name.split("/")[-1].removesuffix(".yaml"), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"recipes: {', '.join(known)}"
    raise FileNotFoundError(f"no built-in recipe and no file {name!r} ({' '.join(names)}); {hint}")


def _recipes() -> Traversable:
    """The folder of the built-in recipes: a built package holds a copy of the repository's."""
    packaged = files("megagen.fastgen").joinpath("recipes")
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs" / "fastgen"
