"""Two Gaussians whose ratio is known."""

from scipy.stats import multivariate_normal

P = multivariate_normal([1.0, 0.5], [[0.8, 0.3], [0.3, 0.5]], seed=0)
Q = multivariate_normal([0.0, 0.0], [[1.0, -0.2], [-0.2, 1.5]], seed=1)


def samples(n, seed=0):
    return P.rvs(n, random_state=seed), Q.rvs(n, random_state=seed + 1)


def exact(x):
    return P.logpdf(x) - Q.logpdf(x)
