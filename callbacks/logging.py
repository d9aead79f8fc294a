"""What is logged of a rollout, and one way to log: now, at the step that the numbers belong to."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rlif_lightning.errors import UserError, said_by_python
from rlif_lightning.functional.losses import kl_estimate
from rlif_lightning.functional.similarity import group_similarity
from rlif_lightning.grading import agreement
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs.logger import RunLogger
from rlif_lightning.runs.other_loggers import other_table
from rlif_lightning.training.collector import Collected


def log_now(trainer: Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Send metrics to every logger at an optimiser step (null: the current one), and show them to callbacks.

    Not ``self.log``: under accumulation it passes on a window's last slice only, and it repeats the numbers
    of a rollout at each of its steps.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step if step is None else step)
    trainer.callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})


def log_table(trainer: Trainer, name: str, rows: Sequence[Mapping[str, Any]], text: str) -> None:
    """Show something in every logger: Markdown in the run's own, rows in those that take tables; on one process.

    Args:
        trainer: Whose loggers and step it is.
        name: What it is called there.
        rows: With the same columns each.
        text: The same as Markdown.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, RunLogger):
            logger.log_text(name, text, trainer.global_step)
        else:
            _tolerated(other_table, type(logger).__name__)(logger, name, rows, trainer.global_step)


def tolerate_other_loggers(trainer: Trainer) -> None:
    """Let loggers besides the run's own fail with a warning, such as one that asks a server: the run goes on."""
    for logger in trainer.loggers:
        if not isinstance(logger, RunLogger):
            for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
                setattr(logger, name, _tolerated(getattr(logger, name), type(logger).__name__))


def _tolerated(method: Callable[..., object], logger: str) -> Callable[..., None]:
    @wraps(method)
    def tried(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            rank_zero_warn(f"{logger} has not logged everything: {said_by_python(error)}")

    return tried


def collected_metrics(batch: Mapping[str, Any]) -> dict[str, float]:
    """What was logged of the rollout of this batch; a UserError where no callback before has collected one."""
    if "metrics" not in batch:
        raise UserError(
            "A callback that looks at rollouts stands before the one that collects them",
            do="list RolloutCallback before CollapseGuard and Completions",
        )
    metrics: dict[str, float] = batch["metrics"]
    return metrics


def run_folder(trainer: Trainer) -> Path:
    """Where the run's files are: the logger's folder, without one the Trainer's; to be called on all processes."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def run_logger(trainer: Trainer) -> RunLogger | None:
    """The logger of the run's folder, if there is one."""
    return next((x for x in trainer.loggers if isinstance(x, RunLogger)), None)


def gather_objects(trainer: Trainer, own: Any) -> list[Any]:
    """What each process has, on every process."""
    if trainer.world_size == 1:
        return [own]
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, own)
    return parts


def peak_memory(device: torch.device) -> dict[str, float]:
    """``memory/peak``: the most that this process has held so far in MiB, on the GPU or resident; not on Windows."""
    if device.type == "cuda":
        return {"memory/peak": torch.cuda.max_memory_allocated(device) / 2**20}
    if sys.platform == "win32":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return {"memory/peak": peak / (2**20 if sys.platform == "darwin" else 2**10)}


class Means:
    """Sums and counts that become means over all processes with one reduction."""

    def __init__(self) -> None:
        self.pairs: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add one mean as its total and its count."""
        self.pairs[name] = torch.stack([torch.as_tensor(x).double().cpu() for x in (total, count)])

    def rows(self, name: str, values: Tensor) -> None:
        """Add the mean of a tensor's finite entries."""
        numbers = values[values.isfinite()]
        self.add(name, numbers.sum(), numbers.numel())

    def reduce(self, trainer: Trainer) -> dict[str, float]:
        """The means over all processes; names in the order added, those with nothing counted left out."""
        pairs = torch.stack(list(self.pairs.values()))
        if trainer.world_size > 1:  # not on one process: not every device has float64
            pairs = torch.as_tensor(trainer.strategy.reduce(pairs.to(trainer.strategy.root_device), reduce_op="sum"))
        return {n: t / c for n, (t, c) in zip(self.pairs, pairs.tolist(), strict=True) if c}


