"""A model from a folder or the hub: by which settings, and its weights."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.hub import from_hub, load_config, resolve_model
from rlif_lightning.models.lora import StoredAdapter, add_adapter, add_lora, check_fit, check_lora
from rlif_lightning.models.quantization import Quantization, keep_as_quantised, quantization_config
from rlif_lightning.models.tokenizer import load_tokenizer
from rlif_lightning.models.weight_files import check_files, check_finite, check_loaded, file_weights, warn_of_unused
from rlif_lightning.warnings_shown import no_load_report, rank_zero_warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicySettings:
    """Which model, and how it is loaded."""

    name: str  # toy, a Hugging Face folder or a hub name
    lora: dict[str, Any] | None = None  # fields of peft.LoraConfig for a fresh adapter
    adapter: str | None = None  # folder or hub name of one that was trained before, in place of a fresh one
    quantization: Quantization | None = None  # of the linear layers but for the head
    gradient_checkpointing: bool = False
    end_tokens: Sequence[str] = ()  # besides those of the generation config and the tokenizer
    revision: str | None = None  # of a hub repository
    trust_remote_code: bool = False  # run Python code that comes with the model
    turn_end: str | None = None  # the token after an answer in the chat template that makes the prompts
    stop: Sequence[str] = ()  # strings that end a completion as well

    def check(self) -> None:
        """Refuse what can be seen to be wrong without the model: settings of LoRA, or two adapters."""
        if self.trust_remote_code:
            rank_zero_warn(f"model.trust_remote_code runs the Python code that comes with {self.name}.")
        if self.lora is not None:
            check_lora(self.lora)
        if self.lora is not None and self.adapter is not None:
            raise UserError(
                "model.lora and model.adapter exclude each other: an adapter has settings of its own",
                got=f"model.adapter {self.adapter}, model.lora {self.lora}",
                do="set model.lora to null to train this adapter on, or leave model.adapter out for a fresh one",
            )

    @property
    def source(self) -> dict[str, Any]:
        """Where the model comes from besides its name, for whatever loads a part of it."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer; needs no weights."""
        return load_tokenizer(self.name, **self.source)


def load_model(
    settings: PolicySettings, dtype: torch.dtype, adapter: StoredAdapter | None, device: torch.device
) -> nn.Module:
    """Load a causal language model from safetensors, in eval mode, with a LoRA adapter where asked.

    The dtype is that of weights that are not quantised, and of products with those that are; an adapter is float32.
    4-bit weights are made on the device, piece by piece; others are always loaded on the CPU.
    """
    from transformers import AutoModelForCausalLM

    name, path = settings.name, resolve_model(settings.name)
    if adapter is not None:
        _check_base(adapter, name, path)
    config = load_config(name, **settings.source)
    if settings.lora is not None:
        check_fit(config, settings.lora, adapter, settings.trust_remote_code)
    check_files(name, path, config, **settings.source)
    options = {**settings.source, "dtype": dtype, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if settings.quantization is not None:
        # In 4 bits NaN becomes a number.
        from_hub("model", name, lambda: check_finite(file_weights(path, settings.revision), name))
        options |= {"quantization_config": quantization_config(dtype), "device_map": {"": device}}
    with no_load_report():
        model, found = from_hub("model", name, lambda: AutoModelForCausalLM.from_pretrained(path, **options))
    check_loaded(found, name)
    warn_of_unused(found, name)
    if settings.quantization is not None:
        keep_as_quantised(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # so inputs need no gradient for an adapter's
    if adapter is not None:
        model = add_adapter(model, adapter)
    elif settings.lora is not None:
        model = add_lora(model, settings.lora)
    check_finite(model.named_parameters(), name)
    return model


def _check_base(adapter: StoredAdapter, name: str, path: str) -> None:
    """Warn where an adapter says that it was made for another model; folders move, so this alone proves nothing."""
    if adapter.base and PurePath(adapter.base).name.lower() not in {PurePath(x).name.lower() for x in (name, path)}:
        made_for = f"was made for {adapter.base}, not for {name}; its weights would fit both"
        warnings.warn(f"The adapter {adapter.folder} says that it {made_for}", stacklevel=2)
