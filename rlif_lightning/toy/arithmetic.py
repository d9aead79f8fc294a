"""The toy's task: ``3+5-9+2``, evaluated from left to right, modulo 10.

Every number is one digit, so a problem is its text: digits at the even positions, operators at the odd ones.
"""

import random

MIN_OPERATIONS, MAX_OPERATIONS = 2, 4
OPERATORS = "+-"


def draw_question(rng: random.Random) -> str:
    """Draw a problem: 2 to 4 operations, each length equally likely."""
    operations = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
    digits = [str(rng.randint(0, 9)) for _ in range(operations + 1)]
    return digits[0] + "".join(rng.choice(OPERATORS) + digit for digit in digits[1:])


def evaluate(question: str) -> int:
    """The right answer."""
    value = int(question[0])
    for operator, digit in zip(question[1::2], question[2::2], strict=True):
        value = _apply(value, operator, int(digit))
    return value


def count_steps(question: str) -> int:
    """Steps of a full solution: one per operation."""
    return len(question) // 2


def work_out(question: str, steps: int, slip: float, rng: random.Random) -> tuple[list[tuple[str, int]], str]:
    """Work out the first steps of a problem, each such as ``("3+5", 8)``, and their answer.

    With a chance of ``slip`` the result of a step is a random digit; what follows carries it on.
    """
    value, worked = int(question[0]), []
    for operator, digit in zip(question[1 : 2 * steps : 2], question[2 : 2 * steps + 1 : 2], strict=True):
        result = _apply(value, operator, int(digit))
        if rng.random() < slip:
            result = rng.randint(0, 9)
        worked.append((f"{value}{operator}{digit}", result))
        value = result
    return worked, str(value)


def _apply(value: int, operator: str, digit: int) -> int:
    return (value + digit if operator == "+" else value - digit) % 10
