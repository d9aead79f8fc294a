"""Whether two models fit together, seen from their configurations and tokenizers alone."""

from typing import Any

from rlif_lightning.errors import UserError

# Settings of a model's configuration that its forward pass does not depend on, or that save_pretrained renews.
HARMLESS = frozenset(
    {"_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
     "embd_pdrop", "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings",
     "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
     "resid_pdrop", "return_dict", "torch_dtype", "transformers_version", "use_cache"}
)  # fmt: skip
SAYS_MOST = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


def check_configs(own: dict[str, Any], other: dict[str, Any], base: str, tuned: str) -> None:
    """Refuse another architecture or size: compare the configurations of the base and of the tuned model."""

    def settings(config: dict[str, Any]) -> str:
        return ", ".join(f"{key} {config.get(key)}" for key in shown)

    differing = sorted(key for key in (own.keys() | other.keys()) - HARMLESS if own.get(key) != other.get(key))
    if differing:
        shown = ([key for key in SAYS_MOST if key in differing] or differing)[:3]
        wrong = "The two models are not of one architecture and size"
        raise UserError(wrong, got=f"'{tuned}' with {settings(other)}", expected=f"{settings(own)}, as '{base}'")


def check_vocabularies(own: dict[str, int], other: dict[str, int], base: str, tuned: str) -> None:
    """Refuse tokens of other meaning. A token that only one of them has is no obstacle where its id is free."""
    tokens, others = ({i: token for token, i in vocabulary.items()} for vocabulary in (own, other))
    for i in sorted(tokens.keys() & others.keys()):
        if tokens[i] != others[i]:
            raise UserError(
                "The two models have different vocabularies",
                got=f"token {i} of '{tuned}' is {others[i]!r}",
                expected=f"{tokens[i]!r}, as in '{base}'",
            )
