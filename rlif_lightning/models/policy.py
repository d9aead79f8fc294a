"""A policy without a Trainer: weights, tokenizer, end tokens, references, and whose they are."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rlif_lightning.models.checkpoints import identity_of, weights_of
from rlif_lightning.models.cpu import recommend_bfloat16, use_one_thread_if_tiny
from rlif_lightning.models.fsdp2 import GatheredPolicy, shard
from rlif_lightning.models.hub import load_config
from rlif_lightning.models.identity import Identity, adapter_mark, fingerprint
from rlif_lightning.models.loading import PolicySettings, load_model
from rlif_lightning.models.lora import find_adapter, off_is_the_start
from rlif_lightning.models.precision import autocast, check_trains, convert, frozen_dtype
from rlif_lightning.models.quantization import check_quantization, check_trainable
from rlif_lightning.models.references import ReferenceKind, References, frozen_copy, frozen_shares
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.models.tokenizer import check_ids, end_token_ids
from rlif_lightning.models.trainable import trainable
from rlif_lightning.models.weight_files import check_finite
from rlif_lightning.models.weight_names import misfit, shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")


@dataclass(eq=False)
class Policy:
    """A causal language model that completes prompts and may train; see :meth:`load`."""

    settings: PolicySettings  # by which it was loaded, with the LoRA settings of a stored adapter
    model: Any  # the weights, an nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    end_ids: list[int]  # every token id that ends a completion
    stop: StopStrings | None  # strings that end it as well
    identity: Identity
    device: torch.device  # where the weights will lie; they are loaded on the CPU and moved later
    precision: str  # of a forward, as trainer.precision
    dtype: torch.dtype  # of frozen weights, and of the linear layers in a frozen copy
    can_train: bool  # loaded in the precision that training needs
    references: References = field(default_factory=References)
    gathered: GatheredPolicy | None = None  # to sample from, where processes share the weights out

    @classmethod
    def load(
        cls,
        settings: PolicySettings,
        device: torch.device = CPU,
        precision: str = "32-true",
        training: bool = False,
        *,
        sharded: bool = False,
        dtype: torch.dtype | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> "Policy":
        """Load a model with what belongs to it.

        Args:
            settings: Which model, and how.
            device: Where the weights will lie: those in 4 bits at once, others after :meth:`move`.
            precision: As ``trainer.precision``.
            training: Weights that are to train are loaded in float32, others in the precision's dtype.
            sharded: Whether processes are to share the weights out afterwards.
            dtype: Of weights that do not train, in place of the precision's.
            tokenizer: The model's, where it is there already.

        Raises:
            UserError: No such model or adapter, a precision that rounds updates away, or parts that do not fit; all
                before weights are read where that is possible.
        """
        if training:
            check_trains(precision)
        autocast(precision, device)  # refuses a precision that only a Trainer has
        stored = None if settings.adapter is None else find_adapter(settings.adapter)
        if stored is not None:
            settings = replace(settings, lora=stored.lora)
        adapts, frozen = settings.lora is not None, dtype or frozen_dtype(precision)
        if settings.quantization is not None:
            check_quantization(device, sharded)
        if training:
            check_trainable(settings.quantization, adapts, load_config(settings.name, **settings.source))
        tokenizer = tokenizer or settings.load_tokenizer()
        stop = StopStrings(settings.stop, tokenizer) if settings.stop else None
        model = load_model(settings, torch.float32 if training and not adapts else frozen, stored, device)
        mark = "" if stored is None else adapter_mark(model)
        own = (settings.lora, settings.adapter, mark, settings.quantization)
        identity = Identity(settings.name, fingerprint(model), *own)
        generation = getattr(model, "generation_config", None)
        ends = end_token_ids(tokenizer, generation, settings.end_tokens, settings.turn_end)
        policy = cls(settings, model, tokenizer, ends, stop, identity, device, precision, frozen, training)
        check_ids(model, [*ends, policy.pad_id])
        if device.type == "cpu":
            use_one_thread_if_tiny(model)
            if training:
                recommend_bfloat16(model, precision)
        return policy

    @property
    def pad_id(self) -> int:
        """The token id that fills up shorter texts; always masked."""
        return int(self.tokenizer.pad_token_id)

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Completions as text, without special tokens and without what follows a stop string in the last token."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts if self.stop is None else [self.stop.cut(text) for text in texts]

    def move(self) -> None:
        """Bring weights and references onto the device and into the precision, as the Trainer does."""
        for part in (self.model, self.references):
            convert(part, self.precision, self.device)

    def clock(self) -> float:
        """Seconds, when all work given to the device so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def shard(self, mesh: DeviceMesh) -> None:
        """Share the weights out over a mesh [processes]."""
        self.gathered = GatheredPolicy(self.model, self.device, self.dtype)
        shard(self.model, mesh)

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """Dropout and gradients off, the precision on; yields the model to sample from.

        Weights that processes share out are gathered: all processes must enter it equally often. Gradients are freed:
        the sampler needs their memory more.
        """
        self.model.zero_grad(set_to_none=True)
        set_training_mode(self.model, training=False)
        whole = nullcontext(self.model) if self.gathered is None else self.gathered.current(self.model)
        with torch.no_grad(), autocast(self.precision, self.device), whole as model:
            yield model

    def make_references(self, kinds: Iterable[ReferenceKind], ema_decay: float = 0.99, every: int = 100) -> None:
        """Copy what is needed from the policy as it is now: after :meth:`shard`, before the first update.

        The running mean keeps ``ema_decay`` of its own weights at each optimiser step; the synchronised reference is
        renewed ``every`` so many.
        """
        self.references = References(ema_decay, every)
        switched = off_is_the_start(self.settings.lora, self.settings.adapter)
        copied = frozen_copy if self.gathered is None else frozen_shares
        self.references.create(kinds, self.model, self.dtype, self.device, switched, copied)

    def reference(self, kind: ReferenceKind) -> AbstractContextManager[nn.Module]:
        """The policy as it was at the start (``frozen``), as a running mean (``ema``), or ``synced``."""
        if self.gathered is not None:
            return self.gathered.reference(kind, self.references, self.model)
        return self.references.using(kind, self.model)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse the weights of another model, or NaN among them, with a :class:`UserError`."""
        weights = weights_of(checkpoint)
        wrong = misfit(shapes(trainable(self.model)), shapes(weights))
        self.identity.check(identity_of(checkpoint), wrong, self.can_train)
        check_finite(weights.items(), "the checkpoint")

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the weights of a checkpoint, unless it is another model's."""
        self.check_checkpoint(checkpoint)
        self.model.load_state_dict(weights_of(checkpoint), strict=False)


def set_training_mode(model: nn.Module, training: bool) -> None:
    """Switch between sampling and training without switching dropout on.

    Gradient checkpointing asks each decoder layer whether it trains, dropout asks the dropout module and the
    attention: so only the decoder layers themselves are told.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = training
