"""Try the longest batch that there can be before the first step, so that memory runs out at once or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.errors import UserError
from rlif_lightning.models.references import free_memory
from rlif_lightning.models.strategies import shares_out
from rlif_lightning.planning.memory import GIB, Memory, memory
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.settings_to_change import settings_to_change, what_to_do
from rlif_lightning.planning.weights import optimizer_memory
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.sampling import NativeSampler
from rlif_lightning.sampling.native import pad_left
from rlif_lightning.sampling.protocol import up_to_date
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.module import RLIFModule

Plan = tuple[Settings, Memory]
PHASES = ("rollout", "reference", "update")
TOY = 20_000_000  # parameters below which no machine that runs this runs out of memory
ANY_SETTING = (
    "lower --rollout.micro_batch_size, --rollout.sampler.rows or --rollout.max_new_tokens, or set "
    "--model.gradient_checkpointing true, --model.lora or --model.quantization nf4: rlif plan says what each saves"
)


class MemoryCheck(Callback):
    """Tries out the largest rollout and update before the first step, so that a lack of memory shows at once.

    Weights, gradients and random numbers are left as they were, so a run is bit for bit the same with and without
    it. On a GPU it takes about as long as two slices of an update. On a CPU, where a process that takes too much is
    killed, what ``rlif plan`` says is compared with the memory that is free.

    Args:
        action: ``try``: try them out. ``auto``: try on a GPU; on a CPU compare the estimate of ``rlif plan`` with the
            free memory, unless the model is a toy. ``off``: do nothing.
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
        collector = pl_module.collector
        if self.action == "off" or collector is None:
            return
        whole = not shares_out(trainer.strategy)
        if self.action == "try" or (pl_module.device.type == "cuda" and whole):
            try_longest(trainer, pl_module, collector)
        elif whole and sum(p.numel() for p in pl_module.parameters()) >= TOY:
            compare(trainer, pl_module, collector)


# -- the longest batch ---------------------------------------------------------------------------------------


