"""Untrusted JSON to frozen dataclasses, with the type of every field checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")


def parse_record(cls: type[Record], values: Any) -> Record:
    """An instance of the dataclass ``cls`` from plain ``values``.

    Handles str, bool, int, float, None, unions, Literal, ``tuple[X, ...]``, ``dict[str, X]`` and nested
    dataclasses. Raises :class:`TypeError` naming the field, or whatever the class's own checks raise.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{cls.__name__}: expected an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(str(key) for key in values.keys() - hints.keys())
    if unknown:
        raise TypeError(f"{cls.__name__}: unknown field {unknown[0]!r}")
    fields = {key: _parse(hints[key], value, f"{cls.__name__}.{key}") for key, value in values.items()}
    required = {
        item.name
        for item in dataclasses.fields(typing.cast(Any, cls))
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - fields.keys()):
        raise TypeError(f"{cls.__name__}: field {missing[0]!r} is missing")
    return cls(**fields)


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return parse_record(hint, value)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _parse(inner, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(arguments[0], item, where) for item in value)
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): _parse(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    raise TypeError(f"{where}: {value!r} is not {getattr(hint, '__name__', hint)}")
