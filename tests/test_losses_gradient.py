"""The gradient of the squared error without a second derivative: what it is, what it keeps, and compiled."""

import functools
import shutil

import pytest
import torch
from torch import nn

from torchcdm import losses
from torchcdm.annealing.target import in_batches
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import CosineSchedule
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.networks.encoder import Encoder
from torchcdm.networks.mlp import MLP

T = 12


def some_loss(kind, dropout=0.0):
    """The loss of a network that has learned nothing, 20 samples for it and their classes."""
    schedule = CosineSchedule(T)
    torch.manual_seed(0)
    if kind == "images":
        backbone = Encoder(1, 4, T + 2, width=4, multipliers=(1, 2), blocks=1, energy_maps=2, dropout=dropout)
    else:
        backbone = MLP(2, T + 2, width=16, depth=1, energy_maps=4, classes=3, joint=True)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(20, 1, 4, 4) if kind == "images" else torch.randn(20, 2)
    y = None if kind == "images" else torch.arange(20) % 4
    base = GaussianMarginals.fit(3 * x + 1, schedule)
    return CDMLoss(ClassificationDiffusion(backbone, schedule, gaussian=base), label_dropout=0.0), x, y


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-6), (torch.float32, 2e-2)])
@pytest.mark.parametrize(("kind", "dropout"), [("vectors of a joint model", 0.0), ("images", 0.0), ("images", 0.5)])
@pytest.mark.parametrize("logits", [False, True], ids=["squared error alone", "with logits"])
def test_a_difference_has_the_gradient_of_two_derivatives(logits, kind, dropout, dtype, within, monkeypatch):
    loss, x, y = some_loss(kind, dropout)
    loss.time_weight, loss.logits_count = 1.0, logits
    loss.logits_share.fill_(logits)
    loss, x = loss.to(dtype), x.to(dtype)
    gradients, values, after = [], [], []
    for differences in (False, True):
        monkeypatch.setattr(losses, "differences_suffice", lambda x, answer=differences: answer)
        torch.manual_seed(1)
        loss.zero_grad()
        terms = loss(x, y, torch.arange(20) % (T + 2), x.flip(0))
        terms["loss"].mean().backward()
        given = (torch.zeros_like(p) if p.grad is None else p.grad for p in loss.model.backbone.parameters())
        gradients.append(torch.cat([gradient.flatten() for gradient in given]))
        values.append(terms["loss"].detach())
        after.append(torch.rand(()))
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() < within * gradients[0].norm()
    assert torch.allclose(values[1], values[0], rtol=1e-4)
    assert after[0] == after[1]  # the second pass has the first one's dropout, and takes no more random numbers


