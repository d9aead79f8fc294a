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

import yaml

from rlif_lightning.errors import UserError
from rlif_lightning.grading import Grader
from rlif_lightning.runs.folder import CONFIG, LAST_CHECKPOINT, METRICS, latest_run_folder

FIT = "fit"  # a ratio's fit: <output>/<ratio>/fit.yaml, and its run <output>/<ratio>/fit/<n>
OWN = {"base", "tuned", "ratios", "steps", "prompts", "save", "output"}  # options that rlif fit does not have
FREE = {"config", "ratios", "save", "output", "runs", "trainer.enable_progress_bar"}  # may change when going on


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: The words after ``rlif mix``.

    Raises:
        UserError: The words are wrong, the two models do not fit, or what ``rlif fit`` raises.
        SystemExit: 130 after Ctrl-C; the same command with the same ``--output`` goes on.
    """
    from rlif_lightning.cli import recipe_objects as objects
    from rlif_lightning.mixing.results import PICTURE, TABLE, draw_results, read_rows, results_table, write_rows

    mixing = Mixing(objects.load("mix", args, _options, __doc__.partition(": ")[2] if __doc__ else None))
    path = mixing.output / TABLE
    rows = read_rows(path)
    stopped = False
    try:
        for row in mixing.rows(set(rows)):
            rows[row["ratio"]] = row
            write_rows(path, rows)
    except KeyboardInterrupt:
        stopped = True
    finally:
        mixing.close()
    if rows:
        print(results_table(rows))
        draw_results(rows, mixing.output / PICTURE, f"{mixing.pair.base}  to  {mixing.pair.tuned}")
        print(f"written: {path}\nwritten: {mixing.output / PICTURE}")
    if stopped:
        print(f"Stopped. The same command with --output {mixing.output} goes on.", file=sys.stderr)
        raise SystemExit(130)


def _options(parser: Any) -> None:
    parser.add_argument(
        "--base",
        type=str | None,
        default=None,
        help="The base model: toy, a Hugging Face folder or a hub name. null: model.name.",
    )
    parser.add_argument(
        "--tuned",
        type=str,
        required=True,
        help="The tuned model: the same, or the folder of a PEFT adapter, a checkpoint or a run folder "
        "made from the base.",
    )
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.25, 0.5, 1.0],
        help="Shares of the tuned weights, from 0 to 1.",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="Train each mixture for as many steps by the recipe and measure its gain; 0: do not.",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=64,
        help="Training prompts, the first of a run, that entropy and agreement are measured on.",
    )
    parser.add_argument(
        "--save", type=str | None, default=None, help="Keep the mixed models, as Hugging Face folders <save>/<ratio>."
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder of the results; an interrupted one is gone on with. null: <runs>/<recipe>/mix/<n>.",
    )


class Mixing:
    """Measures mixtures one after the other, on one device.

    Args:
        objects: Of the command.

    Raises:
        UserError: An option is wrong, or what can be checked without weights does not fit.
    """

    def __init__(self, objects: Any) -> None:
        from rlif_lightning.callbacks.sampling import check_engine
        from rlif_lightning.mixing.weights import Pair, check_ratios

        self.objects, self.options, settings = objects, objects.options, objects.module.policy_settings
        self.ratios = check_ratios(self.options.ratios)
        self.steps = self.options.steps
        for name, least in (("steps", 0), ("prompts", 1)):
            if self.options[name] < least:
                raise UserError(f"--{name} is too small", got=self.options[name], expected=f"{least} or more")
        if self.options.ckpt_path is not None:
            raise UserError("rlif mix takes a checkpoint as the tuned model", do="give it as --tuned")
        if settings.adapter is not None:
            raise UserError("rlif mix takes an adapter as the tuned model", do="give it as --tuned")
        per_rollout = objects.collector.plan.rollout_steps
        if self.steps % per_rollout:
            raise UserError(
                "--steps would end in the middle of a rollout",
                got=self.steps,
                expected=f"a multiple of {per_rollout}",
            )
        base = self.options.base or settings.name
        self.pair = Pair(
            base, self.options.tuned, settings.revision, settings.attn_implementation, settings.trust_remote_code
        )
        self.pair.check()
        self._name(base)  # whose tokenizer all mixtures have
        prompts = objects.prompts()
        check_engine(objects.collector.sampler, objects.collector.sampling, prompts, objects.device)
        evaluation, held_out = objects.evaluation, objects.data.prompts.get("val", [])
        check_engine(
            evaluation.engine(objects.module), evaluation.attempts.sampling, held_out[: evaluation.n], objects.device
        )
        self.output = self._output()
        objects.collector.open(1, objects.data.answers_of("train"), objects.data.has_labels("train"))
        self.grader = Grader(objects.data.answers_of("val"))

    def _name(self, model: str) -> None:
        module = self.objects.module
        module.policy_settings = replace(module.policy_settings, name=model)

    def close(self) -> None:
        """End the graders' processes."""
        self.objects.collector.close()
        self.grader.close()

    def _output(self) -> Path:
        """The folder of the results; an earlier one's settings must be the same."""
        from rlif_lightning.mixing.results import TABLE

        given = self.options.output
        if given is not None:
            folder = Path(given).expanduser()
            if (folder / CONFIG).is_file() and any((*folder.glob(TABLE), *folder.glob(f"*/{FIT}.yaml"))):
                before = _flat(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))
                parser, config = self.objects.cli.parser, self.objects.cli.config
                now = _flat(yaml.safe_load(parser.dump(config, skip_none=False)))
                for key in sorted(before.keys() | now.keys()):
                    if key not in FREE and before.get(key) != now.get(key):
                        raise UserError(
                            "The output folder holds a mixing with other settings",
                            got=f"{key} {now.get(key)}",
                            expected=f"{before.get(key)}, as in {folder / CONFIG}",
                            do="give the same settings to go on, or another --output",
                        )
        return self.objects.output(given)

    def rows(self, done: set[float]) -> Iterator[dict[str, float]]:
        """Measure each ratio that is not done yet.

        Raises:
            KeyboardInterrupt: Ctrl-C stopped a fit after its rollout.
        """
        from rlif_lightning.mixing.weights import save_mix

        todo = [ratio for ratio in self.ratios if ratio not in done]
        for number, ratio in enumerate(todo, start=1):
            print(f"Ratio {ratio:g} ({number} of {len(todo)})", file=sys.stderr, flush=True)
            own = self.output / f"{ratio:g}"
            model = own / "model" if self.options.save is None else Path(self.options.save).expanduser() / own.name
            save_mix(self.pair, ratio, model)
            row = {"ratio": ratio, **self._measure(model, f"ratio {ratio:g}")}
            if self.steps:
                row |= {"steps": float(self.steps), **self._gain(own, model)}
            yield row
            if self.options.save is None:
                shutil.rmtree(model)
                if not any(own.iterdir()):
                    own.rmdir()

    # -- the policy as it starts -----------------------------------------------------------------------------

    def _measure(self, model: Path, label: str) -> dict[str, float]:
        import torch

        objects = self.objects
        self._name(str(model))
        policy = objects.policy()
        row = {**self._statistics(policy, label), **self._accuracy(policy, label)}
        # Let go of the weights: the next mixture, or a fit, needs the room.
        policy = objects.collector.sampler.policy = objects.evaluation.engine(objects.module).policy = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return row

    def _statistics(self, policy: Any, label: str) -> dict[str, float]:
        """Entropy (nats per token) and agreement on the prompts and seeds with which a run begins."""
        from rlif_lightning.callbacks.progress import counting
        from rlif_lightning.data.loaders import PromptLoader, run_seed
        from rlif_lightning.grading import agreement

        objects, collector = self.objects, self.objects.collector
        prompts, plan = objects.data.prompts["train"], collector.plan
        places = [
            place
            for batch in PromptLoader(len(prompts), plan, seed=run_seed())
            if batch["slice"] == 0
            for place in zip(batch["rows"], batch["positions"], strict=True)
        ][: self.options.prompts]
        texts, positions = [prompts[row] for row, _ in places], [position for _, position in places]
        entropy = certainty = tokens = 0.0
        shares: list[float] = []
        answered = False
        with counting(objects.bar, f"{label}: sampling", "prompt", len(places)) as tell:
            size = plan.rollout_prompts
            for drawn in collector.sample_batches(texts, positions, run_seed(), policy, size):
                mask, stats = drawn.samples.completion_mask, drawn.statistics()
                entropy += float(stats.entropy[mask].double().sum())
                certainty += float(stats.self_certainty[mask].double().sum())
                tokens += float(mask.sum())
                shares += [agreement(votes[: drawn.group_size]) for votes in drawn.votes]
                answered |= drawn.correct is not None or any(shares)
                tell(len(shares))
        row = {"entropy": entropy / tokens, "self_certainty": certainty / tokens}
        row["completions"] = float(len(places) * plan.group_size)
        if answered:  # else open-ended texts: no answer to agree on
            row["agreement"] = sum(shares) / len(shares)
        return row

    def _accuracy(self, policy: Any, label: str) -> dict[str, float]:
        """Greedy and sampled accuracy on the held-out problems of the recipe's evaluations."""
        from rlif_lightning.callbacks.progress import counting
        from rlif_lightning.evaluation.answering import answer_problems, summarise
        from rlif_lightning.mixing.results import COLUMNS

        objects, evaluation = self.objects, self.objects.evaluation
        problems = list(enumerate(objects.data.prompts.get("val", [])))[: evaluation.n]
        if not problems:
            return {}
        with counting(objects.bar, f"{label}: answering", "problem", len(problems)) as tell:
            results = answer_problems(
                evaluation.engine(objects.module),
                policy,
                problems,
                evaluation.attempts,
                self.grader,
                lambda done, *_: tell(done),
            )
        summary = summarise(results, intervals=True)
        return {name: float(value) for name, value in summary.items() if name in COLUMNS}

    # -- the gain --------------------------------------------------------------------------------------------

    def _gain(self, folder: Path, model: Path) -> dict[str, float]:
        """Fit by the recipe from a mixture, or go on with a fit that was interrupted; its held-out accuracy."""
        from rlif_lightning.cli.trainer import RLIFCLI
        from rlif_lightning.models.checkpoints import read_checkpoint
        from rlif_lightning.runs.folder import CHECKPOINTS
        from rlif_lightning.runs.metrics_csv import read_metrics
        from rlif_lightning.runs.summary import best_step

        run = latest_run_folder(folder, FIT)
        done = 0 if run is None else read_checkpoint(run / CHECKPOINTS / LAST_CHECKPOINT, mmap=True)["global_step"]
        if done < self.steps:
            recipe = self._recipe(folder, model)
            try:
                cli = RLIFCLI.run(["fit", "--config", str(recipe), *(["--ckpt_path", str(run)] if run else [])])
            except SystemExit as end:  # so the Trainer ends after Ctrl-C before the fit's first rollout
                raise KeyboardInterrupt from end
            if cli.trainer.global_step < self.steps:  # Ctrl-C: the fit has saved a checkpoint and ended
                raise KeyboardInterrupt
            run = latest_run_folder(folder, FIT)
        assert run is not None
        curves = read_metrics(run / METRICS)
        curve = curves.get("val/accuracy_sampled") or curves.get("val/accuracy") or {}
        best = best_step(curve)
        if best is None:
            return {}
        return {"before": curve[0], "best": curve[best], "best_step": float(best), "after": curve[max(curve)]}

    def _recipe(self, folder: Path, model: Path) -> Path:
        """The settings of this command as a recipe of ``rlif fit`` for one mixture."""
        config = yaml.safe_load((self.output / CONFIG).read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key not in OWN | {"config", "ckpt_path"}}
        config["runs"] = str(folder)
        config["model"]["name"] = str(model.absolute())
        devices = config["trainer"]["devices"]
        config["trainer"] |= {
            "max_steps": self.steps,
            "max_epochs": -1,
            "devices": devices[:1] if isinstance(devices, list) else 1,
            "num_nodes": 1,
            "strategy": "auto",
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{FIT}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"model.name": ...}``."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    return {
        key: value
        for name, part in settings.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }
