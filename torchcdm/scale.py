"""Anomaly scores of data sets that no memory holds: a callable for Ray Data's ``map_batches``, and many workers.

A worker has the model, the fitted score and its threshold, and nothing else. Files are read where they are scored, by
the reader of ``cdm score``: the numbers are those of one process. Ray does again what a worker that died left undone.
"""

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

from torchcdm.apps.anomaly import AnomalyDetector, AnomalyMap, normal_data
from torchcdm.apps.anomaly.maps import top_columns
from torchcdm.data import Inputs
from torchcdm.data.inputs import WHOLE, check_range, on_range, parts_of, read_array, read_table
from torchcdm.errors import UserError, needed, reason
from torchcdm.models.density import DensityModel, require_density
from torchcdm.runtime.processes import chosen_device, progress_bar
from torchcdm.runtime.validation import ProperShare, read_as
from torchcdm.training.checkpoint import load

# Columns of a batch of files, and of arrays, as ``ray.data.read_images`` and ``read_numpy`` call them.
PATH, PART, ARRAYS = "path", "part", ("image", "data", "x")
RESULTS = frozenset(("score", "percentile", "flag", "deviating", "where"))  # columns that scores add to a batch

Columns = dict[str, np.ndarray]


class Scorer:
    """Anomaly scores of batches, for Ray Data's ``map_batches`` or by itself.

    A batch is a dict of arrays of one length. It holds the columns of the model's table; or ``image`` (N, H, W[, C]),
    whole numbers whose full range stands for the model's grey levels; or ``data`` or ``x`` (N, *shape), data units; or
    ``path``, files as ``cdm score`` takes them, with ``part`` as of :func:`torchcdm.data.inputs.parts_of`. UserError
    for no such model, or as :meth:`AnomalyDetector.fit` and :meth:`AnomalyDetector.threshold`.

    Args:
        model: A run folder, ``zoo:NAME``, ``hub:OWNER/NAME``, or a model that was loaded.
        detector: A fitted detector of this model; when None one of the ``score`` is fitted to ``reference``.
        explain: A map that names the columns of flagged rows that contribute most; fitted where the detector is.
        score: Of :data:`torchcdm.apps.anomaly.SCORES`.
        reference: Files of normal data that the model was not trained on; None: the validation split of its own data.
        fpr: Share of normal inputs to flag.
        skip_bad: Leaves out files and rows that cannot be read.
        device: Device of the network; the best there is when None.

    Example:
        >>> scores = rows.map_batches(Scorer, fn_constructor_kwargs={"model": "runs/sensors"}, concurrency=8)
    """

    def __init__(
        self, model: str | Path | DensityModel, detector: AnomalyDetector | None = None,
        explain: AnomalyMap | None = None, *, score: str = "levels", reference: Sequence[str | Path] | None = None,
        fpr: float = 0.05, skip_bad: bool = False, device: str | torch.device | None = None,
    ) -> None:  # fmt: skip
        read_as(ProperShare, fpr, "fpr")
        place = chosen_device(device)
        loaded = load(model, place) if isinstance(model, (str, Path)) else model
        self.model = require_density(loaded, "an anomaly score").to(place)
        if self.model.info is None:
            raise UserError("the model knows nothing of its data; give one that torchcdm.load read")
        self.info, self.fpr, self.skip_bad = self.model.info, fpr, skip_bad
        if detector is None:
            normal = normal_data(self.model, reference, skip_bad).x
            detector = AnomalyDetector(score, self.model).fit(normal)
            if explain is None and len(self.info.transform.shape) == 1:
                explain = AnomalyMap(self.model).fit(normal)
        for part in detector.models:
            part.to(place)
        self.detector, self.explain = detector, explain
        detector.threshold(fpr)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Columns:
        """Scores of a batch; UserError for one that does not fit the model, or a file that cannot be read.

        Gives ``score`` (infinite of a new text), ``percentile`` among normal data, ``flag``, ``deviating`` (holds what
        training never had) and ``where`` beside the columns of the batch; of files, which may hold many rows, beside
        ``input`` and ``note``: the first row says what was left out, an empty one, its ``input`` "", where all was.
        """
        table = self.info.columns is not None and set(self.info.columns) <= set(batch)
        if taken := RESULTS & set(batch):
            raise UserError(f"the batch has a column '{min(taken)}', which the result would replace; rename it")
        if PATH in batch and not table:
            parts = batch.get(PART, [WHOLE] * len(batch[PATH]))
            found = self.info.read_inputs([str(p) for p in batch[PATH]], self.skip_bad, parts=[int(p) for p in parts])
            scored = self.judge(found)
            if not found.names:  # a row that stands for what was left out: Ray would drop an empty batch, and its note
                blank = {"input": "", "score": np.nan, "percentile": np.nan, "flag": False, "deviating": False}
                scored = {name: np.array([value]) for name, value in {**blank, "where": ""}.items()}
            return scored | {"note": np.array([" ".join(found.notes), *[""] * (len(scored["input"]) - 1)], object)}
        found, kept = self._read(batch, table)
        scored = self.judge(found)
        del scored["input"]
        return {name: np.asarray(values)[kept] for name, values in batch.items()} | scored

    def judge(self, found: Inputs) -> Columns:
        """What is said of inputs, as of :meth:`__call__`, beside ``input``, their names."""
        scores = self.detector.score(found.x) if found.names else torch.empty(0).double()
        deviating = torch.tensor([bool(columns) for columns in found.deviating], dtype=torch.bool)
        # What the model sees of a text or a missing number that training never had stands for something else.
        names = [f", {name}, " for name in self.info.columns or ()]  # which may hold commas themselves
        unknown = [any(name in f", {odd}, " for name in names) for odd in found.deviating]
        scores[torch.tensor(unknown, dtype=torch.bool)] = torch.inf
        flags = self.detector.flags(scores, self.fpr) | deviating
        where = np.full(len(flags), "", object)
        if self.explain is not None and flags.any():
            where[flags.numpy()] = top_columns(self.explain(found.x[flags]), self.info.columns)
        for k in deviating.nonzero()[:, 0].tolist():
            where[k] = f"{found.deviating[k]} (unlike any in training)"
        numbers = {"score": scores, "percentile": self.detector.percentile(scores), "flag": flags}
        numbers = {name: part.numpy() for name, part in (numbers | {"deviating": deviating}).items()}
        return {"input": np.array(found.names, object), **numbers, "where": where}

    def _read(self, batch: Mapping[str, np.ndarray], table: bool) -> tuple[Inputs, np.ndarray]:
        """Samples of arrays, or of the columns of a ``table``, and which rows they are."""
        import pandas as pd

        transform, options = self.info.transform, replace(self.info.data, skip_bad=self.skip_bad)
        name = None if table else next((name for name in ARRAYS if name in batch), None)
        if name is None:
            if len(transform.shape) > 1:
                takes = f"{', '.join(ARRAYS)} or {PATH}"
                raise UserError(f"the batch has the columns {', '.join(batch)}; the model takes {takes}")
            frame = pd.DataFrame({key: list(value) for key, value in batch.items()})
            found = read_table(frame, "the batch", transform, options)
            return found, np.array([int(row.rpartition(" ")[2]) for row in found.names], int)
        values = np.asarray(batch[name])
        values = np.stack(list(values)) if values.dtype == object else values
        found = read_array(values, Path(name), transform.shape, options)
        if name == ARRAYS[0] and values.dtype.kind == "u":
            x = on_range(found.x, int(np.iinfo(values.dtype).max), transform, Path(name))
            found = found._replace(x=transform.quantize(x))
        check_range(found.x, found.names, transform)
        return found, np.arange(len(values))


