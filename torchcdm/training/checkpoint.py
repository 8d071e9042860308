"""What lies on the disk: a trained model with what ``config.json`` says of it, and what a training goes on from."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, InstanceOf, PlainSerializer
from torch import Tensor, nn

from torchcdm.data import DataOptions, DataSource, Inputs, fingerprint, load_data, read_inputs, renumbered
from torchcdm.data.inputs import read_pictures
from torchcdm.diffusion.coarse import CoarseData
from torchcdm.errors import UserError, warn
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.artefact import MEND, damaged, read_artefact, write_artefact
from torchcdm.runtime.files import TEMPORARY, flush_folder, writing
from torchcdm.runtime.processes import chosen_device
from torchcdm.runtime.validation import CountOrZero, Float, NotNegative, encode, validated
from torchcdm.samplers import FINE, Curvature
from torchcdm.training.build import build_backbone, build_model, config_of, imported
from torchcdm.training.config_files import differences
from torchcdm.training.evaluation import Best
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.training.settings import Config, ModelConfig
from torchcdm.units import DataTransform, transform_from_config
from torchcdm.zoo import located

KINDS = ("run", "estimator")  # of artefacts that hold a model

Transform = Annotated[
    InstanceOf[DataTransform],
    BeforeValidator(lambda value: value if isinstance(value, DataTransform) else transform_from_config(value)),
    PlainSerializer(lambda transform: transform.to_config()),
]
"""An object here, plain values in a file."""


@validated
class ModelInfo:
    """What ``config.json`` says of the weights beside it."""

    preset: str | None  # name of the preset, if any
    model: ModelConfig  # kind, network and schedule, resolved
    transform: Transform  # data units to model units; of a table with its columns
    data: DataOptions  # what it was trained on, to find the same splits again
    # ``{"value": "nll", "unit", "best", "step"}``: the validation value that named these weights the best, or
    # ``{"value": "last", "step"}``.
    selected: dict[str, str | int | float]
    class_names: tuple[str, ...] | None = None  # names of the classes of the data; None without labels
    fingerprint: str | None = None  # of the data, as of torchcdm.data.fingerprint; None where nothing was trained
    estimator: dict[str, Any] | None = None  # what an estimator adds to its model, plain values; None in a run

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the columns of a table that the model sees; None elsewhere."""
        return None if self.transform.table is None else self.transform.table.names

    def read_inputs(self, paths: str | Path | Sequence[str | Path], skip_bad: bool = False, **options: Any) -> Inputs:
        """Files as the model takes them; ``options`` as of :func:`torchcdm.data.read_inputs`."""
        return read_inputs(paths, self.transform, replace(self.data, skip_bad=skip_bad), **options)

    def read_pictures(
        self, paths: Sequence[str | Path], skip_bad: bool = False, shape: tuple[int, ...] | None = None
    ) -> tuple[list[Tensor], list[str], list[str]]:
        """Images of the model's size or larger, or of a ``shape``: :func:`torchcdm.data.inputs.read_pictures`."""
        return read_pictures(paths, self.transform, replace(self.data, skip_bad=skip_bad), shape)

    def read_source(
        self, model: Denoiser, spec: str | None = None, labelled: bool = False, whole: bool = False,
        skip_bad: bool = False,
    ) -> DataSource:  # fmt: skip
        """Data with splits for the model to score, in its units: what it was trained on, or those of ``spec``.

        ``labelled`` says that the classes are used, where the model knows some: they are numbered as its own. Data
        without splits of their own are split as those of the training, or not at all where they are ``whole``. With
        ``skip_bad`` what cannot be read is left out, as where the training left it out.
        UserError for other columns, grey levels or classes than the model's, another shape, or what cannot be read.
        """
        options = replace(self.data, spec=spec or self.data.spec, skip_bad=skip_bad or self.data.skip_bad)
        if whole:  # labels that are not used may be missing
            label = options.label if labelled and model.classes is not None else None
            options = replace(options, validation_fraction=0.0, test_fraction=0.0, limit=None, label=label)
        if options.spec is None:
            by = "{0} (in Python {0}.load reads it)".format(self.estimator["kind"]) if self.estimator else "Python"
            raise UserError(f"the model was trained by {by}, on data that are not kept; nll and evaluate take --data")
        source = load_data(options, self.transform)
        if spec is None and self.differs(source):
            warn(f"{options.spec}: not the data of the training any more; what is held out may have been trained on")
        if labelled and model.classes is not None and source.class_names is not None:
            return renumbered(source, self.class_names)
        return source

    def differs(self, source: DataSource) -> bool:
        """Whether data are others than those of the training; False where that is not known, as of groups."""
        known = None if self.data.clusters is not None else self.fingerprint  # groups were its labels
        return known not in (None, fingerprint(source))

    def is_training_data(self, model: Denoiser, spec: str) -> bool:
        """Whether data are those of the training, perhaps in another place; False where that is not known."""
        with suppress(UserError):  # such as too few to be split
            return self.fingerprint is not None and fingerprint(self.read_source(model, spec)) == self.fingerprint
        return False


