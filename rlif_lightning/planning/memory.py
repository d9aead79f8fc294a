"""What a recipe takes of a device's memory, by phase and by part, in bytes; docs/plan.md has the formulas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlif_lightning.functional.chunked import chunk_rows
from rlif_lightning.planning import dry_run
from rlif_lightning.planning.dry_run import Batch
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.weights import Weights, count, state_bytes
from rlif_lightning.sampling.kv_cache import STEP, bytes_per_token

Device = Literal["cuda", "cpu"]
Parts = dict[str, int]
PHASES = ("load", "rollout", "reference", "update", "optimiser step")
GIB = 2**30
CONTEXT, USABLE = 0.6 * GIB, 0.94
"""Of a GPU's memory: what its driver and libraries take, and the share of the rest that fragments leave."""


def usable(gigabytes: float) -> int:
    """Bytes for tensors on a GPU that is sold with so many GB."""
    return int((gigabytes * GIB - CONTEXT) * USABLE)


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
    n, adapts = settings.shards, settings.lora is not None
    trainable = weights.trainable * 4
    versions = sum(trainable for which in settings.versions if which != "frozen")
    if "frozen" in settings.versions:
        versions += (trainable if settings.from_adapter else 0) if adapts else weights.frozen_copy
    return {
        "weights": weights.loaded // n,
        "adapter": weights.adapter // n,
        "reference": versions // n,
        "optimiser": int(state_bytes(settings.optimizer) * weights.trainable) // n,
        "buckets": trainable if settings.reduces else 0,
    }


def _load(settings: Settings, weights: Weights, standing: Parts) -> Parts:
    """The weights, and a full copy on its way to a smaller one."""
    copying = settings.lora is None and "frozen" in settings.versions
    return {k: v for k, v in standing.items() if k not in ("optimiser", "buckets")} | {
        "temporary": (weights.loaded - weights.frozen_copy) // settings.shards if copying else 0
    }


def _casts(settings: Settings, weights: Weights) -> int:
    """Copies of trained weights in half precision: autocast keeps them as long as it is entered."""
    if settings.shards > 1:
        return 0
    return weights.casts + (2 * weights.head if weights.head_casts and weights.head_is_weight else 0)


def _gathered(settings: Settings, weights: Weights, whole: bool) -> int:
    """Of sharded weights, what one process holds beside its share.

    Without gradients all of them, rounded as a frozen copy is. In an update, in the precision of the shares, two
    layers (the next one comes while one works) and whatever is in none: embedding and head.
    """
    if settings.shards == 1:
        return 0
    if whole:
        return weights.frozen_copy + weights.adapter * (2 if settings.half is not None else 4) // 4
    outside = settings.base.itemsize * weights.head * (1 if weights.tied else 2)  # as large as each other
    layers = settings.config.get_text_config().num_hidden_layers
    return outside + 2 * (weights.loaded + weights.adapter - outside) // layers


def _unpacked(settings: Settings, weights: Weights) -> int:
    """A 4-bit layer is unpacked to be used."""
    return 2 * weights.largest if settings.quantization else 0


# -- rollout -------------------------------------------------------------------------------------------------


