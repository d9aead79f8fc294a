"""``guard.json``: what the guard has seen, decided and done."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlif_lightning.guard.rule import CollapseRule
from rlif_lightning.runs.atomic import replacing


def write_decision(
    path: Path,
    rule: CollapseRule,
    *,
    action: str,
    settings: dict[str, Any],
    weights: str | None,
    taken: str,
    accuracy: dict[str, dict[str, float]],
) -> None:
    """Write one key per line.

    Args:
        path: The file.
        rule: Its signals and its decision.
        action: What the guard is to do.
        settings: Of the rule.
        weights: The file of the weights to hand back, where they are kept.
        taken: What the guard has done.
        accuracy: ``val/*`` at the start, of the weights handed back, and at the end, as far as known.
    """
    fired = rule.fired
    decision = {
        "action": action,
        "settings": settings,
        "fired": None if fired is None else {**asdict(fired), "reason": fired.reason},
        "best_step": rule.best_step,
        "handed_back_step": rule.best_step,
        "weights": weights,
        "taken": taken,
        "accuracy": accuracy,
        "signals": {
            w.signal: {"steps": w.steps, "raw": w.raw, "smoothed": w.smoothed} for w in rule.watches if w.steps
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in decision.items()]
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
