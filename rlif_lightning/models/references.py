"""What the policy is held against: itself at the start (frozen), its running mean, or a copy renewed at times."""

import copy
import re
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
ANNOTATORS: dict[ReferenceKind, str] = {"frozen": "reference", "ema": "ema"}
"""References whose statistics a reward may require, and what it calls them."""


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


def frozen_shares(policy: nn.Module, dtype: torch.dtype) -> "Snapshot":
    """As :func:`frozen_copy`, of a policy whose weights processes share out: the shares alone."""
    rounded = linear_weights(policy)
    snapshot = Snapshot(dict(policy.named_parameters()))
    for name, weight in zip(snapshot.names, snapshot.weights, strict=True):
        if name in rounded:
            weight.data = weight.data.to(dtype)
    return snapshot


def linear_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that autocast rounds: those of linear layers, but for a head that is the embedding."""
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    linear.discard(id(model.get_input_embeddings().weight))  # type: ignore[operator]
    return {name for name, p in model.named_parameters() if id(p) in linear}


class Snapshot(nn.Module):
    """Weights of a policy by name, mostly its trainable ones, as they were, or as a running mean.

    They take the place of the policy's own for a moment, so a reference costs the memory of the trainable weights
    and no second model. Parameters, so that they move between devices with the module; without gradients, so
    that neither the optimiser nor the checkpoint's list of trainable weights sees them.
    """

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(weights)
        copies = (nn.Parameter(p.detach().clone(), requires_grad=False) for p in weights.values())
        self.weights = nn.ParameterList(copies)

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
        torch.clear_autocast_cache()  # it knows tensors by identity and would keep the old values


class References(nn.Module):
    """The references that a run asks for, frozen, as a running mean or synchronised; first none of them.

    The running mean keeps ``ema_decay`` of its weights at each step; ``renew_every`` so many the other is renewed.
    """

    def __init__(self, ema_decay: float = 0.99, renew_every: int = 100) -> None:
        super().__init__()
        self.ema_decay, self.renew_every = ema_decay, renew_every
        self.frozen: nn.Module | None = None  # a copy; None under LoRA
        self.snapshots: Any = nn.ModuleDict()  # "ema", "synced"; "frozen" where an adapter was trained before

    def create(
        self,
        kinds: Iterable[ReferenceKind],
        policy: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        switched: bool = False,
        copied: Callable[[nn.Module, torch.dtype], nn.Module] = frozen_copy,
    ) -> None:
        """Copy what is needed from a policy that was just loaded and will lie on a device, if it has the memory.

        A frozen copy's linear layers get the dtype; ``switched``: the policy without its adapter needs no copy.
        """
        copies = [kind for kind in sorted(kinds) if kind != "frozen" or not switched]
        if not copies:
            return
        needed, free = _bytes(trainable(policy).values()) * len(copies), free_memory(device)
        if next(policy.parameters()).device != device:  # the policy itself has yet to get there
            needed += _bytes(policy.parameters())
        if free is not None and needed > free:
            raise UserError(
                f"There is not enough memory for copies of the policy's weights as references ({', '.join(copies)})",
                got=f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free on {device}",
                do="train an adapter (model.lora), or go without: model.kl_coefficient 0, rewards by the policy",
            )
        if "frozen" in copies and not hasattr(policy, "disable_adapter"):
            self.frozen = copied(policy, dtype)
            copies.remove("frozen")
        self.snapshots.update({kind: Snapshot(trainable(policy)) for kind in copies})

    @contextmanager
    def using(self, kind: ReferenceKind, policy: nn.Module) -> Iterator[nn.Module]:
        """A reference: a model of its own, or the policy with other weights for a moment."""
        if kind in self.snapshots:
            with self.snapshots[kind].in_place(policy) as model:
                yield model
        elif kind == "frozen" and self.frozen is not None:
            yield self.frozen
        elif kind != "frozen" or not hasattr(policy, "disable_adapter"):
            do = f"call make_references(['{kind}']) of the policy before its first update"
            raise UserError(f"The policy has no {kind} reference", do=do)
        else:
            with adapter_off(policy) as model:
                yield model

    def update_after_step(self, policy: nn.Module, step: int) -> None:
        """Follow the policy after its optimiser step of this number."""
        if "ema" in self.snapshots:
            self.snapshots["ema"].move_towards(policy, self.ema_decay)
        if "synced" in self.snapshots and step % self.renew_every == 0:
            self.snapshots["synced"].move_towards(policy, 0)

    def to_checkpoint(self, keep: bool = True) -> dict[str, Any]:
        """What a resumed run needs: on this process or not; where weights are shared out, to be called on all."""
        return {kind: gather_all(snapshot.state_dict(), keep) for kind, snapshot in self.snapshots.items()}

    def from_checkpoint(self, stored: dict[str, Any]) -> None:
        """Continue from there, unless the run began without one of the references."""
        for kind, snapshot in self.snapshots.items():
            if kind in stored:
                for name, weight in snapshot.named_parameters():
                    write_shard(weight, stored[kind][name])
            elif kind != "frozen":  # which weights that the guard has kept lack: they are evaluated only
                raise UserError(
                    f"The checkpoint holds no {kind} reference",
                    expected="the model.reference and the rewards' annotators that the run began with",
                    do="continue with those, or begin a new run",
                )


def _bytes(weights: Iterable[nn.Parameter]) -> int:
    return sum(local_shard(w).numel() * w.element_size() for w in weights)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where nobody knows."""
    if device.type == "cuda":
        # What torch has kept from before and does not use can be taken again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
    return int(found[1]) * 1024 if found else None
