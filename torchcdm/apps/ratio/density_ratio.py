"""Density ratios of two data sets: how much more probable a sample is under the one than under the other."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from torchcdm.apps.fitted import Readers, all_or_nothing, plain_fields, restore, restoring
from torchcdm.apps.ratio.checks import Calibration, effective_sample_size, importance_weights
from torchcdm.apps.ratio.coordinates import FARTHEST, STEPS, Steps, best_steps, through
from torchcdm.apps.ratio.correction import base_and_correction, best_share, tempering
from torchcdm.apps.ratio.information import Estimate, TwoSampleTest, divergence, two_sample_test
from torchcdm.data import DataOptions, DataSource, MemorySplit
from torchcdm.data.pairs import SOURCES, Pair, pair_up, read_query
from torchcdm.data.source import NO_LABEL
from torchcdm.diffusion.gaussian import GaussianMarginals, fit_class_gaussians
from torchcdm.errors import UserError
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import permutation
from torchcdm.runtime.artefact import read_artefact, write_artefact
from torchcdm.runtime.batching import map_rows
from torchcdm.runtime.validation import Seed, checked, read_as
from torchcdm.training.checkpoint import ModelInfo, load, read_info, save_model
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.fit import override_fields, trained
from torchcdm.training.run_folder import RunFolder
from torchcdm.units import ColumnWarp, DataTransform, TableEncoding
from torchcdm.units.lattice import Discrete

FILE = "ratio.json"

RARE = 1e-3
"""Share of a data set below which a density counts as rare there."""

LIMIT_ROWS = 20_000
"""Training samples on which that is measured."""

MODELS = {"joint": ("joint",), "separate": SOURCES}
"""Folders of the models in a saved ratio."""

SHARE_ROWS = 8000
"""Held-out samples that say how much of a network's correction is kept."""

LAYERS: dict[str, dict[str, Any]] = {
    "joint": {"model": {"labels": "joint", "class_gaussians": True}, "loss": {"label_dropout": 0.0}},
    "separate": {"model": {"labels": "none"}},
}
"""What each method sets on top of the preset for vectors or images."""

SETTINGS = ("random_state", "method", "discrete", "preset", "overrides")
"""Arguments that a saved ratio keeps."""

VECTORS = {"train": {"steps": 600, "lr": 2e-3, "patience": 4}}
"""On top of the preset for vectors: what is left for the network beside the coordinates is learned soon, ..."""

LARGE = 20_000
"""... up to so many training samples."""


class Scores(NamedTuple):
    """Names of samples (files, or rows), their log ratios, and whether these are extrapolation, each (N,)."""

    names: tuple[str, ...]
    log_ratio: np.ndarray
    outside: np.ndarray


