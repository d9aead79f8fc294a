"""Interpolate the weights of two models: theta = (1 - a) base + a tuned (as in arXiv 2506.17219).

The tuned model is a Hugging Face model, a PEFT adapter on the base, or a checkpoint of a run on the base. No
Lightning here but to read checkpoints.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.checkpoints import read_checkpoint, weights_of
from rlif_lightning.models.hub import load_config, resolve_model
from rlif_lightning.models.identity import fingerprint
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.lora import add_lora
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.tokenizer import end_token_ids, load_tokenizer
from rlif_lightning.runs.folder import CHECKPOINTS, CONFIG, find_checkpoint

NOTE = "mix.json"  # in a mixed model's folder: what it was mixed from
# Settings of a model's configuration that its forward pass does not depend on, or that save_pretrained renews.
HARMLESS = frozenset(
    {"_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
     "embd_pdrop", "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings",
     "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
     "resid_pdrop", "return_dict", "torch_dtype", "transformers_version", "use_cache"}
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The two ends of a mixture.

    Attributes:
        base: ``toy``, a Hugging Face folder or a hub name.
        tuned: The same; or the folder of a PEFT adapter, a checkpoint or a run folder, made from the base.
        revision: Of the base's hub repository.
        attn_implementation: As transformers names it; null: its choice.
        trust_remote_code: Run Python code that comes with the models.
    """

    base: str
    tuned: str
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def load_base(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The base model, in the precision of its file where none is given."""
        return self._load(self.base, self.revision, dtype)

    def load_tuned(self) -> nn.Module:
        """The tuned model; an adapter is merged, a checkpoint applied to the base, both in float32.

        Raises:
            UserError: It is not to be found, or was not made from the base.
        """
        path = Path(self.tuned).expanduser()
        if (path / "adapter_config.json").is_file():
            return _with_adapter(self.load_base(torch.float32), path, self.base)
        checkpoint = _checkpoint(self.tuned)
        if checkpoint is not None:
            return _with_checkpoint(self.load_base(torch.float32), checkpoint, self.base)
        return self._load(self.tuned, None, None)

    def check(self) -> None:
        """Compare what can be compared without weights: configurations and tokenizers.

        Raises:
            UserError: The tuned model cannot be mixed with the base.
        """
        own = self._config(self.base, self.revision)
        # An adapter and a checkpoint know their base themselves; here it is seen whether they can be read.
        folder = Path(self.tuned).expanduser()
        if (folder / "adapter_config.json").is_file():
            _check_adapter(folder)
            return
        checkpoint = _checkpoint(self.tuned)
        if checkpoint is not None:
            _marked_checkpoint(checkpoint)
            return
        _check_configs(own.to_dict(), self._config(self.tuned, None).to_dict(), self)
        base, tuned = (
            load_tokenizer(name, revision=revision, trust_remote_code=self.trust_remote_code).get_vocab()
            for name, revision in ((self.base, self.revision), (self.tuned, None))
        )
        _check_vocabularies(base, tuned, self)

    def _config(self, name: str, revision: str | None) -> Any:
        return load_config(name, revision=revision, trust_remote_code=self.trust_remote_code)

    def _load(self, name: str, revision: str | None, dtype: torch.dtype | None) -> nn.Module:
        settings = PolicySettings(
            name,
            revision=revision,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        dtype = dtype or getattr(self._config(name, revision), "dtype", None) or torch.float32
        model: nn.Module = Policy.load(settings, dtype=dtype).model
        return model


def mix(pair: Pair, ratio: float) -> nn.Module:
    """One mixed model. At most two copies of the weights are in memory at a time.

    Args:
        pair: The two ends.
        ratio: Share a of the tuned weights, from 0 to 1; at 0 and 1 the weights are those of the ends bit by bit.

    Raises:
        UserError: The ratio is out of range, or the two do not fit.
    """
    check_ratio(ratio)
    pair.check()
    return interpolate(pair.load_base(), pair.load_tuned(), ratio)


def interpolate(base: nn.Module, tuned: nn.Module, ratio: float) -> nn.Module:
    """Move the base's weights towards those of the tuned model, in place and tensor by tensor.

    Computed in float32 at least; each result has the wider of its two ends' dtypes, so that an update made in
    float32 is not lost in the rounding of a base in bfloat16. Tied weights stay tied; buffers are the base's.

    Args:
        base: Is changed and returned.
        tuned: Has parameters of the same names and shapes; stays as it is.
        ratio: Share a of the tuned weights.

    Raises:
        UserError: Names or shapes differ, or the ratio is not from 0 to 1.
    """
    check_ratio(ratio)
    others = dict(tuned.named_parameters())
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (base, tuned)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        got, expected = (
            ", ".join(f"{name} {list(s[name]) if name in s else 'missing'}" for name in names[:3])
            for s in (shapes[1], shapes[0])
        )
        raise UserError("The weights of the tuned model are not those of the base", got=got, expected=expected)
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


def check_ratio(ratio: float) -> None:
    """Refuse a share that is none.

    Raises:
        UserError: Not from 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise UserError(
            "A ratio is the share of the tuned weights", got=f"{ratio:g}", expected="0 (base) to 1 (tuned)"
        )


def save_mix(pair: Pair, ratio: float, folder: Path) -> Path:
    """Mix into an ordinary Hugging Face folder: safetensors, the base's tokenizer, both ends' end tokens.

    The folder appears complete or not at all; one that holds this very mixture already is left as it is.

    Returns:
        The folder.

    Raises:
        UserError: The two do not fit, or the folder holds something else.
    """
    note = {**asdict(pair), "ratio": ratio}
    if folder.exists():
        found = folder / NOTE
        if not found.is_file() or json.loads(found.read_text(encoding="utf-8")) != note:
            raise UserError("The folder for a mixed model holds something else", got=folder, do="give another one")
        return folder
    model: Any = mix(pair, ratio)
    tokenizer = load_tokenizer(pair.base, revision=pair.revision, trust_remote_code=pair.trust_remote_code)
    # A base model may end texts with another token than its chat model: every mixture may end with either.
    model.generation_config.eos_token_id = _end_ids(pair, tokenizer, model)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
    try:
        unfinished.mkdir(parents=True)
        _without_sampling(model.generation_config)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            "A mixed model cannot be written", got=f"{folder}: {error}", do="make room or give another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _end_ids(pair: Pair, tokenizer: Any, model: Any) -> list[int]:
    from transformers import GenerationConfig

    ids = set(end_token_ids(tokenizer, model.generation_config, ()))
    if not (Path(pair.tuned).expanduser() / "adapter_config.json").is_file() and _checkpoint(pair.tuned) is None:
        path = resolve_model(pair.tuned)
        try:
            settings = GenerationConfig.from_pretrained(path)
        except OSError:  # it has no such file
            settings = None
        theirs = load_tokenizer(pair.tuned, trust_remote_code=pair.trust_remote_code)
        ids |= set(end_token_ids(theirs, settings, ()))
    return sorted(ids)


def _without_sampling(settings: Any) -> None:
    """Drop the settings of sampling, which rollouts do not use and save_pretrained refuses without do_sample."""
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        setattr(settings, name, None)
    settings.do_sample = False


def _checkpoint(tuned: str) -> Path | None:
    """The checkpoint that a file or a run folder means, None for models."""
    path = Path(tuned).expanduser()
    if path.is_file() or path.suffix == ".ckpt" or (path / CHECKPOINTS).is_dir() or (path / CONFIG).is_file():
        return find_checkpoint(tuned, path.parent.parent, path.parent.name)
    return None


def _marked_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours; its weights stay on the disk until they are asked for."""
    checkpoint = read_checkpoint(path, mmap=True)
    if checkpoint.get("rlif") is None:
        raise UserError("The checkpoint was not written by rlif_lightning", got=path)
    if checkpoint["rlif"].get("quantization") is not None:
        raise UserError(
            "The checkpoint was trained on 4-bit weights, which cannot be mixed",
            got=f"{path} with model.quantization {checkpoint['rlif']['quantization']}",
            do="export it to a model first (rlif export), and give that as the tuned one",
        )
    return checkpoint


def _with_checkpoint(model: nn.Module, path: Path, name: str) -> nn.Module:
    checkpoint = _marked_checkpoint(path)
    mark = checkpoint["rlif"]
    if mark["fingerprint"] != fingerprint(model):
        raise UserError(
            "The checkpoint was not trained from the base",
            got=f"{path}, a checkpoint of '{mark['model']}'",
            expected=f"a checkpoint of '{name}'",
            do="give the model that it was trained from as --base",
        )
    policy: Any = model if mark["lora"] is None else add_lora(model, mark["lora"])
    weights = weights_of(checkpoint)
    trainable = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
    if weights.keys() != trainable:
        missing = sorted(trainable ^ weights.keys())[:3]
        raise UserError("The checkpoint holds other weights than it says", got=path, expected=", ".join(missing))
    policy.load_state_dict(weights, strict=False)
    return policy if mark["lora"] is None else policy.merge_and_unload()


def _check_adapter(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(
            "The adapter's folder holds no weights in safetensors format",
            got=folder,
            expected="adapter_model.safetensors; pickled weights can run code and are not loaded",
        )
    try:
        with safe_open(weights, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError("The adapter's weights can't be read", got=f"{weights}: {error}") from error


def _with_adapter(model: nn.Module, folder: Path, name: str) -> nn.Module:
    from peft import PeftModel

    _check_adapter(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError, UserWarning) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            "The adapter does not fit the base, or can't be merged into it", got=f"{folder}: {reason[:200]}",
            expected=f"an adapter of '{name}'",
        ) from error  # fmt: skip


def _check_configs(base: dict[str, Any], tuned: dict[str, Any], pair: Pair) -> None:
    differing = sorted(key for key in (base.keys() | tuned.keys()) - HARMLESS if base.get(key) != tuned.get(key))
    if not differing:
        return
    first = [key for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers") if key in differing]
    shown = (first or differing)[:3]
    raise UserError(
        "The two models are not of one architecture and size",
        got=f"'{pair.tuned}' with " + _settings(tuned, shown),
        expected=_settings(base, shown) + f", as '{pair.base}'",
    )


def _settings(config: dict[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key} {config.get(key)}" for key in keys)


def _check_vocabularies(base: dict[str, int], tuned: dict[str, int], pair: Pair) -> None:
    """Refuse tokens of other meaning. A token that only one of them has is no obstacle where its id is free."""
    ids = [{i: token for token, i in vocabulary.items()} for vocabulary in (base, tuned)]
    for i in sorted(ids[0].keys() & ids[1].keys()):
        if ids[0][i] != ids[1][i]:
            raise UserError(
                "The two models have different vocabularies",
                got=f"token {i} of '{pair.tuned}' is {ids[1][i]!r}",
                expected=f"{ids[0][i]!r}, as in '{pair.base}'",
            )


def check_ratios(ratios: Sequence[float]) -> list[float]:
    """The ratios in ascending order.

    Raises:
        UserError: None given, one twice, or one out of range.
    """
    for ratio in ratios:
        check_ratio(ratio)
    if not ratios:
        raise UserError("No ratio is given", expected="--ratios 0 0.25 0.5 1")
    if len(set(ratios)) < len(ratios):
        raise UserError("A ratio is given twice", got=" ".join(f"{r:g}" for r in ratios))
    return sorted(ratios)
