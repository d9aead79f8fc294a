"""What to say where a disk does not take the files of a run."""

from pathlib import Path

from rlif_lightning.errors import DiskFailure, disk_failure
from rlif_lightning.models.checkpoints import UNREADABLE, read_unchecked
from rlif_lightning.runs.folder import CHECKPOINTS, LAST_CHECKPOINT


def run_failure(error: BaseException, run: Path | None) -> DiskFailure | None:
    """A full, read-only or broken disk behind an exception, with the step that is safe."""
    failure = disk_failure(error, run)
    if failure is None or run is None or not (run / CHECKPOINTS).is_dir():
        return failure
    try:
        step = read_unchecked(run / CHECKPOINTS / LAST_CHECKPOINT)["global_step"]
    except UNREADABLE:
        return DiskFailure(failure.path, failure.number, "no step of this run was saved yet")
    return DiskFailure(failure.path, failure.number, f"step {step} is saved: continue with --ckpt_path last")
