"""Whether a run has come to its end, with all that belongs to it."""

from pathlib import Path

from rlif_lightning.runs.atomic import write_text

FINISHED = ".finished"  # optimiser steps, trainer.max_steps and trainer.max_epochs of a run that has come to its end


def note_finished(run: Path, step: int, limits: tuple[int, int | None]) -> None:
    """Everything was written: the last checkpoint, evaluations, guard.json, the report."""
    write_text(run / FINISHED, " ".join(map(str, (step, *limits))))


def is_finished(run: Path | None, step: int, limits: tuple[int, int | None], early: bool) -> bool:
    """Whether a run had come to its end at this step of its last checkpoint, and these limits ask for no more.

    Limits are ``trainer.max_steps`` and ``trainer.max_epochs`` as they are now. ``early``: an end before them counts,
    as that by the guard or by EarlyStopping.
    """
    try:
        noted = (run / FINISHED).read_text(encoding="utf-8", errors="replace").split() if run is not None else []
    except OSError:
        noted = []
    same = noted[1:] == [str(limit) for limit in limits]
    return noted[:1] == [str(step)] and (0 <= limits[0] <= step or (early and same))
