"""The package of plugins: its names, and what is missing on a machine."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from megagen.fastgen import plugins
from megagen.fastgen.plugins import qwen_image


@pytest.fixture
def published_qwen(published: Any) -> Any:
    return importlib.import_module(f"{published.__name__}.plugins.qwen_image")


def test_the_package_has_the_published_names(published_qwen: Any) -> None:
    released = importlib.import_module(published_qwen.__package__)
    for name in published_qwen.__all__:
        assert hasattr(released, name) and getattr(plugins, name) is getattr(qwen_image, name)


def test_a_missing_package_is_passed_over_and_other_trouble_is_a_warning() -> None:
    with plugins._optional("family"):
        importlib.import_module("surely_not_installed_anywhere")
    with pytest.warns(UserWarning, match=r"family.*ZeroDivisionError"), plugins._optional("family"):
        raise ZeroDivisionError
    with pytest.raises(ModuleNotFoundError), plugins._optional("family"):
        importlib.import_module("megagen.fastgen.surely_not")
