"""A plain CNN as the network of a model of digits, beside ``zoo:digits``, whose network is the encoder.

    python -m studies.benchmarks.own_network --json studies/results/own_network.json

The CNN is trained by the preset ``digits``, as ``zoo:digits`` was. Both score the same test images by the same noisy
inputs: one pass through the level of ``cdm nll``, the ELBO and the probability flow, in bits/dim.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import torchcdm
from torchcdm.data import load_data
from torchcdm.networks.heads import CumulativeHead


class CNN(nn.Module):
    """Residual convolutions, and two kinds of features of their maps: means, and inner products with the image.

    Args:
        levels: T + 2.
        width: Channels.
        maps: Features of each kind.
    """

    def __init__(self, levels: int = 52, width: int = 32, maps: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.places = nn.Parameter(torch.zeros(width, 8, 8))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(4, width), nn.SiLU(), nn.Dropout(0.15), nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(3)
        )  # fmt: skip
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 2 * maps, 1))
        self.head = CumulativeHead(2 * maps, levels)

    def forward(self, x: Tensor) -> Tensor:
        """h of images (B, 1, 8, 8): (B, levels)."""
        h = self.first(x) + self.places
        for block in self.blocks:
            h = h + block(h)
        energies, pooled = self.last(h).chunk(2, 1)
        return self.head(torch.cat([(energies * x).sum((2, 3)), nn.functional.silu(pooled).mean((2, 3))], 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the CNN, scores both and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="at most so many test images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    test, _ = load_data("digits").test.tensors(options.limit)
    found = {}
    for name in ("cnn", "encoder"):
        begun = time.process_time()
        if name == "cnn":
            torch.manual_seed(options.seed)
            model = torchcdm.fit("digits", preset="digits", backbone=CNN(), steps=options.steps, seed=options.seed)
        else:
            model = torchcdm.load("zoo:digits")
        seconds = round(time.process_time() - begun)
        report = torchcdm.likelihood.report(model, test, methods=["single", "elbo", "flow"])
        rows = {row.name: {"value": row.value, "se": row.se} for row in report.rows}
        found[name] = {
            "parameters": sum(weights.numel() for weights in model.backbone.parameters()),
            "processor_seconds": seconds, "rows": rows,
        }  # fmt: skip
        print(name, found[name], sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "test": len(test), "networks": found}, indent=1))


if __name__ == "__main__":
    main()
