"""Messages: names that are meant, what exceptions say, libraries that are not there."""

import pytest
import torch
from torch import nn

import torchcdm
import torchcdm.training.fit as fitting
from torchcdm.data import from_object
from torchcdm.errors import UserError, needed, reason, warn
from torchcdm.networks.heads import CumulativeHead
from torchcdm.training.fit import check_network


def test_the_reason_of_an_exception_is_one_line():
    assert reason(ValueError("\n first\nsecond")) == "first"
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert reason(AssertionError()) == "AssertionError"


def test_a_warning_points_at_the_line_of_the_user():
    with pytest.warns(UserWarning, match="of two rows") as seen:
        torch.no_grad()(warn)("of two rows")
    assert [found.filename for found in seen] == [__file__]


def test_a_network_that_fails_without_a_word_is_refused():
    class Failing(nn.Linear):
        def forward(self, x):
            raise RuntimeError

    source = from_object([[float(k), -float(k)] for k in range(20)])
    with pytest.raises(UserError, match=r"does not take inputs of shape \(2, 2\) \(RuntimeError\)"):
        check_network(Failing(2, 12), source, levels=12)


def test_a_network_without_gradient_in_its_input_is_refused():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    source = from_object([[float(k), -float(k)] for k in range(20)])
    with pytest.raises(UserError, match="has no gradient in its input"):
        check_network(Detached(2, 12), source, levels=12)


class Activated(nn.Module):
    """Two layers with a head that is zero at first; the scale is positive, whatever its weight."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(2, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(()))
        self.drop, self.head, self.activation = nn.Dropout(0.5), CumulativeHead(4, 102), activation

    def forward(self, x):
        x = self.drop(self.activation(self.first(x)))
        return self.head(nn.functional.silu(self.second(x)) * nn.functional.relu(self.scale))


KINKED = {
    nn.ReLU(): "Relu", nn.functional.relu: "Relu", torch.relu_: "Relu", nn.LeakyReLU(): "LeakyRelu",
    nn.functional.relu6: "Hardtanh", nn.PReLU(): "PreluKernel", nn.RReLU(): "RreluWithNoise",
}  # fmt: skip


@pytest.mark.parametrize("activation", KINKED)
def test_a_network_with_kinks_is_warned_of_at_the_call(recwarn, monkeypatch, activation):
    monkeypatch.setattr(fitting, "trained", lambda *_, **__: None)
    torchcdm.fit([[float(k), -float(k)] for k in range(20)], backbone=Activated(activation), progress=False)
    (found,) = recwarn
    assert f"has a {KINKED[activation]}, whose kinks make the denoiser jump: use nn.SiLU" in str(found.message)
    assert found.filename == __file__


SMOOTH = (nn.functional.silu, nn.GELU(), torch.tanh, nn.Softplus(), lambda x: x / x.norm())


@pytest.mark.parametrize("activation", SMOOTH)
def test_a_smooth_network_is_not_warned_of(recwarn, activation):
    network, source = Activated(activation), from_object([[float(k), -float(k)] for k in range(20)])
    check_network(network, source, levels=102)
    assert not len(recwarn) and network.drop.training and all(p.requires_grad for p in network.parameters())


def test_a_library_that_is_not_there_is_named_with_its_extra():
    assert needed("json", "hub", "this") is __import__("json")
    with pytest.raises(UserError, match=r"the page needs gradi0; pip install 'torchcdm\[app\]'"):
        needed("gradi0.blocks", "app", "the page")
