"""One small training run through the real Trainer, with everything that tests ask about it."""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from rlif_lightning.callbacks import RolloutCallback
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.data.problems import Source
from rlif_lightning.grading import AnswerFormat
from rlif_lightning.rollout import Rollout
from rlif_lightning.training.module import RLIFModule


class Memory(Logger):
    """Keeps what is logged: step -> name -> value."""

    name, version = "memory", "0"

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.steps.setdefault(step, {}).update({k: float(v) for k, v in metrics.items()})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class Run(pl.Callback):
    """A finished run."""

    module: RLIFModule
    trainer: Any = None
    start: Any = None  # a copy of the policy before the first step
    rollouts: list[Rollout] = field(default_factory=list)
    slices: list[tuple[int, Rollout, Any]] = field(default_factory=list)  # (step, slice, old log-probabilities)

    def __hash__(self) -> int:
        return id(self)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = copy.deepcopy(pl_module.policy.model)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch["collected"] is not None:
            self.rollouts.append(batch["collected"].rollout)
        self.slices.append((trainer.global_step, batch["rollout"], batch["old_logprob"]))

    def column(self, name: str) -> list[float]:
        """A metric over the steps at which it was logged."""
        steps = self.trainer.logger.steps
        return [steps[s][name] for s in sorted(steps) if name in steps[s]]

    def weights(self) -> dict[str, torch.Tensor]:
        """The trainable weights at the end."""
        return {n: p.detach() for n, p in self.module.policy.model.named_parameters() if p.requires_grad}


def fit(
    folder: Path,
    problems: Path,
    model: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    optimizer: Any = None,
    callbacks: list[Any] | None = None,
    steps: int = 2,
    resume: Path | None = None,
    answers: AnswerFormat | None = None,
) -> Run:
    """Fit a module on a few prompts x 4 completions of at most 12 tokens; or continue from a checkpoint."""
    torch.manual_seed(0)  # a fresh adapter is drawn from the global generator
    module = RLIFModule(str(folder), optimizer=optimizer or adamw(1e-3), **(model or {}))
    run = Run(module)
    sizes = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 12}
    run.trainer = pl.Trainer(
        **{
            "accelerator": "cpu", "max_steps": steps, "gradient_clip_val": 1.0, "logger": Memory(),
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "num_sanity_val_steps": 0, "log_every_n_steps": 1, **(trainer or {}),
        },
        callbacks=[RolloutCallback(**{**sizes, **(rollout or {})}), run, *(callbacks or [])],
    )  # fmt: skip
    run.trainer.fit(
        module, PromptDataModule(Source(str(problems)), answers=answers, template="{prompt} "), ckpt_path=resume
    )
    return run


def adamw(lr: float, **settings: Any) -> Any:
    """AdamW whose step is a smooth function of the gradient: with a tiny eps a rounding could flip its sign."""
    return lambda parameters: torch.optim.AdamW(
        parameters, **{"lr": lr, "eps": 1e-2, "weight_decay": 0.1, **settings}
    )


def many_ends(source: Path, target: Path) -> Path:
    """A copy of a model folder whose completions end at all lengths: every twelfth token ends them."""
    shutil.copytree(source, target)
    path = target / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(0, 320, 12))}))
    return target
