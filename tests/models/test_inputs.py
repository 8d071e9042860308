"""Python calls with any input: a right result, or UserError, ValueError or TypeError."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from oracles import MixtureClassifier, labelled_mixture, normal

from torchcdm.apps.anomaly import level_profile
from torchcdm.compose import sample
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss, DDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion, GuidedDenoiser
from torchcdm.models.inputs import as_labels
from torchcdm.networks.mlp import DDMMLP, MLP
from torchcdm.samplers import DDIM
from torchcdm.units import DataTransform

T = 12
SCHEDULE, TRANSFORM = UniformSigmaSchedule(T), DataTransform((2,))
EXACT = MixtureClassifier(labelled_mixture(), SCHEDULE, joint=True)
JOINT = ClassificationDiffusion(EXACT, SCHEDULE, TRANSFORM).eval()
CONTEXT = ClassificationDiffusion(MLP(2, levels=T + 2, width=8, depth=1, context=3), SCHEDULE, TRANSFORM).eval()
PLAIN = DenoisingDiffusion(DDMMLP(2, width=8, depth=1), SCHEDULE, TRANSFORM).eval()
GUIDED = GuidedDenoiser(JOINT, 1.0)
CLASSES = labelled_mixture().classes

many = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
     torch.complex64]
)  # fmt: skip
fills = st.sampled_from([0, 1, 2, -1, -2, CLASSES, 10**6, math.nan, math.inf, -math.inf, 1e38])


@st.composite
def tensors(draw, shape=shapes):
    value, dtype = draw(fills), draw(dtypes)
    if not dtype.is_floating_point and not dtype.is_complex and not (math.isfinite(value) and 0 <= value < 200):
        value = 1
    return torch.full(draw(shape), value).to(dtype)


anything = st.one_of(
    st.none(), st.integers(-3, 20), st.integers(), st.floats(), st.booleans(), st.text(max_size=3), tensors(),
    tensors(st.just((3,))), tensors(st.just((3, 2))), tensors(st.just((3, 3))),
    st.sampled_from([
        np.ma.masked_array(np.zeros((3, 2)), np.ones((3, 2))), np.array([["a", None]], dtype=object), [], [[]], {},
        torch.eye(3).to_sparse(), np.zeros((3, 2)), np.float64(1), np.int64(2), [1, 2, 3], [[1.0, 2], [3, 4], [5, 6]],
    ]),
)  # fmt: skip


def ends_well(call):
    """The call's result; None where it is refused."""
    try:
        return call()
    except (UserError, ValueError, TypeError):
        return None


@many
@given(st.sampled_from([JOINT, CONTEXT]), anything, anything, anything)
def test_log_prob_of_anything(model, x, t, y):
    found = ends_well(lambda: model.log_prob(x, t, y))
    assert found is None or (found.dtype == torch.float64 and found.ndim == 1 and not found.isnan().any())


@many
@given(st.sampled_from([JOINT, CONTEXT, PLAIN]), anything, anything)
def test_denoising_at_any_level_of_any_label(model, t, y):
    found = ends_well(lambda: model.denoise(normal(3, 2).float(), t, y).eps)
    assert found is None or (found.shape == (3, 2) and not found.isnan().any())


@many
@given(st.sampled_from([JOINT, CONTEXT, PLAIN, GUIDED]), anything)
def test_networks_are_given_no_other_inputs_than_they_take(model, x):
    calls = [lambda: model.denoise(x, 3, y=torch.tensor([1]) if model is GUIDED else None).eps]
    if model.density is not None:
        calls += [lambda: model.log_prob_levels(x), lambda: model.evaluate(x, 3).eps]
    for call in calls:
        found = ends_well(call)
        assert found is None or (isinstance(x, torch.Tensor) and len(found) == len(x))


@pytest.mark.parametrize("model", [CONTEXT, PLAIN])
def test_inputs_in_another_precision_than_the_network_are_refused(model):
    with pytest.raises(UserError, match="inputs are torch.float64; the network takes torch.float32"):
        model.denoise(normal(3, 2), 3)
    with torch.inference_mode():
        x = normal(3, 2).float()
    with pytest.raises(UserError, match="inference_mode"):
        model.denoise(x, 3)


