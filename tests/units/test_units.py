"""Units: a density changes by the Jacobian of its transform, and bits are bits in any unit."""

import json
import math

import pytest
import torch
from oracles import normal, rng

from torchcdm.errors import UserError
from torchcdm.units import DataTransform, GaussianizedTransform, LogLikelihood, transform_from_config


def transforms():
    return {
        "images": DataTransform.images((3, 4, 5)),
        "paper": DataTransform.images((3, 4, 5), dequantize=False),
        "digits": DataTransform.images((1, 8, 8), levels=17),
        "table": DataTransform.standardize(normal(50, 6) * torch.tensor([1, 1e3, 1e-3, 7, 50, 0.2]) + 5),
        "identity": DataTransform((2,)),
        "channels": DataTransform((3, 2, 2), shift=normal(3, 1, 1), scale=normal(3, 1, 1).abs() + 0.1),
    }


every_transform = pytest.mark.parametrize("name", transforms())


@every_transform
def test_inverse_and_log_determinant(name):
    transform = transforms()[name]
    x = 10 * normal(*transform.shape)
    assert torch.allclose(transform.inverse(transform(x[None])), x[None], atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v.reshape(1, *x.shape)), x.flatten())
    truth = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]
    assert float(transform.log_det(x[None])) == pytest.approx(float(truth), abs=1e-9)
    assert transform.dim == x.numel()


@every_transform
def test_survives_json_to_the_last_bit(name):
    transform = transforms()[name]
    copy = transform_from_config(json.loads(json.dumps(transform.to_config())))
    x = 10 * normal(4, *transform.shape)
    assert torch.equal(copy(x), transform(x))
    assert torch.equal(copy.log_det(x), transform.log_det(x))
    assert (copy.bin, copy.low, copy.high, copy.dequantize) == (
        transform.bin,
        transform.low,
        transform.high,
        transform.dequantize,
    )


@every_transform
def test_constants_stay_float64_in_a_half_precision_model(name):
    transform = transforms()[name]
    x = 10 * normal(4, *transform.shape)
    before = transform.log_det(x)
    transform.half()
    assert transform.scale.dtype == torch.float64 and torch.equal(transform.log_det(x), before)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_dequantised_grey_levels_fill_the_model_range_and_round_back(levels):
    transform = DataTransform.images((1, 4, 4), levels)
    grey = torch.arange(levels).repeat(400).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8)
    noisy = transform.add_noise(grey.double(), rng())
    assert torch.equal(transform.quantize(noisy), grey.double())
    z = transform(noisy)
    width = 2 / levels
    assert -1 <= z.min() < -1 + width / 20 and 1 - width / 20 < z.max() <= 1
    assert transform.model_bin == pytest.approx(width)
    # Uniform over the cell: mean 0, variance 1 / 12 of a grey level.
    noise = noisy - grey
    assert abs(noise.mean()) < 0.005 and noise.var() == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(transform.encode(grey.double(), rng()), z)
    assert transform.encode(grey, rng()).dtype == torch.float32


def test_the_papers_scaling_puts_the_grey_levels_on_the_ends_and_adds_no_noise():
    transform = DataTransform.images((1, 1, 2), dequantize=False)
    grey = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert transform.encode(grey).flatten().tolist() == [-1, 1]
    assert transform.model_bin == pytest.approx(2 / 255)


def test_quantize_rounds_and_clips_to_what_range_there_is():
    x = torch.tensor([-3.0, 0.4, 0.6, 99.0])
    assert DataTransform.images((4,), levels=17).quantize(x).tolist() == [0, 0, 1, 16]
    assert DataTransform((4,), bin=1.0).quantize(x).tolist() == [-3, 0, 1, 99]
    assert DataTransform((4,), bin=0.5, low=0.0).quantize(x).tolist() == [0, 0.5, 0.5, 99]
    assert DataTransform((4,)).quantize(x) is x
    # Grey levels that do not count from 0: 1, 3, 5 ...
    assert DataTransform((4,), bin=2.0, low=1.0, high=9.0).quantize(x).tolist() == [1, 1, 1, 9]
    assert DataTransform((2,), bin=2.0, low=1.0).quantize(torch.tensor([2.1, 4.9])).tolist() == [3, 5]


