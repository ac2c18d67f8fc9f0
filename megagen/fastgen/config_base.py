"""A checked group of settings that is also a mapping and may travel in a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class ConfigBase(BaseModel, MutableMapping[str, Any]):
    """Settings with fixed keys: attributes and a ``MutableMapping`` at once.

    ``config["a"]`` is ``config.a``; iteration, ``len``, ``keys``, ``items``, ``get`` and ``{**c}``
    run over the fields in their order. A field's alias, where it has one, serves as its key.
    Every subclass may be read by ``torch.load(..., weights_only=True)``.

    Raises:
        ValueError: (pydantic's ``ValidationError``) an unknown key at construction, a value of the
            wrong type or out of range, settings that contradict one another. A rejected assignment
            leaves the config as it was.
        KeyError: an unknown key read or written as a mapping's.
        TypeError: deletion of a key, also through ``pop``, ``popitem`` and ``clear``.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])

    @model_validator(mode="before")
    @classmethod
    def _suggest_for_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and cls.model_config.get("extra") == "forbid":
            known = {*cls.model_fields, *_keys(cls)}
            unknown = [key for key in data if key not in known]
            if unknown:
                text = "; ".join(_unknown(key, known) for key in unknown)
                raise PydanticCustomError("extra_forbidden", "{text}", {"text": text})
        return data

    def __setattr__(self, name: str, value: Any) -> None:
        values, given = dict(self.__dict__), set(self.__pydantic_fields_set__)
        try:
            super().__setattr__(name, value)
        except Exception:
            # pydantic runs checks over the whole object on the object itself, already changed
            self._become(values, given)
            raise

    def _become(self, values: dict[str, Any], given: set[str]) -> None:
        object.__setattr__(self, "__dict__", values)
        object.__setattr__(self, "__pydantic_fields_set__", given)

    def get_field_name_from_key(self, key: str) -> str:
        """The field that ``key``, its name or alias, stands for.

        Raises:
            AttributeError: there is none.
        """
        fields = type(self).model_fields
        if isinstance(key, str):
            if key in fields:
                return key
            for name, field in fields.items():
                if field.alias == key:
                    return name
        raise AttributeError(f"{type(self).__name__}: {_unknown(key, _keys(type(self)))}")

    def _field(self, key: str) -> str:
        try:
            return self.get_field_name_from_key(key)
        except AttributeError:
            raise KeyError(key) from None

    def __getitem__(self, key: str) -> Any:
        return getattr(self, self._field(key))

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, self._field(key), value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{type(self).__name__} has fixed keys: {key!r} cannot be deleted")

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        return iter(_keys(type(self)))

    def __len__(self) -> int:
        return len(type(self).model_fields)

    def update(  # type: ignore[override]
        self, config: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), **changes: Any
    ) -> None:
        """Assigns several keys at once: checked together, so their order does not matter.

        All checks of a construction are made on the outcome, and either every key is assigned or,
        where one is unknown or rejected, none. A nested config given as a mapping replaces the old
        one whole.

        Args:
            config: a mapping, or pairs of key and value.
            changes: more of them.

        Raises:
            KeyError: an unknown key.
            ValueError: the outcome is rejected.
        """
        wanted = {self._field(key): value for key, value in {**dict(config), **changes}.items()}
        fields = type(self).model_fields
        merged = {**{name: getattr(self, name) for name in fields}, **wanted}
        new = type(self).model_validate(
            {fields[name].alias or name: value for name, value in merged.items()}
        )
        self._become(dict(new.__dict__), self.__pydantic_fields_set__ | set(wanted))

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """pydantic's dump, by alias and without warnings unless told otherwise."""
        return super().model_dump(**{"by_alias": True, "warnings": False, **kwargs})

    def model_dump_json(self, **kwargs: Any) -> str:
        """pydantic's JSON, by alias and without warnings unless told otherwise."""
        return super().model_dump_json(**{"by_alias": True, "warnings": False, **kwargs})


def _keys(config_class: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in config_class.model_fields.items()]


def _unknown(key: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else "")
