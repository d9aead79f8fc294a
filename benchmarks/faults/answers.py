"""Hostile answers to the grader: none may crash it, hang it, or count as right.

    python -m benchmarks.faults.answers --n 10000       # about 12 minutes of one core

Rollouts of 64 random members of a family are graded against 42 and sorted into classes, as training does it. None of
them says 42. A worker that is left over at the end is a leak.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults import runs
from benchmarks.faults.table import Options, Row, run

ROLLOUT = 64
PATIENCE = 60.0  # seconds that a rollout of nothing but hostile answers may take
ALL = 300.0  # seconds of one core that 10,000 of them may take, the workers' included
RIGHT = "42"

TOWERS = [
    "A^{B^{C}}", "e^{e^{e^{A}}}", "A!!!", "(A^{B!})!", "((A)^{B})^{C^A}", "A^{-B^{C}}",
    r"\binom{10^{B}}{C \cdot 10^8}",
]  # fmt: skip
CALCULUS = [
    r"\sum_{k=1}^{10^A} \frac{1}{k^{B}}", r"\prod_{k=1}^{10^A} (1 + x^k)", r"\int_0^{10^A} e^{-x^{B}} \sin(x^x) dx",
    r"\lim_{x \to \infty} (1 + \frac{A}{x})^{x^{B}}", r"\int \frac{\tan^{A}(x)}{\ln(\cos(x^{B}))} dx",
]  # fmt: skip
CODE = [  # what would run if anything evaluated it
    "__import__('os').system('touch ran')", "open('ran', 'w')", r"\input{/etc/passwd}", r"\write18{touch ran}",
    "eval('A + B')", "().__class__.__mro__[1].__subclasses__()", "lambda: A", "{{ 6 * 8 }}", "$(touch ran)",
    "`touch ran`",
]  # fmt: skip
HEDGES = [  # several answers at once, one of which is right
    "42 or A", "A00 = 42", "42, A", r"42 \pm A", r"\neq 42 + A", r"\{42, A00\}", r"42 \text{ or } x", "42; A00",
]  # fmt: skip
SIGNS = r"\frac \sqrt \cdot \pi \pm \text \\ & | = , ^ _ { } ( ) + - x 7"
CHARACTERS = "\0\x1b\x85\ud800\u0301\u0663\u00bd\u200b\u202e\u2028\u221a\uff14\U0001d7dc4"
BRACKETS = [("(", ")"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), (r"\left(", r"\right)"), ("{", "}"), ("[", "]")]


def filled(texts: list[str], rng: random.Random) -> str:
    """One of the texts, with numbers of two digits for A, B and C."""
    text = rng.choice(texts)
    for letter in "ABC":
        text = text.replace(letter, str(rng.randint(2, 41)))
    return text


def nested(rng: random.Random) -> str:
    """Brackets, roots and fractions in each other."""
    (opened, closed), depth = rng.choice(BRACKETS), rng.choice([10, 100, 1000, 5000])
    return opened * depth + "7" + closed * (depth - rng.randint(0, 1))


def sets(rng: random.Random) -> str:
    """Unions and long lists."""
    texts = ["(A, A.B]", r"\frac{A}{B}", r"\mathbb{R}", "0.A"]
    return rng.choice([r" \cup ", r" \setminus ", ","]).join(
        [filled(texts, rng) for _ in range(rng.choice([5, 50, 500]))]
    )


def digits(rng: random.Random) -> str:
    """Numbers as long as a text."""
    count = rng.choice([100, 5_000, 100_000])
    return rng.choice(["9{}", "0.{}1", "1e{}9", "1_{}1", "43.{}1", "-{}43"]).format(rng.choice("019-_") * count)


FAMILIES: dict[str, Callable[[random.Random], str]] = {
    "nested brackets": nested,
    "towers of powers": lambda rng: filled(TOWERS, rng),
    "heavy calculus": lambda rng: filled(CALCULUS, rng),
    "sets": sets,
    "code": lambda rng: filled(CODE, rng),
    "long numbers": digits,
    "soup of signs": lambda rng: "".join(rng.choices(SIGNS.split(), k=rng.choice([5, 30, 300]))),
    "odd characters": lambda rng: "".join(rng.choices(CHARACTERS, k=rng.choice([3, 40, 4000]))) + "7",
    "hedges": lambda rng: filled(HEDGES, rng),
    "a megabyte": lambda rng: rng.choice(["7 ", "=", "$", r"\boxed{", "1,", "((", "\n", "%"]) * 200_000,
}


def cpu() -> float:
    """Seconds that this process and those that it has waited for have used."""
    return sum(os.times()[:4])


def answers(options: Options) -> Iterator[Row]:
    """The harness."""
    from rlif_lightning.grading import ROLLOUT_SECONDS, AnswerFormat, Gold, Grader

    grader, begun = Grader(AnswerFormat(), budget=ROLLOUT_SECONDS), cpu()
    rng, worst, total = random.Random(options.seed), 0.0, options.n or 0
    found: dict[str, list[tuple[int, float, int, list[str]]]] = {}
    size = min(ROLLOUT, math.ceil(total / len(FAMILIES)))
    for first in range(0, total, size):
        name = [*FAMILIES][first // size % len(FAMILIES)]
        texts = [rf"\boxed{{{FAMILIES[name](rng)}}}" for _ in range(min(size, total - first))]
        start = time.monotonic()
        grader.begin()
        verdicts = grader.grade([(text, True, Gold(RIGHT)) for text in texts])
        grader.classes(grader.extract_answers([(text, True) for text in texts]))
        seconds = time.monotonic() - start
        worst = max(worst, seconds)
        right = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict]
        found.setdefault(name, []).append((len(texts), seconds, grader.timeouts, right))
    grader.close()
    for name, rollouts in found.items():
        count, seconds, timeouts = (sum(column) for column in list(zip(*rollouts, strict=True))[:3])
        right = [text for *_, texts in rollouts for text in texts]
        seen = f"{count}: {1000 * seconds / count:.0f} ms each, {timeouts} out of time, {len(right)} right"
        yield Row(f"answers: {name}", f"{seen}{f', such as {right[0][:60]!r}' if right else ''}", not right)
    yield Row(f"rollouts of {size}", f"the slowest took {worst:.0f} s", worst < PATIENCE)
    spent = cpu() - begun
    yield Row(f"{total} answers", f"{spent:.0f} s of one core", spent < ALL * max(1, total / 10_000))
    left = sum(map(runs.alive, runs.children(os.getpid(), b"grading")))
    yield Row("the grader is closed", f"{left} workers are left", not left)
    yield Row("code among the answers", "it ran" if Path("ran").exists() else "none ran", not Path("ran").exists())


if __name__ == "__main__":
    run(answers, n=10_000)
