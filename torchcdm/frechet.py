"""Fréchet distance between images, in the features of Inception where its weights are, else of a small classifier.

.. math:: |\\mu_a - \\mu_b|^2 + \\mathrm{Tr}(S_a + S_b - 2 (S_a S_b)^{1/2})

Beside it the kernel distance, precision and recall. Numbers of different features do not compare: every number goes
with the name of its extractor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.data import DataSource, to_bytes
from torchcdm.errors import UserError

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity downloads into torch's cache of checkpoints."""

SMALLEST_COUNT = 2000
"""Below so many samples a Fréchet distance says little and is not printed in tables."""

REAL = 10_000
"""At most so many training images stand for the data."""

COMPARED = 5000
"""At most so many images on either side where every pair is looked at."""

BATCH = 256


@dataclass(frozen=True)
class Extractor:
    """Features of images and their name.

    Attributes:
        name: For headers: which network, and how it was obtained.
        features: Images in data units (N, C, H, W) to float64 (N, F).
    """

    name: str
    features: Callable[[Tensor], Tensor]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features, (N, F) and (M, F), by their means and covariances.

    Raises:
        UserError: Fewer than two samples, or features of different length.
    """
    _comparable(a, b)
    (mean_a, cov_a), (mean_b, cov_b) = (_moments(x.double()) for x in (a, b))
    # The trace of the root of a product of covariances is that of a symmetric matrix: no complex root is needed.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


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


def extractor_for(
    source: DataSource, seed: int = 0, device: str | torch.device = "cpu", steps: int = 600
) -> Extractor:
    """Inception for RGB data where torch-fidelity and its weights are at hand, else a classifier trained on the spot.

    Args:
        source: The data: images, with classes where Inception is not at hand.
        seed: Of the classifier's training.
        device: Where to.
        steps: Of the classifier's training.

    Raises:
        UserError: No Inception, and no classes to train a classifier on.
    """
    if inception_features(source):
        return _inception(source, device)
    return _classifier(source, seed, device, steps)


def inception_features(source: DataSource) -> bool:
    """Whether features are Inception's; else a classifier of the source's classes has to give them.

    Raises:
        UserError: Neither can be had.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if find_spec("torch_fidelity") and weights.exists():
        return True
    if source.classes is None or len(source.shape) != 3:
        raise UserError(
            f"{source.name}: Fréchet distances need images with classes, or torch-fidelity with {weights}"
        )
    return False


@final
class Reference:
    """The training images of a data set in the features of :func:`extractor_for`, and how far others are from them.

    Args:
        source: The data.
        device: Where the features are computed.

    Attributes:
        extractor: The features.
        real: Those of at most :data:`REAL` training images, float64 (N, F).
    """

    def __init__(self, source: DataSource, device: str | torch.device = "cpu") -> None:
        self.source, self.device = source, device

    @cached_property
    def extractor(self) -> Extractor:
        """Made, or trained, when the first distance is asked for."""
        return extractor_for(self.source, device=self.device)

    @cached_property
    def real(self) -> Tensor:
        """Features of training images."""
        return self.extractor.features(self.source.train.tensors(REAL)[0])

    def distance(self, x: Tensor) -> float:
        """Fréchet distance of images in data units, (N, C, H, W)."""
        return frechet_distance(self.extractor.features(x), self.real)

    def quality(self, x: Tensor) -> tuple[float | None, float | None, float | None]:
        """Kernel distance, precision and recall, of at most :data:`COMPARED` images on either side; None for few."""
        if len(x) < SMALLEST_COUNT:
            return None, None, None
        features, real = self.extractor.features(x[:COMPARED]), self.real[:COMPARED]
        return kernel_distance(features, real), *precision_and_recall(features, real)

    def printable(self, x: Tensor) -> float | None:
        """:meth:`distance`; None for fewer than :data:`SMALLEST_COUNT` images."""
        return self.distance(x) if len(x) >= SMALLEST_COUNT else None

    def header(self, count: int) -> str:
        """What a number of ``count`` samples is, for the title of a table."""
        return f"Fréchet distance of {count} samples to {len(self.real)} training images in {self.extractor.name}"

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


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def _inception(source: DataSource, device: str | torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    limits = None
    if source.transform.low is None:
        # One range for data and samples, or the distance would not see that they differ in it.
        real = source.train.tensors(REAL)[0]
        limits = float(real.min()), float(real.max())

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        bytes_ = to_bytes(x.float(), source.transform, limits)
        bytes_ = bytes_.expand(-1, 3, -1, -1) if bytes_.shape[1] == 1 else bytes_
        return torch.cat([network(part.to(device))[0].double().cpu() for part in bytes_.split(BATCH)])

    return Extractor("Inception (torch-fidelity, 2048 features)", features)


class _Classifier(nn.Module):
    """Three convolutions and a layer of 64 features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _classifier(source: DataSource, seed: int, device: str | torch.device, steps: int) -> Extractor:
    """Trained with Adam on batches of 128, a few seconds to a minute on one core."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Classifier(source.shape[0], source.classes or 0).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(steps):
        x, y = source.train.batch(torch.randint(len(source.train), (128,), generator=generator))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss = nn.functional.cross_entropy(network(source.transform(x).to(device)), y.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    network.eval().requires_grad_(False)

    def features(x: Tensor) -> Tensor:
        z = source.transform(source.transform.quantize(x.float()))
        return torch.cat([network.body(part.to(device)).double().cpu() for part in z.split(BATCH)])

    split = source.test or source.train
    x, y = split.tensors(2000)
    predicted = torch.cat([network(source.transform(part).to(device)).argmax(1).cpu() for part in x.split(BATCH)])
    accuracy = float((predicted == y).double().mean())
    name = f"64 features of a classifier trained here on {source.name}, accuracy {100 * accuracy:.1f} %"
    return Extractor(name, features)
