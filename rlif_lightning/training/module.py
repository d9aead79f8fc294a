"""The LightningModule: policy, references, and the loss of one slice."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError, check_ranges, said_by_python, users_mistake
from rlif_lightning.functional.loss_records import KLEstimator, Loss, LossSettings
from rlif_lightning.models.checkpoints import MODEL, weights_of
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy, set_training_mode
from rlif_lightning.models.quantization import Quantization
from rlif_lightning.models.references import ReferenceKind
from rlif_lightning.models.strategies import FSDP2Strategy, check_optimizer, check_strategy, shares_out
from rlif_lightning.models.trainable import check_finite_weights, trainable
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs import signals
from rlif_lightning.sampling.check_decoding import check_decoding
from rlif_lightning.training.collector import Collector
from rlif_lightning.training.other_callbacks import check_trainer
from rlif_lightning.training.slice_loss import slice_loss
from rlif_lightning.training.window import EntropyBonus, Window
from rlif_lightning.warnings_shown import quiet_lightning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """AdamW with the settings of arXiv 2505.19590."""
    return torch.optim.AdamW(parameters, lr=3e-6, betas=(0.9, 0.999), weight_decay=0.0)


class RLIFModule(pl.LightningModule):
    """The policy, its references, and the clipped policy-gradient step.

    The weights are loaded in ``configure_model``; ``__init__`` only checks and stores settings. Rollouts come
    from :class:`rlif_lightning.callbacks.RolloutCallback`.

    Args:
        name: The model: ``toy``, a Hugging Face folder, or a name on the hub.
        loss: The surrogate loss and how it is averaged: ``grpo`` (mean over the tokens of each completion, then over
            completions), ``dapo`` and ``bnpo`` (mean over all tokens), ``dr_grpo`` (sum over tokens divided by a
            constant length), ``gspo`` (one ratio per completion; needs bounds such as 3e-4), ``cispo`` (capped
            weights, so that every token keeps its gradient; mean over all tokens).
        clip_low: The ratio is clipped below 1 - clip_low; cispo has no lower bound.
        clip_high: The ratio is clipped above 1 + clip_high; for cispo this is the weight's cap, so a cap of 5 is 4.
        kl_coefficient: Weight of the KL divergence from the reference; 0: no KL term.
        kl_estimator: Estimator of the KL divergence per token: ``k3``, or ``k2``, whose mean gradient on policy is
            that of the divergence itself.
        reference: The policy that the divergence is taken from: that of the start (``frozen``), a running mean of the
            weights (``ema``), or a copy that is renewed every ``reference_every`` steps (``synced``). With LoRA,
            ``ema`` and ``synced`` are copies of the adapter.
        reference_every: Optimiser steps after which a ``synced`` reference is renewed.
        ema_decay: Share of its own weights that the running mean keeps at each optimiser step.
        entropy_coefficient: Weight of the entropy bonus, the mean entropy of the update's tokens in nats; 0: none.
        target_entropy: Entropy in nats per token below which the bonus acts. The coefficient starts at
            ``entropy_coefficient``; after each step it rises by 0.005 if the step's entropy was below the target and
            falls by 0.005 otherwise, never below 0. null: the coefficient is constant.
        top_entropy_fraction: Share of a step's tokens that learn from the advantage, those with the highest entropy
            when sampled; the KL term and the bonus stay on all tokens. 1: all tokens.
        lora: Settings of ``peft.LoraConfig``, such as ``r``, ``lora_alpha`` and ``target_modules``; null: train all
            weights. ``lora_dropout`` has no effect: dropout is always off, so that ratios start at 1.
        adapter: LoRA adapter to train on from: a folder in PEFT's format, or a name on the hub. Its settings replace
            ``lora``, and the frozen reference is the policy with this adapter as it was, not the base model alone.
        quantization: ``nf4`` keeps the frozen weights in 4 bits (with double quantisation; products are computed in
            the Trainer's precision), which saves memory and costs time. It needs ``lora`` or ``adapter``. null: no
            quantisation.
        optimizer: Class path and settings of the optimiser; the learning rate is ``--model.optimizer.lr``.
        schedule: Course of the learning rate after the warm-up.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        gradient_checkpointing: Recompute activations in the backward pass, which saves memory and costs time. Prompts
            are then computed once per completion instead of once per group.
        end_tokens: Tokens that end a completion, besides those of the generation config, of the tokenizer and of an
            answer in the chat template.
        revision: Revision of a repository on the hub.
        trust_remote_code: Run Python code that comes with the model. Set it only for code that you have read.
    """

    def __init__(
        self,
        name: str,
        loss: Loss = "grpo",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coefficient: float = 0.0,
        reference: ReferenceKind = "frozen",
        reference_every: int = 100,
        ema_decay: float = 0.99,
        kl_estimator: KLEstimator = "k3",
        entropy_coefficient: float = 0.0,
        target_entropy: float | None = None,
        top_entropy_fraction: float = 1.0,
        lora: dict[str, Any] | None = None,
        adapter: str | None = None,
        quantization: Quantization | None = None,
        optimizer: OptimizerFactory = default_optimizer,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_ratio: float = 0.0,
        gradient_checkpointing: bool = False,
        end_tokens: list[str] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.entropy_bonus = EntropyBonus(entropy_coefficient, target_entropy)
        try:
            self.loss = LossSettings(
                loss, clip_low, clip_high, kl_coefficient, kl_estimator, self.entropy_bonus.current
            )
        except ValueError as error:
            raise UserError(f"model.{error}") from error
        near = "nats per token, above 0, near the train/entropy or rollout/entropy of the first steps"
        refers = "frozen, or model.kl_coefficient above 0"
        check_ranges(
            "model",
            ("entropy_coefficient", entropy_coefficient, entropy_coefficient >= 0, "0 or more"),
            ("target_entropy", target_entropy, target_entropy is None or target_entropy > 0, near),
            ("reference", reference, reference == "frozen" or kl_coefficient, refers),
            ("ema_decay", ema_decay, 0 <= ema_decay < 1, "from 0 to below 1"),
            ("reference_every", reference_every, reference_every >= 1, "1 or more"),
            ("top_entropy_fraction", top_entropy_fraction, 0 < top_entropy_fraction <= 1, "above 0, at most 1"),
            ("warmup_ratio", warmup_ratio, 0 <= warmup_ratio < 1, "from 0 to below 1"),
        )
        try:
            optimizer([nn.Parameter(torch.zeros(1))])
        except Exception as error:
            said, do = said_by_python(error), "correct model.optimizer"
            raise users_mistake(error) or UserError("The optimizer can't be made", got=said, do=do) from None
        ends = tuple(end_tokens or ())
        self.policy_settings = PolicySettings(
            name, lora, adapter, quantization, gradient_checkpointing, ends, revision, trust_remote_code
        )
        self.policy_settings.check()
        self.top_entropy_fraction = top_entropy_fraction
        self.make_optimizer, self.schedule, self.warmup_ratio = optimizer, schedule, warmup_ratio
        self.reference: ReferenceKind = reference
        self.ema_decay, self.reference_every = ema_decay, reference_every
        self.needs: set[ReferenceKind] = {reference} if kl_coefficient > 0 else set()
        """References that somebody asks for: add to them before the weights are loaded."""
        self._policy: Policy | None = None
        self.strict_loading = False  # checkpoints hold trainable weights only
        self.collector: Collector | None = None  # of the RolloutCallback
        self.evaluation: Any = None  # the Evaluation callback
        self.window = Window()
        self.is_replaced = False
        """Whether other weights stand in place of those that the last step has made, and are not saved yet."""

    def configure_callbacks(self) -> list[Any]:
        """None; the first that Lightning asks for, hence the place to refuse a Trainer's others."""
        check_trainer(self.trainer)
        return []

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The policy's tokenizer; needs no weights."""
        return self.policy_settings.load_tokenizer()

    @property
    def policy(self) -> Policy:
        """Weights, tokenizer and references; there since :meth:`configure_model`."""
        assert self._policy is not None, "the weights are loaded by configure_model"
        return self._policy

    def configure_model(self) -> None:
        """Load policy and references; Lightning calls this in each command, after all settings were checked."""
        trainer = self._trainer
        training = trainer is not None and trainer.training
        if self._policy is not None:
            if training and not self._policy.can_train:
                raise UserError(
                    "The weights were loaded for an evaluation, without what training needs besides them",
                    do="make another RLIFModule for trainer.fit",
                )
            return
        strategy = None if trainer is None else trainer.strategy
        device = torch.device("cpu") if strategy is None else strategy.root_device
        precision = "32-true" if trainer is None else str(trainer.precision)
        settings, sharded = self.policy_settings, shares_out(strategy)
        data = None if trainer is None else trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PromptDataModule):
            settings = replace(settings, turn_end=data.template.turn_end(self.tokenizer))
        policy = Policy.load(settings, device, precision, training, sharded=sharded, tokenizer=self.tokenizer)
        check_decoding(policy.model, policy.end_ids, policy.pad_id)
        if training and isinstance(strategy, FSDP2Strategy):
            policy.shard(strategy.device_mesh["data_parallel"])
        if training:
            policy.make_references(self.needs, self.ema_decay, self.reference_every)
        self._policy, self.model, self.references = policy, policy.model, policy.references

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As in the base class; then the references follow the policy."""
        super().optimizer_step(*args, **kwargs)
        self.policy.references.update_after_step(self.policy.model, self.trainer.global_step + 1)  # counted later

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one slice: its part of the window's mean.

        Lightning divides by the slices of a window and DDP averages over processes: both are undone here, so
        that the gradient is that of the whole window however it is cut.
        """
        signals.look_together()
        rollout: Rollout = batch["rollout"]
        set_training_mode(self.policy.model, training=True)
        settings = replace(self.loss, entropy_coefficient=self.entropy_bonus.current)
        result = slice_loss(self.policy.model, rollout, batch["denominator"], batch["old_logprob"], settings)
        self.window.count(result)
        return result.loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def window_metrics(self) -> dict[str, float]:
        """Means over the optimiser step just taken, over all processes; gets ready for the next one."""
        total = partial(self.trainer.strategy.reduce, reduce_op="sum")
        return self.window.metrics(total, self.reference in self.needs, self.entropy_bonus)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep what the step is taken with, and skip it where its gradient is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.window.note_step(optimizer, None if scaler is None else scaler.get_scale())

    def configure_optimizers(self) -> Any:
        """The optimiser over the trainable weights, and its schedule in optimiser steps."""
        from transformers import get_scheduler

        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        total = self.total_steps()
        warmup = round(self.warmup_ratio * total)
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the run: ``max_steps`` or ``max_epochs``, whichever ends it.

        Not ``estimated_stepping_batches``: that makes the loader before its resumed state is there.
        """
        trainer = self.trainer
        steps, epochs = trainer.max_steps, trainer.max_epochs or -1
        if epochs < 0:
            return max(1, steps)
        batches = epochs * len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        all_epochs = max(1, batches // trainer.accumulate_grad_batches)
        return all_epochs if steps < 0 else min(steps, all_epochs)

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would run through these commands without doing anything."""
        quiet_lightning()
        check_strategy(type(self.trainer.strategy).__name__)
        if stage == "fit":
            check_optimizer(self.make_optimizer([nn.Parameter(torch.zeros(1))]), self.trainer)
        if stage != "fit" and self.evaluation is None:
            do = "give the Trainer a rlif_lightning.callbacks.Evaluation"
            raise UserError("This command needs an Evaluation callback", do=do)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Done by the Evaluation callback."""

    test_step = predict_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and whose they are; weights that are not finite are refused."""
        weights, step = trainable(self), self.trainer.global_step
        check_finite_weights(weights, step, partial(self.trainer.strategy.reduce_boolean_decision, all=False))
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in weights}
        references = self.policy.references.to_checkpoint(keep=self.global_rank == 0)
        checkpoint["rlif"] = {**vars(self.policy.identity), "versions": references}
        checkpoint["rlif_entropy"] = self.entropy_bonus.state_dict()
        checkpoint["rlif_window"] = self.window.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model."""
        self.policy.check_checkpoint(checkpoint)
        checkpoint["state_dict"] = {MODEL + name: weight for name, weight in weights_of(checkpoint).items()}
        self.entropy_bonus.load_state_dict(checkpoint.get("rlif_entropy", {}))  # not in the guard's kept weights
        self.window.load_state_dict(checkpoint.get("rlif_window", {}))
        self.policy.references.from_checkpoint(checkpoint["rlif"].get("versions", {}))  # nor are these
