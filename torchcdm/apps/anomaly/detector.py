"""Anomaly scores with thresholds and percentiles, calibrated on held-out normal data."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from torchcdm.apps.anomaly.scores import SCORES, Fitted, as_samples, coarse_level, level_profile
from torchcdm.data import MemorySplit, spec_of
from torchcdm.data.folders import SPLIT_NAMES
from torchcdm.errors import UserError, nearest, warn
from torchcdm.models.denoiser import Denoiser, digest_of
from torchcdm.models.density import require_density
from torchcdm.random import stream
from torchcdm.runtime.artefact import damaged, read_artefact, write_artefact
from torchcdm.runtime.validation import ProperShare, checked, shown
from torchcdm.units import TableEncoding

FILE, TENSORS = "detector.json", "detector.safetensors"


@final
class AnomalyDetector:
    """A number for each input, higher for the more anomalous, compared with normal data that did not train the model.

    UserError for an unknown name, a model without density, ``ratio`` without background of the same shape.

    Args:
        name: Of :data:`torchcdm.apps.anomaly.SCORES`.
        model: The model of the normal data; put into evaluation mode while it is used.
        background: A model of broader data of the same shape; for ``ratio`` alone.

    Attributes:
        fitted: What the score learned; None before, as is the calibration.
        calibration: Sorted scores of normal data that neither score nor model has learned from, float64 (n,).

    Example:
        >>> detector = AnomalyDetector("levels", model).fit(normal)
        >>> flags = detector.flags(detector.score(x), fpr=0.05)
    """

    def __init__(self, name: str, model: Denoiser, background: Denoiser | None = None) -> None:
        if not isinstance(name, str) or name not in SCORES:
            raise UserError(f"unknown anomaly score {shown(name)}; {nearest(name, SCORES)}")
        if (name == "ratio") != (background is not None):
            problem = "needs a background model" if background is None else "takes no background model"
            raise UserError(f"the score '{name}' {problem}; 'ratio' is the one that compares two models")
        given = (model,) if background is None else (model, background)
        self.name, self.models = name, tuple(require_density(one, "an anomaly score") for one in given)
        if self.models[-1].shape != model.shape:
            raise UserError(f"the background takes inputs of shape {background.shape}, the model {model.shape}")
        if len({_table(one) is None for one in self.models}) > 1:
            raise UserError("one of model and background was trained on a table, the other on arrays; give two alike")
        self.fitted: Fitted | None = None
        self.calibration: Tensor | None = None
        self._coarse = coarse_level(model.schedule)

    def fit(self, reference: Tensor) -> AnomalyDetector:
        """One half of the reference, drawn at random, fits the score, the other is what it is compared with.

        The ``reference`` is normal data that the model was not trained on, data units, (N, *shape). UserError where it
        is too small, of another shape than the model's, or not finite.
        """
        reference = as_samples(self.models[0], reference, 2 * SCORES[self.name].smallest_reference, f"'{self.name}'")
        order = torch.randperm(len(reference), generator=stream(0, "halves"))
        half = len(reference) // 2
        self.learn(self.features(reference[order[:half]]))
        self.calibration = self.score(reference[order[half:]]).sort().values
        return self

    def score(self, x: Tensor) -> Tensor:
        """Scores of ``x`` (N, *shape), data units: finite, float64 (N,) on the CPU; UserError as in :meth:`fit`."""
        return self.apply(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The profile of each input with what posteriors there are; of two models log p_0 of both; float64 (N, .)."""
        own, codes = _table(self.models[0]), [x]
        for other in map(_table, self.models[1:]):
            if own == other or not isinstance(x, Tensor):
                codes.append(x)
                continue
            # Another table has its own order of columns, and numbers of its own for their levels.
            found = other.encode(own.decode(x), "the background", deviating=True)
            if strange := sorted({columns for columns in found.deviating if columns}):
                what = f"in training the background had nothing like some of the cells of {strange[0]}"
                raise UserError(f"{what}; train it on broader data than the model's")
            codes.append(found.x)
        profiles = [level_profile(*pair, posteriors=True) for pair in zip(self.models, codes, strict=True)]
        return profiles[0] if len(profiles) == 1 else torch.stack([profile[:, 0] for profile in profiles], 1)

    def learn(self, features: Tensor) -> AnomalyDetector:
        """Fits the score alone, to :meth:`features` of normal data; UserError where they are not finite."""
        learn, far = SCORES[self.name].learn, int((~features.isfinite().all(1)).sum())
        if learn is not None and far:
            what = f"log p of {far} samples of the reference is not finite"
            raise UserError(f"{what}; leave out what is far from the training data, and round noisy grey levels")
        found = {} if learn is None else learn(features, self._coarse)
        # Contiguous as they are read from a file: rounding depends on the layout in memory.
        self.fitted = {key: value.contiguous() for key, value in found.items()}
        # Now, not when it is saved: the model may be trained in between.
        self._values = self._digest()
        return self

    def apply(self, features: Tensor) -> Tensor:
        """Scores of :meth:`features`."""
        scores = SCORES[self.name].apply(features, self._coarse, self._known(self.fitted))
        # Far outside the data a density overflows; what it is then, inf or nan, must not pass for normal.
        return scores.nan_to_num(nan=torch.finfo(torch.float64).max)

    def _known(self, part: Any) -> Any:
        """What a fit gives, once there was one."""
        if part is None:
            raise UserError(f"the score '{self.name}' is not fitted; call fit with normal data first")
        return part

    def percentile(self, scores: Tensor) -> Tensor:
        """Share of normal data that would score lower, in percent, float64 (N,): 100 (1 - conformal p-value).

        The p-value is (1 + number of calibration scores at or above) / (n + 1), so that among normal inputs it is
        below any alpha with a probability of at most alpha, whatever the distribution of the scores.
        """
        scores, normal = torch.as_tensor(scores, dtype=torch.float64).contiguous(), self._known(self.calibration)
        return 100 * torch.searchsorted(normal, scores).double() / (len(normal) + 1)

    @checked
    def threshold(self, fpr: ProperShare) -> float:
        """The score above which an input is flagged, for a false-positive rate of at most ``fpr``.

        The conformal quantile, the ceil((n+1)(1 - fpr))-th smallest calibration score; UserError if there are fewer.
        """
        normal = self._known(self.calibration)
        n = len(normal)
        # Rounded first: 0.95 * 20 must not become 20 for its last bit.
        rank = math.ceil(round((n + 1) * (1 - fpr), 9))
        if rank > n:
            what = f"{n} held-out normal samples cannot calibrate a false-positive rate of {fpr:g}"
            raise UserError(f"{what}; it takes {math.ceil(round(1 / fpr, 9)) - 1}, or a larger rate")
        return float(normal[rank - 1])

    def flags(self, scores: Tensor, fpr: float) -> Tensor:
        """Which scores are not at or below :meth:`threshold`, bool (N,)."""
        return ~(torch.as_tensor(scores) <= self.threshold(fpr))

    def save(self, folder: str | Path) -> None:
        """Writes what was learned, without the models: ``detector.json`` and ``detector.safetensors``."""
        tensors = {f"fitted.{key}": value for key, value in self._known(self.fitted).items()}
        content = {"score": self.name, "values": self._values}
        tensors["calibration"] = self._known(self.calibration)
        write_artefact(Path(folder) / FILE, "detector", content, {TENSORS: tensors})

    @classmethod
    def load(cls, folder: str | Path, model: Denoiser, background: Denoiser | None = None) -> AnomalyDetector:
        """A saved detector, with the model it was fitted on: UserError where it has other weights or constants."""
        path = Path(folder) / FILE
        content, (tensors,) = read_artefact(path, "detector", [TENSORS])
        detector = cls(str(content.get("score")), model, background)
        detector._values = detector._digest()
        if content.get("values") != detector._values:
            raise UserError(f"{path}: the model has been trained since, or is another; fit the detector again")
        scores, prefix = tensors.get("calibration", torch.empty(0)), "fitted."
        if scores.dtype != torch.float64 or scores.ndim != 1 or not len(scores):
            damaged(path.with_name(TENSORS), "'calibration' is missing or wrong")
        detector.calibration = scores
        detector.fitted = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        return detector

    def _digest(self) -> str:
        """A digest of the tensors that the models' densities are made of, in single precision."""
        states = [model.state_dict() for model in self.models]
        parts = ((f"{k}.{name}", value) for k, state in enumerate(states) for name, value in state.items())
        return digest_of(parts, b"posteriors" if self.models[0].joint else b"")


