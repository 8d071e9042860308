"""Baselines of a report."""

import numpy as np
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from torchcdm.apps.baselines import baselines
from torchcdm.data import DataOptions, from_object


def test_the_gaussian_of_few_rows_of_many_columns_is_shrunk():
    draw = np.random.RandomState(0)
    x = draw.normal(size=(300, 5)) @ draw.normal(size=(5, 100)) + 0.5 * draw.normal(size=(300, 100))
    source = from_object(x, None, DataOptions())
    test = source.test.tensors()[0]
    (gaussian,) = (found for found in baselines(source, test) if found.name == "Gaussian, full covariance")
    fitted = LedoitWolf().fit(source.train.tensors()[0].numpy())
    other = -multivariate_normal(fitted.location_, fitted.covariance_).logpdf(test.numpy()).mean()
    plain = torch.cov(source.train.tensors()[0].double().T).numpy()
    without = -multivariate_normal(fitted.location_, plain, allow_singular=True).logpdf(test.numpy()).mean()
    assert gaussian.value < other + 5 < without


def test_a_handful_of_rows_has_no_mixture():
    x = np.random.RandomState(0).normal(size=(12, 2))
    source = from_object(x, None, DataOptions(validation_fraction=0.4, test_fraction=0.2))
    assert [found.name.split(",")[0] for found in baselines(source, source.test.tensors()[0])][:1] == ["Gaussian"]
