"""A policy without a Trainer: weights, tokenizer, end tokens, references, and whose they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rlif_lightning.errors import UserError
from rlif_lightning.models.checkpoints import identity_of, weights_of
from rlif_lightning.models.fsdp2 import FrozenShares, GatheredPolicy, shard
from rlif_lightning.models.hub import from_hub, is_local, load_config, resolve_model
from rlif_lightning.models.identity import Identity, adapter_mark, fingerprint
from rlif_lightning.models.lora import (
    StoredAdapter,
    add_adapter,
    add_lora,
    check_base,
    check_fit,
    check_lora,
    find_adapter,
    off_is_the_start,
)
from rlif_lightning.models.precision import autocast, check_trains, convert, frozen_dtype
from rlif_lightning.models.quantization import (
    Quantization,
    check_quantization,
    check_trainable,
    keep_as_quantised,
    quantization_config,
)
from rlif_lightning.models.references import ReferenceKind, References, frozen_copy
from rlif_lightning.models.tokenizer import check_ids, end_token_ids, load_tokenizer
from rlif_lightning.models.trainable import trainable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PolicySettings:
    """Which model, and how it is loaded.

    Attributes:
        name: ``toy``, a Hugging Face folder or a hub name.
        lora: Fields of ``peft.LoraConfig`` for a fresh adapter.
        adapter: Folder or hub name of one that was trained before, in place of a fresh one.
        quantization: Hold the weights of the linear layers, but for the head, in 4 bits.
        gradient_checkpointing: Recompute the layers' activations in the backward pass.
        end_tokens: Tokens that end a completion besides those of the generation config and the tokenizer.
        attn_implementation: As transformers names it; None: its choice.
        revision: Of a hub repository.
        trust_remote_code: Run Python code that comes with the model.
    """

    name: str
    lora: dict[str, Any] | None = None
    adapter: str | None = None
    quantization: Quantization | None = None
    gradient_checkpointing: bool = False
    end_tokens: Sequence[str] = ()
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse what can be seen to be wrong without the model.

        Raises:
            UserError: Settings of LoRA that peft does not have or that are not supported, or two adapters.
        """
        if self.lora is not None:
            check_lora(self.lora)
        if self.lora is not None and self.adapter is not None:
            raise UserError(
                "model.lora and model.adapter exclude each other: an adapter has settings of its own",
                got=f"model.adapter {self.adapter}, model.lora {self.lora}",
                do="set model.lora to null to train this adapter on, or leave model.adapter out for a fresh one",
            )

    @property
    def source(self) -> dict[str, Any]:
        """Where the model comes from besides its name, for whatever loads a part of it."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer; needs no weights."""
        return load_tokenizer(self.name, **self.source)


