"""DDPM checkpoints of diffusers: our network is the same function of image and level."""

import json
import math
import shutil

import pytest
import torch
from oracles import rng
from safetensors.torch import load_file, save_file

import torchcdm
from studies.reproduce.diffusers_ddpm import UNetOptions, convert_unet, load_diffusers
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring

diffusers = pytest.importorskip("diffusers")

LAYOUT = {
    "act_fn": "silu", "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "layers_per_block": 2,
    "in_channels": 3, "out_channels": 3, "time_embedding_type": "positional",
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
"""That of google/ddpm-cifar10-32, which has 128, 256, 256, 256 channels, 32 groups and 32 x 32 pixels."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The layout with random weights and thin blocks, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("ddpm")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**LAYOUT, sample_size=16, block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
    with torch.no_grad():  # affine parts that are not the identity
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng()))
    unet.save_pretrained(folder)
    diffusers.DDPMScheduler(1000, beta_start=2e-4).save_pretrained(folder)
    return folder, unet.eval()


@torch.no_grad()
def test_the_network_is_the_same_function(saved):
    folder, unet = saved
    model = load_diffusers(folder)
    x = torch.randn(6, 3, 16, 16, generator=rng())
    t = torch.tensor([1, 2, 50, 300, 999, 1000])
    theirs = unet(x, t - 1).sample
    ours = model.backbone(x, t, None)
    assert torch.allclose(ours, theirs, atol=2e-4 * float(theirs.std())), float((ours - theirs).abs().max())
    # The level matters, so that one off by one would be seen.
    off = unet(x, (t - 2).clamp_min(0)).sample
    assert (off - theirs).abs()[1:].flatten(1).amax(1).min() > 1e-3 * float(theirs.std())


@torch.no_grad()
def test_levels_and_noise_are_those_of_the_scheduler(saved):
    folder, unet = saved
    model = load_diffusers(folder)
    abar = diffusers.DDPMScheduler.from_pretrained(folder).alphas_cumprod
    assert torch.allclose(model.schedule.alpha[1:-1].square(), abar.double(), atol=1e-5)
    x = torch.randn(2, 3, 16, 16, generator=rng())
    assert torch.allclose(model.denoise(x, 700).eps, unet(x, 699).sample, atol=1e-4)
    assert model.transform.inverse(torch.tensor([-1.0, 1.0])).tolist() == [0, 255] and not model.transform.dequantize


def test_it_samples_and_has_a_likelihood_as_any_plain_diffusion_model(saved):
    model = load_diffusers(saved[0])
    assert torchcdm.sample(model, 2, sampler="ddim", steps=3).shape == (2, 3, 16, 16)
    x = torch.randint(0, 256, (2, 3, 16, 16), generator=rng(), dtype=torch.uint8)
    report = torchcdm.likelihood.report(model, x, None, Scoring(steps=2), ["flow"])
    assert report.unit == "bits/dim" and math.isfinite(report.row("flow").value)


@torch.no_grad()
def test_files_with_the_old_names_of_attention(saved, tmp_path):
    folder, _ = saved
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any("proj_attn" in key for key in state)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    x, t = torch.randn(1, 3, 16, 16, generator=rng()), torch.tensor([10])
    assert torch.equal(load_diffusers(tmp_path).backbone(x, t), load_diffusers(folder).backbone(x, t))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freq_shift": 0}, "freq_shift is 0; only 1 has a counterpart"),
        ({"attention_head_dim": 8}, "attention_head_dim is 8"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "not those of a DDPM"),
        ({"out_channels": 6}, "as many channels out as in"),
        ({"block_out_channels": [8, 16, 16, 32]}, "the weights are not those of the configuration"),
        ({"sample_size": None}, "sample_size is missing"),
    ],
)
def test_other_architectures_are_refused(saved, change, message):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(UserError, match=message) as caught:
        convert_unet(config, load_file(folder / "diffusion_pytorch_model.safetensors"))
    assert "\n" not in str(caught.value)


ODD = (None, True, -1, 0, 1e30, float("nan"), "x", [], [[]], {}, {"a": 1})


@pytest.mark.parametrize("name", [*UNetOptions.__dataclass_fields__, "beta_start", "beta_end", "freq_shift"])
def test_options_of_another_type_are_one_line(saved, tmp_path, name):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / ("scheduler_config.json" if "beta" in name else "config.json")
    content = json.loads(file.read_text())
    for value in ODD:
        file.write_text(json.dumps(content | {name: value}))
        try:
            load_diffusers(tmp_path)  # a dropout of 0, a default in place of None
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)


def test_missing_and_foreign_files_are_named(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: cannot be read"):
        load_diffusers(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: damaged"):
        load_diffusers(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    scheduler = json.loads((folder / "scheduler_config.json").read_text()) | {"prediction_type": "v_prediction"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(UserError, match=r"scheduler_config.json: prediction_type is 'v_prediction'"):
        load_diffusers(tmp_path)


def test_a_saved_pipeline_is_read_as_well(saved, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    folder, _ = saved
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / ("scheduler" if "scheduler" in path.name else "unet") / path.name)
    flat, nested = load_diffusers(folder), load_diffusers(tmp_path)
    x = torch.randn(2, *flat.transform.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flat.denoise(x, 100).eps, nested.denoise(x, 100).eps)
