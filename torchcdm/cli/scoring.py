"""``cdm score``, ``cdm explore`` and ``cdm denoise``."""

import argparse
import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcdm.apps.anomaly import AnomalyDetector, AnomalyMap, normal_data
from torchcdm.apps.anomaly.detector import trained_on
from torchcdm.apps.anomaly.maps import save_maps
from torchcdm.apps.denoising import common_scale, denoise_all, nearest_level, require_additive_noise
from torchcdm.apps.explorer import Explorer, page, serve
from torchcdm.apps.plots import check_figure, score_histogram
from torchcdm.cli.arguments import given, say, tell
from torchcdm.data import Inputs, save_array, save_images, save_table
from torchcdm.data.outputs import check_no_more
from torchcdm.errors import UserError
from torchcdm.runtime.files import check_output_folder, write_rows, written
from torchcdm.runtime.processes import chosen_device, progress_bar, sharing
from torchcdm.runtime.validation import ProperShare, read_as
from torchcdm.scale import Scorer, score_on_ray
from torchcdm.training.checkpoint import load, read_info

EXAMPLES = 1000  # normal samples of the page, and those to choose from
AT_ONCE = 4096  # samples between two looks of the bar
SHOWN = 10  # rows that are printed, the most anomalous ones
KEPT = ("score", "percentile", "flag", "deviating")  # of every input


