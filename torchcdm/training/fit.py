"""Training in one call: a model by a preset, with a network of your own, or a model that you made.

The preset ``encoder`` scales itself to the images and to the time. A network that cannot take a few thousand steps in
the time is too large for it, whatever it would reach later.
"""

import copy
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchcdm.data import DataOptions, DataSource, from_object, load_data, spec_of
from torchcdm.diffusion.start import FIELDS
from torchcdm.errors import UserError, nearest, reason, warn
from torchcdm.models.cdm import ClassificationDiffusion, log_shares
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.runtime.processes import progress_bar, several
from torchcdm.runtime.validation import encode, read_as
from torchcdm.training import build, loop
from torchcdm.training.checkpoint import load, load_weights
from torchcdm.training.config_files import file_fields, make_config, merge, paths, preset_fields
from torchcdm.training.loop import Interrupted
from torchcdm.training.settings import BACKBONES, Config, ModelConfig, TrainConfig

M = TypeVar("M", bound=Denoiser)

KINKED = {"Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Hardtanh", "Threshold"}  # as autograd calls them

# Fields of the data without effect on Python objects, and those that count after the data were read.
OF_FILES, AFTER_READING = ("spec", "size", "crop", "channels", "label"), ("gaussianize", "flip", "workers")

SCALED = "encoder"  # the preset that scales itself, where neither steps nor a network are given
DEFAULT = 1800.0  # its seconds, where no time is given
SIZES = ((16, 16), (24, 16), (32, 16), (32, 32), (48, 32), (64, 64), (96, 64))  # widths and batches, cheap ones first
TRAINING_SHARE = 0.8  # of the time
TIMED_STEPS = 6
WANTED_STEPS = 2500  # that the time must hold for a larger size to be taken
EPOCHS = 300  # most times that a sample is seen


def fit(
    data: Any, /, labels: Any = None, *, preset: str | None = None, backbone: nn.Module | str | None = None,
    out: str | Path | None = None, device: str | None = None, progress: bool = True, budget: str | float | None = None,
    resume: bool = False, **overrides: Any,
) -> ClassificationDiffusion:  # fmt: skip
    """Trains a model on data that are at hand and returns the best one on a validation split, in eval mode.

    Args:
        data: Tensor or array of images (N, C, H, W) or (N, H, W, C) or vectors (N, d), integers for grey levels and
            floats for continuous values; a data frame; a torch Dataset; a pair (samples, labels); the path of a table,
            an array or a folder of images, or a SPEC as on the command line.
        labels: Classes (N,); the model is conditional where ``model={"labels": ...}`` says so. Of a data frame or the
            path of a table, the name of a column.
        preset: Name of a preset; when None ``encoder`` for images, ``table`` for data frames and tables, ``mlp`` for
            other vectors.
        backbone: A network of your own instead of the preset's: ``x (B, *shape) -> (B, T+2)``, twice differentiable.
            With an attribute ``classes`` it is called with labels, too; with ``joint`` true it gives (B, classes,
            T+2). It is trained in place. ``torchcdm.networks.heads`` has last layers for it. ``FILE.py:NAME`` runs the
            file and takes what ``NAME()`` gives; the run then knows where its code is, see :func:`torchcdm.load`.
        out: Folder of the run; when None nothing is kept and no samples are drawn.
        device: As in :func:`torchcdm.training.loop.train`.
        progress: Shows a progress bar, and what was read off the data.
        budget: Time of the steps: seconds, or a text such as ``10m``. The preset ``encoder`` keeps a fifth for the
            end, and fits all else to it: the largest network that has enough steps in it. It takes half an hour where
            neither this nor ``steps`` is given.
        resume: Goes on from the last state in ``out``, if there is one; the data and the network are to be the same.
        **overrides: Fields of the training (``steps=2000``, ``lr=1e-3``), or sections with their fields
            (``model={"backbone": {"width": 48}}``).

    Raises:
        UserError: Data or overrides that are not understood, or a network whose output does not fit.

    Example:
        >>> model = fit(torch.randn(1000, 3), steps=500)
        >>> model.log_prob(torch.zeros(1, 3))
    """
    source, layers = _prepared("fit", data, labels, preset, overrides, progress)
    if resume and out is not None and loop.RunFolder(out).config.exists():
        layers[0] = merge(layers[0], file_fields(loop.RunFolder(out).config))  # a size that was chosen stays
    config = with_budget(layers, source if backbone is None else None, budget, device, progress)
    code, network = (backbone, build.imported(backbone)) if isinstance(backbone, str) else (None, backbone)
    if network is not None:
        seen = "input" if getattr(network, "classes", None) is not None else "none"
        custom = BACKBONES["custom"](code=code, module=type(network).__name__)
        labels = "joint" if getattr(network, "joint", False) else seen
        _check_own(dict(paths(layers[-1])), config.model, labels)
        config = replace(config, model=replace(config.model, backbone=custom, labels=labels))
        check_network(network, source, config.model.schedule.T + 2)
    return trained(config, source, device, progress, out=out, resume=resume, backbone=network)


