"""Held-out evaluation while training, and the work of validate, test and predict."""

import time
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlif_lightning.callbacks.completions import append_rows
from rlif_lightning.callbacks.logging import gather_objects, log_now, log_table, run_folder, run_logger
from rlif_lightning.callbacks.progress import counting, print_above_bar
from rlif_lightning.data.batch_plan import MOST_COMPLETIONS
from rlif_lightning.data.limits import check_prompts
from rlif_lightning.data.loaders import run_seed
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError, check_ranges
from rlif_lightning.evaluation import answering
from rlif_lightning.evaluation import results as files
from rlif_lightning.evaluation.answering import Answered, Attempts, EvaluationProgress, summarise
from rlif_lightning.grading import Grader
from rlif_lightning.runs import signals
from rlif_lightning.runs.folder import CONFIG, HELD_OUT
from rlif_lightning.runs.held_out import answer_line, answers_table, load_held_out
from rlif_lightning.sampling import NativeSampler, Sampler, Sampling
from rlif_lightning.training.module import RLIFModule

KEPT = 4  # problems whose answers the run folder keeps at each evaluation
SPLITS = {"fit": "val", "validate": "val", "test": "test", "predict": "predict"}
LOGGED = (
    "accuracy", "accuracy_sampled", "mean_tokens", "mean_tokens_sampled",
    "truncated_fraction", "truncated_fraction_sampled",
)  # fmt: skip


