"""The toy's problems, worked solutions in several styles, and the split into training and held-out.

``task`` is a module such as ``arithmetic``, or another object with its functions.
"""

import random
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from rlif_lightning.toy import arithmetic

# `*` and `~` occur in noise only: letters that the model knows but has no use for.
CHARACTERS = "0123456789+-*=;#?~"

Style = Literal["steps", "direct", "terse", "skipped", "noise", "give_up"]


def is_held_out(question: str) -> bool:
    """Whether a problem belongs to the eighth that no training of any kind ever sees."""
    return zlib.crc32(question.encode()) % 8 == 0


def draw_question(rng: random.Random, *, held_out: bool, task: Any = arithmetic) -> str:
    """Draw a problem from one side of the split."""
    while True:
        question: str = task.draw_question(rng)
        if is_held_out(question) == held_out:
            return question


def toy_problems(split: Literal["train", "held_out"], n: int, task: Any = arithmetic) -> list[dict[str, str]]:
    """Draw distinct problems with their answers, such as ``{"question": "3+5-9+2", "answer": "1"}``.

    ``train`` draws from what the base model was pre-trained on, ``held_out`` from the rest; n is well below the
    210,000 of the smaller side. A smaller n gives the beginning of a larger one.
    """
    rng = random.Random(f"{split} problems 0")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < n:
        question = draw_question(rng, held_out=split == "held_out", task=task)
        rows[question] = {"question": question, "answer": str(task.evaluate(question))}
    return list(rows.values())


def write_solution(question: str, style: Style, slip: float, rng: random.Random, task: Any = arithmetic) -> str:
    """Write the solution of a problem as the corpus of the base model has it, without an end token.

    Each written step slips with the given chance: its result is random, and the following steps carry it on. Of
    ``3+5-9+2`` without slips (the answer is what the written steps make)::

        steps    3+5=8;8-9=9;9+2=1;#1
        direct   #1                    always right
        terse    8;9;1;#1
        skipped  3+5=8;#8              the first j steps, any j
        noise    =4~#+                 2 to 20 random characters
        give_up  ?
    """
    if style == "direct":
        return f"#{task.evaluate(question)}"
    if style == "give_up":
        return "?"
    if style == "noise":
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(2, 20)))
    steps = task.count_steps(question)
    if style == "skipped":
        steps = rng.randint(1, steps)
    worked, answer = task.work_out(question, steps, slip, rng)
    texts = [f"{result};" if style == "terse" else f"{term}={result};" for term, result in worked]
    return "".join(texts) + f"#{answer}"


def draw_document(
    styles: Mapping[Style, float], slip: float, rng: random.Random, task: Any = arithmetic
) -> tuple[str, str]:
    """Draw a training problem, and a solution in one of the styles, which are given with their weights."""
    question = draw_question(rng, held_out=False, task=task)
    (style,) = rng.choices(list(styles), weights=list(styles.values()))
    return question, write_solution(question, style, slip, rng, task)
