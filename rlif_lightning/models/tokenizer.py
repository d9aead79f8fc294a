"""A model's tokenizer, and the tokens that end its completions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlif_lightning.errors import UserError
from rlif_lightning.models.hub import from_hub, resolve_model
from rlif_lightning.warnings_shown import rank_zero_info

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, **source: Any) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that can pad and that knows how a text ends.

    A missing padding token is replaced by the end token: padding is always masked, so any token will do.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    tokenizer = from_hub("tokenizer", name, lambda: AutoTokenizer.from_pretrained(path, **source))
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(  # transformers makes one up where files are missing
            "The tokenizer has no vocabulary, so every text would be empty",
            got=name,
            do="copy the tokenizer's files, such as tokenizer.json, into the model's folder",
        )
    if tokenizer.eos_token_id is None:
        wrong = "The tokenizer has no end-of-sequence token, so no completion could ever end"
        raise UserError(wrong, got=name, do='set "eos_token" in its tokenizer_config.json')
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_token_ids(
    tokenizer: Any, generation_config: Any, extra: Sequence[str], turn_end: str | None = None
) -> list[int]:
    """Every id that ends a completion: of the generation config, of the tokenizer (or None), and of extra tokens.

    The token that ends an answer in the chat template ends completions as well; a line says so where it is not among
    these: base models come with chat templates whose end their generation config does not list.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    ids = {getattr(tokenizer, "eos_token_id", None), *(listed if isinstance(listed, list) else [listed])} - {None}
    vocabulary = tokenizer.get_vocab() if extra else {}
    for token in extra:
        if token not in vocabulary:
            raise UserError("model.end_tokens names a token that the tokenizer does not have", got=repr(token))
        ids.add(vocabulary[token])
    if turn_end is not None and tokenizer.convert_tokens_to_ids(turn_end) not in ids:
        rank_zero_info(f"{turn_end} ends a completion: the chat template ends answers with it (model.end_tokens).")
        ids.add(tokenizer.convert_tokens_to_ids(turn_end))
    return sorted(ids)


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens that a completion's text leaves out."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def check_ids(model: Any, ids: Sequence[int]) -> None:
    """Refuse a tokenizer whose end or padding tokens the model does not have.

    Not the whole vocabulary: Gemma 3's tokenizer knows an image token that its text models lack.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        raise UserError(
            "The tokenizer does not belong to the model",
            got=f"end and padding tokens with the ids {', '.join(map(str, ids))}",
            expected=f"ids below {rows}, the tokens that the model knows",
        )
