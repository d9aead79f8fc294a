"""What to say where a disk does not take the files of a run."""

from pathlib import Path

from rlif_lightning.errors import DiskFailure, disk_failure
from rlif_lightning.models.checkpoints import UNREADABLE, read_unchecked
from rlif_lightning.runs.folder import CHECKPOINTS, LAST_CHECKPOINT


def run_failure(error: BaseException, run: Path | None) -> DiskFailure | None:
    """A disk that is full, read-only or broken, or a file of the run that has gone; with the step that is safe."""
    failure, file = disk_failure(error, run), getattr(error, "filename2", None) or getattr(error, "filename", None)
    of_run = run is not None and file is not None and Path(file).absolute().is_relative_to(run.absolute())
    if failure is None and of_run and isinstance(error, OSError) and error.errno:
        failure = DiskFailure(file, error.errno)
    if failure is None or run is None or not (run / CHECKPOINTS).is_dir():
        return failure
    try:
        step = read_unchecked(run / CHECKPOINTS / LAST_CHECKPOINT)["global_step"]
    except UNREADABLE:
        return DiskFailure(failure.path, failure.number, "no step of this run was saved yet")
    return DiskFailure(failure.path, failure.number, f"step {step} is saved: continue with --ckpt_path last")
