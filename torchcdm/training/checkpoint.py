"""Saved models and training states: safetensors, JSON, and tensors that load with ``weights_only=True``."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from torchcdm import __version__
from torchcdm.data import DataOptions, DataSource, Inputs, Layout, read_inputs, renumbered
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.readout import Readout
from torchcdm.runtime.files import TEMPORARY, flush_folder, write_file, write_json, write_through, writing
from torchcdm.training.build import build_model, load_source
from torchcdm.training.codec import decode, encode
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.settings import ModelConfig
from torchcdm.units import DataTransform, transform_from_config

FORMAT = 3
"""Version of the files; raised when an older reader would misread them."""

KEPT_STATES = 2

READOUT = "readout.weight"
"""Among the weights of a model whose paths were calibrated."""


# --- models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """What ``config.json`` says of the weights beside it.

    Attributes:
        model: Kind, network and schedule, resolved.
        transform: Data units to model units.
        data: What it was trained on, to find the same splits again.
        preset: Name of the preset, if any.
        class_names: Names of the classes of the data; None without labels.
        columns: Names of the columns of a table.
        constants: Values of its columns that are left out because they are constant in training.
        selected: ``{"value": "nll", "unit", "best", "step"}``: the validation value that named these weights the
            best, or ``{"value": "last", "step"}``.
    """

    model: ModelConfig
    transform: DataTransform
    data: DataOptions
    preset: str | None
    class_names: tuple[str, ...] | None
    columns: tuple[str, ...] | None
    constants: Mapping[str, float]
    selected: dict[str, Any]

    @property
    def classes(self) -> int | None:
        """Number of classes of the data."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def layout(self) -> Layout:
        """How the model takes its data."""
        return Layout(self.transform, self.columns, self.constants)

    def read_inputs(
        self, paths: str | Path | Sequence[str | Path], skip_bad: bool = False, noisy: bool = False
    ) -> Inputs:
        """Files as the model takes them, see :func:`torchcdm.data.read_inputs`."""
        return read_inputs(paths, self.layout, replace(self.data, skip_bad=skip_bad), noisy)

    def read_source(self, model: Denoiser, spec: str | None = None, labelled: bool = False) -> DataSource:
        """Data with splits for the model to score, in its units: what it was trained on, or others of the same kind.

        Args:
            model: The model of the run.
            spec: Other data; read as the run's own were.
            labelled: The classes are used, where the model knows some: they are numbered as its own.

        Raises:
            UserError: Data that cannot be read, or of another shape, other columns, grey levels or classes than the
                model's; names both.
        """
        options = self.data if spec is None else replace(self.data, spec=spec)
        source = load_source(options, self.layout)
        if labelled and model.classes is not None and source.class_names is not None:
            return renumbered(source, self.class_names)
        return source

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return {
            "format": FORMAT,
            "torchcdm": __version__,
            "preset": self.preset,
            "model": encode(self.model),
            "transform": self.transform.to_config(),
            "classes": encode(self.class_names),
            "columns": encode(self.columns),
            "constants": dict(self.constants),
            "selected": self.selected,
            "data": encode(self.data),
        }


def save_model(run: RunFolder, model: nn.Module, info: ModelInfo) -> None:
    """Writes ``model.safetensors`` and ``config.json``.

    Raises:
        UserError: They cannot be written; the old ones are still there.
    """
    write_file(run.model, _tensor_bytes(model.state_dict()))
    write_json(run.model_info, info.to_json())


