"""Samplers: rules for a step from one level to a lower one, and the loop around them."""

from torchcdm.samplers.rules import (
    DDIM,
    DDPM,
    SAMPLERS,
    DPMSolver2,
    DPMSolverPP2M,
    Heun,
    Sampler,
    Step,
    make_sampler,
)
from torchcdm.samplers.sampling import sample, sample_noise

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "DPMSolver2",
    "DPMSolverPP2M",
    "Heun",
    "Sampler",
    "Step",
    "make_sampler",
    "sample",
    "sample_noise",
]
