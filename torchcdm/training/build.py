"""From a configuration to objects: names become classes by the registries of :mod:`torchcdm.training.settings`."""

import copy
import os
import runpy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchcdm.data import DataOptions, DataSource, load_data
from torchcdm.diffusion.base import StandardNormal
from torchcdm.diffusion.coarse import CoarseData
from torchcdm.diffusion.gaussian import DIAGONAL, GaussianMarginals, fit_class_gaussians
from torchcdm.diffusion.mixture import MixtureMarginals
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.diffusion.start import FIELDS, best_start
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss, DDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser, DenoisingDiffusion
from torchcdm.random import stream
from torchcdm.runtime.validation import arguments_for
from torchcdm.training.settings import BACKBONES, NETWORKS, SCHEDULE_SETTINGS, SCHEDULES, LossConfig, ModelConfig
from torchcdm.units import ColumnTransform, DataTransform, GaussianizedTransform

FittedBase = GaussianMarginals | MixtureMarginals  # what logits can be a correction to, fitted to data

HISTOGRAM_NUMBERS = 2**25  # of images that are counted at a time
GAUSSIAN_NUMBERS = 2**27  # that a base density reads of large data: a gibibyte of float64
HELD_OUT = "base density held out"  # seed of the validation samples that choose a base density or what classes share
HELD_OUT_SAMPLES, HELD_OUT_NUMBERS = 20_000, 2**24  # so many of them at most, and numbers in them


def load_source(options: DataOptions, progress: bool = False) -> DataSource:
    """The data that options name, in the units that they ask for; prints what was read off them for ``progress``."""
    source = in_units(load_data(options), options)
    if progress:
        print(*(f"{source.name}: {note}" for note in source.notes), sep="\n")
    return source


