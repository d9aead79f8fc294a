"""A model without weights."""

from typing import Any

import torch


def meta_model(config: Any, *, trust_remote_code: bool, **settings: Any) -> Any:
    """A causal language model on the meta device, which has shapes and neither memory nor numbers.

    Args:
        config: Of the model.
        trust_remote_code: Run Python code that comes with the model. Not left out: transformers would ask on stdin.
        settings: Others of ``AutoModelForCausalLM.from_config``.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **settings)
