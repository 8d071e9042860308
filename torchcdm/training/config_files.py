"""Where a configuration comes from, weakest first: its defaults, a preset, a YAML file, flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from torchcdm.errors import UserError, nearest
from torchcdm.training.codec import decode, encode, merge
from torchcdm.training.settings import Config

_PRESETS = files("torchcdm.training") / "presets"


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PRESETS.iterdir() if entry.name.endswith(".yaml"))


def preset_fields(name: str) -> dict[str, Any]:
    """What a preset sets, with what it extends.

    Raises:
        UserError: There is none of that name.
    """
    if name not in preset_names():
        raise UserError(f"unknown preset '{name}'; {nearest(name, preset_names())}")
    fields = yaml.safe_load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    parent = fields.pop("extends", None)
    return merge(preset_fields(parent) if parent else {}, fields | {"preset": name})


def file_fields(path: str | Path) -> dict[str, Any]:
    """What a YAML file sets; its key ``extends``, if any, names a preset that it builds on.

    Raises:
        UserError: Missing, or not YAML.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a configuration holds fields with values, such as 'train: {{steps: 1000}}'")
    parent = fields.pop("extends", None)
    return merge(preset_fields(parent), fields) if parent else fields


def flag_fields(flags: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Flags ``section.field`` with the text of a YAML value, as nested fields."""
    fields: dict[str, Any] = {}
    for path, text in flags:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--{path}: '{text}' is not a YAML value") from None
        *parents, leaf = path.split(".")
        here = fields
        for parent in parents:
            below = here.get(parent, {})
            below = {"name": below} if isinstance(below, str) else below
            here[parent] = below
            here = below
        here[leaf] = merge({leaf: here.get(leaf)}, {leaf: value})[leaf]
    return fields


def make_config(*layers: Mapping[str, Any]) -> Config:
    """The configuration of these fields, laid on the defaults and on each other, the last strongest.

    Raises:
        UserError: An unknown field or a wrong value, by its dotted path and with the nearest name.
    """
    fields: dict[str, Any] = encode(Config())
    for layer in layers:
        fields = merge(fields, layer)
    return decode(Config, fields)
