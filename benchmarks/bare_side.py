"""Our step without Lightning: the same functions, called one after the other in a loop."""

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gate import Gate
from benchmarks.our_side import make_module, make_reward
from benchmarks.shapes import Work, read_prompts
from benchmarks.watch import Watch
from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.functional.losses import loss_denominator
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.sampling import NativeSampler, Sampling
from rlif_lightning.training.collector import (
    AdvantageSettings,
    sample_rollout,
    score_slices,
    with_advantages,
    with_scores,
)


def run(work: Work, gate: Gate) -> None:
    """Train."""
    plan = BatchPlan(work.prompts, work.group, work.micro_batch)
    module, reward, sampler = make_module(work), make_reward(work), NativeSampler()
    trainer: Any = SimpleNamespace(  # what the module asks a Trainer for
        training=True,
        precision="32-true",
        accumulate_grad_batches=plan.slices,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module._trainer = trainer
    module.configure_model()
    whole = module.policy
    assert whole is not None
    policy = whole.model
    optimizer = module.make_optimizer([p for p in module.parameters() if p.requires_grad])
    ids, sampling, watch = read_prompts(work.folder, "ids"), Sampling(work.new_tokens), Watch(gate)
    for step in range(work.steps):
        if step:
            watch.after_step(policy)
        gate.arrive()
        rows = [(step * work.prompts + i) % len(ids) for i in range(work.prompts)]
        prompts: list[Any] = [Prompt("", tuple(ids[row]), None) for row in rows]  # type: ignore[arg-type]
        set_training_mode(policy, training=False)
        with torch.no_grad():
            sampler.update(policy, whole.end_ids, whole.pad_id)
            places = [(0, row) for row in rows]
            rollout = sample_rollout(sampler, prompts, places, 0, work.group, sampling, whole.decode, None)
            rollout = with_scores(rollout, policy, sampling)
            window = plan.cut(rollout.samples.lengths, torch.Generator())[0]
            if work.kl:
                with whole.reference("frozen") as model:
                    reference, _ = score_slices(model, rollout, window, sampling, False)
                rollout = with_reference(rollout, reference)
            rollout = with_advantages(rollout, [reward], [1.0], AdvantageSettings()).rollout
        mask = rollout.loss_mask
        assert mask is not None
        gate.note(tokens=int(rollout.samples.lengths.sum()))
        denominator = float(sum(loss_denominator(mask[rows], module.loss, work.new_tokens) for rows in window))
        for i, rows_of_slice in enumerate(window):
            part = rollout.slice(rows_of_slice)
            batch = {"rollout": part, "old_logprob": None, "denominator": denominator}
            (module.training_step(batch, i) / plan.slices).backward()
        watch.before_step(policy)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    watch.after_step(policy)
    gate.finish()


def with_reference(rollout: Any, logprob: torch.Tensor) -> Any:
    """The rollout with the reference's log-probabilities."""
    from dataclasses import replace

    return replace(rollout, kl_logprob=logprob, start_logprob=logprob)
