"""What the numbers of a fit are, in a line each, with their units: TensorBoard shows it next to a curve's name.

The beginnings of the rows of docs/metrics.md, which an installed package does not have; a test compares the two.
"""

import re

DESCRIPTIONS = {
    "val/accuracy": "share: held-out problems answered right, one greedy completion each",
    "val/accuracy_sampled": "share: sampled held-out completions that are right",
    "val/mean_tokens": "tokens: mean length of the held-out completions, greedy and sampled",
    "val/mean_tokens_sampled": "tokens: mean length of the held-out completions, greedy and sampled",
    "val/truncated_fraction": "share: held-out completions cut off at evaluation.max_new_tokens",
    "val/truncated_fraction_sampled": "share: held-out completions cut off at evaluation.max_new_tokens",
    "rollout/reward": "the rewards': weighted sum of the rewards, a mean over the completions that all of them score",
    "rollout/reward/<name>": "the reward's: each reward before its weight, where there are several",
    "rollout/reward_std": "the rewards': standard deviation of the reward within a group, a mean over groups",
    "rollout/self_certainty": "nats per token: KL from the uniform distribution to the policy's",
    "rollout/entropy": "nats per token: entropy of the next-token distribution",
    "rollout/logprob": "nats per token: log-probability of the sampled tokens under the policy",
    "rollout/start_logprob": "nats per token: log-probability of the sampled tokens under the frozen start",
    "rollout/kl": "nats per token: divergence of the policy from the KL reference on the sampled tokens",
    "rollout/agreement": "share: largest share of a group on one answer, a mean over groups",
    "rollout/similarity": "share: mean Jaccard similarity of the token bigrams of a group's completions",
    "rollout/accuracy": "share: completions of the rollout that are right, where the training problems have answers",
    "rollout/answered_fraction": "share: completions in which an answer can be read",
    "rollout/completion_tokens": "tokens: mean length of the completions",
    "rollout/truncated_fraction": "share: completions cut off at rollout.max_new_tokens",
    "rollout/advantage_size": "standard deviations: mean size of an advantage",
    "rollout/gated_fraction": "share: groups whose rewards differ by no more than rollout.min_spread",
    "rollout/filtered_fraction": "share: groups outside rollout.agreement_band, where one is set",
    "rollout/unscored_fraction": "share: completions without a finite reward",
    "rollout/kept_mass": "probability: what top_k, top_p and min_p leave of the distribution, a mean over tokens",
    "rollout/grading_timeouts": "answers: answers of this rollout that ran out of time, over all processes",
    "rollout/tokens_per_second": "tokens per second: sampled tokens of all processes, by time/rollout",
    "train/loss": "nats: the loss of the step",
    "train/kl": "nats per token: divergence from the KL reference, as it enters the loss",
    "train/grad_norm": "norm: norm of the gradient before clipping",
    "train/learning_rate": "rate: learning rate of the step",
    "train/ratio_mean": "ratio: probability of a token under the policy, by that when it was sampled",
    "train/clip_fraction": "share: tokens whose ratio was clipped",
    "train/loss_scale": "factor: what the gradient scaler multiplies the loss by, under 16-mixed",
    "train/skipped_steps": "steps: steps so far whose gradient was not finite, and which were skipped",
    "train/entropy": "nats per token: entropy in the update, where there is an entropy bonus or a target",
    "train/entropy_coefficient": "coefficient: the bonus's coefficient, where it follows model.target_entropy",
    "guard/agreement": "as rollout/...: a signal of the guard, smoothed",
    "guard/similarity": "as rollout/...: a signal of the guard, smoothed",
    "guard/start_logprob": "as rollout/...: a signal of the guard, smoothed",
    "guard/best_step": "step: step whose weights the guard would hand back now",
    "guard/fired": "0 or 1: whether the guard has seen a collapse",
    "time/rollout": "seconds: sampling and scoring",
    "time/reference": "seconds: the references' log-probabilities",
    "time/update": "seconds: forward and backward passes and the optimiser's step",
    "time/evaluation": "seconds: one held-out evaluation",
    "memory/peak": "MiB: a high-water mark",
    "rollout/engine_kl": "nats per token: KL(engine // policy), by the k3 estimate",
    "rollout/engine_ratio_max": "ratio: the largest policy / engine of a token",
    "rollout/importance_capped": "share: tokens whose weight was cut by rollout.importance_cap",
}


def description(name: str) -> str:
    """Unit and meaning of a metric; nothing for one that is not ours."""
    return DESCRIPTIONS.get(re.sub("^rollout/reward/.+", "rollout/reward/<name>", name), "")
