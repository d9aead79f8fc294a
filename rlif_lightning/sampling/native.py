"""The native sampler: the policy's own Hugging Face forward with a key-value cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError
from rlif_lightning.functional.chunked import chunk_rows, chunked_stats
from rlif_lightning.functional.token_stats import TokenStats, token_logprobs
from rlif_lightning.models.references import free_memory
from rlif_lightning.rollout import Samples
from rlif_lightning.sampling.kv_cache import bytes_per_token
from rlif_lightning.sampling.llama_decoder import decoder_for
from rlif_lightning.sampling.protocol import Progress, Sampling
from rlif_lightning.sampling.token_sampling import TokenSampler, filter_logits, inverse_cdf, uniforms


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and bool mask [P, L], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


class NativeSampler:
    """Samples with the policy's own forward.

    Each distinct prompt goes through the model once and its cache is shared by the group; statistics come from the
    very logits row that the token is drawn from, so online rewards cost no extra forward; finished rows leave the
    batch.

    Args:
        rows: Completions decoded at the same time; more prompts are sampled one batch of prompts after the other.
            null: as many as half of the free memory can hold, should all of them grow as long as they may.
    """

    DROP_BELOW = 0.9  # drop finished rows when the open ones are fewer than this share of the batch
    LOOK_EVERY = 16  # tokens between two looks at what has finished, where a look makes the host wait for the device

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.policy: nn.Module | None = None
        self.end_ids: Tensor | None = None
        self.pad_id = 0

    def update(self, policy: nn.Module, end_ids: Sequence[int], pad_id: int) -> None:
        """Sample from this module; it is used in place, so its weights are always the current ones."""
        self.policy, self.pad_id = policy, pad_id
        self.end_ids = torch.tensor(sorted(end_ids))

    def release(self) -> None:
        """Nothing is kept between two rollouts."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seeds: Tensor,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> Samples:
        """Draw completions; see :class:`~rlif_lightning.sampling.protocol.Sampler`."""
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        rows = self._rows_that_fit(longest) if self.rows is None else self.rows
        per_batch = len(prompts) if rows is None else max(1, rows // group_size)
        batches = []
        for start in range(0, len(prompts), per_batch):
            part = slice(start * group_size, (start + per_batch) * group_size)
            batches.append(
                self._batch(prompts[start : start + per_batch], group_size, seeds[part], sampling, progress)
            )
        return batches[0] if len(batches) == 1 else _join(batches, self.pad_id)

    def _rows_that_fit(self, tokens: int) -> int | None:
        """Rows of so many tokens whose cache fits; None where nobody knows how much memory is free."""
        assert self.policy is not None
        weight = next(self.policy.parameters())
        free = free_memory(weight.device)
        # The parameters' dtype is an upper bound: under autocast keys and values may be smaller.
        return None if free is None else free // 2 // (tokens * bytes_per_token(self.policy.config, weight.dtype))

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seeds: Tensor,
        sampling: Sampling,
        progress: Progress | None,
    ) -> Samples:
        assert self.policy is not None and self.end_ids is not None, "call update() before sample()"
        device = next(self.policy.parameters()).device
        end_ids = self.end_ids.to(device)
        decoder = decoder_for(self.policy)
        ids, mask = pad_left(prompts, self.pad_id, device)  # [P, L]
        logits = decoder.prefill(ids, mask)  # [P, V]
        if not logits.amax(-1).isfinite().all():
            raise UserError(
                "The policy's logits are not numbers any more: training has diverged",
                do="go back to an earlier checkpoint with a smaller learning rate, or clip gradients",
            )
        finite = bool(logits.isfinite().all())  # tokens may be ruled out by a logit of -inf
        drawn = _DrawnTokens(len(seeds), sampling, self.pad_id, device, finite)
        group = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        decoder.select_rows(group)
        logits, ids, mask = logits[group], ids[group], mask[group]  # [N, ...]
        numbers = uniforms(seeds, sampling.max_new_tokens).to(device) if sampling.temperature else None
        open_rows = torch.arange(len(seeds), device=device)  # rows still in the batch
        done = torch.zeros(len(seeds), dtype=torch.bool, device=device)  # of those in the batch
        for t in range(sampling.max_new_tokens):
            token = drawn.draw(t, open_rows, logits, None if numbers is None else numbers[open_rows, t], done)
            done = done | torch.isin(token, end_ids)
            if progress is not None:
                progress(t + 1, sampling.max_new_tokens)
            if t + 1 == sampling.max_new_tokens:
                break
            if device.type == "cpu" or t % self.LOOK_EVERY == self.LOOK_EVERY - 1:
                left = (~done).nonzero().squeeze(1)
                if len(left) == 0:
                    break
                if len(left) <= self.DROP_BELOW * len(done):
                    decoder.select_rows(left)
                    open_rows, token, done = open_rows[left], token[left], done[left]
            logits = decoder.step(token)
        return drawn.samples(ids, mask, end_ids)


