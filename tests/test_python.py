"""What Python users expect of a model: its methods, a network of one's own, a distribution, export."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import torchcdm
from torchcdm import compose
from torchcdm.diffusion.schedules import NoiseSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import GuidedDenoiser
from torchcdm.networks.heads import CumulativeHead, JointHead
from torchcdm.networks.mlp import MLP
from torchcdm.units import DataTransform

TINY = {"steps": 20, "progress": False, "device": "cpu"}


def network(levels=32, features=3):
    return nn.Sequential(nn.Linear(features, 16), nn.SiLU(), CumulativeHead(16, levels, "data"))


def points(n=200, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


class WithClasses(nn.Module):
    """One of a user's own that is told the class, or gives all of them."""

    def __init__(self, classes, joint):
        super().__init__()
        self.classes, self.joint = classes, joint
        self.layer, self.label = nn.Linear(3, 16), nn.Embedding(classes + 1, 16)
        self.head = JointHead(16, 32, classes) if joint else CumulativeHead(16, 32)

    def forward(self, x, y=None):
        label = 0 if self.joint else self.label(torch.full((len(x),), self.classes) if y is None else y)
        return self.head(nn.functional.silu(self.layer(x) + label))


# --- methods of a model ------------------------------------------------------------------------------------------


def test_sample_and_save_are_the_functions_of_the_package(tmp_path):
    model = torchcdm.load("zoo:two-moons")
    x = model.sample(5, steps=4, seed=3)
    assert torch.equal(x, torchcdm.sample(model, 5, steps=4, seed=3))
    model.save(tmp_path / "moons")
    again = torchcdm.load(tmp_path / "moons")
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    assert again.info.selected == model.info.selected
    model.save(tmp_path / "moons")  # a model is replaced


def test_a_training_is_not_overwritten(tmp_path):
    (tmp_path / "run" / "state" / "step-5").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a training"):
        torchcdm.load("zoo:two-moons").save(tmp_path / "run")


def test_densities_made_of_models_are_neither_saved_nor_trained(tmp_path):
    model = torchcdm.load("zoo:digits-conditional")
    tilted = compose.tilted(model, lambda x: x.flatten(1).sum(1))
    for made in (compose.any_of(model, [2, 7]), tilted, GuidedDenoiser(model, 1.0)):
        for use in (lambda one: torchcdm.save(one, tmp_path / "made"), lambda one: torchcdm.train(one, "digits")):
            with pytest.raises(UserError, match=f"^{type(made).__name__} has no network of its own; train and save"):
                use(made)


