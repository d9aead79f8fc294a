"""Interpolate the weights of two models: theta = (1 - a) base + a tuned (as in arXiv 2506.17219).

The tuned model is a Hugging Face model, a LoRA adapter on the base, or a checkpoint of a run on the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError
from rlif_lightning.mixing.fit import check_configs, check_vocabularies
from rlif_lightning.models.checkpoints import identity_of, read_checkpoint
from rlif_lightning.models.hub import load_config, resolve_model
from rlif_lightning.models.lora import CONFIG as ADAPTER
from rlif_lightning.models.lora import check_fit, find_adapter
from rlif_lightning.models.merging import merge
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.models.weight_files import check_files
from rlif_lightning.models.weight_names import misfit, shapes
from rlif_lightning.runs.folder import CHECKPOINTS, CONFIG, find_checkpoint


@dataclass(frozen=True)
class Pair:
    """The two ends of a mixture."""

    base: str  # toy, a Hugging Face folder or a hub name
    tuned: str  # the same; or the folder of a LoRA adapter, a checkpoint or a run folder, made from the base
    revision: str | None = None  # of the base's hub repository
    trust_remote_code: bool = False  # run Python code that comes with the models

    def load(self) -> tuple[Policy, Policy]:
        """Base and tuned model in the precision of their files; adapter and checkpoint applied in float32."""
        return _load_as_stored(self._base), self._load_tuned()

    def _load_tuned(self) -> Policy:
        adapter, checkpoint = self._adapter, self._checkpoint
        if adapter is None and checkpoint is None:
            return _load_as_stored(self._tuned)
        policy = self._load_trained(checkpoint) if checkpoint else self._load_base(adapter=adapter)
        policy.model = merge(policy.model, torch.float32)
        return policy

    def check(self) -> None:
        """Compare what can be compared without weights: configurations, tokenizers, names and shapes."""
        config, checkpoint = load_config(self.base, **self._base.source), self._checkpoint
        check_files(self.base, resolve_model(self.base), config, **self._base.source)
        if self._adapter is not None:
            adapter = find_adapter(self._adapter)
            check_fit(config, adapter.lora, adapter, self.trust_remote_code)
        elif checkpoint is not None:
            _read_trained(checkpoint)
        else:
            tuned = load_config(self.tuned, **self._tuned.source)
            check_configs(config.to_dict(), tuned.to_dict(), self.base, self.tuned)
            base, other = (settings.load_tokenizer().get_vocab() for settings in (self._base, self._tuned))
            check_vocabularies(base, other, self.base, self.tuned)
            check_files(self.tuned, resolve_model(self.tuned), tuned, **self._tuned.source)

    @property
    def _base(self) -> PolicySettings:
        return replace(self._tuned, name=self.base, revision=self.revision)

    @property
    def _tuned(self) -> PolicySettings:
        return PolicySettings(self.tuned, trust_remote_code=self.trust_remote_code)

    @property
    def _adapter(self) -> str | None:
        folder = Path(self.tuned).expanduser()
        return str(folder) if (folder / ADAPTER).is_file() else None

    @property
    def _checkpoint(self) -> Path | None:
        """The checkpoint, where the tuned model is one or the folder of a run."""
        path = Path(self.tuned).expanduser()
        if path.is_file() or path.suffix == ".ckpt" or (path / CHECKPOINTS).is_dir() or (path / CONFIG).is_file():
            return find_checkpoint(self.tuned, path.parent.parent, path.parent.name)
        return None

    def _load_base(self, **changes: Any) -> Policy:
        return Policy.load(replace(self._base, **changes), dtype=torch.float32)

    def _load_trained(self, path: Path) -> Policy:
        """The base with the weights of a checkpoint, or with those that the guard has kept."""
        checkpoint = _read_trained(path)
        stored = identity_of(checkpoint)
        policy = self._load_base(lora=stored.lora)
        if stored.fingerprint != policy.identity.fingerprint:
            raise UserError(
                "The checkpoint was not trained from the base",
                got=f"{path}, a checkpoint of '{stored.model}'",
                expected=f"a checkpoint of '{self.base}'",
                do="give the model that it was trained from as --base",
            )
        policy.restore(checkpoint)
        return policy


def _load_as_stored(settings: PolicySettings) -> Policy:
    dtype = getattr(load_config(settings.name, **settings.source), "dtype", None)
    return Policy.load(settings, dtype=dtype or torch.float32)


def _read_trained(path: Path) -> dict[str, Any]:
    """A checkpoint that can be mixed; its weights stay on the disk until they are used."""
    checkpoint = read_checkpoint(path)
    quantization = identity_of(checkpoint).quantization
    if quantization is not None:
        raise UserError(
            "The checkpoint was trained on 4-bit weights, which cannot be mixed",
            got=f"{path} with model.quantization {quantization}",
            do="export it to a model first (rlif export), and give that as the tuned one",
        )
    return checkpoint


def mix(pair: Pair, ratio: float) -> Policy:
    """One mixture at a ratio from 0 to 1, with the base's tokenizer; at most two copies of the weights are in memory.

    A base model may end texts with another token than its chat model: every mixture may end with either.
    """
    check_ratios([ratio])
    pair.check()
    base, tuned = pair.load()
    interpolate(base.model, tuned.model, ratio)
    base.end_ids = sorted({*base.end_ids, *tuned.end_ids})
    return base


def interpolate(base: nn.Module, tuned: nn.Module, ratio: float) -> nn.Module:
    """Move the base's weights by a share, from 0 to 1, towards those of the tuned model, in place, tensor by tensor.

    Computed in float32 at least; each result has the wider of its two ends' dtypes, so that an update made in
    float32 is not lost in the rounding of a base in bfloat16. Tied weights stay tied; buffers are the base's.
    At 0 and 1 the weights are those of the ends bit by bit.
    """
    others = dict(tuned.named_parameters())
    wrong = misfit(shapes(dict(base.named_parameters())), shapes(others))
    if wrong:
        raise UserError("The weights of the tuned model are not those of the base", got=wrong)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.data = _between(weight.data, others[name].data, ratio)
    dtypes = {p.dtype for p in base.parameters()}
    if len(dtypes) == 1 and hasattr(base, "config"):
        base.config.dtype = dtypes.pop()  # what save_pretrained writes
    return base


def _between(base: Tensor, tuned: Tensor, ratio: float) -> Tensor:
    dtype = torch.promote_types(base.dtype, tuned.dtype)
    if ratio in (0, 1):  # exact, whatever 0 * x and rounding would do
        return (tuned if ratio else base).to(dtype, copy=True)
    wide = torch.promote_types(dtype, torch.float32)
    return ((1 - ratio) * base.to(wide) + ratio * tuned.to(wide)).to(dtype)


def check_ratios(ratios: Sequence[float]) -> list[float]:
    """The ratios in ascending order; refused are none, one given twice, or one out of range."""
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            wrong = "A ratio is the share of the tuned weights"
            raise UserError(wrong, got=f"{ratio:g}", expected="0 (base) to 1 (tuned)")
    if not ratios:
        raise UserError("No ratio is given", expected="--ratios 0 0.25 0.5 1")
    if len(set(ratios)) < len(ratios):
        raise UserError("A ratio is given twice", got=" ".join(f"{r:g}" for r in ratios))
    return sorted(ratios)