def save_model(run: RunFolder, model: Denoiser, info: ModelInfo, **others: Mapping[str, Tensor]) -> None:
    """Writes ``model.safetensors``, ``config.json``, and ``others`` by name; UserError where it cannot, and the old
    files stay."""
    tensors = {run.model.name: model.state_dict()} | {f"{name}.safetensors": part for name, part in others.items()}
    write_artefact(run.model_info, KINDS[info.estimator is not None], encode(info), tensors)


def save_curvatures(run: RunFolder, model: Denoiser) -> None:
    """Keeps beside a model how its trajectories bend, so that its next samplers need not find it again."""
    if found := model.curvatures:
        plain = {name: {key: getattr(one, name) for key, one in found.items()} for name in ("first", "variance")}
        errors = {key: one.errors for key, one in found.items()}
        write_artefact(run.curvatures, "curvatures", plain, {"curvatures.safetensors": errors})


def _load_curvatures(run: RunFolder, T: int) -> dict[str, Curvature]:
    """What :func:`save_curvatures` kept; nothing where it is missing, damaged or does not fit: it is found again."""
    with suppress(UserError, KeyError, ValueError):
        plain, (errors,) = read_artefact(run.curvatures, "curvatures", None, dict[str, dict[str, Float]])
        first, variance, K = plain["first"], plain["variance"], min(FINE, T)
        found = {key: Curvature(part, int(first[key]), variance[key]) for key, part in errors.items()}
        if all(one.errors.shape == (K + 1, K + 1) and 0 <= one.first < K for one in found.values()):
            return found
    return {}


def say_where(run: RunFolder, data: DataOptions) -> None:
    """Says in ``config.json`` of a kept model where the data of its training are now, if that is not what it says."""
    if read_info(run.root).data.spec != data.spec:
        _, info, (tensors,) = read_run(run.root)
        write_artefact(run.model_info, KINDS[0], encode(replace(info, data=data)), {run.model.name: tensors})


def save(model: Denoiser, path: str | Path, info: ModelInfo | None = None, **others: Mapping[str, Tensor]) -> None:
    """Writes a model as :func:`load` reads it: ``model.safetensors`` and ``config.json`` in a folder.

    Args:
        model: A model from :func:`load`, :func:`torchcdm.fit` or :func:`torchcdm.train`, or one of your own; UserError
            for parts that cannot be saved.
        path: The folder; it is made. The model that it holds is replaced; UserError if it is one of a training.
        info: What is said of the model, if other than it knows itself.
        **others: Further tensors, for files of these names.
    """
    if not isinstance(model, Denoiser):
        raise UserError(f"save: {type(model).__name__} is no model; give the model, then the folder")
    run = RunFolder(path)
    if run.config.exists() or run.states.exists():
        raise UserError(f"{path}: holds a training; choose another folder")
    with run.locked():
        save_model(run, model, info or model.info or info_of(model), **others)
        save_curvatures(run, model)


def info_of(model: Denoiser) -> ModelInfo:
    """What ``config.json`` says of a model that was made in Python; UserError for parts that cannot be saved."""
    config = config_of(model)
    if model.transform is None:
        raise UserError("the model has no transform; give it one, such as units.DataTransform(shape)")
    names = None if model.classes is None else tuple(map(str, range(model.classes)))
    return ModelInfo(None, config, model.transform, DataOptions(), {"value": "given"}, names)


def read_info(run: str | Path) -> ModelInfo:
    """``config.json`` of a run."""
    return read_run(run, weights=False)[1]


