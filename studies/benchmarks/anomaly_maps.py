"""How well the maps of ``cdm score --maps`` find what was spoiled in an image.

    cdm train fashion-mnist-conditional --data.gaussianize false --train.steps 6000 --out runs/fashion
    python -m studies.benchmarks.anomaly_maps --run runs/fashion --json studies/results/anomaly_maps.json

In each of ``--count`` test images a square patch, two sevenths of the side, is replaced: by a patch of another test
image from another place (``image``), by one grey level (``flat``) or by random grey levels (``noise``). Patches that
change the image by less than a fifth of the range on average are drawn again. The map is fitted on the validation
split. Pixel AUROC counts the pixels of the patch as positives, over all images; the image-wise one is its mean over
images. The squared difference to the mean validation image, standardised and smoothed the same way, is the baseline.

``--choose`` spoils validation images instead, and tries noise levels, areas and blurs of the maps: those with the
largest AUROC of the kind that is found worst are the defaults of :class:`torchcdm.apps.anomaly.AnomalyMap`.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from studies.benchmarks.outliers import blur
from torchcdm.apps.anomaly import AnomalyMap
from torchcdm.data import DataSource
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import stream
from torchcdm.training.checkpoint import load, read_info

KINDS = ("image", "flat", "noise")
LEAST_CHANGE = 0.2

ALL_RATIOS = (0.5, 1.0, 2.0)
RATIOS = ((1.0,), (0.5, 1.0), (1.0, 2.0), ALL_RATIOS)
AREAS = ((0.0,), (1 / 18,), (0.0, 1 / 28), (0.0, 1 / 18), (0.0, 1 / 14), (0.0, 1 / 28, 1 / 14))
BLURS = (1 / 18, 1 / 12, 1 / 9)
"""What is tried."""


def spoiled(x: Tensor, kind: str, high: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N, C, S, S) with a patch replaced, and where it is, bool (N, S, S)."""
    draw = stream(seed, "patches")
    side = x.shape[-1]
    patch = round(side * 2 / 7)
    found, where = x.clone(), torch.zeros(len(x), side, side, dtype=torch.bool)
    for i in range(len(x)):
        change = -1.0
        while change < LEAST_CHANGE * high:
            j = int(torch.randint(len(x), (), generator=draw))
            top, left, other_top, other_left = torch.randint(side - patch + 1, (4,), generator=draw).tolist()
            old = x[i, :, top : top + patch, left : left + patch]
            if kind == "image":
                new = x[j, :, other_top : other_top + patch, other_left : other_left + patch]
            elif kind == "flat":
                new = torch.randint(int(high) + 1, (1, 1, 1), generator=draw).expand_as(old)
            else:
                new = torch.randint(int(high) + 1, old.shape, generator=draw)
            change = float((new - old).abs().mean())
        found[i, :, top : top + patch, left : left + patch] = new
        where[i, top : top + patch, left : left + patch] = True
    return found, where


def auroc(where: Tensor, maps: Tensor) -> dict[str, float]:
    """Over all pixels, and the mean over images."""
    each = [roc_auc_score(*(part.flatten().numpy() for part in pair)) for pair in zip(where, maps, strict=True)]
    overall = roc_auc_score(where.flatten().numpy(), maps.flatten().numpy())
    return {"pixel": float(overall), "image-wise": float(sum(each) / len(each))}


def choose(model: Denoiser, source: DataSource, high: float, count: int) -> list[dict[str, object]]:
    """Settings by the pixel AUROC of the kind of patch that they find worst among validation images, best first."""
    everything = source.validation.tensors()[0].float()
    reference, x = everything[0::2][:count], everything[1::2][:count]
    everywhere = AnomalyMap(model, ALL_RATIOS)
    found = {"normal": everywhere.errors(reference)}
    where = {}
    for kind in KINDS:
        images, where[kind] = spoiled(x, kind, high, seed=1)
        found[kind] = everywhere.errors(images)
    rows = []
    for ratios, areas, blurred in product(RATIOS, AREAS, BLURS):
        places = [ALL_RATIOS.index(r) for r in ratios]
        maps = AnomalyMap(model, ratios, areas, blurred).learn(found["normal"][:, places])
        values = {}
        for kind, mask in where.items():
            values[kind] = float(roc_auc_score(mask.flatten().numpy(), maps.apply(found[kind][:, places]).flatten()))
        rows.append({"ratios": ratios, "areas": areas, "blur": blurred, **values})
    return sorted(rows, key=lambda row: -min(row[kind] for kind in KINDS))


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="a run on images")
    parser.add_argument("--count", type=int, default=500, help="test images of each kind")
    parser.add_argument("--choose", action="store_true", help="compare settings on validation images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, info = load(options.run), read_info(options.run)
    source = info.read_source(model)
    if options.choose:
        rows = choose(model, source, info.transform.high, options.count)
        print(*rows[:10], sep="\n")
        if options.json is not None:
            options.json.write_text(json.dumps({"count": options.count, "rows": rows}, indent=1) + "\n", "utf-8")
        return
    reference = source.validation.tensors(500)[0].float()
    x = source.test.tensors(options.count)[0].float()
    maps = AnomalyMap(model).fit(reference)
    mean, deviation = reference.mean(0), reference.std(0)
    rows = []
    for kind in KINDS:
        images, where = spoiled(x, kind, info.transform.high)
        plain = ((images - mean) / (deviation + 0.1 * deviation.mean())).square().sum(1)
        baseline = auroc(where, blur(plain[:, None], maps.blur * plain.shape[-1])[:, 0])
        rows.append({"patch": kind, "count": len(x), **auroc(where, maps(images)), "baseline": baseline})
        print(rows[-1], flush=True)
    shape, step = list(info.transform.shape), info.selected.get("step")
    numbers = {"data": source.name, "shape": shape, "step": step, "limit": maps.limit, "rows": rows}
    if options.json is not None:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
