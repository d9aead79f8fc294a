"""Other versions of the policy, to hold it against: frozen at the start, its running mean, or synchronised."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from rlif_lightning.errors import UserError

Version = Literal["frozen", "ema", "synced"]


class Snapshot(nn.Module):
    """The trainable weights of a policy (all of them, or its adapter) as they were, or as a running mean.

    They take the place of the policy's own for a moment, so a version costs the memory of the trainable weights
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
    def follow(self, policy: nn.Module, decay: float) -> None:
        """Move towards the policy: decay x own + (1 - decay) x policy's; 0 copies it."""
        for own, new in zip(self.weights, trainable(policy).values(), strict=True):
            own.copy_(new) if decay == 0 else own.lerp_(new, 1 - decay)

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


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The policy's trainable weights by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def check_memory(needed: int, device: torch.device, what: str, instead: str) -> None:
    """Refuse copies of weights that don't fit, before they are made.

    Args:
        needed: Bytes.
        device: Where they will lie.
        what: They are, in words.
        instead: What the user can do.

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
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available = fields.get("MemAvailable")
    return int(available.split()[0]) * 1024 if available else None
