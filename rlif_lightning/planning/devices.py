"""GPUs by their memory, and how much of it is there for tensors."""

import re

from rlif_lightning.errors import UserError
from rlif_lightning.planning.memory import GIB, memory
from rlif_lightning.planning.settings import Settings

CARDS = {
    "rtx3060": 12, "rtx4060": 8, "rtx4060ti": 16, "rtx3090": 24, "rtx4090": 24, "l40s": 48, "a100": 80, "h100": 80,
}  # fmt: skip
"""GB of memory."""
SIZES = sorted({*CARDS.values()})
CONTEXT, USABLE = 0.6 * GIB, 0.94
"""Of a GPU's memory: what its driver and libraries take, and the share of the rest that fragments leave."""


def usable(gigabytes: float) -> int:
    """Bytes for tensors on a GPU that is sold with so many GB."""
    return int((gigabytes * GIB - CONTEXT) * USABLE)


def parse_device(text: str) -> float:
    """Gigabytes of ``24``, ``24GB``, or a known GPU such as ``rtx3060``."""
    word = re.sub("[ _-]", "", text.lower())
    number = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)(gi?b)?", word)
    size = float(CARDS.get(word) or (number[1] if number else 0))
    if size < 1:
        expected = f"such as 24GB, or one of {', '.join(CARDS)}"
        raise UserError("--device is neither a size nor a known GPU", got=text, expected=expected)
    return size


def fits(settings: Settings) -> dict[int, bool]:
    """Whether the plan fits, by GB of a GPU."""
    return {size: memory(settings, usable(size)).peak <= usable(size) for size in SIZES}