def try_longest(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """Run each phase on the longest batch.

    Raises:
        UserError: Memory ran out.
    """
    cuda, phase = module.device.type == "cuda", ""
    try:
        with _untouched(trainer, module):
            for phase in PHASES:
                {"rollout": _sample, "reference": _refer, "update": _update}[phase](trainer, module, collector)
    except torch.OutOfMemoryError as error:
        text = str(error).splitlines()[0]
        del error  # its traceback holds the tensors
        if cuda:
            torch.cuda.empty_cache()
        raise _ran_out(trainer, module, collector, phase, text) from None
    if cuda:
        peak = torch.cuda.max_memory_allocated(module.device) / GIB
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(module.device)
        rank_zero_info(f"The longest batch that there can be takes {peak:.1f} GiB.")


@contextmanager
def _untouched(trainer: Trainer, module: RLIFModule) -> Iterator[None]:
    """Random numbers, gradients and sums are as before afterwards; memory of the optimiser's states is held."""
    trained = [p for p in module.parameters() if p.requires_grad]
    devices = [module.device] if module.device.type == "cuda" else []
    missing = 0 if any(o.state for o in trainer.optimizers) else optimizer_memory(module.make_optimizer)[0]
    with torch.random.fork_rng(devices=devices):
        try:
            size = int(missing * sum(p.numel() for p in trained))
            held = torch.empty(size, dtype=torch.uint8, device=module.device)
            yield
            del held
        finally:
            module.window.sums = None
            for weight in trained:
                weight.grad = None


def _longest_prompts(trainer: Trainer, count: int) -> list[list[int]]:
    """Token ids of the longest prompts of the training data, the very longest first."""
    every = sorted(trainer.datamodule.prompts["train"], key=lambda p: -len(p.ids))  # type: ignore[attr-defined]
    return [list(p.ids) for p in every[:count]]


def _sample(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """The last token of a batch of prompts whose completions have all grown as long as they may."""
    sampler = collector.sampler
    assert module.policy is not None
    if isinstance(sampler, NativeSampler):
        with up_to_date(sampler, module.policy):
            prompts = _longest_prompts(trainer, collector.plan.rank_prompts)
            sampler.sample_last_token(prompts, collector.drawn, collector.sampling)


def _longest_slice(trainer: Trainer, module: RLIFModule, collector: Collector) -> Rollout:
    """A slice of the longest prompts, as many different ones as there can be, with the longest completions."""
    plan, tokens = collector.plan, collector.sampling.max_new_tokens
    rows = plan.window_rows // plan.slices
    prompts = _longest_prompts(trainer, min(rows, plan.prompts_per_step // plan.world_size))
    ids, mask = pad_left([prompts[i * len(prompts) // rows] for i in range(rows)], 0, module.device)
    whole = torch.ones(rows, tokens, dtype=torch.bool, device=module.device)
    zeros = torch.zeros(rows, tokens, device=module.device)
    completion = ids[:, -1:].expand(rows, tokens).contiguous()
    return Rollout(
        Samples(ids, mask, completion, whole, ~whole[:, 0], logprob=zeros),
        plan.group_size,
        collector.sampling.temperature,
        torch.zeros(rows, dtype=torch.int64),
        kl_logprob=zeros if module.reference in module.needs and module.loss.kl_coefficient else None,
        advantages=torch.ones(rows, device=module.device),
        loss_mask=whole,
    )


def _refer(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """The slice under the other versions of the policy."""
    assert module.policy is not None
    with up_to_date(collector.sampler, module.policy):
        part = _longest_slice(trainer, module, collector)
        rows = [torch.arange(len(part.seeds))]
        collector.with_references(part, module.policy, rows, module.needs, module.reference, module.one_pass)


def _update(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """Forward and backward of the slice; twice where gradients add up, as they are there the second time."""
    part = _longest_slice(trainer, module, collector)
    old = None if collector.plan.on_policy else part.samples.logprob
    batch = {"rollout": part, "old_logprob": old, "denominator": 1.0}
    for _ in range(min(2, collector.plan.slices)):
        with trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)
        loss.backward()  # not the strategy's: nothing is reduced over processes


# -- the plan ------------------------------------------------------------------------------------------------


def _planned(trainer: Trainer, module: RLIFModule, collector: Collector, available: int | None) -> Plan | None:
    """The run's plan with the longest prompt that the data has; None for a model that can be trained, not planned."""
    try:
        settings = plan_settings(
            module,
            collector,
            precision=str(trainer.precision),
            prompt_tokens=len(_longest_prompts(trainer, 1)[0]),
            processes=trainer.world_size,
        )
        return settings, memory(settings, available, "cpu" if module.device.type == "cpu" else "cuda")
    except Exception:  # code of any architecture runs in there
        rank_zero_info("rlif plan can't tell how much memory the longest batch takes: it does not know this model.")
        return None


def _advice(plan: Plan, available: int | None) -> str:
    with suppress(Exception):  # as above, with other settings
        return what_to_do(settings_to_change(*plan, available), available) or ANY_SETTING
    return ANY_SETTING


def compare(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """Compare the plan with the free memory of a CPU, of which each process of a machine has a part.

    Raises:
        UserError: The plan is larger.
    """
    free = free_memory(module.device)
    if free is None:
        return
    processes = trainer.num_devices
    free //= processes
    there = sum(p.numel() * p.element_size() for p in module.parameters())
    plan = _planned(trainer, module, collector, free + there)
    if plan is not None and plan[1].peak - there > free:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"There is no memory for the longest batch that there can be, in the phase '{plan[1].worst}'",
            got=f"{(plan[1].peak - there) / GIB:.1f} GiB needed besides the weights, {free / GIB:.1f} GiB free{each}",
            do=_advice(plan, free + there),
        )


def _ran_out(trainer: Trainer, module: RLIFModule, collector: Collector, phase: str, text: str) -> UserError:
    cuda = module.device.type == "cuda"
    total = torch.cuda.get_device_properties(module.device).total_memory if cuda else None
    plan = _planned(trainer, module, collector, total)
    if plan is not None:
        text += f"; rlif plan expects a peak of {plan[1].peak / GIB:.1f} GiB, in the phase '{plan[1].worst}'"
    return UserError(
        f"The longest batch that there can be does not fit into memory, in the phase '{phase}'",
        got=text,
        do=ANY_SETTING if plan is None else _advice(plan, total),
    )


def out_of_memory(error: BaseException) -> UserError:
    """What to say when memory runs out at any time."""
    return UserError("The device's memory ran out", got=str(error).partition("\n")[0], do=ANY_SETTING)
