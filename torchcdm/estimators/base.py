"""What the estimators share: from a table to a trained model, and from a row to what the model sees."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Le
from scipy.stats import qmc
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from typing_extensions import Self

from torchcdm.annealing.target import in_batches
from torchcdm.apps.fitted import Readers, described, description, restore, restoring
from torchcdm.compose import sample
from torchcdm.data import DataSource, MemorySplit
from torchcdm.data.arrays import as_array
from torchcdm.data.source import split_rows
from torchcdm.diffusion.mixture import FIT_ROWS
from torchcdm.diffusion.start import Start, best_start
from torchcdm.errors import UserError, warn
from torchcdm.likelihood import FlowSolver, Scoring
from torchcdm.models.density import require_density
from torchcdm.models.inputs import LARGEST
from torchcdm.random import evenly_spaced, stream
from torchcdm.runtime.processes import labels_of
from torchcdm.runtime.validation import Count, Positive, ProperShare, Rate, Width, read_as
from torchcdm.training.checkpoint import load, save
from torchcdm.training.config_files import make_config, merge, paths, preset_fields
from torchcdm.training.fit import override_fields, trained
from torchcdm.training.run_folder import RunFolder
from torchcdm.units import ColumnTransform, DataTransform, TableEncoding
from torchcdm.units.frames import as_frame, by_place, is_frame, noted, without_counter
from torchcdm.units.lattice import Discrete, by_chance, spread
from torchcdm.units.table import Encoded

COPIES, COPIED_ROWS = 20, 200_000  # noisy copies of a table with cells, and rows of all of them, to train on at most
DRAWS = 8  # draws of the dequantisation noise that a score is averaged over
SMALLEST_TABLE = 10
SMALL, LARGE = 3_000, 50_000  # rows up to which, and from which on, a table is small or large
WATCHED_ROWS = 2000  # noisy copies of validation rows that early stopping sees at least
LARGEST_BATCH = 2**17  # rows in a step, at most: all of them are in memory at once
UNUSED = ("data", "sampling", "report", "train.seed")  # fields without effect: parameters stand for some of them

Likelihood = Literal["one-pass", "flow"]


@dataclass(kw_only=True, eq=False, repr=False)
class TableEstimator(BaseEstimator):
    """The parameters of training, and training itself.

    Args:
        preset: Where all settings start from, a name of :func:`torchcdm.training.config_files.preset_names`.
        steps: Optimiser steps at most; that of the preset, or of the size of the table, when None, as below.
        batch_size: Rows in a step.
        lr: Peak learning rate.
        width, depth, dropout: Of the network: width, number of blocks, and rate inside these.
        components: Gaussians of the mixture that the network corrects; chosen on the validation rows when None, unless
            :meth:`_sized` has a number. So is their shrinkage, unless ``overrides`` has a ``model.shrinkage``.
        patience: Training stops after so many validations without a new best; see also ``train.validate_every``.
        max_seconds: Training stops after so much time, the choice of the mixture included.
        validation_fraction: Share of the rows that early stopping watches, and that training sees no copy of.
        discrete: What to do with values that come back: ``dequantize`` adds noise over a cell around each, ``error``
            refuses columns that have any.
        overrides: Any other fields of a configuration, ``{"loss": {"ce_weight": 1.0}}``; stronger than all above.
        device: Where to train and score, ``cpu`` or ``cuda``; trains on the best there is when None.
        random_state: Seed of the split, of training, and of scores of discrete columns.
        verbose: 1 shows a progress bar and the notes.

    Attributes:
        model_: The trained :class:`torchcdm.ClassificationDiffusion`; data units are the codes of the columns that
            vary, dequantised already: its transform adds no noise.
        columns_: The columns and their codes, a :class:`torchcdm.units.TableEncoding`.
        notes_: What was read off the table, one sentence each.
        validation_indices_: Rows of the training table that early stopping watched.
        n_features_in_: Number of columns of the table.
        feature_names_in_: Their names, where the table of a density or an outlier detector was a data frame.
    """

    clock: ClassVar[Callable[[], float]] = time.monotonic
    """What ``max_seconds`` counts; :func:`time.process_time` on a machine that other jobs share. No parameter: a clone
    has that of its class."""

    _saved: ClassVar[Readers] = {"n_features_in_": int, "notes_": list, "_framed": bool}
    _saved |= {"columns_": partial(read_as, TableEncoding), "validation_indices_": np.array}
    _saved |= {"_noise": partial(torch.tensor, dtype=torch.float64)}
    """What was fitted beside the model."""
    _conditional: ClassVar[bool] = False

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
    validation_fraction: ProperShare = 0.15
    discrete: Discrete = "dequantize"
    overrides: Mapping[str, Any] | None = None
    device: Any = None
    random_state: Any = None
    verbose: Any = 0

    def _describe(self, frame: pd.DataFrame, name: str, has_density: bool = True) -> TableEncoding:
        """The columns of a training table, and what is to be known of them: notes, and a warning."""
        table, notes = TableEncoding.fit(frame, name, cells=has_density)
        uncountable = [column.name for column in table.kept if column.codes]
        if has_density and self.discrete == "error" and uncountable:
            what = f"column '{uncountable[0]}' holds values that come back, so that its density has no upper bound"
            raise UserError(f"{name}: {what}; leave it out, or give discrete='dequantize'")
        if has_density and table.constants:
            warn(f"{name}: {notes[-1]}")
        self._say(*(f"{name}: {note}" for note in [*noted(frame, "notes"), *notes]))
        return table

    def _say(self, *notes: str) -> None:
        self.notes_ = [*self.notes_, *notes]
        if self.verbose:
            print(*notes, sep="\n")

    def _split_rows(self, codes: Tensor, seed: int, given: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of training and of validation, at random; copies of a row, with what is ``given`` it, are together."""
        rows = codes if given is None else torch.cat([codes, given], 1)
        share = min(self.validation_fraction, 1 - 2 / len(codes))  # two rows at least are for training
        held_out, train = split_rows(rows, self._alone(codes), share, seed)
        return train.numpy(), held_out.numpy()

    def _alone(self, codes: Tensor) -> Tensor:
        """Rows that are no copies of others, though these may be equal, (N,)."""
        return by_chance(codes, self.columns_.cells)

    def _train(
        self, parts: Sequence[Tensor], contexts: Sequence[np.ndarray] | None, rows: int, seed: int, began: float
    ) -> None:  # fmt: skip
        """Fits the model to codes (N, d), float64, and their contexts (N, q) where the density is conditional.

        Each for training and validation; ``rows`` counts those of training without their noisy copies. ``max_seconds``
        is counted from where the clock stood when it ``began``.
        """
        self._noise = noise_draws(self.columns_, seed)
        fields = self._fields(rows)
        transform, parts, start = self._best_start(*parts, fields["model"])
        given = [None, None] if contexts is None else [torch.from_numpy(part).float() for part in contexts]
        learned, watched = (MemorySplit(part, context) for part, context in zip(parts, given, strict=True))
        # The validation loss has one noisy copy of each row: with few rows it would choose by luck.
        watched = watched.select(torch.arange(len(watched)).repeat(math.ceil(WATCHED_ROWS / len(watched))))
        source = DataSource("table", learned, watched, MemorySplit(parts[0][:0]), DataTransform(transform.shape))
        model = start.fields | ({} if contexts is None else {"backbone": {"context": contexts[0].shape[1]}})
        fixed = {"train": {"seed": seed}, "data": {"gaussianize": False}, "model": model}
        # The loss chooses, not log p: a density that is not normalised can give every row a large one.
        config = make_config(preset_fields(self.preset), {"train": {"select": "loss"}}, override_fields(fields), fixed)
        if config.train.max_seconds is not None:
            left = max(config.train.max_seconds - (self.clock() - began), 1e-3)  # one step at least
            config = replace(config, train=replace(config.train, max_seconds=left))
        model = trained(config, source, self.device, bool(self.verbose), clock=self.clock)
        model = require_density(model, "an estimator")
        transform.table = self.columns_ if self._framed and not self._conditional else None
        model.transform = transform.to(model.schedule.alpha.device)
        # Scores in float64: a row's is then the same in any batch, to about 1e-12.
        self.model_, model.info = model.double(), replace(model.info, transform=transform)

    def _best_start(
        self, train: Tensor, validation: Tensor, given: dict[str, Any], bent: bool = True
    ) -> tuple[ColumnTransform, list[Tensor], Start]:
        """The transform of the columns, those with cells by histogram, the rows in its units, and a base density.

        Continuous columns are bent near a normal, and go by histogram where their density has steps, unless held-out
        rows are more probable otherwise: bending takes the ellipses from columns whose tails are heavy together. Not
        ``bent``, they are scaled alone.
        """
        # Residuals of a regression lie on no values.
        cells = {} if self._conditional else self.columns_.cells
        # Without copies of the same row, and no more than a start counts: all candidates see the same rows.
        counted = evenly_spaced(len(self.validation_indices_), FIT_ROWS)

        def candidate(step: bool, bent: bool) -> tuple[float, ColumnTransform, list[Tensor], Start]:
            # They come dequantised: the transform must not add noise a second time.
            transform = ColumnTransform.fit(train, cells, bent, dequantize=False, step=step)
            # In float64 here and not by the model in training: a column may have any offset.
            parts = [transform(x).float() for x in (train, validation)]
            start = best_start(parts[0], parts[1][counted], given={"gaussian": True} | given)
            return start.value + float(transform.log_det(validation[counted]).mean()), transform, parts, start

        found = [candidate(step, step) for step in ((True, False) if bent else (False,))]
        if len(found[0][1].histograms) > len(found[-1][1].histograms):
            found.append(candidate(step=False, bent=True))
        return max(found, key=lambda trial: trial[0])[1:]

    def _check(self) -> None:
        """Refuses wrong parameters before anything is read."""
        read_as(type(self), self.get_params(deep=False))
        for path, _ in paths(override_fields(self.overrides or {})):
            if path.startswith(UNUSED):
                raise UserError(f"overrides: {path} has no effect on an estimator; leave it out")
        make_config(preset_fields(self.preset), override_fields(self._fields(SMALL)))

    def _sized(self, rows: int) -> dict[str, Any]:
        """What the number of training rows changes in a preset for vectors. Small tables are overfit within some
        hundred steps; larger ones take less dropout, and faster steps. Given x, steps count most, so that they are
        made cheap: a narrow network, and one Gaussian for it to correct; and the error of the denoiser counts more
        beside that of the classifier.
        """
        size = (rows > SMALL) + (rows >= LARGE)
        train = {"validate_every": 100 * size, "patience": 10} if size else {}
        if self._conditional:
            backbone = {"width": 64, "depth": 2, "dropout": (0.2, 0.05, 0.0)[size]}
            train |= {"lr": 8e-3, "batch_size": 512, "steps": (1500, 3000, 9000)[size]}
            return {"model": {"components": 1, "backbone": backbone}, "train": train, "loss": {"ce_weight": 1.0}}
        if size == 0:
            return {}
        backbone, train = {"depth": 3, "dropout": 0.0}, train | {"lr": 2e-3, "steps": 1500}
        if size == 2:
            backbone |= {"width": 256}
            train |= {"steps": 4000, "batch_size": 512, "ema_decay": 0.998}
        return {"model": {"backbone": backbone}, "train": train}

    def _fields(self, rows: int) -> dict[str, Any]:
        """The configuration on top of the preset."""

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        model = {"backbone": given("width", "depth", "dropout"), **given("components")}
        train = given("steps", "batch_size", "lr", "patience", "max_seconds")
        return merge(merge(self._sized(rows), {"model": model, "train": train}), self.overrides or {})

    def save(self, folder: str | Path) -> None:
        """Writes the estimator as safetensors and JSON; ``torchcdm.load(folder)`` gives its model.

        A ``random_state`` that is a generator is not kept. NotFittedError where nothing was fitted; UserError for a
        file that cannot be written, or a folder that holds a run or files of another origin.
        """
        check_is_fitted(self)
        save(self.model_, folder, described(self, self.get_params(), self.model_.info))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """A saved estimator; UserError where there is none of this class, or files are damaged."""
        info = description(folder, cls)
        with restoring(RunFolder(folder).model_info):
            self = cls(**info.estimator["params"])
            restore(self, self._saved, info.estimator["fitted"], ["feature_names_in_"])
            widths = (1, len(self.columns_.kept))
            if self._noise.ndim != 2 or self._noise.shape[1] not in widths or not len(self._noise):
                raise ValueError("_noise has no number for each column")
        self.model_ = load(folder, device).double()
        return self

    def _noisy(self, codes: Tensor) -> Iterator[Tensor]:
        """Codes (N, kept) under each draw of the dequantisation noise."""
        return (spread(codes, noise, self.columns_.cells) for noise in self._noise)

    def _over_draws(self, function: Callable[[Tensor], Tensor], codes: Tensor) -> np.ndarray:
        """Mean of a function of codes (N, kept), (N,), over the draws of the dequantisation noise."""
        return torch.stack([function(rows) for rows in self._noisy(codes)]).mean(0).numpy()

    def _draws(self, n: int, random_state: Any, y: Tensor | None = None) -> Tensor:
        """Codes that the model draws, float64 (n, kept)."""
        # In float32, which takes two thirds of the time and moves a draw in its seventh digit.
        model, y = deepcopy(self.model_).float(), None if y is None else y.float()
        z = sample(model, n, y=y, seed=self._seed(random_state), units="model")
        return self.model_.transform.inverse(z.double().to(self.model_.schedule.alpha.device)).cpu()

    def _decoded(self, codes: Tensor) -> Any:
        """Codes as what was fitted: a data frame, or an array float64 (n, columns)."""
        frame = self.columns_.decode(codes)
        return frame if self._framed else frame.to_numpy(np.float64, copy=True)

    def _seed(self, random_state: Any = None) -> int:
        """A seed from ``random_state``, or from the estimator's own when None."""
        return int(self._state(random_state).randint(2**31 - 1))

    def _state(self, random_state: Any) -> np.random.RandomState:
        return check_random_state(self.random_state if random_state is None else random_state)


