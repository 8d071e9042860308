"""Outliers: every anomaly score of a model beside detectors of PyOD and the log p of a flow.

    python -m studies.benchmarks.outliers corruptions --run runs/fashion --json corruptions.json
    python -m studies.benchmarks.outliers held-out --train-steps 1200 --json held_out.json
    python -m studies.benchmarks.outliers tables --json tables.json

corruptions
    Test images of Fashion-MNIST against digits and spoiled test images, by the model of ``--run``, or one that is
    trained here (preset ``fashion-mnist``, ``--train-steps``).
held-out
    Classes that the model never saw, at 16x16; two models are trained here, ``--train-steps`` each. With ``--turned``
    they are joint models of images turned by 0, 90, 180 and 270 degrees, and the turn is the class.
tables
    scikit-learn's tables, one class the outlier; a model for each is trained here (preset ``table``).

The list of outliers and their strengths below was written before any score was looked at, and is not changed since.
Scores of the model are fitted on the validation split, which did not train it. PyOD's detectors get training images
(at most :data:`PEER_LIMIT`) as vectors, and of tables training and validation rows, standardised. ECOD and IForest
are where PyOD's documentation tells its users to begin; KNN and LOF compare with neighbours, which suits training data
that are clean, as they are here. The flow is zuko's MAF as in ``studies compare``, trained for ``--flow-seconds``.

With ``--own`` only the scores of the models are measured, and the rows of other detectors stay as the file of
``--json`` has them. With ``--models FOLDER`` the models that are trained here are kept there and not trained again.

AUROC counts the outliers as positives; FPR@95 is the share of normal samples that is flagged at the threshold that
flags 95 % of the outliers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torchcdm
from studies.benchmarks.files import write_rows
from studies.budget import Budget
from studies.compare.peer import Task
from studies.compare.zuko_peers import MAF
from torchcdm.apps.anomaly import SCORES, AnomalyDetector
from torchcdm.data import DataOptions, DataSource, MemorySplit, from_object, load_data
from torchcdm.data.images import resize

# --- the list, fixed ---------------------------------------------------------------------------------------------

NORMAL_IMAGES = 2000
"""Test images of Fashion-MNIST, evenly spaced, that stand for normal; each corruption is applied to 2000 others."""


@dataclass(frozen=True)
class Corruption:
    """One way to spoil images, at the strength that counts and at a mild one that is reported beside it."""

    apply: Callable[[Tensor, float], Tensor]
    strength: float
    mild: float | None


def invert(x: Tensor, strength: float) -> Tensor:
    """Black for white."""
    return 255 - x


def blur(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian of ``sigma`` pixels, edges repeated."""
    reach = int(np.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    padded = torch.nn.functional.pad(x.float(), (reach, reach, reach, reach), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(rows, kernel.view(1, 1, -1, 1))


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """White noise of ``deviation`` grey levels, clipped."""
    return x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def reduce_contrast(x: Tensor, factor: float) -> Tensor:
    """Contrast around the mean of the image times ``factor``."""
    mean = x.float().mean((1, 2, 3), keepdim=True)
    return mean + factor * (x - mean)


def shift(x: Tensor, distance: float) -> Tensor:
    """Moved by ``distance`` pixels along both axes, in one of the four diagonal directions in turn; black comes in."""
    d = int(distance)
    padded = torch.nn.functional.pad(x, (d, d, d, d))
    height, width = x.shape[-2:]
    corners = [(0, 0), (0, 2 * d), (2 * d, 0), (2 * d, 2 * d)]
    moved = [padded[i, :, a : a + height, b : b + width] for i in range(len(x)) for a, b in [corners[i % 4]]]
    return torch.stack(moved)


CORRUPTIONS = {
    "inverted": Corruption(invert, 1.0, None),
    "blurred": Corruption(blur, 1.0, 0.6),
    "noisy": Corruption(add_noise, 20.0, 8.0),
    "contrast": Corruption(reduce_contrast, 0.5, 0.8),
    "shifted": Corruption(shift, 4.0, 2.0),
}

HELD_OUT = {"classes 5-9": range(5, 10), "classes 0-4": range(5)}
"""Fashion-MNIST classes that a model never saw; it is trained on the other five, at 16x16."""

TABLES = {"breast cancer": (0,), "wine": (0, 1, 2), "digits": tuple(range(10))}
"""scikit-learn's tables, and the classes of which each in turn is the outlier (0 of breast cancer: malignant)."""


def corrupted(x: Tensor, name: str, mild: bool = False) -> Tensor:
    """Grey levels 0 ... 255, uint8, like the images themselves."""
    corruption = CORRUPTIONS[name]
    strength = corruption.mild if mild else corruption.strength
    return corruption.apply(x, strength).round().clamp(0, 255).to(torch.uint8)


def resized_digits(size: tuple[int, int]) -> Tensor:
    """scikit-learn's digits, all 1797, to ``size``, their 17 grey levels as 0 ... 255: uint8 (N, 1, H, W)."""
    source = load_data("digits")
    digits = torch.cat([split.tensors()[0] for split in (source.train, source.validation, source.test)])
    large = torch.stack([resize(image.float() * 255 / 16, size) for image in digits])
    return large.round().clamp(0, 255).to(torch.uint8)


# --- settings ------------------------------------------------------------------------------------------------------

PEER_LIMIT = 10_000
"""Training images for PyOD's detectors, evenly spaced: their cost grows with the square."""

OWN_SCORES = tuple(name for name in SCORES if name != "ratio")


@dataclass(frozen=True)
class Setting:
    """What is normal, and kinds of outliers.

    Attributes:
        name: Of the normal data.
        source: Training and validation splits of normal data.
        model: Trained on ``source``.
        normal: Test samples, data units.
        outliers: Of each kind, data units.
    """

    name: str
    source: DataSource
    model: torchcdm.ClassificationDiffusion
    normal: Tensor
    outliers: dict[str, Tensor]


def corruption_setting(options: argparse.Namespace) -> Iterator[Setting]:
    """Fashion-MNIST against digits and what is spoiled."""
    source = load_data("fashion-mnist")
    if options.run is None:
        model = trained(options, "fashion-mnist", source, preset="fashion-mnist")
    else:
        model = torchcdm.load(options.run)
    order = torch.randperm(len(source.test), generator=torch.Generator().manual_seed(0))
    normal, others = (source.test.values(part) for part in order[: 2 * NORMAL_IMAGES].split(NORMAL_IMAGES))
    outliers = {"digits": resized_digits(source.shape[1:])}
    outliers |= {name: corrupted(others, name) for name in CORRUPTIONS}
    outliers |= {f"{name}, mild": corrupted(others, name, mild=True) for name in CORRUPTIONS if CORRUPTIONS[name].mild}
    yield Setting("Fashion-MNIST", source, model, normal, outliers)


def held_out_settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Five classes of Fashion-MNIST against each of the other five."""
    source = load_data("fashion-mnist", size=(16, 16))
    for name, classes in HELD_OUT.items():

        def normal_only(split: torchcdm.data.Split, held_out: Sequence[int] = classes) -> torchcdm.data.Split:
            return split.select((~torch.isin(split.labels, torch.tensor(held_out))).nonzero()[:, 0])

        known = replace(source, train=normal_only(source.train), validation=normal_only(source.validation))
        kept, joint = (turned(known), {"model": {"labels": "joint"}}) if options.turned else (known, {})
        model = trained(options, f"without {name}", kept, preset="fashion-mnist", **joint)
        outliers = {
            source.class_names[k]: source.test.select((source.test.labels == k).nonzero()[:, 0]).tensors()[0]
            for k in classes
        }
        yield Setting(f"without {name}", known, model, normal_only(source.test).tensors(NORMAL_IMAGES)[0], outliers)


def turned(source: DataSource) -> DataSource:
    """Square images turned by 0 to 3 quarters, the turn as their class (Golan and El-Yaniv, arXiv 1805.10917)."""

    def all_turns(split: torchcdm.data.Split) -> MemorySplit:
        x = torch.cat([torch.rot90(split.tensors()[0], turn, (2, 3)) for turn in range(4)])
        return MemorySplit(x, torch.arange(4).repeat_interleave(len(split)))

    parts = {"train": all_turns(source.train), "validation": all_turns(source.validation)}
    return replace(source, **parts, class_names=("0", "90", "180", "270"))


def table_settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Three quarters of the normal rows train and validate; the rest, and the outlier class, are the test."""
    from sklearn import datasets

    loaders = (datasets.load_breast_cancer, datasets.load_wine, datasets.load_digits)
    for (table, classes), loader in zip(TABLES.items(), loaders, strict=True):
        x, y = loader(return_X_y=True)
        values = torch.from_numpy(x).int() if table == "digits" else torch.from_numpy(x).float()
        for odd in classes:
            for split in range(1 if table == "digits" else options.splits):
                rows = torch.from_numpy(np.random.RandomState(split).permutation(np.flatnonzero(y != odd)))
                known, normal = rows[: 3 * len(rows) // 4], rows[3 * len(rows) // 4 :]
                source = from_object(values[known], validation_fraction=0.25, test_fraction=0.0, seed=split)
                model = trained(options, f"{table} {odd} {split}", source, preset="table", seed=split)
                outliers = {f"class {odd}": values[torch.from_numpy(y == odd)]}
                yield Setting(table, source, model, values[normal], outliers)


def trained(
    options: argparse.Namespace, name: str, source: DataSource, **settings: Any
) -> torchcdm.ClassificationDiffusion:
    """A model of the source, or the one that the folder of models has under this name."""
    folder = options.models and options.models / name
    if folder and folder.exists():
        return torchcdm.load(folder)
    if options.train_steps is not None:
        settings["steps"] = options.train_steps
    model = torchcdm.fit(source, progress=False, **settings)
    if folder:
        model.save(folder)
    return model


GROUPS = {"corruptions": corruption_setting, "held-out": held_out_settings, "tables": table_settings}

# --- contenders ----------------------------------------------------------------------------------------------------

Scorer = Callable[[Tensor], dict[str, np.ndarray]]
"""From samples in data units to scores by name, higher for the more anomalous."""


def own_scorer(setting: Setting) -> Scorer:
    """All scores of the model, from one pass an input."""
    features = AnomalyDetector("levels", setting.model).features
    reference = features(setting.source.validation.tensors()[0])
    fitted = {name: AnomalyDetector(name, setting.model).learn(reference) for name in OWN_SCORES}

    def scores(x: Tensor) -> dict[str, np.ndarray]:
        profile = features(x)
        return {name: score.apply(profile).numpy() for name, score in fitted.items()}

    return scores


def pyod_scorer(setting: Setting) -> Scorer:
    """PyOD's detectors on vectors."""
    from pyod.models.ecod import ECOD
    from pyod.models.iforest import IForest
    from pyod.models.knn import KNN
    from pyod.models.lof import LOF

    train = setting.source.train.tensors(PEER_LIMIT)[0]
    images = train.ndim == 4
    if not images:
        train = torch.cat([train, setting.source.validation.tensors()[0]])
    flat = train.flatten(1).double().numpy()
    # One scale for all pixels, one for each column of a table.
    centre, scale = (0.0, 255.0) if images else (flat.mean(0), np.maximum(flat.std(0), 1e-9 + (flat.std(0) == 0)))
    detectors = {"ECOD": ECOD(), "IForest": IForest(random_state=0), "KNN": KNN(), "LOF": LOF()}
    for detector in detectors.values():
        detector.fit((flat - centre) / scale)

    def scores(x: Tensor) -> dict[str, np.ndarray]:
        vectors = (x.flatten(1).double().numpy() - centre) / scale
        # ECOD ranks what it is given together with the training rows: outliers must not come to be the norm.
        parts = np.array_split(vectors, -(-len(vectors) // max(1, len(flat) // 10)))
        return {
            f"PyOD {name}": np.concatenate([detector.decision_function(part) for part in parts])
            for name, detector in detectors.items()
        }

    return scores


def flow_scorer(setting: Setting, seconds: float) -> Scorer:
    """-log p of zuko's masked autoregressive flow."""
    budget = Budget(seconds, "processor")
    with tempfile.TemporaryDirectory() as folder:
        flow = MAF().fit(Task(setting.source, DataOptions(), torch.device("cpu"), 0, Path(folder)), budget)

    def scores(x: Tensor) -> dict[str, np.ndarray]:
        score, *_ = flow.scores(x.float(), budget)
        return {"flow log p": -score.likelihood.nats.numpy()}

    return scores


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(setting: Setting, scorers: Sequence[Scorer]) -> Iterator[dict[str, Any]]:
    """One row for each score and kind of outlier."""
    from sklearn.metrics import roc_auc_score

    normal = [scorer(setting.normal) for scorer in scorers]
    for kind, x in setting.outliers.items():
        for scorer, of_normal in zip(scorers, normal, strict=True):
            for name, odd in scorer(x).items():
                usual = of_normal[name]
                # Far outliers may overflow a density: beyond all others, and equal to one another.
                values = np.nan_to_num(np.concatenate([usual, odd]), nan=np.finfo(np.float64).max)
                usual, odd = values[: len(usual)], values[len(usual) :]
                auroc = roc_auc_score(np.arange(len(values)) >= len(usual), values)
                fpr = float((usual >= np.quantile(odd, 0.05, method="lower")).mean())
                yield {"setting": setting.name, "outliers": kind, "score": name, "auroc": float(auroc), "fpr95": fpr,
                       "normal_count": len(usual), "outlier_count": len(odd)}  # fmt: skip


def table(rows: Sequence[dict[str, Any]], value: str) -> str:
    """Outliers down, scores across; rows of the same setting and outliers (splits) are averaged."""
    names = list(dict.fromkeys(row["score"] for row in rows))
    kinds = list(dict.fromkeys((row["setting"], row["outliers"]) for row in rows))
    values: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        values.setdefault(((row["setting"], row["outliers"]), row["score"]), []).append(row[value])
    means = {key: np.mean(of_splits) for key, of_splits in values.items()}
    lines = [f"{value:34}" + "".join(f"{name.removeprefix('PyOD '):>11}" for name in names)]
    lines += [f"{', '.join(kind):34}" + "".join(f"{means[kind, name]:11.3f}" for name in names) for kind in kinds]
    average = (np.mean([means[kind, name] for kind in kinds]) for name in names)
    return "\n".join([*lines, f"{'mean':34}" + "".join(f"{mean:11.3f}" for mean in average)])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--run", help="corruptions: a trained run of Fashion-MNIST at 28x28")
    parser.add_argument("--train-steps", type=int, metavar="N", help="of each model trained here; else the preset's")
    parser.add_argument("--turned", action="store_true", help="held-out: the classes of the models are quarter turns")
    parser.add_argument("--splits", type=int, default=2, metavar="K", help="tables: splits of the two small ones")
    parser.add_argument("--flow-seconds", type=float, default=60, metavar="S", help="of processor time; 0: no flow")
    parser.add_argument("--own", action="store_true", help="no other detectors: their rows stay as the file has them")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="of the models that are trained here")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    if options.own and options.json and options.json.exists():
        rows = [row for row in json.loads(options.json.read_text())["rows"] if row["score"] not in OWN_SCORES]
    for setting in GROUPS[options.group](options):
        print(f"{setting.name}: {', '.join(setting.outliers)}", flush=True)
        scorers = [own_scorer(setting)]
        if not options.own:
            scorers.append(pyod_scorer(setting))
        if options.flow_seconds and not options.own:
            scorers.append(flow_scorer(setting, options.flow_seconds))
        rows += measure(setting, scorers)
        write_rows(rows, options.json)
    print(table(rows, "auroc"), table(rows, "fpr95"), sep="\n\n")


if __name__ == "__main__":
    main()