def test_a_distribution_of_pytorch():
    model = torchcdm.load("zoo:two-moons")
    p = model.distribution(steps=5)
    assert isinstance(p, torch.distributions.Distribution)
    assert (p.event_shape, p.batch_shape) == ((2,), ())
    torch.manual_seed(0)
    x = p.sample((2, 3))
    assert x.shape == (2, 3, 2)
    assert torch.equal(p.log_prob(x).flatten(), model.log_prob(x.reshape(6, 2)))
    assert p.log_prob(x[0, 0]).shape == ()
    assert p.sample().shape == (2,)
    torch.manual_seed(0)
    assert torch.equal(p.sample((2, 3)), x)
    x.requires_grad_()
    assert torch.autograd.grad(p.log_prob(x).sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("shape", [(), (4,), (2, 6), (3, 1)])
def test_a_distribution_refuses_values_of_another_shape(shape):
    p = labelled().distribution()
    assert p.log_prob(torch.zeros(3)).shape == () and p.log_prob(torch.zeros(2, 5, 3)).shape == (2, 5)
    with pytest.raises(UserError, match="inputs have shape"):
        p.log_prob(torch.zeros(shape))


@pytest.mark.parametrize("mass", [90, -0.1, float("nan")])
def test_an_interval_has_a_share_of_the_mass(mass):
    drawn = labelled().sample(4, steps=2, details=True)
    assert (drawn.interval(0.5)[0] <= drawn.interval(0.5)[1]).all()
    with pytest.raises(UserError, match="Draws: mass is"):
        drawn.interval(mass)


def test_a_distribution_given_the_class():
    x, y = points(), torch.arange(200) % 3
    model = torchcdm.fit(x, y, backbone=WithClasses(3, joint=True), model={"schedule": {"T": 30}}, **TINY)
    p = model.distribution(y=1, steps=3)
    assert torch.equal(p.log_prob(x[:4]), model.log_prob(x[:4], y=torch.ones(4, dtype=torch.long)))
    assert p.sample((2,)).shape == (2, 3)
    with pytest.raises(UserError, match="label 3 is out of range"):
        model.distribution(y=3)
    with pytest.raises(UserError, match="without classes"):
        torchcdm.load("zoo:two-moons").distribution(y=0)


def test_a_distribution_and_the_mean_of_a_table_are_of_its_codes():
    model = torchcdm.load("zoo:table-example")
    p = model.distribution(steps=3)
    torch.manual_seed(0)
    x = p.sample((2, 3))
    assert x.shape == (2, 3, *model.shape) and p.log_prob(x).shape == (2, 3)
    drawn = model.sample(4, steps=3, details=True, units="codes")
    torch.testing.assert_close(drawn.mean(), drawn.x.mean(0))
    for ask in (model.sample(4, steps=3, details=True).mean, model.sample(4, particles=8, details=True).interval):
        with pytest.raises(UserError, match="draw them with units='codes'"):
            ask()


def labelled():
    """A model that takes its classes as an input, untrained."""
    net = MLP(3, levels=12, width=8, depth=1, classes=4)
    torch.nn.init.normal_(net.head.linear.weight)
    return ClassificationDiffusion(net, UniformSigmaSchedule(10), DataTransform((3,))).eval()


@pytest.mark.parametrize("name", ["two-moons", "digits", "embedded labels"])
def test_log_prob_is_exported(name):
    model = labelled() if name == "embedded labels" else torchcdm.load(f"zoo:{name}")

    class LogProb(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.log_prob(x)

    x = model.sample(4, steps=2)
    sizes = {"x": {0: torch.export.Dim("n", min=1, max=4096)}}
    exported = torch.export.export(LogProb(), (x,), dynamic_shapes=sizes, strict=False).module()
    many = torch.cat([x, x.flip(0), x])
    torch.testing.assert_close(exported(many), model.log_prob(many))


# --- networks of one's own ---------------------------------------------------------------------------------------


def test_fit_with_a_network_of_ones_own_and_load_it_in_a_new_process(tmp_path):
    mine = network()
    model = torchcdm.fit(points(), backbone=mine, model={"schedule": {"T": 30}}, out=tmp_path / "run", **TINY)
    assert model.backbone is mine
    model.save(tmp_path / "kept")
    torch.save(model.log_prob(points(5, 1)), tmp_path / "expected.pt")
    code = f"""
import torch, torchcdm
from torch import nn
from torchcdm.networks.heads import CumulativeHead
net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), CumulativeHead(16, 32, "data"))
x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
for name in ("run", "kept"):
    model = torchcdm.load({str(tmp_path)!r} + "/" + name, backbone=net)
    assert torch.equal(model.log_prob(x), torch.load({str(tmp_path)!r} + "/expected.pt"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_saved_network_of_ones_own_must_be_given(tmp_path, capsys):
    from torchcdm.cli import main

    model = torchcdm.fit(points(), backbone=network(), model={"schedule": {"T": 30}}, **TINY)
    model.save(tmp_path / "kept")
    with pytest.raises(UserError, match="backbone=module"):
        torchcdm.load(tmp_path / "kept")
    assert main(["sample", str(tmp_path / "kept"), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="0.weight is .* in the model; give the trained Sequential"):
        torchcdm.load(tmp_path / "kept", backbone=nn.Sequential(nn.Linear(3, 8), nn.SiLU(), CumulativeHead(8, 32)))
    with pytest.raises(UserError, match="missing in the model; give the trained Sequential"):
        torchcdm.load(tmp_path / "kept", backbone=network)
    assert main(["info", str(tmp_path / "kept")]) == 0
    told, count = capsys.readouterr().out, sum(part.numel() for part in network().parameters())
    assert f"custom, {count} parameters" in told and "Sequential, for torchcdm.load(path, backbone=module)" in told
    with pytest.raises(UserError, match="leave backbone out"):
        torchcdm.load("zoo:two-moons", backbone=network())


CODE = """
import torch
from torch import nn
from torchcdm.networks.heads import CumulativeHead

open("ran", "a").write("x")
number = 3

def make():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), CumulativeHead(16, 32, "data"))
"""


def test_code_that_a_run_names_is_run_for_those_who_trust_it(tmp_path, monkeypatch):
    import torchcdm.training.checkpoint as checkpoint

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    model = torchcdm.fit(points(), backbone="mine.py:make", model={"schedule": {"T": 30}}, out="run", **TINY)
    model.save("kept")
    (tmp_path / "ran").unlink()
    for name in ("run", "kept"):
        with pytest.raises(UserError, match="trust_code=True, which runs mine.py:make"):
            torchcdm.load(name)
    assert not (tmp_path / "ran").exists()
    x = points(5, 1)
    assert torch.equal(torchcdm.load("kept", trust_code=True).log_prob(x), model.log_prob(x))
    assert (tmp_path / "ran").read_text() == "x"
    monkeypatch.setattr(checkpoint, "located", lambda run: tmp_path / "kept")
    with pytest.raises(UserError, match="no code is run for hub:"):
        torchcdm.load("hub:someone/else", trust_code=True)
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("mine.make", "write FILE.py:NAME"),
        ("other.py:make", "other.py: no such file"),
        ("mine.py:number", "number\\(\\) must give a torch.nn.Module"),
        ("mine.py:nothing", "nothing\\(\\) must give a torch.nn.Module"),
    ],
)
def test_code_that_is_not_there_is_one_line(code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    with pytest.raises(UserError, match=message):
        torchcdm.fit(points(), backbone=code, **TINY)


class Tied(nn.Module):
    """One of two layers with the same weights, buffers that are views, infinite or complex."""

    def __init__(self):
        super().__init__()
        self.into, self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight, self.head = self.first.weight, CumulativeHead(16, 32)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("row", self.mask[0])
        self.register_buffer("turn", torch.ones(2, dtype=torch.complex64))

    def forward(self, x):
        return self.head(self.second(nn.functional.silu(self.first(self.into(x)))))


def test_a_network_of_ones_own_is_trained_on(tmp_path):
    how = {"out": tmp_path / "run", "progress": False, "sampling": {"n": 0}}
    torchcdm.fit(points(), backbone=network(102), steps=4, **how)
    with pytest.raises(UserError, match=r"already holds a run; go on with --resume \(resume=True\)"):
        torchcdm.fit(points(), backbone=network(102), steps=6, **how)
    model = torchcdm.fit(points(), backbone=network(102), steps=6, resume=True, **how)
    assert model.info.preset == "mlp" and (tmp_path / "run" / "state" / "step-6").is_dir()
    with pytest.raises(UserError, match="its data have changed"):
        torchcdm.fit(points() + 1, backbone=network(102), steps=8, resume=True, **how)
    with pytest.raises(UserError, match="resume goes on in the folder of a run; give it as out"):
        torchcdm.fit(points(), backbone=network(102), resume=True)
    made = torchcdm.ClassificationDiffusion(network(12), UniformSigmaSchedule(10))
    for steps in (3, 5):
        torchcdm.train(made, points(), steps=steps, out=tmp_path / "made", resume=True, progress=False)
    assert (tmp_path / "made" / "state" / "step-5").is_dir()


def test_a_network_with_tied_weights_and_a_mask_of_minus_infinity(tmp_path):
    model = torchcdm.fit(points(), backbone=Tied(), model={"schedule": {"T": 30}}, out=tmp_path / "run", **TINY)
    again = torchcdm.load(tmp_path / "run", backbone=Tied())
    assert torch.equal(again.log_prob(points(5)), model.log_prob(points(5)))
    assert again.backbone.first.weight is again.backbone.second.weight


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_networks_of_other_precisions(half, tmp_path):
    model = {"schedule": {"T": 30}}
    fitted = torchcdm.fit(points(), backbone=network().double(), model=model, out=tmp_path / "run", **TINY)
    x = points(5).double()
    assert fitted.log_prob(x).dtype == fitted.sample(2, steps=2).dtype == torch.float64
    again = torchcdm.load(tmp_path / "run", backbone=network().double())
    assert torch.equal(again.log_prob(x), fitted.log_prob(x))
    with pytest.raises(UserError, match=f"weights are {half}; train network.float\\(\\)"):
        torchcdm.fit(points(), backbone=network().to(half), model=model, **TINY)


def test_a_default_of_float64(request):
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    x = points().numpy()
    for kind in ("cdm", "ddm"):
        assert torchcdm.fit(x, model={"kind": kind}, **TINY).sample(2, steps=2).dtype == torch.float64
    assert torchcdm.estimators.CDMDensity(steps=2, device="cpu").fit(x).score_samples(x).dtype == "float64"
    assert torchcdm.DensityRatio(steps=2, device="cpu").fit(x, x + 1).log_ratio(x).shape == (200,)
    assert torchcdm.mutual_information(x[:, :1], x[:, 1:], steps=2).value < 0.2


@pytest.mark.parametrize("joint", [False, True])
def test_a_network_with_classes(joint, tmp_path):
    x, y = points(), torch.arange(200) % 3
    settings = {"labels": "joint" if joint else "input", "schedule": {"T": 30}}  # as the network says
    model = torchcdm.fit(x, y, backbone=WithClasses(3, joint), model=settings, **TINY)
    assert (model.classes, model.joint) == (3, joint)
    model.save(tmp_path / "kept")
    again = torchcdm.load(tmp_path / "kept", backbone=WithClasses(3, joint))
    assert torch.equal(again.log_prob(x[:6], y=y[:6]), model.log_prob(x[:6], y=y[:6]))


def test_training_takes_the_frequencies_of_the_classes():
    x, y = points(100), torch.arange(100) % 10 // 9  # one in ten
    model = torchcdm.ClassificationDiffusion(WithClasses(2, joint=True), UniformSigmaSchedule(30))
    torchcdm.train(model, x, y, **TINY)
    assert model.log_class_prior.exp()[1] == pytest.approx(0.1, abs=0.03)


def test_train_a_model_that_was_made_by_hand(tmp_path):
    model = torchcdm.ClassificationDiffusion(network(52), UniformSigmaSchedule(50))
    with pytest.raises(UserError, match="no transform"):
        model.save(tmp_path / "x")
    trained = torchcdm.train(model, 5 + 2 * points(), **TINY)
    assert trained is model
    assert not model.training
    assert model.transform.shape == (3,)
    x = points(4, 2)
    value = model.log_prob(x)
    model.save(tmp_path / "kept")
    again = torchcdm.load(tmp_path / "kept", backbone=network(52))
    assert torch.equal(again.log_prob(x), value)
    assert type(again.schedule) is UniformSigmaSchedule
    more = torchcdm.train(again, 5 + 2 * points(), **TINY)  # a loaded one goes on
    assert more is again and more.log_prob(x).isfinite().all()


def test_a_model_made_by_hand_is_saved_untrained(tmp_path):
    transform = DataTransform((3,))
    model = torchcdm.ClassificationDiffusion(network(52), UniformSigmaSchedule(50), transform).eval()
    model.save(tmp_path / "kept")
    again = torchcdm.load(tmp_path / "kept", backbone=network(52))
    assert torch.equal(again.log_prob(points(4)), model.log_prob(points(4)))


class Weightless(nn.Module):
    """A known density: a network without weights."""

    def forward(self, x):
        return -x.square().sum(1, keepdim=True) / torch.arange(2.0, 54)


class Quadratic(NoiseSchedule):
    """One that no setting makes."""

    def inner_levels(self, t):
        sigma = (t / (len(t) + 1)) ** 2
        return (1 - sigma**2).sqrt(), sigma


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torchcdm.fit(points(), backbone=network(30), **TINY), "gives \\(2, 30\\) .* \\(2, 102\\) is needed"),
        (lambda: torchcdm.fit(points(), backbone=network(features=4), **TINY), "does not take inputs of shape"),
        (lambda: torchcdm.fit(points(), backbone=nn.Sequential(nn.BatchNorm1d(3)), **TINY), "mixes samples"),
        (lambda: torchcdm.fit(points(), backbone=WithClasses(3, True), **TINY), "3 classes and the data none"),
        (
            lambda: torchcdm.fit(points(), backbone=network(52), model={"labels": "joint"}, **TINY),
            "model.labels is joint, but the network given has none; set its attributes classes and joint",
        ),
        (
            lambda: torchcdm.fit(points(), backbone=WithClasses(3, True), model={"labels": "input"}, **TINY),
            "model.labels is input, but the network given has joint",
        ),
        (
            lambda: torchcdm.fit(points(), backbone=network(52), model={"backbone": {"width": 8}}, **TINY),
            "model.backbone has no effect on a network of your own",
        ),
        (
            lambda: torchcdm.fit(points(), backbone=network(52), model={"kind": "ddm"}, **TINY),
            "model.kind is ddm, whose network is not a classifier .*; torchcdm.train.torchcdm.DenoisingDiffusion",
        ),
        (lambda: torchcdm.fit(points(), backbone=Weightless(), **TINY), "the network has no weights to train"),
        (
            lambda: torchcdm.fit(points(), backbone=network(52).requires_grad_(False), **TINY),
            r"no weights to train; give it some, or call network.requires_grad_\(True\)",
        ),
        (
            lambda: torchcdm.train(torchcdm.ClassificationDiffusion(Weightless(), UniformSigmaSchedule(50)), points()),
            "the network has no weights to train",
        ),
        (lambda: torchcdm.load(None), "NoneType names no model; give the folder of a run, zoo:NAME or hub:OWNER"),
        (
            lambda: torchcdm.train(torchcdm.ClassificationDiffusion(network(52), Quadratic(50)), points(), **TINY),
            "Quadratic: no setting makes this schedule",
        ),
        (
            lambda: torchcdm.train(torchcdm.load("zoo:two-moons"), points(), **TINY),
            "the data have shape \\(3,\\); the model takes \\(2,\\)",
        ),
        (
            lambda: torchcdm.train(torchcdm.load("zoo:two-moons"), points(), model={"kind": "ddm"}, **TINY),
            "the model is made already",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