def test_standardised_columns_and_pixels():
    table = normal(200, 3) * torch.tensor([1.0, 100, 0.01]) + 7
    z = DataTransform.standardize(table)(table)
    assert z.mean(0).abs().max() < 1e-10 and (z.std(0, correction=0) - 1).abs().max() < 1e-10
    images = 3 * normal(50, 2, 3, 3) + 1
    transform = DataTransform.standardize(images)
    assert transform.scale.ndim == 0 and transform(images).std() == pytest.approx(1, abs=1e-3)
    with pytest.raises(UserError, match="constant"):
        DataTransform.standardize(torch.ones(5, 2))


@pytest.mark.parametrize("scale", [1.0, 1 / 255])
def test_the_uniform_distribution_on_256_levels_costs_eight_bits_in_any_unit(scale):
    # Density of the uniform distribution over 256 cells, in units where a grey level is `scale`.
    dim = 12
    nats = torch.full((5,), -dim * math.log(256 * scale))
    value = LogLikelihood(nats, dim, 0, math.log(scale), 1)
    assert value.unit == "bits/dim"
    assert torch.allclose(value.values(), torch.full((5,), 8.0).double())
    mean, error = value.mean_and_error()
    assert mean == pytest.approx(8) and error == pytest.approx(0, abs=1e-9)


def test_likelihood_of_continuous_data_stays_in_nats():
    value = LogLikelihood(torch.tensor([-1.0, -3.0]), 2, 0, None, 1)
    assert value.unit == "nats"
    assert value.mean_and_error() == pytest.approx((2, 1))


# --- Gaussianised grey levels ------------------------------------------------------------------------------------


def skewed(n: int, seed: int = 0) -> torch.Tensor:
    """Images 1x2x2 with 5 grey levels, each pixel with its own histogram; the last one is nearly constant."""
    chances = torch.tensor([[1, 1, 1, 1, 1], [8, 4, 2, 1, 1], [1, 0, 3, 0, 1], [97, 1, 1, 1, 0]]).double()
    return torch.multinomial(chances, n, replacement=True, generator=rng(seed)).T.reshape(n, 1, 2, 2).to(torch.uint8)


@pytest.fixture(scope="module")
def gaussianized():
    return GaussianizedTransform.fit(DataTransform.images((1, 2, 2), 5), skewed(5000).split(700))


def test_gaussianized_pixels_are_standard_normal(gaussianized):
    z = gaussianized.encode(skewed(20000, seed=1).double(), rng(2)).flatten(1)
    ordered = torch.special.ndtr(z).sort(0).values
    expected = (torch.arange(len(z)) + 0.5)[:, None] / len(z)
    # Kolmogorov's distance of 20 000 and 5000 samples.
    assert (ordered - expected).abs().max() < 1.63 * (1 / 20000 + 1 / 5000) ** 0.5


def test_gaussianized_inverse_and_log_determinant(gaussianized):
    x = gaussianized.add_noise(skewed(50, seed=3).double(), rng(4))
    assert torch.allclose(gaussianized.inverse(gaussianized(x)), x, atol=1e-9)
    point = x[:1]
    jacobian = torch.autograd.functional.jacobian(lambda v: gaussianized(v.reshape(1, 1, 2, 2)), point.flatten())
    truth = torch.linalg.slogdet(jacobian.reshape(4, 4))[1]
    assert float(gaussianized.log_det(point)) == pytest.approx(float(truth), abs=1e-9)


