"""Our side of a bare rollout: the sampler as training calls it, with all statistics for the rewards."""

import torch

from benchmarks.gate import Gate
from benchmarks.shapes import Work, read_prompts
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.sampling import NativeSampler, Sampling


def run(work: Work, gate: Gate) -> None:
    """Sample ``steps`` rollouts, each of other prompts."""
    policy = Policy.load(PolicySettings(work.folder)).model.eval()
    prompts, end = read_prompts(work.folder, "ids"), policy.config.eos_token_id
    sampler = NativeSampler()
    for step in range(work.steps):
        places = [(0, (step * work.prompts + i) % len(prompts)) for i in range(work.prompts)]
        gate.arrive()
        sampler.update(policy, [end], end)
        seeds = completion_seeds(step, places, work.group)
        with torch.no_grad():
            samples = sampler.sample([prompts[p] for _, p in places], work.group, seeds, Sampling(work.new_tokens))
        gate.note(tokens=int(samples.lengths.sum()), finite=bool(samples.logprob.isfinite().all()))
    gate.finish()
