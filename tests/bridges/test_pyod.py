"""PyOD's conventions and combinations on our outlier detector."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from torchcdm.estimators import CDMOutlierDetector

pyod = pytest.importorskip("pyod")
from pyod.models.iforest import IForest  # noqa: E402
from pyod.models.lscp import LSCP  # noqa: E402
from pyod.utils.data import evaluate_print, generate_data  # noqa: E402

from torchcdm.bridges.pyod import PyodDetector  # noqa: E402

TINY = CDMOutlierDetector(
    steps=20, width=8, depth=1, device="cpu", random_state=0,
    overrides={"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 8}}},
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return generate_data(n_train=300, n_test=200, n_features=3, contamination=0.1, random_state=0)


@pytest.fixture(scope="module")
def fitted(data):
    return PyodDetector(TINY, contamination=0.1).fit(data[0])


def test_scores_labels_and_threshold_follow_the_conventions(data, fitted, capsys):
    X, X_test, y, y_test = data
    assert np.array_equal(fitted.decision_scores_, fitted.decision_function(X))
    assert fitted.detector_.contamination == 0.1 and fitted.detector.contamination == "auto"
    assert fitted.labels_.sum() == 30 and np.array_equal(fitted.labels_, fitted.decision_scores_ > fitted.threshold_)
    assert np.array_equal(fitted.predict(X_test), fitted.decision_function(X_test) > fitted.threshold_)
    assert np.allclose(fitted.predict_proba(X_test).sum(1), 1)
    assert fitted.predict(X_test, return_confidence=True)[1].shape == (200,)
    evaluate_print("CDM", y_test, fitted.decision_function(X_test))
    assert float(capsys.readouterr().out.split("ROC:")[1].split(",")[0]) > 0.95


def test_it_is_part_of_an_ensemble(data):
    X, X_test, _, y_test = data
    scores = LSCP([PyodDetector(TINY), IForest(random_state=0)], random_state=0).fit(X).decision_function(X_test)
    assert scores[y_test == 1].mean() > scores[y_test == 0].mean() + scores[y_test == 0].std()


def test_clones_are_not_fitted_and_keep_the_settings(data, fitted):
    copy = clone(fitted)
    assert copy.contamination == 0.1 and copy.detector.steps == 20
    with pytest.raises(NotFittedError):
        copy.predict(data[1])
    assert np.array_equal(copy.fit(data[0]).decision_scores_, fitted.decision_scores_)
    with pytest.raises(ValueError, match="contamination"):
        PyodDetector(TINY, contamination=0.7)
