"""Estimators on disk: a run whose ``config.json`` holds parameters and what was fitted beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchcdm.errors import UserError
from torchcdm.runtime.artefact import damaged
from torchcdm.training.checkpoint import ModelInfo, load, read_info, save_model
from torchcdm.training.run_folder import RunFolder


def write_estimator(
    folder: str | Path, kind: str, model: nn.Module, info: ModelInfo, params: dict[str, Any], fitted: dict[str, Any]
) -> None:
    """Writes ``model.safetensors`` and ``config.json``.

    Args:
        folder: Made where it is not there; an estimator that it holds is replaced.
        kind: Name of the estimator's class.
        model: The trained model.
        info: What ``config.json`` says of it.
        params: The estimator's parameters; those that JSON has no form for, such as generators, become None.
        fitted: What else it learned, plain Python values.

    Raises:
        UserError: A file cannot be written, or the folder holds a run or files of another origin.
    """
    params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
    plain = {key: value if _is_plain(value) else None for key, value in params.items()}
    info = info.model_copy(update={"estimator": {"kind": kind, "params": plain, "fitted": fitted}})
    run = RunFolder(folder)
    with run.locked():
        save_model(run, model, info)


def read_estimator(
    folder: str | Path, kind: str, device: str | torch.device
) -> tuple[nn.Module, ModelInfo, dict[str, Any], dict[str, Any]]:
    """The model in float64, its information, the parameters, and what was fitted.

    Raises:
        UserError: No estimator there, one of another kind or format, or files that are damaged.
    """
    info = read_info(folder)
    content = info.estimator or {}
    if content.get("kind") != kind:
        raise UserError(f"{folder}: holds a {content.get('kind', 'run')}; load it with that class, not {kind}")
    with restoring(folder):
        params, fitted = content["params"], content["fitted"]
    return load(folder, device).double(), info, params, fitted


@contextmanager
def restoring(folder: str | Path) -> Iterator[None]:
    """Says of what is missing or wrong in a file that was read that the file is damaged."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        damaged(RunFolder(folder).model_info, f"estimator: {error} is missing or wrong")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
