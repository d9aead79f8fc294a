import random
import time
import warnings

import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.grading import check_where, extraction
from rlif_lightning.grading.extraction import PATTERN_WINDOW, extract, locate

GSM8K = r"####\s*(.+)"
TOY = r"#(\d)$"


@pytest.mark.parametrize(
    ("text", "where", "answer"),
    [
        (r"so \boxed{5}.", "boxed", "5"),
        (r"\boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{ x^{2^{n}} }", "boxed", "x^{2^{n}}"),
        (r"\boxed{1} no, \boxed{2}", "boxed", "2"),
        (r"\boxed{1} no, \boxed{2", "boxed", "1"),  # cut off: the last box that closed
        (r"\boxed{\boxed{7}}", "boxed", "7"),
        (r"\boxed{a {b} \boxed{7} c}", "boxed", "7"),
        (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
        (r"{ unclosed \boxed{3}", "boxed", "3"),
        (r"} stray \boxed{3} }", "boxed", "3"),
        (r"\fbox{4}", "boxed", "4"),
        (r"$\framebox{204}$ minutes", "boxed", "204"),
        (r"\framebox[2cm][c]{9}", "boxed", "9"),
        (r"\boxed 5.", "boxed", "5"),
        (r"\boxed{}", "boxed", None),
        (r"\boxed{  }", "boxed", None),
        (r"\boxedx{5}", "boxed", None),
        ("no box", "boxed", None),
        ("", "boxed", None),
        (r"\boxed{E_{1},E_{2}}$.", "boxed", "E_{1},E_{2}"),
        (r"\frac{45}{3600}=\boxed{1.6} \mathrm{~cm}", "boxed", "1.6"),
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", GSM8K, "18"),
        ("#### 5\nwait\n#### 109,200,000", GSM8K, "109,200,000"),
        ("#### -7", GSM8K, "-7"),
        ("3+4=7#7", TOY, "7"),
        ("3+4=7#7 ", TOY, None),
        ("no mark", TOY, None),
        ("  as it is \n", "whole", "as it is"),
        (" \n", "whole", None),
        ("it costs $1,234.50.", "last_number", "1234.50"),
        ("12 then 3 apples", "last_number", "3"),
        ("that is -5", "last_number", "-5"),
        ("that is -$5.", "last_number", "-5"),
        ("8-5", "last_number", "5"),
        ("temperature \u2212 12", "last_number", "-12"),
        ("about 3/4 of it", "last_number", "3/4"),
        (r"so \frac{3}{4}.", "last_number", r"\frac{3}{4}"),
        ("it is 50%.", "last_number", "50"),
        ("it is .5", "last_number", ".5"),
        ("it is 1.5e-3", "last_number", "1.5e-3"),
        ("1,2,3", "last_number", "3"),
        ("2,500 and 1,080", "last_number", "1080"),
        ("none", "last_number", None),
    ],
)
def test_the_answer_is_found(text, where, answer):
    assert extract(text, where) == answer


def test_any_balanced_inside_comes_back_as_it_is():
    generator = random.Random(0)
    for _ in range(200):
        inside = "x"
        for _ in range(generator.randrange(8)):
            inside = generator.choice(
                [rf"\frac{{{inside}}}{{2}}", f"{{{inside}}}", rf"\{{{inside}\}}", f"{inside}+1"]
            )
        text = rf"\boxed{{0}} and {{ }} then \boxed{{{inside}}} end"
        assert extract(text, "boxed") == inside


def test_many_unclosed_boxes_are_read_in_one_pass():
    assert extract(r"\boxed{1}" + r"\boxed{" * 100_000, "boxed") is None  # too far from the end
    assert extract(r"\boxed{" * 10_000 + "1", "boxed") is None
    assert extract("{" * 1_000_000, "boxed") is None
    assert extract(r"\boxed{2}" * 2_000, "boxed") == "2"


def test_patterns_look_at_the_end_of_a_text_only():
    assert extract("#### 5\n" + "x" * PATTERN_WINDOW, GSM8K) is None
    assert extract("x" * 1_000_000 + "\n#### 5", GSM8K) == "5"


@pytest.mark.parametrize(
    "where", ["whole", "boxed", "last_number", GSM8K, TOY, r"(?:,\d+)*(x)", r"(?i)is:?\s*(.+?)\.?$"]
)
def test_places_and_patterns_with_one_group_are_accepted(where):
    check_where(where)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("boxd", "did you mean 'boxed'"),
        ("lastnumber", "did you mean 'last_number'"),
        ("([", "not a valid regular expression"),
        ("(a)(b)", "with 2 groups"),
        ("answer is", "with 0 groups"),
    ],
)
def test_other_places_are_refused_with_a_hint(where, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        check_where(where)


def test_a_hostile_pattern_ends_in_time_and_says_so_once(monkeypatch):
    """Python's re would search for years, and nothing in the process could stop it."""
    monkeypatch.setattr(extraction, "PATTERN_SECONDS", 0.2)
    text, where = "a" * PATTERN_WINDOW, r"(?:(?:a|aa)+)+(b)"
    check_where(where)
    start = time.process_time()
    with pytest.warns(UserWarning, match="was given up after 0.2 s.*Bound the pattern's repeats"):
        assert extract(text, where) is None
    assert time.process_time() - start < 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract(text, where) is None
        assert extract("aab", where) == "b"


@pytest.mark.parametrize(
    ("marked", "where"),
    [
        (r"so \boxed{ «\frac{1}{2}» }.", "boxed"),
        (r"\boxed{1} no, \boxed{«2»}, \boxed{3", "boxed"),
        (r"\boxed{a {b} \boxed{«7»} c}", "boxed"),
        (r"\boxed «5».", "boxed"),
        (r"\boxed{2}" + "x" * 100_000 + r"\boxed{«3»}", "boxed"),
        ("it costs $«1,234.50».", "last_number"),
        ("5" + "x" * 9_000 + "that is «- $5».", "last_number"),
        ("about «3 / 4» of it", "last_number"),
        ("5 #### 5\n#### «5» ", r"####\s*(.+)"),
        ("5 #### 5\n", r"(x)?$"),
        ("  «as it is» \n", "whole"),
        ("A, so the answer is («A»), A", "choice"),
        ("B" + " x" * 3_000 + " «B».", "choice"),
        ("1 [ANSWER] `«[1, 2]»` [/ANSWER] [1, 2]", "literal"),
        ("[ANSWER] x [/ANSWER] [ANSWER]\n```python\n«[1, 2]».```[/ANSWER]", "literal"),
        ("== 4\nassert f(4) == «'x'».\n\n", "literal"),
        ("4\x0b4\u2028 = «4»\x0b\n", "literal"),
        ("none", "literal"),
    ],
)
def test_an_answer_knows_its_characters(marked, where):
    text = marked.replace("«", "").replace("»", "")
    found = locate(text, where)
    if "«" not in marked:
        assert found is None
    else:
        assert (found.start, found.end) == (marked.index("«"), marked.index("»") - 1)
        assert where == "last_number" or found.text == text[found.start : found.end]
