"""Denoisers: what every sampler and likelihood sees of a model; the plain one, and guidance of any."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

import torchcdm
from torchcdm.diffusion.base import BaseDensity
from torchcdm.diffusion.coarse import CoarseData
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.inputs import as_labels, check_tensor
from torchcdm.runtime.validation import Float, checked
from torchcdm.units import DataTransform

if TYPE_CHECKING:
    from torchcdm.models.density import DensityModel
    from torchcdm.samplers import Curvature
    from torchcdm.training.checkpoint import ModelInfo


class Denoiser(nn.Module, ABC):
    """Anything that estimates E[eps | x_t] at the levels of a ``schedule``.

    The ``transform`` takes data units to model units; None where the caller works in these, which the type leaves out.
    The ``backbone`` is the network, and ``base`` a density in closed form that it corrects, where there are such.

    Attributes:
        info: What is saved beside the weights of a model that was loaded or trained; None for one made by hand.
        coarse: The data along their main directions, from which samplers start below T; of images.
        curvatures: From what :func:`torchcdm.sample` places steps, by weights and request; saved with the model, and
            to be emptied where something else in a network of one's own has changed.
        composed: Whether its levels are not those of data with noise: samplers alone are biased.
    """

    transform: DataTransform
    composed: bool = False
    info: "ModelInfo | None" = None

    def __init__(
        self, schedule: NoiseSchedule, transform: DataTransform | None = None, backbone: nn.Module | None = None,
        base: BaseDensity | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(schedule, NoiseSchedule):
            raise UserError(f"schedule is of type {type(schedule).__name__}; give the network, then a NoiseSchedule")
        self.schedule, self.transform, self.backbone, self.base = schedule, transform, backbone, base
        self.coarse: CoarseData | None = None
        self.curvatures: dict[str, Curvature] = {}

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Event shape, where known."""
        return None if self.transform is None else self.transform.shape

    @property
    def classes(self) -> int | None:
        """Number of classes, as the backbone has it; None for an unconditional model."""
        return getattr(self.backbone, "classes", None)

    @property
    def context(self) -> int | None:
        """Length of the vector that takes the place of a class, ``y`` (B, context); None where there is none."""
        return getattr(self.backbone, "context", None)

    @property
    def conditional(self) -> bool:
        """Whether there is a ``y``: classes or a context."""
        return self.classes is not None or self.context is not None

    @property
    def density(self) -> "DensityModel | None":
        """This model as a density; None where it has none in closed form."""
        return None

    def check_inputs(self, x_t: Tensor, t: Level = 0, y: Tensor | None = None, data: bool = False) -> Tensor | None:
        """The labels of ``x_t``, once that, levels and labels are checked, on a GPU too: for public calls.

        ``data`` says that ``x_t`` is no input of the network, but data units, which may have another precision.
        UserError for inputs, levels or labels of another type, shape or range.
        """
        if not torch.compiler.is_compiling():
            dtypes = (p.dtype for p in self.parameters() if p.is_floating_point() and not data)
            check_tensor(x_t, next(dtypes, None), data)
        if self.shape is not None and tuple(x_t.shape[1:]) != self.shape:
            raise UserError(f"inputs have shape {tuple(x_t.shape[1:])}; the model takes {self.shape}")
        self.schedule.check_levels(t, x_t)
        return as_labels(y, self, x_t.shape[0])  # no len: torch.export would fix the number

    # Public functions of the package, looked up when they are called, as they need upper floors.

    def sample(self, n: int, **options: Any) -> Any:
        """``n`` samples in data units, (n, *shape): :func:`torchcdm.sample`, whose options and results it has."""
        return torchcdm.sample(self, n, **options)

    def save(self, path: str | Path) -> None:
        """Writes the model into a folder, for :func:`torchcdm.load`; see :func:`torchcdm.training.checkpoint.save`."""
        torchcdm.save(self, path)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Uploads the model to ``owner/name`` on the Hugging Face Hub, as :func:`torchcdm.push`; gives the address."""
        return torchcdm.push(self, repository, **options)

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        """The noise in ``x_t``.

        Args:
            x_t: Noisy input, model units, (B, *shape).
            t: Level, an int or long (B,).
            y: Class of each sample, long (B,); None asks for the unconditional density.
        """

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t] with a graph in ``x_t`` and the weights, for divergences and losses: (B, *shape).

        The same as :meth:`denoise` for a network that estimates eps itself.
        """
        return self.denoise(x_t, t, y).eps

    def draw_classes(self, n: int, seed: int = 0) -> Tensor | None:
        """Classes of ``n`` samples by their frequency in training, long (n,); None where a model does not know it."""
        return None

    def start(self, noise: Tensor) -> Tensor:
        """x at level T for samplers to start from, from standard normal ``noise`` (B, *shape).

        Where level T keeps some signal the data's own mean and covariance there are better than N(0, I).
        """
        return noise if self.base is None else self.base.start(noise)


