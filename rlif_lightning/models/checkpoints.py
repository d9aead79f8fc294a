"""Checkpoint files: written whole or not at all, read without running any code, and whose weights they hold."""

import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import __version__ as lightning_version
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from rlif_lightning.errors import UserError
from rlif_lightning.models.identity import Identity
from rlif_lightning.models.trainable import Weights, load_trainable
from rlif_lightning.runs.atomic import replacing
from rlif_lightning.runs.folder import LAST_CHECKPOINT, numbered_checkpoints

KEPT = ".safetensors"  # the suffix of weights that the collapse guard has kept
OURS = "a checkpoint as `rlif fit` writes it, such as runs/quickstart/1/checkpoints/last.ckpt"
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError, OSError, zipfile.BadZipFile, zlib.error
)  # fmt: skip
MODEL, POLICY = "model.", "policy."  # before a weight's name in a checkpoint, now and once


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target and renames: a full disk or a kill never costs the checkpoint before.

    Lightning writes through the system's temporary folder; moving from there onto a full disk destroys the
    previous file. Loading never runs pickled code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read tensors and plain values only, onto the CPU."""
        return read_checkpoint(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or the weights that the collapse guard has kept, without running any code in it.

    Tensors come from the disk as they are used: many processes may read the file. A later save replaces the file and
    never writes into it, so what was read stays as it was. Its checksums are compared once in a process.
    """
    path = Path(path)
    if path.suffix == KEPT:
        return _kept_by_the_guard(path)
    try:
        return _read_whole(path)
    except UNREADABLE as error:
        whole = ", ".join(map(str, islice(_whole_beside(path), 3)))
        do = "give one, or a run's folder, in --ckpt_path; a model is given in --model.name"
        raise UserError(
            "The checkpoint can't be read",
            got=f"{path}: {_why_unreadable(path, error)}",
            expected=OURS,
            do=f"go back to a whole one beside it: {whole}" if whole else do,
        ) from error


def newest_whole(path: Path) -> Path:
    """A run's checkpoint; where it is damaged the newest one beside it that is whole, which is said.

    :func:`read_checkpoint` refuses the others: the only one of its run, or a folder, which no file can replace.
    """
    try:
        _read_whole(path)
    except IsADirectoryError:
        return path
    except UNREADABLE as error:
        other = next(_whole_beside(path), None)
        if other is not None:
            rank_zero_warn(f"{path} is skipped: {_why_unreadable(path, error)}. {other.name} is taken instead.")
            return other
    return path


def _whole_beside(path: Path) -> Iterator[Path]:
    """Checkpoints of the same run that are whole, the newest first."""
    steps = numbered_checkpoints(path.parent)
    for other in [path.with_name(LAST_CHECKPOINT), *(steps[n] for n in sorted(steps, reverse=True))]:
        if other != path:
            try:
                _read_whole(other)
            except UNREADABLE:
                continue
            yield other


def _read_whole(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):
        file = path.stat()
        part = _damaged_part(path, file.st_ino, file.st_mtime_ns, file.st_size)
        if part is not None:
            raise OSError(f"it is damaged, its part {part} is not what was written")
    return read_unchecked(path)


@lru_cache(maxsize=32)
def _damaged_part(path: Path, *of_the_file: int) -> str | None:
    """The first part of a checkpoint that does not have its checksum: torch writes a CRC-32 of each tensor."""
    with zipfile.ZipFile(path) as parts:
        return parts.testzip()


def read_unchecked(path: Path) -> dict[str, Any]:
    """Read a checkpoint without a look at its checksums, which takes the time to read the whole file."""
    checkpoint = torch.load(path, "cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
        raise TypeError("it holds something else than the state of a training")
    return checkpoint


def _why_unreadable(path: Path, error: Exception) -> object:
    if isinstance(error, OSError | TypeError):
        return getattr(error, "strerror", None) or error
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "the file is empty"
    if start == b"PK" and not zipfile.is_zipfile(path):  # torch.save writes zip files
        return "it was cut short"
    if start == b"PK" and "Weights only load failed" in str(error):
        return "it holds other Python objects, which are not loaded because that could run any code"
    return "it is another kind of file, or damaged"


def _kept_by_the_guard(path: Path) -> dict[str, Any]:
    """Kept weights in the shape of a checkpoint; they come without an optimiser's state."""
    weights, facts = load_trainable(path)
    if not {"step", *Identity.__dataclass_fields__} <= facts.keys():
        raise UserError(
            "The file holds no weights that the collapse guard has kept",
            got=path,
            expected="a checkpoint (.ckpt), or checkpoints/guard/weights.safetensors of a run",
            do="give one in --ckpt_path; a model is given by its folder in --model.name",
        )
    return {
        "global_step": int(facts["step"]),
        "pytorch-lightning_version": lightning_version,
        "state_dict": {MODEL + name: weight for name, weight in weights.items()},
        "rlif": vars(Identity.from_facts(facts)),
    }


def identity_of(checkpoint: Mapping[str, Any]) -> Identity:
    """Whose weights a checkpoint of ours holds."""
    mark = checkpoint.get("rlif")
    if mark is None:
        raise UserError("The checkpoint was not written by rlif_lightning", expected=OURS, do="check --ckpt_path")
    return Identity(**{name: mark[name] for name in Identity.__dataclass_fields__})


def weights_of(checkpoint: Mapping[str, Any]) -> Weights:
    """The trainable weights that a checkpoint holds, by the names of the policy's model."""
    stored = checkpoint["state_dict"].items()
    return {name.removeprefix(POLICY if name.startswith(POLICY) else MODEL): weight for name, weight in stored}
