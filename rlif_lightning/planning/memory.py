"""What a recipe takes of a device's memory, by phase and by part, in bytes; docs/plan.md has the formulas."""

from dataclasses import dataclass
from typing import Literal

from rlif_lightning.functional.chunked import chunk_rows
from rlif_lightning.planning import dry_run
from rlif_lightning.planning.dry_run import Batch
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.weights import Weights, count_weights
from rlif_lightning.sampling.kv_cache import bytes_per_token, cache_room

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
        return max(map(_total, self.phases.values()))

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: _total(self.phases[name]))


def memory(settings: Settings, available: int | None = None, device: Literal["cuda", "cpu"] = "cuda") -> Memory:
    """Peak memory of each phase, with all prompts and completions as long as they may be.

    ``available``: bytes for tensors, by which the sampler chooses its rows where the recipe does not. Optimisers work
    through one weight after another on a CPU, and through all at once on a GPU.
    """
    weights = count_weights(settings)
    standing = _standing(settings, weights)
    free = None if available is None else available - _total(standing)
    rollout, rows = _rollout(settings, weights, free)
    phases = {"rollout": rollout}
    if settings.references:
        phases["reference"] = _reference(settings, weights)
    phases |= {"update": _update(settings, weights), "optimiser step": _step(settings, weights, device)}
    always = standing | {"rollout": _rollout_data(settings)}
    # A full copy on its way to a smaller one.
    copying = (weights.loaded - weights.frozen_copy) // settings.shards if settings.copies else 0
    load = standing | {"optimiser": 0, "buckets": 0, "temporary": copying}
    phases = {"load": load} | {name: always | parts for name, parts in phases.items()}
    whole = {name: {k: int(v) for k, v in parts.items() if v >= 1} for name, parts in phases.items()}
    return Memory(whole, weights, rows)


def _standing(settings: Settings, weights: Weights) -> Parts:
    """What stays from step to step."""
    n, trainable = settings.shards, weights.trainable * 4
    references = trainable * len(settings.references - {"frozen"})
    if settings.copies:
        references += weights.frozen_copy
    elif "frozen" in settings.references and settings.from_adapter:
        references += trainable
    return {
        "weights": weights.loaded // n,
        "adapter": weights.adapter // n,
        "reference": references // n,
        "optimiser": int(settings.state_bytes * weights.trainable) // n,
        "buckets": trainable if settings.batch.world_size > 1 and n == 1 else 0,  # of DDP
    }


def _casts(settings: Settings, weights: Weights) -> int:
    """Copies of trained weights in half precision: autocast keeps them as long as it is entered."""
    head = 2 * weights.head if weights.head_casts and weights.head_is_weight else 0
    return weights.casts + head if settings.shards == 1 else 0


def _gathered(settings: Settings, weights: Weights) -> int:
    """All of sharded weights, rounded as a frozen copy is: what a process holds where there are no gradients."""
    return weights.frozen_copy + weights.adapter * settings.made // 4 if settings.shards > 1 else 0


def _unpacked(settings: Settings, weights: Weights) -> int:
    """A 4-bit layer is unpacked to be used."""
    return 2 * weights.largest if settings.quantization else 0


def _total(parts: Parts) -> int:
    return sum(parts.values())


