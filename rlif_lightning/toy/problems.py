"""The toy's problems, worked solutions in several styles, and the split into training and held-out.

Plain Python, no torch.
"""

import random
import zlib
from collections.abc import Mapping
from typing import Literal

from rlif_lightning.errors import UserError
from rlif_lightning.toy.recipe import TASKS, Variant
from rlif_lightning.toy.task import CHARACTERS, Style, Task

# Well below the held-out problems of each task, 210,000 and 125,000, so that drawing distinct ones stays quick.
MAX_PROBLEMS = 100_000

SHORTCUT_STEPS = 2


def is_held_out(question: str) -> bool:
    """Whether a problem belongs to the eighth that no training of any kind ever sees."""
    return zlib.crc32(question.encode()) % 8 == 0


def draw_question(task: Task, rng: random.Random, *, held_out: bool) -> str:
    """Draw a problem from one side of the split."""
    while True:
        question = task.draw_question(rng)
        if is_held_out(question) == held_out:
            return question


def toy_problems(
    split: Literal["train", "held_out"], n: int, seed: int = 0, variant: Variant = "toy"
) -> list[dict[str, str]]:
    """Draw distinct problems with their answers.

    Args:
        split: ``train`` draws from what the base model was pre-trained on, ``held_out`` from the rest.
        n: How many, at most 100,000.
        seed: Seed of the draw; a smaller ``n`` gives the beginning of a larger one.
        variant: The toy model whose task it is.

    Returns:
        Rows such as ``{"question": "3+5-9+2", "answer": "1"}``.

    Raises:
        UserError: If the split is unknown or ``n`` is out of range.
    """
    if split not in ("train", "held_out"):
        raise UserError("Unknown split of the toy problems.", got=repr(split), expected="train or held_out")
    if not 0 <= n <= MAX_PROBLEMS:
        raise UserError("That many toy problems cannot be drawn.", got=n, expected=f"0 to {MAX_PROBLEMS:,}")
    task, rng = TASKS[variant], random.Random(f"{split} problems {seed}")
    questions: dict[str, None] = {}  # a set that keeps its order
    while len(questions) < n:
        questions[draw_question(task, rng, held_out=split == "held_out")] = None
    return [{"question": question, "answer": str(task.evaluate(question))} for question in questions]


def write_solution(task: Task, question: str, style: Style, slip: float, rng: random.Random) -> str:
    """Write the solution of a problem as the corpus of the base model has it.

    Without slips (the answer is what the written steps make):

    ========  ========================  ================================  =========================
    style     ``3+5-9+2``               ``347+085``
    ========  ========================  ================================  =========================
    steps     ``3+5=8;8-9=9;9+2=1;#1``  ``7+5=12;4+8+1=13;3+0+1=4;#432``
    direct    ``#1``                    ``#432``                          always right
    terse     ``8;9;1;#1``              ``12;13;4;#432``
    skipped   ``3+5=8;#8``              ``7+5=12;#12``                    the first j steps, any j
    shortcut  ``3+5=8;8-9=9;#9``        ``7+5=12;4+8+1=13;#132``          the first two steps
    noise     ``=4~#+``                 ``=4~#+``                         2 to 20 random characters
    give_up   ``?``                     ``?``
    ========  ========================  ================================  =========================

    Args:
        task: The problem's task.
        question: The problem.
        style: The form of the solution.
        slip: Chance per written step that its result is random; the following steps carry it on.
        rng: Source of all randomness.

    Returns:
        The text, without an end token.
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
    if style == "shortcut":
        steps = SHORTCUT_STEPS
    worked, answer = task.work_out(question, steps, slip, rng)
    texts = [f"{result};" if style == "terse" else f"{term}={result};" for term, result in worked]
    return "".join(texts) + f"#{answer}"


def draw_document(task: Task, styles: Mapping[Style, float], slip: float, rng: random.Random) -> tuple[str, str]:
    """Draw one document of the corpus: a training problem and a solution in one of the styles.

    Args:
        task: What the problems are.
        styles: Weight of each style.
        slip: See ``write_solution``.
        rng: Source of all randomness.

    Returns:
        Question and solution.
    """
    question = draw_question(task, rng, held_out=False)
    (style,) = rng.choices(list(styles), weights=list(styles.values()))
    return question, write_solution(task, question, style, slip, rng)