def train(
    model: M, data: Any, /, labels: Any = None, *, preset: str | None = None, out: str | Path | None = None,
    device: str | None = None, progress: bool = True, resume: bool = False, **overrides: Any,
) -> M:  # fmt: skip
    """Trains a model that you made, in place; gives it, in eval mode, with its best weights on a validation split.

    Network, schedule and base density are of your choice. A model without a transform gets that of the data, which are
    in the units of its own elsewhere; the prior of joint logits becomes the frequencies of the labels. Other arguments
    are those of :func:`fit`, but ``budget``, ``backbone`` and the override ``model``; of the ``preset`` data options,
    optimiser and loss are taken. It is trained and left on the ``device``; where none is given, on the best there is,
    and left on the CPU. UserError for data or overrides that are not understood, or do not fit the model; parts that
    cannot be saved.

    Example:
        >>> schedule = UniformSigmaSchedule(100)
        >>> model = ClassificationDiffusion(MLP(3, levels=102), schedule)
        >>> model = train(model, torch.randn(1000, 3), steps=500)
    """
    if not isinstance(model, Denoiser):
        raise UserError(f"train: {type(model).__name__} is no model; give the model, then the data")
    if "model" in overrides:
        raise UserError("train: the model is made already; its settings have no effect")
    settings = build.config_of(model)
    source, layers = _prepared("train", data, labels, preset, overrides, progress)
    config = make_config(*layers)
    source = build.in_units(source, config.data)
    if model.transform is None:
        model.transform = copy.deepcopy(source.transform)
    elif model.shape != source.shape:
        raise UserError(f"train: the data have shape {source.shape}; the model takes {model.shape}")
    if not any(weights.requires_grad for weights in model.parameters()):
        model.requires_grad_(True)  # one that was loaded
    check_network(model.backbone, source, model.schedule.T + 2, denoiser=model.density is None)
    if getattr(model, "joint", False) and source.classes is not None:
        # The loss is that of (class, level): with another prior p(x|y) would learn the difference.
        prior, before = log_shares(build.class_frequencies(source)).to(model.log_class_prior), model.log_class_prior
        if len(before.unique()) > 1 and not torch.allclose(before.exp(), prior.exp(), atol=0.01):
            warn("train: the class_prior of the model gives way to the frequencies of the labels")
        before.copy_(prior)
    source = replace(source, transform=copy.deepcopy(model.transform).cpu())  # batches are made on the CPU
    config = replace(config, model=settings, data=replace(config.data, gaussianize=False))
    return trained(config, source, device, progress, out=out, resume=resume, model=model)