def guided(conditional: Tensor, plain: Tensor, weight: float) -> Tensor:
    """(1 + w) of what is said given a class, less w of what is said without one (identity 8): noises or log p."""
    return (1 + weight) * conditional - weight * plain


@final
class DenoisingDiffusion(Denoiser):
    """A plain denoising diffusion model (DDM): the network estimates eps itself.

    The ``backbone`` maps x_t (B, *shape), t (B,) and y, (B,) or None, to eps (B, *shape), which corrects the base's.
    """

    def __init__(
        self, backbone: nn.Module, schedule: NoiseSchedule, transform: DataTransform | None = None,
        base: BaseDensity | None = None,
    ) -> None:  # fmt: skip
        super().__init__(schedule, transform, backbone, base)

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        eps = self.eps(x_t, t, self.check_inputs(x_t, t, y))
        return Prediction(x_t, *self.schedule.at(t, x_t), eps)

    def eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t] for losses, unchecked; ``y`` may hold the null label ``classes``."""
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        eps = self.backbone(x_t, levels, y).to(x_t.dtype)
        return eps if self.base is None else eps + self.base.eps(x_t, t)


class Unnormalised(Denoiser):
    """A path of densities of which ``at_level`` tells log gamma_t, (B,), and -sigma_t times its gradient."""

    composed = True

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        self.check_inputs(x_t, t, y)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        if bool(((levels < 1) | (levels > self.schedule.T)).any()):
            raise UserError(f"this density has the levels 1 ... {self.schedule.T} alone")
        return Prediction(x_t.detach(), *self.schedule.at(t, x_t), self.at_level(x_t, levels)[1].to(x_t.dtype))


@final
class GuidedDenoiser(Denoiser):
    """A class-conditional ``model``, trained with dropped labels, pushed towards its class by a ``weight`` w.

    With 0 it is the plain conditional model (diffusers' ``guidance_scale`` is 1 + w). UserError for a model without
    classes, or no weight; in calls, for no labels.
    """

    @checked
    def __init__(self, model: Denoiser, weight: Annotated[Float, Ge(-1000), Le(1000)]) -> None:
        super().__init__(model.schedule, model.transform, base=model.base)
        if model.classes is None:
            raise UserError("guidance needs a class-conditional model; this one was trained without labels")
        self.model, self.weight, self.coarse = model, weight, model.coarse

    @property
    def classes(self) -> int | None:
        return self.model.classes

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        eps = self._eps(x_t, t, y)
        return Prediction(x_t, *self.schedule.at(t, x_t), eps)

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        return self._eps(x_t, t, y, graph=True)

    def _eps(self, x_t: Tensor, t: Level, y: Tensor | None, graph: bool = False) -> Tensor:
        if y is None:
            raise UserError("guidance needs labels: give y")
        if self.model.density is not None:
            return self.model.density.evaluate(x_t, t, y, self.weight, graph).eps
        return guided(self.model.denoise(x_t, t, y).eps, self.model.denoise(x_t, t).eps, self.weight)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradient for the weights meanwhile; every part's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    learning = [weight for weight in module.parameters() if weight.requires_grad]
    for part in training:
        part.training = False
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_()
        for part in training:
            part.training = True


def digest_of(tensors: Iterable[tuple[str, Tensor]], salt: bytes = b"") -> str:
    """A digest of tensors and their names, in single precision."""
    digest = hashlib.sha256(salt)
    for name, value in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def working_dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Precision of the network's weights, of its inputs therefore; ``otherwise`` where it has none."""
    # A list: what ``next`` does with a second argument is not exported by every PyTorch.
    return [*(p.dtype for p in module.parameters() if p.is_floating_point()), otherwise][0]
