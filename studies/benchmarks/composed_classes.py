"""Images of composed classes, as a classifier sees them that has no part in the model.

    python -m studies.benchmarks.composed_classes zoo:digits-conditional --both 3,8 1,7 --json FILE
    python -m studies.benchmarks.composed_classes zoo:fashion-mnist-conditional --both 5,7 --particles 256 --json FILE

The classifiers are the fixed networks of :mod:`studies.quality.extractor`. An image counts as ``both`` where the two
classes are the two most probable ones and neither has less than a tenth of what they have together; as ``either``
where one of the two is the most probable; else as ``not``. Ways to draw what is of both classes, ``all_of``:

- ``particles``: weighted ones, :data:`PARTICLES` for all images, which may descend from few of them;
- ``replicas``: exchange between the levels, a column for each image, with ``--sweeps``;
- ``accepted``: the reverse chain with an accepted Langevin move after each step;
- ``sum of scores``: the same chain without moves, what a model without a density can do.

Beside them what is of either, ``any_of``, what is of neither, ``none_of``, and images of the model as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import torchcdm
from studies.benchmarks.files import write_rows
from studies.quality.extractor import load_network
from torchcdm import compose
from torchcdm.data import save_grid

PARTICLES, DOUBT = 512, 0.1


def shares(network: str, x: Tensor, transform: torchcdm.DataTransform, pair: Sequence[int]) -> dict[str, float]:
    """Shares of images (N, 1, H, W), data units, that the classifier calls both, either or none of a pair."""
    white = (x.float() - transform.low) / (transform.high - transform.low)
    with torch.no_grad():
        p = load_network(network)[0](white).softmax(1)
    own = p[:, list(pair)]
    two_best = own.sum(1) >= p.topk(2).values.sum(1) - 1e-6
    both = two_best & (own.amin(1) >= DOUBT * own.sum(1))
    either = ~both & (own.amax(1) == p.amax(1))
    return {"both": float(both.double().mean()), "either": float(either.double().mean()),
            "not": float((~both & ~either).double().mean())}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.composed_classes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="run folder or zoo:NAME, of a model with classes")
    parser.add_argument("--both", nargs="+", default=["3,8"], help="pairs of classes, such as 3,8")
    parser.add_argument("--n", type=int, default=64, help="images of each kind (64)")
    parser.add_argument("--particles", type=int, default=PARTICLES, help=f"particles ({PARTICLES})")
    parser.add_argument("--sweeps", type=int, default=0, help="sweeps of replica exchange; none by default")
    parser.add_argument("--steps", type=int, default=50, help="steps of the ways without particles (50)")
    parser.add_argument("--pictures", type=Path, help="folder for a grid of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, n = torchcdm.load(options.model), options.n
    transform, rows = model.transform, []
    network = "digits" if max(transform.shape) <= 12 else "fashion-mnist"
    chain = {"sampler": "ddpm", "steps": options.steps}
    for pair in ([int(y) for y in text.split(",")] for text in options.both):
        both, names = compose.all_of(model, pair), [model.info.class_names[y] for y in pair]
        ways = {
            "all of, particles": (both, {"particles": options.particles}),
            **({"all of, replicas": (both, {"particles": n, "sweeps": options.sweeps})} if options.sweeps else {}),
            "all of, accepted": (both, {**chain, "corrector": 1}),
            "all of, sum of scores": (both, {**chain, "corrector": 0}),
            "any of": (compose.any_of(model, pair), chain), "none of": (compose.none_of(model, pair), chain),
            "all": (model, chain),
        }  # fmt: skip
        for way, (target, how) in ways.items():
            began = time.process_time()
            found = compose.sample(target, n, details=True, **how)
            facts = {"model": options.model, "pair": names, "way": way, "n": n, "seconds": time.process_time() - began}
            facts["ess"] = found.ess if "particles" in how else None
            rows.append(facts | shares(network, found.x, transform, pair))
            print(json.dumps(rows[-1]), flush=True)
            write_rows(rows, options.json)
            if options.pictures is not None:
                options.pictures.mkdir(parents=True, exist_ok=True)
                save_grid(found.x, options.pictures / f"{pair} {way}.png", transform)


if __name__ == "__main__":
    main()
