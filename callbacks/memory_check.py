"""Try the longest batch that there can be before the first step, so that memory runs out at once or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.errors import LESS_MEMORY, UserError, is_out_of_memory
from rlif_lightning.models.strategies import shares_out
from rlif_lightning.planning.memory import GIB, memory
from rlif_lightning.planning.settings_to_change import settings_to_change, what_to_do
from rlif_lightning.planning.weights import optimizer_memory
from rlif_lightning.rollout import Rollout, Samples, pad_left
from rlif_lightning.sampling import NativeSampler
from rlif_lightning.sampling.protocol import up_to_date
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.module import RLIFModule
from rlif_lightning.training.slice_loss import takes_fused_loss


class MemoryCheck(Callback):
    """Tries out the largest rollout and update before the first step, so that a lack of memory shows at once.

    Weights, gradients and random numbers are left as they were, so a run is bit for bit the same with and without
    it. It takes about as long as two slices of an update.

    Args:
        action: ``auto``: try them out on a GPU, unless weights are sharded; ``try``: everywhere; ``off``: do nothing.
    """

    def __init__(self, action: Literal["auto", "try", "off"] = "auto") -> None:
        self.action = action

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try, before anything else takes time; a UserError says which settings to change, and what each saves."""
        assert isinstance(pl_module, RLIFModule)
        on_gpu = pl_module.device.type == "cuda" and not shares_out(trainer.strategy)
        if pl_module.collector is not None and (self.action == "try" or (self.action == "auto" and on_gpu)):
            try_longest(trainer, pl_module, pl_module.collector)


def try_longest(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """Run each phase on the longest batch."""
    cuda, phase = module.device.type == "cuda", ""
    phases = {"rollout": _sample, "reference": _refer, "update": _update}
    try:
        with _untouched(trainer, module):
            for phase in phases:
                phases[phase](trainer, module, collector)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
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
    size = int(missing * sum(p.numel() for p in trained))
    with torch.random.fork_rng(devices=devices):
        try:
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
    if isinstance(sampler, NativeSampler):
        with up_to_date(sampler, module.policy):
            prompts = _longest_prompts(trainer, collector.plan.rank_prompts)
            sampler.sample_last_token(prompts, collector.completions_per_prompt, collector.sampling)


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
    """The slice under the references."""
    with up_to_date(collector.sampler, module.policy):
        part = _longest_slice(trainer, module, collector)
        rows = [torch.arange(len(part.seeds))]
        fused = takes_fused_loss(module.policy.model, module.loss)
        collector.with_references(part, module.policy, rows, module.needs, module.reference, fused)


def _update(trainer: Trainer, module: RLIFModule, collector: Collector) -> None:
    """Forward and backward of the slice; twice where gradients add up, as they are there the second time."""
    part = _longest_slice(trainer, module, collector)
    old = None if collector.plan.on_policy else part.samples.logprob
    batch = {"rollout": part, "old_logprob": old, "denominator": 1.0}
    for _ in range(min(2, collector.plan.slices)):
        with trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)
        loss.backward()  # not the strategy's: nothing is reduced over processes


def _ran_out(trainer: Trainer, module: RLIFModule, collector: Collector, phase: str, text: str) -> UserError:
    """What to say, with the run's plan for the data's longest prompt where the model can be planned."""
    cuda, do = module.device.type == "cuda", LESS_MEMORY
    total = torch.cuda.get_device_properties(module.device).total_memory if cuda else None
    with suppress(Exception):  # code of any architecture runs in there
        settings = plan_settings(
            module,
            collector,
            precision=str(trainer.precision),
            prompt_tokens=len(_longest_prompts(trainer, 1)[0]),
            processes=trainer.world_size,
        )
        plan = memory(settings, total, "cuda" if cuda else "cpu")
        text += f"; rlif plan expects a peak of {plan.peak / GIB:.1f} GiB, in the phase '{plan.worst}'"
        do = what_to_do(settings_to_change(settings, plan, total), total) or do
    wrong = f"The longest batch that there can be does not fit into memory, in the phase '{phase}'"
    return UserError(wrong, got=text, do=do)
