"""Samplers: rules for a step from one level to a lower one, and the loop around them."""

from torchcdm.samplers.rules import (
    DDIM,
    DDPM,
    DEFAULT_SAMPLER,
    DEIS,
    IPNDM,
    SAMPLERS,
    DPMSolver2,
    DPMSolverPP2M,
    Heun,
    Sampler,
    Step,
    UniPC,
    make_sampler,
)
from torchcdm.samplers.sampling import adaptive_levels, sample_noise

__all__ = [
    "DDIM",
    "DDPM",
    "DEFAULT_SAMPLER",
    "DEIS",
    "IPNDM",
    "SAMPLERS",
    "DPMSolver2",
    "DPMSolverPP2M",
    "Heun",
    "Sampler",
    "Step",
    "UniPC",
    "adaptive_levels",
    "make_sampler",
    "sample_noise",
]