def _rollout(settings: Settings, weights: Weights, free: int | None) -> tuple[Parts, int]:
    prompt, tokens = settings.prompt_tokens, settings.max_new_tokens
    if not settings.native:
        return {"rollout": _rollout_data(settings)}, 0
    keys, values = dry_run.cache_bytes_per_token(settings.network)
    limit = settings.rows
    if limit is None:
        everything = settings.batch.rank_prompts * settings.per_prompt
        row = (prompt + tokens) * bytes_per_token(settings.config, settings.base)
        limit = everything if free is None else max(0, free) // 2 // row  # as the sampler does
    prompts, rows = settings.prompts_and_rows(limit)
    layers = settings.config.get_text_config().num_hidden_layers
    room = cache_room(prompt, tokens)
    size = settings.half.itemsize if settings.half is not None else 4
    vocabulary = _vocabulary(settings)
    logits = vocabulary * (size + 4 * (3 if settings.half is not None else 2))  # as made, raised, tempered, weights
    read = dry_run.forward(settings.network, Batch(prompts, prompts, prompt, 0), True)
    casts = _casts(settings, weights)
    common = {
        "casts": casts,
        "gathered": _gathered(settings, weights, whole=True),
        "rollout": _rollout_data(settings),
    }
    # A layer whose room is used up has its old and its new keys and values for a moment.
    decoding = {
        "KV cache": rows * room * (keys + values),
        "logits": rows * logits,
        "temporary": rows * (room * (keys + values) // layers + 8 * tokens) + _unpacked(settings, weights),
    }
    reading = {
        "KV cache": read.kept,
        "logits": prompts * vocabulary * (size + 4),
        "temporary": read.forward - read.kept,
    }
    return common | _larger(decoding, reading), rows


def _rollout_data(settings: Settings) -> int:
    """Tokens, masks and statistics of a whole rollout."""
    per_token = 8 + 2 + 4 * (settings.statistics + 4)
    row = settings.max_new_tokens * per_token + 9 * settings.prompt_tokens
    return settings.batch.rank_prompts * settings.per_prompt * row


def cache_room(prompt: int, tokens: int) -> int:
    """Tokens for which a row's cache has room in the end; see :class:`rlif_lightning.sampling.kv_cache.SlabLayer`."""
    room = max(prompt + STEP, prompt * 5 // 4)
    while room < prompt + tokens - 1:
        end = room + 1
        room = max(end + STEP, end * 5 // 4)
    return room


# -- reference and update ------------------------------------------------------------------------------------


def _slice(settings: Settings) -> Batch:
    """The rows of a slice, with as many different prompts as there can be; layers that recompute share none."""
    rows = settings.micro_rows
    shares = not settings.plain and not settings.gradient_checkpointing and settings.shards == 1
    prompts = settings.batch.prompts_per_step // settings.batch.world_size if shares else rows
    return Batch(rows, min(rows, prompts), settings.prompt_tokens, settings.max_new_tokens)


def _vocabulary(settings: Settings) -> int:
    return int(settings.config.get_text_config().vocab_size)


def _chunk(settings: Settings) -> tuple[int, int]:
    """Numbers in a tile of logits, and bytes of one as the head makes it."""
    v = _vocabulary(settings)
    rows = settings.micro_rows * settings.max_new_tokens
    chunk = rows if settings.plain else min(rows, chunk_rows(v))
    return chunk * v, settings.half.itemsize if settings.half is not None else 4


def _reference(settings: Settings, weights: Weights) -> Parts:
    """One slice under another version of the policy."""
    copied = settings.lora is None and "frozen" in settings.versions
    found = dry_run.forward(settings.network, _slice(settings), True)
    chunk, size = _chunk(settings)
    head = chunk * (size + (4 if size < 4 else 0)) + (2 * weights.head if weights.head_casts else 0)
    if settings.plain:
        head = chunk * (size + 8)
    return {
        "casts": 0 if copied else _casts(settings, weights),
        "gathered": _gathered(settings, weights, whole=True),
        "rollout": _rollout_data(settings),
        "activations": found.kept,
        **_larger({"temporary": found.forward - found.kept + _unpacked(settings, weights)}, {"head": head}),
    }


def _update(settings: Settings, weights: Weights) -> Parts:
    """The slice whose gradients come on top of those of all others: the largest of four moments."""
    batch = _slice(settings)
    found = dry_run.update(settings.network, batch)
    chunk, size = _chunk(settings)
    unpacked = _unpacked(settings, weights)
    own = 4 * weights.head if weights.head_trains else 0  # the head's gradient of this slice
    cast = 2 * weights.head if weights.head_casts else 0
    late = own if weights.tied else 0  # waits for the embedding's, which comes last
    if settings.one_pass and weights.head_is_weight:
        hidden = settings.micro_rows * settings.max_new_tokens * settings.config.get_text_config().hidden_size
        product = size * weights.head if own and size < 4 else 0
        # Logits as made; raised; rounded again for the products.
        chunks = chunk * (size + 4 + size if size < 4 else 4)
        head, begun = chunks + hidden * settings.base.itemsize + own + cast + product, own
    else:
        # Computed again in the backward: logits, their log-softmax and its gradient.
        head = chunk * (size + 4) + cast
        begun = chunk * (size + 8) + own + cast + (size * weights.head if own else 0)
    forward = {"activations": found.kept, "temporary": found.forward - found.kept + unpacked}
    forward_end = {"activations": found.kept, "head": head}
    backward = {
        "activations": found.kept_backward,
        "head": begun,
        "temporary": found.backward - found.kept_backward + unpacked,
    }
    # Where prompts are shared every layer runs twice, and the first gradients of its weights wait for the second.
    waiting = 4 * (weights.trainable - weights.head) if batch.shares else 0
    backward_end = {"head": late, "temporary": 0 if settings.lora is not None else 4 * weights.head + waiting}
    return {
        "gathered": _gathered(settings, weights, whole=False),
        "rollout": _rollout_data(settings),
        "gradients": 4 * weights.trainable // settings.shards,
        **_larger(forward, forward_end, backward, backward_end),
    }


def _step(settings: Settings, weights: Weights, device: Device) -> Parts:
    largest = 8 * weights.largest_trainable
    everything = 4 * weights.trainable // settings.shards
    return {
        "rollout": _rollout_data(settings),
        "gradients": everything,
        "temporary": largest if device == "cpu" else everything if takes_all_at_once(settings.optimizer) else 0,
    }


def takes_all_at_once(optimizer: Callable[[Any], torch.optim.Optimizer]) -> bool:
    """Whether an optimiser of torch's works on all weights together on a GPU, with a copy of their size."""
    made = optimizer([torch.nn.Parameter(torch.zeros(1, device="cpu"))])
    one_by_one = made.defaults.get("fused") or made.defaults.get("foreach") is False
    return type(made).__module__.startswith("torch.optim") and not one_by_one


def _larger(*several: Parts) -> Parts:
    return max(several, key=lambda parts: sum(parts.values()))
