"""Configuration: presets, precedence, strictness, and the objects that names become."""

import inspect
import math
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from torchcdm.errors import UserError
from torchcdm.training.build import build_backbone, build_model, build_schedule, resolve
from torchcdm.training.config_files import (
    differences,
    file_fields,
    flag_fields,
    make_config,
    merge,
    preset_about,
    preset_fields,
    preset_names,
    to_yaml,
)
from torchcdm.training.optimizers import learning_rate, share_done
from torchcdm.training.settings import BACKBONES, NETWORKS, SCHEDULE_SETTINGS, Config, ModelConfig
from torchcdm.units import DataTransform


def preset(name, *flags):
    return make_config(preset_fields(name), flag_fields(flags))


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_yaml(tmp_path, name):
    config = preset(name)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert make_config(file_fields(file)) == config
    assert config.preset == name and preset_about(name)["description"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"trian": {}}, "unknown field 'trian'; did you mean 'train'"),
        ({"train": {"stesp": 5}}, "unknown field 'train.stesp'; did you mean 'steps'"),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; it must be a valid integer"),
        ({"train": {"steps": 2.5}}, "train.steps is 2.5; it must be a valid integer"),
        ({"train": {"steps": True}}, "train.steps is True; it must be a valid integer"),
        ({"train": {"steps": 0}}, "train.steps is 0; it must be at least 1"),
        ({"train": {"lr": "fast"}}, "train.lr is 'fast'; it must be a valid number"),
        ({"train": {"lr": -1}}, "train.lr is -1; it must be greater than 0"),
        ({"train": {"lr": 1e39}}, "train.lr is 1e\\+39; it must be at most 1000"),
        ({"train": {"decay": "cosin"}}, "train.decay is 'cosin'; did you mean 'cosine'"),
        ({"train": 5}, "train is 5; it must be a dictionary"),
        ({"data": {"flip": "maybe"}}, "data.flip is 'maybe'; it must be true or false"),
        ({"data": {"size": [32]}}, r"data.size is \[32\]; it must have at least 2 items"),
        ({"data": {"size": 32}}, r"data.size is 32; it must be a valid list such as \[1, 2\]"),
        ({"model": {"backbone": "encodr"}}, "model.backbone.name is 'encodr'; did you mean 'encoder'"),
        ({"model": {"backbone": {"depth": 3}}}, "unknown field 'model.backbone.depth'"),
        ({"model": {"schedule": {"name": "uniform_sigma"}}}, "did you mean 'uniform-sigma'"),
        ({"model": {"backbone": {"multipliers": [1, "x"]}}}, r"model.backbone.multipliers\[1\] is 'x'"),
        ({"model": {"components": 3, "form": "diagonal"}}, "above 1 form is full for vectors, cosine for images"),
        ({"model": {"components": 3, "form": "full"}}, "components is 3; above 1 form is full for vectors, cosine"),
        ({"model": {"components": 3, "form": "cosine", "backbone": "mlp"}}, "components is 3; above 1 form is full"),
    ],
)
def test_mistakes_are_named_by_path_with_the_nearest_name(layer, message):
    with pytest.raises(UserError, match=message):
        make_config(layer)


