"""Frozen config dataclasses as JSON and back: `{"kind": class name, field: value, ...}`, nested."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dpir_jax.errors import InputError


def to_json(value: Any) -> Any:
    """A config dataclass as plain JSON values."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    return list(value) if isinstance(value, tuple) else value


def from_json(value: Any, classes: Mapping[str, type], where: str = "config") -> Any:
    """The inverse of `to_json`, for the named `classes` only.

    Raises:
      InputError: an unknown kind or an unknown or missing field, by name.
    """
    if isinstance(value, list):
        return tuple(from_json(item, classes, where) for item in value)
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    if kind not in classes:
        raise InputError(f"{where} has the unknown kind {kind!r}; known are {', '.join(sorted(classes))}")
    known = {field.name for field in dataclasses.fields(classes[kind])}
    given = {name: from_json(item, classes, f"{where}.{name}") for name, item in value.items() if name != "kind"}
    for name in given.keys() - known:
        raise InputError(f"{where}.{name} is not a setting of {kind}")
    try:
        return classes[kind](**given)
    except TypeError as error:
        raise InputError(f"{where} is not a complete {kind}: {error}") from error
