"""``rlif plan``: memory and time of a recipe before anything is loaded, and what it fits on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlif_lightning.errors import UserError

if TYPE_CHECKING:
    from rlif_lightning.planning.settings import Settings


def main(arguments: list[str]) -> None:
    """Run the command. No weights are loaded and no data are read.

    Args:
        arguments: The words after ``rlif plan``.

    Raises:
        UserError: The words are wrong, or the model's config.json can't be found.
        SystemExit: With 1 where the recipe does not fit on the device that was named.
    """
    settings, options = read(arguments)
    from rlif_lightning.planning.advice import advise, fits
    from rlif_lightning.planning.devices import GPUS, SIZES, parse_device, seconds
    from rlif_lightning.planning.memory import memory, usable
    from rlif_lightning.planning.text import advice_lines, fits_line, gpu_title, head_lines, memory_table, time_lines

    held = fits(settings)
    size: float = next((s for s in SIZES if held[s]), SIZES[-1])
    gpu = None
    if options.device is not None:
        size, gpu = parse_device(options.device)
    plan = memory(settings, usable(size))
    good = plan.peak <= usable(size)
    print("\n".join(head_lines(settings, plan)) + "\n")
    print(memory_table(plan) + "\n")
    print(fits_line(held))
    for line in advice_lines(advise(settings, plan, usable(size)), plan.peak):
        print(line)
    chosen = [gpu] if gpu is not None else [g for g in GPUS.values() if held[g.gigabytes]]
    times = {gpu_title(g): seconds(settings, memory(settings, usable(g.gigabytes)), g) for g in chosen}
    if settings.half is not None and times:
        print("\n" + "\n".join(time_lines(times, settings.steps)))
    _write(options, plan, settings, held, size, times)
    if not good and options.device is not None:
        _refuse(settings, size)


def read(arguments: list[str]) -> tuple[Settings, Any]:
    """The settings of a recipe, and the command's own options."""
    from rlif_lightning.cli.environment import prepare
    from rlif_lightning.commands.plan_cli import PlanCLI
    from rlif_lightning.warnings_shown import lightning_warns_only

    prepare()
    with lightning_warns_only():  # nothing about this machine's devices, and seeds
        cli = PlanCLI("plan", arguments, _options, "Memory and time of a recipe, before anything is loaded.")
        return cli.plan_settings(), cli.config_init


def _options(parser: Any) -> None:
    parser.add_argument("--device", type=str | None, default=None,
                        help="Memory or name of the GPU: 24GB, rtx3060. The command fails where the recipe does not "
                        "fit; null: the smallest that does.")  # fmt: skip
    parser.add_argument("--picture", type=str | None, default=None, help="Draw the memory by phase into this file.")
    parser.add_argument("--json", type=str | None, default=None, help="Write all numbers, in bytes and seconds.")


def _write(options: Any, plan: Any, settings: Settings, held: dict[int, bool], size: float, times: Any) -> None:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from rlif_lightning.planning.figure import draw_plan
    from rlif_lightning.planning.text import head_lines

    if options.picture is not None:
        draw_plan(plan, "\n".join(head_lines(settings, plan)[:2]), Path(options.picture), size)
        print(f"written: {options.picture}")
    if options.json is not None:
        report = {
            "model": settings.model,
            "phases": plan.phases,
            "peak": plan.peak,
            "weights": asdict(plan.weights),
            "rows": plan.rows,
            "fits": held,
            "seconds": times,
        }
        try:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                "The file cannot be written", got=f"{options.json}: {error.strerror}", do="choose another --json"
            ) from error
        print(f"written: {options.json}")


def _refuse(settings: Settings, size: float) -> None:
    """Say what would fit.

    Raises:
        SystemExit: Always.
    """
    import sys

    from rlif_lightning.planning.advice import make_fit
    from rlif_lightning.planning.memory import GIB, memory, usable

    available = usable(size)
    peak = memory(settings, available).peak
    turned, plan = make_fit(settings, available)
    lines = [
        f"error: The recipe does not fit on {size:g} GB",
        f"  got: a peak of {peak / GIB:.1f} GiB, in the phase '{memory(settings, available).worst}'",
        f"  expected: at most {available / GIB:.1f} GiB, what driver and fragments leave",
    ]
    words = " ".join(knob.words for knob in turned)
    if plan.peak <= available:
        lines.append(f"  do: {words} (peak {plan.peak / GIB:.1f} GiB)")
    else:
        lines.append(
            f"  do: take a larger GPU or a smaller model; all knobs turned ({words}) leave {plan.peak / GIB:.1f} GiB"
        )
    print("\n".join(lines), file=sys.stderr)
    raise SystemExit(1)
