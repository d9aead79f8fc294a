"""The native sampler: the policy's own Hugging Face forward with a key-value cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError
from rlif_lightning.functional.token_stats import TokenStats, token_stats
from rlif_lightning.rollout import Samples
from rlif_lightning.sampling.draw import filter_logits, inverse_cdf, uniforms
from rlif_lightning.sampling.protocol import Progress, Sampling
from rlif_lightning.scoring import positions


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and bool mask [P, L], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


class NativeSampler:
    """Samples with the policy's own forward.

    Each distinct prompt goes through the model once and its cache is shared out to the group; statistics
    come from the very logits row that the token is drawn from, so online rewards cost no extra forward;
    finished rows leave the batch.

    Args:
        rows: Completions decoded at the same time; more prompts are sampled in waves. null: all at once.
    """

    KEEP = 0.75  # drop finished rows when the open ones are fewer than this share of the batch

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.policy: nn.Module | None = None
        self.end_ids: Tensor | None = None
        self.pad_id = 0

    def update(self, policy: nn.Module, end_ids: Sequence[int], pad_id: int) -> None:
        """Sample from this module; it is used in place, so its weights are always the present ones."""
        self.policy, self.pad_id = policy, pad_id
        self.end_ids = torch.tensor(sorted(end_ids))

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
        per_wave = len(prompts) if self.rows is None else max(1, self.rows // group_size)
        waves = []
        for start in range(0, len(prompts), per_wave):
            part = slice(start * group_size, (start + per_wave) * group_size)
            waves.append(self._wave(prompts[start : start + per_wave], group_size, seeds[part], sampling, progress))
        return waves[0] if len(waves) == 1 else _join(waves, self.pad_id)

    def _wave(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seeds: Tensor,
        sampling: Sampling,
        progress: Progress | None,
    ) -> Samples:
        from transformers import DynamicCache

        assert self.policy is not None and self.end_ids is not None, "call update() before sample()"
        model, end_ids = self.policy, self.end_ids
        device = next(model.parameters()).device
        end_ids = end_ids.to(device)
        ids, mask = pad_left(prompts, self.pad_id, device)  # [P, L]
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        out = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if not out.logits[:, -1].amax(-1).isfinite().all():
            raise UserError(
                "The policy's logits are not numbers any more: training has diverged",
                do="go back to an earlier checkpoint with a smaller learning rate, or clip gradients",
            )
        logits = out.logits[:, -1].repeat_interleave(group_size, 0)  # [N, V]
        cache.batch_repeat_interleave(group_size)
        ids, mask = (x.repeat_interleave(group_size, 0) for x in (ids, mask))  # [N, L]
        record = _Record(len(seeds), sampling, self.pad_id, device)
        numbers = uniforms(seeds, sampling.max_new_tokens).to(device) if sampling.temperature else None
        open_rows = torch.arange(len(seeds), device=device)  # rows still in the batch
        done = torch.zeros(len(seeds), dtype=torch.bool, device=device)  # of those in the batch
        seen, position = mask, mask.sum(1, keepdim=True)
        for t in range(sampling.max_new_tokens):
            token = record.step(t, open_rows, logits, None if numbers is None else numbers[open_rows, t], done)
            done = done | torch.isin(token, end_ids)
            left = int((~done).sum())
            if progress is not None:
                progress(t + 1, sampling.max_new_tokens)
            if left == 0 or t + 1 == sampling.max_new_tokens:
                break
            if left <= self.KEEP * len(done):
                keep = (~done).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                open_rows, token, done = open_rows[keep], token[keep], done[keep]
                seen, position = seen[keep], position[keep]
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            out = model(
                input_ids=token[:, None],
                attention_mask=seen.long(),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, position = out.logits[:, -1], position + 1
        return record.samples(ids, mask, end_ids)


class _Record:
    """Tokens and statistics as they are drawn."""

    def __init__(self, rows: int, sampling: Sampling, pad_id: int, device: torch.device) -> None:
        shape = (rows, sampling.max_new_tokens)
        self.sampling = sampling
        self.ids = torch.full(shape, pad_id, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logprob, self.kept_mass = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        stores = {
            name: torch.zeros(shape, dtype=torch.float32, device=device)
            for name in ("logprob", "entropy", "self_certainty", *sampling.statistics)
        }
        self.stats = TokenStats(**stores)
        self.width = 0

    def step(self, t: int, rows: Tensor, logits: Tensor, u: Tensor | None, done: Tensor) -> Tensor:
        """Choose token t of the given rows from logits [n, V]; finished rows write nothing. Returns [n]."""
        s = self.sampling
        z = logits.float()
        tempered = z / s.temperature if s.temperature not in (0.0, 1.0) else z
        filtered = filter_logits(tempered, s) if s.filtered else tempered
        if u is None:
            token = filtered.argmax(-1)
        else:
            token = inverse_cdf((filtered - filtered.amax(-1, keepdim=True)).exp(), u)
        wanted = s.statistics_temperature or s.temperature or 1.0
        stats = token_stats(z, token, wanted, s.statistics)
        own = stats.logprob if wanted == (s.temperature or 1.0) else token_stats(tempered, token).logprob
        live = ~done
        at = rows[live]
        self.ids[at, t] = token[live]
        self.mask[at, t] = True
        self.logprob[at, t] = own[live]
        for store, values in zip(self.stats, stats, strict=True):
            if store is not None and values is not None:
                store[at, t] = values[live]
        if s.filtered:
            kept = (filtered.logsumexp(-1) - tempered.logsumexp(-1)).exp()
            self.kept_mass[at, t] = kept[live]
        self.width = t + 1
        return token

    def samples(self, prompt_ids: Tensor, prompt_mask: Tensor, end_ids: Tensor) -> Samples:
        """Everything drawn, cut to the longest completion."""
        w = self.width
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


def _join(waves: list[Samples], pad_id: int) -> Samples:
    """Waves below each other, padded to the longest prompt and completion."""

    def stack(parts: list[Tensor], fill: float, left: bool) -> Tensor:
        width = max(p.shape[1] for p in parts)
        pads = [(width - p.shape[1], 0) if left else (0, width - p.shape[1]) for p in parts]
        return torch.cat([nn.functional.pad(p, pad, value=fill) for p, pad in zip(parts, pads, strict=True)])

    def column(name: str) -> Tensor | None:
        parts = [getattr(w, name) for w in waves]
        return None if parts[0] is None else stack(parts, 0, left=False)

    stats = [w.stats._asdict() for w in waves if w.stats is not None]
    wanted = [name for name, x in stats[0].items() if x is not None] if stats else []
    return Samples(
        prompt_ids=stack([w.prompt_ids for w in waves], pad_id, left=True),
        prompt_mask=stack([w.prompt_mask for w in waves], False, left=True),
        completion_ids=stack([w.completion_ids for w in waves], pad_id, left=False),
        completion_mask=stack([w.completion_mask for w in waves], False, left=False),
        ended=torch.cat([w.ended for w in waves]),
        logprob=column("logprob"),
        stats=TokenStats(**{k: stack([x[k] for x in stats], 0, left=False) for k in wanted}) if stats else None,
        kept_mass=column("kept_mass"),
    )
