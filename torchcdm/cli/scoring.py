"""``cdm score``, ``cdm explore`` and ``cdm denoise``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, check_writable, count, tell, write_rows
from torchcdm.errors import UserError
from torchcdm.runtime.files import check_output_folder

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.models.denoiser import Denoiser
    from torchcdm.training.checkpoint import ModelInfo

SCORES = ("levels", "coarse", "complexity", "typicality", "log_prob", "ratio")
"""Those of :data:`torchcdm.apps.anomaly.SCORES`, which takes torch to import: help is to come at once."""

REFERENCE_LIMIT = 5000
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
        "model paths skip-bad json device",
    )  # fmt: skip
    parser.add_argument("--score", default=SCORES[0], metavar="NAME", help=f"of {', '.join(SCORES)} ({SCORES[0]})")
    parser.add_argument("--background", metavar="RUN", help="model of broader data, for the score 'ratio'")
    parser.add_argument("--fpr", type=float, default=0.05, metavar="P", help="share of normal inputs to flag (0.05)")
    parser.add_argument(
        "--reference", metavar="PATH", nargs="+",
        help="normal data that RUN was not trained on; its validation split by default",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=count, default=REFERENCE_LIMIT, metavar="N",
        help=f"at most N reference samples, evenly spaced ({REFERENCE_LIMIT})",
    )  # fmt: skip
    parser.add_argument("--csv", metavar="FILE", type=Path, help="score, percentile and flag of every "
                        "input; where it is odd: the columns of flagged rows, the file of a map")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="histogram of the scores, a PNG")
    parser.add_argument(
        "--maps", metavar="DIR", type=Path, help="a PNG for each image: beside it, where it is not what is normal"
    )

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

    from torchcdm.apps.anomaly import AnomalyDetector, AnomalyMap, make_score
    from torchcdm.apps.anomaly.detector import check_fpr
    from torchcdm.apps.anomaly.maps import save_maps, top_columns
    from torchcdm.apps.plots import check_figure, score_histogram
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info

    check_fpr(options.fpr)
    if options.plot is not None:
        check_figure(options.plot)
    for path in (options.csv, options.plot, options.json):
        check_writable(path, [*options.paths, *(options.reference or ())])
    info = read_info(options.model)
    if options.maps is not None:
        if len(info.transform.shape) != 3:
            raise UserError("--maps: this model takes rows, not images; --csv names the columns that contribute most")
        check_output_folder(options.maps, [*options.paths, *(options.reference or ())])
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        background = None if options.background is None else load(options.background, device)
        score = make_score(options.score, model, background)
        # Before the passes over the reference: a wrong path shall not take a minute to be found.
        x, names, deviating, notes = info.read_inputs(options.paths, options.skip_bad)
        reference, origin = _reference(options, info, model)
        detector = AnomalyDetector.fit(score, reference)
        threshold = detector.threshold(options.fpr)
        scores = detector.score(x)
        flags = detector.flags(scores, options.fpr) | torch.tensor(list(map(bool, deviating)))
        where = [""] * len(x)
        if options.maps is not None:
            fitted = AnomalyMap.fit(model, reference)
            maps = fitted(x)
        elif x.ndim == 2 and options.csv is not None and flags.any():
            found = iter(top_columns(AnomalyMap.fit(model, reference)(x[flags]), info.columns))
            where = [next(found) if flag else "" for flag in flags]
            where = [f"{k} (unlike any in training)" if k else top for k, top in zip(deviating, where, strict=True)]
    if not main:
        return 0
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    if options.plot is not None:
        score_histogram(detector.calibration, scores, threshold, options.score, options.plot)
    if options.maps is not None:
        where = [path.name for path in save_maps(maps, x, fitted.limit, options.maps, info.transform)]
    flags, scores, percentiles = flags.tolist(), scores.tolist(), detector.percentile(scores).tolist()
    if options.csv is not None:
        rows = zip(range(len(x)), names, scores, percentiles, flags, where, strict=True)
        write_rows(
            options.csv,
            ("row", "input", "score", "percentile", "flag", "where"),
            ((k, name, f"{score:.6g}", f"{pct:.3f}", int(flag), odd) for k, name, score, pct, flag, odd in rows),
        )
    numbers = {
        "score": options.score,
        "fpr": options.fpr,
        "threshold": threshold,
        "reference": {"name": origin, "fitted": len(reference) // 2, "calibration": len(detector.calibration)},
        "count": len(scores),
        "flagged": sum(flags),
        "deviating": sum(map(bool, deviating)),
        "scores": scores,
        "percentiles": percentiles,
        "flags": flags,
    }
    tell(options.json, _summary(numbers, names), numbers)
    return 0


def run_explore(options: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    from torchcdm.apps.explorer import Explorer, page, serve
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.training.checkpoint import load, read_info

    info, model = read_info(options.model), load(options.model, chosen_device(options.device))
    options.skip_bad, options.limit = False, EXAMPLES
    reference, _ = _reference(options, info, model)
    examples = reference if options.reference else info.read_source(model).test.tensors(EXAMPLES)[0].float()
    blocks = page(Explorer(model, info, reference, examples), options.model)
    serve(blocks, options.port, lambda address: print(f"{options.model}: {address} (Ctrl+C stops it)", flush=True))
    return 0


def _reference(options: argparse.Namespace, info: ModelInfo, model: Denoiser) -> tuple[Tensor, str]:
    """Normal data that did not train the model, and what they are called."""
    from torchcdm.data import MemorySplit

    if options.reference is not None:
        x = info.read_inputs(options.reference, options.skip_bad).x
        return MemorySplit(x).tensors(options.limit)[0], ", ".join(options.reference)
    try:
        source = info.read_source(model)
        split = source.split("validation")
    except UserError as error:
        raise UserError(f"{error}; or give normal data by --reference PATH") from None
    return split.tensors(options.limit)[0].float(), f"validation split of {source.name}"


def _summary(numbers: dict[str, Any], names: list[str]) -> str:
    """The most anomalous inputs, and what the flags mean."""
    scores, count = numbers["scores"], numbers["count"]
    lines = [f"{'score':>12}{'percentile':>12}  input"]
    for i in sorted(range(count), key=lambda i: -scores[i])[:SHOWN]:
        mark = "*" if numbers["flags"][i] else " "
        lines.append(f"{scores[i]:12.5g}{numbers['percentiles'][i]:12.2f}{mark} {names[i]}")
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
