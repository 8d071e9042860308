"""``cdm score``, ``cdm explore`` and ``cdm denoise``."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command, check_writable, count, tell
from torchcdm.errors import UserError
from torchcdm.runtime.files import check_output_folder, write_rows, written

SCORES = ("levels", "coarse", "complexity", "typicality", "log_prob", "ratio")
"""Those of :data:`torchcdm.apps.anomaly.SCORES`, which takes torch to import: help is to come at once."""

ENGINES = ("local", "ray")

EXAMPLES = 1000
"""Normal samples of the page, and those to choose from."""

BATCH = 256
SHOWN = 10
"""Rows that are printed: the most anomalous ones."""


def add_commands(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(
        commands, run_score, "score", "how anomalous images, arrays or rows of tables are",
        "cdm score runs/sensors new.csv --fpr 0.01 --reference good.csv --csv scores.csv",
        "model paths skip-bad quiet json device",
    )  # fmt: skip
    parser.add_argument("--score", default=SCORES[0], metavar="NAME", help=f"of {', '.join(SCORES)} ({SCORES[0]})")
    parser.add_argument("--background", metavar="RUN", help="model of broader data, for the score 'ratio'")
    parser.add_argument("--fpr", type=float, default=0.05, metavar="P", help="share of normal inputs to flag (0.05)")
    parser.add_argument(
        "--reference", metavar="PATH", nargs="+",
        help="normal data that RUN was not trained on; its validation split by default",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=count, default=5000, metavar="N", help="at most N reference samples, evenly spaced (5000)"
    )  # fmt: skip
    parser.add_argument("--csv", metavar="FILE", type=Path, help="score, percentile and flag of every "
                        "input; where it is odd: the columns of flagged rows, the file of a map")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="histogram of the scores, a PNG")
    parser.add_argument(
        "--maps", metavar="DIR", type=Path, help="a PNG for each image: beside it, where it is not what is normal"
    )
    parser.add_argument("--engine", default=ENGINES[0], choices=ENGINES, help="this process, or workers on Ray for "
                        "what no memory holds: Parquet by its row groups, folders of images (local)")  # fmt: skip
    parser.add_argument("--workers", type=count, metavar="N", help="workers on Ray; one for each GPU or core")

    parser = add_command(
        commands, run_explore, "explore", "a page in the browser on a model", "cdm explore zoo:digits", "model device"
    )
    parser.add_argument("--port", type=int, default=0, metavar="P", help="the first free one from 7860 on by default")
    parser.add_argument(
        "--reference", metavar="PATH", nargs="+",
        help="normal data to compare with and to choose from; the splits of MODEL's own data by default",
    )  # fmt: skip

    parser = add_command(
        commands, run_denoise, "denoise", "remove white noise from images, arrays or tables",
        "cdm denoise runs/pixels noisy.npy --noise-std 4 --out clean", "model paths skip-bad device",
    )  # fmt: skip
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--level", type=int, metavar="T", help="noise of this level")
    strength.add_argument("--noise-std", type=float, metavar="S", help="noise of this deviation, data units; for data "
                          "whose values share a scale, as images do")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="for the clean data, and noise.csv: "
                        "level and noise_std of each input; for tables noise_ratio, the noise of every column over "
                        "the column's own deviation in training")  # fmt: skip


def run_score(options: argparse.Namespace) -> int:
    """Scores with percentiles among normal data, and flags at a false-positive rate."""
    import torch

    from torchcdm.apps.anomaly import AnomalyDetector, AnomalyMap, AnomalyScore, normal_data
    from torchcdm.apps.anomaly.detector import check_fpr
    from torchcdm.apps.anomaly.maps import save_maps
    from torchcdm.apps.plots import check_figure, score_histogram
    from torchcdm.runtime.processes import sharing
    from torchcdm.scale import Scorer, score_on_ray
    from torchcdm.training.checkpoint import load, read_info

    check_fpr(options.fpr)
    if options.plot is not None:
        check_figure(options.plot)
    for path in (options.csv, options.plot, options.json):
        check_writable(path, [*options.paths, *(options.reference or ())])
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
        score = AnomalyScore(options.score, model, background)
        # Before the passes over the reference: a wrong path shall not take a minute to be found.
        given = None if ray else model.info.read_inputs(options.paths, options.skip_bad)
        reference, origin = normal_data(model, options.reference, options.skip_bad, options.limit)
        detector = AnomalyDetector.fit(score, reference)
        explained = options.maps is not None or (not images and options.csv is not None)
        fitted = AnomalyMap(model).fit(reference) if explained else None
        words = {"fpr": options.fpr, "skip_bad": options.skip_bad, "device": device}
        scorer = Scorer(model, detector, None if images else fitted, **words)
        if given is not None:
            judged = scorer.judge(given)
            if options.maps is not None:
                maps = fitted(given.x)
    if not main:
        return 0
    if options.maps is not None:
        files = save_maps(maps, given.x, fitted.limit, options.maps, model.info.transform)
        judged["where"] = [path.name for path in files]
    if given is not None:
        batches = [judged | {"note": ["\n".join(given.notes)]}]
    else:
        batches = score_on_ray(scorer, options.paths, options.workers, not options.quiet)
    threshold = detector.threshold(options.fpr)
    found, names = _written(batches, options.csv)
    scores, percentiles, flags = (found[name].tolist() for name in ("score", "percentile", "flag"))
    if options.plot is not None:
        score_histogram(detector.calibration, torch.tensor(scores), threshold, options.score, options.plot)
    numbers = {
        "score": options.score,
        "fpr": options.fpr,
        "threshold": threshold,
        "reference": {"name": origin, "fitted": len(reference) // 2, "calibration": len(detector.calibration)},
        "count": len(scores),
        "flagged": sum(flags),
        "deviating": int(found["deviating"].sum()),
        "scores": scores,
        "percentiles": percentiles,
        "flags": flags,
    }
    tell(options.json, _summary(numbers, names), numbers)
    return 0


def run_explore(options: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    from torchcdm.apps.anomaly import normal_data
    from torchcdm.apps.explorer import Explorer, page, serve
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.training.checkpoint import load

    model = load(options.model, chosen_device(options.device))
    info = model.info
    reference, _ = normal_data(model, options.reference, limit=EXAMPLES)
    examples = reference if options.reference else info.read_source(model).test.tensors(EXAMPLES)[0].float()
    blocks = page(Explorer(model, info, reference, examples), options.model)
    serve(blocks, options.port, lambda address: print(f"{options.model}: {address} (Ctrl+C stops it)", flush=True))
    return 0


def _written(batches: Iterable[Mapping[str, Any]], path: Path | None) -> tuple[dict[str, Any], dict[int, str]]:
    """Rows to a CSV file as they come; numbers of all inputs, and the names of the most anomalous ones by row."""
    import numpy as np

    kept: dict[str, list[Any]] = {name: [] for name in ("score", "percentile", "flag", "deviating")}
    top: list[tuple[float, int, str]] = []
    row, said = 0, set()
    with nullcontext(io.StringIO()) if path is None else written(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "input", "score", "percentile", "flag", "where"))
        for batch in batches:
            for note in filter(None, "\n".join(batch["note"]).splitlines()):
                print(*{note} - said, end="\n" * (note not in said), file=sys.stderr)
                said.add(note)
            read = np.asarray(batch["input"], object) != ""
            batch = {name: np.asarray(batch[name])[read] for name in (*kept, "input", "where")}
            for name, values in kept.items():
                values.append(batch[name])
            columns = (batch[name] for name in ("input", "score", "percentile", "flag", "where"))
            for name, score, percentile, flag, where in zip(*columns, strict=True):
                if path is not None:
                    writer.writerow((row, name, f"{score:.6g}", f"{percentile:.3f}", int(flag), where))
                top.append((-float(score), row, name))
                row += 1
            top = sorted(top)[:SHOWN]
    if not row:
        raise UserError("there is nothing to score: nothing could be read")
    found = {name: np.concatenate(values) for name, values in kept.items()}
    return found, {place: name for _, place, name in top}


def _summary(numbers: dict[str, Any], names: dict[int, str]) -> str:
    """The most anomalous inputs, and what the flags mean."""
    scores, count = numbers["scores"], numbers["count"]
    lines = [f"{'score':>12}{'percentile':>12}  input"]
    for i, name in names.items():
        mark = "*" if numbers["flags"][i] else " "
        lines.append(f"{scores[i]:12.5g}{numbers['percentiles'][i]:12.2f}{mark} {name}")
    if count > SHOWN:
        lines.append(f"{'...':>12}{'':14}and {count - SHOWN} less anomalous ones")
    lines.append(
        f"flagged {numbers['flagged']} of {count} (*); among normal inputs it would be "
        f"{numbers['fpr'] * count:.3g} or fewer on average"
    )
    lines.append(
        f"score '{numbers['score']}', threshold {numbers['threshold']:.5g}, calibrated on "
        f"{numbers['reference']['calibration']} held-out samples: {numbers['reference']['name']}"
    )
    if numbers["deviating"]:
        what = "of them whatever their score: they hold what training never had"
        lines.append(f"{numbers['deviating']} {what}")
    if numbers["score"] == "log_prob":
        lines.append("raw log p misses inputs that are simpler than the normal ones; compare with --score levels")
    return "\n".join(lines)


def run_denoise(options: argparse.Namespace) -> int:
    """Clean files, and a table of the noise that was found."""
    import torch

    from torchcdm.apps.denoising import common_scale, denoise, denoise_picture, require_additive_noise
    from torchcdm.data import save_array, save_images, save_table
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.training.checkpoint import load, read_info

    info = read_info(options.model)
    check_output_folder(options.out, options.paths)
    model = load(options.model, chosen_device(options.device))
    # Before the files are read: no file would do.
    require_additive_noise(model.transform)
    if len(info.transform.shape) == 3:
        x, names, notes = info.read_pictures(options.paths, options.skip_bad)
    else:
        x, names, _, notes = info.read_inputs(options.paths, options.skip_bad, noisy=True)
    if {part.shape for part in x} == {info.transform.shape}:
        rows = torch.stack(list(x)).split(BATCH)
        parts = [denoise(model, part, options.level, options.noise_std) for part in rows]
    else:
        parts = [denoise_picture(model, part, options.level, options.noise_std) for part in x]
        parts = [(part[None], noise) for part, noise in parts]
    levels, noise = (torch.cat([getattr(n, part) for _, n in parts]).cpu() for part in ("level", "ratio"))
    clean = [part for rows, _ in parts for part in rows.cpu()]
    scale = common_scale(model.transform)
    noise = noise if scale is None else scale * noise
    alike = len({part.shape for part in clean}) == 1
    if len(info.transform.shape) == 3:
        numbered = ((part[None], [f"{k:06d}"]) for k, part in enumerate(clean))
        files = [save_images(part, options.out, info.transform, name)[0].name for part, name in numbered]
    else:
        files = [save_table(torch.stack(clean), options.out / "denoised.csv", info.transform).name] * len(x)
    if alike:
        save_array(torch.stack(clean), options.out / "denoised.npy", info.transform)
    header = ["input", "file", "level", "noise_ratio" if scale is None else "noise_std"]
    values = (f"{value:.4g}" for value in noise.tolist())
    write_rows(options.out / "noise.csv", header, zip(names, files, levels.tolist(), values, strict=True))
    found = "{:.3g} of each column's" if scale is None else "of standard deviation {:.3g}"
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    print(f"{len(x)} samples in {options.out}; noise {found.format(float(noise.median()))} (median)")
    return 0
