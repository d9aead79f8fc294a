"""A second task: ``347+085``, added digit by digit from the right, with carries.

The shorter number is padded with zeros to the length of the longer one, so that digits stand under digits. A full
solution reads ``7+5=12;4+8+1=13;3+0+1=4;#432``. The functions are those of ``rlif_lightning.toy.arithmetic``.
"""

import random

MIN_DIGITS, MAX_DIGITS = 2, 3
MAX_SUM = 9 + 9 + 1


def draw_question(rng: random.Random) -> str:
    """Draw a problem: the longer number has 2 or 3 digits, both equally likely."""
    digits = rng.randint(MIN_DIGITS, MAX_DIGITS)
    while True:
        left, right = rng.randrange(10**digits), rng.randrange(10**digits)
        if max(left, right) >= 10 ** (digits - 1):
            return f"{left:0{digits}}+{right:0{digits}}"


def evaluate(question: str) -> int:
    """The sum."""
    left, right = question.split("+")
    return int(left) + int(right)


def count_steps(question: str) -> int:
    """One step per column of digits."""
    return len(question) // 2


def work_out(question: str, steps: int, slip: float, rng: random.Random) -> tuple[list[tuple[str, int]], str]:
    """The first columns and what they make, as there; a slip is a random sum from 0 to 19."""
    left, right = question.split("+")
    carry, digits, worked = 0, "", []
    for a, b in list(zip(left[::-1], right[::-1], strict=True))[:steps]:
        result = int(a) + int(b) + carry
        if rng.random() < slip:
            result = rng.randint(0, MAX_SUM)
        worked.append((f"{a}+{b}+1" if carry else f"{a}+{b}", result))
        carry, digits = result // 10, str(result % 10) + digits
    return worked, f"1{digits}" if carry else digits