@dataclass(eq=False)
class Policy:
    """A causal language model that completes prompts and may train; see :meth:`load`.

    Attributes:
        settings: It was loaded by, with the LoRA settings of a stored adapter.
        model: Its weights.
        tokenizer: Can pad.
        end_ids: Every token id that ends a completion.
        identity: What its trainable weights alone do not say.
        device: Where the weights will lie; they are loaded on the CPU and moved later.
        precision: Of a forward, as ``trainer.precision``.
        dtype: Of frozen weights, and of the linear layers in a frozen copy.
        can_train: Whether it was loaded in the precision that training needs.
        references: What it is held against.
        gathered: The copy to sample from where processes share the weights out.
    """

    settings: PolicySettings
    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    end_ids: list[int]
    identity: Identity
    device: torch.device
    precision: str
    dtype: torch.dtype
    can_train: bool
    references: References = field(default_factory=References)
    gathered: GatheredPolicy | None = None

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
        """Load a causal language model from safetensors, with a LoRA adapter where asked.

        Args:
            settings: Which model, and how.
            device: Where the weights will lie. Those in 4 bits are made there piece by piece; others are loaded on
                the CPU, see :meth:`move`.
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
        stored = None if settings.adapter is None else find_adapter(settings.adapter)
        if stored is not None:
            settings = replace(settings, lora=stored.lora)
        adapts, frozen = settings.lora is not None, dtype or frozen_dtype(precision)
        if settings.quantization is not None:
            check_quantization(device, sharded)
        if training:
            check_trainable(settings.quantization, adapts, load_config(settings.name, **settings.source))
        model = _load_model(settings, torch.float32 if training and not adapts else frozen, stored, device)
        identity = Identity(
            settings.name,
            fingerprint(model),
            settings.lora,
            settings.adapter,
            "" if stored is None else adapter_mark(model),
            settings.quantization,
        )
        tokenizer = tokenizer or settings.load_tokenizer()
        ends = end_token_ids(tokenizer, getattr(model, "generation_config", None), settings.end_tokens)
        policy = cls(settings, model, tokenizer, ends, identity, device, precision, frozen, training)
        check_ids(model, [*ends, policy.pad_id])
        return policy

    @property
    def pad_id(self) -> int:
        """The token id that fills up shorter texts; always masked."""
        return int(self.tokenizer.pad_token_id)

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Completions as text, without special tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def move(self, precision: str) -> None:
        """Bring weights and references onto the device and into the precision, as the Trainer does."""
        for part in (self.model, self.references):
            convert(part, precision)
            part.to(self.device)

    # -- where processes share the weights out ---------------------------------------------------------------

    def shard(self, mesh: DeviceMesh) -> None:
        """Share the weights out.

        Args:
            mesh: [processes].
        """
        self.gathered = GatheredPolicy(self.model, self.device, self.dtype)
        shard(self.model, mesh)

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The model to sample from. Where processes share its weights out they are gathered; no gradients then."""
        return nullcontext(self.model) if self.gathered is None else self.gathered.current(self.model)

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """Dropout and gradients off, the precision on; yields the model to sample from. On all processes as often.

        Gradients are let go of: their memory is worth more to the sampler.
        """
        self.model.zero_grad(set_to_none=True)
        set_training_mode(self.model, training=False)
        with torch.no_grad(), autocast(self.precision, self.device), self.whole() as model:
            yield model

    # -- references ------------------------------------------------------------------------------------------

    def make_references(self, kinds: Iterable[ReferenceKind], ema_decay: float = 0.99, every: int = 100) -> None:
        """Copy what is needed from the policy as it is now: after :meth:`shard`, before the first update.

        Args:
            kinds: Which.
            ema_decay: Share of its own weights that the running mean keeps at each optimiser step.
            every: Optimiser steps between two renewals of the synchronised reference.

        Raises:
            UserError: The memory for it is not there.
        """
        self.references = References(ema_decay, every)
        switched = off_is_the_start(self.settings.lora, self.settings.adapter)
        copied = frozen_copy if self.gathered is None else FrozenShares
        self.references.create(kinds, self.model, self.dtype, self.device, switched, copied)

    def reference(self, kind: ReferenceKind) -> AbstractContextManager[nn.Module]:
        """The policy as it was at the start (``frozen``), as a running mean (``ema``), or ``synced``."""
        if self.gathered is not None:
            return self.gathered.reference(kind, self.references, self.model)
        return self.references.using(kind, self.model)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse the weights of another model.

        Raises:
            UserError: As :meth:`~rlif_lightning.models.identity.Identity.check`, or it is no checkpoint of ours.
        """
        stored = identity_of(checkpoint)
        shapes = {name: weight.shape for name, weight in weights_of(checkpoint).items()}
        own = {name: weight.shape for name, weight in trainable(self.model).items()}
        self.identity.check(stored, own == shapes, self.can_train)

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the weights of a checkpoint.

        Raises:
            UserError: As :meth:`check_checkpoint`.
        """
        self.check_checkpoint(checkpoint)
        self.model.load_state_dict(weights_of(checkpoint), strict=False)


def _load_model(
    settings: PolicySettings, dtype: torch.dtype, adapter: StoredAdapter | None, device: torch.device
) -> nn.Module:
    """The weights, in eval mode. An adapter is float32; products with 4-bit weights are in the given dtype."""
    from transformers import AutoModelForCausalLM

    path = resolve_model(settings.name)
    if adapter is not None:
        check_base(adapter, settings.name, path)
    if settings.lora is not None:
        check_fit(load_config(settings.name, **settings.source), settings.lora, adapter, settings.trust_remote_code)
    quantised: dict[str, Any] = {}
    if settings.quantization is not None:
        quantised = {"quantization_config": quantization_config(dtype), "device_map": {"": device}}
    model = from_hub(
        "model",
        settings.name,
        lambda: AutoModelForCausalLM.from_pretrained(
            path,
            revision=None if is_local(path) else settings.revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            **quantised,
        ),
    )
    if settings.quantization is not None:
        keep_as_quantised(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # so inputs need no gradient for an adapter's
    if adapter is not None:
        return add_adapter(model, adapter)
    return model if settings.lora is None else add_lora(model, settings.lora)


def set_training_mode(model: nn.Module, training: bool, dropout: bool = False) -> None:
    """Switch between sampling and training without switching dropout on.

    Gradient checkpointing asks each decoder layer whether it trains, dropout asks the dropout module and the
    attention: so only the decoder layers themselves are told, unless dropout is wanted.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(training and dropout)
    if training:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
