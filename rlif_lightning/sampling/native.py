"""The native sampler: the policy's own Hugging Face forward with a key-value cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlif_lightning.errors import check_ranges
from rlif_lightning.functional.chunked import chunk_rows, chunked_stats
from rlif_lightning.functional.token_stats import TokenStats, token_logprobs
from rlif_lightning.models.references import free_memory
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.rollout import Samples, left_trim, pad_left
from rlif_lightning.runs.signals import look
from rlif_lightning.sampling.kv_cache import bytes_per_token, cache_room
from rlif_lightning.sampling.llama_decoder import decoder_for
from rlif_lightning.sampling.protocol import Progress, Sampling, diverged
from rlif_lightning.sampling.token_sampling import TokenSampler, filter_logits, inverse_cdf, uniforms


class NativeSampler:
    """Samples with the policy's own forward.

    Each distinct prompt goes through the model once and its cache is shared by the group; statistics come from the
    very logits row that the token is drawn from, so online rewards cost no extra forward; finished rows leave the
    batch.

    Args:
        rows: Completions decoded at the same time; more prompts are sampled in several batches. null: as many as half
            of the free memory holds if all of them reach their longest length.
    """

    DROP_BELOW = 0.9  # drop finished rows when the open ones are fewer than this share of the batch
    LOOK_EVERY = 16  # tokens between two looks at what has finished: a look makes the host wait for the device
    LOOK_EVERY_ON_CPU = 1

    def __init__(self, rows: int | None = None) -> None:
        check_ranges("sampler", ("rows", rows, rows is None or rows >= 1, "1 or more, or null"))
        self.rows = rows
        self.policy: nn.Module | None = None
        self.end_ids = torch.tensor([], dtype=torch.long)
        self.pad_id = 0
        self.stop: StopStrings | None = None

    def check(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, device: torch.device | None, processes: int = 1
    ) -> None:
        """Nothing: it can sample from every policy."""

    def update(self, policy: nn.Module, end_ids: Sequence[int], pad_id: int, stop: StopStrings | None = None) -> None:
        """Sample from this module; it is used in place, so its weights are always the current ones."""
        self.policy, self.pad_id, self.stop = policy, pad_id, stop
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
        assert self.policy is not None, "call update() before sample()"
        per_batch = self._prompts_at_once(prompts, group_size, sampling)
        device = next(self.policy.parameters()).device
        ids, mask = pad_left(prompts, self.pad_id, device)  # [P, L]
        drawn = _DrawnTokens(len(seeds), sampling, self.pad_id, device, self.stop)
        numbers = uniforms(seeds, sampling.max_new_tokens).to(device) if sampling.temperature else None
        for start in range(0, len(prompts), per_batch):
            batch = slice(start, start + per_batch)
            trim = left_trim(mask[batch])
            first = start * group_size
            self._draw_batch(ids[batch, trim:], mask[batch, trim:], first, group_size, numbers, drawn, progress)
        group = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        return drawn.samples(ids[group], mask[group], self.end_ids.to(device))

    @torch.no_grad()
    def sample_last_token(self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling) -> None:
        """Decode the last token of the largest batch after empty keys and values: the most that is ever held.

        Of the prompts, the very longest first, as many as fit are taken.
        """
        assert self.policy is not None
        longest, tokens = len(prompts[0]), sampling.max_new_tokens
        device = next(self.policy.parameters()).device
        ids, mask = pad_left(prompts[: self._prompts_at_once(prompts, group_size, sampling)], self.pad_id, device)
        decoder = decoder_for(self.policy)
        decoder.prefill(ids, mask)
        group = torch.arange(len(ids), device=device).repeat_interleave(group_size)
        decoder.select_rows(group)
        for layer in decoder.cache.layers:
            layer.extend(longest + tokens - 2, cache_room(longest, tokens))
        decoder.mask = torch.cat([decoder.mask, decoder.mask.new_ones(len(group), tokens)], 1)
        z = decoder.step(ids[group, -1]).float()
        TokenSampler()(z if sampling.temperature == 1 else z / sampling.temperature, None)

    def _prompts_at_once(self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling) -> int:
        """How many prompts are completed at the same time; all of them where nobody knows how much memory is free."""
        assert self.policy is not None
        weight, rows = next(self.policy.parameters()), self.rows
        free = free_memory(weight.device) if rows is None else None
        if free is not None:
            # The parameters' dtype is an upper bound: under autocast keys and values may be smaller.
            tokens = max(map(len, prompts)) + sampling.max_new_tokens
            rows = free // 2 // (tokens * bytes_per_token(self.policy.config, weight.dtype))
        return len(prompts) if rows is None else max(1, rows // group_size)

    def _draw_batch(
        self,
        ids: Tensor,  # [P, L]
        mask: Tensor,  # [P, L]
        first: int,  # number of the first completion among all [N]
        group_size: int,
        numbers: Tensor | None,  # [N, T] uniform
        drawn: "_DrawnTokens",
        progress: Progress | None,
    ) -> None:
        """Draw the completions of some prompts."""
        assert self.policy is not None
        device, tokens = ids.device, drawn.sampling.max_new_tokens
        end_ids = self.end_ids.to(device)
        decoder = decoder_for(self.policy)
        logits = decoder.prefill(ids, mask)  # [P, V]
        if not logits.amax(-1).isfinite().all():
            raise diverged()
        drawn.finite = bool(logits.isfinite().all())  # tokens may be ruled out by a logit of -inf
        group = torch.arange(len(ids), device=device).repeat_interleave(group_size)
        decoder.select_rows(group)
        logits = logits[group]  # [n, V]
        rows = torch.arange(first, first + len(group), device=device)  # of all [N], those still in the batch
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # of those in the batch
        every, read = self.LOOK_EVERY_ON_CPU if device.type == "cpu" else self.LOOK_EVERY, 0
        for t in range(tokens):
            look()
            token = drawn.draw(t, rows, logits, None if numbers is None else numbers[rows, t], done)
            done = done | torch.isin(token, end_ids)
            looks = (t + 1) % every == 0
            if self.stop is not None and (looks or t + 1 == tokens):
                done, read = done | drawn.stopped(rows, read, t + 1), t + 1
            if progress is not None:
                progress(t + 1, tokens)
            if t + 1 == tokens:
                break
            if looks:
                left = (~done).nonzero().squeeze(1)
                if len(left) == 0:
                    break
                if len(left) <= self.DROP_BELOW * len(done):
                    decoder.select_rows(left)
                    rows, token, done = rows[left], token[left], done[left]
            logits = decoder.step(token)


class _DrawnTokens:
    """Tokens and statistics [N, T] as they are drawn."""

    def __init__(
        self, rows: int, sampling: Sampling, pad_id: int, device: torch.device, stop: StopStrings | None
    ) -> None:
        shape = (rows, sampling.max_new_tokens)
        self.sampling, self.pad_id = sampling, pad_id
        self.finite = True  # no logit is -inf, as TokenSampler needs it
        self.temperature = sampling.temperature or 1.0
        self.statistics_temperature = sampling.statistics_temperature or self.temperature
        self.token_sampler = TokenSampler()
        self.ids = torch.full(shape, pad_id, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logprob, self.kept_mass = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.stats = TokenStats.zeros(shape, sampling.statistics, device)
        self.stop, self.read = stop, [b""] * rows  # of each row, what `StopStrings.find` keeps
        self.ends: dict[int, int] = {}  # row -> tokens, of those that contain a stop string

    def draw(self, t: int, rows: Tensor, logits: Tensor, u: Tensor | None, done: Tensor) -> Tensor:
        """Choose token t of the given rows from logits [n, V]; finished rows write nothing. Returns [n]."""
        z = logits.float()
        tempered = z if self.temperature == 1.0 else z / self.temperature
        live, same = ~done, self.statistics_temperature == self.temperature
        if self.finite and not self.sampling.filtered:
            alone = same and not self.sampling.statistics  # else the logits are needed after they are overwritten
            token, stats = self.token_sampler(tempered.clone() if tempered is z and not alone else tempered, u)
            logprob, stats = stats.logprob, stats if alone else self._stats(z, token)
        else:
            filtered = filter_logits(tempered, self.sampling)
            weights = (filtered - filtered.amax(-1, keepdim=True)).exp()
            token = filtered.argmax(-1) if u is None else inverse_cdf(weights, u)
            stats = self._stats(z, token)
            logprob = stats.logprob if same else token_logprobs(tempered, token)
            self.kept_mass[rows, t] = (filtered.logsumexp(-1) - tempered.logsumexp(-1)).exp().where(live, 0)
        self.ids[rows, t] = token.where(live, self.pad_id)
        self.mask[rows, t] = live
        self.logprob[rows, t] = logprob.where(live, 0)
        for store, values in zip(self.stats.tensors, stats.tensors, strict=True):
            store[rows, t] = values.where(live, 0)
        return token

    def _stats(self, z: Tensor, token: Tensor) -> TokenStats:
        """Statistics [n] of softmax(z / statistics temperature), a few rows of logits [n, V] at a time."""
        temperature, own, chunk = self.statistics_temperature, self.sampling.statistics, chunk_rows(z.shape[-1])
        return chunked_stats(z, lambda rows: rows, token, temperature, own, chunk=chunk)

    def stopped(self, rows: Tensor, start: int, end: int) -> Tensor:
        """Look for stop strings in the tokens from start to end; returns which of the rows [n] have one by now."""
        assert self.stop is not None
        ids, counts = self.ids[rows, start:end].tolist(), self.mask[rows, start:end].sum(1).tolist()
        for row, new, count in zip(rows.tolist(), ids, counts, strict=True):
            found, self.read[row] = self.stop.find(new[:count], self.read[row])
            if found is not None:
                self.ends[row] = start + found
        return torch.tensor([row in self.ends for row in rows.tolist()], device=rows.device)

    def _cut(self) -> Tensor:
        """Leave out what was drawn after a stop string before a look; returns which rows [N] have one."""
        rows = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        for row, length in self.ends.items():
            rows[row], self.mask[row, length:] = True, False
        if self.ends:
            self.ids = self.ids.where(self.mask, self.pad_id)
            self.logprob, self.kept_mass = (x.where(self.mask, 0) for x in (self.logprob, self.kept_mass))
            self.stats = self.stats.map(lambda x: x.where(self.mask, 0))
        return rows

    def samples(self, prompt_ids: Tensor, prompt_mask: Tensor, end_ids: Tensor) -> Samples:
        """Everything drawn, cut to the longest completion."""
        stopped = self._cut()
        w = int(self.mask.any(0).sum())
        mask = self.mask[:, :w]
        last = self.ids[:, :w].gather(1, (mask.sum(1, keepdim=True) - 1)).squeeze(1)
        return Samples(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=self.ids[:, :w],
            completion_mask=mask,
            ended=torch.isin(last, end_ids) | stopped,
            logprob=self.logprob[:, :w],
            stats=self.stats.map(lambda x: x[:, :w]),
            kept_mass=self.kept_mass[:, :w] if self.sampling.filtered else None,
        )
