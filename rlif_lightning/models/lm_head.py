"""A causal language model taken apart: the body that makes hidden states, and the head that makes logits of them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LMHead(NamedTuple):
    """What turns hidden states into logits."""

    module: nn.Module  # the output embedding: nn.Linear, or something around it, such as a LoRA or a 4-bit layer
    scale: float = 1.0  # factor of its output (Granite, Cohere)
    softcap: float | None = None  # bounds the logits softly: softcap x tanh(z / softcap) (Gemma 2)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H]."""
        z: Tensor = self.module(hidden)
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z

    @property
    def weight(self) -> Tensor | None:
        """The weight [V, H] where logits are scale x weight hidden and nothing else; None otherwise."""
        module = self.module
        if type(module) is not nn.Linear or module.bias is not None or self.softcap is not None:
            return None
        return None if module._forward_hooks or module._forward_pre_hooks else module.weight


def body_and_head(policy: Any) -> tuple[nn.Module, LMHead]:
    """The two halves of a policy, LoRA or not, in use by turns.

    That head(body(x)) is the policy's own forward is checked when a policy is loaded (sampling/check_decoding.py).
    """
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    return model.get_decoder(), LMHead(model.get_output_embeddings(), scale, softcap)
