"""Anomaly scores of data sets that no memory holds: a callable for Ray Data's ``map_batches``, and many workers.

A worker has the model, the fitted score and its threshold, and nothing else. Files are read where they are scored, by
the reader of ``cdm score``: the numbers are those of one process. Ray starts a worker that died anew, and does again
what it had not finished.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torchcdm.apps.anomaly import AnomalyDetector, AnomalyMap, make_score
from torchcdm.apps.anomaly.detector import check_fpr
from torchcdm.apps.anomaly.maps import top_columns
from torchcdm.data import Inputs, MemorySplit
from torchcdm.data.inputs import WHOLE, check_range, on_grid, parts_of, read_array, read_table
from torchcdm.errors import UserError, needed
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import check_count
from torchcdm.runtime.devices import chosen_device
from torchcdm.training.checkpoint import ModelInfo, load
from torchcdm.units import TableEncoding

PATH, PART = "path", "part"
"""Columns of a batch of files."""

ARRAYS = ("image", "data", "x")
"""Columns of a batch of arrays, as ``ray.data.read_images`` and ``read_numpy`` call them."""

REFERENCE_LIMIT = 5000
"""Normal samples that are used at most."""

STARTS = 3
"""Attempts to start Ray."""

FILES = 64
"""Images that a worker takes at a time."""

Batch = dict[str, np.ndarray]


class Scorer:
    """Anomaly scores of batches, for Ray Data's ``map_batches`` or by itself.

    A batch is a dict of arrays of one length. It holds the columns of the model's table; or ``image`` (N, H, W[, C]),
    whole numbers whose full range stands for the model's grey levels; or ``data`` or ``x`` (N, *shape), data units; or
    ``path``, files as ``cdm score`` takes them, with ``part`` as of :func:`torchcdm.data.inputs.parts_of`.

    Args:
        model: A run folder, ``zoo:NAME``, ``hub:OWNER/NAME``, or a model that was loaded.
        detector: A fitted detector of this model, or the folder of a saved one; fitted to ``reference`` when None.
        explain: A fitted map: of flagged rows the columns that contribute most are named. Fitted, for rows, where the
            detector is.
        score: Name of the score that is fitted, of :data:`torchcdm.apps.anomaly.SCORES`.
        reference: Files of normal data that the model was not trained on; the validation split of its own data when
            None.
        fpr: Share of normal inputs to flag.
        skip_bad: Leaves out files and rows that cannot be read.
        device: Of the network; the best there is when None.

    Raises:
        UserError: No such model, or as :meth:`AnomalyDetector.fit` and :meth:`AnomalyDetector.threshold`.

    Example:
        >>> rows = ray.data.read_parquet("sensors/")
        >>> scores = rows.map_batches(Scorer, fn_constructor_kwargs={"model": "runs/sensors"}, concurrency=8)
        >>> scores.write_parquet("scores/")
    """

    def __init__(
        self,
        model: str | Path | DensityModel,
        detector: AnomalyDetector | str | Path | None = None,
        explain: AnomalyMap | None = None,
        *,
        score: str = "levels",
        reference: Sequence[str | Path] | None = None,
        fpr: float = 0.05,
        skip_bad: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        check_fpr(fpr)
        place = chosen_device(device)
        loaded = load(model, place) if isinstance(model, (str, Path)) else model.to(place)
        self.model = require_density(loaded, "an anomaly score")
        if self.model.info is None:
            raise UserError("the model knows nothing of its data; give one that torchcdm.load read")
        self.info, self.fpr, self.skip_bad = self.model.info, fpr, skip_bad
        if detector is None:
            normal, _ = normal_data(self.model, reference, skip_bad)
            detector = AnomalyDetector.fit(make_score(score, self.model), normal)
            rows = len(self.info.transform.shape) == 1
            explain = AnomalyMap.fit(self.model, normal) if rows and explain is None else explain
        elif isinstance(detector, (str, Path)):
            detector = AnomalyDetector.load(detector, self.model)
        for part in detector.score.models:
            part.to(place)
        self.detector, self.explain = detector, explain
        detector.threshold(fpr)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Scores of a batch.

        Returns:
            ``score``, ``percentile`` among normal data, ``flag``, ``deviating`` (holds what training never had) and
            ``where`` beside the columns of the batch; of files, which may hold many rows, beside ``input`` and
            ``note``: what was left out is said in the first row, which is an empty one, its ``input`` "", where all
            was.

        Raises:
            UserError: A batch that does not fit the model, or a file that cannot be read.
        """
        columns = self.info.columns or ()
        if PATH in batch and PATH not in columns:
            parts = batch.get(PART, [WHOLE] * len(batch[PATH]))
            found = self.info.read_inputs([str(p) for p in batch[PATH]], self.skip_bad, parts=[int(p) for p in parts])
            scored = self.judge(found)
            if not found.names:
                text, number, truth = np.array([""], object), np.full(1, np.nan), np.zeros(1, bool)
                scored = {"input": text, "score": number, "percentile": number, "flag": truth, "deviating": truth,
                          "where": text}  # fmt: skip
            note = [" ".join(found.notes), *[""] * (len(scored["input"]) - 1)]
            return scored | {"note": np.array(note, object)}
        found, kept = self._read(batch)
        scored = self.judge(found)
        del scored["input"]
        return {name: np.asarray(values)[kept] for name, values in batch.items()} | scored

    def judge(self, found: Inputs) -> Batch:
        """What is said of inputs, as of :meth:`__call__`, beside ``input``, their names."""
        names, odd = np.array(found.names, object), found.deviating
        if not len(names):
            number, truth = np.empty(0), np.empty(0, bool)
            return {"input": names, "score": number, "percentile": number, "flag": truth, "deviating": truth,
                    "where": names}  # fmt: skip
        scores, deviating = self.detector.score(found.x), torch.tensor(list(map(bool, odd)))
        flags = self.detector.flags(scores, self.fpr) | deviating
        where = [""] * len(names)
        if self.explain is not None and flags.any():
            top = iter(top_columns(self.explain(found.x[flags]), self.info.columns))
            where = [next(top) if flag else "" for flag in flags]
        where = [f"{k} (unlike any in training)" if k else text for k, text in zip(odd, where, strict=True)]
        percentiles = self.detector.percentile(scores)
        values = {"score": scores, "percentile": percentiles, "flag": flags, "deviating": deviating}
        arrays = {name: value.numpy() for name, value in values.items()}
        return {"input": names, **arrays, "where": np.array(where, object)}

    def _read(self, batch: Mapping[str, np.ndarray]) -> tuple[Inputs, np.ndarray]:
        """Samples of arrays or of columns, and which rows they are."""
        import pandas as pd

        transform, options = self.info.transform, replace(self.info.data, skip_bad=self.skip_bad)
        name = next((name for name in ARRAYS if name in batch and name not in (self.info.columns or ())), None)
        if name is None:
            frame = pd.DataFrame({key: list(value) for key, value in batch.items()})
            table = transform.table or TableEncoding.numbers(frame.columns)
            if transform.shape != (len(table.kept),):
                needed = f"{', '.join(ARRAYS)} or {PATH}"
                raise UserError(f"the batch has the columns {', '.join(batch)}; the model takes {needed}")
            found = read_table(frame, "the batch", table, options)
            found = found._replace(x=found.x.float())
            return found, np.array([int(row.rpartition(" ")[2]) for row in found.names], int)
        values = np.asarray(batch[name])
        values = np.stack(list(values)) if values.dtype == object else values
        found = read_array(values, Path(name), transform.shape, options)
        if name == ARRAYS[0] and values.dtype.kind == "u":
            high = int(np.iinfo(values.dtype).max)
            found = found._replace(x=on_grid(found.x, high, transform, Path(name)))
        check_range(found, transform)
        return found, np.arange(len(values))


