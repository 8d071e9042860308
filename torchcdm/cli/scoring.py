"""``cdm score``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_device, add_json, check_writable, tell, write_rows
from torchcdm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.models.denoiser import Denoiser
    from torchcdm.training.checkpoint import ModelInfo

SCORES = ("levels", "coarse", "complexity", "typicality", "log_prob", "ratio")
"""Those of :data:`torchcdm.apps.anomaly.SCORES`, which takes torch to import: help is to come at once."""

REFERENCE_LIMIT = 5000
SHOWN = 10
"""Rows that are printed: the most anomalous ones."""


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "score", "how anomalous images, arrays or rows of tables are",
        "cdm score runs/sensors new.csv --fpr 0.01 --reference good.csv --csv scores.csv",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="images, folders, .npy, .npz, tables; data units")
    parser.add_argument("--score", default=SCORES[0], metavar="NAME", help=f"of {', '.join(SCORES)} ({SCORES[0]})")
    parser.add_argument("--background", metavar="RUN", help="model of broader data, for the score 'ratio'")
    parser.add_argument("--fpr", type=float, default=0.05, metavar="P", help="share of normal inputs to flag (0.05)")
    parser.add_argument(
        "--reference", metavar="PATH", nargs="+",
        help="normal data that RUN was not trained on; its validation split by default",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, default=REFERENCE_LIMIT, metavar="N",
        help=f"at most N reference samples, evenly spaced ({REFERENCE_LIMIT})",
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="score, percentile and flag of every input")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="histogram of the scores, a PNG")
    add_json(parser)
    add_device(parser)
    parser.set_defaults(run=run_score)


def run_score(options: argparse.Namespace) -> int:
    """Scores with percentiles among normal data, and flags at a false-positive rate."""
    from torchcdm.apps.anomaly import AnomalyDetector, make_score
    from torchcdm.apps.anomaly.detector import check_fpr
    from torchcdm.apps.plots import check_figure, score_histogram
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info

    if options.limit < 1:
        raise UserError(f"--limit is {options.limit}; at least 1 is needed")
    check_fpr(options.fpr)
    if options.plot is not None:
        check_figure(options.plot)
    for path in (options.csv, options.plot, options.json):
        check_writable(path, [*options.paths, *(options.reference or ())])
    info = read_info(options.model)
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
    if not main:
        return 0
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    if options.plot is not None:
        score_histogram(detector.calibration, scores, threshold, options.score, options.plot)
    flags = (detector.flags(scores, options.fpr) | deviating).tolist()
    scores, percentiles = scores.tolist(), detector.percentile(scores).tolist()
    if options.csv is not None:
        rows = zip(names, scores, percentiles, flags, strict=True)
        write_rows(
            options.csv,
            ("input", "score", "percentile", "flag"),
            ((name, f"{score:.6g}", f"{percentile:.3f}", int(flag)) for name, score, percentile, flag in rows),
        )
    numbers = {
        "score": options.score,
        "fpr": options.fpr,
        "threshold": threshold,
        "reference": {"name": origin, "fitted": len(reference) // 2, "calibration": len(detector.calibration)},
        "count": len(scores),
        "flagged": sum(flags),
        "deviating": int(deviating.sum()),
        "scores": scores,
        "percentiles": percentiles,
        "flags": flags,
    }
    tell(options.json, _summary(numbers, names), numbers)
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
        what = "of them whatever their score: they differ in a column constant in training"
        lines.append(f"{numbers['deviating']} {what}")
    if numbers["score"] == "log_prob":
        lines.append("raw log p misses inputs that are simpler than the normal ones; compare with --score levels")
    return "\n".join(lines)
