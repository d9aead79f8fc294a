"""Does cached, left-padded decoding of this architecture give what its plain forward gives?"""

from collections.abc import Sequence

import torch
from torch import nn

from rlif_lightning.errors import UserError, said_by_python
from rlif_lightning.functional.token_stats import token_logprobs
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.models.scoring import DECODERS, FAILURES, tolerance
from rlif_lightning.sampling.native import NativeSampler
from rlif_lightning.sampling.protocol import Sampling


@torch.no_grad()
def decoding_error(policy: nn.Module, end_ids: Sequence[int], pad_id: int) -> float:
    """Largest difference in log-probability (nats) between the sampler and an unpadded, uncached forward."""
    config = policy.config.get_text_config()  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(int(config.vocab_size), 1000)
    lengths = 3, 9  # ragged, so that padding matters
    prompts = [torch.randint(vocabulary, (n,), generator=generator, device="cpu").tolist() for n in lengths]
    sampler = NativeSampler()
    sampler.update(policy, end_ids, pad_id)
    drawn = sampler.sample(prompts, 2, torch.arange(4, device="cpu"), Sampling(max_new_tokens=5))
    errors = []
    for i in range(4):
        row = drawn.rows(torch.tensor([i], device="cpu"))  # without padding
        assert row.logprob is not None
        ids, start = torch.cat([row.prompt_ids, row.completion_ids], 1), row.prompt_ids.shape[1] - 1
        logits = policy(input_ids=ids, use_cache=False).logits[:, start:-1]
        errors.append(token_logprobs(logits, row.completion_ids) - row.logprob)
    return float(torch.cat(errors, 1).abs().max())


def check_decoding(policy: nn.Module, end_ids: Sequence[int], pad_id: int) -> None:
    """Refuse an architecture that the native sampler does not decode, or otherwise than its plain forward.

    Tested with Qwen2, Qwen3, Llama, Gemma 3 and Mistral; others are decided by this check.
    """
    set_training_mode(policy, training=False)
    kind = policy.config.model_type  # type: ignore[union-attr]
    try:
        error = decoding_error(policy, end_ids, pad_id)
    except FAILURES as problem:
        wrong = f"The sampler can't decode the architecture '{kind}'"
        raise UserError(wrong, got=said_by_python(problem), expected=DECODERS) from problem
    most = tolerance(policy)
    if not error <= most:
        raise UserError(
            f"The sampler decodes the architecture '{kind}' differently from its own plain forward",
            got=f"log-probabilities off by {error:.3g} nats",
            expected=f"at most {most:g}",
            do="use one of Qwen2, Qwen3, Llama, Gemma 3 or Mistral",
        )
