"""``cdm nll``, ``cdm evaluate``, ``cdm ratio`` and ``cdm mi``."""

import argparse
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from torchcdm.apps.ratio import DensityRatio, effective_sample_size, importance_weights, mutual_information
from torchcdm.apps.ratio.checks import Clip
from torchcdm.cli.arguments import given, tell
from torchcdm.data import DataSource, Split, check_spec, parse_size, spec_of
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, methods_of, report
from torchcdm.likelihood.log_z import TRAINING, read_log_z, weights_of, write_log_z
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.files import check_output, write_rows
from torchcdm.runtime.processes import chosen_device, sharing
from torchcdm.runtime.validation import read_as
from torchcdm.training import evaluation
from torchcdm.training.checkpoint import load
from torchcdm.zoo import located


def nll(options: argparse.Namespace) -> None:
    """Likelihood of a split."""
    flow = given(steps=options.flow_steps, probes=options.flow_probes)
    scoring = Scoring(**given(level=options.level, draws=options.draws, seed=options.seed), **flow)
    with sharing(options.device) as (device, main):
        folder = located(options.model)
        weights = weights_of(folder)  # before they are read: another command may write the folder meanwhile
        model = load(options.model, device)
        # log Z takes longer than all others.
        methods = [method for method in methods_of(model) if method != "logz"]
        if options.methods is not None:
            methods = [method for method in map(str.strip, options.methods.split(",")) if method]
        measured = "logz" in methods
        own = None  # what the model was trained on, unless it is gone
        if measured and options.data is not None:
            with suppress(UserError):
                own = model.info.read_source(model)
        source, name, split = _to_measure(model, options, options.conditional, apart=measured and own is None)
        x, labels = split.tensors(options.limit)
        y = evaluation.labels_for(model, labels) if options.conditional else None
        if options.conditional and y is None:
            raise UserError("--conditional: the model or the data have no classes")
        train = (own or source).train  # what is usual for the model
        training = train.tensors(TRAINING)[0] if measured and train else None
        known = None if measured else read_log_z(folder, device)
        more = {"name": source.name, "split": name, "progress": main and not options.quiet}
        more |= given(sweeps=options.sweeps)
        result = report(model, x, y, scoring, methods, training=training, log_z=known, **more)
    if main:
        tell(options.json, result.table(), result.to_json())
        # A model of the zoo or the Hub is not ours to change.
        if measured and result.log_z is not None and not result.log_z.lacking and folder == Path(options.model):
            write_log_z(folder, result.log_z, weights)


def evaluate(options: argparse.Namespace) -> None:
    """Classifier and denoiser by level."""
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        source, name, split = _to_measure(model, options, labelled=True)
        how = given(draws=options.draws) | {"progress": main and not options.quiet}
        values = evaluation.evaluate(model, split, options.limit, **how)
    if main:
        text = "\n".join(f"{name:10} {value:.4f}" for name, value in values["mean"].items())
        tell(options.json, text, {"data": {"name": source.name, "split": name}} | values)


def _to_measure(
    model: Denoiser, options: argparse.Namespace, labelled: bool, apart: bool = False
) -> tuple[DataSource, str, Split]:
    """The data, and the split to measure with its name: of other data than the model's that have no splits, all.

    ``apart``: some are needed that are not measured. So such data are split as those of the training.
    """
    info, given, how = model.info, options.data, {"labelled": labelled, "skip_bad": options.skip_bad}
    if options.split is None and not apart and given not in (None, info.data.spec):
        source = info.read_source(model, given, whole=True, **how)
        name = next(name for name in ("test", "validation", "train") if source.splits[name])
        if name != "train" or not info.is_training_data(model, given):
            return source, "all" if name == "train" else name, source.splits[name]
    source, name = info.read_source(model, given, **how), options.split or "test"
    return source, name, source.split(name)


def ratio(options: argparse.Namespace) -> None:
    """Fits, scores, and says how far to trust it."""
    read_as(Clip | None, options.clip, "--clip")
    check_spec(spec_of(options.query))
    if options.save is not None:
        check_output(options.save / "config.json", kind="estimator")
    size = None if options.size is None else parse_size(options.size)
    data = {"size": size, "channels": options.channels, "skip_bad": options.skip_bad}
    how = given(steps=options.steps) | {"device": str(chosen_device(options.device)), "progress": not options.quiet}
    ratio = DensityRatio(options.seed, options.discrete, data=data, **how)
    ratio.fit(options.numerator, options.denominator, options.query)
    if options.save is not None:
        ratio.save(options.save)
    scores = ratio.scores(options.query)
    if options.balance:
        weights = ratio.importance_weights(options.query, options.clip, options.numerator)
    else:
        weights = importance_weights(scores.log_ratio, options.clip)
    if options.csv is not None:
        rows = zip(scores.names, scores.log_ratio, weights, scores.outside, strict=True)
        cells = ((k, name, f"{log:.6g}", f"{weight:.6g}", int(out)) for k, (name, log, weight, out) in enumerate(rows))
        write_rows(options.csv, ("row", "input", "log_ratio", "weight", "outside"), cells)
    low, median, high = np.quantile(scores.log_ratio, [0, 0.5, 1]).tolist()
    count, outside, effective = len(scores.names), int(scores.outside.sum()), effective_sample_size(weights)
    counts = {"numerator": ratio.counts[1], "denominator": ratio.counts[0]}
    log_ratio = {"mean": float(scores.log_ratio.mean()), "min": low, "median": median, "max": high}
    query = {"count": count, "outside": outside, "log_ratio": log_ratio, "effective_sample_size": effective}
    values = {"blend": ratio.blend, "counts": counts, "query": query}
    values |= {"held_out": asdict(ratio.held_out), "notes": list(ratio.notes)}
    lines = [*ratio.notes, "", "on held-out samples:", ratio.held_out.table(), "", f"query: {count} samples"]
    lines.append(f"log p/q from {low:.3g} to {high:.3g} nats, median {median:.3g}")
    lines.append(f"weights: effective sample size {effective:.0f} ({100 * effective / count:.0f} %)")
    if outside:
        lines.append(f"{outside} samples lie outside both data sets: their ratio is extrapolation")
    if options.test:
        test = ratio.two_sample_test(random_state=options.seed)
        shown = ("p_value", "statistic", "seen_in", "numerator_rows", "denominator_rows", "columns")
        values["test"] = {name: getattr(test, name) for name in shown}
        lines += ["", test.text()]
    tell(options.json, "\n".join(lines), values)


def mi(options: argparse.Namespace) -> None:
    """Says what the rows of one table tell of those of the other, and how far to trust it."""
    how = given(steps=options.steps) | {"device": options.device, "progress": not options.quiet}
    found = mutual_information(options.x, options.y, options.seed, **how)
    tell(options.json, found.text("mutual information"), asdict(found))
