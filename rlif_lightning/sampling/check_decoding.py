"""Does cached, left-padded decoding of this architecture give what its plain forward gives?"""

from collections.abc import Sequence

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.models.scoring import positions
from rlif_lightning.sampling.native import NativeSampler
from rlif_lightning.sampling.protocol import Sampling

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats
HALF_TOLERANCE = 0.25  # half precision rounds prefill and decoding differently
SMALL_WINDOW = 64  # sliding windows up to this size are crossed by the check


@torch.no_grad()
def decoding_error(policy: nn.Module, end_ids: Sequence[int], pad_id: int) -> float:
    """Largest difference in log-probability (nats) between the sampler and an unpadded, uncached forward."""
    config = policy.config.get_text_config()  # type: ignore[operator, union-attr]
    window = getattr(config, "sliding_window", None) or 0
    base = window if window <= SMALL_WINDOW else 0
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(int(config.vocab_size), 1000)
    lengths = [3, 9 + base]  # ragged, so that padding matters
    prompts = [torch.randint(vocabulary, (n,), generator=generator, device="cpu").tolist() for n in lengths]
    sampler = NativeSampler()
    sampler.update(policy, end_ids, pad_id)
    drawn = sampler.sample(prompts, 2, torch.arange(4, device="cpu"), Sampling(max_new_tokens=5))
    assert drawn.logprob is not None
    worst = 0.0
    for i in range(4):
        tokens = drawn.completion_ids[i, : int(drawn.lengths[i])]
        ids = torch.cat([torch.tensor(prompts[i // 2], device=tokens.device), tokens])[None]
        mask = torch.ones_like(ids)
        out = policy(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        expected = out.logits[0, -len(tokens) - 1 : -1].float().log_softmax(-1).gather(1, tokens[:, None])
        worst = max(worst, float((expected.squeeze(1) - drawn.logprob[i, : len(tokens)]).abs().max()))
    return worst


def check_decoding(policy: nn.Module, end_ids: Sequence[int], pad_id: int) -> None:
    """Refuse an architecture that the native sampler decodes wrongly.

    Tested with Qwen2, Qwen3, Llama, Gemma 3 and Mistral; others are decided by this check.

    Raises:
        UserError: Decoding fails or differs from the plain forward.
    """
    set_training_mode(policy, training=False)
    kind = policy.config.model_type  # type: ignore[union-attr]
    try:
        error = decoding_error(policy, end_ids, pad_id)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError) as problem:
        raise UserError(
            f"The sampler can't decode the architecture '{kind}'",
            got=f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}",
            expected="a decoder with a key-value cache, such as Qwen2, Qwen3, Llama, Gemma 3 or Mistral",
        ) from problem
    tolerance = TOLERANCE.get(next(policy.parameters()).dtype, HALF_TOLERANCE)
    if not error <= tolerance:
        raise UserError(
            f"The sampler decodes the architecture '{kind}' differently from its own plain forward",
            got=f"log-probabilities off by {error:.3g} nats",
            expected=f"at most {tolerance:g}",
            do="use one of Qwen2, Qwen3, Llama, Gemma 3 or Mistral",
        )
