"""What is measured on: random Qwen2 models, a tokenizer, prompts, and the work of one step."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import ascii_letters
from typing import Any, Literal

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64},
    "A": {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024},
    "B": {"vocab_size": 151936, "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 1024},
}
"""``A``: the decoder dominates. ``B``: a real vocabulary under a small decoder, so head and sampling dominate."""

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

NEVER = -50.0  # the end token's row: its logit is this, times a number near 1, beside logits of order 1

LETTERS = len(ascii_letters)  # the tokens that prompts are made of


@dataclass(frozen=True)
class Work:
    """One optimiser step, or one rollout, the same for every side.

    Args:
        folder: Of model, tokenizer and prompts.
        new_tokens: Longest completion; where the model never ends one, the length of each.
        prompts: Of one step.
        group: Completions per prompt.
        micro_batch: Completions in one forward and backward.
        kl: Coefficient; 0 needs no reference.
        reward: ``self_certainty`` of the policy; one that reads the ``text``; ``no_forward``: what costs a side no
            forward, which is our self-certainty and the other side's text.
        steps: That are run, those to warm up included.
        fixed_length: Whether no completion ends before ``new_tokens``.
        precision: As Lightning names it. Weights that train are float32 in any; others are bfloat16 in bf16-mixed.
        lora: Train an adapter (``LORA``) in place of all weights.
        device: Where it is done.
    """

    folder: str
    new_tokens: int
    prompts: int = 4
    group: int = 8
    micro_batch: int = 8
    kl: float = 0.0
    reward: Literal["self_certainty", "text", "no_forward"] = "text"
    steps: int = 2
    fixed_length: bool = True
    learning_rate: float = 1e-6
    precision: Precision = "32-true"
    lora: bool = False
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Work":
        """As ``to_json`` wrote it."""
        return cls(**json.loads(text))


def text_reward(text: str) -> float:
    """How many different words there are: some reward that only reads, and that differs within a group."""
    return float(len(set(text.split())))


def make_config(shape: str, **changes: int) -> Any:
    """A Qwen2 configuration; ``changes`` win over the shape."""
    from transformers import Qwen2Config

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, **SHAPES[shape], **changes}
    end = sizes["vocab_size"] - 1
    return Qwen2Config(
        **sizes,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )


def make_model(config: Any, end_row: float = NEVER, seed: int = 0) -> Any:
    """Random weights, and an end token whose probability hardly depends on what was said.

    The residual stream's first dimension is held constant: every embedding starts with 1 there and no layer
    writes to it. The end token's row of the (tied) head reads that dimension alone, so that ``end_row`` sets its
    logit; the other tokens' logits are all raised alike. No side pays for that: no logits processor, no mask.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        embedding[config.eos_token_id] = 0.0
        embedding[config.eos_token_id, 0] = end_row
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    return model.eval()


def make_tokenizer(vocab_size: int) -> Any:
    """Ids below ``LETTERS`` are letters, then words, the end token last.

    Byte-level BPE without merges: for a Qwen2 model transformers makes a tokenizer of that kind out of any file.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {letter: i for i, letter in enumerate(ascii_letters)}
    words |= {f"Ġw{i}": i for i in range(LETTERS, vocab_size - 1)} | {"<end>": vocab_size - 1}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def write_prompts(path: Path, count: int, tokens: int, seed: int = 1) -> None:
    """``count`` different prompts of so many random letters, as JSON lines: ``question`` and its token ``ids``."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(LETTERS, (count, tokens), generator=generator).tolist()
    lines = [json.dumps({"question": "".join(ascii_letters[i] for i in ids), "ids": ids}) for ids in rows]
    path.write_text("".join(line + "\n" for line in lines))


def read_prompts(folder: str, field: str) -> list[Any]:
    """The prompts' texts (``question``), or their token ``ids``."""
    with open(Path(folder) / "prompts.jsonl") as lines:
        return [json.loads(line)[field] for line in lines]


def end_row_for(config: Any, probability: float, tokens: int) -> float:
    """The end token's row that ends a completion after 1 / probability tokens on average.

    Bisection on the model's own logits after random words.
    """
    import torch

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size - 1, (16, tokens), generator=generator)
    model = make_model(config, 0.0)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, tokens // 2 :].flatten(0, 1)
        logits = model.lm_head(hidden)
    others = logits[:, : config.eos_token_id].logsumexp(-1)
    low, high = NEVER, -NEVER
    for _ in range(40):
        middle = (low + high) / 2
        mean = (middle * hidden[:, 0] - others).sigmoid().mean().item()
        low, high = (middle, high) if mean < probability else (low, middle)
    return low


def save(
    folder: Path,
    shape: str,
    prompt_tokens: int,
    end_probability: float | None = None,
    prompts: int = 64,
    **changes: int,
) -> str:
    """Write model (safetensors), tokenizer and prompts; returns the folder's name."""
    from transformers import AutoTokenizer

    config = make_config(shape, **changes)
    row = NEVER if end_probability is None else end_row_for(config, end_probability, prompt_tokens * 2)
    make_model(config, row).save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    write_prompts(folder / "prompts.jsonl", prompts, prompt_tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # as every side will load it
    assert tokenizer(read_prompts(str(folder), "question"))["input_ids"] == read_prompts(str(folder), "ids")
    assert tokenizer.eos_token_id == config.eos_token_id
    return str(folder)


def with_steps(work: Work, steps: int) -> Work:
    """The same work, so many times."""
    return replace(work, steps=steps)
