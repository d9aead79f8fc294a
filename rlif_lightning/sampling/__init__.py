"""Samplers: (prompts, group size, seeds) to completions with per-token statistics."""

from rlif_lightning.sampling.native import NativeSampler
from rlif_lightning.sampling.protocol import Sampler, Sampling
from rlif_lightning.sampling.vllm.engine import VLLMSampler

__all__ = ["NativeSampler", "Sampler", "Sampling", "VLLMSampler"]