class Alive:
    """Stands for a tensor that a graph has saved; ``most`` counts those that were alive at a time."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Alive.now += 1
        Alive.most = max(Alive.most, Alive.now)

    def __del__(self):
        Alive.now -= 1


@pytest.mark.parametrize("logits", [False, True], ids=["squared error alone", "with logits"])
def test_differences_keep_one_pass_in_memory(logits):
    loss, x, y = some_loss("images")
    loss.logits_count = logits
    loss.logits_share.fill_(logits)
    t, kept = torch.arange(20) % (T + 2), []
    for run in (lambda: loss.model.corrections(x.clone().requires_grad_(), y), lambda: loss(x, y, t, x.flip(0))):
        Alive.now = Alive.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Alive, lambda alive: alive.tensor):
            terms = run()
        kept.append(Alive.most)
    assert 0 < kept[1] < 1.3 * kept[0]  # two passes at a time have twice as many
    assert Alive.now < 5  # nothing waits for the pass back
    terms["loss"].mean().backward()


def test_the_gradient_of_a_difference_is_that_of_the_whole_batch():
    loss, x, y = some_loss("images")
    terms = loss(x, y, torch.arange(20) % (T + 2), x.flip(0))
    with pytest.raises(UserError, match="weigh all samples alike"):
        terms["loss"][:10].sum().backward()


def test_squared_error_alone_leaves_biases_of_levels_where_they_are():
    # Adam would make whole steps of what rounding leaves of a gradient.
    loss, x, y = some_loss("images")
    loss.logits_count = False
    loss.logits_share.fill_(0)
    loss(x, y, torch.arange(20) % (T + 2), x.flip(0))["loss"].mean().backward()
    (bias,) = (p.grad for name, p in loss.model.named_parameters() if name.endswith("head.linear.bias"))
    assert not bias.any()


def test_differences_are_for_full_precision():
    x = torch.zeros(2, 3)
    assert losses.differences_suffice(x)
    assert not losses.differences_suffice(x.bfloat16())
    assert not losses.differences_suffice(x.to("meta"))  # not a CPU
    with torch.autocast("cpu", torch.bfloat16):
        assert not losses.differences_suffice(x)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not losses.differences_suffice(x) and losses.differences_suffice(x.double())
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def precisions():
    """PyTorch's settings of the precision of float32, as they are when it is imported afterwards."""
    yield torch.backends
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
        for kind in (torch.backends.cudnn, torch.backends.mkldnn):
            kind.conv.fp32_precision = kind.rnn.fp32_precision = "tf32" if kind is torch.backends.cudnn else "none"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def meanwhile(read, device, monkeypatch):
    """What ``read`` gives while likelihoods are computed, with the settings of a ``device`` that need not be there."""
    monkeypatch.setattr("torchcdm.annealing.target.reduced_precision", lambda _: losses.reduced_precision(device))
    (loss, x, _), found = some_loss("images"), []
    assert torch.equal(in_batches(loss.model, x, lambda rows: found.append(read()) or x[rows], len(x)), x)
    return found[0]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has one interface")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("path", ["all", "cuda.matmul", "cudnn.conv", "mkldnn.matmul"])
def test_precision_set_by_the_newer_interface_is_read_changed_and_given_back(path, device, precisions, monkeypatch):
    owner = precisions if path == "all" else functools.reduce(getattr, path.split("."), precisions)
    matmul, network = precisions.mkldnn.matmul, precisions.mkldnn
    if device == "cuda":
        matmul, network = precisions.cuda.matmul, precisions.cudnn

    def read():
        return [part.fp32_precision for part in (matmul, network.conv, network.rnn)]

    # Neither can be read by the older interface.
    owner.fp32_precision = "ieee" if path == "cudnn.conv" else "tf32"
    changed = read()
    assert not set(meanwhile(read, device, monkeypatch)) & {"tf32", "bf16"}
    assert read() == changed
    assert losses.differences_suffice(torch.zeros(2, 3)) == (path not in ("all", "mkldnn.matmul"))
    loss, x, y = some_loss("images")
    assert loss(x, y)["loss"].isfinite().all()
    if path == "all":  # what had its precision from all others has it from them again
        owner.fp32_precision = "ieee"
        assert set(read()) == {"ieee"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_set_by_the_older_interface_is_given_back(precision, device, precisions, monkeypatch):
    def read():
        return torch.get_float32_matmul_precision(), precisions.cudnn.allow_tf32

    torch.set_float32_matmul_precision(precision)
    before = read()
    assert meanwhile(read, device, monkeypatch) == ("highest", before[1] and device == "cpu")
    assert read() == before


def compilers():
    """aot_eager traces the step and its two derivatives; the other also writes and builds C++ for them."""
    builds = shutil.which("g++") or shutil.which("clang++")
    missing = pytest.mark.skipif(not builds, reason="there is no C++ compiler")
    return ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, missing])]


@pytest.mark.parametrize("backend", compilers())
@pytest.mark.parametrize("kind", ["vectors of a joint model", pytest.param("images", marks=pytest.mark.slow)])
def test_compiled_whole_it_has_the_gradient_of_eager(kind, backend, monkeypatch):
    # Compiled it differentiates twice, as does eager here: what differences leave is seen in a test of its own.
    monkeypatch.setattr(losses, "differences_suffice", lambda x: False)
    loss, x, y = some_loss(kind)
    backbone = loss.model.backbone
    torch.compiler.reset()
    gradients = []
    for step in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        backbone.zero_grad()
        step(x, y, torch.arange(20) % (T + 2), x.flip(0))["loss"].mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()]))
    eager, compiled = gradients
    assert (compiled - eager).norm() < 1e-5 * eager.norm()
