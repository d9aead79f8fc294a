"""The generation settings of an export: those under which its accuracy was measured."""

from typing import Any


def generation_config(base: Any, tokenizer: Any, end_ids: list[int], temperature: float | None) -> Any:
    """Every end token of training, and the sampling of the recipe's evaluation, without filters and penalties.

    What the base model brings along, such as a repetition penalty or a top-k filter, never acted in training. No
    longest completion: vLLM's server would take it for a limit, and lm-evaluation-harness could not set its own.

    Args:
        base: The base model's generation config; only its beginning token is taken.
        tokenizer: The model's tokenizer.
        end_ids: Token ids that ended a completion.
        temperature: Of the evaluation's samples; None: greedy.
    """
    from transformers import GenerationConfig

    # top_k 0: transformers would otherwise sample among the 50 most likely tokens.
    sampled = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(
        bos_token_id=getattr(base, "bos_token_id", None),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids,
        **({"do_sample": False} if temperature is None else sampled),
    )
