"""What the estimators share: from a table to a trained model, and from a row to what the model sees."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Gt, Le, Lt
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from torchcdm.apps.fitted import Readers, plain_fields, restore, restoring
from torchcdm.data import DataSource, MemorySplit
from torchcdm.data.arrays import as_array
from torchcdm.diffusion.start import Start, best_start
from torchcdm.errors import UserError
from torchcdm.estimators.columns import Columns
from torchcdm.likelihood import FlowSolver, Scoring
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import LARGEST
from torchcdm.random import permutation
from torchcdm.runtime.batching import labels_of
from torchcdm.runtime.validation import Count, Float, Positive, Rate, Width, read_as
from torchcdm.samplers import sample
from torchcdm.training.checkpoint import ModelInfo, load, read_info, save_model
from torchcdm.training.config_files import make_config, merge, preset_fields
from torchcdm.training.fit import override_fields, trained
from torchcdm.training.run_folder import RunFolder
from torchcdm.units import ColumnTransform, DataTransform
from torchcdm.units.lattice import Discrete

if TYPE_CHECKING:
    from typing_extensions import Self

SMALLEST_TABLE = 10
SMALL, LARGE = 3_000, 50_000
"""Rows up to which, and from which on, a table is small or large: see :func:`size_fields`."""


def size_fields(rows: int) -> dict[str, Any]:
    """What the number of training rows changes in a preset for vectors.

    Small tables are overfit within some hundred steps, and stopped there. Larger ones take a deeper network without
    dropout, and a learning rate that gets to its end.
    """
    if rows <= SMALL:
        return {}
    backbone: dict[str, Any] = {"depth": 3, "dropout": 0.0}
    train = {"lr": 2e-3, "steps": 1500, "validate_every": 100, "patience": 10}
    if rows >= LARGE:
        backbone |= {"width": 256}
        train |= {"steps": 4000, "batch_size": 512, "ema_decay": 0.998, "validate_every": 200}
    return {"model": {"backbone": backbone}, "train": train}


WATCHED_ROWS = 2000
"""Noisy copies of validation rows that early stopping sees at least."""

LARGEST_BATCH = 2**17
"""Rows in a step, at most: all of them are in memory at once."""

SAMPLING_STEPS = 50

Likelihood = Literal["one-pass", "flow"]

FLOW_STEPS = 50
"""Steps of the probability flow, Heun: two evaluations each, of the network and of its divergence."""

SHORTEST = 1e-3
"""Seconds of a training for which no time is left: one step."""


@dataclass(kw_only=True, eq=False, repr=False)
class TableEstimator(BaseEstimator):
    """The parameters of training, and training itself.

    Args:
        preset: Where all settings start from, a name of :func:`torchcdm.training.config_files.preset_names`.
        steps: Optimiser steps at most; that of the preset, or of the size of the table, when None. Likewise below.
        batch_size: Rows in a step.
        lr: Peak learning rate.
        width: Width of the network.
        depth: Blocks of the network.
        dropout: Rate inside the blocks.
        components: Gaussians of the mixture that the network corrects; chosen on the validation rows when None. So is
            the shrinkage of their covariances, unless ``overrides`` has a ``model.shrinkage``.
        patience: Training stops after so many validations without a new best; see also ``validate_every`` in
            ``overrides``.
        max_seconds: Training stops after so much time, the choice of the mixture included.
        validation_fraction: Share of the rows that early stopping watches, and that training does not see.
        discrete: What to do with columns of few distinct values: ``dequantize`` adds noise over the distance between
            two values, ``error`` refuses them.
        overrides: Any other fields of a configuration, ``{"loss": {"ce_weight": 1.0}}``; stronger than all above.
        device: Where to train and score, ``cpu`` or ``cuda``; trains on the best there is when None.
        random_state: Seed of the split, of training, and of scores of discrete columns.
        verbose: 1 shows a progress bar and the notes.

    Attributes:
        model_: The trained :class:`torchcdm.ClassificationDiffusion`; data units are those of the kept columns,
            discrete ones dequantised already: its transform adds no noise.
        columns_: Which columns were left out or dequantised, a :class:`Columns`.
        notes_: What was read off the table, one sentence each.
        validation_indices_: Rows of the training table that early stopping watched.
        validation_loss_: Their training loss at the step that was kept. It and not log p chooses, because a density
            that is not normalised can give every row a large log p.
        n_features_in_: Columns of the table.
    """

    clock: ClassVar[Callable[[], float]] = time.monotonic
    """What ``max_seconds`` counts; :func:`time.process_time` on a machine that other jobs share. No parameter: a clone
    has that of its class."""

    _saved: ClassVar[Readers] = {
        "columns_": partial(read_as, Columns),
        "notes_": list,
        "validation_loss_": float,
        "validation_indices_": np.array,
        "n_features_in_": int,
        "_noise": np.array,
    }
    """What was fitted beside the model."""

    preset: str = "table"
    steps: Count | None = None
    batch_size: Annotated[Count, Le(LARGEST_BATCH)] | None = None
    lr: Positive | None = None
    width: Width | None = None
    depth: Width | None = None
    dropout: Rate | None = None
    components: Count | None = None
    patience: Count | None = None
    max_seconds: Positive | None = None
    validation_fraction: Annotated[Float, Gt(0), Lt(1)] = 0.15
    discrete: Discrete = "dequantize"
    overrides: Mapping[str, Any] | None = None
    device: Any = None
    random_state: Any = None
    verbose: Any = 0

    # --- training ------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Refuses parameters that training would notice late, or never."""
        read_as(type(self), self.get_params(deep=False))

    def _measure_columns(
        self, x: np.ndarray, names: Sequence[Any] | None, what: str = "", has_density: bool = True
    ) -> Columns:
        """The columns of a training table; what is to be known of them goes into the notes."""
        labels = [str(name) for name in (range(x.shape[1]) if names is None else names)]
        columns, notes = Columns.measure(x, labels, self.discrete if has_density else None, what)
        if columns.constants:
            warnings.warn(notes[0], UserWarning, stacklevel=3)
        self._say(*notes)
        return columns

    def _say(self, *notes: str) -> None:
        self.notes_ = [*self.notes_, *notes]
        if self.verbose:
            print(*notes, sep="\n")

    def _split_rows(self, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of training and of validation, at random."""
        held_out = min(max(2, round(self.validation_fraction * rows)), rows - 2)
        order = permutation(rows, seed).numpy()
        return order[held_out:], order[:held_out]

    def _train(
        self,
        train: np.ndarray,
        validation: np.ndarray,
        contexts: tuple[np.ndarray, np.ndarray] | None,
        rows: int,
        seed: int,
    ) -> None:
        """Fits the model to rows (N, d), float64, and their contexts (N, q) where the density is conditional.

        ``rows`` counts those of training without their noisy copies.
        """
        began = self.clock()
        # Residuals of a regression lie on no values.
        values = self.columns_.kept_values if contexts is None else {}
        layer = merge({"train": {"select": "loss"}}, self._fields(rows))
        layer = merge(layer, {"train": {"seed": seed}, "data": {"gaussianize": False}})
        transform, parts, start = self._bent_or_straight(train, validation, values, {"gaussian": True} | layer["model"])
        layer = merge(layer, {"model": start.fields})
        # The validation loss has one noisy copy of each row: with few rows it would choose by luck.
        repeats = math.ceil(WATCHED_ROWS / len(validation))
        parts[1] = parts[1].repeat(repeats, 1)
        given: list[Tensor | None] = [None, None]
        if contexts is not None:
            given = [torch.from_numpy(part).float() for part in (contexts[0], np.tile(contexts[1], (repeats, 1)))]
        splits = [MemorySplit(part, context=context) for part, context in zip(parts, given, strict=True)]
        empty = MemorySplit(parts[0][:0])
        source = DataSource("table", splits[0], splits[1], empty, DataTransform.identity(transform.shape))
        if contexts is not None:
            layer = merge(layer, {"model": {"backbone": {"context": contexts[0].shape[1]}}})
        config = make_config(preset_fields(self.preset), override_fields(layer))
        if config.train.max_seconds is not None:
            left = max(config.train.max_seconds - (self.clock() - began), SHORTEST)
            config = replace(config, train=replace(config.train, max_seconds=left))
        with trained(config, source, self.device, bool(self.verbose), self.clock) as run:
            model, info = require_density(load(run, self.device or "cpu"), "an estimator"), read_info(run)
        model.transform = transform.to(model.schedule.alpha.device)
        # Scores in float64: a row's is then the same in any batch, to about 1e-12.
        self.model_ = model.double()
        self._info: ModelInfo = replace(info, transform=transform)
        self.validation_loss_ = float(info.selected.get("best", np.nan))

    def _bent_or_straight(
        self, train: np.ndarray, validation: np.ndarray, values: Mapping[int, Sequence[float]], given: dict[str, Any]
    ) -> tuple[ColumnTransform, list[Tensor], Start]:
        """The transform of the columns, the rows in model units, float32, and the base density there.

        Continuous columns are bent near a normal, unless held-out rows are more probable as they are: bending takes
        the ellipses from columns whose tails are heavy together.
        """
        found = []
        for bend in (True, False):
            # They come dequantised: the transform must not add noise a second time.
            transform = ColumnTransform.fit(torch.from_numpy(train), values, bend, dequantize=False)
            # In float64 here and not by the model in training: a column may have any offset.
            parts = [transform(torch.from_numpy(x)).float() for x in (train, validation)]
            distinct = slice(0, len(self.validation_indices_))
            start = best_start(parts[0], parts[1][distinct], given=given)
            log_det = transform.log_det(torch.from_numpy(validation)[distinct]).mean()
            found.append((start.value + float(log_det), transform, parts, start))
        bent, straight = found
        return (straight if straight[0] > bent[0] else bent)[1:]

    def _fields(self, rows: int) -> dict[str, Any]:
        """The configuration on top of the preset."""
        given = {
            "model": {"backbone": self._given("width", "depth", "dropout"), **self._given("components")},
            "train": self._given("steps", "batch_size", "lr", "patience", "max_seconds"),
        }
        return merge(merge(size_fields(rows), given), self.overrides or {})

    def _given(self, *names: str) -> dict[str, Any]:
        """Those of the parameters that are set."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    # --- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the estimator as safetensors and JSON; ``torchcdm.load(folder)`` gives its model.

        A ``random_state`` that is a generator is not kept.

        Raises:
            NotFittedError: Nothing was fitted.
            UserError: A file cannot be written, or the folder holds a run or files of another origin.
        """
        check_is_fitted(self)
        params, fitted = plain_fields(self, self.get_params()), plain_fields(self, self._saved)
        content = {"kind": type(self).__name__, "params": params, "fitted": fitted}
        run = RunFolder(folder)
        with run.locked():
            save_model(run, self.model_, replace(self._info, estimator=content))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """A saved estimator.

        Raises:
            UserError: No estimator of this class there, or damaged files.
        """
        info = read_info(folder)
        content = info.estimator or {}
        if content.get("kind") != cls.__name__:
            held = content.get("kind", "run")
            raise UserError(f"{folder}: holds a {held}; load it with that class, not {cls.__name__}")
        with restoring(RunFolder(folder).model_info):
            self = cls(**content["params"])
            restore(self, self._saved, content["fitted"], ["feature_names_in_"])
        self.model_, self._info = load(folder, device).double(), info
        return self

    # --- parts -----------------------------------------------------------------------------------------------------

    def _draws(self, n: int, random_state: Any, y: Tensor | None = None) -> np.ndarray:
        """Draws of the kept columns, float64 (n, kept), before discrete ones are rounded."""
        steps = min(SAMPLING_STEPS, self.model_.schedule.T)
        return sample(self.model_, n, "dpm++", steps, y=y, seed=self._seed(random_state), units="codes").numpy()

    def _seed(self, random_state: Any = None) -> int:
        """A seed from ``random_state``, or from the estimator's own when None."""
        state = check_random_state(self.random_state if random_state is None else random_state)
        return int(state.randint(2**31 - 1))


@dataclass(kw_only=True, eq=False, repr=False)
class DensityEstimator(TableEstimator):
    """An estimator that gives the log-density of rows; parameters as in :class:`CDMDensity`."""

    likelihood: Likelihood = "one-pass"

    def _log_density(
        self, rows: np.ndarray, centre: float | np.ndarray = 0.0, context: np.ndarray | None = None
    ) -> np.ndarray:
        """log p of rows (N, columns) less a ``centre`` (N, kept): of discrete columns the mean over the noise."""
        read_as(Likelihood, self.likelihood, "likelihood")
        columns = self.columns_
        if differ := int(columns.deviating(rows).sum()):
            what = "rows differ in a column that was constant in training, where this density knows nothing"
            warnings.warn(f"{differ} {what}", UserWarning, stacklevel=3)
        draws = [
            log_density(self.model_, columns.noisy(rows, noise) - centre, self.likelihood, context)
            for noise in self._noise
        ]
        # The units of rows count their cells; those of residuals know none.
        return np.mean(draws, axis=0) + (0.0 if context is None else columns.log_cell)


def log_density(
    model: DensityModel, rows: np.ndarray, likelihood: str, context: np.ndarray | None = None
) -> np.ndarray:
    """log p of each row, nats in data units, float64 (N,).

    The flow's is the normalised density at level 1 taken at the row itself: that of the data blurred by r_1, a
    hundredth of a column's deviation.

    Args:
        model: In float64, with a transform.
        rows: Data units, float64 (N, d).
        likelihood: ``one-pass`` or ``flow``.
        context: Contexts of a conditional model, (N, q).
    """
    transform, alpha = model.transform, model.schedule.alpha[1]
    x, y = (None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in (rows, context))
    scoring = Scoring(level=1, steps=FLOW_STEPS)
    solver = FlowSolver(model, scoring) if likelihood == "flow" else None

    def one(batch: slice) -> Tensor:
        z, label = x[batch].to(alpha.device), labels_of(y, batch, alpha.device)
        # Where a model refuses rows, as their squares overflow, the density is zero.
        far = ~(transform(z).abs().amax(1, keepdim=True) <= LARGEST)
        z = torch.where(far, transform.inverse(torch.zeros_like(z)), z)
        if solver is None:
            log_p = model.log_prob(z, y=label)
        else:
            log_p = solver.log_prob(alpha * transform(z), label).log_prob.double()
            log_p = log_p + transform.dim * float(alpha.log()) + transform.log_det(z)
        return log_p.masked_fill(far[:, 0], -torch.inf).cpu()

    return scoring.by_batches(model, x, one).numpy()


def checked(check: Callable[..., np.ndarray], table: Any, **options: Any) -> np.ndarray:
    """A table as float64 (N, columns) by a check of scikit-learn, which would drop the mask of an array.

    Args:
        check: ``check_array``, or ``validate_data`` of an estimator.
        table: Array, data frame, list or tensor.
        **options: Further arguments of the check.

    Raises:
        ValueError: Cells that are no finite numbers, another shape.
        TypeError: A sparse matrix.
    """
    if isinstance(table, Tensor) or np.ma.is_masked(table):
        table = as_array(table, "the table")
    try:
        return check(table, dtype=np.float64, **options)
    except OverflowError:
        raise UserError("the table has numbers beyond float64 (1.8e308)") from None
