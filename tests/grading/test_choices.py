"""Multiple choice: the letter that a text chooses, and options as lettered lines."""

import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Gold, Grader
from rlif_lightning.grading.choices import lettered, right_letter
from rlif_lightning.grading.extraction import extract


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("the answer is C", "C"),
        ("The answer is (A). No: the answer is (B), for C is wrong.", "B"),
        ("**Answer:** G", "G"),
        ("Answer: $\\boxed{D}$", "D"),
        ("The final answer is \\text{(H)}.", "H"),
        ("the correct option is (E)", "E"),
        ("the answer is option F", "F"),
        ("Answer (D)", "D"),
        ("answer is: (A) because A dog barks", "A"),
        ("the answer is (B), so \\boxed{C}", "C"),
        ("\\boxed{C. Paris}", "C"),
        ("\\boxed{\\text{J}}", "J"),
        ("\\boxed{42}, the answer is (B)", "B"),
        ("the answer is not (C), so B", "B"),
        ("It must be C.", "C"),
        ("A dog, I think. So it is C", "C"),
        ("A.", "A"),
        ("(I)", "I"),
        ("I think A is right", None),
        ("the answer is a dog", None),
        ("the answer is Carbon", None),
        ("U.S. law, Vitamin-less", None),
        ("c", None),
        ("", None),
        ("the answer is (C)" + " x" * 3_000, None),  # too far from the end
    ],
)
def test_the_letter(text, letter):
    assert extract(text, "choice") == letter


@pytest.mark.parametrize(
    "text",
    ["answer is ((((" * 5_000, "the answer is " * 9_000, "\\boxed{" * 20_000, "answer" + " " * 99_999, "A" * 99_999],
)
def test_hostile_texts_choose_nothing(text):
    assert extract(text, "choice") is None


def test_graded_letter_by_letter():
    grader = Grader(AnswerFormat(completion="choice", compare="exact"))
    texts = ["The answer is (C)", "The answer is (K)", "so C", "C or D", "c", ""]
    assert grader.grade([(text, True, Gold("C")) for text in texts]) == [True, False, True, False, False, False]
    assert grader.extract_answers([(text, True) for text in texts]) == ["C", "K", "C", "D", None, None]


def test_options_read_as_lettered_lines():
    assert lettered(["one", 2, 2.5], "Row 1") == "A. one\nB. 2\nC. 2.5"
    assert lettered([str(i) for i in range(26)], "Row 1").endswith("Z. 25")


@pytest.mark.parametrize(
    "options", ["one, two", None, 3, {"A": "x"}, [], ["one"], ["x"] * 27, ["x", None], [["x"], ["y"]]]
)
def test_other_options_are_refused(options):
    with pytest.raises(UserError, match=r"Row 7: .*option"):
        lettered(options, "Row 7")


@pytest.mark.parametrize(("answer", "letter"), [("C", "C"), (" c ", "C"), (2, "C"), (0, "A"), ("D", "D")])
def test_the_right_letter(answer, letter):
    assert right_letter(answer, 4, "Row 1") == letter


@pytest.mark.parametrize("answer", ["E", "2", "", "AB", 4, -1, True, 1.0, None, ["A"]])
def test_an_answer_that_is_no_option(answer):
    with pytest.raises(UserError, match="Row 7: the answer is none of the options"):
        right_letter(answer, 4, "Row 7")
