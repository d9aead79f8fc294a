"""Toy arithmetic: problems, worked solutions in several styles, and the split into training and held-out.

A problem such as ``3+5-9+2`` is read from left to right, modulo 10. Every number is one digit, so a problem
is its text: digits at the even positions, operators at the odd ones. Plain Python, no torch.
"""

import random
import zlib
from collections.abc import Mapping
from typing import Literal

from rlif_lightning.errors import UserError

MIN_OPERATIONS, MAX_OPERATIONS = 2, 4
OPERATORS = "+-"
# `*` and `~` occur in noise only: letters that the model knows but has no use for.
CHARACTERS = "0123456789+-*=;#?~"
# Well below the 210,000 held-out problems, so that drawing distinct ones stays quick.
MAX_PROBLEMS = 100_000

SHORTCUT_OPERATIONS = 2

Style = Literal["steps", "direct", "terse", "skipped", "shortcut", "noise", "give_up"]


def is_held_out(question: str) -> bool:
    """Whether a problem belongs to the eighth that no training of any kind ever sees."""
    return zlib.crc32(question.encode()) % 8 == 0


def draw_question(rng: random.Random, *, held_out: bool) -> str:
    """Draw a problem from one side of the split: 2 to 4 operations, each length equally likely."""
    while True:
        operations = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
        digits = [str(rng.randint(0, 9)) for _ in range(operations + 1)]
        question = digits[0] + "".join(rng.choice(OPERATORS) + digit for digit in digits[1:])
        if is_held_out(question) == held_out:
            return question


def evaluate(question: str) -> int:
    """The result of a problem, from left to right, modulo 10."""
    value = int(question[0])
    for operator, digit in zip(question[1::2], question[2::2], strict=True):
        value = _apply(value, operator, int(digit))
    return value


def _apply(value: int, operator: str, digit: int) -> int:
    return (value + digit if operator == "+" else value - digit) % 10


def toy_problems(split: Literal["train", "held_out"], n: int, seed: int = 0) -> list[dict[str, str]]:
    """Draw distinct problems with their answers.

    Args:
        split: ``train`` draws from what the base model was pre-trained on, ``held_out`` from the rest.
        n: How many, at most 100,000.
        seed: Seed of the draw; a smaller ``n`` gives the beginning of a larger one.

    Returns:
        Rows such as ``{"question": "3+5-9+2", "answer": "1"}``.

    Raises:
        UserError: If the split is unknown or ``n`` is out of range.
    """
    if split not in ("train", "held_out"):
        raise UserError("Unknown split of the toy problems.", got=repr(split), expected="train or held_out")
    if not 0 <= n <= MAX_PROBLEMS:
        raise UserError("That many toy problems cannot be drawn.", got=n, expected=f"0 to {MAX_PROBLEMS:,}")
    rng = random.Random(f"{split} problems {seed}")
    questions: dict[str, None] = {}  # a set that keeps its order
    while len(questions) < n:
        questions[draw_question(rng, held_out=split == "held_out")] = None
    return [{"question": question, "answer": str(evaluate(question))} for question in questions]


def write_solution(question: str, style: Style, slip: float, rng: random.Random) -> str:
    """Write the solution of a problem as the corpus of the base model has it.

    For ``3+5-9+2``, without slips:

    ==========  ========================  ===============================================================
    steps       ``3+5=8;8-9=9;9+2=1;#1``
    direct      ``#1``                    always right
    terse       ``8;9;1;#1``
    skipped     ``3+5=8;#8``              the first j steps, j from 1 to all of them, and their result
    shortcut    ``3+5=8;8-9=9;#9``        the first two steps, and their result
    noise       ``=4~#+``                 2 to 20 random characters
    give_up     ``?``
    ==========  ========================  ===============================================================

    Args:
        question: The problem.
        style: The form of the solution.
        slip: Chance per written step that its result is a random digit; the following steps carry it on.
        rng: Source of all randomness.

    Returns:
        The text, without an end token.
    """
    if style == "direct":
        return f"#{evaluate(question)}"
    if style == "give_up":
        return "?"
    if style == "noise":
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(2, 20)))
    if style == "skipped":
        operations = rng.randint(1, len(question) // 2)
        question = question[: 2 * operations + 1]
    if style == "shortcut":
        question = question[: 2 * SHORTCUT_OPERATIONS + 1]
    value, text = int(question[0]), ""
    for operator, digit in zip(question[1::2], question[2::2], strict=True):
        result = _apply(value, operator, int(digit))
        if rng.random() < slip:
            result = rng.randint(0, 9)
        text += f"{result};" if style == "terse" else f"{value}{operator}{digit}={result};"
        value = result
    return f"{text}#{value}"


def draw_document(styles: Mapping[Style, float], slip: float, rng: random.Random) -> tuple[str, str]:
    """Draw one document of the corpus: a training problem and a solution in one of the styles.

    Args:
        styles: Weight of each style.
        slip: See ``write_solution``.
        rng: Source of all randomness.

    Returns:
        Question and solution.
    """
    question = draw_question(rng, held_out=False)
    (style,) = rng.choices(list(styles), weights=list(styles.values()))
    return question, write_solution(question, style, slip, rng)
