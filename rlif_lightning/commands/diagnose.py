"""``rlif diagnose``: should a model be trained with internal rewards at all, and with which."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlif_lightning.callbacks.progress import counting
from rlif_lightning.cli.recipe_objects import RecipeObjects, Split
from rlif_lightning.data.limits import check_prompts
from rlif_lightning.data.loaders import run_seed
from rlif_lightning.data.prompts import Prompt
from rlif_lightning.diagnosis.candidates import candidates, internal_rewards
from rlif_lightning.diagnosis.details_figure import draw_details
from rlif_lightning.diagnosis.figure import draw_diagnosis
from rlif_lightning.diagnosis.gradients import cosines, gradient_bytes, policy_gradients
from rlif_lightning.diagnosis.measures import (
    compare,
    describe,
    difference,
    length_correlations,
    measure,
    value_correlations,
)
from rlif_lightning.diagnosis.text import report_text, write_completions, write_json
from rlif_lightning.diagnosis.verdict import verdict
from rlif_lightning.errors import UserError
from rlif_lightning.evaluation.results import versions
from rlif_lightning.models.policy import Policy, set_training_mode
from rlif_lightning.models.precision import autocast
from rlif_lightning.rewards import Reward
from rlif_lightning.rollout import Rollout
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.cut_off import how_to_end

GRADIENT_BYTES = 4 * 2**30  # what gradients may take unless they are asked for


def main(arguments: list[str]) -> None:
    """Run the command: sample a group per prompt, compare the rewards, answer."""
    objects = RecipeObjects("diagnose", arguments, _add_options)
    prompts = _read_prompts(objects)
    collector = objects.collector
    check_prompts(prompts, "rollout", objects.module, collector.sampler, collector.sampling, objects.device)
    rewards = candidates(collector.rewards, objects.data.has_labels(objects.options.split))
    policy = objects.policy(training=True)  # before the first step every reference is the policy itself
    rows = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(run_seed()))
    chosen = {row: prompts[row] for row in rows[: objects.options.prompts].tolist()}
    rollouts = _sample(objects, policy, chosen, rewards)
    _report(objects, policy, rollouts, rewards, list(chosen.values()))


def _add_options(parser: Any) -> None:
    add = parser.add_argument
    add("--prompts", type=int, default=64, help="Number of prompts, drawn at random from the split.")
    add("--split", type=Split, default="train", help="Split to take the prompts from.")
    gradients = "Compare the gradients of the rewards; null: only if they take less than 4 GiB."
    add("--gradients", type=bool | None, help=gradients)
    add("--output", type=str | None, help="Folder of the results; null: <runs>/<recipe>/diagnose/<n>.")


def _read_prompts(objects: RecipeObjects) -> list[Prompt]:
    wanted, split = objects.options.prompts, objects.options.split
    if wanted < 2:
        raise UserError("--prompts is too small", got=wanted, expected="2 or more: intervals are over prompts")
    prompts = objects.prompts(split)
    if len(prompts) < wanted:
        raise UserError(
            f"data.{split} holds fewer prompts than asked for",
            got=f"{len(prompts)} prompts, --prompts {wanted}",
            do=f"set --prompts {len(prompts)}" if len(prompts) > 1 else "give more problems",
        )
    return prompts


def _sample(
    objects: RecipeObjects, policy: Policy, prompts: dict[int, Prompt], rewards: list[Reward]
) -> list[Rollout]:
    """A group per prompt, as many prompts at a time as one optimiser step takes."""
    recipe, split = objects.collector, objects.options.split
    collector = Collector(recipe.sampler, recipe.sampling, rewards, recipe.plan, recipe.advantages, recipe.votes)
    collector.open(1, objects.data.answers_of(split), objects.data.has_labels(split))
    rows, texts, size = [(row,) for row in prompts], list(prompts.values()), recipe.plan.prompts_per_step
    with closing(collector), counting(objects.bar, "Sampling", "prompt", len(prompts)) as tell:

        def progress(done: int, token: int, most: int) -> None:
            tell(done, f"Token {token}/{most}")

        found = list(collector.sample_batches(texts, rows, run_seed(), policy, size, progress))
        tell(len(prompts))
    return found


def _gradients(
    objects: RecipeObjects, policy: Policy, rollouts: Sequence[Rollout], advantages: Sequence[dict[str, Tensor]]
) -> dict[str, Any] | None:
    """The rewards' gradients against each other, where they are wanted."""
    wanted, size = objects.options.gradients, gradient_bytes(policy.model, len(advantages[0]))
    if wanted is None and size > GRADIENT_BYTES:
        wanted = False
        rank_zero_info(f"Gradients are left out: they need {size / 2**30:.0f} GiB. --gradients true takes them.")
    if wanted is False:
        return None
    sizes = (objects.collector.sampling.max_new_tokens, objects.collector.plan.micro_batch_size)
    set_training_mode(policy.model, training=True)
    with autocast(objects.precision, objects.device):
        halves = policy_gradients(policy.model, rollouts, advantages, objects.module.loss, *sizes)
    whole = halves.sum(0)
    return {"cosines": cosines(whole, whole).tolist(), "between_halves": cosines(halves[0], halves[1]).tolist()}


