"""Our step without Lightning: examples/one_step.py in a loop."""

import torch

from benchmarks.gate import Gate
from benchmarks.our_side import make_reward
from benchmarks.shapes import Work, read_prompts
from benchmarks.watch import Watch
from examples.one_step import collect, update
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.functional.seeds import completion_seeds
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.sampling import Sampling


def run(work: Work, gate: Gate) -> None:
    """Train."""
    policy = Policy.load(PolicySettings(work.folder), training=True)
    policy.make_references(["frozen"])
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=work.learning_rate, weight_decay=0.0, fused=True)
    ids, sampling, watch = read_prompts(work.folder, "ids"), Sampling(work.new_tokens), Watch(gate)
    settings, reward = LossSettings(kl_coefficient=work.kl), make_reward(work)
    optimizer.register_step_pre_hook(lambda *_: watch.before_step(policy.model))
    for step in range(work.steps):
        if step:
            watch.after_step(policy.model)
        gate.arrive()
        rows = [(step * work.prompts + i) % len(ids) for i in range(work.prompts)]
        seeds = completion_seeds(0, [(0, row) for row in rows], work.group)
        rollout = collect(policy, [ids[row] for row in rows], seeds, sampling, reward)
        gate.note(tokens=int(rollout.samples.lengths.sum()))
        update(policy, optimizer, rollout, settings, work.new_tokens, work.micro_batch)
    watch.after_step(policy.model)
    gate.finish()
