"""The decoder that the package's own ones are tested against."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlif_lightning.models.scoring import positions


class PlainDecoder:
    """Hugging Face's own forward with its own cache."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.cache = DynamicCache(config=policy.config)

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self.mask, self.position = mask, mask.sum(1, keepdim=True) - 1
        return self._logits(ids, positions(mask))

    def select_rows(self, rows: Tensor) -> None:
        """See :class:`Decoder`."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def step(self, token: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.position = self.position + 1
        return self._logits(token[:, None], self.position)

    def _logits(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        out = self.policy(
            input_ids=ids,
            attention_mask=self.mask.long(),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]