def test_gaussianized_histogram_is_a_code(gaussianized):
    # A standard normal in model units is the product of the histograms: their code length, whatever the noise.
    grey = skewed(200, seed=5).double()
    for seed in (0, 1):
        x = gaussianized.add_noise(grey, rng(seed))
        z = gaussianized(x).flatten(1)
        nats = (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(1) + gaussianized.log_det(x)
        index = grey.flatten(1).long()
        histogram = gaussianized.log_mass.reshape(4, 5)[torch.arange(4), index].sum(1)
        assert torch.allclose(nats, histogram, atol=1e-9)


def test_gaussianized_grey_levels_never_seen_are_possible_and_samples_are_grey_levels(gaussianized):
    unseen = torch.full((1, 1, 2, 2), 4.0, dtype=torch.float64)
    assert gaussianized(unseen).isfinite().all() and gaussianized.log_mass.isfinite().all()
    drawn = gaussianized.quantize(gaussianized.inverse(3 * normal(500, 1, 2, 2)))
    assert set(drawn.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_gaussianized_densities_end_at_the_cells_of_the_grey_levels(gaussianized):
    inside = torch.tensor([[-0.5, 4.5, 0, 2]], dtype=torch.float64).view(1, 1, 2, 2)
    assert gaussianized.log_det(inside).isfinite() and gaussianized.log_det(inside.float()).isfinite()
    for beyond in (-0.51, 4.51, 1e200):
        assert gaussianized.log_det(torch.where(inside == 2, beyond, inside)) == -math.inf


def test_gaussianized_mirrors_count_where_training_mirrors():
    x = torch.tensor([[0, 4]]).reshape(1, 1, 1, 2).to(torch.uint8)
    transform = GaussianizedTransform.fit(DataTransform.images((1, 1, 2), 5), [x], flip=True)
    assert torch.equal(transform.cumulative[..., 0, :], transform.cumulative[..., 1, :])


def test_gaussianized_survives_json_and_a_state(gaussianized):
    copy = transform_from_config(json.loads(json.dumps(gaussianized.to_config())))
    copy.load_state_dict(gaussianized.state_dict())
    x = skewed(20).double()
    assert torch.equal(copy(x), gaussianized(x))


def test_gaussianized_needs_a_grid():
    with pytest.raises(UserError, match="continuous"):
        GaussianizedTransform((2,), None, None, None)
    with pytest.raises(UserError, match="are too many"):
        GaussianizedTransform((1, 28, 28), 1.0, 0.0, 2.0**20)
    with pytest.raises(UserError, match="dequantize"):
        GaussianizedTransform.fit(DataTransform.images((1, 2, 2), 5, dequantize=False), [])


# --- saved transforms that are damaged ---------------------------------------------------------------------------


def replaced(value, path, new):
    """A JSON value with another one at a path; ``...`` leaves it out."""
    copy = value.copy()
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(value[path[0]], path[1:], new) if len(path) > 1 else new
    return copy


@pytest.mark.parametrize(
    ("path", "new", "says"),
    [
        (("scale", 0), -1.0, "positive"),
        (("scale", 0), "wide", r"scale must be numbers for the shape \(6,\)"),
        (("shift",), [0.0, 1.0], r"shift must be numbers for the shape \(6,\)"),
        (("shape",), [6.5], r"shape\[0\] is 6.5; it must be a valid integer"),
        (("bin",), 0, "bin is 0; it must be greater than 0"),
        (("low",), 3.0, "low is 3 and high 2; low must not be above it"),
        (("dequantize",), "maybe", "true or false"),
        (("kind",), "afine", "data transform: 'afine'"),
        (("scales",), 1, "unexpected keyword argument 'scales'"),
        (("shape",), ..., "missing a required argument: 'shape'"),
    ],
)
def test_what_is_wrong_with_a_transform_is_told(path, new, says):
    config = transforms()["table"].to_config() | {"high": 2.0}
    with pytest.raises(UserError, match=says):
        transform_from_config(replaced(config, path, new))


def test_an_input_that_is_not_a_number_has_no_density(gaussianized):
    x = torch.full((1, 1, 2, 2), math.nan)
    assert gaussianized(x).isnan().all() and gaussianized.log_det(x).isnan().all()