class _DrawnTokens:
    """Tokens and statistics as they are drawn.

    Args:
        rows: Completions N.
        sampling: The distribution to draw from.
        pad_id: Stands where a completion has ended.
        device: Of the policy.
        finite: No logit is -inf, as :class:`TokenSampler` needs it.
    """

    def __init__(self, rows: int, sampling: Sampling, pad_id: int, device: torch.device, finite: bool) -> None:
        shape = (rows, sampling.max_new_tokens)
        self.sampling, self.pad_id, self.finite = sampling, pad_id, finite
        self.temperature = sampling.temperature or 1.0
        self.statistics_temperature = sampling.statistics_temperature or self.temperature
        self.token_sampler = TokenSampler()
        self.ids = torch.full(shape, pad_id, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logprob, self.kept_mass = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.stats = TokenStats.zeros(shape, sampling.statistics, device)

    def draw(self, t: int, rows: Tensor, logits: Tensor, u: Tensor | None, done: Tensor) -> Tensor:
        """Choose token t of the given rows from logits [n, V]; finished rows write nothing. Returns [n]."""
        z = logits.float()
        tempered = z if self.temperature == 1.0 else z / self.temperature
        live = ~done
        if self.finite and not self.sampling.filtered:
            token, logprob, stats = self._draw_from_all(z, tempered, u)
        else:
            token, logprob, stats, kept = self._draw_from_some(z, tempered, u)
            self.kept_mass[rows, t] = kept.where(live, 0)
        self.ids[rows, t] = token.where(live, self.pad_id)
        self.mask[rows, t] = live
        self.logprob[rows, t] = logprob.where(live, 0)
        for store, values in zip(self.stats.tensors, stats.tensors, strict=True):
            store[rows, t] = values.where(live, 0)
        return token

    def _draw_from_all(self, z: Tensor, tempered: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, TokenStats]:
        """Token, log-probability and statistics [n] from finite logits [n, V] without a filter."""
        if self.statistics_temperature == self.temperature and not self.sampling.statistics:
            token, stats = self.token_sampler(tempered, u)
            return token, stats.logprob, stats
        token, drawn = self.token_sampler(tempered.clone() if tempered is z else tempered, u)  # overwrites them
        return token, drawn.logprob, self._stats(z, token)

    def _draw_from_some(
        self, z: Tensor, tempered: Tensor, u: Tensor | None
    ) -> tuple[Tensor, Tensor, TokenStats, Tensor]:
        """As :meth:`_draw_from_all` where logits are -inf or filtered; and the probability [n] that is left."""
        filtered = filter_logits(tempered, self.sampling)
        if u is None:
            token = filtered.argmax(-1)
        else:
            token = inverse_cdf((filtered - filtered.amax(-1, keepdim=True)).exp(), u)
        stats, same = self._stats(z, token), self.statistics_temperature == self.temperature
        logprob = stats.logprob if same else token_logprobs(tempered, token)
        return token, logprob, stats, (filtered.logsumexp(-1) - tempered.logsumexp(-1)).exp()

    def _stats(self, z: Tensor, token: Tensor) -> TokenStats:
        """Statistics [n] of softmax(z / statistics temperature), a few rows of logits [n, V] at a time."""
        return chunked_stats(
            z,
            lambda rows: rows,
            token,
            self.statistics_temperature,
            self.sampling.statistics,
            chunk=chunk_rows(z.shape[-1]),
        )

    def samples(self, prompt_ids: Tensor, prompt_mask: Tensor, end_ids: Tensor) -> Samples:
        """Everything drawn, cut to the longest completion."""
        w = int(self.mask.any(0).sum())
        mask = self.mask[:, :w]
        last = self.ids[:, :w].gather(1, (mask.sum(1, keepdim=True) - 1)).squeeze(1)
        return Samples(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=self.ids[:, :w],
            completion_mask=mask,
            ended=torch.isin(last, end_ids),
            logprob=self.logprob[:, :w],
            stats=self.stats.map(lambda x: x[:, :w]),
            kept_mass=self.kept_mass[:, :w] if self.sampling.filtered else None,
        )


def _join(batches: list[Samples], pad_id: int) -> Samples:
    """Batches of prompts below each other, padded to the longest prompt and completion."""

    def stack(parts: Sequence[Tensor], fill: float = 0, left: bool = False) -> Tensor:
        width = max(p.shape[1] for p in parts)
        pads = [(width - p.shape[1], 0) if left else (0, width - p.shape[1]) for p in parts]
        return torch.cat([nn.functional.pad(p, pad, value=fill) for p, pad in zip(parts, pads, strict=True)])

    def column(name: str, fill: float = 0, left: bool = False) -> Tensor:
        return stack([getattr(batch, name) for batch in batches], fill, left)

    stats = [batch.stats for batch in batches if batch.stats is not None]
    return Samples(
        prompt_ids=column("prompt_ids", pad_id, left=True),
        prompt_mask=column("prompt_mask", left=True),
        completion_ids=column("completion_ids", pad_id),
        completion_mask=column("completion_mask"),
        ended=torch.cat([batch.ended for batch in batches]),
        logprob=column("logprob"),
        stats=stats[0].with_tensors(map(stack, zip(*(s.tensors for s in stats), strict=True))),
        kept_mass=None if batches[0].kept_mass is None else column("kept_mass"),
    )
