"""Show and keep what the policy writes."""

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlif_lightning.callbacks.logging import collected_metrics, log_table, run_logger
from rlif_lightning.errors import check_ranges, escaped, writing
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs import markdown
from rlif_lightning.runs.folder import COMPLETIONS
from rlif_lightning.runs.held_out import ending
from rlif_lightning.runs.logger import EVENTS

SHOWN = 4  # completions of a rollout in TensorBoard and other loggers
LONGEST = 400  # characters of them in TensorBoard


class Completions(Callback):
    """Writes completions with their rewards and advantages to ``completions.jsonl`` and TensorBoard.

    The file holds the first groups of the first process, whole groups, so that advantages can be read; TensorBoard
    shows the first 4 completions of the first group. What comes after ``limit_mb`` is left out, which is said once.

    Args:
        every: Optimiser steps between two rollouts that are written; 0: write none.
        keep: Completions per rollout in the file, rounded up to whole groups; null: all.
        limit_mb: Size in MB of ``completions.jsonl`` from which on no rows are added, and of TensorBoard's files from
            which on no texts and distributions are: curves go on. null: no limit.
    """

    def __init__(self, every: int = 1, keep: int | None = 32, limit_mb: int | None = 1000) -> None:
        check_ranges(
            "completions",
            ("every", every, every >= 0, "0 or more"),
            ("keep", keep, keep is None or keep >= 0, "0 or more, or null"),
            ("limit_mb", limit_mb, limit_mb is None or limit_mb >= 1, "1 or more, or null"),
        )
        self.every, self.keep, self.limit_mb = every, keep, limit_mb
        self._full: set[str] = set()  # files that have reached the limit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where nothing will be written."""
        self._full = set()
        if stage == "fit" and self.every and run_logger(trainer) is None:
            rank_zero_warn("Completions are not kept: that takes a rlif_lightning.runs.logger.RunLogger as logger.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep a rollout that was just collected."""
        step = trainer.global_step
        if batch["slice"] or not trainer.is_global_zero or not self._due(step, trainer):
            return
        collected_metrics(batch)
        logger = run_logger(trainer)
        if logger is None:
            return
        rollout = batch["collected"].rollout
        count, g = len(rollout.texts), rollout.group_size
        if self.keep is not None:
            count = min(count, math.ceil(self.keep / g) * g)
        rows = [completion_row(rollout, batch, step, i) for i in range(count)]
        folder = logger.folder
        if self._has_room(folder, COMPLETIONS):
            logger.attempt(partial(append_rows, folder / COMPLETIONS, rows))
        if not self._has_room(folder, EVENTS):
            return
        if shown := rows[: min(SHOWN, g)]:
            name, text = "samples/rollout", _markdown(shown)
            if pl_module.evaluation is not None and pl_module.evaluation.latest_step == step:
                log_table(trainer, name, [_flat(row) for row in shown], text)
            else:  # other loggers keep a file per table, or write all rows anew
                logger.log_text(name, text, step)
        for name, values in _distributions(rollout).items():
            logger.log_histogram(f"distribution/{name}", values, step)

    def _has_room(self, folder: Path, files: str) -> bool:
        """Whether files of a run are below the limit."""
        if self.limit_mb is None:
            return True
        if sum(file.stat().st_size for file in folder.glob(files)) < self.limit_mb * 10**6:
            return True
        if files not in self._full:
            self._full.add(files)
            setting = f"completions.limit_mb {self.limit_mb}"
            rank_zero_warn(f"{folder / files} has reached {setting}: no more completions are added to it.")
        return False

    def _due(self, step: int, trainer: Trainer) -> bool:
        """Whether a multiple of ``every`` lies in the steps from the rollout before this one to this one."""
        before = step - trainer.datamodule.plan.rollout_steps  # type: ignore[attr-defined]
        return bool(self.every) and step // self.every > before // self.every


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a file of JSON lines."""
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(escaped(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def completion_row(rollout: Rollout, batch: dict[str, Any], step: int, i: int) -> dict[str, Any]:
    """Completion i for the file."""
    prompt = batch["prompts"][i // rollout.group_size]
    rewards = {name: float(values[i]) for name, values in rollout.rewards.items()}
    assert rollout.advantages is not None
    row: dict[str, Any] = {
        "step": step,
        "prompt": prompt.text,
        "completion": rollout.texts[i],
        "tokens": int(rollout.samples.lengths[i]),
        "ended": bool(rollout.samples.ended[i]),
        "rewards": {name: x if math.isfinite(x) else None for name, x in rewards.items()},
        "advantage": float(rollout.advantages[i]),
    }
    if rollout.answers:
        row["answer"] = rollout.answers[i]
    if rollout.correct is not None:
        row["gold"] = prompt.problem.gold.text
        row["correct"] = bool(rollout.correct[i])
    return row


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose rewards have a column each."""
    rewards = {f"reward/{name}": value for name, value in row["rewards"].items()}
    return {name: value for name, value in row.items() if name != "rewards"} | rewards


def _markdown(rows: list[dict[str, Any]]) -> str:
    """A prompt and a table of its completions."""
    first = rows[0]
    names = list(first["rewards"])
    body = [
        [
            markdown.MARKS[row.get("correct")],
            *("" if row["rewards"][name] is None else f"{row['rewards'][name]:.4f}" for name in names),
            f"{row['advantage']:+.3f}",
            row["tokens"],
            ending(row["completion"], LONGEST),
        ]
        for row in rows
    ]
    about = {"prompt": ending(first["prompt"], LONGEST), "right answer": first.get("gold")}
    lines = [f"{name}: {markdown.cell(text)}" for name, text in about.items() if text is not None]
    return "\n\n".join([*lines, markdown.table(["", *names, "advantage", "tokens", "completion"], body)])


def _distributions(rollout: Rollout) -> dict[str, Tensor]:
    """Numbers by name; the logger leaves out those that are not finite."""
    samples = rollout.samples
    assert samples.stats is not None and rollout.advantages is not None
    return {
        **{f"reward/{name}": values for name, values in rollout.rewards.items()},
        "advantage": rollout.advantages,
        "completion_tokens": samples.lengths,
        "entropy": samples.stats.entropy[samples.completion_mask],
    }
