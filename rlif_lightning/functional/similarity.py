"""How alike the completions of a group are: a signal where texts have no answers to agree on."""

import torch
from torch import Tensor


def group_similarity(
    ids: Tensor,  # [N, T] completion tokens, rows of a group next to each other
    mask: Tensor,  # [N, T] bool, one run of tokens per row, padding behind it
    group_size: int,  # G, completions per prompt
) -> Tensor:
    """Mean over the pairs of a group of the Jaccard similarity of their sets of token bigrams: [N / G] on the CPU.

    1: all alike; 0: no two completions share a bigram. Two completions without any bigram are alike. Groups of one
    have nan.
    """
    ids, mask = ids.cpu(), mask.cpu()
    first, second = ids[:, :-1].long(), ids[:, 1:].long()
    bigrams = first * (int(ids.max()) + 1 if ids.numel() else 1) + second  # [N, T - 1]
    groups = (len(ids) // group_size, group_size, bigrams.shape[1])  # no -1: of one token each there is no bigram
    rows = zip(bigrams.view(groups), mask[:, 1:].view(groups), strict=True)
    return torch.stack([_jaccard(b, m) for b, m in rows])


def _jaccard(bigrams: Tensor, mask: Tensor) -> Tensor:
    """Mean over the pairs of the rows [G, T - 1] of one group."""
    rows, columns = mask.nonzero(as_tuple=True)
    kinds, number = bigrams[rows, columns].unique(return_inverse=True)
    has = torch.zeros(len(mask), len(kinds))
    has[rows, number] = 1.0
    shared, sizes = has @ has.T, has.sum(1)
    union = sizes[:, None] + sizes[None] - shared
    alike = torch.where(union > 0, shared / union.clamp(min=1), 1.0)
    return alike[torch.ones_like(alike).triu(1).bool()].mean()