def _rollout(settings: Settings, weights: Weights, free: int | None) -> tuple[Parts, int]:
    """The rollout's own parts, and how many completions are decoded at a time."""
    if not settings.native:
        return {}, 0
    prompt, vocabulary = settings.prompt_tokens, settings.vocabulary
    prompts = _prompts_at_a_time(settings, free)
    rows = prompts * settings.per_prompt
    room = cache_room(prompt, settings.max_new_tokens)
    cached = room * bytes_per_token(settings.config, settings.half or settings.base)
    read = dry_run.forward(settings.network, Batch(prompts, prompts, prompt, 0))
    raised = 3 if settings.half is not None else 2  # in float32: raised, tempered, weights
    # A layer whose room is used up has its old and its new keys and values for a moment.
    grown = rows * (cached // settings.layers + 8 * settings.max_new_tokens)
    decoding = {
        "KV cache": rows * cached,
        "logits": rows * vocabulary * (settings.made + 4 * raised),
        "temporary": grown + _unpacked(settings, weights),
    }
    reading = {
        "KV cache": read.kept,
        "logits": prompts * vocabulary * (settings.made + 4),
        "temporary": read.forward - read.kept,
    }
    common = {"casts": _casts(settings, weights), "gathered": _gathered(settings, weights)}
    return common | max(decoding, reading, key=_total), rows


def _prompts_at_a_time(settings: Settings, free: int | None) -> int:
    """Prompts that the sampler works on together, with so many bytes free."""
    rows = settings.sampled_rows if settings.rows is None else settings.rows
    if settings.rows is None and free is not None:
        row = (settings.prompt_tokens + settings.max_new_tokens) * bytes_per_token(settings.config, settings.base)
        rows = max(0, free) // 2 // row  # as the sampler does
    return min(settings.batch.rank_prompts, max(1, rows // settings.per_prompt))


def _rollout_data(settings: Settings) -> int:
    """Tokens, masks and statistics of a whole rollout."""
    per_token = 8 + 2 + 4 * (settings.statistics + 4)
    return settings.sampled_rows * (settings.max_new_tokens * per_token + 9 * settings.prompt_tokens)


def _slice(settings: Settings) -> Batch:
    """The rows of a slice, with as many different prompts as there can be; layers that recompute share none."""
    rows = settings.micro_rows
    shares = not settings.gradient_checkpointing and settings.shards == 1
    prompts = settings.batch.prompts_per_step // settings.batch.world_size if shares else rows
    return Batch(rows, min(rows, prompts), settings.prompt_tokens, settings.max_new_tokens)


def _chunk(settings: Settings) -> int:
    """How many logits a chunk has."""
    rows = settings.micro_rows * settings.max_new_tokens
    return settings.vocabulary * min(rows, chunk_rows(settings.vocabulary))


def _reference(settings: Settings, weights: Weights) -> Parts:
    """One slice under a reference."""
    found, made = dry_run.forward(settings.network, _slice(settings)), settings.made
    head = _chunk(settings) * (made + (4 if made < 4 else 0)) + (2 * weights.head if weights.head_casts else 0)
    temporary = found.forward - found.kept + _unpacked(settings, weights)
    return {
        "casts": 0 if settings.copies else _casts(settings, weights),
        "gathered": _gathered(settings, weights),
        "activations": found.kept,
        **({"head": head} if head > temporary else {"temporary": temporary}),
    }


def _update(settings: Settings, weights: Weights) -> Parts:
    """The slice whose gradients come on top of those of all others: the largest of four moments."""
    batch = _slice(settings)
    found = dry_run.update(settings.network, batch)
    unpacked, (head, begun) = _unpacked(settings, weights), _head(settings, weights)
    forward = {"activations": found.kept, "temporary": found.forward - found.kept + unpacked}
    forward_end = {"activations": found.kept, "head": head}
    computing = found.backward - found.kept_backward + unpacked
    backward = {"activations": found.kept_backward, "head": begun, "temporary": computing}
    # A tied head's gradient waits for the embedding's, which comes last. Where prompts are shared every layer runs
    # twice, and the first gradients of its weights wait for the second.
    late = 4 * weights.head if weights.tied and weights.head_trains else 0
    waiting = 4 * (weights.trainable - weights.head) if batch.shares else 0
    backward_end = {"head": late, "temporary": 0 if settings.lora is not None else 4 * weights.head + waiting}
    gathered = 0
    if settings.shards > 1:  # in the precision of the shares: two layers (the next one comes while one works) and
        outside = settings.base.itemsize * weights.head * (1 if weights.tied else 2)  # embedding and head
        gathered = outside + 2 * (weights.loaded + weights.adapter - outside) // settings.layers
    gradients = 4 * weights.trainable // settings.shards
    return {
        "gathered": gathered,
        "gradients": gradients,
        **max(forward, forward_end, backward, backward_end, key=_total),
    }


def _head(settings: Settings, weights: Weights) -> tuple[int, int]:
    """Of an update's head: at its own peak, and when the backward of the body begins."""
    chunk, made = _chunk(settings), settings.made
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


def _step(settings: Settings, weights: Weights, device: str) -> Parts:
    gradients = 4 * weights.trainable // settings.shards
    at_once = gradients if settings.steps_at_once else 0
    return {"gradients": gradients, "temporary": 8 * weights.largest_trainable if device == "cpu" else at_once}