def read_info(run: str | Path) -> ModelInfo:
    """``config.json`` of a run.

    Raises:
        UserError: No run there, or a file that is damaged or of another format version.
    """
    folder = RunFolder(Path(run))
    if not folder.model_info.is_file() or not folder.model.is_file():
        missing = folder.model.name if folder.model_info.is_file() else folder.model_info.name
        raise UserError(f"{run}: holds no trained model ({missing} is missing)")
    content = read_json(folder.model_info)
    _check_format(content, folder.model_info)
    try:
        return ModelInfo(
            decode(ModelConfig, content["model"], "model"),
            transform_from_config(content["transform"]),
            decode(DataOptions, content["data"], "data"),
            content["preset"],
            _names(content["classes"]),
            _names(content["columns"]),
            {str(name): float(value) for name, value in content["constants"].items()},
            content["selected"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder.model_info}: damaged, {error} is missing or wrong") from None
    except UserError as error:
        raise UserError(f"{folder.model_info}: {error}") from None


def load(run: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """The model of a run, in eval mode.

    Args:
        run: The run's folder.
        device: Where to.

    Returns:
        A :class:`torchcdm.ClassificationDiffusion`; a :class:`torchcdm.DenoisingDiffusion` for a ddm.

    Raises:
        UserError: No run there, or files that are damaged or of another format version.
    """
    info = read_info(run)
    model = build_model(info.model, info.transform, info.classes)
    path = RunFolder(Path(run)).model
    load_model_tensors(model, read_tensors(path), path)
    return model.eval().requires_grad_(False).to(device)


def load_model_tensors(model: Denoiser, tensors: Mapping[str, Tensor], path: Path) -> None:
    """:func:`load_tensors` of a model, with a readout where the file has one and without one where not."""
    if isinstance(model, ClassificationDiffusion):
        weight = tensors.get(READOUT)
        model.readout = None
        if weight is not None and weight.ndim == 2:
            model.readout = Readout.blank(*weight.shape).to(model.schedule.alpha.device)
    load_tensors(model, tensors, path)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fills ``module``; the file must hold exactly its weights."""
    own = module.state_dict()
    for key in [*own, *tensors]:
        shapes = [tuple(state[key].shape) if key in state else "missing" for state in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: {key} is {shapes[0]}, but {shapes[1]} in the model that the run describes")
    module.load_state_dict(tensors)


def load_matching(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[int, list[str]]:
    """Copies the network's weights that exist in both with the same shape.

    Returns:
        How many were copied, and the names of the network's weights that were not.
    """
    own = dict(module.named_parameters())
    fitting = {key: value for key, value in tensors.items() if key in own and own[key].shape == value.shape}
    with torch.no_grad():
        for key, value in fitting.items():
            own[key].copy_(value)
    return len(fitting), [key for key in own if key not in fitting]


# --- training states ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run starts from.

    Attributes:
        step: Steps done.
        model: Raw weights.
        ema: Averaged weights.
        optimizer: State of the optimiser.
        progress: Counters and the best validation value so far; JSON.
    """

    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]


def save_state(run: RunFolder, state: TrainingState) -> Path:
    """Writes ``state/step-N``: beside, flushed, then renamed. The last two are kept.

    Raises:
        UserError: It cannot be written, on a full disk for one; older states are still there.
    """
    final = run.states / f"step-{state.step}"
    temporary = run.states / f"{TEMPORARY}step-{state.step}"
    with writing(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            buffer = io.BytesIO()
            torch.save(state.optimizer, buffer)
            write_through(temporary / "model.safetensors", _tensor_bytes(state.model))
            write_through(temporary / "ema.safetensors", _tensor_bytes(state.ema))
            write_through(temporary / "optimizer.pt", buffer.getvalue())
            progress = {"format": FORMAT, "step": state.step} | state.progress
            write_through(temporary / "progress.json", json.dumps(progress))
            flush_folder(temporary)
            _remove(final)
            os.replace(temporary, final)
            flush_folder(run.states)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in state_folders(run)[:-KEPT_STATES]:
        _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Removes a state; renamed first, because a crash half way would leave one without all its files."""
    if folder.exists():
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def state_folders(run: RunFolder) -> list[Path]:
    """The saved states, oldest first."""
    found = {}
    for path in run.states.glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match:
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def load_state(folder: Path) -> TrainingState:
    """One saved state.

    Raises:
        UserError: A file is missing, damaged, or of another format version; names it and the way out.
    """
    way_out = f"remove {folder} to go on from the state before it"
    path = folder / "optimizer.pt"
    try:
        progress = read_json(folder / "progress.json")
        _check_format(progress, folder / "progress.json")
        model, ema = read_tensors(folder / "model.safetensors"), read_tensors(folder / "ema.safetensors")
        try:
            optimizer = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports a damaged file by many exceptions, over many lines
            raise UserError(f"{path}: damaged or not readable ({type(error).__name__})") from error
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from None
    return TrainingState(int(progress["step"]), model, ema, optimizer, progress)


# --- files -------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        UserError: Missing, truncated, or of another format version.
    """
    content = _read(path)
    try:
        return parse_safetensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged or truncated ({str(error).splitlines()[0]})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: Missing, or not one.
    """
    text = _read(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, not a JSON object")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors_bytes({key: value.detach().cpu().contiguous() for key, value in tensors.items()})


def _check_format(content: Mapping[str, Any], path: Path) -> None:
    version = content.get("format")
    if version != FORMAT:
        raise UserError(
            f"{path}: format version {version}, but this torchcdm ({__version__}) reads {FORMAT}; "
            "use the torchcdm that wrote it"
        )


def _names(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
