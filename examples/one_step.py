"""One step of RL from internal feedback, without Trainer and command line: sample, reward, score, update.

`python examples/one_step.py` trains the toy model on its own self-certainty. The right answers are only looked at.
"""

from dataclasses import replace

import torch

from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.functional.advantages import group_advantages
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.functional.losses import loss_denominator
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.rewards import SelfCertainty
from rlif_lightning.rollout import Rollout
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.sampling.protocol import up_to_date
from rlif_lightning.training.slice_loss import slice_loss


def collect(policy, prompts, seeds, sampling, reward):
    """Sample a group of completions for each of P prompts, N in all, and weigh each against its group."""
    sampler, group_size = NativeSampler(), len(seeds) // len(prompts)
    with up_to_date(sampler, policy):
        samples = sampler.sample(prompts, group_size, seeds, sampling)  # with each token's self-certainty
    rollout = Rollout(samples, group_size, sampling.temperature, seeds, samples.texts(policy.decode))
    rewards = reward(rollout)  # [N]
    advantages, _ = group_advantages(rewards, group_size, min_spread=1e-4)  # [N]
    return replace(rollout, rewards={"reward": rewards}, advantages=advantages, loss_mask=samples.completion_mask)


def update(policy, optimizer, rollout, settings, max_tokens, micro_batch=64):
    """Score the completions under the policy of the start, and take one optimiser step."""
    denominator = loss_denominator(rollout.loss_mask, settings, max_tokens)
    for rows in rollout.samples.lengths.argsort().split(micro_batch):
        part = rollout.slice(rows)
        with torch.no_grad(), policy.reference("frozen") as reference:
            part = replace(part, kl_logprob=CompletionScores(reference, part.samples).logprobs(part.temperature))
        slice_loss(policy.model, part, denominator, None, settings).loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    policy = Policy.load(PolicySettings("toy"), training=True)
    policy.make_references(["frozen"])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-4)
    problems = read_problems(Source("toy"))
    for i in range(20):
        batch = problems[16 * i : 16 * (i + 1)]
        prompts = [policy.tokenizer.encode(f"{problem.text}>") for problem in batch]
        seeds = completion_seeds(0, [(i, j) for j in range(16)], group_size=8)
        rollout = collect(policy, prompts, seeds, Sampling(max_new_tokens=32), SelfCertainty())
        right = [text.endswith(f"#{batch[row // 8].gold.text}") for row, text in enumerate(rollout.texts)]
        print(f"self-certainty {rollout.rewards['reward'].mean():.2f}, right answers {sum(right) / len(right):.2f}")
        update(policy, optimizer, rollout, LossSettings(kl_coefficient=0.005), max_tokens=32)
