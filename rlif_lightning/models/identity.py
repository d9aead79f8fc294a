"""What trainable weights alone do not say: of which model they are, and what they started from."""

from collections.abc import Mapping
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.models.lora import same_lora

Identity = dict[str, Any]
"""model (as the user named it), fingerprint, lora (settings), adapter (name), adapter_mark, quantization."""


def check_identity(stored: Mapping[str, Any], own: Mapping[str, Any], same_shapes: bool, training: bool) -> None:
    """Refuse the weights of another model.

    Args:
        stored: Origin of the weights; of older ones the last three are missing.
        own: Of the policy that is to have them.
        same_shapes: Whether they are its trainable weights by names and shapes.
        training: Whether the adapter that a run began with matters: it is the reference.

    Raises:
        UserError: They belong to another model, other settings of LoRA, or a run with another start.
    """
    if stored.get("quantization") != own["quantization"]:
        raise UserError(
            "The checkpoint was trained on frozen weights of another precision",
            got=f"a checkpoint with model.quantization {stored.get('quantization') or 'null'}",
            expected=own["quantization"] or "null",
            do="give the model.quantization that it was trained with",
        )
    if stored["fingerprint"] != own["fingerprint"]:
        raise UserError(
            "The checkpoint belongs to another model",
            got=f"a checkpoint of '{stored['model']}'",
            expected=f"a checkpoint of '{own['model']}'",
            do="give the recipe, or the --model.name, that it was trained with",
        )
    if not same_shapes or not same_lora(stored["lora"], own["lora"]):
        raise UserError(
            "The checkpoint holds other trainable weights than this recipe",
            got=f"LoRA settings {stored['lora']}",
            expected=f"{own['lora']}",
            do="use the model.lora settings, or the model.adapter, that it was trained with",
        )
    if training and stored.get("adapter_mark", "") != own["adapter_mark"]:
        raise UserError(
            "The checkpoint began with another adapter, which was its reference",
            got=f"a checkpoint that began with {stored.get('adapter') or 'a fresh one'}",
            expected=own["adapter"] or "a fresh one, as model.lora makes it",
            do="give the model.adapter that the run began with; if its files were changed, begin a new run",
        )
