"""Messages: names that are meant, what exceptions say, libraries that are not there."""

import pytest
from torch import nn

import torchcdm
from torchcdm.data import from_object
from torchcdm.errors import UserError, needed, reason
from torchcdm.training.fit import check_network


def test_the_reason_of_an_exception_is_one_line():
    assert reason(ValueError("\n first\nsecond")) == "first"
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert reason(AssertionError()) == "AssertionError"


def test_a_network_that_fails_without_a_word_is_refused():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError

    source = from_object([[float(k), -float(k)] for k in range(20)])
    with pytest.raises(UserError, match=r"does not take inputs of shape \(2, 2\) \(RuntimeError\)"):
        check_network(Failing(), source, levels=12)


def test_a_network_with_kinks_is_named_in_a_warning_at_the_call(recwarn):
    body = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))
    with pytest.raises(UserError, match="the network gives"):
        torchcdm.fit([[float(k), -float(k)] for k in range(20)], backbone=body, progress=False)
    (found,) = recwarn
    assert "module '1' is LeakyReLU, whose kinks make the denoiser jump: use nn.SiLU" in str(found.message)
    assert found.filename == __file__


def test_a_library_that_is_not_there_is_named_with_its_extra():
    assert needed("json", "hub", "this") is __import__("json")
    with pytest.raises(UserError, match=r"the page needs gradi0; pip install 'torchcdm\[app\]'"):
        needed("gradi0.blocks", "app", "the page")
