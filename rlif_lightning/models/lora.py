"""LoRA adapters: a fresh one from its settings, or one that was trained before, from its folder."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rlif_lightning.errors import UserError, did_you_mean
from rlif_lightning.models.hub import from_hub, is_local, meta_model
from rlif_lightning.models.weight_files import check_finite
from rlif_lightning.models.weight_names import misfit, shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of LoraConfig that say where an adapter comes from, not what it computes.
ORIGIN = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
          "runtime_config", "task_type"}  # fmt: skip
REFUSED = {
    "alora_invocation_tokens": "it acts on some tokens only, which the sampler does not know of",
    "arrow_config": "it routes between several adapters",
    "corda_config": "it changes the frozen weights",
    "eva_config": "it is computed from data",
    "kasa_config": "it changes the frozen weights",
    "layer_replication": "it makes another model, with more layers",
    "lora_ga_config": "it changes the frozen weights",
    "loftq_config": "it changes the frozen weights",
    "megatron_config": "it belongs to Megatron's layers",
    "monteclora_config": "it draws random numbers in each forward pass",
    "velora_config": "it has not been tried",
}
MOST_RANK = 2**14  # the width of the largest models
STARTS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights: those that leave the frozen weights alone


def check_lora(lora: Mapping[str, Any]) -> None:
    """Refuse settings that peft's LoraConfig does not have, and those with which a run would be wrong."""
    from peft import LoraConfig

    known = [f.name for f in dataclasses.fields(LoraConfig)]
    for key, value in lora.items():
        if key not in known:
            expected, do = "a field of peft.LoraConfig", did_you_mean(key, known)
            raise UserError(f"model.lora has no setting '{key}'", expected=expected, do=do)
        if key in REFUSED and value:
            raise UserError(f"LoRA's setting '{key}' is not supported", got=value, expected=f"none: {REFUSED[key]}")
    pattern = lora.get("rank_pattern")
    for rank in (lora.get("r", 8), *(pattern.values() if isinstance(pattern, Mapping) else ())):
        if not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
            raise UserError("LoRA's rank is out of range", got=rank, expected=f"a whole number from 1 to {MOST_RANK}")
    start = lora.get("init_lora_weights", True)
    if start not in STARTS:
        raise UserError(
            "LoRA's setting 'init_lora_weights' is not supported",
            got=start,
            expected="true, gaussian or orthogonal: others change the frozen weights, which are the reference and "
            "which checkpoints do not hold",
        )


def add_lora(model: Any, lora: dict[str, Any]) -> nn.Module:
    """Wrap a model with a fresh float32 LoRA adapter; only the adapter trains. Refuse one that does not fit."""
    from peft import LoraConfig, get_peft_model

    check_lora(lora)
    try:
        policy = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **lora}))
    except (ValueError, TypeError) as error:
        raise UserError("The LoRA adapter does not fit the model", got=lora, expected=str(error)) from error
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy.eval()  # as from_pretrained leaves a model; peft's own modules start with dropout on


def off_is_the_start(lora: Mapping[str, Any] | None, adapter: str | None) -> bool:
    """Whether the policy of the start is the one with its adapter switched off.

    Not where it began with a trained adapter, and not where the base's own biases train, which stay switched on.
    """
    return lora is not None and adapter is None and lora.get("bias", "none") == "none"


@contextmanager
def adapter_off(policy: nn.Module) -> Iterator[nn.Module]:
    """The base model under a LoRA policy, bit by bit."""
    with policy.disable_adapter():  # type: ignore[operator]
        yield policy


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter in PEFT's format, of which nothing but the settings has been read."""

    folder: Path  # with adapter_config.json and adapter_model.safetensors
    lora: dict[str, Any]  # its settings as model.lora would give them
    base: str | None  # the model that it says it was made for


