"""The picture of the README: the density of two moons at six noise levels, from one forward pass a point.

python docs/write_picture.py docs/images/moons.png
"""

import sys

import matplotlib
import numpy as np
import torch

import torchcdm

matplotlib.use("agg")
import matplotlib.pyplot as plt

LEVELS, SIDE, REACH = (40, 28, 20, 13, 7, 0), 240, 2.2


def main(path: str) -> None:
    """Draws log p_t over the plane, brighter where a point is more likely, and samples of the model at level 0."""
    model = torchcdm.load("zoo:two-moons")
    axis = torch.linspace(-REACH, REACH, SIDE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], -1).reshape(-1, 2)
    with torch.no_grad():
        log_p = model.log_prob_levels(points)[:, list(LEVELS)].reshape(SIDE, SIDE, -1).numpy()
    drawn = model.transform(model.sample(400, sampler="dpm++", steps=40, seed=0)).numpy()
    figure, axes = plt.subplots(1, len(LEVELS), figsize=(12, 2.2))
    for k, (panel, level) in enumerate(zip(axes, LEVELS, strict=True)):
        density = np.exp((log_p[..., k] - log_p[..., k].max()) / 2)
        panel.imshow(density, origin="lower", extent=(-REACH, REACH) * 2, cmap="magma")
        panel.set_title(f"level {level}" if level else "level 0, with samples", fontsize=10)
        panel.axis("off")
    axes[-1].scatter(*drawn.T, s=1, color="white", alpha=0.6)
    axes[-1].set(xlim=(-REACH, REACH), ylim=(-REACH, REACH))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.88, wspace=0.03)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
