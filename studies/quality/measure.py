"""How good sets of images are: the Fréchet distance with its standard error, and what it does not see.

Every set is compared with the training images. Test images are measured alike, in a row of their own: the floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from studies.quality.features import check_images, grey_range
from studies.quality.frechet import COMPARED, Moments, Reference, precision_and_recall
from torchcdm.random import derive, stream

BOOTSTRAP = 100
"""Draws of the bootstrap."""

COPIES = 0.01
"""A sample counts as a copy where it is nearer to a training image than so large a share of test images is."""

COLUMNS = {
    "count": "images", "frechet": "Fréchet", "frechet_se": "se", "precision": "precision", "recall": "recall",
    "c2st": "C2ST", "c2st_se": "se", "nearest": "nearest", "copies": "copies", "grain": "grain", "grain_se": "se",
}  # fmt: skip

LEGEND = (
    "C2ST: held-out accuracy of a classifier of these images against training images; 0.5 if it sees no difference.",
    "nearest: median root mean square difference to the nearest training image, as a share of the grey range.",
    f"copies: share of images nearer to a training image than {COPIES:.0%} of test images are.",
    "grain: energy at the Nyquist frequency, as a share of all but the mean, over that of training images.",
)


@dataclass(frozen=True)
class Quality:
    """What is measured of one set of images; ``_se`` are standard errors over draws of that set.

    Attributes:
        count: Number of images.
        frechet: Fréchet distance to the training images.
        frechet_se: By :data:`BOOTSTRAP` draws.
        precision: Share of them that lie among the training images.
        recall: Share of the training images that lie among them.
        c2st: Held-out accuracy of a classifier that tells them from training images.
        c2st_se: Binomial.
        nearest: Median root mean square difference to the nearest training image, as a share of the grey range.
        copies: Share that is nearer to a training image than :data:`COPIES` of test images are.
        grain: Energy at the Nyquist frequency, as a share of all but the mean's, over that of the training images.
        grain_se: By the bootstrap.
    """

    count: int
    frechet: float
    frechet_se: float
    precision: float
    recall: float
    c2st: float
    c2st_se: float
    nearest: float
    copies: float
    grain: float
    grain_se: float


@final
class Ruler:
    """Measures sets of images of one data set.

    Args:
        reference: The training images.
        seed: Of the bootstrap and the classifier.

    Raises:
        UserError: No images, or no test split.
    """

    def __init__(self, reference: Reference, seed: int = 0) -> None:
        source = reference.source
        check_images(source)
        self.reference, self.seed = reference, seed
        self.range, self.train = grey_range(source), source.train.tensors()[0]
        at_nyquist, energy = nyquist(self.grey(source.train.tensors(COMPARED)[0])).sum(0)
        self.share = float(at_nyquist / energy)
        self.copied = self.nearest(source.split("test").tensors(COMPARED)[0]).quantile(COPIES)

    def grey(self, x: Tensor) -> Tensor:
        """Data units as grey levels from 0 to 1, rounded as the data are."""
        low, high = self.range
        return (self.reference.source.transform.quantize(x.float()) - low) / (high - low)

    def nearest(self, x: Tensor) -> Tensor:
        """Root mean square difference of images (N, C, H, W) to the nearest training image, (N,)."""
        points, found = self.grey(x).flatten(1), torch.full((len(x),), torch.inf)
        for part in self.train.split(COMPARED):
            found = found.minimum(torch.cdist(points, self.grey(part).flatten(1)).amin(1))
        return found / math.sqrt(points.shape[1])

    def floor(self, count: int) -> Quality:
        """What ``count`` test images, or all if there are fewer, measure."""
        return self.quality(self.reference.source.split("test").tensors(count)[0])

    def quality(self, x: Tensor) -> Quality:
        """Measures images in data units, (N, C, H, W).

        Raises:
            UserError: Too few.
        """
        reference, features = self.reference, self.reference.extractor.features(x)
        energies, to_train, generator = nyquist(self.grey(x)), self.nearest(x), stream(self.seed, "bootstrap")
        distances, grains = [], []
        for draw in range(BOOTSTRAP + 1):  # the first is the set itself
            rows = torch.randint(len(x), (len(x),), generator=generator) if draw else torch.arange(len(x))
            distances.append(Moments.of([features[rows]]).distance(reference.moments))
            at_nyquist, energy = energies[rows].sum(0)
            grains.append(float(at_nyquist / energy) / self.share)
        return Quality(
            len(x), distances[0], float(np.std(distances[1:])),
            *precision_and_recall(features[:COMPARED], reference.real),
            *two_sample_accuracy(features[:COMPARED], reference.real, self.seed),
            float(to_train.median()), float((to_train < self.copied).double().mean()),
            grains[0], float(np.std(grains[1:])),
        )  # fmt: skip


def measure(sets: Mapping[str, Tensor], reference: Reference, seed: int = 0) -> dict[str, Quality]:
    """Measures sets of images, and before them the test images, as many as in the largest set.

    Args:
        sets: Names and images, data units, (N, C, H, W).
        reference: The training images.
        seed: Of the bootstrap and the classifier.

    Raises:
        UserError: No images, no test split, or too few samples.
    """
    ruler = Ruler(reference, seed)
    floor = ruler.floor(max((len(x) for x in sets.values()), default=COMPARED))
    return {"test images": floor} | {name: ruler.quality(x) for name, x in sets.items()}


def nyquist(x: Tensor) -> Tensor:
    """Energy of each image at the Nyquist frequency of either axis, and at all frequencies but the mean's.

    A chequered grain of period two, as the transposes of strided convolutions leave it, lies there.

    Args:
        x: Images (N, C, H, W).

    Returns:
        Float64 (N, 2).
    """
    height, width = x.shape[2:]
    energy = torch.fft.fft2(x.double()).abs().square().sum(1)
    energy[:, 0, 0] = 0
    high = torch.zeros(height, width, dtype=torch.bool)
    high[height // 2], high[:, width // 2] = True, True
    return torch.stack([energy[:, high].sum(1), energy.sum((1, 2))], 1)


def two_sample_accuracy(samples: Tensor, real: Tensor, seed: int = 0) -> tuple[float, float]:
    """Classifier two-sample test (arXiv 1610.06545): held-out accuracy of a small network on features.

    Equally many of both; each half is classified by a network that was trained on the other.

    Returns:
        Accuracy, 0.5 for equal distributions, and its standard error.
    """
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(len(samples), len(real))
    generator = stream(seed, "c2st")
    chosen = [part[torch.randperm(len(part), generator=generator)[:count]].numpy() for part in (samples, real)]
    x, y = np.concatenate(chosen), np.repeat([0, 1], count)
    folds = np.arange(2 * count) % 2
    right = []
    for fold in (0, 1):
        network = MLPClassifier((64,), alpha=1e-2, early_stopping=True, random_state=derive(seed, "c2st", fold))
        network = make_pipeline(StandardScaler(), network).fit(x[folds != fold], y[folds != fold])
        right.append(network.predict(x[folds == fold]) == y[folds == fold])
    accuracy = float(np.concatenate(right).mean())
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / (2 * count))


def table(rows: Mapping[str, Quality], reference: Reference) -> str:
    """The rows as text, with what they are."""
    head = ["set", *COLUMNS.values()]
    cells = [[name, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in asdict(row).values())]
             for name, row in rows.items()]  # fmt: skip
    widths = [max(len(line[k]) for line in (head, *cells)) for k in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
             for line in (head, *cells)]  # fmt: skip
    title = f"{reference.source.name} {'x'.join(map(str, reference.source.shape))}: distances to "
    title += f"{reference.moments.count} training images in {reference.extractor.name}"
    return "\n".join([title, *lines, *LEGEND])


def to_json(rows: Mapping[str, Quality], reference: Reference) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "data": reference.source.name, "shape": list(reference.source.shape), "training": reference.moments.count,
        "features": reference.extractor.name, "key": reference.extractor.key,
        "rows": [{"set": name, **asdict(row)} for name, row in rows.items()],
    }  # fmt: skip
