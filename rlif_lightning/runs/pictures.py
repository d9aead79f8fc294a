"""What all pictures share: colours that colour-blind people tell apart, labels, and how a picture is written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlif_lightning.errors import UserError
from rlif_lightning.runs.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow, which white paper swallows. Neighbours differ in lightness too, for grey
# prints; where more than two lines meet, markers or dashes tell them apart as well.
BLUE, AMBER, BLACK, SKY, VERMILION, PURPLE = "#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#CC79A7"
COLOURS = (BLUE, AMBER, BLACK, SKY, VERMILION, PURPLE)
MARKERS = "os^Dv*"
GOOD, BAD, GREY = "#007A5A", "#C44E00", "0.45"  # green and vermilion, dark enough for text
SOLID, DASHED = "-", (0, (5, 2))


def in_words(name: str) -> str:
    """The name of a reward or a condition as people write it."""
    return name.replace("_", " ").replace("self certainty", "self-certainty")


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, str]], gap: float = 0.14, fontsize: float = 10) -> None:
    """Name curves at their right ends, one above the other where they meet.

    Label -> height of the end in parts of the axes, and colour; the gap is the least between two labels.
    """
    ordered = sorted(ends.items(), key=lambda end: end[1][0])
    least = -math.inf
    for below, (label, (height, colour)) in enumerate(ordered):
        least = max(height, least + gap)
        place = min(least, 1 - gap * (len(ordered) - 1 - below))  # what is pushed up stays within the axes
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "color": colour, "fontsize": fontsize}
        ax.annotate(label, (1.0, place), xycoords="axes fraction", xytext=(8, 0), **style)


def save_figure(figure: Figure, output: Path) -> None:
    """Write a picture in the format that the file's ending says, whole or not at all."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
        named = [text for legend in legends for text in legend.get_texts()]
        for text in [*named, *figure.texts, *(axes.title for axes in figure.axes)]:
            text.set_parse_math(False)  # names of runs, models and rewards may hold dollar signs
        with replacing(output) as file, warnings.catch_warnings(action="ignore"):  # scripts that the font lacks
            figure.savefig(file, format=output.suffix[1:])
    except ValueError as error:  # a format that matplotlib does not know
        expected = "a file name that ends in .png, .pdf or .svg"
        raise UserError("The picture cannot be written.", got=f"{output}: {error}", expected=expected) from error
    except OSError as error:
        expected = "a folder that can be written to"
        raise UserError("The picture cannot be written.", got=f"{output}: {error}", expected=expected) from error