@dataclass(kw_only=True, eq=False, repr=False)
class DensityEstimator(TableEstimator):
    """An estimator that gives the log-density of rows; parameters as in :class:`CDMDensity`."""

    share_: ClassVar[float] = 1.0  # of what the network adds to its start, so much counts in one pass
    likelihood: Likelihood = "one-pass"

    def _log_density(
        self, found: Encoded, codes: Tensor, seen: Callable[[Tensor], Tensor], context: np.ndarray | None = None
    ) -> np.ndarray:
        """Mean of log p, over draws of the noise, of what is ``seen`` of the codes that were ``found``, or of as many
        times these, (N, kept), given contexts (N, q).

        The flow's is the normalised density at level 1: that of data blurred by a hundredth of a column's deviation.
        """
        read_as(Likelihood, self.likelihood, "likelihood")
        if differ := sum(map(bool, found.deviating)):
            warn(f"{differ} rows differ in a column that was constant in training, where this density knows nothing")
        model, transform, alpha = self.model_, self.model_.transform, self.model_.schedule.alpha[1]
        y = None if context is None else torch.tensor(context)
        solver = FlowSolver(model, Scoring(level=1, steps=50)) if self.likelihood == "flow" else None

        def one(rows: Tensor, batch: slice) -> Tensor:
            z, label = rows[batch].to(alpha.device), labels_of(y, batch, alpha.device)
            # Where a model refuses rows, as their squares overflow, the density is zero.
            far = ~(transform(z).abs().amax(1, keepdim=True) <= LARGEST)
            z = torch.where(far, transform.inverse(torch.zeros_like(z)), z)
            if solver is None:
                log_p = model.log_prob(z, y=label)
                if self.share_ < 1:
                    start = model.base.log_prob_levels(transform(z))[:, 0] + transform.log_det(z)
                    log_p = torch.lerp(start, log_p, self.share_)
            else:
                # Probes by what is in a row, not by its place: its score is its own.
                digests = (blake2b(row.tobytes(), digest_size=6).digest() for row in z.cpu().numpy())
                index = [int.from_bytes(digest, "big") for digest in digests]
                log_p = solver.log_prob(alpha * transform(z), label, index).log_prob.double()
                log_p = log_p + transform.dim * float(alpha.log()) + transform.log_det(z)
            return log_p.masked_fill(far[:, 0], -torch.inf).cpu()

        return self._over_draws(lambda rows: in_batches(model, rows, partial(one, seen(rows))), codes)