def rollout_metrics(trainer: Trainer, collected: Collected) -> dict[str, float]:
    """``rollout/*``: means over all processes, reduced once.

    Statistics are means over tokens (nats), the others over completions or groups. ``rollout/reward`` is the
    weighted sum of the rewards, over the completions that all of them score; several are logged one by one as well.
    """
    rollout, samples, means = collected.rollout, collected.rollout.samples, Means()
    mask, g = samples.completion_mask, rollout.group_size
    _add_rewards(means, rollout, collected.weights)
    for name, values in _by_token(rollout).items():
        means.add(f"rollout/{name}", values.sum(), mask.sum())
    means.rows("rollout/completion_tokens", samples.lengths.float())
    means.rows("rollout/truncated_fraction", (~samples.ended).float())
    means.rows("rollout/gated_fraction", collected.gated.float())
    if collected.filtered is not None:
        means.rows("rollout/filtered_fraction", collected.filtered.float())
    assert rollout.advantages is not None
    means.rows("rollout/advantage_size", rollout.advantages.abs())
    means.rows("rollout/answered_fraction", torch.tensor([float(a is not None) for a in rollout.answers]))
    if samples.kept_mass is not None:
        means.add("rollout/kept_mass", samples.kept_mass[mask].sum(), mask.sum())
    means.rows("rollout/similarity", group_similarity(samples.completion_ids, mask, g))
    means.rows("rollout/agreement", torch.tensor([agreement(x[:g]) for x in rollout.votes]))
    if rollout.correct is not None:
        means.rows("rollout/accuracy", rollout.correct)
    means.add("rollout/grading_timeouts", rollout.grading_timeouts * trainer.world_size, 1)
    means.add("rollout/tokens_per_second", mask.sum() * trainer.world_size, collected.sampling_seconds)
    metrics = means.reduce(trainer)
    if samples.engine_logprob is not None and samples.logprob is not None:
        largest = (samples.logprob - samples.engine_logprob)[mask].max().exp()
        metrics["rollout/engine_ratio_max"] = float(trainer.strategy.reduce(largest, reduce_op="max"))
    if rollout.correct is None and not metrics["rollout/answered_fraction"]:
        del metrics["rollout/agreement"]  # open-ended texts: no answer to agree on, on any process
    return metrics


def _add_rewards(means: Means, rollout: Rollout, weights: list[float]) -> None:
    total = torch.zeros_like(rollout.samples.lengths, dtype=torch.float32)  # [N], where a schedule has only zeros
    for weight, values in zip(weights, rollout.rewards.values(), strict=True):
        if weight:
            total = total + weight * values
    means.rows("rollout/reward", total)
    means.rows("rollout/reward_std", total.view(-1, rollout.group_size).std(1))
    means.rows("rollout/unscored_fraction", (~total.isfinite()).float())
    if len(weights) > 1:
        for name, values in rollout.rewards.items():
            means.rows(f"rollout/reward/{name}", values)


def _by_token(rollout: Rollout) -> dict[str, Tensor]:
    """Numbers of each token [tokens], by the metric whose mean they have; in nats but for the shares."""
    samples, mask = rollout.samples, rollout.samples.completion_mask
    assert samples.stats is not None and samples.logprob is not None
    logprob = samples.logprob[mask]
    found = {
        "self_certainty": samples.stats.self_certainty[mask],
        "entropy": samples.stats.entropy[mask],
        "logprob": logprob,
    }
    if rollout.start_logprob is not None:
        found["start_logprob"] = rollout.start_logprob[mask]
    if rollout.kl_logprob is not None:
        found["kl"] = kl_estimate(logprob, rollout.kl_logprob[mask])
    if samples.engine_logprob is not None:
        engine = samples.engine_logprob[mask]
        found["engine_kl"] = kl_estimate(engine, logprob)
        if rollout.importance is not None:
            found["importance_capped"] = logprob - engine > rollout.importance[mask].log() + 1e-6
    return found
