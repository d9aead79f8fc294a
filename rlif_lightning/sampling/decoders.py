"""Decoders: one row of logits per completion at a time, from a policy and its key-value cache."""

from typing import Any

import torch
from torch import Tensor, nn

from rlif_lightning.functional.chunked import LinearHead
from rlif_lightning.models.lm_head import body_and_head
from rlif_lightning.models.scoring import positions
from rlif_lightning.sampling.kv_cache import preallocated_cache

PREFILL = 4096  # tokens of a prompt that go through the model at once


class PreallocatedDecoder:
    """Decodes a batch of rows token by token, padding on the left; long prompts are read in pieces.

    The policy's body with a cache that is written in place, and its head, called separately.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.body, head = body_and_head(policy)
        self.cache: Any = preallocated_cache(self.body)
        # One buffer for the logits of all tokens: fresh memory costs a CPU as much as a pass over it.
        self.logits = head.logits if head.weight is None else LinearHead(head.weight, head.scale)

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read prompts [P, L] with their bool mask; logits [P, V] of the first token of each completion."""
        self.mask, self.padded = mask, not bool(mask.all())
        position_ids = positions(mask)
        self.position = position_ids[:, -1:]
        for start in range(0, ids.shape[1], PREFILL):
            part = slice(start, start + PREFILL)
            hidden = self._hidden(ids[:, part], mask[:, : part.stop], position_ids[:, part])
        return self.logits(hidden[:, -1])

    def select_rows(self, rows: Tensor) -> None:
        """Continue with these rows [n] of the batch; one may come several times."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def step(self, token: Tensor) -> Tensor:
        """Append a token [n] to each row; logits [n, V] of the next, until the next call overwrites them."""
        self.position = self.position + 1
        mask = None
        if self.padded:
            length = self.cache.get_seq_length() + 1
            if length > self.mask.shape[1]:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), length // 4 + 128)], 1)
            mask = self.mask[:, :length]
        return self.logits(self.next_hidden(token[:, None], mask))

    def next_hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states [n, H] of one more token per row, ids [n, 1]; mask [n, length] bool, None: all is seen."""
        return self._hidden(ids, mask, self.position)[:, -1]

    def _hidden(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        out = self.body(
            input_ids=ids,
            attention_mask=None if mask is None else mask.long(),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state
