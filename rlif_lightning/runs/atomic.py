"""Files and folders that are replaced as a whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlif_lightning.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file next to ``path`` that takes its place when the block ends without an error.

    At every moment, and after a kill, ``path`` is either the old file or the complete new one.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder next to ``folder`` that takes its place when the block ends without an error."""
    unfinished, old = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "old"))
    try:
        for left in (unfinished, old):  # of a command that was killed
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            folder.rename(old)
        unfinished.rename(folder)
    finally:
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the rows of a JSON-lines file whose "step" is below ``step``; a missing file stays missing.

    Rows that are kept stay byte for byte. A last line that a kill has cut short is dropped.

    Raises:
        UserError: A line that is not the last is no JSON object with a "step".
    """
    if not Path(path).exists():
        return
    with path.open("rb") as rows, replacing(path) as kept:
        for number, line in enumerate(rows, start=1):
            try:
                if json.loads(line)["step"] < step:
                    kept.write(line.rstrip(b"\n") + b"\n")
            except (ValueError, TypeError, KeyError) as error:
                if not line.endswith(b"\n"):
                    break  # only the last line can lack its end
                raise UserError(
                    f"{path} cannot be cut back to step {step}: line {number} is damaged.",
                    got=line[:80].decode(errors="replace").rstrip("\n"),
                    expected='one JSON object per line, with a "step"',
                    do=f"mend or remove line {number}",
                ) from error
