"""The folder of an export: it appears as a whole or not at all, and never replaces anything but an export."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import replacing_folder

EXPORT_FACTS = "rlif_export.json"  # file in every export that says where its weights come from


def check_export_folder(folder: Path, model: str) -> None:
    """Refuse a file, a folder that holds anything but an earlier export, and the base model's own folder."""
    if not folder.exists():
        return
    do = "give another --output"
    if Path(model).is_dir() and folder.samefile(model):
        raise UserError("The export would replace the model that was trained", got=folder, do=do)
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / EXPORT_FACTS).is_file()):
        expected = "no such folder, an empty one, or an earlier export"
        raise UserError("The folder for the export holds something else", got=folder, expected=expected, do=do)


@contextmanager
def export_folder(folder: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder next to the target that takes its place when the block ends without an error, marked by ``facts``."""
    try:
        with replacing_folder(folder) as unfinished:
            yield unfinished
            (unfinished / EXPORT_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        do = "give another --output"
        raise UserError("The export cannot be written", got=f"{folder}: {error}", do=do) from error
