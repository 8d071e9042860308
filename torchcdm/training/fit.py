"""Training in one call: a model by a preset, with a network of your own, or a model that you made."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchcdm.data import DataOptions, DataSource, from_object, load_data, spec_of
from torchcdm.errors import UserError, nearest, reason
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.validation import read_as
from torchcdm.training import loop
from torchcdm.training.build import check_label, describe, imported, in_units
from torchcdm.training.checkpoint import load, load_weights, read_info
from torchcdm.training.config_files import make_config, merge, preset_fields
from torchcdm.training.loop import Interrupted
from torchcdm.training.scale import with_budget
from torchcdm.training.settings import BACKBONES, Config, TrainConfig

M = TypeVar("M", bound=Denoiser)

OF_FILES = ("spec", "size", "crop", "channels", "limit", "label")
"""Fields of the data without effect on Python objects."""

IN_SOURCES = ("validation_fraction", "test_fraction", "seed", "dequantize")
"""Fields that a :class:`DataSource` was made with."""


def fit(
    data: Any,
    /,
    labels: Any = None,
    *,
    preset: str | None = None,
    backbone: nn.Module | str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    budget: str | float | None = None,
    **overrides: Any,
) -> ClassificationDiffusion:
    """Trains a model on data that are at hand and returns the best one on a validation split.

    Args:
        data: Tensor or array of images (N, C, H, W) or vectors (N, d), integers for grey levels and floats for
            continuous values; a data frame; a torch Dataset; a pair (samples, labels); the path of a table, an array
            or a folder of images, or a SPEC as on the command line.
        labels: Classes (N,); the model is conditional where ``model={"labels": ...}`` says so. Of a data frame or the
            path of a table, the name of a column.
        preset: Name of a preset; ``encoder`` for images and ``mlp`` for vectors when None.
        backbone: A network of your own instead of the preset's: ``x (B, *shape) -> (B, T+2)``, twice differentiable.
            With an attribute ``classes`` it is called with labels, too; with ``joint`` true it gives (B, classes,
            T+2). It is trained in place. ``torchcdm.networks.heads`` has last layers for it. ``FILE.py:NAME`` runs the
            file and takes what ``NAME()`` gives; the run then knows where its code is, see :func:`torchcdm.load`.
        out: Folder of the run; when None nothing is kept and no samples are drawn.
        device: As in :func:`torchcdm.training.loop.train`.
        progress: Shows a progress bar, and what was read off the data.
        budget: Time for all of it: seconds, or a text such as ``10m``. The preset ``encoder`` takes the largest
            network that has enough steps in it, and half an hour where neither this nor ``steps`` is given.
        **overrides: Fields of the training (``steps=2000``, ``lr=1e-3``), or sections with their fields
            (``model={"backbone": {"width": 48}}``).

    Returns:
        The model, in eval mode; its type is said for the usual case, see :func:`torchcdm.load`.

    Raises:
        UserError: Data or overrides that are not understood, or a network whose output does not fit.

    Example:
        >>> model = fit(torch.randn(1000, 3), steps=500)
        >>> model.log_prob(torch.zeros(1, 3))
    """
    source, layers = _prepared("fit", data, labels, preset, overrides, progress)
    config = with_budget(layers, source if backbone is None else None, budget, device, progress)
    check_label(labels if isinstance(labels, str) else None, config.model)
    code, network = (backbone, imported(backbone)) if isinstance(backbone, str) else (None, backbone)
    if network is not None:
        seen = "input" if getattr(network, "classes", None) is not None else "none"
        custom = BACKBONES["custom"](code=code)
        labels = "joint" if getattr(network, "joint", False) else seen
        config = replace(config, model=replace(config.model, backbone=custom, labels=labels))
        check_network(network, source, config.model.schedule.T + 2)
    return trained(config, source, device, progress, out=out, backbone=network)


def train(
    model: M,
    data: Any,
    /,
    labels: Any = None,
    *,
    preset: str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> M:
    """Trains a model that you made, in place, and leaves it with its best weights on a validation split.

    Args:
        model: Network, schedule and base density of your choice. A model without a transform gets that of the data.
        data: As for :func:`fit`, and in the units of the model's transform.
        labels: As for :func:`fit`.
        preset: Name of the preset whose optimiser and loss are taken; ``encoder`` for images and ``mlp`` for vectors
            when None.
        out: Folder of the run; when None nothing is kept.
        device: Where it is trained, and left; when None the best there is, and the CPU.
        progress: Shows a progress bar, and what was read off the data.
        **overrides: As for :func:`fit`, without ``model``.

    Returns:
        The same model, in eval mode.

    Raises:
        UserError: Data or overrides that are not understood, data that do not fit the model, or a model with parts
            that cannot be saved.

    Example:
        >>> schedule = UniformSigmaSchedule(100)
        >>> model = ClassificationDiffusion(MLP(3, levels=102), schedule)
        >>> model = train(model, torch.randn(1000, 3), steps=500)
    """
    if "model" in overrides:
        raise UserError("train: the model is made already; its settings have no effect")
    source, layers = _prepared("train", data, labels, preset, overrides, progress)
    config = make_config(*layers)
    source = in_units(source, config.data)
    if model.transform is None:
        model.transform = copy.deepcopy(source.transform)
    elif model.shape != source.shape:
        raise UserError(f"train: the data have shape {source.shape}; the model takes {model.shape}")
    if model.backbone is not None:
        check_network(model.backbone, source, model.schedule.T + 2, denoiser=model.density is None)
    source = replace(source, transform=model.transform)
    config = replace(config, model=describe(model), data=replace(config.data, gaussianize=False))
    if not any(weights.requires_grad for weights in model.parameters()):
        model.requires_grad_(True)  # one that was loaded
    return trained(config, source, device, progress, out=out, model=model)


def check_network(network: nn.Module, source: DataSource, levels: int, denoiser: bool = False) -> None:
    """Refuses a network of one's own whose output does not fit, before it is trained.

    ``levels`` are T + 2. A ``denoiser``, which estimates the noise and is called with the level, is not called here.
    UserError for another shape than (2, levels), or (2, classes, levels), from two samples; another number of classes
    than that of the data; or batch normalisation, which mixes samples.
    """
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        raise UserError("the network has batch normalisation, which mixes samples: use nn.GroupNorm or nn.LayerNorm")
    classes, joint = getattr(network, "classes", None), getattr(network, "joint", False)
    if classes is not None and classes != source.classes:
        raise UserError(f"the network has {classes} classes and the data {source.classes or 'none'}; they must agree")
    if denoiser:
        return
    weight = next(network.parameters(), torch.empty(()))
    x = torch.zeros(2, *source.shape, device=weight.device, dtype=weight.dtype)
    y = () if classes is None else (torch.zeros(2, dtype=torch.long, device=weight.device),)
    wanted = (2, classes, levels) if joint else (2, levels)
    try:
        with torch.no_grad():
            h = network(x, *y)
    except RuntimeError as error:
        raise UserError(f"the network does not take inputs of shape {tuple(x.shape)} ({reason(error)})") from None
    found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
    if found != wanted:
        mend = f"end it with torchcdm.networks.heads.CumulativeHead(features, levels={levels})"
        raise UserError(f"the network gives {found} for two samples; {wanted} is needed, a number a level: {mend}")


def trained(
    config: Config,
    source: DataSource,
    device: str | None,
    progress: bool,
    clock: Callable[[], float] = time.monotonic,
    out: str | Path | None = None,
    backbone: nn.Module | None = None,
    model: Denoiser | None = None,
) -> Any:
    """Trains, and gives the model that was kept: a new one, with ``backbone`` if it is given, or ``model``.

    Where ``out`` is None nothing is left on the disk, and no samples are drawn. Other arguments and errors are those
    of :func:`torchcdm.training.loop.train`.
    """
    if out is None:
        config = replace(config, sampling=replace(config.sampling, n=0))
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as folder:
        run = Path(folder) / "run" if out is None else Path(folder)
        try:
            source = in_units(source, config.data)
            loop.train(config, run, source, False, device, progress, clock, backbone=backbone, model=model)
        except Interrupted as error:
            if out is not None:
                raise
            raise Interrupted(error.number, "the training was stopped by a signal; nothing of it is kept") from None
        if model is None:
            return load(run, device or "cpu", backbone)
        load_weights(model, run)
        model.info = read_info(run)
    return model.eval().to(device or "cpu")


def _prepared(
    caller: str, data: Any, labels: Any, preset: str | None, overrides: Mapping[str, Any], progress: bool
) -> tuple[DataSource, list[dict[str, Any]]]:
    """The data, and the fields of preset and overrides; those of the data without effect are refused."""
    layer = override_fields(overrides, caller)
    options, from_files = read_as(DataOptions, layer.get("data", {}), "data"), isinstance(data, (str, Path))
    for name in ("spec",) if from_files else OF_FILES + IN_SOURCES * isinstance(data, DataSource):
        if getattr(options, name) != getattr(DataOptions(), name):
            raise UserError(f"{caller}: data.{name} has no effect here; change the data that you give instead")
    if from_files and labels is not None and not isinstance(labels, str):
        mend = "give the name of a table's column, or none"
        raise UserError(f"{caller}: labels of data from files lie in the files; {mend}")
    if from_files:
        source = load_data(options, spec=spec_of(data), label=labels or options.label)
    else:
        source = from_object(data, labels, options)
    if progress:
        print(*source.notes, sep="\n")
    return source, [preset_fields(preset or ("mlp" if len(source.shape) == 1 else "encoder")), layer]


def override_fields(overrides: Mapping[str, Any], caller: str = "fit") -> dict[str, Any]:
    """Keyword arguments as the fields of a configuration: those that are no section belong to the training.

    UserError for a name that is neither, with the nearest.
    """
    sections, training = [{field.name for field in fields(kind)} for kind in (Config, TrainConfig)]
    layer: dict[str, Any] = {"train": {}}
    for name, value in overrides.items():
        if name not in sections | training:
            raise UserError(f"{caller}: unknown override '{name}'; {nearest(name, sections | training)}")
        layer = merge(layer, {name: value} if name in sections else {"train": {name: value}})
    return layer
