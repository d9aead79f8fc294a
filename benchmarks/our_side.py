"""Our side: what ``rlif fit`` builds, without loggers and checkpoints."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.gate import Gate
from benchmarks.shapes import LORA, Work, text_reward
from benchmarks.watch import Watch
from rlif_lightning import PromptDataModule, RLIFModule, Source
from rlif_lightning.callbacks import RolloutCallback
from rlif_lightning.rewards import Reward, SelfCertainty
from rlif_lightning.rollout import Rollout


class Text(Reward):
    """The reward that only reads."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [N]."""
        return torch.tensor([text_reward(text) for text in rollout.texts])


def make_module(
    work: Work, cls: type[RLIFModule] = RLIFModule, adamw: type[torch.optim.AdamW] = torch.optim.AdamW
) -> RLIFModule:
    """The policy and its update."""
    pl.seed_everything(0, verbose=False)
    fused = work.precision == "32-true"  # Lightning clips no gradients of a fused optimiser in bf16-mixed
    return cls(
        work.folder,
        loss="grpo",
        kl_coefficient=work.kl,
        lora=LORA if work.lora else None,
        optimizer=lambda weights: adamw(weights, lr=work.learning_rate, weight_decay=0.0, fused=fused),
    )


def make_data(work: Work) -> PromptDataModule:
    """The prompts as they stand, without answers."""
    return PromptDataModule(train=Source(str(Path(work.folder) / "prompts.jsonl"), answer=None), template="{prompt}")


def make_reward(work: Work) -> Reward:
    """What is rewarded."""
    return Text() if work.reward == "text" else SelfCertainty()


def make_rollouts(work: Work, **settings: Any) -> RolloutCallback:
    """Groups of completions, and their slices."""
    return RolloutCallback(
        prompts_per_step=work.prompts,
        group_size=work.group,
        micro_batch_size=work.micro_batch,
        max_new_tokens=work.new_tokens,
        rewards=[make_reward(work)],
        **settings,
    )


def make_trainer(work: Work, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    """As the command line makes it; nothing is logged or saved, unless ``settings`` say so."""
    own: dict[str, Any] = {
        "accelerator": "gpu" if work.device == "cuda" else "cpu",
        "devices": 1,
        "precision": work.precision,
        "max_steps": work.steps,
        "max_epochs": -1,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**own, **settings}, callbacks=callbacks)


class Gatekeeper(pl.Callback):
    """Stands before all other callbacks: waits at each step's first slice."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.watch, self.steps = gate, Watch(gate), 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins with its first slice."""
        if batch["slice"] == 0:
            if trainer.global_step:
                self.watch.after_step(pl_module.policy.model)
            self.gate.arrive()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look at the gradients."""
        self.watch.before_step(pl_module.policy.model)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step is done."""
        self.watch.after_step(pl_module.policy.model)
        self.gate.finish()


class Counter(pl.Callback):
    """Stands behind the rollouts: counts what was sampled."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The rollout is there."""
        if batch["slice"] == 0:
            rollout = batch["collected"].rollout
            with self.gate.excluding():
                self.gate.note(tokens=int(rollout.samples.lengths.sum()), finite=bool(rollout.advantages.any()))


def run(work: Work, gate: Gate) -> None:
    """Train."""
    trainer = make_trainer(work, [Gatekeeper(gate), make_rollouts(work), Counter(gate)])
    trainer.fit(make_module(work), datamodule=make_data(work))
