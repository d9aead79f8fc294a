"""Read an export again by other libraries, and compare its logits with the policy's."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.exporting.weights import Format
from rlif_lightning.models.lora import adapter_off
from rlif_lightning.models.policy import PolicySettings
from rlif_lightning.warnings_shown import no_load_report

# Largest difference of a logit that is a rounding, as a share of the largest logit. In float32 the sums of a merged
# layer come in another order; in half precision the merged weights are rounded once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LOST = 0.9  # share of the adapter's effect: so large a difference may as well come from an export without it


class ExportDiffers(UserError):
    """An export computes something else than the policy."""


class Difference(NamedTuple):
    """How far an export's logits lie from the policy's."""

    largest: float  # absolute difference
    tolerance: float  # largest difference that counts as rounding
    adapter: float | None  # largest change of the policy's logits by its adapter; None without one


class LogitCheck:
    """Compares the policy's logits over a few prompts, as token ids, with those of the export."""

    def __init__(self, prompts: list[list[int]], form: Format, dtype: torch.dtype) -> None:
        self.prompts, self.form, self.dtype = prompts, form, dtype
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.expected: Tensor | None = None  # [positions, V]
        self.base_logits: Tensor | None = None  # [positions, V] without the adapter, where there is one
        self.quantized = ""

    def take_policy(self, policy: Any, instead_of: str | None = None) -> None:
        """Keep the logits to compute; ``instead_of`` names a quantization whose logits were taken before."""
        before, self.expected = self.expected, probe_logits(policy, self.prompts)
        if hasattr(policy, "peft_config"):
            with adapter_off(policy) as base:
                self.base_logits = probe_logits(base, self.prompts)
        if instead_of is not None and before is not None:
            self.quantized = (
                f" The base was held in 4 bits while training ({instead_of}); for this folder the adapter was "
                f"{'merged into' if self.form == 'merged' else 'compared on'} the base in {self.dtype_name}, as "
                "merging into 4-bit weights would round much of it away. That policy's logits differ from those of "
                f"the 4-bit policy by up to {float((self.expected - before).abs().max()):.2g}."
            )

    def read_again(self, folder: Path, settings: PolicySettings, base: str) -> str:
        """Load the export as others will, and say how close it is."""
        assert self.expected is not None
        logits = probe_logits(load_export(folder, self.form, self.dtype, settings, base), self.prompts)
        found = compare_logits(logits, self.expected, self.base_logits, self.dtype)
        libraries = "transformers" if self.form == "merged" else "transformers and PEFT"
        text = (
            f"Read again by {libraries} in {self.dtype_name}: over {len(logits)} tokens the logits differ from the "
            f"policy's by at most {found.largest:.2g} (up to {found.tolerance:.2g} is rounding)."
        )
        if found.adapter is not None:
            text += f" The adapter changes them by up to {found.adapter:.2g}."
            if found.largest > 0.1 * found.adapter:
                text += " So rounding has cost much of what was learned: take --dtype float32 or --format adapter."
        return text + self.quantized


@torch.no_grad()
def probe_logits(model: Any, prompts: list[list[int]]) -> Tensor:
    """Logits [positions, V] in float32 of a few prompts, one after the other."""
    device = next(model.parameters()).device
    rows = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return torch.cat(rows)


def load_export(folder: Path, form: Format, dtype: torch.dtype, settings: PolicySettings, base: str) -> Any:
    """Load an export by transformers, or the base and the export by transformers and PEFT, alone."""
    from transformers import AutoModelForCausalLM

    with no_load_report():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder if form == "merged" else base,
            revision=None if form == "merged" else settings.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
        )
    if form == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return model.eval()


def compare_logits(found: Tensor, expected: Tensor, base_logits: Tensor | None, dtype: torch.dtype) -> Difference:
    """Compare an export's logits [positions, V] with the policy's, and with those of the policy without its adapter.

    Refused is more than rounding, as much as the adapter changes, and what is not finite.
    """
    largest, size = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    tolerance = TOLERANCE[dtype] * size
    adapter = None if base_logits is None else float((expected - base_logits).abs().max())
    if not largest <= tolerance:  # also NaN
        raise ExportDiffers(
            "The export does not compute what the policy does, so it was not kept",
            got=f"logits that differ by up to {largest:.3g}",
            expected=f"at most {tolerance:.3g} in {str(dtype).removeprefix('torch.')}",
            do="try --dtype float32; if that fails too, please report it",
        )
    # Half precision tolerates more than many an adapter changes; an export without the adapter still differs by
    # rounding, hence not quite 1. An adapter whose effect is below float32's rounding can't be seen at all.
    if adapter is not None and largest >= LOST * adapter and adapter > TOLERANCE[torch.float32] * size:
        raise ExportDiffers(
            "The export has lost what the adapter learned, so it was not kept",
            got=f"logits that differ by up to {largest:.3g}, where the adapter changes them by up to {adapter:.3g}",
            do="try --dtype float32 or --format adapter; if that fails too, please report it",
        )
    return Difference(largest, tolerance, adapter)
