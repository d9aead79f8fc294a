"""Checkpoint files: written whole or not at all, read without running any code, and whose weights they hold."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import __version__ as lightning_version
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlif_lightning.errors import UserError
from rlif_lightning.models.identity import Identity
from rlif_lightning.models.trainable import Weights, load_trainable
from rlif_lightning.runs.atomic import replacing

KEPT = ".safetensors"
"""The suffix of weights that the collapse guard has kept."""
MODEL, POLICY = "model.", "policy."
"""What stands before a weight's name in a checkpoint, and what did in those of older releases."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a full disk or a kill never costs the checkpoint before.

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
        """Read tensors and plain values only, from the disk as they are used: many processes may read the file.

        A later save replaces the file and never writes into it, so what was read stays as it was.
        """
        return read_checkpoint(path, map_location or "cpu", mmap=True)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint, or the weights that the collapse guard has kept, without running any code in it.

    Raises:
        UserError: It holds more than tensors and plain values, or it is no checkpoint.
    """
    if Path(path).suffix == KEPT:
        return _kept_by_the_guard(Path(path))
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
            raise TypeError("no checkpoint of a Trainer")
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
        foreign = "Weights only load failed" in str(error) and zipfile.is_zipfile(path)
        raise UserError(
            "The checkpoint can't be read",
            got=path,
            expected="tensors and plain values, as this package writes them; this file holds other Python objects, "
            "which are not loaded because that could run any code"
            if foreign
            else f"a whole file ({(str(error).splitlines() or [type(error).__name__])[0]})",
            do="give another checkpoint in --ckpt_path",
        ) from error
    return checkpoint


def _kept_by_the_guard(path: Path) -> dict[str, Any]:
    """Kept weights in the shape of a checkpoint; they come without an optimiser's state."""
    weights, facts = load_trainable(path)
    if not {"step", "model", "fingerprint"} <= facts.keys():
        raise UserError("The file holds no weights that the collapse guard has kept", got=path)
    return {
        "global_step": int(facts["step"]),
        "pytorch-lightning_version": lightning_version,
        "state_dict": {MODEL + name: weight for name, weight in weights.items()},
        "rlif": dict(vars(Identity.from_facts(facts))),
    }


def identity_of(checkpoint: Mapping[str, Any]) -> Identity:
    """Whose weights a checkpoint holds.

    Raises:
        UserError: It is none of ours.
    """
    if checkpoint.get("rlif") is None:
        raise UserError("The checkpoint was not written by rlif_lightning", do="check --ckpt_path")
    return Identity.from_mark(checkpoint["rlif"])


def weights_of(checkpoint: Mapping[str, Any]) -> Weights:
    """The trainable weights that a checkpoint holds, by the names of the policy's model."""
    return {
        name.removeprefix(POLICY if name.startswith(POLICY) else MODEL): weight
        for name, weight in checkpoint["state_dict"].items()
    }
