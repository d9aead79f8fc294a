"""The report of a run: a picture of its curves and a table of its key numbers."""

from pathlib import Path

from rlif_lightning.runs.atomic import replacing
from rlif_lightning.runs.curves import draw_curves
from rlif_lightning.runs.summary import summary_table

CURVES = "curves.png"
SUMMARY = "summary.txt"


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write curves.png and summary.txt into a run folder and return their paths."""
    picture, summary = folder / CURVES, folder / SUMMARY
    draw_curves([folder], picture)
    with replacing(summary) as file:
        file.write(summary_table(folder).encode())
    return picture, summary
