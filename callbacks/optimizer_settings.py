"""An optimiser's settings when a run continues: what was changed since the checkpoint wins, the rest stays."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def configuration(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimiser and the settings of its groups; the learning rate is that of the start."""
    kind = type(optimizer)
    groups = [
        {**{k: v for k, v in group.items() if k not in ("params", "initial_lr")}}
        | {"lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}


def bring_back(optimizer: Optimizer, now: list[dict[str, Any]], was: list[dict[str, Any]]) -> list[str]:
    """Set what is configured otherwise now than in the checkpoint, and say what that is.

    Everything else stays as restored: an optimiser may keep state of its own next to its settings.
    """
    said = []
    for group, new, old in zip(optimizer.param_groups, now, was, strict=True):
        for key, value in new.items():
            if _differ(value, old.get(key)):
                group["initial_lr" if key == "lr" and "initial_lr" in group else key] = value
                said.append(f"{key} {old.get(key)} -> {value}")
    return said


def _differ(one: Any, other: Any) -> bool:
    return bool(one.ne(other).any()) if isinstance(one, Tensor) else bool(one != other)


def recompute(scheduler: LambdaLR) -> None:
    """Compute the current step's learning rate anew from the schedule as it is configured now.

    If nothing was changed, this is the restored rate to the last bit.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, base, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        lr = base * share(scheduler.last_epoch)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    scheduler._last_lr = [group["lr"] for group in groups]
