"""The sampler's statistics against a plain Hugging Face forward, unpadded, without a cache."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from benchmarks.gpu.day import Day
from benchmarks.gpu.rows import Row, judged
from benchmarks.result import short
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.rollout import Samples
from rlif_lightning.sampling import NativeSampler, Sampling

TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 0.25, "16-mixed": 0.03}
"""Nats. Those that the product's check of an architecture has; float16 has three binary digits more than bfloat16."""
NAMES = ("logprob", "entropy", "self_certainty")


def against_plain(day: Day, precision: str) -> list[Row]:
    """All statistics of all sampled tokens; in half precision also how far both are from float32."""
    model = day.new_model("0.5B", torch.float32)
    end, lengths = model.config.eos_token_id, (3, 17, 40)  # ragged, so that padding matters
    prompts = [[(i * n) % 50 for i in range(n)] for n in lengths]
    sampler = NativeSampler()
    sampler.update(model, [end], end)
    sampling, seeds = Sampling(8 if day.tiny else 64), completion_seeds(0, [(0, i) for i in range(len(lengths))], 4)
    with torch.no_grad(), day.autocast(precision):
        drawn = sampler.sample(prompts, 4, seeds, sampling)
    assert drawn.logprob is not None and drawn.stats is not None
    own = torch.stack([drawn.logprob, drawn.stats.entropy, drawn.stats.self_certainty])[:, drawn.completion_mask]
    plain = torch.cat(list(plain_statistics(model, drawn, day.autocast(precision))), 1)
    errors = (own.double() - plain).abs()
    value = ", ".join(f"{name} {short(float(e.max()))}" for name, e in zip(NAMES, errors, strict=True))
    most = TOLERANCE[precision]
    rows = [
        judged(
            f"sampler against the plain forward, {precision}",
            f"largest differences over {own.shape[1]:,} tokens: {value} nats; mean {short(float(errors.mean()))}",
            f"at most {most} nats",
            bool(errors.max() <= most),
        )
    ]
    if precision != "32-true":
        exact = torch.cat(list(plain_statistics(model, drawn, day.autocast("32-true"))), 1)[0]
        off = exact - own[0].double()
        kl = float((off.exp() - 1 - off).mean())
        mean, largest = short(float(off.abs().mean())), short(float(off.abs().max()))
        value = f"log-probability off by {mean} nats on average, {largest} at most; KL (k3) {short(kl)} nats"
        rows.append(Row(f"{precision} against float32", value))
    return rows


@torch.no_grad()
def plain_statistics(model: torch.nn.Module, drawn: Samples, cast: AbstractContextManager) -> Iterator[torch.Tensor]:
    """[3, T] of each row: log-probability, entropy and self-certainty of its tokens."""
    for i in range(len(drawn.completion_ids)):
        prompt = drawn.prompt_ids[i][drawn.prompt_mask[i]]
        completion = drawn.completion_ids[i][drawn.completion_mask[i]]
        with cast:
            logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits
        logp = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        chosen = logp.gather(1, completion[:, None]).squeeze(1)
        yield torch.stack([chosen, -(logp.exp() * logp).sum(-1), -logp.mean(-1) - math.log(logp.shape[1])])
