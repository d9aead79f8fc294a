"""Try the longest batch that there can be before the first step, so that memory runs out at once or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.models.references import free_memory
from rlif_lightning.models.strategies import shares_out
from rlif_lightning.planning.advice import advise
from rlif_lightning.planning.memory import GIB, Memory, cache_room, memory
from rlif_lightning.planning.settings import Settings, read_settings
from rlif_lightning.planning.weights import state_bytes
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.sampling import NativeSampler
from rlif_lightning.sampling.llama_decoder import decoder_for
from rlif_lightning.sampling.native import pad_left
from rlif_lightning.sampling.protocol import up_to_date
from rlif_lightning.sampling.token_sampling import TokenSampler
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.module import RLIFModule

PHASES = ("rollout", "reference", "update")
TOY = 20_000_000  # parameters below which no machine that runs this runs out of memory


class MemoryCheck(Callback):
    """Tries a rollout's last token, a reference's slice and an update's, all as long as they may be.

    Weights, gradients and random numbers are left as they were, so a run is bit for bit the same with and without
    it. On a GPU it takes about as long as two slices of an update. On a CPU, where a process that takes too much is
    killed, what ``rlif plan`` says is held against the memory that is free.

    Args:
        action: ``auto``: try on a GPU, compare on a CPU unless the model is a toy; ``try``; or ``off``.
    """

    def __init__(self, action: Literal["auto", "try", "off"] = "auto") -> None:
        if action not in ("auto", "try", "off"):
            raise UserError("memory_check.action is out of range", got=action, expected="auto, try or off")
        self.action = action

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try, before anything else takes time.

        Raises:
            UserError: Memory would run out: which settings to change, and what each saves.
        """
        assert isinstance(pl_module, RLIFModule)
        rollout = pl_module.collector
        if self.action == "off" or rollout is None:
            return
        whole = not shares_out(trainer.strategy)
        if self.action == "try" or (pl_module.device.type == "cuda" and whole):
            self._try(trainer, pl_module, rollout)
        elif whole and sum(p.numel() for p in pl_module.parameters()) >= TOY:
            compare(trainer, pl_module, rollout)

    def _try(self, trainer: Trainer, module: RLIFModule, rollout: Collector) -> None:
        device = module.device
        phase = ""
        try:
            with _untouched(trainer, module):
                for phase in PHASES:
                    {"rollout": _sample, "reference": _refer, "update": _update}[phase](trainer, module, rollout)
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0]
            del error
            if device.type == "cuda":
                torch.cuda.empty_cache()
            raise _complaint(trainer, module, rollout, phase, text) from None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            rank_zero_info(f"The longest batch that there can be takes {peak:.1f} GiB.")


@contextmanager
def _untouched(trainer: Trainer, module: RLIFModule) -> Iterator[None]:
    """Random numbers, gradients and sums are as before afterwards; memory of the optimiser's states is held."""
    trained = [p for p in module.parameters() if p.requires_grad]
    sums = module._sums
    devices = [module.device] if module.device.type == "cuda" else []
    missing = 0 if any(o.state for o in trainer.optimizers) else state_bytes(module.make_optimizer)
    with torch.random.fork_rng(devices=devices):
        try:
            size = int(missing * sum(p.numel() for p in trained))
            held = torch.empty(size, dtype=torch.uint8, device=module.device)
            yield
            del held
        finally:
            module._sums = sums
            for weight in trained:
                weight.grad = None


def _prompts(trainer: Trainer, count: int) -> list[list[int]]:
    """The longest ones of the training data."""
    every = sorted(trainer.datamodule.prompts["train"], key=lambda p: -len(p.ids))  # type: ignore[attr-defined]
    return [list(p.ids) for p in every[:count]]


