"""Files and folders that are replaced as a whole or not at all, and stay so after a power cut."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlif_lightning.errors import DiskFailure, UserError, writing


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file next to ``path`` that takes its place when the block ends without an error.

    At every moment, after a kill and after a power cut, ``path`` is either the old file or the complete new one.
    """
    path = Path(path)
    if path.is_dir():
        raise DiskFailure(path, errno.EISDIR)
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with writing(path):
            with unfinished.open("wb") as file:
                mode = os.fstat(file.fileno()).st_mode
                yield file
            unfinished.chmod(mode)  # safetensors puts a file of its own under the name, which only its owner may read
            sync(unfinished)
            os.replace(unfinished, path)
            sync(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text; what can't be encoded is written by its number."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; a missing one stays missing."""
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows syncs what it may write
    except (FileNotFoundError, PermissionError):  # the latter: a folder on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with source.open("rb") as read, replacing(target) as written:
        shutil.copyfileobj(read, written)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder next to ``folder`` that takes its place when the block ends without an error."""
    unfinished, old = (folder.with_name(f".{folder.name}.{what}") for what in ("unfinished", "old"))
    try:
        for left in (unfinished, old):  # of a command that was killed
            shutil.rmtree(left, ignore_errors=True)
        with writing(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            mode = unfinished.stat().st_mode & 0o666
            for path in unfinished.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors lets only the owner read
                sync(path)
            if folder.exists():
                folder.rename(old)
            unfinished.rename(folder)
            sync(folder.parent)
    finally:
        for left in (unfinished, old):
            shutil.rmtree(left, ignore_errors=True)


def truncate_jsonl(path: Path, step: int) -> None:
    """Keep the rows of a JSON-lines file whose "step" is below ``step``; a missing file stays missing.

    Kept rows stay byte for byte. A last line that a kill has cut short is dropped, another damaged one is refused.
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