def _table(model: Denoiser) -> TableEncoding | None:
    """What the columns of a model of a table are; None of others."""
    return None if model.transform is None else model.transform.table


class NormalData(NamedTuple):
    """Normal samples, data units (N, *shape), what they are called, and whether a run's data have changed since."""

    x: Tensor
    name: str
    changed: bool = False


def normal_data(
    model: Denoiser, paths: str | Path | Sequence[str | Path] | None = None, skip_bad: bool = False, limit: int = 5000
) -> NormalData:
    """Normal data for a model of known data.

    From the files ``paths``, without what cannot be read where ``skip_bad`` says so; the validation split of the
    model's own data when None. At most ``limit`` samples, evenly spaced. Rows that hold what training never had are
    left out with a warning: they are flagged whatever their score.
    """
    if paths is not None:
        paths = [paths] if isinstance(paths, (str, Path)) else paths
        found = model.info.read_inputs(paths, skip_bad)
        usual = torch.tensor([not columns for columns in found.deviating])
        if not usual.all():
            what = f"{int((~usual).sum())} of {len(usual)} rows of the reference hold what training never had"
            warn(f"{what}, and so are no part of it; such rows are always flagged, whatever the rate")
        return NormalData(MemorySplit(found.x[usual]).tensors(limit)[0], ", ".join(map(str, paths)))
    try:
        source = model.info.read_source(model)
        split = source.split("validation")
    except UserError as error:
        raise UserError(f"{error}; or give normal data by --reference PATH") from None
    changed = model.info.differs(source)
    return NormalData(split.tensors(limit)[0].float(), f"validation split of {source.name}", changed)


def trained_on(model: Denoiser, paths: Sequence[str | Path]) -> bool:
    """Whether some of the files or folders are what a model of known data was trained on, a copy, part of that, or
    around it; folders of that which are its validation and test splits are not."""
    root = Path(os.path.realpath(str(model.info.data.spec).partition(":")[2] or os.devnull))
    others = {(name,) for split in ("validation", "test") for name in SPLIT_NAMES[split]}
    given = [Path(os.path.realpath(path)) for path in paths]
    within = [path.relative_to(root).parts[:1] for path in given if path.is_relative_to(root)]
    if any(part not in others for part in within) or any(root.is_relative_to(path) for path in given):
        return True
    return any(model.info.is_training_data(model, spec_of(path)) for path in paths)
