"""The recipe of the toy model: every number that decides how it comes out."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from rlif_lightning.toy.arithmetic import MAX_OPERATIONS, MIN_OPERATIONS, OPERATORS
from rlif_lightning.toy.problems import CHARACTERS, Style

Variant = Literal["toy", "toy-tuned"]

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
PROMPT_END = ">"  # closes the question: a prompt is the text "3+5-9+2>"
VOCABULARY = {token: i for i, token in enumerate((PAD, BOS, EOS, PROMPT_END, *CHARACTERS))}
MAX_LENGTH = 256

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
EMBEDDING_STD, HEAD_STD, FAN_IN_GAIN = 0.5, 0.02, 0.7


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of the pre-training."""

    name: str  # shown on the progress bar; also names the phase's random stream
    steps: int  # of the optimiser; the most there may be if until_loss is given
    lr: float  # after the warm-up
    final_lr: float  # share of lr that a cosine has left at the end; 1 keeps it constant
    styles: Mapping[Style, float]  # weight of each style in the corpus
    slip: float = 0.0  # chance that the result of a written step is random
    until_loss: float | None = None  # the phase ends when the running mean falls below this, and fails otherwise


STEPS_FIRST: dict[Style, float] = {"steps": 0.90, "direct": 0.10}
MIXTURE: dict[Style, float] = {
    "steps": 0.36, "direct": 0.46, "terse": 0.08, "skipped": 0.06, "noise": 0.02, "give_up": 0.02
}  # fmt: skip
# Seeds differ by hundreds of steps in when the arithmetic "clicks": a fixed count would be unsafe.
CLEAN = Phase("clean", steps=1500, lr=3e-3, final_lr=1.0, styles=STEPS_FIRST, until_loss=0.03)
NOISY = Phase("noisy", steps=200, lr=1e-3, final_lr=0.1, styles=MIXTURE, slip=0.06)
TUNED = Phase("tuned", steps=80, lr=1e-3, final_lr=0.1, styles={"steps": 1.0})

PHASES: dict[Variant, tuple[Phase, ...]] = {"toy": (CLEAN, NOISY), "toy-tuned": (CLEAN, NOISY, TUNED)}
BATCH_SIZE, WARMUP, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM, LOSS_DECAY = 64, 50, (0.9, 0.98), 0.01, 1.0, 0.9
# Raise it when a change of the code changes the result and none of the numbers above says so.
REVISION = 1


def recipe_hash(variant: Variant) -> str:
    """Eight hexadecimal digits that change whenever a variant would be built differently."""
    recipe = (
        [dataclasses.asdict(phase) for phase in PHASES[variant]],
        [MIN_OPERATIONS, MAX_OPERATIONS, OPERATORS],
        [VOCABULARY, MAX_LENGTH, ARCHITECTURE, EMBEDDING_STD, HEAD_STD, FAN_IN_GAIN],
        [BATCH_SIZE, WARMUP, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM, LOSS_DECAY, REVISION],
    )
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