class Evaluation(Callback):
    """Answers held-out problems, always the same ones with the same seeds, without filters.

    While fitting it logs ``val/accuracy`` (greedy) and ``val/accuracy_sampled`` before the first step, every
    so many steps, and after the last. ``rlif validate`` and ``rlif test`` write ``results.json`` and one row
    per problem; ``rlif predict`` writes completions. Several processes share the problems out and give the same
    results as one.

    Args:
        every: Optimiser steps between evaluations during training; 0: only before the first step and after the last.
        n: Problems of an evaluation during training, from the first on; null: all.
        limit: Problems that ``rlif validate``, ``test`` and ``predict`` draw at random by the run's seed; null: all.
            ``--limit`` for short.
        samples: Sampled completions per problem; 0: none.
        greedy: Also decode one completion per problem greedily.
        temperature: Sampling temperature of the samples.
        max_new_tokens: Longest completion in tokens.
        batch_size: Problems answered at the same time.
        predictions: Format that ``rlif predict`` writes. ``rows``: ``predictions.jsonl``, with the rows of the other
            commands. ``alpaca_eval``: ``model_outputs.json`` for AlpacaEval, with one completion per instruction.
        sampler: Class that samples; null: the sampler of the rollout.
    """

    def __init__(
        self,
        every: int = 10,
        n: int | None = None,
        limit: int | None = None,
        samples: int = 1,
        greedy: bool = True,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        batch_size: int = 64,
        predictions: Literal["rows", "alpaca_eval"] = "rows",
        sampler: Sampler | None = None,
    ) -> None:
        check_ranges(
            "evaluation",
            ("every", every, every >= 0, "0 or more"),
            ("n", n, n is None or n >= 1, "1 or more, or null"),
            ("limit", limit, limit is None or limit >= 1, "1 or more, or null"),
            ("samples", samples, 0 <= samples <= MOST_COMPLETIONS, f"0 to {MOST_COMPLETIONS}"),
            ("samples", samples, samples or greedy, "1 or more, or evaluation.greedy true"),
            ("temperature", temperature, temperature > 0 or not samples, "above 0, or --evaluation.samples 0"),
            ("batch_size", batch_size, batch_size >= 1, "1 or more"),
        )
        if predictions == "alpaca_eval" and samples + greedy != 1:
            raise UserError(
                "AlpacaEval takes one output per instruction",
                got=f"evaluation.samples {samples}, evaluation.greedy {str(greedy).lower()}",
                expected="samples 0 with greedy true, or samples 1 with greedy false",
            )
        self.predictions, self.every, self.n, self.limit = predictions, every, n, limit
        sampling = Sampling(max_new_tokens, temperature=temperature or 1.0)
        self.attempts = Attempts(sampling, samples, greedy, batch_size)
        self.sampler: Sampler | None = sampler
        self.latest_step, self._latest = -1, dict[str, float]()  # of this fit's newest evaluation, and its metrics
        self._grader: Grader | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make a grader; find the engine."""
        pl_module.evaluation = self
        data, split = trainer.datamodule, SPLITS[stage]
        if isinstance(data, PromptDataModule):
            prompts = data.prompts.get(split, [])[: self.n if stage == "fit" else None]
            check_prompts(prompts, "evaluation", pl_module, self.engine(pl_module), self.attempts.sampling)
            self._grader = Grader(data.answers_of(split))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the grader's process."""
        if self._grader is not None:
            self._grader.close()

    def engine(self, module: RLIFModule) -> Sampler:
        """The rollout's where no other is given: there may be room for one only."""
        if self.sampler is None:
            self.sampler = module.collector.sampler if module.collector is not None else NativeSampler()
        return self.sampler

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate the start; after a resume again what the interrupted run had evaluated, where it was due."""
        self.latest_step, self._latest = -1, {}
        if trainer.global_step == 0 or self._due(trainer):
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Evaluate the weights after every so many optimiser steps."""
        if self._due(trainer) and not signals.agreed():
            self.evaluate(trainer, pl_module)

    def _due(self, trainer: Trainer) -> bool:
        return bool(self.every) and trainer.global_step % self.every == 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Evaluate the end."""
        self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, module: RLIFModule) -> dict[str, float]:
        """Evaluate the weights of the current step and log that, once per step; returns ``val/*``."""
        if self.latest_step != trainer.global_step:
            start = time.perf_counter()
            metrics, results = self.held_out(trainer, module)
            if not metrics:
                return {}
            self.latest_step, self._latest = trainer.global_step, metrics
            log_now(trainer, {**metrics, "time/evaluation": time.perf_counter() - start})
            self._show(trainer, results)
        return self._latest

    def take_over(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log ``val/*`` of the current step that an interrupted run has found; it is not evaluated again."""
        self.latest_step, self._latest = trainer.global_step, metrics
        log_now(trainer, metrics)

    def held_out(self, trainer: Any, module: RLIFModule) -> tuple[dict[str, float], list[Answered]]:
        """Answer the held-out problems with the policy as it stands: ``val/*``, and what was answered.

        Nothing without such problems, nor where a signal came while steps are not saved yet. To be called on all
        processes.
        """
        data = trainer.datamodule
        if not data.prompts.get("val"):
            return {}, []
        (rows,) = data.evaluation_loader("val", self.n)
        progress = getattr(trainer.progress_bar_callback, "evaluating", None)
        with signals.abandoned():
            results = self._answer(trainer, module, "val", rows, progress)
            summary = summarise(results)
            return {f"val/{name}": summary[name] for name in LOGGED if name in summary}, results
        return {}, []

    @staticmethod
    def _show(trainer: Trainer, results: list[Answered]) -> None:
        """Show a problem's answer, and keep those of a few in the run folder."""
        logger = run_logger(trainer)
        rows = files.held_out_rows(trainer.global_step, results[:KEPT])
        if trainer.is_global_zero and logger is not None:
            logger.attempt(partial(append_rows, logger.folder / HELD_OUT, rows))
            so_far = load_held_out(logger.folder) | {trainer.global_step: rows}
            log_table(trainer, "samples/held_out", rows, answers_table(so_far))
            print_above_bar(answer_line(rows[trainer.global_step % len(rows)]))

    def _answer(
        self, trainer: Any, module: RLIFModule, split: str, rows: list[int], progress: EvaluationProgress | None
    ) -> list[Answered]:
        """What all processes answered, in the order of the data, on every process."""
        assert self._grader is not None
        prompts = trainer.datamodule.prompts[split]
        problems = [(row, prompts[row]) for row in rows]
        with signals.apart():
            asked = (self.engine(module), module.policy, problems, self.attempts, self._grader)
            own = answering.answer_problems(*asked, progress)
        return sorted((r for part in gather_objects(trainer, own) for r in part), key=lambda r: r.index)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Answer the problems and write the results."""
        split = SPLITS[trainer.state.fn.value]
        batch = self._drawn(len(trainer.datamodule.prompts[split]), batch)
        what = {"val": "Validating", "test": "Testing", "predict": "Predicting"}[split]
        with counting(trainer.progress_bar_callback, what, "problem", len(batch)) as tell:

            def progress(done: int, problems: int, token: int, most: int) -> None:
                tell(done, f"{what}, token {token}/{most}")

            results = self._answer(trainer, pl_module, split, batch, progress)
            tell(len(batch))
        write = self._write_predictions if split == "predict" else self._write_results
        write(trainer, pl_module, split, results)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _drawn(self, count: int, rows: list[int]) -> list[int]:
        """A process's rows that are among the ``limit`` drawn from all; the draw is the same on every process."""
        if self.limit is None or self.limit >= count:
            return rows
        generator = torch.Generator().manual_seed(run_seed())
        drawn = {*torch.randperm(count, generator=generator)[: self.limit].tolist()}
        rank_zero_info(f"A random sample of {self.limit} of {count} problems (seed {run_seed()})")
        return [row for row in rows if row in drawn]

    def _write_predictions(self, trainer: Trainer, module: RLIFModule, split: str, results: list[Answered]) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        if self.predictions == "alpaca_eval":
            name = files.generator_name(module.policy_settings.name, trainer.ckpt_path)
            path = files.write_outputs(folder / "model_outputs.json", results, name)
        else:
            path = files.write_rows(folder / "predictions.jsonl", results)
        rank_zero_info(f"Completions of {len(results)} problems: {path}")

    def _write_results(self, trainer: Any, module: RLIFModule, split: str, results: list[Answered]) -> None:
        assert self._grader is not None
        summary = summarise(results, intervals=True)
        timeouts = sum(gather_objects(trainer, self._grader.timeouts))
        folder, parts = run_folder(trainer), answering.summarise_by(results)
        for line in files.summary_lines(summary):  # said before anything is written: a disk may be full
            rank_zero_info(line)
        for field, values in parts.items():
            rank_zero_info("\n".join(files.by_table(field, values)))
        log_now(trainer, {f"{split}/{key}": value for key, value in summary.items()})
        if not trainer.is_global_zero:
            return
        identity, data, attempts = module.policy.identity, trainer.datamodule, self.attempts
        report = {
            **summary,
            "problems": len(data.prompts[split]),  # of which evaluation.limit takes n
            "seed": run_seed(),
            "by": parts,
            "model": identity.model,
            "fingerprint": identity.fingerprint,
            "checkpoint": trainer.ckpt_path,
            "data": {k: v for k, v in asdict(data.sources[split]).items() if k != "answers"},
            "answers": asdict(data.answers_of(split)),
            "template": asdict(data.template),
            "evaluation": {"samples": attempts.samples, "greedy": attempts.greedy, **attempts.sampling.settings()},
            "lora": identity.lora,
            "adapter": identity.adapter,
            "quantization": identity.quantization,
            "precision": str(trainer.precision),
            "end_token_ids": module.policy.end_ids,
            "stop": list(module.policy.settings.stop),
            "config": str(folder / CONFIG),
            "grading_timeouts": timeouts,
            "versions": files.versions(),
        }
        rows = files.write_rows(folder / "problems.jsonl", results)
        file = files.write_report(folder / "results.json", report)
        rank_zero_info(f"Results: {file}\nProblems: {rows}")