def test_what_needs_no_gradient_is_told_under_inference_mode():
    x = normal(3, 2).float()
    with torch.inference_mode():
        inner = x * 1.0
        found = [JOINT.log_prob(same) for same in (x, inner, x.numpy())] + [JOINT.log_prob_levels(inner)[:, 0]]
        assert PLAIN.denoise(inner, 3).x0.shape == (3, 2) and level_profile(JOINT, inner).shape == (3, T + 2)
    for values in (*found, JOINT.log_prob(inner)):
        torch.testing.assert_close(values, JOINT.log_prob(x), check_dtype=False)


@many
@given(st.sampled_from([CDMLoss, DDMLoss]), anything, anything, anything)
def test_losses_of_anything(kind, y, t, eps):
    loss = kind(PLAIN if kind is DDMLoss else JOINT)
    found = ends_well(lambda: loss(normal(3, 2).float(), y, t, eps))
    assert found is None or found["loss"].shape == (3,)


@pytest.mark.parametrize(
    "wrong", [{"eps": torch.zeros(2)}, {"eps": torch.zeros(1, 2)}, {"eps": 3}, {"t": torch.tensor(3)}, {"t": 3}]
)
def test_noise_and_levels_of_a_loss_are_of_each_sample_and_not_broadcast(wrong):
    with pytest.raises(UserError, match=f"loss: .*{next(iter(wrong))} must be a tensor"):
        CDMLoss(JOINT)(normal(3, 2).float(), **wrong)


@many
@given(st.fixed_dictionaries({}, optional={
    "n": anything, "steps": anything, "y": anything, "guidance": anything, "seed": anything, "batch_size": anything,
    "shape": anything, "units": anything, "sampler": anything, "spacing": anything,
}))  # fmt: skip
def test_sampling_with_anything(options):
    if not isinstance(options.get("n"), int) or options["n"] < 50:
        found = ends_well(lambda: sample(JOINT, **({"n": 3, "steps": 2} | options)))
        assert found is None or found.shape[1:] == (2,)


@many
@given(st.one_of(st.integers(), tensors(), st.floats(), st.text(max_size=2)))
def test_a_schedule_has_its_levels_alone(t):
    found = ends_well(lambda: SCHEDULE.at(t, normal(3, 2)))
    levels = torch.as_tensor(t) if found is not None else torch.zeros(1)
    assert bool(((levels >= 0) & (levels <= T + 1)).all())


def test_levels_that_do_not_exist_are_refused_in_a_tensor_too():
    for wrong in (torch.tensor([-1]), torch.tensor([T + 2]), torch.tensor([0.0])):
        with pytest.raises(UserError, match="level"):
            SCHEDULE.at(wrong, normal(1, 2))


def test_levels_are_whole_numbers_of_any_width_and_no_truth_values():
    x = normal(3, 2).float()
    assert CDMLoss(JOINT)(x, t=torch.zeros(3, dtype=torch.int32), eps=x)["loss"].shape == (3,)
    assert torch.equal(JOINT.log_prob(x, np.int64(2)), JOINT.log_prob(x, 2))
    with pytest.raises(UserError, match="level is True"):
        JOINT.log_prob(x, True)


@pytest.mark.parametrize("y", [[0], [-1] * 4, [CLASSES] * 4, [0.0] * 4, [True] * 4, [[0]] * 4])
def test_labels_that_are_none_of_the_model_are_refused(y):
    x, y = normal(4, 2).float(), torch.tensor(y)
    calls = (JOINT.log_prob, JOINT.log_prob_levels)
    for call in (*(lambda call=call: call(x, y=y) for call in calls), lambda: JOINT.denoise(x, 3, y)):
        with pytest.raises(UserError, match="label|y has|y holds"):
            call()