def test_the_strongest_layer_wins(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: digits\ntrain: {lr: 5e-4, batch_size: 64}\n")
    config = make_config(file_fields(file), flag_fields([("train.batch_size", "32")]))
    defaults, parent = Config(), preset("digits")
    assert config.train.grad_clip == defaults.train.grad_clip
    assert config.train.steps == parent.train.steps != defaults.train.steps
    assert config.train.lr == 5e-4  # YAML reads a text here
    assert config.train.batch_size == 32
    assert config.preset == "digits"
    file.write_text("preset: digits\ntrain: {lr: 5e-4, batch_size: 32}\n")
    assert make_config(file_fields(file)) == config, "a file that names its preset builds on it"
    file.write_text(to_yaml(replace(config, preset="gone")))
    assert make_config(file_fields(file)).preset == "gone", "one of a run has all that it needs"
    file.write_text("preset: digits\ndata: {}\nmodel: {}\nloss: {}\ntrain: {lr: 5e-4}\nsampling: {}\nreport: {}\n")
    assert make_config(file_fields(file)).train.steps == parent.train.steps
    assert file_fields(file, alone=True)["train"] == {"lr": 5e-4}, "what is laid on a run that goes on"


def test_a_part_of_another_name_starts_from_its_own_defaults():
    config = preset("digits", ("model.backbone", "mlp"), ("model.backbone.depth", "2"))
    assert config.model.backbone.name == "mlp" and config.model.backbone.depth == 2
    assert config.model.backbone.dropout == 0.0  # not the encoder's
    for order in (1, -1):
        flags = [("model.schedule", "cosine"), ("model.schedule.T", "50")][::order]
        schedule = preset("digits", *flags).model.schedule
        assert schedule.name == "cosine"
        levels = 50 if order == 1 else SCHEDULE_SETTINGS["cosine"]().T
        assert levels == schedule.T
    same = preset("digits", ("model.backbone", "encoder"), ("model.backbone.width", "8"))
    assert same.model.backbone.width == 8 and same.model.backbone.multipliers == (1, 2)


def test_flags_are_yaml_values():
    flags = [("data.size", "[8, 6]"), ("train.grad_clip", "null"), ("data.flip", "true"), ("train.lr", "1e-4")]
    config = preset("digits", *flags)
    assert config.data.size == (8, 6) and config.train.grad_clip is None
    assert config.data.flip is True and config.train.lr == 1e-4
    for text in ("1E-4", "+.1e-3", "1.e-4", "0.0001"):
        assert preset("digits", ("train.lr", text), ("train.steps", "2e3")).train.lr == 1e-4
    with pytest.raises(UserError, match="train.lr is '1e-4'; it must be a valid number"):
        make_config({"train": {"lr": "1e-4"}})


@pytest.mark.parametrize("text", ["010", "1:30", "1:30.0", "0x10"])
def test_numbers_are_read_as_they_look(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"train: {{steps: {text}}}")
    for layer in (lambda: flag_fields([("train.steps", text)]), lambda: file_fields(tmp_path / "c.yaml")):
        with pytest.raises(UserError, match=f"train.steps is '{text}'; it must be a valid integer"):
            make_config(layer())


def test_file_mistakes(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1,\n  b: 2")
    with pytest.raises(UserError, match=f"{broken}, line 2: not valid YAML") as caught:
        file_fields(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nothing.yaml: no such file"):
        file_fields(tmp_path / "nothing.yaml")
    broken.write_text("just text")
    with pytest.raises(UserError, match="holds fields with values"):
        file_fields(broken)
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        preset_fields("cifar")


def test_merge_and_differences():
    a = {"x": 1, "part": {"name": "one", "size": 2}, "same": 0}
    b = merge(a, {"part": {"size": 3}, "y": None})
    assert b == {"x": 1, "part": {"name": "one", "size": 3}, "same": 0, "y": None}
    assert a["part"]["size"] == 2
    assert differences(a, b) == [("part.size", 2, 3)]


# --- the paper's runs ------------------------------------------------------------------------------------------


def test_the_papers_settings():
    # As published (arXiv 2402.10095).
    schedules = {
        "cifar10": ("linear", 1000),
        "cifar10-uniform": ("uniform-sigma", 1000),
        "cifar10-ot": ("optimal-transport", 999),
        "cifar10-conditional": ("linear", 1000),
        "celeba64": ("linear", 1000),
    }
    rates = {"cifar10": 2e-4, "cifar10-conditional": 2e-4}
    for name, (schedule, T) in schedules.items():
        config = preset(name)
        model, train, net = config.model, config.train, config.model.backbone
        celeba = name == "celeba64"
        assert (model.schedule.name, model.schedule.T, model.gaussian) == (schedule, T, False)
        assert net.name == "unet" and net.channels == 128 and net.blocks == 2 and net.dropout == 0.1
        assert net.multipliers == ((1, 2, 2, 2, 4) if celeba else (1, 2, 2, 2)) and net.attention == (16,)
        assert net.direction == "data"
        assert math.isclose(config.loss.ce_weight, 0.001 * (3 * 64 * 64 if celeba else 3 * 32 * 32))
        assert (train.optimizer, train.weight_decay, train.batch_size) == ("adamw", 0, 128)
        assert train.lr == rates.get(name, 1e-4) and train.warmup == 5000 and train.ema_decay == 0.9999
        assert train.steps == (1_000_000 if name == "cifar10-ot" else 500_000)
        assert config.data.flip and not config.data.dequantize
        assert model.labels == ("input" if name == "cifar10-conditional" else "none")


def test_learning_rates():
    paper = preset("cifar10").train
    assert math.isclose(learning_rate(paper, 0), 2e-4 / 5000)
    assert math.isclose(learning_rate(paper, 4999), 2e-4)
    assert math.isclose(learning_rate(paper, 200_000), 2e-5)
    assert math.isclose(learning_rate(paper, 400_000), 2e-6)
    assert learning_rate(preset("cifar10-ot").train, 900_000) == 1e-4
    cosine = preset("digits", ("train.steps", "1000"), ("train.warmup", "0"), ("train.lr", "1")).train
    assert learning_rate(cosine, 0) == 1 and math.isclose(learning_rate(cosine, 500), 0.5)
    assert 0 < learning_rate(cosine, 999) < 1e-5


def test_share_of_a_training_is_that_of_its_steps_or_time():
    config = preset("digits", ("train.steps", "1000"), ("train.max_seconds", "60")).train
    assert [share_done(config, 500, 0), share_done(config, 500, 45), share_done(config, 10, 90)] == [0.5, 0.75, 1.0]


# --- names to classes ------------------------------------------------------------------------------------------


def test_the_ladder_begins_at_half_a_grey_level():
    transform = DataTransform.images((1, 8, 8), levels=17)
    config = resolve(ModelConfig(schedule=SCHEDULE_SETTINGS["log-snr"](T=50)), transform)
    schedule = build_schedule(config.schedule)
    assert math.isclose(float(schedule.ratio[1]), 1 / 17)
    given = resolve(ModelConfig(schedule=SCHEDULE_SETTINGS["log-snr"](T=50, r_min=0.3)), transform)
    assert given.schedule.r_min == 0.3


@pytest.mark.parametrize(
    ("flags", "shape", "classes", "message"),
    [
        ({"backbone": "mlp"}, (1, 8, 8), None, "mlp, but the data are images .*use --model.backbone encoder"),
        ({"backbone": "encoder"}, (5,), None, "encoder, but the data are vectors .*use --model.backbone mlp"),
        ({"kind": "ddm"}, (1, 8, 8), None, "cannot be a ddm; use --model.backbone unet"),
        ({"labels": "joint"}, (1, 8, 8), None, "labels is joint, but the data have no classes"),
        ({"kind": "ddm", "backbone": "mlp", "labels": "joint"}, (3,), 4, "labels is joint, which needs a cdm"),
        ({"backbone": {"multipliers": [1, 2, 2, 2, 2]}}, (1, 8, 8), None, "halve"),
    ],
)
def test_models_that_do_not_fit_are_refused(flags, shape, classes, message):
    config = make_config({"model": flags}).model
    with pytest.raises(UserError, match=message):
        build_model(config, DataTransform(shape), classes)


@pytest.mark.parametrize("kind", ["cdm", "ddm"])
@pytest.mark.parametrize("labels", ["none", "input"])
@pytest.mark.parametrize(("backbone", "shape"), [("unet", (2, 8, 8)), ("mlp", (3,)), ("encoder", (1, 8, 4))])
def test_every_kind_of_model_denoises(kind, labels, backbone, shape):
    if (kind, backbone) == ("ddm", "encoder"):
        pytest.skip("an encoder has no output of the input's shape")
    small = {"unet": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4},
             "mlp": {"width": 8, "depth": 1}, "encoder": {"width": 8, "multipliers": [1, 2], "blocks": 1}}  # fmt: skip
    fields = {"kind": kind, "labels": labels, "backbone": {"name": backbone} | small[backbone]}
    model = build_model(make_config({"model": fields}).model, DataTransform(shape), 3)
    assert model.classes == (None if labels == "none" else 3)
    y = None if labels == "none" else torch.tensor([0, 2])
    # Before training the model is its Gaussian base, a standard normal here: E[eps|x] = sigma x / (alpha² + sigma²).
    x = torch.randn(2, *shape)
    _, sigma = model.schedule.at(150, x)
    assert torch.allclose(model.denoise(x, 150, y).eps, sigma * x, atol=1e-5)


def test_backbone_configs_name_arguments_that_exist():
    # A field that its class does not take would be an error here, not in a user's training.
    for name in ("unet", "encoder"):
        config = make_config({"model": {"backbone": name}}).model
        with torch.device("meta"):
            assert sum(p.numel() for p in build_backbone(config, (3, 32, 32), 202, None).parameters()) > 1e5


def test_mistakes_in_files_name_the_field_or_the_line(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, message in {
        "train: {steps: 3}\ntrain: {steps: 4}\n": "mine.yaml, line 2: not valid YAML \\('train' is there twice",
        "train: {1: 3}\n": "^unknown field 'train.1'",
        "a: &x [*x]\n": "mine.yaml, line 1: not valid YAML \\(tags and aliases are not read",
        "a: !!python/object/apply:os.system [ls]\n": "tags and aliases are not read",
        "extends: [digits]\n": "^unknown preset",
        "\nextends: mine\n": "^unknown preset",
        "[" * 3000: "mine.yaml: not valid YAML",
        "train: {steps: 0b_}\n": "^train.steps is '0b_'",
        "extends: digits\ntrain:\n  lr: 1e-3\n  steps: many\n": "^train.steps is 'many'",
        "train:\n  stesp: 3\n": "^unknown field 'train.stesp'; did you mean 'steps'",
        "model:\n  class_gaussians: true\n": "^model: class_gaussians needs gaussian, and labels joint",
    }.items():
        file.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            make_config(file_fields(file))
        assert "\n" not in str(caught.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="mine.yaml: not valid YAML"):
        file_fields(file)
    # What a flag sets instead is not the file's mistake.
    file.write_text("train: {steps: many}\nmodel: {class_gaussians: true}\n")
    with pytest.raises(UserError, match="^train.steps is 'few'"):
        make_config(file_fields(file), flag_fields([("train.steps", "few"), ("model.labels", "joint")]))
    flags = [("train.steps", "3"), ("model.labels", "joint")]
    assert make_config(file_fields(file), flag_fields(flags)).train.steps == 3


def test_texts_of_flags_are_literal():
    for path in ("data.spec", "data.label", "train.init"):
        for text in ("folder:My photos #1", "1", "null", "2020", "no", "a: b", "[1", "~", "", "1e4"):
            config = make_config(flag_fields([(path, text)]))
            section, field = path.split(".")
            assert getattr(getattr(config, section), field) == text
    config = make_config(flag_fields([("data.label", "1e4"), ("data.spec", "2020-01-01"), ("train.lr", "1e-4")]))
    assert config.train.lr == 1e-4


def test_texts_survive_yaml(tmp_path):
    for text in ("1e4", "-.5E3", "2020-01-01", "null", "a: b #c", "\u00e9\n\U0001f600", "", "0x1"):
        config = make_config({"data": {"label": text}})
        (tmp_path / "c.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert make_config(file_fields(tmp_path / "c.yaml")) == config


def test_constructors_and_settings_have_one_default():
    for name, (kind, _) in NETWORKS.items():
        settings = BACKBONES[name]()
        for key, parameter in inspect.signature(kind).parameters.items():
            if key in BACKBONES[name].__dataclass_fields__:
                assert getattr(settings, key) == parameter.default


# --- whatever comes in -----------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=3), st.dates(),
    st.just(10**400), st.just("encoder"), st.just("log-snr"),
)  # fmt: skip
PATHS = [
    f"{section}.{name}" for section in ("data", "model", "loss", "train", "sampling", "report")
    for name in type(getattr(Config(), section)).__dataclass_fields__
] + [f"model.backbone.{name}" for kind in BACKBONES.values() for name in kind.__dataclass_fields__]  # fmt: skip
NAMES = st.one_of(st.sampled_from(sorted({part for path in PATHS for part in path.split(".")})), LEAVES)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
fuzzed = hypothesis.settings(max_examples=150, deadline=None)


def ends_well(*layers):
    try:
        config = make_config(*layers)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        assert isinstance(config, Config)


@fuzzed
@hypothesis.given(st.sampled_from(PATHS), VALUES)
def test_any_value_of_any_field_is_taken_or_refused_in_a_line(path, value):
    layer = value
    for part in reversed(path.split(".")):
        layer = {part: layer}
    ends_well(layer)


@fuzzed
@hypothesis.given(st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_nested_fields_are_taken_or_refused_in_a_line(fields):
    ends_well(fields)


@fuzzed
@hypothesis.given(st.lists(st.tuples(st.sampled_from([*PATHS, "a.b.c", "train"]), st.text()), max_size=3))
def test_any_text_of_a_flag_is_taken_or_refused_in_a_line(flags):
    try:
        fields = flag_fields(flags)
    except UserError:
        return
    ends_well(fields)


@fuzzed
@hypothesis.given(st.text(alphabet=st.sampled_from("abtrain:stepodl[]{}&*!#-\n '\"|>%@,?01.e\t"), max_size=60))
def test_any_file_is_taken_or_refused_in_a_line(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    try:
        fields = file_fields(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    ends_well(fields)
