"""Frozen dataclasses from and to plain dicts, strictly: an unknown key or a wrong type is a user's mistake.

A union of dataclasses is told apart by its field ``name``, a ``Literal``. Every message names the dotted path.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torchcdm.errors import UserError, nearest

TAG = "name"

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists; what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (tuple, list)) else value


def decode(kind: type[T], value: Any, path: str = "") -> T:
    """``value`` as an instance of ``kind``.

    Args:
        kind: A dataclass, or the annotation of one of its fields.
        value: Plain Python values.
        path: Where the value stands, for messages: ``train.steps``.

    Raises:
        UserError: A key that does not exist (with the nearest that does), or a value of the wrong type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, path)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, path)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{path} is {value!r}; {nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path} is {value!r}; a list such as [1, 2] is needed")
        return tuple(decode(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        return dict(_mapping(value, path))
    return _decode_scalar(kind, value, path)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, key by key; a part whose ``name`` changes starts anew.

    A text in the place of a named part is its name: ``schedule: cosine`` is ``schedule: {name: cosine}``.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping):
            if isinstance(value, str) and TAG in old:
                value = {TAG: value}
            if isinstance(value, Mapping) and value.get(TAG, old.get(TAG)) == old.get(TAG):
                value = merge(old, value)
        merged[key] = value
    return merged


def differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two nested dicts differ, with both values; None where one lacks the key."""
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        here, a, b = _join(path, key), one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, here)
        elif a != b:
            found.append((here, a, b))
    return found


def check_settings(path: Path, mine: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Refuses a file that is kept from an earlier call with other settings.

    Args:
        path: The file.
        mine: The settings of this call (JSON).
        kept: Those that the file was made with.

    Raises:
        UserError: They differ; names a field.
    """
    for field, own, other in differences(mine, kept):
        raise UserError(f"{path}: was made with {field} = {other}, not {own}; remove it, or choose another --out")


def _decode_dataclass(kind: type, value: Any, path: str) -> Any:
    value = _mapping(value, path)
    hints = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise UserError(f"unknown field '{_join(path, key)}'; {nearest(str(key), fields)}")
    items = {key: decode(hints[key], item, _join(path, key)) for key, item in value.items()}
    try:
        return kind(**items)
    except UserError as error:
        raise UserError(f"{path}.{error}" if path else str(error)) from None


def _decode_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [arg for arg in args if arg is not type(None)]
    if len(kinds) == 1:
        return decode(kinds[0], value, path)
    value = {TAG: value} if isinstance(value, str) else _mapping(value, path)
    by_name = {get_args(get_type_hints(kind)[TAG])[0]: kind for kind in kinds}
    name = value.get(TAG)
    if name not in by_name:
        raise UserError(f"{_join(path, TAG)} is {name!r}; {nearest(str(name), by_name)}")
    return _decode_dataclass(by_name[name], value, path)


def _decode_scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float:
        # YAML reads 1e-4, without a point, as a text.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
        raise UserError(f"{path} is {value!r}; a number is needed")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        needed = {int: "a whole number", bool: "true or false", str: "a text"}[kind]
        raise UserError(f"{path} is {value!r}; {needed} is needed")
    return value


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path or 'configuration'} is {value!r}; fields with values are needed")
    return value


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
