"""``rlif export``: write a run's weights as a Hugging Face folder or a PEFT adapter, with a model card.

``rlif export RUN`` takes a run folder, ``rlif export --config RECIPE`` the newest run of a recipe.
"""

from pathlib import Path
from typing import Any, Literal

from rlif_lightning.errors import UserError
from rlif_lightning.runs.folder import CHECKPOINTS, CONFIG, find_checkpoint

Dtype = Literal["float32", "bfloat16", "float16"]


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: The words after ``rlif export``.

    Raises:
        UserError: The words are wrong, there are no such weights, or the export computes something else.
    """
    words = _run_words(args)  # before torch is imported
    from rlif_lightning.cli.recipe_objects import load
    from rlif_lightning.commands.export_cli import ExportCLI
    from rlif_lightning.commands.export_write import Exporting

    description = (
        "Write a run's weights as a folder that transformers, PEFT and vLLM load. "
        "rlif export RUN takes a run folder, rlif export --config RECIPE the recipe's newest run."
    )
    objects = load("export", words, _options, description, ExportCLI)
    folder = Exporting(objects).write()
    print(f"written: {folder}")
    name = objects.options.push_to_hub
    if name is not None:
        from rlif_lightning.exporting.hub import push

        print(f"pushed: {push(folder, name)}")


def _run_words(args: list[str]) -> list[str]:
    """A run folder as the settings that it holds."""
    if not args or args[0].startswith("-"):
        return args
    run = Path(args[0]).expanduser()
    if not (run / CONFIG).is_file():
        inside = sorted(p.parent for depth in ("*", "*/*") for p in run.glob(f"{depth}/{CONFIG}"))
        raise UserError(
            f"This is not a run folder: it has no {CONFIG}" if run.is_dir() else "The run folder does not exist",
            got=run,
            expected="a run folder such as runs/quickstart/1",
            do=f"name one of {', '.join(map(str, inside[:8]))}"
            if inside
            else "correct the path; rlif fit makes runs",
        )
    if not (run / CHECKPOINTS).is_dir():
        find_checkpoint(str(run), run.parent.parent, run.parent.name)  # says that it is a run without
    # A continued run's settings name the checkpoint that it began with.
    return ["--config", str(run / CONFIG), "--ckpt_path=null", *args[1:]]


def _options(parser: Any) -> None:
    from rlif_lightning.exporting.weights import Format

    parser.add_argument(
        "--format",
        type=Format,
        default="merged",
        help="A whole model with any adapter merged in, or the adapter alone as PEFT writes it.",
    )
    parser.add_argument(
        "--dtype",
        type=Dtype | None,
        default=None,
        help="Of a merged model's weights. null: that of the run's precision.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder of the export; an earlier export there is replaced. null: <run>/export/<format>.",
    )
    parser.add_argument(
        "--push_to_hub",
        type=str | None,
        default=None,
        help="Also upload the folder to this repository, such as you/model; a new one is private.",
    )
