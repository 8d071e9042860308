"""Estimators on disk: the model as of any run, and ``estimator.json`` beside it. No pickles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchcdm.errors import UserError
from torchcdm.runtime.files import write_json
from torchcdm.training.checkpoint import ModelInfo, load, read_info, read_json, save_model
from torchcdm.training.run_folder import RunFolder

FORMAT = 1
FILE = "estimator.json"


def write_estimator(
    folder: str | Path, kind: str, model: nn.Module, info: ModelInfo, params: dict[str, Any], fitted: dict[str, Any]
) -> None:
    """Writes ``model.safetensors``, ``config.json`` and ``estimator.json``.

    Args:
        folder: Made where it is not there.
        kind: Name of the estimator's class.
        model: The trained model.
        info: What ``config.json`` says of it.
        params: The estimator's parameters; those that JSON has no form for, such as generators, become None.
        fitted: What else it learned, plain Python values.

    Raises:
        UserError: A file cannot be written.
    """
    run = RunFolder(Path(folder))
    run.make()
    save_model(run, model, info)
    params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
    plain = {key: value if _is_plain(value) else None for key, value in params.items()}
    write_json(run.root / FILE, {"format": FORMAT, "estimator": kind, "params": plain, "fitted": fitted})


def read_estimator(
    folder: str | Path, kind: str, device: str | torch.device
) -> tuple[nn.Module, ModelInfo, dict[str, Any], dict[str, Any]]:
    """The model in float64, its information, the parameters, and what was fitted.

    Raises:
        UserError: No estimator there, one of another kind or format, or files that are damaged.
    """
    path = Path(folder) / FILE
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')}, but this torchcdm reads {FORMAT}")
    if content.get("estimator") != kind:
        raise UserError(f"{path}: holds a {content.get('estimator')}; load it with that class, not {kind}")
    with restoring(folder):
        params, fitted = content["params"], content["fitted"]
    return load(folder, device).double(), read_info(folder), params, fitted


@contextmanager
def restoring(folder: str | Path) -> Iterator[None]:
    """Says of what is missing or wrong in a file that was read that the file is damaged."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{Path(folder) / FILE}: damaged, {error} is missing or wrong") from None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
