"""Held-out evaluation while training, and the work of validate, test and predict."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlif_lightning.callbacks.logging import log_now
from rlif_lightning.callbacks.progress import sampling_progress
from rlif_lightning.callbacks.rollout import RolloutCallback
from rlif_lightning.callbacks.sampling import check_sampler, inference, ready
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError
from rlif_lightning.evaluation.answering import Answered, answer_problems, summarise, summarise_by
from rlif_lightning.evaluation.results import by_table, generator, versions, write_outputs, write_rows
from rlif_lightning.grading import Grader
from rlif_lightning.runs.folder import CONFIG
from rlif_lightning.sampling import NativeSampler, Sampler, Sampling
from rlif_lightning.training.module import RLIFModule


class Evaluation(Callback):
    """Answers held-out problems, always the same ones with the same seeds and no filters.

    While fitting it logs ``val/accuracy`` (greedy) and ``val/accuracy_sampled`` before the first step, every
    so many steps, and after the last. ``rlif validate`` and ``rlif test`` write ``results.json`` and one row
    per problem; ``rlif predict`` writes completions. Several processes share the problems out and give the same
    results as one.

    Args:
        every: Optimiser steps between evaluations while fitting; 0: only before and after.
        n: Problems of an evaluation while fitting, the first of the data; null: all. The commands take all
            problems, or as many as ``data.*.limit`` says.
        samples: Completions per problem at the temperature; 0: greedy only.
        greedy: Also take the greedy completion.
        temperature: Of the samples.
        max_new_tokens: Longest completion.
        batch_size: Problems answered at the same time.
        predictions: What ``rlif predict`` writes. rows: ``predictions.jsonl``, as the other commands' rows.
            alpaca_eval: ``model_outputs.json`` in AlpacaEval's format, with one completion per instruction.
        sampler: The engine; null: that of the rollout.
    """

    def __init__(
        self,
        every: int = 10,
        n: int | None = None,
        samples: int = 1,
        greedy: bool = True,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        batch_size: int = 64,
        predictions: Literal["rows", "alpaca_eval"] = "rows",
        sampler: Sampler | None = None,
    ) -> None:
        for name, value, least in (
            ("every", every, 0), ("n", n, 1), ("samples", samples, 0), ("batch_size", batch_size, 1)
        ):  # fmt: skip
            if value is not None and value < least:
                raise UserError(f"evaluation.{name} is too small", got=value, expected=f"{least} or more")
        if samples and temperature <= 0:
            raise UserError(
                "Samples need a temperature above 0",
                got=f"evaluation.temperature {temperature}",
                do="set --evaluation.samples 0 for greedy answers only",
            )
        if not samples and not greedy:
            raise UserError("evaluation.samples is 0 and evaluation.greedy is false: nothing to evaluate")
        if predictions == "alpaca_eval" and samples + greedy != 1:
            raise UserError(
                "AlpacaEval takes one output per instruction",
                got=f"evaluation.samples {samples}, evaluation.greedy {str(greedy).lower()}",
                expected="samples 0 with greedy true, or samples 1 with greedy false",
            )
        self.predictions = predictions
        self.every, self.n, self.samples, self.greedy, self.batch_size = every, n, samples, greedy, batch_size
        self.sampling = Sampling(max_new_tokens, temperature=temperature or 1.0)
        self._own_sampler = sampler is not None
        self.sampler: Sampler = sampler or NativeSampler()
        self.latest: tuple[int, dict[str, float]] = (-1, {})
        """Step and metrics of the newest evaluation of this fit."""
        self._results: list[Answered] = []
        self._told = False  # whether the engine has the weights of this validate, test or predict
        self._grader: Grader | None = None

    # -- while fitting ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the data how many problems go at a time; make a grader; find the engine."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self.take_sampler(next((c for c in trainer.callbacks if isinstance(c, RolloutCallback)), None))  # type: ignore[attr-defined]
        self._told = False
        if isinstance(datamodule, PromptDataModule):
            datamodule.eval_batch_size = self.batch_size
            prompts = datamodule.prompts.get({"fit": "val", "validate": "val"}.get(stage, stage), [])
            prompts = prompts[: self.n] if stage == "fit" else prompts
            check_sampler(self.sampler, trainer, self.sampling, prompts)
            self._grader = Grader(datamodule.answers)

    def take_sampler(self, rollout: RolloutCallback | None) -> None:
        """Use the rollout's engine where no other is given: there may be room for one only."""
        if rollout is not None and not self._own_sampler:
            self.sampler = rollout.sampler

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the grader's worker."""
        if self._grader is not None:
            self._grader.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the start; after a resume again what the interrupted run had evaluated, where it was due."""
        self.latest = (-1, {})
        if trainer.global_step == 0 or self._due(trainer):
            self.evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate the weights after every so many optimiser steps."""
        if self._due(trainer):
            self.evaluate(trainer, pl_module)

    def _due(self, trainer: Trainer) -> bool:
        return bool(self.every) and trainer.global_step % self.every == 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the end; not where a signal asked to stop, which may be followed by a kill."""
        if not interrupted(trainer):
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        """Evaluate the present step and log it, once."""
        if self.latest[0] == trainer.global_step:
            return
        start = time.perf_counter()
        metrics = self.held_out(trainer, module)
        self.latest = (trainer.global_step, metrics)
        if metrics:
            log_now(trainer, {**metrics, "time/evaluation": time.perf_counter() - start})

    def held_out(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Answer the held-out problems with the policy as it stands: ``val/*``; nothing without such problems.

        To be called on all processes.
        """
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not datamodule.prompts.get("val"):
            return {}
        loader = datamodule.evaluation_loader("val", self.n)
        results: list[Answered] = []
        total = sum(len(batch) for batch in loader.batches)
        assert isinstance(module, RLIFModule)
        with ready(self.sampler, trainer, module):  # once: an engine takes all weights each time
            for batch in loader:
                results += self._answer(trainer, module, "val", batch, (len(results), total))
        summary = summarise(_gather(trainer, results))
        names = ("accuracy", "accuracy_sampled", "mean_tokens", "mean_tokens_sampled",
                 "truncated_fraction", "truncated_fraction_sampled")  # fmt: skip
        return {f"val/{name}": summary[name] for name in names if name in summary}

    def _answer(
        self,
        trainer: Trainer,
        module: LightningModule,
        name: str,
        rows: Sequence[int],
        place: tuple[int, int] | None = None,
    ) -> list[Answered]:
        assert isinstance(module, RLIFModule) and module.policy is not None and self._grader is not None
        prompts = trainer.datamodule.prompts[name]  # type: ignore[attr-defined]
        if not rows:
            return []
        return answer_problems(
            self.sampler,
            [(row, prompts[row]) for row in rows],
            self.sampling,
            self.samples,
            module.policy.decode,
            self._grader,
            self.greedy,
            sampling_progress(trainer, place),
        )

    # -- validate, test, predict -----------------------------------------------------------------------------

    def _on_batch(self, trainer: Trainer, pl_module: LightningModule, name: str, batch: list[int]) -> None:
        assert isinstance(pl_module, RLIFModule) and pl_module.policy is not None
        with inference(trainer, pl_module) as model:  # on all processes, with problems left or without
            if not self._told:
                self.sampler.update(model, pl_module.policy.end_ids, pl_module.policy.pad_id)
                self._told = True
            self._results += self._answer(trainer, pl_module, name, batch)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer a batch of ``rlif validate``."""
        self._on_batch(trainer, pl_module, "val", batch)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer a batch of ``rlif test``."""
        self._on_batch(trainer, pl_module, "test", batch)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answer a batch of ``rlif predict``."""
        self._on_batch(trainer, pl_module, "predict", batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of ``rlif validate``; while fitting Lightning's own validation has no batches."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of ``rlif test``."""
        self._finish(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the completions of ``rlif predict``."""
        results = self._take(trainer)
        folder = trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        if self.predictions == "alpaca_eval":
            assert isinstance(pl_module, RLIFModule)
            name = generator(pl_module.policy_settings.name, trainer.ckpt_path)
            path = write_outputs(Path(folder) / "model_outputs.json", results, name)
        else:
            path = write_rows(Path(folder) / "predictions.jsonl", results)
        rank_zero_info(f"Completions of {len(results)} problems: {path}")

    def _take(self, trainer: Trainer) -> list[Answered]:
        if self._told:
            self.sampler.release()
            self._told = False
        results, self._results = _gather(trainer, self._results), []
        return results

    def _finish(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        assert isinstance(module, RLIFModule) and module.policy is not None and self._grader is not None
        identity = module.policy.identity
        results = self._take(trainer)
        summary = summarise(results, intervals=True)
        timeouts = sum(_everyones(trainer, self._grader.timeouts))
        log_now(trainer, {f"{name}/{key}": value for key, value in summary.items()})
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        parts = summarise_by(results)
        report = {
            **summary,
            "by": parts,
            "model": identity.model,
            "fingerprint": identity.fingerprint,
            "checkpoint": trainer.ckpt_path,
            "data": asdict(datamodule.sources[name]),
            "answers": asdict(datamodule.answers),
            "template": asdict(datamodule.template),
            "evaluation": {"samples": self.samples, "greedy": self.greedy, **asdict(self.sampling)},
            "lora": identity.lora,
            "adapter": identity.adapter,
            "quantization": identity.quantization,
            "precision": str(trainer.precision),
            "end_token_ids": module.policy.end_ids,
            "config": str(folder / CONFIG),
            "grading_timeouts": timeouts,
            "versions": versions(),
        }
        rows = write_rows(folder / "problems.jsonl", results)
        file = folder / "results.json"
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        width = max(map(len, summary))
        for key, value in summary.items():
            rank_zero_info(f"  {key:<{width}}  {value:.4f}" if key != "n" else f"  {key:<{width}}  {value}")
        for field, values in parts.items():
            rank_zero_info("\n".join(by_table(field, values)))
        rank_zero_info(f"Results: {file}\nProblems: {rows}")


def interrupted(trainer: Trainer) -> bool:
    """Whether a signal asked any process to stop, which may be followed by a kill: no time for evaluations."""
    asked = any(getattr(c, "asked_to_stop", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return trainer.strategy.reduce_boolean_decision(asked, all=False)


def _gather(trainer: Trainer, results: list[Answered]) -> list[Answered]:
    """Results of all processes in the order of the data, on every process."""
    return sorted((r for part in _everyones(trainer, results) for r in part), key=lambda r: r.index)


def _everyones(trainer: Trainer, own: Any) -> list[Any]:
    """What each process has, on every process."""
    if trainer.world_size == 1:
        return [own]
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, own)
    return parts