def _report(
    objects: RecipeObjects, model: Policy, rollouts: list[Rollout], rewards: list[Reward], prompts: list[Prompt]
) -> None:
    """Everything after sampling: numbers, verdict, files, table."""
    collector, identity, options = objects.collector, model.identity, objects.options
    source = objects.data.sources[options.split]
    assert source is not None
    stats, masked, advantages = measure(rollouts, rewards, collector.advantages)
    policy, found = describe(stats), compare(stats)
    answer = verdict(
        policy,
        found,
        internal=internal_rewards(rewards),
        group_size=collector.plan.group_size,
        statistics_temperature=collector.sampling.statistics_temperature or collector.sampling.temperature,
        when_cut_off=how_to_end(rollouts, prompts, model),
        differs=lambda *names: difference(stats, *names).excludes_zero(),
    )
    report = {
        "verdict": asdict(answer),
        "policy": policy,
        "rewards": found,
        "length": length_correlations(stats),
        "equivalence": {
            "rewards": list(found),
            "values": value_correlations(stats).tolist(),
            "gradients": _gradients(objects, model, masked, advantages),
        },
        "model": identity.model,
        "fingerprint": identity.fingerprint,
        "checkpoint": options.ckpt_path,
        "data": asdict(source),
        "split": options.split,
        "prompts": len(prompts),
        "group_size": collector.plan.group_size,
        "seed": run_seed(),
        "min_spread": collector.advantages.min_spread,
        "sampling": collector.sampling.settings(),
        **{name: getattr(identity, name) for name in ("lora", "adapter", "quantization")},
        "precision": objects.precision,
        "versions": versions(),
    }
    print(report_text(report))  # before anything is written: a disk may be full
    folder = objects.output(options.output)
    write_json(folder / "diagnosis.json", report)
    write_completions(folder / "completions.jsonl", rollouts, prompts, stats)
    draw_diagnosis(report, folder / "diagnosis.png")
    draw_details(report, stats, folder / "diagnosis-details.png")
    print(f"\nwritten: {folder}/diagnosis.png (the verdict), diagnosis-details.png, diagnosis.json, "
          "completions.jsonl, config.yaml")  # fmt: skip
    chosen = next((reward for reward in rewards if reward.name == answer.reward), None)
    if chosen is not None:
        path = chosen.class_path
        name = path.rpartition(".")[2] if path.startswith("rlif_lightning.") else path
        other = "" if chosen in collector.rewards else f" and --rollout.rewards {name}"
        print(f"Next: rlif fit with the same recipes{other}")
