"""What trainable weights alone do not say: of which model they are, and what they started from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.lora import same_lora
from rlif_lightning.models.trainable import trainable

# What PEFT puts into the names of an adapter's own weights, and of those of the base around which it stands.
ADAPTED = ("lora_", ".modules_to_save.", ".trainable_tokens_")
WRAPPERS = (".token_adapter", ".base_layer", ".original_module")
TEXTS = ("model", "fingerprint")  # all else is written as JSON where there is room for text only


@dataclass(frozen=True)
class Identity:
    """Of a policy: kept beside its trainable weights, and compared before those are used again.

    Attributes:
        model: As the user named it.
        fingerprint: See :func:`fingerprint`.
        lora: Fields of ``peft.LoraConfig``; None where all weights train.
        adapter: Folder or hub name of the adapter that the run began with.
        adapter_mark: See :func:`adapter_mark`; empty without such an adapter.
        quantization: Of the frozen weights.
    """

    model: str
    fingerprint: str
    lora: dict[str, Any] | None = None
    adapter: str | None = None
    adapter_mark: str = ""
    quantization: str | None = None

    @classmethod
    def from_checkpoint(cls, mark: Mapping[str, Any]) -> "Identity":
        """Read what :meth:`to_checkpoint` gave; weights of older releases lack the last three."""
        return cls(**{name: mark[name] for name in cls.__dataclass_fields__ if name in mark})

    def to_checkpoint(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    @classmethod
    def from_facts(cls, facts: Mapping[str, str]) -> "Identity":
        """Read what :meth:`to_facts` gave, among other facts."""
        names = cls.__dataclass_fields__.keys() & facts.keys()
        values: dict[str, Any] = {n: facts[n] if n in TEXTS else json.loads(facts[n]) for n in names}
        return cls(**values)

    def to_facts(self) -> dict[str, str]:
        """Texts, for the metadata of a safetensors file."""
        return {name: value if name in TEXTS else json.dumps(value) for name, value in vars(self).items()}

    def check(self, stored: "Identity", same_shapes: bool, training: bool) -> None:
        """Refuse the weights of another model.

        Args:
            stored: That of the weights.
            same_shapes: Whether they are this policy's trainable weights by names and shapes.
            training: Whether the adapter that a run began with matters: it is the reference.

        Raises:
            UserError: They belong to another model, other settings of LoRA, or a run with another start.
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
        if not same_shapes or not same_lora(stored.lora, self.lora):
            raise UserError(
                "The checkpoint holds other trainable weights than this recipe",
                got=f"LoRA settings {stored.lora}",
                expected=f"{self.lora}",
                do="use the model.lora settings, or the model.adapter, that it was trained with",
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


def adapter_mark(policy: nn.Module) -> str:
    """A short mark of the trainable weights, bit by bit."""
    mark = hashlib.sha256()
    for name, weight in sorted(trainable(policy).items()):
        mark.update(f"{name}{tuple(weight.shape)}".encode())
        mark.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return mark.hexdigest()[:16]