def load(
    run: str | Path, device: str | torch.device = "cpu", backbone: nn.Module | None = None, trust_code: bool = False
) -> ClassificationDiffusion:
    """The model of a run, float32, in eval mode; its type is that of the usual case, a ``ddm`` a DenoisingDiffusion.

    Args:
        run: Folder of the run, or of a saved estimator; ``zoo:NAME`` for a model that ships with the package,
            ``hub:OWNER/NAME`` for one on the Hugging Face Hub.
        device: Where the model goes; the best there is when None.
        backbone: The network of a model that was trained with one of your own; its weights are filled in.
        trust_code: Runs the code that a run by ``fit(backbone="FILE.py:NAME")`` names; never for ``hub:``.

    Raises:
        UserError: No run there, a name that is not known, files that are damaged or of another format version, or a
            network of one's own that is not given.

    Example:
        >>> model = load("zoo:two-moons")
        >>> model.log_prob(torch.zeros(1, 2)).shape
        torch.Size([1])
    """
    folder, info, (tensors,) = read_run(run)
    network, classes = info.model.backbone, None if info.class_names is None else len(info.class_names)
    if network.name != "custom":
        if backbone is not None:
            raise UserError(f"{run}: has the network '{network.name}'; leave backbone out")
        # A network of other sizes than those of the file is refused before it takes memory.
        with torch.device("meta"):
            seen = None if info.model.labels == "none" else classes
            blank = build_backbone(info.model, info.transform.shape, info.model.schedule.T + 2, seen)
        held = {key: value for key, value in tensors.items() if key.startswith("backbone.")}
        own = {f"backbone.{key}": value for key, value in blank.state_dict().items()}
        check_shapes(own, held, folder.model, MEND)
    elif backbone is None:
        if not (network.code and trust_code):
            trusted = f", or trust_code=True, which runs {network.code}" if network.code else ""
            mend = f"load it by torchcdm.load(path, backbone=module){trusted}"
            raise UserError(f"{run}: has a network of your own, {network.module}; {mend}")
        if str(run).startswith("hub:"):
            raise UserError(f"{run}: names code, {network.code}, and no code is run for hub:; give backbone=module")
        backbone = imported(network.code)
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, in vain
        model = build_model(info.model, info.transform, classes, backbone=backbone)
    if "coarse.means" in tensors:
        model.coarse = CoarseData.blank(info.transform.dim, model.classes or 0)
    _fill(model, tensors, folder.model, f"give the trained {network.module}" if network.name == "custom" else MEND)
    model.info, model.curvatures = info, _load_curvatures(folder, model.schedule.T)
    return model.eval().requires_grad_(False).to(chosen_device(device))


def load_weights(model: Denoiser, run: str | Path) -> ModelInfo:
    """Fills a model with the weights of a run; gives what is said of them."""
    folder, info, (tensors,) = read_run(run)
    _fill(model, tensors, folder.model)
    return info


def load_matching(model: Denoiser, run: str | Path) -> list[str]:
    """Copies the weights of a run that the model has, too, with the same shape; gives the names of all others."""
    own, (tensors,) = dict(model.named_parameters()), read_run(run)[2]
    fitting = {key: value for key, value in tensors.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise UserError(f"{run}: none of its weights fits this network")
    model.load_state_dict(fitting, strict=False)
    return [key for key in own if key not in fitting]


def read_run(run: str | Path, weights: bool = True) -> tuple[RunFolder, ModelInfo, list[dict[str, Tensor]]]:
    """The folder of a trained model, what is said of it, and its tensors; UserError as of :func:`load`."""
    folder = RunFolder(located(run))
    if missing := [path.name for path in (folder.model_info, folder.model) if not os.path.exists(path)]:  # or no name
        what = f"{missing[0]} is missing" if os.path.isdir(folder.root) else "there is no such folder"
        what = "stopped before a validation" if len(missing) == 2 and os.path.isdir(folder.states) else what
        raise UserError(f"{run}: holds no trained model ({what})")
    return folder, *read_artefact(folder.model_info, KINDS, [folder.model.name] * weights, form=ModelInfo)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, mend: str = MEND) -> None:
    own = module.state_dict()
    check_shapes(own, tensors, path, mend)
    for key, value in tensors.items():  # a buffer of one's own, such as a causal mask, may be infinite
        if own[key].isfinite().all() and not value.to(own[key].dtype).isfinite().all():
            damaged(path, f"{key} is not finite")
    module.load_state_dict(tensors)


def check_shapes(own: Mapping[str, Tensor], held: Mapping[str, Tensor], path: Path, mend: str) -> None:
    """Refuses tensors of a file that have not the names and shapes of a model's own; UserError ends with the mend."""
    for key in [*own, *held]:
        found, needed = (tuple(state[key].shape) if key in state else "missing" for state in (held, own))
        if found != needed:
            raise UserError(f"{path}: {key} is {found} in the file, {needed} in the model; {mend}")