@final
class DensityRatio:
    """log p(x) / q(x) of two data sets: the numerator's density p over the denominator's q.

    ``joint`` trains one network whose logits run over (source, level) (identity 10), each source starting from a
    Gaussian of its own: the log ratio is a difference of two logits at level 0, from one pass. ``separate`` trains
    a model on each data set and subtracts their log densities. Either way held-out samples tell how much of what the
    network adds to the fitted Gaussians is kept: between Gaussians it can only add noise.

    Args:
        random_state: Seed of everything random.
        method: ``joint`` or ``separate``.
        discrete: Columns with few distinct values: ``dequantize`` or ``error``, see
            :func:`torchcdm.data.pairs.pair_up`.
        preset: ``mlp`` for vectors and ``encoder`` for images when None.
        device: ``cpu``, ``cuda``, ``cuda:1``; the best there is when None.
        progress: Shows a progress bar.
        **overrides: As for :func:`torchcdm.fit`: fields of the training (``steps=500``) or sections
            (``model={"gaussian": False}``). Of ``data`` count ``size`` and ``channels`` that images are converted to,
            ``skip_bad``, and ``validation_fraction``, the share of each data set held out for early stopping.

    Raises:
        UserError: An argument of the wrong type, or out of its range.

    Attributes:
        notes: What was read off the data, one sentence each.
        counts: Samples of denominator and numerator.
        shares: How much of the network's correction to the base density is kept, 0 ... 1; of each model, that of the
            denominator first.
        tempered: Scale and offset of the log ratio, see :func:`torchcdm.apps.ratio.correction.tempering`.
        held_out: Checks on the share held out for early stopping, a little optimistic for that.

    Example:
        >>> ratio = DensityRatio(random_state=0).fit(target, source)
        >>> weights = ratio.importance_weights(source, clip=0.999)
        >>> ratio.effective_sample_size(weights)
    """

    notes: tuple[str, ...]
    counts: tuple[int, int]
    shares: tuple[float, ...]
    tempered: tuple[float, float]
    held_out: Calibration
    _held_out: tuple[list[float], list[float]]
    _limits: np.ndarray
    _table: TableEncoding | None = None
    _warp: ColumnWarp | None = None
    _steps: Steps

    _saved: ClassVar[Readers] = {
        **dict.fromkeys(("notes", "counts", "shares", "tempered", "_held_out"), tuple),
        "held_out": partial(read_as, Calibration),
        "_limits": partial(np.array, dtype=np.float64),
        "_table": partial(read_as, TableEncoding),
        "_warp": lambda arguments: ColumnWarp(**arguments),
        "_steps": lambda steps: {name: STEPS[name](**arguments) for name, arguments in steps.items()},
    }

    @checked
    def __init__(
        self,
        random_state: Seed = 0,
        method: Literal["joint", "separate"] = "joint",
        discrete: Discrete = "dequantize",
        preset: str | None = None,
        device: str | None = None,
        progress: bool = False,
        **overrides: Any,
    ) -> None:
        self.random_state, self.method, self.discrete, self.preset = random_state, method, discrete, preset
        self.device, self.progress, self.overrides = device, progress, overrides
        self._models: list[tuple[DensityModel, ModelInfo]] = []
        self._data: tuple[Any, Any] | None = None

    def __sklearn_clone__(self) -> DensityRatio:
        """What ``sklearn.base.clone`` gives: the same settings, not fitted."""
        settings = {key: getattr(self, key) for key in (*SETTINGS, "device", "progress")}
        overrides = deepcopy(settings.pop("overrides"))
        return DensityRatio(**settings, **overrides)

    @property
    def _options(self) -> DataOptions:
        options = read_as(DataOptions, override_fields(self.overrides).get("data", {}), "data")
        return replace(options, seed=self.random_state)

    # --- fitting -------------------------------------------------------------------------------------------------

    def fit(self, numerator: Any, denominator: Any) -> DensityRatio:
        """Learns the ratio numerator / denominator. A fit that fails leaves the ratio as it was.

        Args:
            numerator: Samples of p: array, tensor or list (N, d) or (N, C, H, W), data frame, torch Dataset, the path
                of a table, an array or a folder of images, or a SPEC as on the command line.
            denominator: Samples of q, of the same kinds; their number may differ.

        Raises:
            UserError: Data that do not go together, cells that are no numbers, fewer than 20 samples.
        """
        pair = pair_up(numerator, denominator, self._options, self.discrete)
        with all_or_nothing(self):
            self._learn(pair)
            self._data = (numerator, denominator)
        return self

    def _learn(self, pair: Pair) -> None:
        """Everything that :meth:`fit` sets."""
        self._table, self._warp = pair.table, pair.warp
        # Coordinates are for two Gaussians; another base that is asked for has to find the data as they are.
        own_base = {"components", "gaussian"} & dict(self.overrides.get("model", {})).keys()
        source, self._steps = (pair.source, {}) if own_base else _in_coordinates(pair)
        sources = [source] if self.method == "joint" else [_only(source, label) for label in range(2)]
        self._models = [self._train(part) for part in sources]
        self.shares = tuple(
            best_share(model, *_held_out(part)) for (model, _), part in zip(self._models, sources, strict=True)
        )
        kept = " and ".join(f"{100 * share:.0f} %" for share in self.shares)
        self.counts = pair.counts
        self.notes = (*source.notes, f"{kept} of the network's correction to the fitted Gaussians is kept.")
        numerator, denominator = self._held_out_log_ratios(pair, source)
        self.tempered = tempering(numerator, denominator)
        if self.tempered != (1.0, 0.0):
            times, plus = self.tempered
            self.notes += (f"the log ratio is {times:.2f} of the model's {plus:+.2f} nats: held-out samples said so.",)
        numerator, denominator = self._temper(numerator), self._temper(denominator)
        self._held_out = numerator.tolist(), denominator.tolist()
        self.held_out = Calibration.of(numerator, denominator)
        self.notes += tuple(self.held_out.warnings())
        if self.shares == (0.0,) and pair.warp is not None:
            self._fit_gaussians_again(pair, source)
        self._limits = self._measure_limits(source)

    def _fit_gaussians_again(self, pair: Pair, source: DataSource) -> None:
        """The Gaussians are all of the ratio: from all samples, once the held-out ones have judged it."""
        model, _ = self._models[0]
        if not (isinstance(model.base, GaussianMarginals) and len(model.base.classes)):
            return
        parts = []
        for label in range(2):
            for split, held in ((source.train, pair.counts[label] - pair.held_out[label]),
                                (source.validation, pair.held_out[label])):
                x, y = split.tensors()
                parts.append((x[y == label][:held], torch.full((held,), label)))
        x, y = (torch.cat(part) for part in zip(*parts, strict=True))
        # Every fifth sample chooses what the two have in common: not by their source.
        order = permutation(len(x), self.random_state)
        device = model.schedule.alpha.device
        base = fit_class_gaussians(model.transform(x[order].to(device)), y[order].to(device), model.schedule)
        model.base = base.to(device)

    def _train(self, source: DataSource) -> tuple[DensityModel, ModelInfo]:
        preset = self.preset or ("mlp" if len(source.shape) == 1 else "encoder")
        short = VECTORS if self.preset is None and len(source.shape) == 1 and len(source.train) <= LARGE else {}
        # Not by the likelihood of either source: best_share judges by what the ratio gains.
        train = {"train": {"select": "loss", "seed": self.random_state, "fallback": False}}
        layers = (preset_fields(preset), short, LAYERS[self.method], train)
        config = make_config(*layers, override_fields(self.overrides))
        model = require_density(trained(config, source, self.device, self.progress), "a ratio")
        return model, model.info

    def _measure_limits(self, source: DataSource) -> np.ndarray:
        """Least log densities inside the support: (2, 2), of models and of Gaussians, of denominator and numerator."""
        x, y = source.train.tensors(LIMIT_ROWS)
        values = self._log_probs(x)
        limits = np.empty((2, 2))
        for label in range(2):
            rare, median = np.quantile(values[y.numpy() == label, :, label], [RARE, 0.5], axis=0)
            limits[:, label] = rare - (median - rare)
        return limits

    def _held_out_log_ratios(self, pair: Pair, source: DataSource) -> tuple[np.ndarray, np.ndarray]:
        """Of numerator and denominator, as the models have them."""
        x, y = source.validation.tensors()
        sides = (self._log_probs(x[y == label][:count])[:, 0] for label, count in enumerate(pair.held_out))
        denominator, numerator = (side[:, 1] - side[:, 0] for side in sides)
        return numerator, denominator

    def _temper(self, log_ratio: np.ndarray) -> np.ndarray:
        scale, offset = self.tempered
        return scale * log_ratio + offset

    # --- scoring -------------------------------------------------------------------------------------------------

    def scores(self, x: Any) -> Scores:
        """Names, log ratios and whether they are extrapolation, from one pass.

        Args:
            x: (N, d) or (N, C, H, W), or anything else that :meth:`fit` takes; a table needs the fitted columns.

        Raises:
            UserError: Not fitted, or data that do not go with the fitted ones.
        """
        self._check_fitted()
        info = self._models[0][1]
        values, names, deviating, _ = read_query(x, info.transform, self._table, self._warp, self._options)
        log_probs = self._log_probs(through(self._steps, values)[0].float() if self._steps else values)
        below = log_probs < self._limits
        log_ratio = self._temper(log_probs[:, 0, 1] - log_probs[:, 0, 0])
        return Scores(tuple(names), log_ratio, below.all(2).any(1) | np.array(deviating, dtype=bool))

    def log_ratio(self, x: Any) -> np.ndarray:
        """log p(x) - log q(x) in nats, float64 (N,); ``x`` as for :meth:`scores`."""
        return self.scores(x).log_ratio

    def ratio(self, x: Any) -> np.ndarray:
        """p(x) / q(x), float64 (N,); infinite where the log ratio is above 709."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_ratio(x))

    def importance_weights(self, x: Any, clip: float | None = None) -> np.ndarray:
        """Weights with mean 1 that make samples of the denominator stand for the numerator, float64 (N,).

        Args:
            x: Samples of the denominator.
            clip: Weights above this quantile of them, such as 0.999, are set to it: less variance for a little bias.

        Raises:
            UserError: ``clip`` is no share.
        """
        return importance_weights(self.log_ratio(x), clip)

    def outside_support(self, x: Any) -> np.ndarray:
        """Where neither data set tells anything: bool (N,).

        True where the density of both models, or of both Gaussians, lies further below what is rare in training
        (one in a thousand) than that lies below the median; or where a column that was constant in both has another
        value. The log ratio there is extrapolation.
        """
        return self.scores(x).outside

    def calibration(self, numerator: Any, denominator: Any, bins: int = 10) -> Calibration:
        """What can be checked without knowing the ratio, on samples that were not fitted.

        Args:
            numerator: Held-out samples of p.
            denominator: Held-out samples of q.
            bins: Of the reliability table.
        """
        return Calibration.of(self.log_ratio(numerator), self.log_ratio(denominator), bins)

    effective_sample_size = staticmethod(effective_sample_size)

    def divergence(
        self, kind: Literal["kl", "reverse_kl", "js", "chi2"], numerator: Any = None, denominator: Any = None
    ) -> Estimate:
        """How far p is from q, with a standard error and reasons not to trust it.

        Args:
            kind: ``kl`` E_p log p/q, ``reverse_kl`` E_q log q/p, ``js`` that of Jensen and Shannon (at most log 2),
                ``chi2`` E_p p/q - 1.
            numerator: Fresh samples of p; those that were held out of the fit when None.
            denominator: Fresh samples of q, likewise.

        Raises:
            UserError: Not fitted, an unknown kind, or samples of one of the two alone.
        """
        self._check_fitted()
        if (numerator is None) != (denominator is None):
            raise UserError("divergence: give samples of numerator and denominator, or of neither")
        if numerator is None:
            return divergence(kind, *map(np.array, self._held_out))
        return divergence(kind, self.log_ratio(numerator), self.log_ratio(denominator))

    def two_sample_test(
        self, numerator: Any = None, denominator: Any = None, permutations: int = 999, seed: int = 0
    ) -> TwoSampleTest:
        """Whether p and q differ, by permutations of the sources of samples that no fit has seen.

        Args:
            numerator: Fresh samples of p, which this ratio was not fitted to. None: a second ratio with the same
                settings is fitted to a random half of this one's data and tested on the other half.
            denominator: Fresh samples of q, likewise.
            permutations: Random permutations, at least 19.
            seed: Seed of halves and permutations.

        Raises:
            UserError: Samples of one of the two alone; none, of a ratio that was loaded and so has no data.
        """
        self._check_fitted()
        fresh = (numerator, denominator)
        given = [part is not None for part in fresh]
        data = fresh if any(given) else self._data
        if data is None or any(given) != all(given):
            raise UserError("two_sample_test: give fresh samples of numerator and denominator")
        return two_sample_test(self, *data, data is not fresh, permutations, seed)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes a folder: safetensors and JSON.

        Raises:
            UserError: Not fitted, or the folder cannot be written.
        """
        self._check_fitted()
        folder = Path(path)
        for name, (model, info) in zip(MODELS[self.method], self._models, strict=True):
            run = RunFolder(folder / name)
            with run.locked():
                save_model(run, model, info)
        write_artefact(folder / FILE, "ratio", plain_fields(self, (*SETTINGS, *self._saved)))

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> DensityRatio:
        """A ratio that :meth:`save` wrote.

        Raises:
            UserError: No ratio there, or files that are damaged or of another format version.
        """
        file = Path(path) / FILE
        if not file.is_file():
            raise UserError(f"{path}: holds no density ratio ({FILE} is missing)")
        content = read_artefact(file, "ratio")[0]
        with restoring(file):
            settings = {key: content[key] for key in SETTINGS}
            overrides = settings.pop("overrides")
            ratio = cls(**settings, device=device, **overrides)
            restore(ratio, cls._saved, content, ("_table", "_warp"))
        ratio._models = [_load(Path(path) / name, device) for name in MODELS[ratio.method]]
        return ratio

    # --- parts ---------------------------------------------------------------------------------------------------

    def _check_fitted(self) -> None:
        if not self._models:
            raise UserError("this DensityRatio is not fitted; call fit(numerator, denominator), or load one")

    def _log_probs(self, x: Tensor) -> np.ndarray:
        """log density of models and of Gaussians at level 0, float64 (N, 2, 2), denominator first; model units."""
        model, info = self._models[0]
        device = model.schedule.alpha.device
        z = info.transform(x).clamp(-FARTHEST, FARTHEST)

        def one(rows: slice) -> Tensor:
            parts = [base_and_correction(model, z[rows].to(device)) for model, _ in self._models]
            base = torch.cat([base[:, :, 0] for base, _ in parts], 1)
            corrections = zip(self.shares, parts, strict=True)
            correction = torch.cat([share * network[:, :, 0] for share, (_, network) in corrections], 1)
            return torch.stack([base + correction, base], 1).cpu()

        with torch.no_grad():
            return map_rows(one, len(z), dim=z.shape[1:].numel(), device=device).numpy()


