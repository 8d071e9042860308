"""Schedulers of diffusers, run on our models: beside our own samplers, and against exact moments."""

import numpy as np
import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, ZeroBackbone, labelled_mixture, normal, rng

from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.diffusion.schedules import LogSNRSchedule, OptimalTransportSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.samplers import Step, make_sampler
from torchcdm.units import DataTransform

diffusers = pytest.importorskip("diffusers")

from torchcdm.bridges.pipeline import CDMPipeline, DiffusersNetwork, diffusers_scheduler  # noqa: E402

SHAPE = (1, 4, 4)


def images(schedule) -> ClassificationDiffusion:
    """Grey levels 0 ... 255 that are a Gaussian."""
    variances = torch.linspace(0.02, 0.4, 16, dtype=torch.float64)
    rotation = MatrixRotation(SHAPE, torch.linalg.qr(normal(16, 16))[0])
    base = GaussianMarginals(schedule, 0.2 * normal(*SHAPE, seed=1), variances, rotation)
    transform = DataTransform.images(SHAPE, dequantize=False)
    return ClassificationDiffusion(ZeroBackbone(schedule.T + 2), schedule, transform, base).double().eval()


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_of_diffusers_is_ours(name: str) -> None:
    model = images(SCHEDULES[name](40))
    network, scheduler = DiffusersNetwork(model), diffusers_scheduler(model.schedule)
    scheduler.set_timesteps(40)
    x = ours = normal(3, *SHAPE)
    scale = (model.schedule.alpha**2 + model.schedule.sigma**2).sqrt()
    ours = scale[40] * x
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    for t in range(40, 1, -1):
        ours, _ = make_sampler("ddim").step(Step(model, ours, t, t - 1))
    # Their products of alphas are in single precision.
    torch.testing.assert_close(scale[1] * x, ours, rtol=1e-3, atol=1e-3)


KINDS = ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep", "DDPM")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [LogSNRSchedule(200, r_min=0.01), OptimalTransportSchedule(200)])
def test_pipelines_draw_with_the_moments_of_the_data(kind: str, schedule) -> None:
    model = images(schedule)
    pipeline = CDMPipeline.of(model, getattr(diffusers, f"{kind}Scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    x = pipeline(1000, rng(), num_inference_steps=100, output_type="pt").images
    z = model.transform(x.double())
    mean, variances = model.base.gaussian.moments(0)
    torch.testing.assert_close(z.mean(0), mean, atol=0.06, rtol=0)
    found = model.base.gaussian.rotation(z - mean).square().mean(0)
    torch.testing.assert_close(found, variances, atol=0.01, rtol=0.2)


def test_dropout_is_off_while_a_pipeline_draws() -> None:
    schedule = LogSNRSchedule(20)
    layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.SiLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 22)
    model = ClassificationDiffusion(torch.nn.Sequential(*layers), schedule, DataTransform.images(SHAPE)).train()
    pipeline = CDMPipeline.of(model)
    pipeline.set_progress_bar_config(disable=True)
    first, second = (pipeline(2, rng(), 5, output_type="pt").images for _ in range(2))
    assert torch.equal(first, second) and model.backbone[3].training


def test_images_come_as_asked_and_by_their_seed() -> None:
    pipeline = CDMPipeline.of(images(LogSNRSchedule(40)), diffusers.DPMSolverMultistepScheduler)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(2, rng(), 5).images
    assert [(picture.size, picture.mode) for picture in pictures] == [((4, 4), "L")] * 2
    (again,) = pipeline(2, rng(), 5, output_type="np", return_dict=False)
    assert again.shape == (2, 4, 4, 1) and again.min() >= 0 and again.max() <= 1
    assert (np.asarray(pictures[0]) == (255 * again[0, ..., 0]).round()).all()


def test_images_without_grey_levels_are_scaled_from_the_least_to_the_largest_value() -> None:
    model = images(LogSNRSchedule(40))
    model.transform = DataTransform(SHAPE, 3.0, 10.0)
    pipeline = CDMPipeline.of(model)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(2, rng(), 5, output_type="np").images
    assert found.min() == 0 and found.max() == 1
    assert len(pipeline(2, rng(), 5).images) == 2


def test_labels_and_guidance_reach_the_model() -> None:
    schedule = LogSNRSchedule(40)
    model = ClassificationDiffusion(MixtureClassifier(labelled_mixture(), schedule), schedule).double()
    x, y = normal(2, 2), torch.tensor([0, 1])
    found = DiffusersNetwork(model)(x, 19, y, guidance=2.0).sample
    torch.testing.assert_close(found, 3 * model.denoise(x, 20, y).eps - 2 * model.denoise(x, 20).eps)


def test_a_scheduler_that_takes_another_output_is_refused() -> None:
    with pytest.raises(UserError, match="takes the network for its v_prediction; the model gives the noise"):
        CDMPipeline.of(images(LogSNRSchedule(40)), prediction_type="v_prediction")


def test_a_scheduler_without_levels_is_refused() -> None:
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler takes no trained_betas"):
        diffusers_scheduler(LogSNRSchedule(40), diffusers.FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler(), dict, "ddim"])
def test_what_is_no_class_of_schedulers_is_refused(kind) -> None:
    with pytest.raises(UserError, match="give a class of schedulers of diffusers, such as DDIMScheduler"):
        CDMPipeline.of(images(LogSNRSchedule(40)), kind)


def test_a_pipeline_made_by_hand_has_the_levels_of_its_model() -> None:
    model = images(LogSNRSchedule(40))
    network = DiffusersNetwork(model)
    assert CDMPipeline(network, diffusers_scheduler(model.schedule, diffusers.DDPMScheduler)).unet is network
    for other in (diffusers.DDIMScheduler(40), diffusers_scheduler(LogSNRSchedule(50)), None):
        with pytest.raises(UserError, match=f"the {type(other).__name__} has other levels than the model"):
            CDMPipeline(network, other)
    vectors = ClassificationDiffusion(ZeroBackbone(42), model.schedule, DataTransform.standardize(normal(20, 3)))
    for wrong in (model, DiffusersNetwork(vectors)):
        with pytest.raises(UserError, match=r"give DiffusersNetwork\(model\) of a model of images"):
            CDMPipeline(wrong, diffusers_scheduler(model.schedule))


def test_arguments_of_a_call_are_checked() -> None:
    pipeline = CDMPipeline.of(images(LogSNRSchedule(40)))
    steps = {"num_inference_steps": 0}, {"num_inference_steps": 41}
    for wrong in ({"batch_size": 0}, {"batch_size": 1.5}, *steps, {"output_type": "latent"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
            pipeline(**wrong)


def test_a_pipeline_is_not_saved_without_its_model(tmp_path) -> None:
    pipeline = CDMPipeline.of(images(LogSNRSchedule(40)))
    for save in (pipeline.save_pretrained, pipeline.push_to_hub):
        with pytest.raises(UserError, match="model.save"):
            save(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
