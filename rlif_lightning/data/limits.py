"""Prompts against what a model can read, seen before its weights are loaded: rows of its embedding, positions."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from rlif_lightning.data.prompts import Prompt
from rlif_lightning.errors import UserError
from rlif_lightning.models.hub import load_config, meta_model
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.strategies import shares_out


def check_prompts(
    prompts: Sequence[Prompt], section: str, module: Any, sampler: Any, sampling: Any, device: Any = None
) -> None:
    """Refuse prompts that a model or a sampler can't complete, before weights are loaded.

    ``section`` (rollout or evaluation) is that of the longest completion's setting; ``device`` the model's, where the
    module has no Trainer.
    """
    if prompts:
        check_limits(prompts, section, sampling.max_new_tokens, module.policy_settings, module.tokenizer)
    trainer, processes = module._trainer, 1
    if trainer is not None:
        device = None if shares_out(trainer.strategy) else trainer.strategy.root_device
        processes = trainer.world_size
    sampler.check([p.ids for p in prompts], sampling, device, processes)


def check_limits(
    prompts: Sequence[Prompt], section: str, new_tokens: int, model: PolicySettings, tokenizer: Any
) -> None:
    """Refuse prompts with tokens that the model has no embedding for, or too long for positions that it has learned.

    Other positions (rotary ones) go on beyond what the model was trained with: that is a warning.
    """
    setting = f"{section}.max_new_tokens"
    config = load_config(model.name, **model.source).get_text_config()
    worst, longest = max(prompts, key=lambda p: max(p.ids)), max(prompts, key=lambda p: len(p.ids))
    token = max(worst.ids)
    if token >= config.vocab_size:
        raise UserError(
            f"{worst.problem.place} makes a prompt with a token that the model has no embedding for",
            got=f"token {token}, {tokenizer.decode([token])!r}",
            expected=f"ids below {config.vocab_size}, the rows of the embedding (vocab_size in config.json)",
            do="take the model's own tokenizer, or resize_token_embeddings() of the model, train it and save both",
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or len(longest.ids) + new_tokens <= positions:
        return
    got = f"{len(longest.ids)} tokens ({longest.problem.place}) + {setting} {new_tokens}"
    if learns_positions(config, positions, model.trust_remote_code):
        raise UserError(
            "A prompt and its completion are longer than the positions that the model has learned",
            got=got,
            expected=f"at most {positions} in all",
            do=f"lower --{setting}, or leave longer problems out",
        )
    rank_zero_warn(
        f"Prompt and completion may be longer than the {positions} tokens that the model was made for "
        f"(max_position_embeddings): {got}. Lower {setting}, or leave longer problems out."
    )


def learns_positions(config: Any, positions: int, trust_remote_code: bool) -> bool:
    """Whether a model has an embedding of positions, as GPT-2 and OPT do: beyond its rows there is nothing."""
    try:
        model = meta_model(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model whose own code needs real tensors
        return False
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    return any(positions <= table.num_embeddings <= positions + 2 for table in tables)  # OPT keeps 2 for padding
