"""Density ratios of two data sets: how much more probable a sample is under the one than under the other."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from torchcdm.annealing.target import in_batches
from torchcdm.apps.fitted import Readers, all_or_nothing, described, description, restore, restoring
from torchcdm.apps.ratio import checks
from torchcdm.apps.ratio.blending import blend, most
from torchcdm.apps.ratio.checks import Calibration, effective_sample_size
from torchcdm.apps.ratio.classifiers import Classifiers
from torchcdm.apps.ratio.coordinates import FARTHEST, STEPS, Steps, best_steps, through
from torchcdm.apps.ratio.information import FEW, Estimate, TwoSampleTest, divergence, two_sample_test
from torchcdm.data import DataOptions, DataSource, MemorySplit
from torchcdm.data.pairs import Pair, pair_up, read_query
from torchcdm.diffusion.gaussian import GaussianMarginals, fit_class_gaussians
from torchcdm.errors import UserError, warn
from torchcdm.models.denoiser import working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import evenly_spaced, permutation
from torchcdm.runtime.artefact import read_artefact
from torchcdm.runtime.validation import Seed, checked, encode, read_as
from torchcdm.training.checkpoint import KINDS, load, save
from torchcdm.training.config_files import differences, make_config, preset_fields
from torchcdm.training.fit import override_fields, trained, usual_preset
from torchcdm.training.run_folder import RunFolder
from torchcdm.units import ColumnTransform, DataTransform, transform_from_config
from torchcdm.units.lattice import Discrete

RARE = 1e-3  # share of a data set below which a density counts as rare there
LIMIT_ROWS = 20_000  # training samples on which that is measured

LAYER = {"model": {"labels": "joint", "class_gaussians": True}, "loss": {"label_dropout": 0.0}}
"""What is set on top of the preset for vectors or images."""

SETTINGS = ("random_state", "discrete", "preset", "overrides")  # arguments that a saved ratio keeps

OF_DATA = {"size", "channels", "skip_bad", "validation_fraction", "dequantize"}  # fields of the data that count

FEW_VECTORS = 20_000  # training samples up to which vectors are few
VECTORS = {"train": {"steps": 600, "lr": 2e-3, "patience": 4}}
"""On top of the preset for few vectors: what is left for the network beside the coordinates is learned soon."""


class Scores(NamedTuple):
    """Names of samples (files, or rows), their log ratios, and whether these are extrapolation, each (N,)."""

    names: tuple[str, ...]
    log_ratio: np.ndarray
    outside: np.ndarray


@final
class DensityRatio:
    """log p(x) / q(x) of two data sets: the numerator's density p over the denominator's q.

    One network's logits run over (source, level) (identity 10), each source starting from a Gaussian of its own: their
    difference at level 0 is a log ratio. Vectors whose sources overlap need no levels in between: unless the network
    has a preset or settings of one's own, only classifiers of the source are trained there. The log ratio is a blend
    of Gaussians, network and classifiers: held-out samples tell how far each is followed, see
    :func:`torchcdm.apps.ratio.blending.blend`. An override ``max_seconds`` bounds the whole fit. UserError for
    arguments of the wrong type, or out of their range.

    Args:
        random_state: Seed of everything random.
        discrete: ``dequantize`` or ``error``: columns of few values, see :func:`torchcdm.data.pairs.pair_up`.
        preset: ``mlp`` for vectors and ``encoder`` for images when None.
        device: ``cpu``, ``cuda``, ``cuda:1``; the best there is when None.
        progress: Shows a progress bar.
        **overrides: As for :func:`torchcdm.fit`: fields of the training (``steps=500``) or sections
            (``model={"gaussian": False}``). Of ``data`` count ``size`` and ``channels`` that images are converted to,
            their ``dequantize``, ``skip_bad``, and ``validation_fraction``, the share of each that is held out.

    Attributes:
        notes: What was read off the data, one sentence each.
        counts: Samples of denominator and numerator.
        blend: Weight of each estimate in the log ratio: of the ``gaussians``, the ``network`` that corrects them, the
            ``committee`` of small classifiers, boosted ``trees``; an ``offset`` in nats; and ``least`` and ``most``
            where the sum goes beyond what samples bear out, see :func:`torchcdm.apps.ratio.blending.most`.
        held_out: Checks on the share held out for early stopping, a little optimistic for that.

    Example:
        >>> ratio = DensityRatio(random_state=0).fit(target, source)
        >>> weights = ratio.importance_weights(source, clip=0.999)
        >>> ratio.effective_sample_size(weights)
    """

    _warp: ColumnTransform | None = None
    _saved: ClassVar[Readers] = {
        "notes": tuple, "counts": tuple, "blend": dict, "held_out": partial(read_as, Calibration), "_held_out": tuple,
        "_limits": partial(np.array, dtype=np.float64),
        "_steps": lambda of: {name: STEPS[name](**of[name]) for name in of}, "_warp": transform_from_config,
    }  # fmt: skip

    @checked
    def __init__(
        self, random_state: Seed = 0, discrete: Discrete = "dequantize", preset: str | None = None,
        device: str | None = None, progress: bool = False, **overrides: Any,
    ) -> None:  # fmt: skip
        self.random_state, self.discrete, self.preset = random_state, discrete, preset
        self.device, self.progress, self.overrides = device, progress, overrides
        self._model: DensityModel | None = None
        self._classifiers: Classifiers | None = None
        self._data: tuple[Any, Any] | None = None

    def __sklearn_clone__(self) -> DensityRatio:
        """What ``sklearn.base.clone`` gives: the same settings, not fitted."""
        settings = {key: getattr(self, key) for key in ("random_state", "discrete", "preset", "device", "progress")}
        return DensityRatio(**settings, **deepcopy(self.overrides))

    @property
    def _options(self) -> DataOptions:
        options = read_as(DataOptions, override_fields(self.overrides).get("data", {}), "data")
        for name, *_ in differences(encode(options), encode(DataOptions())):
            if name not in OF_DATA:
                raise UserError(f"data.{name} has no effect on a ratio; change the data that you give instead")
        return replace(options, seed=self.random_state)

    def fit(self, numerator: Any, denominator: Any, query: Any = None) -> DensityRatio:
        """Learns the ratio numerator / denominator. UserError for data that do not go together, cells that
        cannot be read, fewer than 20 samples: a fit that fails leaves the ratio as it was.

        Args:
            numerator: Samples of p: array, tensor or list (N, d) or (N, C, H, W), data frame, torch Dataset, the path
                of a table, an array or a folder of images, or a SPEC as on the command line.
            denominator: Samples of q, of the same kinds; their number may differ.
            query: What :meth:`scores` will be asked for, if it is there: mistakes in it are told before the training.
        """
        # Mistakes, before the data are read.
        fields = {} if self.preset is None else preset_fields(self.preset)
        make_config(fields, {"train": override_fields(self.overrides)["train"]})
        pair = pair_up(numerator, denominator, self._options, self.discrete)
        if query is not None:
            read_query(query, pair.source.transform, pair.warp, self._options)
        with all_or_nothing(self):
            self._learn(pair)
            self._data = (numerator, denominator)
        return self

    def _learn(self, pair: Pair) -> None:
        """Everything that :meth:`fit` sets."""
        began = time.monotonic()
        self._warp = pair.warp
        few = pair.warp is not None and len(pair.source.train) <= FEW_VECTORS
        short = VECTORS if self.preset is None and few else {}
        # Not by the likelihood of either source: the blend judges by what the ratio gains.
        train = {"train": {"select": "loss", "seed": self.random_state, "fallback": False}}
        fields = preset_fields(self.preset or usual_preset(pair.source))
        config = make_config(fields, short, LAYER, train, override_fields(self.overrides))
        limit = config.train.max_seconds or math.inf
        # Coordinates are for two Gaussians; another base that is asked for has to find the data as they are.
        asked = override_fields(self.overrides).get("model", {})
        as_given = pair.warp is None or any(asked.get(name) is not None for name in ("components", "gaussian"))
        source, self._steps = (pair.source, {}) if as_given else _in_coordinates(pair, began + limit / 4)
        x, y = _once(pair, "validation")
        held_out = [x[y == label] for label in (1, 0)]
        self._classifiers, self.blend, network = None, {}, True
        if pair.warp is not None:
            steps, until = config.train.steps, began + limit / 2
            rows, labels = _once(pair, "train")
            self._classifiers = Classifiers.fit(rows, labels, steps, self.random_state, until, self.progress)
            sides = [self._classifiers(part).numpy() for part in held_out]
            losses = [checks.log_loss(up, down) for up, down in zip(*(side.T for side in sides), strict=True)]
            asked = bool(self.preset or self.overrides.keys() - {"data", "max_seconds"})
            network = asked or min(losses) <= checks.SEPARATE
        steps = config.train.steps if network else 1
        left = None if limit == math.inf else max(began + limit - time.monotonic(), 1e-3)  # one step at least
        config = replace(config, train=replace(config.train, steps=steps, max_seconds=left))
        # Where the network is not asked for, its one step is worth neither a bar nor advice.
        self._model = require_density(trained(config, source, self.device, self.progress and network), "a ratio")
        log_probs = [self._log_probs(part) for part in held_out]
        estimates = [self._estimates(*side) for side in zip(held_out, log_probs, strict=True)]
        names = [name for name in estimates[0] if network or name != "network"]
        weights = blend(*(np.stack([side[name] for name in names], 1) for side in estimates))
        self.blend = dict(zip((*names, "offset"), weights, strict=True))
        found = " ".join(f"{weight:+.2f} {name}" for name, weight in self.blend.items() if weight)
        self.counts = pair.counts
        self.notes = (*source.notes, f"log ratio by what held-out samples bear out: {found}.")
        if not any(self.blend.get(name) for name in ("committee", "trees")):
            self._classifiers = None
        if not self.blend.get("network") and pair.warp is not None:
            self._fit_gaussians_again(pair)
        self._measure_limits(pair, log_probs, map(self._blended, estimates))
        numerator, denominator = map(self._blended, estimates)
        self._held_out = numerator.tolist(), denominator.tolist()
        self.held_out = Calibration.of(numerator, denominator)
        self.notes += tuple(self.held_out.warnings())

    def _fit_gaussians_again(self, pair: Pair) -> None:
        """From all samples, once the held-out ones have judged them and no network stands on them."""
        model = self._model
        if not (isinstance(model.base, GaussianMarginals) and len(model.base.classes)):
            return
        x, y = (torch.cat(part) for part in zip(_once(pair, "train"), _once(pair, "validation"), strict=True))
        # Every fifth sample chooses what the two have in common: not by their source.
        order = y.argsort(stable=True)[permutation(len(x), self.random_state)]
        device = model.schedule.alpha.device
        z = model.transform(self._coordinates(x[order]).to(device))
        model.base = fit_class_gaussians(z, y[order].to(device), model.schedule).to(device)

    def _measure_limits(self, pair: Pair, log_probs: Sequence[np.ndarray], held_out: Iterable[np.ndarray]) -> None:
        """Least log densities inside the support: (2, 2), of models and of Gaussians, of denominator and numerator.

        And least and largest log ratio by training samples and those ``held_out``, of numerator and denominator. The
        ``log_probs`` of these, (N, 2, 2) each, are by what was not fitted to them: where samples are few for their
        dimension, new ones are less probable than those that were fitted.
        """
        x, y = _once(pair, "train", LIMIT_ROWS // 2)
        values, of = self._log_probs(x), [(y == label).numpy() for label in (0, 1)]
        limits = []
        kinds = slice(None) if self.blend.get("network") else [0, 0]  # as _log_probs has them now
        for label, parts in enumerate(zip((values[rows] for rows in of), log_probs[::-1], strict=True)):
            found = [np.quantile(part[:, kinds, label], [RARE, 0.5], axis=0) for part in parts]
            limits.append(np.min([2 * rare - median for rare, median in found], axis=0))
        self._limits = np.stack(limits, 1)
        log_ratio = self._blended(self._estimates(x, values))
        up, down = (np.append(log_ratio[rows], side) for rows, side in zip(of[::-1], held_out, strict=True))
        for name, limit in (("most", most(up, down)), ("least", -most(-down, -up))):
            if math.isfinite(limit):
                self.blend[name] = limit
                self.notes += (f"{name}: log ratios end at {limit:.2g} nats, the samples bear out none beyond it.",)

    def _blended(self, estimates: Mapping[str, np.ndarray]) -> np.ndarray:
        """The log ratio (N,)."""
        found = self.blend["offset"] + sum(self.blend[key] * estimates[key] for key in estimates if key in self.blend)
        return np.clip(found, self.blend.get("least"), self.blend.get("most"))

    def scores(self, x: Any) -> Scores:
        """Names, log ratios and whether they are extrapolation, from one pass.

        ``x`` is (N, d) or (N, C, H, W), or anything else that :meth:`fit` takes; a table needs the fitted columns.
        UserError for data that do not go with the fitted ones, or where nothing is fitted.
        """
        self._check_fitted()
        values, names, deviating, _ = read_query(x, self._model.info.transform, self._warp, self._options)
        log_probs = self._log_probs(values)
        outside = (log_probs < self._limits).all(2).any(1) | np.array(deviating, dtype=bool)
        return Scores(tuple(names), self._blended(self._estimates(values, log_probs)), outside)

    def log_ratio(self, x: Any) -> np.ndarray:
        """log p(x) - log q(x) in nats, float64 (N,); ``x`` as for :meth:`scores`."""
        return self.scores(x).log_ratio

    def ratio(self, x: Any) -> np.ndarray:
        """p(x) / q(x), float64 (N,); infinite where the log ratio is above 709."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_ratio(x))

    def importance_weights(self, x: Any, clip: float | None = None, balance: Any = None) -> np.ndarray:
        """Weights with mean 1 that make samples of the denominator stand for the numerator, float64 (N,). Warns where
        a few samples have nearly all of it.

        Args:
            x: Samples of the denominator.
            clip: Weights above this quantile of them, a share such as 0.999, are set to it: less variance, some bias.
            balance: Samples of the numerator whose means the weighted samples get, of each pixel or of each column
                bent towards a normal; nearly, see :func:`torchcdm.apps.ratio.checks.balanced`.
        """
        weights = checks.importance_weights(self.log_ratio(x), clip)
        if balance is not None:
            sides = (read_query(side, self._model.info.transform, self._warp, self._options) for side in (x, balance))
            weights = checks.balanced(weights, *(side.x.flatten(1).double().numpy() for side in sides))
        if (size := effective_sample_size(weights)) < min(FEW, len(weights) / 10):
            warn(f"{size:.0f} of {len(weights)} samples carry the weights p/q; clip them")
        return weights

    def outside_support(self, x: Any) -> np.ndarray:
        """Where neither data set tells anything: bool (N,).

        True where both densities lie further below what is rare in training (one in a thousand) than that lies below
        the median, or a column that was constant in both has another value: the log ratio there is extrapolation.
        """
        return self.scores(x).outside

    def calibration(self, numerator: Any, denominator: Any) -> Calibration:
        """What can be checked without knowing the ratio, on samples of p and q that were not fitted."""
        return Calibration.of(self.log_ratio(numerator), self.log_ratio(denominator))

    effective_sample_size = staticmethod(effective_sample_size)

    def divergence(
        self, kind: Literal["kl", "reverse_kl", "js", "chi2"], numerator: Any = None, denominator: Any = None
    ) -> Estimate:
        """How far p is from q, with a standard error and reasons not to trust it.

        Args:
            kind: ``kl`` E_p log p/q, ``reverse_kl`` E_q log q/p, ``js`` of at most log 2, ``chi2`` E_p p/q - 1.
            numerator: Fresh samples of p; those that were held out of the fit when None.
            denominator: Fresh samples of q; both or neither, else a UserError.
        """
        self._check_fitted()
        if (numerator is None) != (denominator is None):
            raise UserError("divergence: give samples of numerator and denominator, or of neither")
        sides = self._held_out if numerator is None else map(self.log_ratio, (numerator, denominator))
        return divergence(kind, *map(np.array, sides))

    def two_sample_test(self, permutations: int = 999, random_state: int = 0) -> TwoSampleTest:
        """:func:`torchcdm.two_sample_test` of the data of the fit; UserError of a ratio that was loaded."""
        if self._data is None:
            raise UserError("this ratio has no data to test; call torchcdm.two_sample_test(numerator, denominator)")
        return two_sample_test(*self._data, permutations, random_state, self._options)

    def save(self, path: str | Path) -> None:
        """Writes a folder: safetensors and JSON; UserError where nothing is fitted, or as of :func:`torchcdm.save`."""
        self._check_fitted()
        others = {} if self._classifiers is None else {"classifiers": self._classifiers.state_dict()}
        save(self._model, path, described(self, SETTINGS, self._model.info), **others)

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> DensityRatio:
        """A ratio that :meth:`save` wrote; UserError of none, damaged files and those of another format version."""
        content, file = description(path, cls).estimator, RunFolder(path).model_info
        _, *tensors = read_artefact(file, KINDS, None)[1]
        with restoring(file):
            params = content["params"]
            ratio = cls(**params.pop("overrides"), **params, device=device)
            restore(ratio, cls._saved, content["fitted"], ["_warp"])
            ratio._classifiers = Classifiers.of(*tensors) if tensors else None
        ratio._model = require_density(load(path, device or "cpu"), "a ratio")
        return ratio

    def _check_fitted(self) -> None:
        if self._model is None:
            raise UserError("this DensityRatio is not fitted; call fit(numerator, denominator), or load one")

    def _coordinates(self, x: Tensor) -> Tensor:
        return through(self._steps, x)[0].float() if self._steps else x

    def _log_probs(self, x: Tensor) -> np.ndarray:
        """log density of Gaussians and network at level 0, float64 (N, 2, 2), denominator first; model units. The
        Gaussians stand in the place of a network without weight in the blend, which is not asked."""
        model, device = self._model, self._model.schedule.alpha.device
        asked = not self.blend or self.blend.get("network")
        z = model.info.transform(self._coordinates(x)).clamp(-FARTHEST, FARTHEST)

        def one(rows: slice) -> Tensor:
            part = z[rows].to(device, working_dtype(model, torch.float32))
            effects = model.base.class_effects(part)
            base = model.base.log_prob_levels(part)[:, :1] + (0.0 if effects is None else effects[:, :, 0])
            base = base.expand(-1, 2)
            return torch.stack([base, model.class_log_prob_levels(part)[:, :, 0] if asked else base], 1).cpu()

        return in_batches(model, z, one).numpy()

    def _estimates(self, x: Tensor, log_probs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Log ratios of samples by each estimate, float64 (N,)."""
        gaussians, network = np.diff(self._log_probs(x) if log_probs is None else log_probs)[:, :, 0].T
        others = () if self._classifiers is None else self._classifiers(x).numpy().T
        return {"gaussians": gaussians, "network": network, **dict(zip(("committee", "trees"), others, strict=False))}


def _in_coordinates(pair: Pair, until: float) -> tuple[DataSource, Steps]:
    """The rows in the coordinates that :func:`best_steps` chooses, and their steps."""
    source = pair.source
    (x, y), (held_out, held_out_y) = (split.tensors() for split in (source.train, source.validation))
    steps = best_steps(x.double(), y, held_out.double(), held_out_y, pair.warp, until)
    if not steps:
        return source, steps
    x, held_out = (through(steps, part.double())[0].float() for part in (x, held_out))
    note = "coordinates chosen on held-out rows: " + ", then ".join(STEPS[name].NOTE for name in steps) + "."
    train, validation = MemorySplit(x, y), MemorySplit(held_out, held_out_y)
    transform, notes = DataTransform.standardize(x), (*source.notes, note)
    return replace(source, train=train, validation=validation, transform=transform, notes=notes), steps


def _once(pair: Pair, name: Literal["train", "validation"], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Samples of a split and their sources, those of the smaller one once; at most so many of each, evenly spaced."""
    split, rows = getattr(pair.source, name), []
    for label, (n, held) in enumerate(zip(pair.counts, pair.held_out, strict=True)):
        own = (split.labels == label).nonzero()[: held if name == "validation" else n - held, 0]
        rows.append(own[evenly_spaced(len(own), limit)])
    return split.batch(torch.cat(rows))
