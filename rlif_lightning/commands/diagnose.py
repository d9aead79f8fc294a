"""``rlif diagnose``: should a model be trained with internal rewards at all, and with which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlif_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from rlif_lightning.cli.recipe_objects import RecipeObjects
    from rlif_lightning.data.prompts import Prompt
    from rlif_lightning.models.policy import Policy
    from rlif_lightning.rewards import Reward
    from rlif_lightning.rollout import Rollout

GRADIENT_BYTES = 4 * 2**30  # what gradients may take unless they are asked for


def main(arguments: list[str]) -> None:
    """Run the command: sample a group per prompt, compare the rewards, answer.

    Args:
        arguments: The words after ``rlif diagnose``.

    Raises:
        UserError: The words are wrong, or there are too few prompts.
    """
    from rlif_lightning.cli.recipe_objects import load

    objects = load("diagnose", arguments, _options, "Should this model be trained with internal rewards, and which?")
    options = objects.options
    if options.prompts < 2:
        raise UserError(
            "--prompts is too small", got=options.prompts, expected="2 or more: intervals are over prompts"
        )
    prompts = objects.prompts(options.split)
    if len(prompts) < options.prompts:
        raise UserError(
            f"data.{options.split} holds fewer prompts than asked for",
            got=f"{len(prompts)} prompts, --prompts {options.prompts}",
            do=f"set --prompts {len(prompts)}" if len(prompts) > 1 else "give more problems",
        )
    from rlif_lightning.diagnosis.measures import candidates

    collector = objects.collector
    collector.sampler.check([p.ids for p in prompts], collector.sampling, objects.device)
    rewards = candidates(collector.rewards, objects.data.has_labels(options.split))
    policy = objects.policy(training=True)  # before the first step every reference is the policy itself
    rows = _choose(len(prompts), options.prompts)
    rollouts = _sample(objects, policy, [(row, prompts[row]) for row in rows], rewards)
    _report(objects, policy, rollouts, rewards, [prompts[row] for row in rows])


def _options(parser: Any) -> None:
    parser.add_argument("--prompts", type=int, default=64, help="How many prompts, drawn at random from the split.")
    parser.add_argument("--split", type=_split(), default="train", help="Which problems.")
    parser.add_argument("--gradients", type=bool | None, default=None,
                        help="Compare the rewards' gradients; null: where they take less than 4 GiB.")  # fmt: skip
    parser.add_argument("--output", type=str | None, default=None,
                        help="Folder of the results; null: <runs>/<recipe>/diagnose/<n>.")  # fmt: skip


def _split() -> Any:
    from rlif_lightning.cli.recipe_objects import Split

    return Split


def _choose(total: int, count: int) -> list[int]:
    """Rows of the data, the same for the same seed."""
    import torch

    from rlif_lightning.data.loaders import run_seed

    return torch.randperm(total, generator=torch.Generator().manual_seed(run_seed()))[:count].tolist()


def _sample(
    objects: RecipeObjects, policy: Policy, prompts: list[tuple[int, Prompt]], rewards: list[Reward]
) -> list[Rollout]:
    """A group per prompt, as many prompts at a time as one optimiser step takes."""
    from rlif_lightning.callbacks.progress import counting
    from rlif_lightning.data.loaders import run_seed
    from rlif_lightning.training.collector import Collector

    recipe = objects.collector
    collector = Collector(recipe.sampler, recipe.sampling, rewards, recipe.plan, recipe.advantages, recipe.votes)
    split = objects.options.split
    collector.open(1, objects.data.answers_of(split), objects.data.has_labels(split))
    rows, texts = [(row,) for row, _ in prompts], [prompt for _, prompt in prompts]
    try:
        with counting(objects.bar, "Sampling", "prompt", len(prompts)) as tell:

            def progress(done: int, token: int, most: int) -> None:
                tell(done, f"Token {token}/{most}")

            size = collector.plan.prompts_per_step
            found = list(collector.sample_batches(texts, rows, run_seed(), policy, size, progress))
            tell(len(prompts))
    finally:
        collector.close()
    return found


def _gradients(
    objects: RecipeObjects, policy: Policy, rollouts: list[Rollout], advantages: list[dict[str, Tensor]]
) -> dict[str, Any] | None:
    """Cosines between the rewards' gradients, and of each reward's between two halves of the prompts."""
    from lightning.pytorch.utilities import rank_zero_info

    from rlif_lightning.diagnosis.gradients import cosines, gradient_bytes, policy_gradients
    from rlif_lightning.models.policy import set_training_mode
    from rlif_lightning.models.precision import autocast

    wanted = objects.options.gradients
    size = gradient_bytes(policy.model, len(advantages[0]))
    if wanted is False:
        return None
    if wanted is None and size > GRADIENT_BYTES:
        rank_zero_info(
            f"Gradients are left out: they would take {size / 2**30:.0f} GiB. --gradients true takes them."
        )
        return None
    set_training_mode(policy.model, training=True)
    with autocast(objects.precision, objects.device):
        halves = policy_gradients(
            policy.model,
            rollouts,
            advantages,
            objects.module.loss,
            objects.collector.sampling.max_new_tokens,
            objects.collector.plan.micro_batch_size,
        )
    return {
        "cosines": cosines(halves.sum(0)).tolist(),
        "between_halves": cosines(halves[0], halves[1]).tolist(),
    }


def _report(
    objects: RecipeObjects,
    model: Policy,
    rollouts: list[Rollout],
    rewards: list[Reward],
    prompts: list[Prompt],
) -> None:
    """Everything after sampling: numbers, verdict, files, table."""
    from dataclasses import asdict

    from rlif_lightning.data.loaders import run_seed
    from rlif_lightning.diagnosis.figure import draw_diagnosis
    from rlif_lightning.diagnosis.measures import compare, describe, difference, measure, value_correlations
    from rlif_lightning.diagnosis.text import completion_rows, table, write_json, write_rows
    from rlif_lightning.diagnosis.verdict import verdict
    from rlif_lightning.evaluation.results import versions
    from rlif_lightning.rewards import Random, Verifiable

    collector, identity, options = objects.collector, model.identity, objects.options
    source = objects.data.sources[options.split]
    assert source is not None
    measured, masked, advantages = measure(rollouts, rewards, collector.advantages)
    policy, found = describe(measured), compare(measured)
    answer = verdict(
        policy,
        found,
        internal={r.name: "answers" in r.requires for r in rewards if not isinstance(r, Random | Verifiable)},
        group_size=collector.plan.group_size,
        statistics_temperature=collector.sampling.statistics_temperature or collector.sampling.temperature,
        differs=lambda a, b, target: difference(measured, a, b, measured.target(target)).excludes_zero(),
    )
    report = {
        "verdict": asdict(answer),
        "policy": policy,
        "rewards": found,
        "equivalence": {
            "rewards": list(found),
            "values": value_correlations(measured).tolist(),
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
        "lora": identity.lora,
        "adapter": identity.adapter,
        "quantization": identity.quantization,
        "precision": objects.precision,
        "versions": versions(),
    }
    folder = objects.output(options.output)
    write_json(folder / "diagnosis.json", report)
    write_rows(folder / "completions.jsonl", completion_rows(rollouts, prompts, measured))
    draw_diagnosis(report, measured, folder / "diagnosis.png")
    print(table(report))
    print(f"\nwritten: {folder}/diagnosis.json, diagnosis.png, completions.jsonl, config.yaml")