KEPT = 2  # states
PARTS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")  # files of tensors in each


@validated
class Progress:
    """Counters, in ``progress.json``."""

    step: CountOrZero
    ema_updates: CountOrZero
    seconds: NotNegative
    skipped: CountOrZero
    best: Best | None
    stale: CountOrZero  # validations since the best
    window: dict[str, Float | None]  # sums of loss terms since the last line of the log
    data: str  # fingerprint of the data
    config: dict[str, Any]  # the resolved configuration


class TrainingState(NamedTuple):
    """What a resumed run starts from: raw and averaged weights, what the optimiser knows of weight k as ``k.name``."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: Progress


def save_state(run: RunFolder, state: TrainingState) -> Path:
    """Writes ``state/step-N``, beside, then renamed, unless it is there; two are kept. UserError for a full disk."""
    final = run.states / f"step-{state.progress.step}"
    temporary = run.states / f"{TEMPORARY}{final.name}"
    if final.exists():
        return final
    with writing(final):
        try:
            tensors = dict(zip(PARTS, state[:3], strict=True))
            write_artefact(temporary / "progress.json", "state", encode(state.progress), tensors)
            os.replace(temporary, final)
            flush_folder(run.states)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in state_folders(run)[:-KEPT]:
            # Renamed first: a crash half way would leave one without all its files.
            os.replace(old, temporary)
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def state_folders(run: RunFolder) -> list[Path]:
    """The saved states, oldest first."""
    found = [path for path in run.states.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(folder: Path) -> TrainingState:
    """One saved state; UserError where a file is missing, damaged, or of another format version, with the way out."""
    path = folder / "progress.json"
    with _way_out(folder):
        progress, tensors = read_artefact(path, "state", PARTS, Progress)
        if folder.name != f"step-{progress.step}":
            damaged(path, f"it is of step {progress.step}")
    return TrainingState(*tensors, progress)


def restore(
    state: TrainingState, run: RunFolder, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Fills weights, their average and the optimiser from a state, which is empty then. UserError where a file of it
    is of another network."""
    folder, moments = run.states / f"step-{state.progress.step}", dict[int, dict[str, Tensor]]()
    for key, value in state.optimizer.items():
        k, name = key.split(".")
        moments.setdefault(int(k), {})[name] = value
    with _way_out(folder):
        _fill(model, state.model, folder / PARTS[0])
        _fill(average, state.ema, folder / PARTS[1])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for part in state[:3]:  # else they stay in memory while their training goes on
        part.clear()


@contextmanager
def _way_out(folder: Path) -> Iterator[None]:
    """Adds the mend to what is said of a damaged state."""
    try:
        yield
    except UserError as error:
        run = RunFolder(folder.parents[1])
        mend = f"remove {folder} to go on from the state before it, or to start anew"
        if run.model.exists() and len(state_folders(run)) < 2:  # a new start would replace the model
            mend = f"go on in another folder, with --init {run.root}"
        raise UserError(f"{error}; {mend}") from None


# Fields that may differ from the run that is resumed: all others would make it another run. Those of the last line may
# differ too after steps that were not finite ended the run: what may mend it.
FREE = {"preset", "sampling", "report", "data.workers"}
FREE_IN_TRAIN = {"steps", "max_seconds", "validate_every", "log_every", "save_every", "sample_every"}
FREE_IN_TRAIN |= {"validation_samples", "patience", "fallback", "calibration", "init"}
FREE_AFTER_FAILURE = {"lr", "warmup", "grad_clip", "precision"}


def check_same(config: Config, kept: Mapping[str, Any], run: RunFolder) -> None:
    """Refuses to go on where a field that is not free differs from the ``kept`` configuration of a saved state."""
    lines, free = read_metrics(run.metrics), FREE | ({"data.spec"} if config.data.spec else set())
    in_train = FREE_IN_TRAIN | (FREE_AFTER_FAILURE if lines and lines[-1].get("not_finite") else set())
    for path, mine, theirs in differences(encode(config), kept):
        section, _, name = path.partition(".")
        if not ({path, section} & free or (section == "train" and name in in_train)):
            differ = f"was trained with {path} = {theirs}, not {mine}"
            raise UserError(f"{run.root}: {differ}; resume with the same, or choose another folder")