def _check_own(asked: Mapping[str, Any], config: ModelConfig, labels: str) -> None:
    """Refuses what is ``asked``, by dotted path, of a model whose network, with its ``labels``, is made already."""
    if "model.backbone" in asked and config.backbone.name != "custom":
        raise UserError("fit: model.backbone has no effect on a network of your own; give one of the two")
    if (wanted := asked.get("model.labels", labels)) != labels:
        mend = "set its attributes classes and joint, or leave model.labels out"
        raise UserError(f"fit: model.labels is {wanted}, but the network given has {labels}; {mend}")
    if config.kind == "ddm":
        mend = "torchcdm.train(torchcdm.DenoisingDiffusion(network, schedule), data) trains one"
        raise UserError(f"fit: model.kind is ddm, whose network is not a classifier of levels; {mend}")


def check_network(network: nn.Module, source: DataSource, levels: int, denoiser: bool = False) -> None:
    """Refuses a network that is compiled, with batch normalisation, no weights to train, or some in half precision,
    other classes than the data's, or outputs not (2, [classes,] T + 2 ``levels``) for two samples; warns of kinks. A
    ``denoiser``, which takes a level, is not called."""
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is of type {type(network).__name__}; give an nn.Module, or FILE.py:NAME")
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules()):
        raise UserError("the network has batch normalisation, which mixes samples: use nn.GroupNorm or nn.LayerNorm")
    if hasattr(network, "_orig_mod"):
        raise UserError("the network is compiled, and has no second derivative; give it as it was, and compile=True")
    if not any(weights.requires_grad for weights in network.parameters()):
        raise UserError("the network has no weights to train; give it some, or call network.requires_grad_(True)")
    dtype = working_dtype(network, torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"the network's weights are {dtype}; train network.float(), by train.precision bf16 for speed")
    classes, joint = getattr(network, "classes", None), getattr(network, "joint", False)
    if classes is not None and classes != source.classes:
        raise UserError(f"the network has {classes} classes and the data {source.classes or 'none'}; they must agree")
    if denoiser:
        return
    device = next(network.parameters(), torch.empty(())).device
    x = torch.zeros(2, *source.shape, device=device, dtype=dtype, requires_grad=True)
    y = () if classes is None else (torch.zeros(2, dtype=torch.long, device=device),)
    wanted = (2, classes, levels) if joint else (2, levels)
    try:
        with evaluation_mode(network):
            h = network(x, *y)
    except (RuntimeError, TypeError) as error:  # also one that wants the level, too
        raise UserError(f"the network does not take inputs of shape {tuple(x.shape)} ({reason(error)})") from None
    found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
    if found != wanted:
        end = f"JointHead(features, {levels}, {classes})" if joint else f"CumulativeHead(features, levels={levels})"
        mend = f"end it with torchcdm.networks.heads.{end}"
        raise UserError(f"the network gives {found} for two samples; {wanted} is needed, a number a level: {mend}")
    seen, new = set(), {h.grad_fn} - {None}
    while new:
        seen |= new
        new = {parent for node in new for parent, _ in node.next_functions} - seen - {None}
    if not any(getattr(node, "variable", None) is x for node in seen):
        raise UserError("the network's output has no gradient in its input: leave out detach() and torch.no_grad()")
    if kinked := {node.name().removesuffix("Backward0") for node in seen} & KINKED:
        what = f"the network has a {min(kinked)}, whose kinks make the denoiser jump"
        warn(f"{what}: use nn.SiLU, or another smooth activation")


def trained(
    config: Config, source: DataSource, device: str | None, progress: bool, out: str | Path | None = None, **given: Any
) -> Any:
    """Trains as :func:`torchcdm.training.loop.train`, which takes what is ``given`` (``model``, ``backbone``,
    ``clock``, ``resume``), and gives the model that was kept, a new one unless it is given. Where ``out`` is None
    nothing is left on the disk, and no samples are drawn."""
    if out is None:
        if given.get("resume"):
            raise UserError("resume goes on in the folder of a run; give it as out")
        if several():
            raise UserError("several processes train together; give out, a folder that all of them see")
        config = replace(config, sampling=replace(config.sampling, n=0))
    with tempfile.TemporaryDirectory() if out is None else nullcontext(out) as run:
        try:
            loop.train(config, run, build.in_units(source, config.data), device=device, progress=progress, **given)
        except Interrupted as error:
            if out is not None:
                raise
            raise Interrupted(error.number, "the training was stopped by a signal; nothing of it is kept") from None
        model = given.get("model")
        if model is None:
            return load(run, device or "cpu", given.get("backbone"))
        model.info = load_weights(model, run)
    return model.eval().to(device or "cpu")