def noisy_copies(table: TableEncoding, codes: Tensor, seed: int, part: int = 0) -> Tensor:
    """What to train on: several dequantised copies of codes (N, kept), one after the other, where some have a cell."""
    copies = max(1, min(COPIES, COPIED_ROWS // len(codes))) if table.cells else 1
    repeated, generator = codes.repeat(copies, 1), stream(seed, "dequantise", part)
    return spread(repeated, torch.rand(repeated.shape, generator=generator, dtype=torch.float64), table.cells)


def noise_draws(table: TableEncoding, seed: int) -> Tensor:
    """Noise of scores, (DRAWS, kept), evenly spread: the same for every row, so that a row's score is its own."""
    if not table.cells:
        return torch.full((1, 1), 0.5, dtype=torch.float64)
    return torch.from_numpy(qmc.Sobol(len(table.kept), seed=seed).random(DRAWS))


def data_frame(
    table: Any, name: str, like: TableEncoding | None = None, check: Callable[..., np.ndarray] | None = None
) -> pd.DataFrame:
    """A data frame as it comes, and anything else that scikit-learn takes as a table of finite numbers.

    Columns ``like`` those of the fit go by name; by their place where the fit or the table has no names. ``check`` is
    ``validate_data`` of an estimator, for what is no data frame, or ``check_array``, and then a vector is one column:
    their ValueError and TypeError. UserError for no rows, fewer than ``SMALLEST_TABLE`` to fit, or another number
    of columns without names.
    """
    smallest = SMALLEST_TABLE if like is None else 1
    named = is_frame(table)
    if not named:
        try:
            if check is None or isinstance(table, Tensor) or np.ma.is_masked(table):
                table = as_array(table, name)  # the check would drop the mask of an array
            if check is None:
                table, check = table.reshape(-1, 1) if table.ndim < 2 else table, partial(check_array, input_name=name)
            table = pd.DataFrame(check(table, dtype=np.float64, ensure_min_samples=smallest))
        except OverflowError:
            raise UserError("the table has numbers beyond float64 (1.8e308)") from None
        except ValueError as error:
            if "could not convert string" not in str(error):
                raise
            raise UserError(f"{name}: holds texts; give a data frame, whose columns may hold them") from None
    frame = as_frame(table) if like is not None else without_counter(as_frame(table))
    if len(frame) < smallest:
        raise UserError(f"{name}: {len(frame)} sample(s); a minimum of {smallest} is required")
    return frame if like is None or named else by_place(frame, [column.name for column in like.columns], name)