def score(options: argparse.Namespace) -> None:
    """Scores with percentiles among normal data, and flags at a false-positive rate."""
    fpr = read_as(ProperShare, 0.05 if options.fpr is None else options.fpr, "fpr")
    if options.plot is not None:
        check_figure(options.plot)
    ray, images = options.engine == "ray", len(read_info(options.model).transform.shape) == 3
    if options.workers is not None and not ray:
        raise UserError("--workers are those of --engine ray; torchrun starts several processes of the local engine")
    if options.maps is not None:
        if not images or ray:
            rows = "this model takes rows, not images; --csv names the columns that contribute most"
            raise UserError(f"--maps: {rows if not images else 'the local engine draws them, --engine ray does not'}")
        check_output_folder(options.maps, [*options.paths, *(options.reference or ())])
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        background = None if options.background is None else load(options.background, device)
        detector = AnomalyDetector(options.score, model, background)
        # Before the passes over the reference: a wrong path shall not take a minute to be found.
        inputs = None if ray else model.info.read_inputs(options.paths, options.skip_bad)
        if options.maps is not None:
            check_no_more(options.maps, len(inputs.x))
        normal = normal_data(model, options.reference, options.skip_bad, **given(limit=options.limit))
        held_out = not (normal.changed or trained_on(model, options.reference or ()))
        detector.fit(normal.x)
        if options.fpr is None:  # the smallest rate that a small reference calibrates
            fpr = max(fpr, 1 / (len(detector.calibration) + 1))
        explained = options.maps is not None or (not images and options.csv is not None)
        explain = AnomalyMap(model).fit(normal.x) if explained else None
        words = {"fpr": fpr, "skip_bad": options.skip_bad, "device": device}
        scorer = Scorer(model, detector, None if images else explain, **words)
        if inputs is not None:
            starts = progress_bar(range(0, len(inputs.x), AT_ONCE), "scoring", main and not options.quiet)
            parts = [scorer.judge(Inputs(*(part[k : k + AT_ONCE] for part in inputs[:3]))) for k in starts]
            judged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} | {"note": inputs.notes}
        if options.maps is not None:
            maps = explain(inputs.x)
    if not main:
        return
    if options.maps is not None:
        files = save_maps(maps, inputs.x, explain.limit, options.maps, model.info.transform)
        judged["where"] = [path.name for path in files]
    batches = score_on_ray(scorer, options.paths, options.workers, not options.quiet) if ray else [judged]
    found, names = _written(batches, options.csv)
    scores, percentiles, flags, deviating = (found[name].tolist() for name in KEPT)
    threshold = detector.threshold(fpr)
    if options.plot is not None:
        score_histogram(detector.calibration, torch.tensor(scores), threshold, options.score, options.plot)
    known = {"name": normal.name, "fitted": len(normal.x) // 2, "calibration": len(detector.calibration)}
    numbers = {"score": options.score, "fpr": fpr, "threshold": threshold, "reference": known}
    numbers |= {"held_out": held_out}
    numbers |= {"count": len(scores), "flagged": sum(flags), "deviating": sum(deviating)}
    numbers |= {"scores": scores, "percentiles": percentiles, "flags": flags}
    tell(options.json, _summary(numbers, names), numbers)


def _written(batches: Iterable[Mapping[str, Any]], path: Path | None) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Rows to a CSV file as they come; the columns ``KEPT`` of all, and the names of the most anomalous by row."""
    kept, names, said, row = list[dict[str, np.ndarray]](), dict[int, str](), set(), 0
    with written(Path(os.devnull) if path is None else path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "input", "score", "percentile", "flag", "where"))
        for batch in batches:
            notes = dict.fromkeys("\n".join(batch["note"]).splitlines())
            say(note for note in notes if note and note not in said)
            said |= set(notes)
            read = np.asarray(batch["input"], object) != ""
            batch = {name: np.asarray(batch[name])[read] for name in (*KEPT, "input", "where")}
            names |= {row + i: batch["input"][i] for i in _highest(batch["score"])}
            columns = (batch[name] for name in ("input", "score", "percentile", "flag", "where"))
            for name, score, percentile, flag, where in zip(*columns, strict=True):
                writer.writerow((row, name, f"{score:.6g}", f"{percentile:.3f}", int(flag), where))
                row += 1
            kept.append({name: batch[name] for name in KEPT})
    if not row:
        raise UserError("there is nothing to score: nothing could be read")
    return {name: np.concatenate([part[name] for part in kept]) for name in KEPT}, names


def _highest(scores: Sequence[float]) -> list[int]:
    """Rows of the most anomalous inputs, the first of equal ones first."""
    return np.argsort(-np.asarray(scores), kind="stable")[:SHOWN].tolist()


def _summary(numbers: dict[str, Any], names: Mapping[int, str]) -> str:
    """The most anomalous inputs, and what the flags mean."""
    scores, count, fpr, known = (numbers[name] for name in ("scores", "count", "fpr", "reference"))
    lines = [f"{'score':>12}{'percentile':>12}  input"]
    for i in _highest(scores):
        mark = "*" if numbers["flags"][i] else " "
        lines.append(f"{scores[i]:12.5g}{numbers['percentiles'][i]:12.2f}{mark} {names[i]}")
    if count > SHOWN:
        lines.append(f"{'...':>12}{'':14}and {count - SHOWN} less anomalous ones")
    usual = f"{fpr * count:.3g} or fewer on average, a rate of {fpr:.3g}"
    lines.append(f"flagged {numbers['flagged']} of {count} (*); among normal inputs it would be {usual}")
    samples = "held-out samples" if numbers["held_out"] else "samples"
    calibrated = f"calibrated on {known['calibration']} {samples}: {known['name']}"
    lines.append(f"score '{numbers['score']}', threshold {numbers['threshold']:.5g}, {calibrated}")
    if not numbers["held_out"]:
        what = "the model was trained on this reference, or may have been, so more will be flagged than that"
        lines.append(f"warning: {what}; give other normal data by --reference")
    if numbers["deviating"]:
        lines.append(f"{numbers['deviating']} of them whatever their score: they hold what training never had")
    if numbers["score"] == "log_prob":
        lines.append("raw log p misses inputs that are simpler than the normal ones; compare with --score levels")
    return "\n".join(lines)


def explore(options: argparse.Namespace) -> None:
    """Serves the page until it is stopped."""
    model = load(options.model, chosen_device(options.device))
    reference = normal_data(model, options.reference, limit=EXAMPLES).x
    test = () if options.reference else model.info.read_source(model).test
    examples = test.tensors(EXAMPLES)[0].float() if test else reference
    blocks = page(Explorer(model, reference, examples), options.model)
    print(f"{options.model}: {serve(blocks, options.port or 0)} (Ctrl+C stops it)", flush=True)
    blocks.block_thread()


def denoise(options: argparse.Namespace) -> None:
    """Clean files, and a table of the noise that was found."""
    check_output_folder(options.out, options.paths)
    model = load(options.model, chosen_device(options.device))
    info, out = model.info, options.out
    # Before the files are read: no file would do.
    require_additive_noise(model.transform)
    images = len(info.transform.shape) == 3
    if images:
        x, names, notes = info.read_pictures(options.paths, options.skip_bad)
        check_no_more(out, len(x))
    else:
        x, names, deviating, notes = info.read_inputs(options.paths, options.skip_bad, noisy=True)
        for name, columns in zip(names, deviating, strict=True):
            if columns:
                raise UserError(f"{name}: holds what training never had, in {columns}; leave it out")
    clean, noise = denoise_all(model, list(x), options.level, options.noise_std, not options.quiet)
    levels = nearest_level(model.schedule, noise)
    scale = common_scale(model.transform)
    noise = noise if scale is None else scale * noise
    if images:
        files = [save_images(part[None], out, info.transform, [f"{k:06d}"])[0].name for k, part in enumerate(clean)]
    else:
        files = [save_table(torch.stack(clean), out / "denoised.csv", info.transform).name] * len(clean)
    if len({part.shape for part in clean}) == 1:
        save_array(torch.stack(clean), out / "denoised.npy", info.transform)
    header = ["input", "file", "level", "noise_ratio" if scale is None else "noise_std"]
    values = (f"{value:.4g}" for value in noise.tolist())
    write_rows(out / "noise.csv", header, zip(names, files, levels.tolist(), values, strict=True))
    found = "{:.3g} of each column's" if scale is None else "of standard deviation {:.3g}"
    say(notes)
    print(f"{len(clean)} samples in {out}; noise {found.format(float(noise.median()))} (median)")