@torch.no_grad()
def _sample(trainer: Trainer, module: RLIFModule, rollout: Collector) -> None:
    """The last token of a batch of prompts whose completions have all grown as long as they may."""
    sampler = rollout.sampler
    if not isinstance(sampler, NativeSampler):
        return
    drawn, tokens = rollout.votes or rollout.plan.group_size, rollout.sampling.max_new_tokens
    assert module.policy is not None
    with up_to_date(sampler, module.policy) as policy:
        longest = len(_prompts(trainer, 1)[0])
        rows = sampler._rows_that_fit(longest + tokens) if sampler.rows is None else sampler.rows
        count = rollout.plan.rank_prompts
        prompts = _prompts(trainer, count if rows is None else min(count, max(1, rows // drawn)))
        ids, mask = pad_left(prompts, sampler.pad_id, module.device)
        decoder = decoder_for(policy)
        decoder.prefill(ids, mask)
        group = torch.arange(len(prompts), device=module.device).repeat_interleave(drawn)
        decoder.select_rows(group)
        room = cache_room(longest, tokens)
        for layer in decoder.cache.preallocated:
            assert layer.keys is not None and layer.values is not None
            if room > layer.keys.shape[2]:
                layer.keys, layer.values = (layer._moved(x, room) for x in (layer.keys, layer.values))
            for x in (layer.keys, layer.values):
                x[:, :, layer.length :] = 0
            layer.length = max(layer.length, longest + tokens - 2)
        decoder.mask = torch.cat([decoder.mask, decoder.mask.new_ones(len(group), tokens)], 1)
        logits = decoder.step(ids[group, -1])
        z = logits.float()
        TokenSampler()(z if rollout.sampling.temperature == 1 else z / rollout.sampling.temperature, None)


def _longest_slice(trainer: Trainer, module: RLIFModule, rollout: Collector) -> Rollout:
    """A slice of the longest prompts, as many different ones as there can be, with the longest completions."""
    plan, tokens = rollout.plan, rollout.sampling.max_new_tokens
    rows = plan.window_rows // plan.slices
    prompts = _prompts(trainer, min(rows, plan.prompts_per_step // plan.world_size))
    ids, mask = pad_left([prompts[i * len(prompts) // rows] for i in range(rows)], 0, module.device)
    whole = torch.ones(rows, tokens, dtype=torch.bool, device=module.device)
    zeros = torch.zeros(rows, tokens, device=module.device)
    completion = ids[:, -1:].expand(rows, tokens).contiguous()
    samples = Samples(ids, mask, completion, whole, ~whole[:, 0], logprob=zeros)
    referred = zeros if module.reference in module.needs and module.kl_coefficient else None
    return Rollout(
        samples,
        plan.group_size,
        rollout.sampling.temperature,
        torch.zeros(rows, dtype=torch.int64),
        kl_logprob=referred,
        advantages=torch.ones(rows, device=module.device),
        loss_mask=whole,
    )


def _refer(trainer: Trainer, module: RLIFModule, rollout: Collector) -> None:
    """The slice under the other versions of the policy."""
    assert module.policy is not None
    with up_to_date(rollout.sampler, module.policy):
        part = _longest_slice(trainer, module, rollout)
        rows = [torch.arange(len(part.seeds))]
        rollout.with_references(part, module.policy, rows, module.needs, module.reference, module.one_pass)


def _update(trainer: Trainer, module: RLIFModule, rollout: Collector) -> None:
    """Forward and backward of the slice; twice where gradients add up, as they are there the second time."""
    part = _longest_slice(trainer, module, rollout)
    old: Tensor | None = None if rollout.plan.on_policy else part.samples.logprob
    batch = {"rollout": part, "old_logprob": old, "denominator": 1.0}
    for _ in range(min(2, rollout.plan.slices)):
        with trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)
        loss.backward()  # not the strategy's: nothing is reduced over processes


# -- the plan ------------------------------------------------------------------------------------------------


def planned(trainer: Trainer, module: RLIFModule, rollout: Collector) -> Settings:
    """The run's settings for a plan, with the longest prompt that the data has."""
    return read_settings(
        module,
        rollout,
        precision=str(trainer.precision),
        prompt_tokens=len(_prompts(trainer, 1)[0]),
        devices=trainer.world_size,
    )


def compare(trainer: Trainer, module: RLIFModule, rollout: Collector) -> None:
    """Hold a plan against the free memory of a CPU, of which the processes of a machine have a part each.

    Raises:
        UserError: It is larger.
    """
    free = free_memory(module.device)
    if free is None:
        return
    processes = trainer.num_devices
    free //= processes
    there = sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        settings = planned(trainer, module, rollout)
        plan = memory(settings, free + there, "cpu")
        if plan.peak - there <= free:
            return
        do = _knobs(settings, plan, free + there)
    except Exception:  # an architecture that can't be planned can be trained
        rank_zero_info("The memory of the longest batch was not looked at: rlif plan can't tell about this model.")
        return
    raise UserError(
        f"There is no memory for the longest batch that there can be, in the phase '{plan.worst}'",
        got=f"{(plan.peak - there) / GIB:.1f} GiB needed beside the weights, {free / GIB:.1f} GiB free"
        + (f" for each of {processes} processes" if processes > 1 else ""),
        do=do,
    )


def _complaint(trainer: Trainer, module: RLIFModule, rollout: Collector, phase: str, text: str) -> UserError:
    do, got = ANY_KNOB, text
    try:
        settings = planned(trainer, module, rollout)
        cuda = module.device.type == "cuda"
        total = torch.cuda.get_device_properties(module.device).total_memory if cuda else None
        plan = memory(settings, total)
        got = f"{text}; rlif plan expects a peak of {plan.peak / GIB:.1f} GiB, in the phase '{plan.worst}'"
        do = _knobs(settings, plan, total)
    except Exception:  # an architecture that can't be planned must not hide what has happened
        rank_zero_info("rlif plan can't tell more about this model.")
    return UserError(
        f"The longest batch that there can be does not fit into memory, in the phase '{phase}'", got=got, do=do
    )


def _knobs(settings: Settings, plan: Memory, available: int | None) -> str:
    """The most effective settings to change."""
    found = advise(settings, plan, available)[:3]
    if not found:
        return ANY_KNOB
    words = "; ".join(f"{a.knob.words} (peak {a.peak / GIB:.1f} GiB)" for a in found)
    return f"set one of {words}" if len(found) > 1 else f"set {words}"


ANY_KNOB = (
    "lower --rollout.micro_batch_size, --rollout.sampler.rows or --rollout.max_new_tokens, or set "
    "--model.gradient_checkpointing true, --model.lora or --model.quantization nf4: rlif plan says what each saves"
)


def out_of_memory(error: BaseException) -> UserError:
    """What to say when memory runs out at any time."""
    return UserError("The device's memory ran out", got=str(error).partition("\n")[0], do=ANY_KNOB)
