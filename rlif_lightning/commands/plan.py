"""``rlif plan``: memory of a recipe before anything is loaded, and what it fits on."""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.cli.parser import RecipeFile
from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.cli.strangers import TRUST, add_trust
from rlif_lightning.errors import UserError, writing
from rlif_lightning.models.precision import precision_name
from rlif_lightning.planning.devices import SIZES, fits, parse_device, usable
from rlif_lightning.planning.figure import draw_plan
from rlif_lightning.planning.memory import GIB, Memory, memory
from rlif_lightning.planning.settings import Settings
from rlif_lightning.planning.settings_to_change import settings_to_change, what_to_do
from rlif_lightning.planning.text import change_lines, fits_line, head_lines, memory_table


def main(arguments: list[str]) -> None:
    """Run the command: no weights are loaded, no data are read. Exit code 1: it does not fit on the device named."""
    settings, options = read_recipe(arguments)
    held = fits(settings)
    size: float = next((s for s in SIZES if held[s]), SIZES[-1])
    if options.device is not None:
        size = parse_device(options.device)
    plan = memory(settings, usable(size))
    changes = settings_to_change(settings, plan, usable(size))
    head = head_lines(settings, plan)
    print("\n".join([*head, "", memory_table(plan), "", fits_line(held), *change_lines(changes, plan.peak)]))
    if options.picture is not None:
        draw_plan(plan, "\n".join(head[:2]), Path(options.picture), size)
        print(f"written: {options.picture}")
    if options.json is not None:
        _write_json(options.json, plan, settings, held)
        print(f"written: {options.json}")
    if options.device is not None and plan.peak > usable(size):
        too_large = UserError(
            f"The recipe does not fit on {size:g} GB",
            got=f"a peak of {plan.peak / GIB:.1f} GiB, in the phase '{plan.worst}'",
            expected=f"at most {usable(size) / GIB:.1f} GiB, what driver and fragments leave",
            do=what_to_do(changes, usable(size)) or "take a larger GPU or a smaller model",
        )
        print(f"error: {too_large}", file=sys.stderr)
        raise SystemExit(1)


def read_recipe(arguments: list[str]) -> tuple[Settings, Any]:
    """The settings of a recipe, and the command's own options."""
    logging.disable(logging.INFO)  # nothing about this machine's devices, and seeds
    try:
        cli = _PlanCLI("plan", arguments, _options)
    finally:
        logging.disable(logging.NOTSET)
    if RecipeFile.strange:
        left_out = ", ".join(RecipeFile.strange)
        rank_zero_warn(
            f"Left out of the plan, as a run may be a stranger's: {left_out}. {TRUST} imports its classes."
        )
    trainer = cli.config.trainer
    processes = device_count(trainer.devices) * int(trainer.num_nodes)
    strategy = str(getattr(trainer.strategy, "class_path", trainer.strategy))
    settings = plan_settings(
        cli.module,
        cli.collector,
        precision=precision_name(trainer.precision),
        prompt_tokens=cli.data.max_prompt_tokens,
        processes=processes,
        shards=processes if "fsdp2" in strategy.lower() else 1,
    )
    return settings, cli.options


class _PlanCLI(RecipeObjects):
    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Nothing: the recipe's Trainer may need a GPU that this machine does not have."""


def _options(parser: Any) -> None:
    for name, text in (
        ("device", "Memory or name of the GPU: 24GB, rtx3060. The command fails where the recipe does not fit."),
        ("picture", "File for a picture of the memory by phase."),
        ("json", "File for all numbers, in bytes."),
    ):
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    add_trust(parser)


def _write_json(path: str, plan: Memory, settings: Settings, held: dict[int, bool]) -> None:
    report = {"model": settings.model, "phases": plan.phases, "peak": plan.peak}
    report |= {"weights": asdict(plan.weights), "rows": plan.rows, "fits": held}
    try:
        with writing(path):
            Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        got = f"{path}: {error.strerror}"
        raise UserError("The file cannot be written", got=got, do="choose another --json") from error


def device_count(devices: Any) -> int:
    """Processes on a machine; ``auto`` and -1 are counted as one, since a plan is for no machine."""
    if devices in ("auto", -1, "-1"):
        return 1
    text = str(devices)
    if isinstance(devices, list) or "," in text:
        return len([word for word in text.strip("[] ").split(",") if word.strip()])
    if not text.isdigit() or int(text) < 1:
        raise UserError("trainer.devices is not a number", got=devices, do="set --trainer.devices 1")
    return int(text)