def normal_data(
    model: DensityModel,
    paths: Sequence[str | Path] | None = None,
    skip_bad: bool = False,
    limit: int = REFERENCE_LIMIT,
) -> tuple[Tensor, str]:
    """Normal data that did not train the model, data units (N, *shape), and what they are called.

    Args:
        model: A model that knows its data.
        paths: Files; the validation split of the model's own data when None.
        skip_bad: Leaves out what cannot be read.
        limit: Samples at most, evenly spaced.

    Raises:
        UserError: Files that do not fit the model; no validation split.
    """
    info: ModelInfo = model.info
    if paths is not None:
        x = info.read_inputs(paths, skip_bad).x
        return MemorySplit(x).tensors(limit)[0], ", ".join(map(str, paths))
    try:
        source = info.read_source(model)
        split = source.split("validation")
    except UserError as error:
        raise UserError(f"{error}; or give normal data by --reference PATH") from None
    return split.tensors(limit)[0].float(), f"validation split of {source.name}"


def score_on_ray(
    scorer: Scorer, paths: Sequence[str | Path], workers: int | None = None, progress: bool = False,
    kind: type[Scorer] = Scorer,
) -> Iterator[Batch]:  # fmt: skip
    """Scores of files by workers of Ray, in the order of one process, as they come.

    Workers join the cluster that ``RAY_ADDRESS`` names, which must see the files under the same paths; without it Ray
    is started on this machine, and stopped at the end.

    Args:
        scorer: What every worker gets a copy of.
        paths: Files and folders. A worker takes 64 images, a row group of a Parquet file, or another file at a time.
        workers: How many; one for each GPU, or where there are none for each processor core, when None.
        progress: Shows a bar, with the time that is left.
        kind: Class of the workers.

    Yields:
        Batches as of :meth:`Scorer.__call__`.

    Raises:
        UserError: Ray is not installed, or what a worker refused.
    """
    if workers is not None:
        check_count("workers", workers, 1, 10**4)
    options = replace(scorer.info.data, skip_bad=scorer.skip_bad)
    parts, notes = parts_of(paths, scorer.info.transform, options)
    if not parts:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}")
    size = FILES if all(part == 0 and not path.lower().endswith(".parquet") for path, part in parts) else 1
    gpu = scorer.model.schedule.alpha.device.type == "cuda"
    scorer = deepcopy(scorer)
    for model in scorer.detector.score.models:
        model.cpu()
    arguments = {"model": scorer.model.cpu(), "detector": scorer.detector, "explain": scorer.explain,
                 "fpr": scorer.fpr, "skip_bad": scorer.skip_bad, "device": "cuda" if gpu else "cpu"}  # fmt: skip
    with _cluster(workers) as (ray, cores):
        there = int(ray.cluster_resources().get("GPU", 1)) if gpu else cores
        count = min(workers or there, there, -(-len(parts) // size))
        rows = [{PATH: path, PART: part} for path, part in parts]
        scored = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
            kind, fn_constructor_kwargs=arguments, batch_size=size, num_cpus=1, num_gpus=int(gpu),
            compute=ray.data.ActorPoolStrategy(size=count),
        )  # fmt: skip
        done = tqdm(total=len(rows), desc=f"{count} workers", unit="image" if size > 1 else "part",
                    disable=not progress)  # fmt: skip
        with done:
            for batch in _unwrapped(scored.iter_batches(batch_size=None, prefetch_batches=0)):
                batch["note"][0] = " ".join([*notes, batch["note"][0]]).strip()
                notes = []
                yield batch
                done.update(min(size, len(rows) - done.n))


def _unwrapped(batches: Any) -> Iterator[Batch]:
    """What a worker refused, as if it had been refused here."""
    try:
        for batch in batches:
            yield {name: np.array(values) for name, values in batch.items()}
    except Exception as error:
        # By its text: Ray wraps what workers raise, in another way in each of its versions.
        refused = re.findall(r"torchcdm\.errors\.UserError: (.+)", str(error))
        if refused:
            raise UserError(refused[-1]) from None
        raise


def start_here(workers: int) -> None:
    """Starts Ray on this machine for so many workers, with a core more in its books: for its own tasks.

    Raises:
        UserError: It does not start.
    """
    import ray

    for attempt in range(STARTS):
        try:
            ray.init("local", include_dashboard=False, num_cpus=workers + 1, log_to_driver=False,
                     logging_level=logging.ERROR)  # fmt: skip
            return
        except Exception as error:  # the processes of Ray have half a minute to start, too little where all is busy
            ray.shutdown()
            if attempt == STARTS - 1:
                mend = "start it by `ray start --head`, and set RAY_ADDRESS=auto"
                raise UserError(f"Ray did not start on this machine ({str(error)[:200]}); {mend}") from None


@contextmanager
def _cluster(workers: int | None) -> Iterator[tuple[Any, int]]:
    """Ray, joined or started on this machine, what it prints kept to errors; and the cores that workers may take."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = needed("ray", "scale", "--engine ray")
    needed("ray.data", "scale", "--engine ray")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    started = not ray.is_initialized()
    if started:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            start_here(workers or os.cpu_count() or 1)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_options.preserve_order
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    try:
        yield ray, max(1, int(ray.cluster_resources().get("CPU", 2)) - 1)
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order = before
        if started:
            ray.shutdown()
