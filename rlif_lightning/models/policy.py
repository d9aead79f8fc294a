"""Load a policy, its tokenizer and its frozen reference."""

import copy
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.hub import from_hub, is_local, resolve_model
from rlif_lightning.models.lora import StoredAdapter, add_adapter, add_lora, check_base, check_fit
from rlif_lightning.models.quantization import Quantization, keep_as_quantised, quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What PEFT puts into the names of an adapter's own weights, and of those of the base around which it stands.
ADAPTED = ("lora_", ".modules_to_save.", ".trainable_tokens_")
WRAPPERS = (".token_adapter", ".base_layer", ".original_module")


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


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration, without its weights.

    Raises:
        UserError: No such model.
    """
    from transformers import AutoConfig

    path = resolve_model(name)
    own = None if is_local(path) else revision
    return from_hub(
        "model", name, lambda: AutoConfig.from_pretrained(path, revision=own, trust_remote_code=trust_remote_code)
    )


def load_policy(
    name: str,
    *,
    dtype: torch.dtype,
    lora: dict[str, Any] | None = None,
    adapter: StoredAdapter | None = None,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal language model from safetensors, with a LoRA adapter where asked.

    Args:
        name: ``toy``, a folder or a hub name.
        dtype: Of the weights that are not quantised, and of products with those that are; an adapter is float32.
        lora: Fields of ``peft.LoraConfig`` for a fresh adapter.
        adapter: One that was trained before, in place of a fresh one.
        quantization: Hold the weights of the linear layers, but for the head, in 4 bits.
        device: Where 4-bit weights are made, piece by piece; null: on the CPU. Others are always loaded there.
        gradient_checkpointing: Recompute the layers' activations in the backward pass.
        revision: Of a hub repository.
        attn_implementation: As transformers names it; null: its choice.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UserError: No such model, no such weights, or an adapter that does not fit; the last before weights are read.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    if adapter is not None:
        lora = adapter.lora
        check_base(adapter, name, path)
    if lora is not None:
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        check_fit(config, lora, adapter, trust_remote_code)
    own: dict[str, Any] = {}
    if quantization is not None:
        own = {"quantization_config": quantization_config(dtype), "device_map": {"": device or torch.device("cpu")}}
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
            **own,
        ),
    )
    if quantization is not None:
        keep_as_quantised(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # so inputs need no gradient for an adapter's
    if adapter is not None:
        return add_adapter(model, adapter)
    return model if lora is None else add_lora(model, lora)


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


def set_training_mode(model: nn.Module, training: bool) -> None:
    """Switch between sampling and training without switching dropout on.

    Gradient checkpointing asks each decoder layer whether it trains, dropout asks the dropout module and the
    attention: so only the decoder layers themselves are told.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    if training:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True


def fingerprint(model: Any) -> str:
    """A short mark of a model's shape and starting weights.

    Shapes and a sample of all weights, rounded to bfloat16, so that the same model loaded in another precision
    has the same mark. Of 4-bit weights the shapes alone, as rounding to them may depend on the device; so a model
    has another mark in 4 bits.
    """
    mark = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, parameter in base.named_parameters():
        if any(part in name for part in ADAPTED):
            continue
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes, whose own shape is that of packed bytes
        shape = parameter.shape if state is None else state.shape
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        mark.update(f"{name}{tuple(shape)}".encode())
        if state is None:
            weight = parameter.detach().flatten()
            sample = weight[:: max(1, len(weight) // 256)].to("cpu", torch.bfloat16).float()
            mark.update(sample.numpy().tobytes())
    return mark.hexdigest()[:16]
