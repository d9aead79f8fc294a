"""``rlif mix``: interpolate the weights of two models; entropy, accuracy and the gain of RLIF at each ratio.

The experiment of arXiv 2506.17219: mixing in the weights of a tuned model lowers the entropy of the initial policy,
and with it what RL from internal feedback gains.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import dict_to_namespace

from rlif_lightning.callbacks.progress import counting
from rlif_lightning.cli.changed_settings import read_settings
from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.commands.mix_fit import FIT, measure_gain
from rlif_lightning.data.limits import check_prompts
from rlif_lightning.data.loaders import PromptLoader, run_seed
from rlif_lightning.errors import UserError
from rlif_lightning.evaluation.answering import answer_problems, summarise
from rlif_lightning.grading import Grader, agreement
from rlif_lightning.mixing import results
from rlif_lightning.mixing.folder import save_mix
from rlif_lightning.mixing.results import TABLE, Row
from rlif_lightning.mixing.weights import Pair, check_ratios
from rlif_lightning.models.policy import Policy
from rlif_lightning.runs.folder import CONFIG
from rlif_lightning.runs.signals import Stopped

MAY_CHANGE = {"config", "ratios", "save", "output", "runs", "trainer.enable_progress_bar"}  # when a mix continues


def main(arguments: list[str]) -> None:
    """Run the command; after a signal the same command with the same ``--output`` continues."""
    mixing = Mixing(RecipeObjects("mix", arguments, _add_options))
    path, picture = mixing.output / TABLE, mixing.output / results.PICTURE
    rows = results.read_rows(path)
    stopped = 0
    try:
        for row in mixing.rows(set(rows)):
            rows[row["ratio"]] = row
            results.write_rows(path, rows)
    except (KeyboardInterrupt, Stopped) as end:
        stopped = int(getattr(end, "code", 130))
    finally:
        mixing.objects.collector.close()
        mixing.grader.close()
    if rows:
        print(results.results_table(rows))
        results.draw_results(rows, picture, f"{mixing.pair.base}  to  {mixing.pair.tuned}")
        print(f"written: {path}\nwritten: {picture}")
    if stopped:
        print(f"Stopped. Run the same command with --output {mixing.output} to continue.", file=sys.stderr)
        raise SystemExit(stopped)


def _add_options(parser: Any) -> None:
    text, add = str | None, parser.add_argument
    add("--base", type=text, help="Base model: toy, a Hugging Face folder or a name on the hub; null: model.name.")
    tuned = "Tuned model: the same; or the folder of a LoRA adapter, a checkpoint or a run folder of the base."
    add("--tuned", type=str, required=True, help=tuned)
    ratios = [0.0, 0.1, 0.25, 0.5, 1.0]
    add("--ratios", type=float, nargs="+", default=ratios, help="Shares of the tuned weights, from 0 to 1.")
    steps = "Training steps by the recipe from each mixture, to measure its gain; 0: do not train."
    add("--steps", type=int, default=0, help=steps)
    prompts = "Training prompts, from the first on, on which entropy and agreement are measured."
    add("--prompts", type=int, default=64, help=prompts)
    add("--save", type=text, help="Folder for mixed models, as Hugging Face folders <save>/<ratio>; null: keep none.")
    output = "Folder of the results; an interrupted mix continues in its folder. null: <runs>/<recipe>/mix/<n>."
    add("--output", type=text, help=output)


class Mixing:
    """Measures mixtures one after the other, on one device; refuses at once what can be checked without weights."""

    def __init__(self, objects: RecipeObjects) -> None:
        self.objects, self.options, settings = objects, objects.options, objects.module.policy_settings
        self.ratios, self.steps = check_ratios(self.options.ratios), self.options.steps
        self._check_options()
        base = self.options.base or settings.name
        self.pair = Pair(base, self.options.tuned, settings.revision, settings.trust_remote_code)
        self.pair.check()
        self._choose_model(self.pair.base)  # whose tokenizer all mixtures have
        collector, evaluation, prompts = objects.collector, objects.evaluation, objects.prompts()
        self.engine = evaluation.engine(objects.module)
        self.problems = list(enumerate(objects.data.prompts.get("val", [])))[: evaluation.n]
        module, device, held_out = objects.module, objects.device, [prompt for _, prompt in self.problems]
        check_prompts(prompts, "rollout", module, collector.sampler, collector.sampling, device)
        check_prompts(held_out, "evaluation", module, self.engine, evaluation.attempts.sampling, device)
        if self.options.output is not None:
            self._check_output(Path(self.options.output).expanduser())
        self.output = objects.output(self.options.output)
        collector.open(1, objects.data.answers_of("train"), objects.data.has_labels("train"))
        self.grader = Grader(objects.data.answers_of("val"))

    def _check_options(self) -> None:
        for name, least in (("steps", 0), ("prompts", 1)):
            if self.options[name] < least:
                raise UserError(f"--{name} is too small", got=self.options[name], expected=f"{least} or more")
        adapter = self.objects.module.policy_settings.adapter
        for what, given in (("a checkpoint", self.options.ckpt_path), ("an adapter", adapter)):
            if given is not None:
                raise UserError(f"rlif mix takes {what} as the tuned model", do="give it as --tuned")
        rollout = self.objects.collector.plan.rollout_steps
        if self.steps % rollout:
            wrong = "--steps would end in the middle of a rollout"
            raise UserError(wrong, got=self.steps, expected=f"a multiple of {rollout}")

    def _check_output(self, folder: Path) -> None:
        """Refuse to add to results of other settings."""
        if not (folder / CONFIG).is_file() or not any((*folder.glob(TABLE), *folder.glob(f"*/{FIT}.yaml"))):
            return
        stored = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        texts = (stored, self.objects.parser.dump(self.objects.config, skip_none=False))
        before, now = (dict(dict_to_namespace(read_settings(text)).items()) for text in texts)  # "model.name": ...
        for key in sorted((before.keys() | now.keys()) - MAY_CHANGE):
            if before.get(key) != now.get(key):
                raise UserError(
                    "The output folder holds a mix with other settings",
                    got=f"{key} {now.get(key)}",
                    expected=f"{before.get(key)}, as in {folder / CONFIG}",
                    do="give the same settings to continue, or another --output",
                )

    def _choose_model(self, name: str) -> None:
        module = self.objects.module
        module.policy_settings = replace(module.policy_settings, name=name)

    def rows(self, done: set[float]) -> Iterator[Row]:
        """Measure each ratio that is not done yet."""
        todo = [ratio for ratio in self.ratios if ratio not in done]
        for number, ratio in enumerate(todo, start=1):
            print(f"Ratio {ratio:g} ({number} of {len(todo)})", file=sys.stderr, flush=True)
            own, save = self.output / f"{ratio:g}", self.options.save
            model = own / "model" if save is None else Path(save).expanduser() / own.name
            save_mix(self.pair, ratio, model)
            row = {"ratio": ratio, **self._measure(model, f"ratio {ratio:g}")}
            if self.steps:
                row |= {"steps": float(self.steps), **measure_gain(own, model, self.output / CONFIG, self.steps)}
            yield row
            if save is None:
                shutil.rmtree(model)
                if not any(own.iterdir()):
                    own.rmdir()

    def _measure(self, model: Path, label: str) -> Row:
        self._choose_model(str(model))
        policy = self.objects.policy()
        row = {**self._statistics(policy, label), **self._accuracy(policy, label)}
        engines: list[Any] = [self.objects.collector.sampler, self.engine]
        for engine in engines:  # let go of the weights: the next mixture, or a fit, needs the memory
            engine.policy = None
        del policy
        torch.cuda.empty_cache()
        return row

    def _statistics(self, policy: Policy, label: str) -> Row:
        """Entropy (nats per token) and agreement on the prompts and seeds with which a run begins."""
        collector, prompts = self.objects.collector, self.objects.data.prompts["train"]
        first = [batch for batch in PromptLoader(len(prompts), collector.plan, seed=run_seed()) if not batch["slice"]]
        rows, positions = (
            [x for batch in first for x in batch[key]][: self.options.prompts] for key in ("rows", "positions")
        )
        texts, size = [prompts[row] for row in rows], collector.plan.rollout_prompts
        entropy = certainty = tokens = 0.0
        shares: list[float] = []
        labelled = False
        with counting(self.objects.bar, f"{label}: sampling", "prompt", len(rows)) as tell:
            for rollout in collector.sample_batches(texts, positions, run_seed(), policy, size):
                mask, stats = rollout.samples.completion_mask, rollout.statistics()
                entropy += float(stats.entropy[mask].double().sum())
                certainty += float(stats.self_certainty[mask].double().sum())
                tokens += float(mask.sum())
                shares += [agreement(votes[: rollout.group_size]) for votes in rollout.votes]
                labelled |= rollout.correct is not None
                tell(len(shares))
        completions = float(len(rows) * collector.plan.group_size)
        row = {"entropy": entropy / tokens, "self_certainty": certainty / tokens, "completions": completions}
        if labelled or any(shares):  # else open-ended texts: no answer to agree on
            row["agreement"] = sum(shares) / len(shares)
        return row

    def _accuracy(self, policy: Policy, label: str) -> Row:
        """Greedy and sampled accuracy on the held-out problems of the recipe's evaluations."""
        if not self.problems:
            return {}
        with counting(self.objects.bar, f"{label}: answering", "problem", len(self.problems)) as tell:
            asked = (self.engine, policy, self.problems, self.objects.evaluation.attempts, self.grader)
            answered = answer_problems(*asked, lambda done, *_: tell(done))
            tell(len(answered))
        summary = summarise(answered, intervals=True)
        return {name: float(value) for name, value in summary.items() if name in results.COLUMNS}
