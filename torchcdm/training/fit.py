"""Training in one call."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torchcdm.data import DataOptions, DataSource, from_object, load_data, spec_of
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.validation import read_as
from torchcdm.training.build import check_label, in_units
from torchcdm.training.checkpoint import load
from torchcdm.training.config_files import preset_fields
from torchcdm.training.interrupt import Interrupted
from torchcdm.training.loop import train
from torchcdm.training.scale import scales, with_budget
from torchcdm.training.settings import Config, TrainConfig

WITHOUT_EFFECT = {
    "spec": "the data themselves are the first argument",
    "size": "resize the images before",
    "channels": "convert the images before",
    "limit": "give fewer samples",
    "label": "give the classes, or the name of a data frame's column, as labels",
}
"""Fields of the data without effect on Python objects, and what to do instead."""

IN_SOURCES = ("validation_fraction", "test_fraction", "seed", "dequantize")
"""Fields that a :class:`DataSource` was made with."""


def fit(
    data: Any,
    /,
    labels: Any = None,
    *,
    preset: str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    budget: str | float | None = None,
    **overrides: Any,
) -> Denoiser:
    """Trains a model on data that are at hand and returns the best one on a validation split.

    Args:
        data: Tensor or array of images (N, C, H, W) or vectors (N, d), integers for grey levels and floats for
            continuous values; a data frame; a torch Dataset; a pair (samples, labels); the path of a table, an array
            or a folder of images, or a SPEC as on the command line.
        labels: Classes (N,); the model is conditional where ``model={"labels": ...}`` says so. Of a data frame or the
            path of a table, the name of a column.
        preset: Name of a preset; ``encoder`` for images and ``mlp`` for vectors when None.
        out: Folder of the run; when None nothing is kept and no samples are drawn.
        device: As in :func:`torchcdm.training.loop.train`.
        progress: Shows a progress bar, and what was read off the data.
        budget: Time for all of it: seconds, or a text such as ``10m``. The preset ``encoder`` takes the largest
            network that has enough steps in it, and half an hour where neither this nor ``steps`` is given.
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
    source = _source(data, labels, read_as(DataOptions, layer.get("data", {}), "data"))
    if progress:
        print(*source.notes, sep="\n")
    preset = preset or ("mlp" if len(source.shape) == 1 else "encoder")
    layers = [preset_fields(preset), layer]
    ready = in_units(source, DataOptions(**layer.get("data", {}))) if scales(layers, budget) else None
    config, notes = with_budget(layers, ready, budget, device)
    check_label(labels if isinstance(labels, str) else None, config.model)
    if progress:
        print(*notes, sep="\n", end="\n" * bool(notes))
    if out is None:
        with trained(config, source, device, progress) as folder:
            return load(folder, device or "cpu")
    train(config, out, in_units(source, config.data), device=device, progress=progress)
    return load(out, device or "cpu")


@contextmanager
def trained(
    config: Config,
    source: DataSource,
    device: str | None,
    progress: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Path]:
    """Trains, and gives the run folder, which does not outlive the block; no samples are drawn for it.

    Arguments as in :func:`torchcdm.training.loop.train`.

    Raises:
        Interrupted: A signal stopped the training; nothing is left of it.
    """
    config = replace(config, sampling=replace(config.sampling, n=0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        try:
            train(config, folder, in_units(source, config.data), device=device, progress=progress, clock=clock)
        except Interrupted as error:
            raise Interrupted(error.number, "the training was stopped by a signal; nothing of it is kept") from None
        yield folder


def _source(data: Any, labels: Any, options: DataOptions) -> DataSource:
    """The data by the options; those without effect are refused."""
    from_files = isinstance(data, (str, Path))
    without_effect = {"spec": WITHOUT_EFFECT["spec"]} if from_files else WITHOUT_EFFECT
    if isinstance(data, DataSource):
        without_effect = without_effect | dict.fromkeys(IN_SOURCES, "make the DataSource with it")
    for name, mend in without_effect.items():
        if getattr(options, name) != getattr(DataOptions(), name):
            raise UserError(f"fit: data.{name} has no effect here; {mend}")
    if not from_files:
        return from_object(data, labels, options)
    if labels is not None and not isinstance(labels, str):
        raise UserError("fit: labels of data from files lie in the files; give the name of a table's column, or none")
    return load_data(options, spec=spec_of(data), label=labels or options.label)


def override_fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as the fields of a configuration: those that are no section belong to the training.

    Raises:
        UserError: A name that is neither, with the nearest.
    """
    sections, training = [{field.name for field in fields(kind)} for kind in (Config, TrainConfig)]
    layer = {name: value for name, value in overrides.items() if name in sections}
    train_fields = {name: value for name, value in overrides.items() if name not in sections}
    if unknown := sorted(train_fields.keys() - training):
        raise UserError(f"fit: unknown override '{unknown[0]}'; {nearest(unknown[0], sections | training)}")
    return layer | {"train": {**layer.get("train", {}), **train_fields}}
