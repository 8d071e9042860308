"""Training in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torchcdm.checkpoint import load
from torchcdm.config import Config, TrainConfig, make_config, preset_fields
from torchcdm.data import from_object
from torchcdm.denoisers import Denoiser
from torchcdm.errors import UserError, nearest
from torchcdm.trainer import train


def fit(
    data: Any,
    /,
    preset: str | None = None,
    labels: Any = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Denoiser:
    """Trains a model on data that are at hand and returns the best one on a validation split.

    Args:
        data: Tensor or array of images (N, C, H, W) or vectors (N, d), integers for grey levels and floats for
            continuous values; a data frame; a torch Dataset; a pair (samples, labels).
        preset: Name of a preset; ``encoder`` for images and ``mlp`` for vectors when None.
        labels: Classes (N,); the model is conditional where ``model={"labels": ...}`` says so.
        out: Folder of the run; kept nowhere when None.
        device: As in :func:`torchcdm.trainer.train`.
        progress: Shows a progress bar.
        **overrides: Fields of the training (``steps=2000``, ``lr=1e-3``), or sections with their fields
            (``model={"backbone": {"width": 48}}``).

    Returns:
        The model, in eval mode.

    Raises:
        UserError: Data or overrides that are not understood.

    Example:
        >>> model = fit(torch.randn(1000, 3), steps=500)
        >>> model.log_prob(torch.zeros(1, 3))
    """
    layer = override_fields(overrides)
    data_options = layer.get("data", {})
    source = from_object(
        data,
        labels,
        data_options.get("validation_fraction"),
        data_options.get("test_fraction"),
        data_options.get("seed", 0),
        data_options.get("dequantize", True),
    )
    preset = preset or ("mlp" if len(source.shape) == 1 else "encoder")
    config = make_config(preset_fields(preset), layer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run" if out is None else Path(out)
        train(config, folder, source, device=device, progress=progress)
        return load(folder, device or "cpu")


def override_fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as the fields of a configuration: those that are no section belong to the training.

    Raises:
        UserError: A name that is neither, with the nearest.
    """
    sections, training = [{f.name for f in fields(kind)} for kind in (Config, TrainConfig)]
    layer = {name: value for name, value in overrides.items() if name in sections}
    in_training = {name: value for name, value in overrides.items() if name not in sections}
    for name in in_training:
        if name not in training:
            raise UserError(f"fit: unknown override '{name}'; {nearest(name, sections | training)}")
    return layer | {"train": {**layer.get("train", {}), **in_training}}