def score_on_ray(
    scorer: Scorer, paths: Sequence[str | Path], workers: int | None = None, progress: bool = False
) -> Iterator[Columns]:
    """Scores of files by workers of Ray, in the order of one process, as they come: as of :meth:`Scorer.__call__`.

    Workers join the cluster that ``RAY_ADDRESS`` names, which must see the files under the same paths; without it Ray
    is started on this machine, and stopped at the end. UserError where it does not start, or for what one refused.

    Args:
        scorer: What every worker gets a copy of.
        paths: Files and folders. A worker takes 64 images, a row group of a Parquet file, or another file at a time.
        workers: How many; one for each GPU, or where there are none for each processor core, when None.
        progress: Shows a bar, with the time that is left.
    """
    parts, notes = parts_of(paths, scorer.info.transform, replace(scorer.info.data, skip_bad=scorer.skip_bad))
    if not parts:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}")
    # Images that a worker takes at a time; tables come in parts that are large.
    size = 64 if all(part == 0 and not path.lower().endswith(".parquet") for path, part in parts) else 1
    gpu = scorer.model.schedule.alpha.device.type == "cuda"
    scorer = deepcopy(scorer)
    for model in scorer.detector.models:
        model.cpu()
    arguments = {name: getattr(scorer, name) for name in ("model", "detector", "explain", "fpr", "skip_bad")}
    arguments |= {"model": scorer.model.cpu(), "device": "cuda" if gpu else "cpu"}
    with _cluster(workers) as (ray, cores):
        there = int(ray.cluster_resources().get("GPU", 1)) if gpu else cores
        count = min(workers or there, there, -(-len(parts) // size))
        rows = [{PATH: path, PART: part} for path, part in parts]
        blocks = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size))
        pool = {"compute": ray.data.ActorPoolStrategy(size=count), "num_cpus": 1, "num_gpus": int(gpu)}
        scored = blocks.map_batches(type(scorer), fn_constructor_kwargs=arguments, batch_size=size, **pool)
        unit = "image" if size > 1 else "part"
        try:
            with progress_bar(None, f"{count} workers", progress, leave=True, total=len(rows), unit=unit) as bar:
                for batch in scored.iter_batches(batch_size=None, prefetch_batches=0):
                    first, *rest = batch["note"]
                    yield batch | {"note": np.array([" ".join([*notes, first]).strip(), *rest], object)}
                    notes = []
                    bar.update(min(size, len(rows) - bar.n))
        except Exception as error:
            # By its text: Ray wraps what workers raise, in another way in each of its versions.
            refused = re.findall(r"torchcdm\.errors\.UserError: (.+)", str(error))
            raise (UserError(refused[-1]) if refused else error) from None


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
        # A core more in its books, for its own tasks.
        here = {"address": "local", "include_dashboard": False, "num_cpus": (workers or os.cpu_count() or 1) + 1}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **{} if os.environ.get("RAY_ADDRESS") else here)
        except Exception as error:  # its processes have half a minute to start, too little where all is busy
            mend = "start it by `ray start --head`, and set RAY_ADDRESS=auto"
            raise UserError(f"Ray did not start ({reason(error)}); {mend}") from None
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_options.preserve_order
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    try:
        yield ray, max(1, int(ray.cluster_resources().get("CPU", 2)) - 1)
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order = before
        if started:
            ray.shutdown()
