"""A reward of your own: on a next-token distribution one method, on anything else of a rollout another.

`python examples/own_reward.py` scores completions with both. The same classes train, if this file lies in the working
directory: `rlif fit --config quickstart --rollout.rewards own_reward.Gini`.
"""

import torch

from rlif_lightning import score
from rlif_lightning.rewards import InternalReward, Reward


class Gini(InternalReward):
    """The Gini coefficient of the next-token distribution: 0 if all tokens are equal, near 1 if one has it all."""

    def statistic(self, logp):
        """Log-probabilities [..., V] to one number for each distribution [...], larger is better."""
        p, v = logp.exp().sort(-1).values, logp.shape[-1]
        return (2 * (p * torch.arange(1, v + 1, device=p.device)).sum(-1) - v - 1) / v


class Brevity(Reward):
    """Minus the number of tokens."""

    def __call__(self, rollout):
        """Rewards [N], larger is better."""
        return -rollout.samples.lengths.float()


if __name__ == "__main__":
    scores = score("toy", None, ["3+5-9+2>"] * 2, ["#1", "3+5=8;8-9=9;9+2=1;#1"], rewards=[Gini(), Brevity()])
    for name, values in scores.rewards.items():
        print(name, *(f"{x:.3f}" for x in values))
    logits = torch.tensor([[[0.0, 0.0], [0.0, 30.0]]])  # [N, T, V] of one completion: first undecided, then certain
    ids, mask = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    print("of plain logits", Gini("sum").of_logits(logits, ids, mask).tolist())  # 0 + 1/2