def test_classes_go_by_the_names_that_the_model_knows(monkeypatch):
    x, names = normal(3, 2).float(), [f"kind {k}" for k in range(CLASSES)]
    with pytest.raises(UserError, match="y: no class 'kind 1'; the model knows no names of classes; give numbers"):
        JOINT.log_prob(x, y=["kind 1"] * 3)
    monkeypatch.setattr(JOINT, "info", SimpleNamespace(class_names=tuple(names)))
    expected = JOINT.log_prob(x, y=torch.tensor([1, 0, 1]))
    words = ["kind 1", "kind 0", "kind 1"]
    for same in (words, np.array(words), pd.Series(words, [2, 0, 1]), pd.Series(words, dtype="category")):
        assert torch.equal(JOINT.log_prob(x, y=same), expected)
    assert torch.equal(as_labels("kind 1", JOINT, 2, one_for_all=True), torch.tensor([1, 1]))
    assert torch.equal(as_labels(np.array(1), JOINT, 2, one_for_all=True), torch.tensor([1, 1]))
    with pytest.raises(UserError, match="y: not an array of numbers"):
        as_labels([[1], [1, 0]], JOINT, 2)
    with pytest.raises(UserError, match="y: no class 'kin 1'; did you mean 'kind 1'"):
        as_labels(["kind 0", "kin 1"], JOINT, 2)


def test_labels_of_a_data_frame_are_taken_in_their_order():
    x, y = normal(3, 2).float(), np.array([0, 1, 0])
    expected = JOINT.log_prob(x, y=torch.from_numpy(y))
    for same in (pd.Series(y, [1, 0, 2]), pd.Series(y, ["a", "b", "c"]), y.astype(np.uint16)):
        assert torch.equal(JOINT.log_prob(x, y=same), expected)


def test_half_precision_and_whole_numbers_are_read_exactly():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    for same in (x.half(), x.bfloat16(), x.long(), x.numpy(), x.tolist()):
        assert torch.allclose(JOINT.log_prob(same), JOINT.log_prob(x.double()), atol=1e-4)
    numbers = x.double().numpy()
    for same in (numbers[::-1][::-1], numbers[::-1].copy()[::-1], numbers.astype(">f8"), np.asfortranarray(numbers)):
        assert torch.equal(JOINT.log_prob(same), JOINT.log_prob(x.double()))
    for wrong, reason in ((x * math.nan, "not finite"), (x + 0j, "complex"), (x > 0, "bool"), (x[:0], "at least one")):
        with pytest.raises(UserError, match=reason):
            JOINT.log_prob(wrong)
    with pytest.raises(UserError, match="masked"):
        JOINT.log_prob(np.ma.masked_array(x.numpy(), x.numpy() > 2))


def test_numbers_that_float32_cannot_square_are_refused_or_have_no_density():
    x, y = normal(3, 2).float(), torch.zeros(3, 3)
    for call in (lambda: CONTEXT.log_prob(x, y=y + 1e25), lambda: CONTEXT.denoise(x, 0, y + 1e38)):
        with pytest.raises(UserError, match="y is .* beyond 1e"):
            call()
    assert CONTEXT.log_prob(x + 1e25, y=y).tolist() == [-math.inf] * 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"guidance": math.nan}, "guidance is nan|weight is nan"),
        ({"guidance": math.inf}, "guidance is inf|weight is inf"),
        ({"guidance": 1e30}, "weight is 1e"),
        ({"guidance": torch.zeros(3)}, "guidance is tensor"),
        ({"seed": 2**63}, "seed is"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"shape": (3,)}, "this model's samples are"),
        ({"shape": (2.5,)}, r"shape\[0\] is 2.5"),
    ],
)
def test_requests_for_samples_that_make_no_sense(options, reason):
    with pytest.raises(UserError, match=reason):
        sample(JOINT, 3, **({"steps": 2, "y": 0} | options))
    with pytest.raises(UserError, match="eta is nan"):
        DDIM(math.nan)


def test_derivatives_by_torch_func_pass_the_checks():
    x = normal(3, 2)
    rows = torch.func.vmap(torch.func.grad(lambda row: JOINT.log_prob(row[None])[0]))(x)
    z = x.clone().requires_grad_()
    assert torch.allclose(rows, torch.autograd.grad(JOINT.log_prob(z).sum(), z)[0], atol=1e-6)