def in_units(source: DataSource, options: DataOptions) -> DataSource:
    """Data in the units that options ask for: as they are, or, for ``gaussianize``, every dimension near a normal.

    Grey levels and discrete columns go by histogram, columns of continuous numbers by a curve each, as the training
    split has them, mirrored too for ``flip``. UserError for images of continuous values.
    """
    transform, split = source.transform, source.train
    if not options.gaussianize:
        return source
    if transform.bin is None and len(source.shape) == 1:
        x, _ = split.tensors()
        bent = ColumnTransform.fit(x, transform.cells, dequantize=transform.dequantize)
        bent.table = transform.table
        return replace(source, transform=bent)
    if transform.gaussianized:
        return source
    size = max(1, min(1000, HISTOGRAM_NUMBERS // transform.dim))
    parts = (split.batch(rows)[0] for rows in torch.arange(len(split)).split(size))
    return replace(source, transform=GaussianizedTransform.fit(transform, parts, options.flip))


def resolve(config: ModelConfig, transform: DataTransform) -> ModelConfig:
    """The same with the numbers filled in that are read off the units of the data."""
    schedule = config.schedule
    if schedule.name == "log-snr" and schedule.r_min is None:
        r_min = 0.01 if transform.model_bin is None else float(transform.model_bin.min()) / 2
        schedule = replace(schedule, r_min=r_min)
    return replace(config, schedule=schedule)


def choose_base(config: ModelConfig, source: DataSource, flip: bool) -> ModelConfig:
    """:func:`resolve`, with the base density that :func:`torchcdm.diffusion.start.best_start` finds best on the
    validation split, or on every fifth training sample. Gaussians of classes choose what they share when fitted."""
    config = resolve(config, source.transform)
    given = {name: value for name in FIELDS if (value := getattr(config, name)) is not None}
    fixed = {"gaussian": True, "components": 1, "shrinkage": 0.0}
    if config.class_gaussians and given.get("components", 1) == 1:
        given |= fixed
    if config.gaussian is False or given.keys() >= {"components", "shrinkage"}:
        return replace(config, **fixed | given)
    train, _ = base_samples(source, flip)
    if source.validation:
        limit = min(HELD_OUT_SAMPLES, max(100, HELD_OUT_NUMBERS // source.transform.dim))
        # Copies of a sample, as a small table has them, would count as so many samples.
        held_out = source.transform.encode(source.validation.tensors(limit)[0].unique(dim=0), stream(0, HELD_OUT))
    else:
        chosen = torch.arange(len(train)) % 5 == 0
        train, held_out = train[~chosen], train[chosen]
    if train.ndim == 2 and len(train) < 2:  # a mixture needs two
        raise UserError(f"{source.name}: one training sample is too few for a base density; give more")
    return replace(config, **best_start(train, held_out, base_floor(source.transform), given).fields)


def base_in_words(config: ModelConfig) -> str:
    """The base density of a configuration in words."""
    if config.gaussian is False:
        return "a standard normal"
    kind = {"cosine": " of cosines", "diagonal": " without correlations"}.get(config.form, "")
    count = "a Gaussian" if (config.components or 1) == 1 else f"{config.components} Gaussians"
    return f"{count}{kind}" + (f" with shrinkage {config.shrinkage:g}" if config.shrinkage else "")


def hint(config: ModelConfig, source: DataSource) -> str:
    """What would make more of the data than the settings do; empty for nothing."""
    if config.labels != "none" or (source.classes is None and (len(source.shape) < 3 or config.kind == "ddm")):
        return ""
    if source.classes is None:
        return "groups draw better pictures, at a cost in likelihood: --data.clusters 20 --model.labels joint"
    return f"the {source.classes} classes of the data are not used; --model.labels joint learns them"


def base_samples(source: DataSource, flip: bool, least: int = 50_000) -> tuple[Tensor, Tensor]:
    """Training samples for a base density, model units, dequantised, mirrored too for ``flip``, and their labels; of
    large data as many as ``GAUSSIAN_NUMBERS`` says, but the ``least`` in any case."""
    x, y = source.train.tensors(max(least, GAUSSIAN_NUMBERS // source.transform.dim))
    z = source.transform.encode(x, stream(0, "base density"))
    return (torch.cat([z, z.flip(-1)]), torch.cat([y, y])) if flip else (z, y)


def base_floor(transform: DataTransform) -> float:
    """Least variance of a base density, model units squared: that of the dequantisation noise."""
    bin_ = transform.model_bin
    return 0.0 if bin_ is None or not transform.dequantize else float(bin_.min()) ** 2 / 12


def fit_gaussian(config: ModelConfig, source: DataSource, flip: bool) -> FittedBase:
    """Base density of a resolved configuration, fitted to the training split, mirrored too for ``flip``."""
    transform, floor, schedule = source.transform, base_floor(source.transform), build_schedule(config.schedule)
    z, y = base_samples(source, flip)
    if config.class_gaussians and bool((y < 0).any()):
        raise UserError(f"{source.name}: model.class_gaussians needs a class for every training sample")
    if config.components > 1:
        if config.class_gaussians and z.ndim > 2:
            raise UserError("model.class_gaussians with model.components is for vectors; leave components at 1")
        common = MixtureMarginals.fit(z, schedule, config.components, floor, config.shrinkage)
        return common.with_classes(z, y, source.classes) if config.class_gaussians else common
    if not config.class_gaussians:
        return GaussianMarginals.fit(z, schedule, floor, config.form, config.shrinkage)
    x, labels = source.validation.tensors(HELD_OUT_SAMPLES)
    complete = set(labels.tolist()) == set(y.tolist())
    held_out = (transform.encode(x, stream(0, HELD_OUT)), labels) if complete else None
    return fit_class_gaussians(z, y, schedule, floor, held_out, source.classes)


def plain_model(model: ModelConfig) -> ModelConfig:
    """The DDM beside a CDM: for the encoder, the U-Net of its width, multipliers and blocks that is told the level."""
    net = model.backbone
    if net.name == "encoder":
        shared = {"multipliers": net.multipliers, "blocks": net.blocks, "dropout": net.dropout}
        net = BACKBONES["unet"](channels=net.width, attention=(), **shared)
    return replace(model, kind="ddm", backbone=net)


def build_schedule(config: Any) -> NoiseSchedule:
    """The noise schedule of a resolved configuration."""
    kind = SCHEDULES[config.name]
    return kind(**arguments_for(kind, config))


def build_loss(config: LossConfig, model: Denoiser) -> CDMLoss | DDMLoss:
    """The loss that trains ``model``."""
    kind = DDMLoss if model.density is None else CDMLoss
    return kind(model, **arguments_for(kind, config))


def build_backbone(config: ModelConfig, shape: tuple[int, ...], levels: int, classes: int | None) -> nn.Module:
    """The network of a configuration for events of this shape."""
    name, joint, vectors = config.backbone.name, config.labels == "joint", len(shape) == 1
    if name == "custom":
        how = "torchcdm.fit(data, backbone=module) trains it, torchcdm.load(path, backbone=module) loads it"
        raise UserError(f"model.backbone is custom, a network of your own, which Python gives: {how}")
    if vectors != (name == "mlp"):
        data, fit = ("vectors", "mlp") if vectors else ("images", "encoder")
        raise UserError(f"model.backbone is {name}, but the data are {data} {shape}; use --model.backbone {fit}")
    data = {"dim": shape[0]} if vectors else {"in_channels": shape[0], "image_size": shape[1:]}
    classifier, denoiser = NETWORKS[name]
    if config.kind == "cdm":
        given = arguments_for(classifier, config.backbone)
        return classifier(**data, levels=levels, classes=classes, joint=joint, **given)
    if denoiser is None:
        raise UserError(f"model.backbone is {name}, which cannot be a ddm; use --model.backbone unet")
    if joint:
        raise UserError("model.labels is joint, which needs a cdm; use --model.labels input for a ddm")
    if getattr(config.backbone, "context", None) is not None:
        raise UserError("model.backbone.context needs a cdm; use --model.kind cdm")
    return denoiser(**data, classes=classes, **arguments_for(denoiser, config.backbone))


def imported(code: str) -> nn.Module:
    """The network that ``NAME()`` of ``FILE.py:NAME`` gives; the file is run: only for code that its reader trusts."""
    path, _, name = str(code).rpartition(":")
    if not (path.endswith(".py") and name.isidentifier()):
        raise UserError(f"{code}: write FILE.py:NAME, where NAME() gives the network")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; go to the folder that has it, or give backbone=module")
    make = runpy.run_path(path).get(name)
    network = make() if callable(make) else None
    if not isinstance(network, nn.Module):
        raise UserError(f"{code}: {name}() must give a torch.nn.Module")
    return network


def build_model(
    config: ModelConfig, transform: DataTransform, classes: int | None = None, gaussian: FittedBase | None = None,
    class_prior: Tensor | None = None, backbone: nn.Module | None = None,
) -> Denoiser:  # fmt: skip
    """The model of a resolved configuration, with a copy of the data's transform; a ``backbone`` that is given.

    ``gaussian`` are fitted marginals; when None and the configuration has some, the model gets a blank to load a saved
    state into. ``class_prior`` is p(y) for joint logits. UserError for labels asked of data without classes.
    """
    if config.labels != "none" and classes is None:
        raise UserError(f"model.labels is {config.labels}, but the data have no classes; use --model.labels none")
    classes = None if config.labels == "none" else classes
    schedule = gaussian.schedule if gaussian is not None else build_schedule(config.schedule)
    if backbone is None:
        backbone = build_backbone(config, transform.shape, schedule.T + 2, classes)
    if gaussian is None and config.gaussian is not False:
        components, own = config.components or 1, (classes or 0) if config.class_gaussians else 0
        if components == 1:
            gaussian = GaussianMarginals.blank(schedule, transform.shape, config.form, own)
        else:
            gaussian = MixtureMarginals.blank(schedule, transform.shape, components, own)
    transform = copy.deepcopy(transform)
    if config.kind == "ddm":
        return DenoisingDiffusion(backbone, schedule, transform, gaussian)
    return ClassificationDiffusion(backbone, schedule, transform, gaussian, class_prior)


def new_model(config: ModelConfig, source: DataSource, flip: bool, backbone: nn.Module | None = None) -> Denoiser:
    """The model before its training: its weights are torch's next draws, unless ``backbone`` has some."""
    config = choose_base(config, source, flip)
    gaussian = fit_gaussian(config, source, flip) if config.gaussian else None
    prior = class_frequencies(source) if config.labels == "joint" and source.classes is not None else None
    model = build_model(config, source.transform, source.classes, gaussian, prior, backbone)
    if len(source.shape) > 1:
        model.coarse = CoarseData.fit(*base_samples(source, flip, least=1000), model.classes or 0)
    return model


def class_frequencies(source: DataSource) -> Tensor:
    """How many training samples each class has, at least one: the prior of joint logits, long (classes,)."""
    return torch.bincount(source.train.labels.clamp_min(0), minlength=source.classes).clamp_min(1)


def _settings_of_network(model: Denoiser) -> Any:
    """Those of a model that was loaded, where it still has the network that they make; else those of a custom one."""
    made = model.info and model.info.model
    if made is not None and made.backbone.name != "custom":
        with torch.device("meta"):
            blank = build_backbone(made, model.shape, model.schedule.T + 2, model.classes)
        shapes = [{key: value.shape for key, value in of.state_dict().items()} for of in (blank, model.backbone)]
        if type(blank) is type(model.backbone) and shapes[0] == shapes[1]:
            return made.backbone
    return BACKBONES["custom"](module=type(model.backbone).__name__)


def config_of(model: Denoiser) -> ModelConfig:
    """The configuration of a model made in Python, its network custom unless the model was loaded; UserError for parts
    that no setting makes."""
    if model.backbone is None:
        what = f"{type(model).__name__} has no network of its own"
        raise UserError(f"{what}; train and save the models that it is made of, and make it again from them")
    schedule, base = model.schedule, model.base
    name = next((name for name, kind in SCHEDULES.items() if type(schedule) is kind), None)
    if name is None:
        known = ", ".join(kind.__name__ for kind in SCHEDULES.values())
        raise UserError(f"{type(schedule).__name__}: no setting makes this schedule; choose one of {known}")
    if not (base is None or isinstance(base, StandardNormal | FittedBase)):
        raise UserError(f"{type(base).__name__}: no setting makes this base density; choose a fitted one, or none")
    given = {key: getattr(schedule, key) for key in SCHEDULE_SETTINGS[name].__dataclass_fields__ if key != "name"}
    form, components, own = None, 1, False
    if isinstance(base, GaussianMarginals):
        form, own = "full", len(base.classes) > 0
        form = next((key for key, kind in DIAGONAL.items() if type(base.rotation) is kind), form)
    elif isinstance(base, MixtureMarginals):
        components, own = len(base.log_weights), base.class_log_weights is not None
    parts = {"backbone": _settings_of_network(model)}
    fitted = {"gaussian": isinstance(base, FittedBase), "components": components, "shrinkage": 0.0, "form": form}
    kind = "ddm" if model.density is None else "cdm"
    labels = "joint" if getattr(model.backbone, "joint", False) else "input" if model.conditional else "none"
    return ModelConfig(kind, labels, **fitted, class_gaussians=own, **parts, schedule=SCHEDULE_SETTINGS[name](**given))
