"""Any image model as a pipeline of diffusers (github.com/huggingface/diffusers) with one of its schedulers.

Index i of diffusers is our level i + 1. Its schedulers preserve variance: where ours does not, as on straight lines to
noise, x is scaled to that and back.
"""

import inspect
from typing import Any, Literal, NoReturn, final

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, GuidedDenoiser, evaluation_mode, working_dtype
from torchcdm.runtime.validation import Count, checked, shown


@final
class DiffusersNetwork(nn.Module):
    """Any :class:`torchcdm.Denoiser` as the ``unet`` of a pipeline: (sample, index) -> E[eps | sample]."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, guidance: float = 0.0
    ) -> UNet2DOutput:
        """The noise in ``sample`` (B, *shape), of variance 1 at the end, at an index 0 ... T - 1, or (B,)."""
        schedule, index = self.model.schedule, torch.as_tensor(timestep, device=sample.device)
        level = (1 + index.round().long()).clamp(1, schedule.T).expand(len(sample))
        alpha, sigma = schedule.at(level, sample)
        x = ((alpha**2 + sigma**2).sqrt() * sample).to(working_dtype(self.model, sample.dtype))
        denoiser = GuidedDenoiser(self.model, guidance) if guidance else self.model
        with evaluation_mode(self.model):
            return UNet2DOutput(sample=denoiser.denoise(x, level, class_labels).eps.to(sample))


def diffusers_scheduler(schedule: NoiseSchedule, kind: type = DDIMScheduler, **options: Any) -> Any:
    """A scheduler of diffusers with the levels of ours.

    The class ``kind`` takes ``trained_betas``, such as ``DPMSolverMultistepScheduler``; UserError for others. It is
    unclipped, and from the last level on, unless its further ``options`` say otherwise.
    """
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UserError(f"kind is {shown(kind)}; give a class of schedulers of diffusers, such as DDIMScheduler")
    taken = inspect.signature(kind).parameters
    if "trained_betas" not in taken:
        raise UserError(f"{kind.__name__} takes no trained_betas, so that it cannot have the model's levels")
    kept = _kept(schedule)
    own = {"trained_betas": (1 - kept[1:] / kept[:-1]).tolist(), "num_train_timesteps": schedule.T}
    own |= {"clip_sample": False, "timestep_spacing": "trailing", "use_karras_sigmas": False}
    return kind(**{name: value for name, value in own.items() if name in taken} | options)


def _kept(schedule: NoiseSchedule) -> Tensor:
    """Share of the data in the variance at each level 0 ... T, (T + 1,): diffusers' ``alphas_cumprod`` after a 1."""
    alpha, sigma = schedule.alpha[:-1].cpu(), schedule.sigma[:-1].cpu()
    return alpha**2 / (alpha**2 + sigma**2)


@final
class CDMPipeline(DiffusionPipeline):
    """Samples of a model of images, its :class:`DiffusersNetwork`, by what :func:`diffusers_scheduler` gives.

    UserError for another network or model, or a scheduler with other levels.
    """

    def __init__(self, unet: DiffusersNetwork, scheduler: Any) -> None:
        super().__init__()
        if not isinstance(unet, DiffusersNetwork) or len(unet.model.shape or ()) != 3:
            raise UserError(f"unet is a {type(unet).__name__}; give DiffusersNetwork(model) of a model of images")
        levels, wanted = getattr(scheduler, "alphas_cumprod", torch.empty(0)), _kept(unet.model.schedule)[1:].float()
        if levels.shape != wanted.shape or not torch.allclose(levels, wanted, rtol=1e-3):
            mend = "make it by diffusers_scheduler(model.schedule)"
            raise UserError(f"the {type(scheduler).__name__} has other levels than the model; {mend}")
        if (kind := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
            raise UserError(f"the scheduler takes the network for its {kind}; the model gives the noise: epsilon")
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def of(cls, model: Denoiser, kind: type = DDIMScheduler, **options: Any) -> "CDMPipeline":
        """The pipeline of a model; further arguments as in :func:`diffusers_scheduler`."""
        return cls(DiffusersNetwork(model), diffusers_scheduler(model.schedule, kind, **options))

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """UserError: diffusers would write the scheduler alone."""
        mend = "pipeline.unet.model.save(folder), and make another one by CDMPipeline.of(torchcdm.load(folder))"
        raise UserError(f"a pipeline is not saved; save its model by {mend}")

    push_to_hub = save_pretrained

    @torch.no_grad()
    @checked
    def __call__(
        self, batch_size: Count = 1, generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: Count = 50, class_labels: Tensor | None = None, guidance: float = 0.0,
        output_type: Literal["pil", "np", "pt"] = "pil", return_dict: bool = True,
    ) -> ImagePipelineOutput:  # fmt: skip
        """Draws ``batch_size`` images in at most T steps of the scheduler; arguments are those of diffusers.

        The ``generator`` is the source of all noise, or there is one for each image; ``class_labels`` are long
        (batch_size,), and ``guidance`` is the weight w of classifier-free guidance. ``output_type`` ``np`` gives
        (batch, H, W, C) in [0, 1], continuous ones from least to largest value; ``pt`` (batch, *shape), data units.
        """
        model = self.unet.model
        if num_inference_steps > model.schedule.T:
            raise UserError(f"num_inference_steps is {num_inference_steps}; it is at most T, {model.schedule.T}")
        device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float32)
        noise = randn_tensor((batch_size, *model.shape), generator=generator, device=device, dtype=dtype)
        alpha, sigma = (float(part[-2]) for part in (model.schedule.alpha, model.schedule.sigma))
        self.scheduler.set_timesteps(num_inference_steps)
        x = model.start(noise) / (alpha**2 + sigma**2) ** 0.5 * self.scheduler.init_noise_sigma
        step = inspect.signature(self.scheduler.step).parameters
        seeded = {"generator": generator} if "generator" in step else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            eps = self.unet(self.scheduler.scale_model_input(x, t), t, class_labels, guidance).sample
            x = self.scheduler.step(eps, t, x, **seeded).prev_sample
        images = model.transform.inverse(x)
        if output_type != "pt":
            edges = zip((model.transform.low, model.transform.high), images.aminmax(), strict=True)
            low, high = (float(found if edge is None else edge) for edge, found in edges)
            images = ((images - low) / (high - low)).clamp(0, 1).movedim(1, -1).cpu().float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)