def find_adapter(name: str, weights: bool = True) -> StoredAdapter:
    """An adapter by its folder or hub name, with or without its weights; refuse one that can't be trained on."""
    folder = Path(name).expanduser()
    if not is_local(name):
        from huggingface_hub import snapshot_download

        files = [CONFIG, WEIGHTS] if weights else [CONFIG]
        folder = Path(from_hub("adapter", name, lambda: snapshot_download(name, allow_patterns=files)))
    file = folder / CONFIG
    if not file.is_file():
        wrong = f"holds no {CONFIG}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"The adapter's folder {wrong}", got=folder, expected="a PEFT adapter", do="check --model.adapter"
        )
    if weights and not (folder / WEIGHTS).is_file():
        raise UserError(
            "The adapter's folder holds no weights in safetensors format",
            got=folder,
            expected=f"{WEIGHTS}; pickled weights (.bin) can run code and are not loaded",
            do="load it with peft and write it again with save_pretrained()",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The adapter's {CONFIG} can't be read", got=f"{file}: {error!r}") from error
    if kind != "LORA":
        raise UserError("The adapter is not a LoRA adapter", got=f"{folder} with peft_type {kind}", expected="LORA")
    lora = _own_settings(config)
    try:
        check_lora(lora)
    except UserError as error:
        raise UserError(f"The adapter can't be trained on here: {error}", do="start from another one") from error
    return StoredAdapter(folder, lora, config.get("base_model_name_or_path"))


def _own_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What differs from a LoraConfig without settings."""
    from peft import LoraConfig

    usual = vars(LoraConfig())
    own = {key: value for key, value in config.items() if key not in ORIGIN and value != usual.get(key)}
    if isinstance(own.get("target_modules"), list):
        own["target_modules"].sort()  # peft writes a set, in any order
    return own


def check_fit(config: Any, lora: dict[str, Any], adapter: StoredAdapter | None, trust_remote_code: bool) -> None:
    """Put an adapter, stored or fresh, on a model without weights: refuse what does not fit before any are read."""
    try:
        model = meta_model(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model whose own code needs real tensors: loading it will tell
        return
    policy = add_lora(model, lora)
    if adapter is not None:
        _check_names(_weights(policy), adapter)


def _weights(policy: Any) -> dict[str, Tensor]:
    """The adapter's weights by the names that PEFT's files give them."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(policy, save_embedding_layers=False)


def _check_names(weights: Mapping[str, Tensor], adapter: StoredAdapter) -> None:
    """Compare names and shapes; what a file holds of the base's embeddings besides the adapter is no obstacle."""
    file, embeddings = adapter.folder / WEIGHTS, (".base_layer.weight", "embed_tokens.weight", "lm_head.weight")
    try:
        with safe_open(file, framework="pt") as found:
            stored = {name: found.get_slice(name).get_shape() for name in found.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError("The adapter's weights can't be read", got=f"{file}: {error}") from error
    wrong = misfit(shapes(weights), {n: s for n, s in stored.items() if n in weights or not n.endswith(embeddings)})
    if wrong:
        raise UserError(
            "The adapter does not fit the model: it belongs to another one",
            got=f"{adapter.folder}: {wrong}",
            expected=f"the {len(weights)} weights of such an adapter on this model",
            do="give the model that the adapter was trained from, or another adapter",
        )


def add_adapter(model: Any, adapter: StoredAdapter) -> nn.Module:
    """Wrap a model with a trained LoRA adapter, which trains on in float32. Refuse one that does not fit."""
    from peft import set_peft_model_state_dict

    policy = add_lora(model, adapter.lora)
    own, stored = _weights(policy), load_file(adapter.folder / WEIGHTS)
    _check_names(own, adapter)
    check_finite(stored.items(), str(adapter.folder))
    _check_embeddings(policy, {name: stored.pop(name) for name in stored.keys() - own.keys()}, adapter)
    set_peft_model_state_dict(policy, stored)
    if not all(torch.equal(weight, stored[name].to(weight)) for name, weight in _weights(policy).items()):
        raise UserError("The adapter's weights did not all reach the model", got=adapter.folder)
    return policy


def _check_embeddings(policy: Any, stored: dict[str, Tensor], adapter: StoredAdapter) -> None:
    """Refuse embeddings in an adapter's file that are not the model's."""
    weights = dict(policy.named_parameters())
    tied = policy.get_input_embeddings().weight  # they go by the other one's name
    for name, weight in stored.items():
        own = weights.get(name, weights.get(name.replace(".weight", ".base_layer.weight"), tied))
        if own.shape != weight.shape or not torch.equal(own.cpu(), weight.to(own.dtype)):
            raise UserError(
                "The adapter brings embeddings of its own, which are not those of the model",
                got=f"{adapter.folder} with {name} {list(weight.shape)}",
                do="merge it into its model with peft and give the result as the model",
            )
