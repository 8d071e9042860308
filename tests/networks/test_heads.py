"""Heads: which levels an output reaches, smoothness over levels, precision, and learning speed against T."""

import pytest
import torch

from torchcdm.errors import UserError
from torchcdm.networks.heads import CumulativeHead, JointHead, make_head


def randomised(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in head.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return head


@pytest.mark.parametrize("direction, reached", [("noise", [0, 1, 2, 3]), ("data", [3, 4, 5, 6, 7])])
def test_an_increment_moves_all_levels_on_its_side(direction, reached):
    head = randomised(CumulativeHead(5, 8, direction)).double()
    features = torch.randn(1, 5, dtype=torch.float64)
    before = head(features)
    head.linear.bias.data[3] += 1
    change = (head(features) - before)[0]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[reached] = change[reached[0]]
    assert change[reached[0]] > 0
    torch.testing.assert_close(change, expected)


def test_noise_end_is_fixed_and_heads_start_at_zero():
    features = torch.randn(3, 5)
    assert randomised(CumulativeHead(5, 9))(features)[:, -1].abs().max() == 0
    assert randomised(JointHead(5, 9, classes=3))(features)[:, :, -1].abs().max() == 0
    for head in (CumulativeHead(5, 9), JointHead(5, 9, 3), JointHead(5, 9, 200)):
        assert head(features).abs().max() == 0
    assert CumulativeHead(5, 9, "data")(features).abs().max() > 0


def test_class_effects_are_smooth_and_apart_from_the_common_part():
    head = randomised(JointHead(5, 32 * 31 + 2, classes=3)).double()
    features = torch.randn(2, 5, dtype=torch.float64)
    between = head(features)[:, 1:] - head(features)[:, :1]
    # The sum of a straight line between two of 32 knots is a parabola, up to the rounding of sums of a thousand terms.
    bends = between.diff(dim=2, n=3).abs()
    assert (bends > 1e-9).sum(2).max() <= 3 * 31 and bends.max() > 1e-6
    randomised(head.common, seed=1)
    torch.testing.assert_close(head(features)[:, 1:] - head(features)[:, :1], between)


@pytest.mark.parametrize("build", [
    lambda levels: CumulativeHead(6, levels),
    lambda levels: JointHead(6, levels, classes=2),
])  # fmt: skip
def test_adam_learns_equally_fast_for_every_number_of_levels(build):
    features = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    progress = {}
    for levels in (52, 802):
        head = build(levels)
        optimiser = torch.optim.Adam(head.parameters(), 1e-4)
        target = features[:, :1] * (1 - torch.linspace(0, 1, levels))
        for _ in range(12):
            h = head(features)
            loss = ((h if h.ndim == 2 else h[:, 0]) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        progress[levels] = loss.item() / target.square().mean().item()
    assert 0.5 < progress[52] < 0.95
    assert progress[52] == pytest.approx(progress[802], rel=0.005)


def test_autocast_and_half_precision_compute_in_float32():
    head = randomised(CumulativeHead(64, 1002))
    joint = randomised(JointHead(64, 52, classes=100))
    features = torch.randn(3, 64).bfloat16()
    for module in (head, joint):
        exact = module.double()(features.double()).float()
        module.float()
        with torch.autocast("cpu", torch.bfloat16):
            h = module(features)
        assert h.dtype == torch.float32
        torch.testing.assert_close(h, exact, rtol=1e-4, atol=1e-2)
        assert module.bfloat16()(features).dtype == torch.float32


@pytest.mark.parametrize("build, message", [
    (lambda: CumulativeHead(4, 9, "nosie"), "did you mean 'noise'"),
    (lambda: CumulativeHead(4, 2), "levels is 2; it must be at least 3"),
    (lambda: JointHead(4, 9, classes=1), "at least 2"),
    (lambda: make_head(4, 9, None, joint=True), "number of classes"),
])  # fmt: skip
def test_mistakes_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