def _prepared(
    caller: str, data: Any, labels: Any, preset: str | None, overrides: Mapping[str, Any], progress: bool
) -> tuple[DataSource, list[dict[str, Any]]]:
    """The data, and the fields of preset and overrides, whose SPEC is that of the data; others without effect fail."""
    layer, from_files = override_fields(overrides, caller), isinstance(data, (str, Path))
    given = encode(layer.get("data", {}))
    asked = read_as(DataOptions, given, "data")
    unused = ("spec",) if from_files else OF_FILES
    if isinstance(data, DataSource):
        unused = [field.name for field in fields(DataOptions) if field.name not in AFTER_READING]
    for name in unused:
        if getattr(asked, name) != getattr(DataOptions(), name):
            raise UserError(f"{caller}: data.{name} has no effect here; change the data that you give instead")
    if from_files and labels is not None and not isinstance(labels, str):
        raise UserError(f"{caller}: labels of data from files lie in them; give the name of a table's column, or none")
    by_preset = {} if preset is None else preset_fields(preset).get("data", {})
    options = read_as(DataOptions, {**by_preset, **given, "spec": None}, "data")
    if from_files:
        source = load_data(options, spec=spec_of(data), label=labels or options.label)
    else:
        source = from_object(data, labels, options)
    if progress:
        print(*source.notes, sep="\n")
    # As it was read: what is done with the run later has to find the same splits.
    read = source.options or replace(options, label=labels if isinstance(labels, str) else None)
    given |= {name: value for name, value in encode(read).items() if name not in AFTER_READING}
    return source, [preset_fields(preset or usual_preset(source)), merge(layer, {"data": given})]


def usual_preset(source: DataSource) -> str:
    """The preset where none is asked for."""
    return "encoder" if len(source.shape) > 1 else "mlp" if source.transform.table is None else "table"


def override_fields(overrides: Mapping[str, Any], caller: str = "fit") -> dict[str, Any]:
    """Keyword arguments as fields: those that are no section are of the training. UserError for an unknown name."""
    sections, training = [{field.name for field in fields(kind)} for kind in (Config, TrainConfig)]
    layer: dict[str, Any] = {"train": {}}
    for name, value in overrides.items():
        if name not in sections | training:
            raise UserError(f"{caller}: unknown override '{name}'; {nearest(name, sections | training)}")
        value = encode(value) if is_dataclass(value) else value
        layer = merge(layer, {name: value} if name in sections else {"train": {name: value}})
    return layer


