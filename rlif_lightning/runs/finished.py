"""Whether a run has come to its end, with all that belongs to it."""

from pathlib import Path

from rlif_lightning.runs.atomic import replacing

FINISHED = ".finished"  # optimiser steps, trainer.max_steps and trainer.max_epochs of a run that has come to its end


def note_finished(run: Path, step: int, limits: tuple[int, int | None]) -> None:
    """Everything was written: the last checkpoint, evaluations, guard.json, the report."""
    with replacing(run / FINISHED) as file:
        file.write(" ".join(map(str, (step, *limits))).encode())


def is_finished(run: Path | None, step: int, limits: tuple[int, int | None], early: bool) -> bool:
    """Whether the run had come to its end at this step, and these limits ask for no more.

    Args:
        run: Its folder; None has none.
        step: Of its last checkpoint.
        limits: ``trainer.max_steps`` and ``trainer.max_epochs`` as they are now.
        early: Whether an end before its limits counts, as that by the guard or by EarlyStopping.
    """
    try:
        noted = (run / FINISHED).read_text(encoding="utf-8", errors="replace").split() if run is not None else []
    except OSError:
        noted = []
    same = noted[1:] == [str(limit) for limit in limits]
    return noted[:1] == [str(step)] and (0 <= limits[0] <= step or (early and same))
