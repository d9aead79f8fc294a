"""Our side of a bare rollout: the sampler as training calls it, with all statistics for the rewards."""

import torch

from benchmarks.gate import Gate
from benchmarks.shapes import Work, read_prompts
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.sampling.protocol import up_to_date


def run(work: Work, gate: Gate) -> None:
    """Sample ``steps`` rollouts, each of other prompts."""
    policy = Policy.load(PolicySettings(work.folder), torch.device(work.device), work.precision)
    policy.move()
    prompts = read_prompts(work.folder, "ids")
    sampler = NativeSampler()
    for step in range(work.steps):
        places = [(0, (step * work.prompts + i) % len(prompts)) for i in range(work.prompts)]
        gate.arrive()
        seeds = completion_seeds(step, places, work.group)
        with up_to_date(sampler, policy):
            samples = sampler.sample([prompts[p] for _, p in places], work.group, seeds, Sampling(work.new_tokens))
        gate.note(tokens=int(samples.lengths.sum()), finite=bool(samples.logprob.isfinite().all()))
    gate.finish()