def seconds_of(budget: str | float) -> float:
    """A time such as ``10m``, ``90s``, ``2h`` or 600 as seconds; UserError for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", str(budget).strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"budget is {str(budget)!r:.60}; give a time such as 90s, 10m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def scales(layers: Sequence[Mapping[str, Any]], budget: str | float | None) -> bool:
    """Whether the preset of these layers, the last strongest, scales itself: no steps, or a budget, and no network.
    Several processes would each measure their own steps."""
    preset, *others = layers
    given = {path for layer in others for path, _ in paths(layer)}
    free = budget is not None or given.isdisjoint(("train.steps", "train.max_seconds"))
    return preset == preset_fields(SCALED) and free and "model.backbone" not in given and not several()


def with_budget(
    layers: Sequence[Mapping[str, Any]], source: DataSource | None, budget: str | float | None, device: str | None,
    progress: bool = False,
) -> Config:  # fmt: skip
    """The configuration of these layers, the preset or a run's own first, for a ``budget`` as in :func:`seconds_of`,
    if there is one, of which the steps of the preset ``encoder`` have ``TRAINING_SHARE``.

    A preset that :func:`scales` does so to ``source``, unless that is None, and says what it chose for ``progress``.
    The network of a ddm is as of :func:`torchcdm.training.build.plain_model`.
    """

    def made(*layers: Mapping[str, Any]) -> Config:
        config = make_config(*layers)
        return replace(config, model=build.plain_model(config.model)) if config.model.kind == "ddm" else config

    preset, *given = layers
    seconds = DEFAULT if budget is None else seconds_of(budget)
    training = (TRAINING_SHARE if preset.get("preset") == SCALED else 1.0) * seconds
    if source is None or len(source.shape) != 3 or not scales(layers, budget):
        return made(preset, {} if budget is None else {"train": {"max_seconds": training}}, *given)
    asked = made(preset, *given)
    source = build.in_units(source, asked.data)
    count, multipliers = len(source.train), multipliers_of(*source.shape[1:])
    model = build.choose_base(asked.model, source, asked.data.flip)
    base = {name: getattr(model, name) for name in FIELDS}
    width, batch, took = 0, 0, 0.0
    for wider, larger in progress_bar(SIZES, "timing steps", progress):  # the first in any case
        # Costs grow with the square of the width: a size that is clearly too large is not tried.
        if took and training / (took * larger / batch * (wider / width) ** 1.5) < WANTED_STEPS / 2:
            break
        network = {**base, "backbone": {"width": wider, "multipliers": multipliers}}
        sized = made(preset, {"model": network, "train": {"batch_size": larger}}, *given)
        needed = seconds_a_step(replace(sized, train=replace(sized.train, compile=False)), source, device)
        if took and training / needed < WANTED_STEPS:
            break
        width, batch, took = wider, larger, needed
    most = max(WANTED_STEPS, EPOCHS * count // batch)
    steps = min(max(1, int(training / took)), most)
    every = min(max(50, steps // 12), 1000)
    network = {"width": width, "multipliers": multipliers, "dropout": 0.1 if count < 5000 else 0.05}
    # The time ends it: a machine that was busy when steps were measured takes more of them.
    train = {"batch_size": batch, "max_seconds": training, "steps": most, "patience": None, "warmup": 50}
    train |= {"validate_every": every, "save_every": every, "sample_every": None, "validation_samples": 500}
    train |= {"log_every": min(max(1, steps // 100), 50), "ema_decay": 0.995 if steps < 5000 else 0.999}
    layer = {"model": {**base, "backbone": network}, "train": train}
    if progress:
        what = f"{count} images of {'x'.join(map(str, source.shape))} and {seconds:g} s"
        size = f"width {width} at {len(multipliers)} resolutions, batches of {batch}"
        print(f"scaled to {what}: {size}, about {steps} steps of {took:.2g} s")
    return made(preset, layer, *given)


def multipliers_of(height: int, width: int) -> list[int]:
    """Multipliers of the widths of an encoder, one a resolution: sides are halved while they are even and large."""
    found, most = [1], 4 if min(height, width) >= 64 else 3
    while len(found) < most and height % 2 == width % 2 == 0 and min(height, width) >= 8:
        found, height, width = [*found, 2], height // 2, width // 2
    return found


def seconds_a_step(config: Config, source: DataSource | None, device: str | None) -> float:
    """Mean seconds of a real step but the first, its data included, however few are asked for. Nothing is kept."""
    times = list[float]()
    endless = replace(config.train, steps=TIMED_STEPS + 2, max_seconds=None)

    def clock() -> float:
        times.append(time.perf_counter())
        if len(times) > 1 + TIMED_STEPS:
            raise TimeoutError
        return times[-1]

    # A blank base density costs as much as one that is fitted.
    model = None if source is None else build.build_model(config.model, source.transform, source.classes)
    config = replace(config, train=endless)
    with tempfile.TemporaryDirectory() as folder, suppress(TimeoutError):
        try:
            loop.train(config, folder, source, device=device, progress=False, clock=clock, model=model)
        except Interrupted as error:
            raise Interrupted(error.number, "stopped by a signal while steps were timed; nothing is kept") from None
    return (times[-1] - times[1]) / (len(times) - 2)
