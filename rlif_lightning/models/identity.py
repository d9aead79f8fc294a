"""What trainable weights alone do not say: of which model they are, and what they started from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.trainable import trainable

# What PEFT puts into the names of an adapter's own weights, and of those of the base around which it stands.
ADAPTED = ("lora_", ".modules_to_save.", ".trainable_tokens_")
WRAPPERS = (".token_adapter", ".base_layer", ".original_module")
TEXTS = ("model", "fingerprint")  # all else is written as JSON where there is room for text only


@dataclass(frozen=True)
class Identity:
    """What identifies a policy: kept next to its trainable weights, and compared before those are used again."""

    model: str  # as the user named it
    fingerprint: str  # see the function of that name
    lora: dict[str, Any] | None = None  # fields of peft.LoraConfig; None where all weights train
    adapter: str | None = None  # folder or hub name of the adapter that the run began with
    adapter_mark: str = ""  # see the function; empty without such an adapter
    quantization: str | None = None  # of the frozen weights

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> "Identity":
        """Read what :meth:`to_facts` gave, among other facts."""
        own: dict[str, Any] = {name: facts[name] for name in cls.__dataclass_fields__}
        return cls(**{name: text if name in TEXTS else json.loads(text) for name, text in own.items()})

    def to_facts(self) -> dict[str, str]:
        """Texts, for the metadata of a safetensors file."""
        return {name: value if name in TEXTS else json.dumps(value) for name, value in vars(self).items()}

    def check(self, stored: "Identity", misfit: str, training: bool) -> None:
        """Refuse stored weights of another model, or those that do not fit (how: ``misfit``).

        The adapter that a run began with matters in training alone.
        """
        if stored.quantization != self.quantization:
            raise UserError(
                "The checkpoint was trained on frozen weights of another precision",
                got=f"a checkpoint with model.quantization {stored.quantization or 'null'}",
                expected=self.quantization or "null",
                do="give the model.quantization that it was trained with",
            )
        if stored.fingerprint != self.fingerprint:
            raise UserError(
                "The checkpoint belongs to another model",
                got=f"a checkpoint of '{stored.model}'",
                expected=f"a checkpoint of '{self.model}'",
                do="give the recipe, or the --model.name, that it was trained with",
            )
        if misfit or not _same_lora(stored.lora, self.lora):
            raise UserError(
                "The checkpoint holds other trainable weights than this recipe",
                got=f"LoRA settings {stored.lora}" + (f"; {misfit}" if misfit else ""),
                expected=f"{self.lora}",
                do="use the model.lora settings, or the model.adapter, that it was trained with; where they are the "
                "same, the file is damaged: give another one",
            )
        if training and stored.adapter_mark != self.adapter_mark:
            raise UserError(
                "The checkpoint began with another adapter, which was its reference",
                got=f"a checkpoint that began with {stored.adapter or 'a fresh one'}",
                expected=self.adapter or "a fresh one, as model.lora makes it",
                do="give the model.adapter that the run began with; if its files were changed, begin a new run",
            )


def fingerprint(model: Any) -> str:
    """A short mark of a model's shape and starting weights.

    Shapes and a sample of all weights, rounded to bfloat16, so that the same model loaded in another precision
    has the same mark. Of 4-bit weights the shapes alone, as rounding to them may depend on the device; so a model
    has another mark in 4 bits.
    """
    mark = hashlib.sha256()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = ((name, p) for name, p in base.named_parameters() if not any(part in name for part in ADAPTED))
    for name, parameter in own:
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


def adapter_mark(policy: nn.Module) -> str:
    """A short mark of the trainable weights, bit by bit."""
    mark = hashlib.sha256()
    for name, weight in sorted(trainable(policy).items()):
        mark.update(f"{name}{tuple(weight.shape)}".encode())
        mark.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()[:16]


def _same_lora(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two settings of LoRA make the same model; dropout belongs to the training, not to the model."""
    from peft import LoraConfig

    full = [None if x is None else LoraConfig(**{**x, "lora_dropout": 0.0}).to_dict() for x in (one, other)]
    return full[0] == full[1]
