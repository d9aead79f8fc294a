"""Load a policy, its tokenizer and its frozen reference."""

import copy
import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.functional.products import speed_up
from rlif_lightning.hub import from_hub, is_local, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that can pad and that knows how a text ends.

    A missing padding token is replaced by the end token: padding is always masked, so any token will do.

    Raises:
        UserError: No tokenizer there, or it is empty or has no end token.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    tokenizer = from_hub(
        "tokenizer",
        name,
        lambda: AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code),
    )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(  # transformers makes one up where files are missing
            "The tokenizer has no vocabulary, so every text would be empty",
            got=name,
            do="copy the tokenizer's files, such as tokenizer.json, into the model's folder",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no end-of-sequence token, so no completion could ever end",
            got=name,
            do='set "eos_token" in its tokenizer_config.json',
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(tokenizer: "PreTrainedTokenizerBase", generation_config: Any, extra: Sequence[str]) -> list[int]:
    """Every id that ends a completion: generation config, tokenizer, and tokens named in the recipe.

    A base model with a chat template ends on a token that its generation config does not list.

    Raises:
        UserError: A named token is not one token of the vocabulary.
    """
    ids = {tokenizer.eos_token_id}
    listed = getattr(generation_config, "eos_token_id", None)
    ids |= set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    vocabulary = tokenizer.get_vocab() if extra else {}
    for token in extra:
        if token not in vocabulary:
            raise UserError("model.end_tokens names a token that the tokenizer does not have", got=repr(token))
        ids.add(vocabulary[token])
    return sorted(ids)


def check_ids(policy: Any, ids: Sequence[int]) -> None:
    """Refuse a tokenizer whose end or padding tokens the model does not have.

    Not the whole vocabulary: Gemma 3's tokenizer knows an image token that its text models lack.

    Raises:
        UserError: An id beyond the input embedding.
    """
    rows = policy.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        raise UserError(
            "The tokenizer does not belong to the model",
            got=f"end and padding tokens with the ids {', '.join(map(str, ids))}",
            expected=f"ids below {rows}, the tokens that the model knows",
        )


def check_lora(lora: dict[str, Any]) -> None:
    """Refuse settings that peft's LoraConfig does not have.

    Raises:
        UserError: An unknown key, with the nearest known one.
    """
    from peft import LoraConfig

    known = [f.name for f in dataclasses.fields(LoraConfig)]
    for key in lora:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(
                f"model.lora has no setting '{key}'",
                expected="a field of peft.LoraConfig" + (f", perhaps '{near[0]}'" if near else ""),
            )


def same_lora(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two settings of LoRA make the same model; dropout belongs to the training, not to the model."""
    from peft import LoraConfig

    full = [None if x is None else LoraConfig(**{**x, "lora_dropout": 0.0}).to_dict() for x in (one, other)]
    return full[0] == full[1]


def load_policy(
    name: str,
    *,
    dtype: torch.dtype,
    lora: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal language model from safetensors, with a fresh LoRA adapter where asked.

    Args:
        name: ``toy``, a folder or a hub name.
        dtype: Of the weights; a LoRA adapter is always float32.
        lora: Fields of ``peft.LoraConfig``.
        gradient_checkpointing: Recompute the layers' activations in the backward pass.
        revision: Of a hub repository.
        attn_implementation: As transformers names it; null: its choice.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UserError: No such model, no such weights, or LoRA targets that match nothing.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    model = from_hub(
        "model",
        name,
        lambda: AutoModelForCausalLM.from_pretrained(
            path,
            revision=None if is_local(path) else revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        ),
    )
    speed_up(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is None:
        return model
    return add_lora(model, lora)


def add_lora(model: Any, lora: dict[str, Any]) -> nn.Module:
    """Wrap a model with a fresh float32 LoRA adapter; only the adapter trains.

    Raises:
        UserError: Unknown settings, or targets that match nothing.
    """
    from peft import LoraConfig, get_peft_model

    check_lora(lora)
    try:
        policy = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **lora}))
    except ValueError as error:
        raise UserError("The LoRA adapter does not fit the model", got=lora, expected=str(error)) from error
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy.eval()  # as from_pretrained leaves a model; peft's own modules start with dropout on


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the policy as it stands, without gradients, its linear layers in a given dtype.

    Only those: autocast rounds them alike in the policy, while embeddings and norms keep the residual stream in
    float32. So under autocast, where alone
    it may run if the dtype is a half one, the copy computes exactly what the policy did.
    """
    reference = copy.deepcopy(model)
    rounded = linear_weights(model)
    for name, weight in reference.named_parameters():
        if name in rounded:
            weight.data = weight.data.to(dtype)
    return reference.requires_grad_(False).eval()


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that autocast rounds: those of linear layers, but for a head that is the embedding."""
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    linear.discard(id(model.get_input_embeddings().weight))  # type: ignore[operator]
    return {name for name, p in model.named_parameters() if id(p) in linear}


def set_training_mode(model: nn.Module, training: bool, dropout: bool = False) -> None:
    """Switch between sampling and training without switching dropout on.

    Gradient checkpointing asks each decoder layer whether it trains, dropout asks the dropout module and the
    attention: so only the decoder layers themselves are told, unless dropout is wanted.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(training and dropout)
    if training:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[nn.Module]:
    """The bare base model under a LoRA policy, bit by bit."""
    with policy.disable_adapter():  # type: ignore[operator]
        yield policy


def fingerprint(model: Any) -> str:
    """A short mark of a model's shape and starting weights.

    Shapes and a sample of all weights, rounded to bfloat16, so that the same model loaded in another precision
    has the same mark.
    """
    mark = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            mark.update(f"{name.replace('.base_layer', '')}{tuple(parameter.shape)}".encode())
            weight = parameter.detach().flatten()
            sample = weight[:: max(1, len(weight) // 256)].to("cpu", torch.bfloat16).float()
            mark.update(sample.numpy().tobytes())
    return mark.hexdigest()[:16]
