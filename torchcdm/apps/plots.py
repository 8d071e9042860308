"""Figures of a run. Nothing here needs a display."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.files import written

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".webp", ".tif")


def training_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Denoising error, cross-entropy and validation NLL over the steps, where ``metrics.jsonl`` has them."""
    labels = {"mse": "squared error of eps", "ce": "cross-entropy of the level, nats", "nll": "one-pass NLL"}
    found = {name for line in lines for name, value in line.items() if value is not None}
    labels = {key: label for key, label in labels.items() if found & {key, f"val_{key}"}}
    if not labels:
        return
    with panels(path, len(labels)) as axes:
        for ax, (key, label) in zip(axes, labels.items(), strict=True):
            for name, style in ((key, "training"), (f"val_{key}", "validation")):
                points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    ax.plot(*zip(*points, strict=True), label=style, marker="." if len(points) < 40 else None)
            ax.set(xlabel="step", ylabel=label)
            ax.legend()


def level_errors(per_level: Mapping[str, Sequence[float | None]], path: Path) -> None:
    """Denoising error, cross-entropy and accuracy at each level, as ``training.evaluation.evaluate`` gives them."""
    with panels(path, len(per_level)) as axes:
        for ax, (name, values) in zip(axes, per_level.items(), strict=True):
            inner = list(enumerate(values))[1:-1] if name == "mse" else list(enumerate(values))
            ax.plot(*zip(*[point for point in inner if point[1] is not None], strict=True))
            ax.set(xlabel="level t", ylabel=name)


def gaps_to_flow(gaps: Mapping[str, Sequence[float]], path: Path) -> None:
    """How far one pass is from the flow at each level, as :meth:`torchcdm.likelihood.flow.FlowResult.gaps` says."""
    mean, sd = torch.tensor(gaps["mean"]), torch.tensor(gaps["sd"])
    with panels(path) as (ax,):
        ax.fill_between(gaps["levels"], mean - sd, mean + sd, alpha=0.3)
        ax.plot(gaps["levels"], mean)
        ax.axhline(0, color="0.7", linestyle="--")
        ax.set(xlabel="level t", ylabel="NLL, one pass - flow, nats")


def score_histogram(normal: Tensor, scores: Tensor, threshold: float, name: str, path: Path) -> None:
    """Scores of inputs (N,) beside those of held-out ``normal`` data (n,); the threshold of flags as a dashed line."""
    # In double precision: the least and the largest would lie beyond edges that were rounded.
    sides = {"held-out normal": normal.double(), "inputs": scores.double()}
    least, largest = (float(end) for end in torch.cat(list(sides.values())).aminmax())
    # Far outliers would squeeze everything else into one bar: they share the last one.
    high = min(largest, float(normal.min()) + 3 * (threshold - float(normal.min())))
    with panels(path) as (ax,):
        for label, values in sides.items():
            shares = torch.full((len(values),), 1 / len(values)).numpy()
            shown = values.clamp_max(high).numpy()
            ax.hist(shown, 49, range=(least, high), weights=shares, alpha=0.6, label=label)
        ax.axvline(threshold, color="black", linestyle="--", linewidth=0.8)
        beyond = ", larger ones in the last bar" if largest > high else ""
        ax.set(xlabel=f"score '{name}'{beyond}", ylabel="share")
        ax.legend()


def check_figure(path: Path) -> None:
    """Refuses a file whose suffix is that of no figure, before the work."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: figures are written as {', '.join(FORMATS)}; choose one of these suffixes")


def row_of_axes(count: int, height: float = 3.6) -> list[Any]:
    """Panels of a figure side by side, inches; without pyplot, which is not made for threads."""
    from matplotlib.figure import Figure

    return list(Figure(figsize=(5 * count, height), layout="constrained").subplots(1, count, squeeze=False)[0])


@contextmanager
def panels(path: Path, count: int = 1) -> Iterator[list[Any]]:
    """A row of panels to draw on, then written in the format of the path's suffix."""
    check_figure(path)
    axes = row_of_axes(count)
    yield axes
    with written(path) as file:
        axes[0].figure.savefig(file, dpi=120, format=path.suffix[1:])
