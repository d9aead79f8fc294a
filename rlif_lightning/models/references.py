"""What the policy is held against: itself at the start (frozen), its running mean, or a copy renewed at times."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.models.lora import adapter_off
from rlif_lightning.models.trainable import gather_all, local_shard, trainable, write_shard

ReferenceKind = Literal["frozen", "ema", "synced"]


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the policy as it stands, without gradients, its linear layers in a given dtype.

    Only those: autocast rounds them alike in the policy, while embeddings and norms keep the residual stream in
    float32. So under autocast, where alone it may run if the dtype is a half one, the copy computes exactly what
    the policy did.
    """
    reference = copy.deepcopy(model)
    rounded = linear_weights(model)
    for name, weight in reference.named_parameters():
        if name in rounded:
            weight.data = weight.data.to(dtype)
    return reference.requires_grad_(False).eval()


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that autocast rounds: those of linear layers, but for a head that is the embedding."""
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    linear.discard(id(model.get_input_embeddings().weight))  # type: ignore[operator]
    return {name for name, p in model.named_parameters() if id(p) in linear}


class Snapshot(nn.Module):
    """The trainable weights of a policy (all of them, or its adapter) as they were, or as a running mean.

    They take the place of the policy's own for a moment, so a reference costs the memory of the trainable weights
    and no second model. Parameters, so that they move between devices with the module; without gradients, so
    that neither the optimiser nor the checkpoint's list of trainable weights sees them.

    Args:
        policy: Whose weights, as they are now.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in trainable(policy).values()
        )

    @torch.no_grad()
    def move_towards(self, policy: nn.Module, decay: float) -> None:
        """Become decay x own + (1 - decay) x policy's weights; a decay of 0 copies them."""
        for own, new in zip(self.weights, trainable(policy).values(), strict=True):
            mine, its = local_shard(own), local_shard(new)
            mine.copy_(its) if decay == 0 else mine.lerp_(its, 1 - decay)

    @contextmanager
    def in_place(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy with these weights; its own are back afterwards, bit by bit."""
        self._swap(policy)
        try:
            yield policy
        finally:
            self._swap(policy)

    def _swap(self, policy: nn.Module) -> None:
        for own, other in zip(self.weights, trainable(policy).values(), strict=True):
            own.data, other.data = other.data, own.data
        torch.clear_autocast_cache()  # it knows tensors by identity and would go on with the old values


class References(nn.Module):
    """The references that a run asks for, frozen, as a running mean or synchronised; first none of them.

    Args:
        ema_decay: Share of its own weights that the running mean keeps at each optimiser step.
        renew_every: Optimiser steps between two renewals of the synchronised reference.
    """

    def __init__(self, ema_decay: float = 0.99, renew_every: int = 100) -> None:
        super().__init__()
        self.ema_decay, self.renew_every = ema_decay, renew_every
        self.frozen: nn.Module | None = None  # a copy; None under LoRA
        self.snapshots = nn.ModuleDict()  # "ema", "synced"; "frozen" where an adapter was trained before

    def create(
        self,
        kinds: Iterable[ReferenceKind],
        policy: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        switched: bool = False,
        copied: Callable[[nn.Module, torch.dtype], nn.Module] = frozen_copy,
    ) -> None:
        """Copy what is needed from the policy as it is now.

        Args:
            kinds: Which.
            policy: Just loaded.
            dtype: Of a frozen copy's linear layers.
            device: Where everything will lie.
            switched: Whether the policy without its adapter is what it is now, so that ``frozen`` needs no copy.
            copied: Makes the frozen copy of a policy whose weights all train.

        Raises:
            UserError: The memory for it is not there.
        """
        copies = [kind for kind in sorted(kinds) if kind != "frozen" or not switched]
        if not copies:
            return
        moves = next(policy.parameters()).device != device  # the policy itself has yet to get there
        check_memory(
            _bytes(trainable(policy).values()) * len(copies) + moves * _bytes(policy.parameters()),
            device,
            f"other versions of the policy's weights ({', '.join(copies)})",
            "train an adapter (model.lora), or go without: model.kl_coefficient 0, rewards with annotator policy",
        )
        if "frozen" in copies and not hasattr(policy, "disable_adapter"):
            self.frozen = copied(policy, dtype)
            copies.remove("frozen")
        self.snapshots.update({kind: Snapshot(policy) for kind in copies})

    @contextmanager
    def using(self, kind: ReferenceKind, policy: nn.Module) -> Iterator[nn.Module]:
        """A reference: a model of its own, or the policy with other weights for a moment."""
        if kind in self.snapshots:
            with self._snapshot(kind).in_place(policy) as model:
                yield model
        elif self.frozen is not None:
            yield self.frozen
        else:
            with adapter_off(policy) as model:
                yield model

    def update_after_step(self, policy: nn.Module, step: int) -> None:
        """Follow the policy after its optimiser step of this number."""
        if "ema" in self.snapshots:
            self._snapshot("ema").move_towards(policy, self.ema_decay)
        if "synced" in self.snapshots and step % self.renew_every == 0:
            self._snapshot("synced").move_towards(policy, 0)

    def to_checkpoint(self, keep: bool = True) -> dict[str, Any]:
        """What a resumed run needs.

        Args:
            keep: Whether on this process; where weights are shared out, to be called on all.
        """
        return {kind: gather_all(snapshot.state_dict(), keep) for kind, snapshot in self.snapshots.items()}

    def from_checkpoint(self, stored: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: The run began without one of the references.
        """
        for kind, snapshot in self.snapshots.items():
            if kind not in stored and kind == "frozen":  # weights that the guard has kept, to be evaluated
                continue
            if kind not in stored:
                raise UserError(
                    f"The checkpoint holds no {kind} version of the policy",
                    expected="the model.reference and the rewards' annotators that the run began with",
                    do="continue with those, or begin a new run",
                )
            for name, weight in snapshot.named_parameters():
                write_shard(weight, stored[kind][name])

    def _snapshot(self, kind: str) -> Snapshot:
        snapshot = self.snapshots[kind]
        assert isinstance(snapshot, Snapshot)
        return snapshot


def _bytes(weights: Iterable[nn.Parameter]) -> int:
    return sum(local_shard(w).numel() * w.element_size() for w in weights)


def check_memory(needed: int, device: torch.device, what: str, instead: str) -> None:
    """Refuse copies of so many bytes that don't fit, before they are made.

    Raises:
        UserError: Less than that is free.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"There is no memory for {what}",
            got=f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free on {device}",
            do=instead,
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where nobody knows."""
    if device.type == "cuda":
        # What torch has kept from before and does not use can be taken again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available = fields.get("MemAvailable")
    return int(available.split()[0]) * 1024 if available else None
