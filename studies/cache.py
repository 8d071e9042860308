"""The one cache of results: numbers and tensors, with the settings that they were made with and checksums."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.artefact import read_artefact, write_artefact
from torchcdm.training.config_files import differences

KIND = "result"

Made = tuple[dict[str, Any], Mapping[str, Tensor]]
"""Numbers and text (JSON), and tensors, which may be none."""


def kept(path: Path | None, settings: Mapping[str, Any], make: Callable[[], Made]) -> Made:
    """What ``make`` gives, from an earlier call with the same settings where there was one.

    Args:
        path: The JSON file; tensors lie beside it. Nothing is kept when None.
        settings: What the result depends on (JSON).
        make: Makes it.

    Raises:
        UserError: The file is of other settings or damaged, or cannot be written.
    """
    if path is None:
        return make()
    found = read(path, settings)
    if found is None:
        values, tensors = make()
        parts = {path.with_suffix(".safetensors").name: tensors} if tensors else {}
        write_artefact(path, KIND, {"settings": settings, "values": values}, parts)
        found = read(path, settings)
    return found


def read(path: Path, settings: Mapping[str, Any]) -> Made | None:
    """A kept result; None where there is none.

    Raises:
        UserError: It is of other settings, or damaged.
    """
    if not path.exists():
        return None
    content, parts = read_artefact(path, KIND, None)
    for field, own, other in differences(json.loads(json.dumps(settings)), content["settings"]):
        raise UserError(f"{path}: was made with {field} = {other}, not {own}; remove it, or choose another --out")
    return content["values"], parts[0] if parts else {}


def numbers(path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """As :func:`kept`, for results without tensors."""
    return kept(path, settings, lambda: (make(), {}))[0]
