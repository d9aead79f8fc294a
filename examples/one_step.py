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
from rlif_lightning.models.policy import end_token_ids, frozen_copy, load_policy, load_tokenizer
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.rewards import SelfCertainty
from rlif_lightning.rollout import Rollout
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.training.slice_loss import slice_loss


def collect(policy, tokenizer, prompts, seeds, sampling, reward):
    """Sample a group of completions for each of P prompts, N in all, and weigh each against its group."""
    sampler, group_size = NativeSampler(), len(seeds) // len(prompts)
    with torch.no_grad():
        sampler.update(policy, end_token_ids(tokenizer, policy.generation_config, []), tokenizer.pad_token_id)
        samples = sampler.sample(prompts, group_size, seeds, sampling)  # with each token's self-certainty
    texts = tokenizer.batch_decode(samples.completion_ids, skip_special_tokens=True)
    rollout = Rollout(samples, group_size, sampling.temperature, seeds, texts)
    rewards = reward(rollout)  # [N]
    advantages, _ = group_advantages(rewards, group_size, min_spread=1e-4)  # [N]
    return replace(rollout, rewards={"reward": rewards}, advantages=advantages, loss_mask=samples.completion_mask)


def update(policy, reference, optimizer, rollout, settings, max_tokens, micro_batch=64):
    """Score the completions under the reference, and take one optimiser step."""
    denominator = loss_denominator(rollout.loss_mask, settings, max_tokens)
    for rows in rollout.samples.lengths.argsort().split(micro_batch):
        part = rollout.slice(rows)
        with torch.no_grad():
            part = replace(part, kl_logprob=CompletionScores(reference, part.samples).logprobs(part.temperature))
        slice_loss(policy, part, denominator, None, settings).loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    tokenizer, policy = load_tokenizer("toy"), load_policy("toy", dtype=torch.float32)
    reference, optimizer = frozen_copy(policy, torch.float32), torch.optim.AdamW(policy.parameters(), lr=3e-4)
    problems = read_problems(Source("toy"))
    for i in range(20):
        batch = problems[16 * i : 16 * (i + 1)]
        prompts = [tokenizer.encode(f"{problem.text}>") for problem in batch]
        seeds = completion_seeds(0, [(i, j) for j in range(16)], group_size=8)
        rollout = collect(policy, tokenizer, prompts, seeds, Sampling(max_new_tokens=32), SelfCertainty())
        right = [text.endswith(f"#{batch[row // 8].gold.text}") for row, text in enumerate(rollout.texts)]
        print(f"self-certainty {rollout.rewards['reward'].mean():.2f}, right answers {sum(right) / len(right):.2f}")
        update(policy, reference, optimizer, rollout, LossSettings(kl_coefficient=0.005), max_tokens=32)
