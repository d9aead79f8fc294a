"""A policy as files: merged into its base, or its adapter alone; and read again, by other libraries, to compare."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError

Format = Literal["merged", "adapter"]
SHARD = "4GB"  # of a merged model's files

# Largest difference of a logit that is a rounding, as a share of the largest logit. In float32 the sums of a merged
# layer come in another order; in half precision the merged weights are rounded once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LOST = 0.9  # of the adapter's effect: so large a difference may as well come from an export without it


class Difference(NamedTuple):
    """What an export's logits were found to be."""

    largest: float
    """Largest absolute difference from the policy's."""
    tolerance: float
    """What would still have been taken for rounding."""
    tokens: int
    """How many positions were compared."""
    adapter: float | None
    """Largest change of the policy's logits by its adapter; None without one."""


@torch.no_grad()
def probe_logits(model: Any, prompts: list[list[int]]) -> Tensor:
    """Logits [positions, V] in float32 of a few prompts, one after the other."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return torch.cat(rows)


def merge(policy: Any, dtype: torch.dtype) -> Any:
    """The policy as a plain model of one precision; it is taken apart.

    Args:
        policy: With or without an adapter. No 4-bit weights: merging into them would round the update away.
        dtype: Of the result's weights.
    """
    model = policy
    if hasattr(policy, "merge_and_unload"):
        _untie(policy)
        model = policy.merge_and_unload(progressbar=sum(p.numel() for p in policy.parameters()) > 1e9)
    for parameter in model.parameters():  # not model.to(dtype): rotary frequencies stay in float32
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _untie(policy: Any) -> None:
    """Give the head weights of its own where an adapter is about to change one of head and embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = policy.get_base_model()
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in (head, embedding))
    if not config.tie_word_embeddings or not adapted:
        return
    base_logits: Any = getattr(head, "base_layer", getattr(head, "original_module", head))
    base_logits.weight = nn.Parameter(base_logits.weight.detach().clone(), requires_grad=False)
    for settings in (config, model.config):
        settings.tie_word_embeddings = False


def save_merged(model: Any, folder: Path) -> None:
    """Write weights and configuration, in several files where they are large."""
    _quietly(lambda: model.save_pretrained(folder, max_shard_size=SHARD), model)


def save_adapter(policy: Any, folder: Path, base: str) -> None:
    """Write an adapter as PEFT does.

    Args:
        policy: With the adapter.
        folder: Where to.
        base: What PEFT will load the base model from.
    """
    for config in policy.peft_config.values():
        config.base_model_name_or_path = base
    policy.save_pretrained(folder, save_embedding_layers=False)


def _quietly(save: Any, model: nn.Module) -> None:
    """Without the bar of a small model."""
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    if sum(p.numel() for p in model.parameters()) < 1e9:
        logging.disable_progress_bar()
    try:
        save()
    finally:
        if shows:
            logging.enable_progress_bar()


def reload(folder: Path, form: Format, dtype: torch.dtype, base: dict[str, Any] | None = None) -> Any:
    """Load an export by transformers, or by transformers and PEFT, alone.

    Args:
        folder: The export.
        form: What it is.
        dtype: Of the weights.
        base: Where the adapter's base lies, and how it is loaded: arguments of ``AutoModelForCausalLM``.
    """
    from transformers import AutoModelForCausalLM

    settings = base if form == "adapter" and base else {"pretrained_model_name_or_path": str(folder)}
    model = AutoModelForCausalLM.from_pretrained(**{**(base or {}), **settings}, dtype=dtype, use_safetensors=True)
    if form == "merged":
        return model.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def compare(found: Tensor, expected: Tensor, base_logits: Tensor | None, dtype: torch.dtype) -> Difference:
    """Hold an export's logits against the policy's.

    Args:
        found: Logits [positions, V] of the export.
        expected: Those of the policy.
        base_logits: Those of the policy without its adapter, where it has one.
        dtype: Of the export.

    Raises:
        UserError: They differ by more than rounding, by as much as the adapter changes, or are not finite.
    """
    largest, size = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    tolerance = TOLERANCE[dtype] * size
    adapter = None if base_logits is None else float((expected - base_logits).abs().max())
    if not largest <= tolerance:  # also NaN
        raise UserError(
            "The export does not compute what the policy does, so it was not kept",
            got=f"logits that differ by up to {largest:.3g}",
            expected=f"at most {tolerance:.3g} in {str(dtype).removeprefix('torch.')}",
            do="try --dtype float32; if that fails too, please report it",
        )
    # Half precision tolerates more than many an adapter does; without one its rounding is left, hence not quite 1.
    # An adapter whose effect is below float32's rounding can't be seen at all.
    if adapter is not None and largest >= LOST * adapter and adapter > TOLERANCE[torch.float32] * size:
        raise UserError(
            "The export has lost what the adapter learned, so it was not kept",
            got=f"logits that differ by up to {largest:.3g}, where the adapter changes them by up to {adapter:.3g}",
            do="try --dtype float32 or --format adapter; if that fails too, please report it",
        )
    return Difference(largest, tolerance, len(found), adapter)
