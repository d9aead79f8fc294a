"""Samplers: (prompts, group size, seeds) to completions with per-token statistics."""

from rlif_lightning.sampling.native import NativeSampler
from rlif_lightning.sampling.protocol import Sampler, Sampling

__all__ = ["NativeSampler", "Sampler", "Sampling"]
