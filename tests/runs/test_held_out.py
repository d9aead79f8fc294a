"""The same held-out problems through a run, in one table."""

from html import unescape

import pytest

from rlif_lightning.runs.held_out import answers_table


def lines_of(held_out):
    return [line.strip("|").split("|") for line in unescape(answers_table(held_out)).splitlines()]


def row(problem, answer, correct=None):
    found = {"problem": problem, "completion": f"so #{answer}"}
    return found if correct is None else found | {"gold": "7", "correct": correct}


@pytest.mark.parametrize(
    ("evaluations", "steps"), [(1, [0]), (2, [0, 5]), (4, [0, 5, 10, 15]), (25, [0, 40, 80, 120])]
)
def test_the_course_of_a_run_in_four_columns(evaluations, steps):
    """Those of the latest evaluations alone hid that the answers had been right in between."""
    held_out = {5 * n: [row("3+4", n, n == 7)] for n in range(evaluations)}
    head, _, cells = lines_of(held_out)
    assert [cell.strip() for cell in head] == ["problem", "right answer", *(f"step {step}" for step in steps)]
    marks = ["✅" if step == 35 else "❌" for step in steps]
    assert [c.strip() for c in cells] == [
        "3+4", "7", *(f"{mark} so #{step // 5}" for mark, step in zip(marks, steps, strict=True))
    ]  # fmt: skip


def test_problems_that_an_evaluation_lacks_and_problems_without_an_answer():
    held_out = {0: [row("a", 1)], 2: [row("b", 2), row("a", 3)]}
    assert [[cell.strip() for cell in cells] for cells in lines_of(held_out)[2:]] == [
        ["b", "", "", "so #2"],
        ["a", "", "so #1", "so #3"],
    ]
