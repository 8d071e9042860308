"""Denoisers and density models: what samplers, likelihoods and applications see."""
