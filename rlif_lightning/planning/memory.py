"""What a recipe takes of a device's memory, by phase and by part, in bytes; docs/plan.md has the formulas."""

from dataclasses import dataclass
from typing import Literal

from rlif_lightning.functional.chunked import chunk_rows
from rlif_lightning.planning import dry_run
from rlif_lightning.planning.dry_run import Batch
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.weights import Weights, count
from rlif_lightning.sampling.kv_cache import bytes_per_token, cache_room

Device = Literal["cuda", "cpu"]
Parts = dict[str, int]
PHASES = ("load", "rollout", "reference", "update", "optimiser step")
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """What a recipe takes on one device."""

    phases: dict[str, Parts]
    weights: Weights
    rows: int  # completions decoded at a time

    @property
    def peak(self) -> int:
        """Of all phases."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


def memory(settings: Settings, available: int | None = None, device: Device = "cuda") -> Memory:
    """Peak memory of each phase, with all prompts and completions as long as they may be.

    Args:
        settings: The recipe's.
        available: Bytes for tensors, by which the sampler chooses its rows where the recipe does not; None: no limit.
        device: Optimisers work through one weight after another on a CPU, and through all at once on a GPU.
    """
    weights = count(settings)
    standing = _standing(settings, weights)
    free = None if available is None else available - sum(standing.values())
    rollout, rows = _rollout(settings, weights, free)
    phases = {"load": _load(settings, weights, standing), "rollout": standing | rollout}
    if settings.versions:
        phases["reference"] = standing | _reference(settings, weights)
    phases["update"] = standing | _update(settings, weights)
    phases["optimiser step"] = standing | _step(settings, weights, device)
    whole = {name: {k: int(v) for k, v in parts.items() if v >= 1} for name, parts in phases.items()}
    return Memory(whole, weights, rows)


def _standing(settings: Settings, weights: Weights) -> Parts:
    """What stays from step to step."""
    n, trainable = settings.shards, weights.trainable * 4
    versions = sum(trainable for which in settings.versions if which != "frozen")
    if settings.copies:
        versions += weights.frozen_copy
    elif "frozen" in settings.versions and settings.from_adapter:
        versions += trainable
    return {
        "weights": weights.loaded // n,
        "adapter": weights.adapter // n,
        "reference": versions // n,
        "optimiser": int(settings.state_bytes * weights.trainable) // n,
        "buckets": trainable if settings.batch.world_size > 1 and n == 1 else 0,  # of DDP
    }


def _load(settings: Settings, weights: Weights, standing: Parts) -> Parts:
    """The weights, and a full copy on its way to a smaller one."""
    copying = (weights.loaded - weights.frozen_copy) // settings.shards if settings.copies else 0
    return {k: v for k, v in standing.items() if k not in ("optimiser", "buckets")} | {"temporary": copying}


def _casts(settings: Settings, weights: Weights) -> int:
    """Copies of trained weights in half precision: autocast keeps them as long as it is entered."""
    if settings.shards > 1:
        return 0
    return weights.casts + (2 * weights.head if weights.head_casts and weights.head_is_weight else 0)


def _gathered(settings: Settings, weights: Weights, whole: bool) -> int:
    """Of sharded weights, what one process holds besides its share.

    Without gradients all of them, rounded as a frozen copy is. In an update, in the precision of the shares, two
    layers (the next one comes while one works) and whatever is in none: embedding and head.
    """
    if settings.shards == 1:
        return 0
    if whole:
        return weights.frozen_copy + weights.adapter * _made(settings) // 4
    outside = settings.base.itemsize * weights.head * (1 if weights.tied else 2)  # as large as each other
    return outside + 2 * (weights.loaded + weights.adapter - outside) // settings.layers


def _unpacked(settings: Settings, weights: Weights) -> int:
    """A 4-bit layer is unpacked to be used."""
    return 2 * weights.largest if settings.quantization else 0


def _made(settings: Settings) -> int:
    """Bytes of a number as a layer or the head makes it."""
    return settings.half.itemsize if settings.half is not None else 4


def _larger(*several: Parts) -> Parts:
    return max(several, key=lambda parts: sum(parts.values()))


# -- rollout -------------------------------------------------------------------------------------------------


def _rollout(settings: Settings, weights: Weights, free: int | None) -> tuple[Parts, int]:
    if not settings.native:
        return {"rollout": _rollout_data(settings)}, 0
    prompt, tokens = settings.prompt_tokens, settings.max_new_tokens
    prompts = _prompts_at_a_time(settings, free)
    rows = prompts * settings.per_prompt
    cached = cache_room(prompt, tokens) * bytes_per_token(settings.config, settings.half or settings.base)
    vocabulary, made = settings.vocabulary, _made(settings)
    read = dry_run.forward(settings.network, Batch(prompts, prompts, prompt, 0))
    common = {
        "casts": _casts(settings, weights),
        "gathered": _gathered(settings, weights, whole=True),
        "rollout": _rollout_data(settings),
    }
    # A layer whose room is used up has its old and its new keys and values for a moment.
    decoding = {
        "KV cache": rows * cached,
        "logits": rows
        * vocabulary
        * (made + 4 * (3 if settings.half is not None else 2)),  # as made, raised, tempered, weights
        "temporary": rows * (cached // settings.layers + 8 * tokens) + _unpacked(settings, weights),
    }
    reading = {
        "KV cache": read.kept,
        "logits": prompts * vocabulary * (made + 4),
        "temporary": read.forward - read.kept,
    }
    return common | _larger(decoding, reading), rows


def _prompts_at_a_time(settings: Settings, free: int | None) -> int:
    """Prompts that the sampler works on together, with so many bytes free."""
    rows = settings.rows
    if rows is None and free is None:
        rows = settings.sampled_rows
    elif rows is None:
        row = (settings.prompt_tokens + settings.max_new_tokens) * bytes_per_token(settings.config, settings.base)
        rows = max(0, free or 0) // 2 // row  # as the sampler does
    return min(settings.batch.rank_prompts, max(1, rows // settings.per_prompt))


def _rollout_data(settings: Settings) -> int:
    """Tokens, masks and statistics of a whole rollout."""
    per_token = 8 + 2 + 4 * (settings.statistics + 4)
    return settings.sampled_rows * (settings.max_new_tokens * per_token + 9 * settings.prompt_tokens)


# -- reference and update ------------------------------------------------------------------------------------


def _slice(settings: Settings) -> Batch:
    """The rows of a slice, with as many different prompts as there can be; layers that recompute share none."""
    rows = settings.micro_rows
    shares = not settings.gradient_checkpointing and settings.shards == 1
    prompts = settings.batch.prompts_per_step // settings.batch.world_size if shares else rows
    return Batch(rows, min(rows, prompts), settings.prompt_tokens, settings.max_new_tokens)


def _chunk(settings: Settings) -> int:
    """Logits of one tile."""
    rows = settings.micro_rows * settings.max_new_tokens
    return settings.vocabulary * min(rows, chunk_rows(settings.vocabulary))


def _reference(settings: Settings, weights: Weights) -> Parts:
    """One slice under another version of the policy."""
    found, made = dry_run.forward(settings.network, _slice(settings)), _made(settings)
    head = _chunk(settings) * (made + (4 if made < 4 else 0)) + (2 * weights.head if weights.head_casts else 0)
    return {
        "casts": 0 if settings.copies else _casts(settings, weights),
        "gathered": _gathered(settings, weights, whole=True),
        "rollout": _rollout_data(settings),
        "activations": found.kept,
        **_larger({"temporary": found.forward - found.kept + _unpacked(settings, weights)}, {"head": head}),
    }


def _update(settings: Settings, weights: Weights) -> Parts:
    """The slice whose gradients come on top of those of all others: the largest of four moments."""
    batch = _slice(settings)
    found = dry_run.update(settings.network, batch)
    unpacked = _unpacked(settings, weights)
    head, begun = _head(settings, weights)
    forward = {"activations": found.kept, "temporary": found.forward - found.kept + unpacked}
    forward_end = {"activations": found.kept, "head": head}
    backward = {
        "activations": found.kept_backward,
        "head": begun,
        "temporary": found.backward - found.kept_backward + unpacked,
    }
    # A tied head's gradient waits for the embedding's, which comes last. Where prompts are shared every layer runs
    # twice, and the first gradients of its weights wait for the second.
    late = 4 * weights.head if weights.tied and weights.head_trains else 0
    waiting = 4 * (weights.trainable - weights.head) if batch.shares else 0
    backward_end = {"head": late, "temporary": 0 if settings.lora is not None else 4 * weights.head + waiting}
    return {
        "gathered": _gathered(settings, weights, whole=False),
        "rollout": _rollout_data(settings),
        "gradients": 4 * weights.trainable // settings.shards,
        **_larger(forward, forward_end, backward, backward_end),
    }


def _head(settings: Settings, weights: Weights) -> tuple[int, int]:
    """Of an update's head: at its own peak, and when the backward of the body begins."""
    chunk, made = _chunk(settings), _made(settings)
    own = 4 * weights.head if weights.head_trains else 0  # its gradient of this slice
    cast = 2 * weights.head if weights.head_casts else 0
    product = made * weights.head if own else 0
    if not (settings.fused_loss and weights.head_is_weight):
        # Computed again in the backward: logits, their log-softmax and its gradient.
        return chunk * (made + 4) + cast, chunk * (made + 8) + own + cast + product
    hidden = settings.micro_rows * settings.max_new_tokens * settings.config.get_text_config().hidden_size
    # Logits as made; raised; rounded again for the products.
    chunks = chunk * (made + 4 + made if made < 4 else 4)
    return chunks + hidden * settings.base.itemsize + own + cast + (product if made < 4 else 0), own


def _step(settings: Settings, weights: Weights, device: Device) -> Parts:
    everything = 4 * weights.trainable // settings.shards
    copy = everything if settings.steps_at_once else 0
    return {
        "rollout": _rollout_data(settings),
        "gradients": everything,
        "temporary": 8 * weights.largest_trainable if device == "cpu" else copy,
    }
