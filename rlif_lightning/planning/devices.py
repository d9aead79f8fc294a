"""GPUs as their makers describe them, and how long a step should take on one. Nothing here was measured on a GPU."""

from dataclasses import dataclass

from rlif_lightning.errors import UserError
from rlif_lightning.planning import dry_run
from rlif_lightning.planning.memory import Memory
from rlif_lightning.planning.settings import Settings

MATRIX, BANDWIDTH = 0.4, 0.6
"""Shares of a data sheet's rates that are assumed to be reached."""
LAYER_SECONDS = 4e-4
"""Assumed for the operations of one layer to be started, for one token, without CUDA graphs."""
MEAN_LENGTH = 0.5
"""Assumed mean length of prompts and completions, as a share of the longest."""


@dataclass(frozen=True)
class Gpu:
    """From a data sheet."""

    title: str
    gigabytes: int
    bf16: float  # dense matrix products with sums in fp32, FLOP/s
    bandwidth: float  # bytes/s


GPUS = {
    "rtx3060": Gpu("RTX 3060", 12, 25.5e12, 360e9),
    "rtx4060": Gpu("RTX 4060", 8, 30.2e12, 272e9),
    "rtx4060ti": Gpu("RTX 4060 Ti", 16, 44.1e12, 288e9),
    "rtx3090": Gpu("RTX 3090", 24, 71e12, 936e9),
    "rtx4090": Gpu("RTX 4090", 24, 165e12, 1008e9),
    "l40s": Gpu("L40S", 48, 362e12, 864e9),
    "a100": Gpu("A100 SXM", 80, 312e12, 2039e9),
    "h100": Gpu("H100 SXM", 80, 989e12, 3350e9),
}
SIZES = (8, 12, 16, 24, 48, 80)  # GB


def parse_device(text: str) -> tuple[float, Gpu | None]:
    """Gigabytes, and the GPU where one is named: ``24``, ``24GB``, ``rtx3060``.

    Raises:
        UserError: Neither a size nor a known GPU.
    """
    word = text.lower().replace(" ", "").replace("-", "").replace("_", "")
    if word in GPUS:
        return GPUS[word].gigabytes, GPUS[word]
    try:
        size = float(word.removesuffix("gib").removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 1 <= size < 10_000:
        raise UserError(
            "--device is neither a size nor a known GPU",
            got=text,
            expected=f"such as 24GB, or one of {', '.join(GPUS)}",
        )
    return size, None


def seconds(settings: Settings, plan: Memory, gpu: Gpu) -> dict[str, float]:
    """Estimated seconds of one optimiser step on one GPU, by phase.

    A product takes 2 operations per weight and token forwards and twice that backwards (once where the weights are
    frozen); decoding a token reads all weights and the cache once.
    """
    w, text = plan.weights, settings.config.get_text_config()
    layers, packed = text.num_hidden_layers, settings.quantization is not None
    numbers = w.body + w.head
    prompt, tokens = MEAN_LENGTH * settings.prompt_tokens, MEAN_LENGTH * settings.max_new_tokens
    rate, bandwidth = MATRIX * gpu.bf16, BANDWIDTH * gpu.bandwidth
    per_token = 2 * numbers + 2 * layers * text.num_attention_heads * _head_size(text) * (prompt + tokens)
    # A 4-bit layer is read, written in half precision, and read again.
    read = (4.5 if packed else 2.0) * w.body + 2.0 * w.head
    steps = settings.batch.rollout_steps
    found = {}
    if settings.native:
        _, rows = settings.prompts_and_rows(max(1, plan.rows))
        batches = -(-settings.batch.rank_prompts * settings.per_prompt // rows)
        cache = rows / 2 * (prompt + tokens / 2) * sum(dry_run.cache_bytes_per_token(settings.network))
        token = max((read + cache) / bandwidth, rows / 2 * per_token / rate) + layers * LAYER_SECONDS
        found["rollout"] = batches * settings.max_new_tokens * token / steps
    trained = settings.batch.window_rows * (prompt + tokens)
    unpack = 2.5 * w.body / bandwidth * settings.batch.slices if packed else 0.0
    found["reference"] = len(settings.versions) * (trained * per_token / rate / settings.batch.passes + unpack)
    passes = (3 if settings.lora is None else 2) + settings.gradient_checkpointing
    found["update"] = passes * (trained * per_token / rate + unpack)
    found["optimiser step"] = 28 * w.trainable / settings.shards / bandwidth
    return {phase: value for phase, value in found.items() if value}


def _head_size(text: object) -> int:
    size = getattr(text, "head_dim", None)
    return int(size or text.hidden_size // text.num_attention_heads)  # type: ignore[attr-defined]
