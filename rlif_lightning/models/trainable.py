"""The trainable weights of a policy, all of them or its adapter, kept by name: in memory and in a file.

Processes may share each weight out (see ``fsdp2.py``): the copies are whole, and making them takes all processes.
"""

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rlif_lightning.errors import UserError
from rlif_lightning.models.weight_names import misfit, shapes
from rlif_lightning.runs.atomic import replacing

Weights = dict[str, Tensor]
CHECKSUM = "crc32"  # among the facts in a file of weights


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The policy's trainable weights by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def trainable_weights(policy: nn.Module, keep: bool = True) -> Weights:
    """Copies on the CPU, by the names of ``policy.named_parameters()``; see :func:`gather_all`."""
    return gather_all(trainable(policy), keep, lambda weight: weight.detach().to("cpu", copy=True).contiguous())


def gather(weight: Tensor) -> Tensor:
    """A weight of which this process may hold a share only, gathered from all processes: to be called on all."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def gather_all(
    values: Mapping[Any, Any], keep: bool = True, kept: Callable[[Any], Any] = lambda value: value
) -> dict[Any, Any]:
    """Values in one piece: tensors that are shared out go to the CPU one at a time, all else stays as it is.

    To be called on all processes; one that keeps none gathers for the others only.
    """
    whole = {}
    for name, value in values.items():
        full = gather(value.detach()) if isinstance(value, DTensor) else value
        if keep:
            whole[name] = kept(full.cpu() if isinstance(value, DTensor) else full)
    return whole


def shard_like(weight: Tensor, values: Tensor) -> Tensor:
    """Values in the shape of a weight, or this process's share of them where the weight is shared out."""
    if not isinstance(weight, DTensor):
        return values
    values = values.to(weight.device)
    return distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)


@torch.no_grad()
def write_shard(weight: Tensor, values: Tensor) -> None:
    """Write whole values into a weight, in place."""
    weight.copy_(shard_like(weight, values))


def local_shard(weight: Tensor) -> Tensor:
    """What of a weight lies on this process."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def check_finite_weights(weights: Mapping[str, Tensor], step: int, anywhere: Callable[[bool], bool] = bool) -> None:
    """Refuse weights after an optimiser step that hold NaN or infinity.

    ``anywhere`` says whether something is so on any process, each of which may hold a share only.
    """
    bad = [name for name, weight in weights.items() if not local_shard(weight).isfinite().all()]
    if anywhere(bool(bad)):
        raise UserError(
            f"The weights after step {step} are not finite, so they are not saved",
            got=f"NaN or infinity in {', '.join(bad[:3]) or 'the share of another process'}",
            do="continue with --ckpt_path last and a lower model.optimizer.lr",
        )


def put_weights(policy: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Write whole weights into the policy, in place: its optimiser keeps its parameters.

    To be called on all processes: the weights of the first reach all, and others may have none.
    """
    own = trainable(policy)
    wrong = "" if weights is None else misfit(shapes(own), shapes(weights))
    if wrong:
        expected = f"the {len(own)} trainable weights of the policy"
        raise UserError("The weights do not belong to this model", got=wrong, expected=expected)
    for name, weight in own.items():
        values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        if weights is not None:
            values.copy_(weights[name])
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(values, src=0)
        write_shard(weight, values)


def save_trainable(weights: Mapping[str, Tensor], path: Path, **metadata: object) -> None:
    """Write weights as safetensors, whole or not at all, with facts about them as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {key: str(value) for key, value in (metadata | {CHECKSUM: _checksum(weights)}).items()}
    with replacing(path) as file:
        save_file(dict(weights), file.name, facts)


def _checksum(weights: Mapping[str, Tensor]) -> int:
    """CRC-32 of all values, in the order of the names."""
    total = 0
    for name in sorted(weights):
        values: Any = weights[name].detach().contiguous().view(-1).view(torch.uint8).numpy()
        total = zlib.crc32(values, total)
    return total


def load_trainable(path: Path) -> tuple[Weights, dict[str, str]]:
    """Read weights and what is said about them; a damaged file is refused."""
    try:
        with safe_open(path, framework="pt") as file:
            weights, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if facts.pop(CHECKSUM, None) not in (None, str(_checksum(weights))):
            raise OSError("its weights are not those that were written")
        return weights, facts
    except (OSError, SafetensorError) as error:
        do = "take the run's last checkpoint (--ckpt_path last), or delete the file if it is damaged"
        raise UserError("The weights can't be read", got=f"{path}: {error}", do=do) from error