def _in_coordinates(pair: Pair) -> tuple[DataSource, Steps]:
    """The data in the coordinates that :func:`best_steps` chooses, and their steps; images stay as they are."""
    source = pair.source
    if pair.warp is None:
        return source, {}
    (x, y), (held_out, held_out_y) = (split.tensors() for split in (source.train, source.validation))
    steps = best_steps(x.double(), y, held_out.double(), held_out_y, pair.warp)
    if not steps:
        return source, steps
    x, held_out = (through(steps, part.double())[0].float() for part in (x, held_out))
    note = "coordinates chosen on held-out rows: " + ", then ".join(STEPS[name].NOTE for name in steps) + "."
    train, validation = MemorySplit(x, y), MemorySplit(held_out, held_out_y)
    transform, notes = DataTransform.standardize(x), (*source.notes, note)
    return replace(source, train=train, validation=validation, transform=transform, notes=notes), steps


def _held_out(source: DataSource) -> tuple[Tensor, Tensor]:
    """Validation samples and their sources; zeros without labels."""
    x, y = source.validation.tensors(SHARE_ROWS)
    return x, y.clamp_min(0)


def _load(run: Path, device: str | None) -> tuple[DensityModel, ModelInfo]:
    """A model with what its folder says of it."""
    return require_density(load(run, device or "cpu"), "a ratio"), read_info(run)


def _only(source: DataSource, label: int) -> DataSource:
    """The samples of one class, without labels, under the transform of both."""
    parts = [split.select((split.labels == label).nonzero()[:, 0]) for split in (source.train, source.validation)]
    for part in parts:
        part.labels = torch.full_like(part.labels, NO_LABEL)
    return replace(source, train=parts[0], validation=parts[1], class_names=None)
