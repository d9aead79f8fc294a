"""The trainable weights of a policy, all of them or its adapter, kept by name: in memory and in a file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rlif_lightning.errors import UserError
from rlif_lightning.run_folder import replacing

Weights = dict[str, Tensor]


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The policy's trainable weights by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def trainable_weights(policy: nn.Module) -> Weights:
    """Copies on the CPU, by the names of ``policy.named_parameters()``."""
    return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in trainable(policy).items()}


def put_weights(policy: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into the policy, in place: its optimiser keeps its parameters.

    Raises:
        UserError: They are not the trainable weights of this policy.
    """
    own = trainable(policy)
    if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in weights.items()}:
        other = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        raise UserError(
            "The weights do not belong to this model",
            got=f"{len(weights)} weights; others here and there: {', '.join(other[:3])}",
            expected=f"the {len(own)} trainable weights of the policy",
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def save_trainable(weights: Mapping[str, Tensor], path: Path, **metadata: object) -> None:
    """Write weights as safetensors, whole or not at all, with facts about them as text."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        save_file(dict(weights), file.name, {key: str(value) for key, value in metadata.items()})


def load_trainable(path: Path) -> tuple[Weights, dict[str, str]]:
    """Read weights and what is said about them.

    Raises:
        UserError: No such file, or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError("The weights can't be read", got=f"{path}: {error}") from error
