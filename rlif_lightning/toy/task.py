"""What a toy task is: two modules have this form, ``arithmetic`` and ``addition``."""

import random
from typing import Any, Literal, Protocol

# `*` and `~` occur in noise only: letters that the model knows but has no use for.
CHARACTERS = "0123456789+-*=;#?~"

Style = Literal["steps", "direct", "terse", "skipped", "shortcut", "noise", "give_up"]


class Task(Protocol):
    """Problems, and how one is worked out step by step. A module can be one."""

    SETTINGS: list[Any]
    """The numbers that decide which problems there are."""

    def draw_question(self, rng: random.Random) -> str:
        """Draw a problem from either side of the split."""

    def evaluate(self, question: str) -> int:
        """The right answer."""

    def count_steps(self, question: str) -> int:
        """How many steps a full solution has."""

    def work_out(
        self, question: str, steps: int, slip: float, rng: random.Random
    ) -> tuple[list[tuple[str, int]], str]:
        """Work out the first steps of a problem.

        Args:
            question: The problem.
            steps: How many.
            slip: Chance per step that its result is random; what follows carries it on.
            rng: Source of all randomness.

        Returns:
            The steps, each what is calculated and its result, such as ``("3+5", 8)``; and their answer.
        """
