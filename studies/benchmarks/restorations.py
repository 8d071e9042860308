"""Restorations of noisy digits, ranked without the originals by the anomaly scores of a model of digits.

    cdm train digits --data.gaussianize false --out runs/digits
    python -m studies.benchmarks.restorations runs/digits

Test digits get white noise of three grey levels; six restorations of each compete. Printed for each score: the rank
correlation with the true error of the restorations of one image, averaged over images, and how often the least
anomalous restoration is the one of least error. One restoration is by the same model's denoiser, which the scores of
that model may favour: the last column is the correlation without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import torchcdm
from torchcdm.apps.anomaly import SCORES, AnomalyDetector
from torchcdm.apps.denoising import denoise
from torchcdm.data import load_data

NOISE = 3.0
"""Grey levels, of 16."""


def neighbourhoods(x: Tensor) -> Tensor:
    """The 3x3 pixels around each pixel, edges repeated: (N, C, H, W, 9)."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)


def restorations(model: torchcdm.ClassificationDiffusion, noisy: Tensor) -> dict[str, Tensor]:
    """By name, rounded to grey levels like the originals."""
    binomial = torch.tensor([1.0, 2, 1, 2, 4, 2, 1, 2, 1]) / 16
    found = {
        "denoiser": denoise(model, noisy, noise_std=NOISE)[0],
        "none": noisy,
        "binomial filter": neighbourhoods(noisy) @ binomial,
        "mean filter": neighbourhoods(noisy).mean(-1),
        "median filter": neighbourhoods(noisy).median(-1).values,
        "threshold": noisy * (noisy > 2 * NOISE),
    }
    return {name: model.transform.quantize(x) for name, x in found.items()}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of each row (N, k) with its row, averaged over rows."""
    ranks = [values.argsort(1).argsort(1).double() for values in (a, b)]
    k = a.shape[1]
    return float((1 - 6 * (ranks[0] - ranks[1]).square().sum(1) / (k * (k**2 - 1))).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of the preset 'digits' on plain grey levels")
    model = torchcdm.load(parser.parse_args(arguments).run)
    source = load_data("digits")
    x = source.test.tensors()[0].float()
    candidates = restorations(model, x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    errors = torch.stack([(candidate - x).square().flatten(1).mean(1) for candidate in candidates.values()], 1)
    for name, error in zip(candidates, errors.mean(0).sqrt(), strict=True):
        print(f"{name:18} root mean square error {float(error):.2f}")
    print(f"\n{'score':12}{'correlation':>13}{'best found':>13}{'without denoiser':>19}")
    for name in (name for name in SCORES if name != "ratio"):
        detector = AnomalyDetector(name, model)
        detector.learn(detector.features(source.validation.tensors()[0]))
        scores = torch.stack([detector.score(candidate) for candidate in candidates.values()], 1)
        best = float((scores.argmin(1) == errors.argmin(1)).double().mean())
        values = rank_correlation(scores, errors), best, rank_correlation(scores[:, 1:], errors[:, 1:])
        print(f"{name:12}{values[0]:13.2f}{values[1]:13.3f}{values[2]:19.2f}")


if __name__ == "__main__":
    main()
