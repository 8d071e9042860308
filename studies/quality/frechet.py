"""Fréchet distance between images, in the features of :mod:`studies.quality.features`.

.. math:: |\\mu_a - \\mu_b|^2 + \\mathrm{Tr}(S_a + S_b - 2 (S_a S_b)^{1/2})

with the means and covariances of the features. Beside it the kernel distance, precision and recall. Every number goes
with the name of its extractor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from studies.cache import Made, kept
from studies.quality.features import BATCH, Extractor, extractor_for, in_batches
from torchcdm.data import DataSource, fingerprint
from torchcdm.errors import UserError
from torchcdm.random import evenly_spaced

SMALLEST_COUNT = 2000
"""Below so many samples a Fréchet distance says little and is not printed in tables."""

COMPARED = 5000
"""At most so many images on either side where every pair is looked at."""


@dataclass(frozen=True)
class Moments:
    """What the Fréchet distance takes of a set of features.

    Attributes:
        count: Of samples.
        mean: Float64 (F,).
        covariance: Float64 (F, F).
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Moments:
        """Of features (n, F) that come in parts, none of which is kept: of all images they may be gigabytes.

        Raises:
            UserError: Fewer than two samples.
        """
        count, mean, scatter = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for part in filter(len, parts):
            part, total = part.double(), count + len(part)
            centre = part.mean(0)
            within, step = part - centre, centre - mean
            scatter = scatter + within.T @ within + torch.outer(step, step) * (count * len(part) / total)
            mean = mean + step * (len(part) / total)
            count = total
        if count < 2:
            raise UserError(f"a Fréchet distance of {count} samples; at least 2 are needed on either side")
        return cls(count, mean, scatter / (count - 1))

    def distance(self, other: Moments) -> float:
        """Fréchet distance to another set.

        Raises:
            UserError: Features of different length.
        """
        if self.mean.shape != other.mean.shape:
            raise UserError(f"features of lengths {len(self.mean)} and {len(other.mean)} do not compare")
        # The trace of the root of a product of covariances is that of a symmetric matrix: no complex root is needed.
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
        traces = self.covariance.trace() + other.covariance.trace()
        return float((self.mean - other.mean).square().sum() + traces - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID (arXiv 1801.01401): unbiased squared MMD of features (N, F) and (M, F) by the kernel (<x, y> / F + 1)^3.

    May be negative, as it has no bias.

    Raises:
        UserError: Fewer than two samples, or features of different length.
    """
    _comparable(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def precision_and_recall(samples: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of the samples that lie among the real images, and the other way round (arXiv 1904.06991).

    A point lies among a set if it is nearer to one of its members than that member's own ``neighbours``-th nearest.

    Args:
        samples: Features (N, F).
        real: Features (M, F).
        neighbours: How many.

    Raises:
        UserError: No more samples than neighbours, or features of different length.
    """
    if min(len(samples), len(real)) <= neighbours:
        raise UserError(f"precision and recall: more than {neighbours} samples are needed")
    _comparable(samples, real)

    def share_among(points: Tensor, members: Tensor) -> float:
        radius = torch.cdist(members, members).kthvalue(neighbours + 1, 1).values  # the nearest is the member itself
        return float((torch.cdist(points, members) <= radius).any(1).double().mean())

    samples, real = samples.double(), real.double()
    return share_among(samples, real), share_among(real, samples)


@final
class Reference:
    """The training images of a data set in the features of :func:`extractor_for`, and how far others are from them.

    Args:
        source: The data.
        device: Where the features are computed.
        folder: Keeps what is measured of the training images; nothing is kept when None.
    """

    def __init__(self, source: DataSource, device: str | torch.device = "cpu", folder: Path | None = None) -> None:
        self.source, self.device, self.folder = source, device, folder

    @cached_property
    def extractor(self) -> Extractor:
        """Made when the first distance is asked for."""
        return extractor_for(self.source, self.device)

    @cached_property
    def _measured(self) -> Made:
        data, count, extractor = fingerprint(self.source), len(self.source.train), self.extractor
        settings = {"data": self.source.name, "fingerprint": data, "split": "train", "count": count,
                    "compared": COMPARED, "extractor": extractor.name, "key": extractor.key}  # fmt: skip
        name = f"reference-{data}-train-{count}-{extractor.key}.json"
        return kept(None if self.folder is None else self.folder / name, settings, self._measure)

    def _measure(self) -> Made:
        some: list[Tensor] = []
        chosen = evenly_spaced(len(self.source.train), COMPARED)

        def parts() -> Iterator[Tensor]:
            for rows, x in in_batches(self.source.train):
                features = self.extractor.features(x)
                some.append(features[torch.isin(rows, chosen)].float())
                yield features

        moments = Moments.of(parts())
        tensors = {"mean": moments.mean, "covariance": moments.covariance, "features": torch.cat(some)}
        return {}, tensors

    @cached_property
    def moments(self) -> Moments:
        """Of all training images."""
        _, tensors = self._measured
        return Moments(len(self.source.train), tensors["mean"], tensors["covariance"])

    @property
    def real(self) -> Tensor:
        """Features of at most :data:`COMPARED` training images, evenly spaced, (N, F)."""
        return self._measured[1]["features"]

    def distance(self, x: Tensor) -> float:
        """Fréchet distance of images in data units, (N, C, H, W)."""
        return Moments.of(self.extractor.features(part) for part in x.split(BATCH)).distance(self.moments)

    def quality(self, x: Tensor) -> tuple[float | None, float | None, float | None]:
        """Kernel distance, precision and recall, of at most :data:`COMPARED` images on either side; None for few."""
        if len(x) < SMALLEST_COUNT:
            return None, None, None
        features = self.extractor.features(x[:COMPARED])
        return kernel_distance(features, self.real), *precision_and_recall(features, self.real)

    def printable(self, x: Tensor) -> float | None:
        """:meth:`distance`; None for fewer than :data:`SMALLEST_COUNT` images."""
        return self.distance(x) if len(x) >= SMALLEST_COUNT else None

    def header(self, count: int) -> str:
        """What a number of ``count`` samples is, for the title of a table."""
        return f"Fréchet distance of {count} samples to {self.moments.count} training images in {self.extractor.name}"

    def notes(self, count: int) -> tuple[str, ...]:
        """The distance of test images as a floor, or that ``count`` samples are too few."""
        if count < SMALLEST_COUNT:
            return (f"{count} samples are too few for a Fréchet distance; {SMALLEST_COUNT} are needed.",)
        test = self.source.split("test").tensors(count)[0]
        floor = self.printable(test)
        text = f"The Fréchet distance of {len(test)} test images to the same training images is"
        return () if floor is None else (f"{text} {floor:.3g}.",)


def _comparable(a: Tensor, b: Tensor) -> None:
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} do not compare")
