import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Gold, read_gold
from rlif_lightning.grading.answers import gold_text, read_tolerance


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("025", "025"),
        (27.0, "27"),
        (0.5, "0.5"),
        (-1.0, "-1"),
        (204, "204"),
        (["2"], "2"),
        (["2", 3.0], "2, 3"),
        (True, "True"),
    ],
)
def test_an_answer_field_becomes_text(value, text):
    assert gold_text(value) == text


@pytest.mark.parametrize("value", [None, [], {}, float("nan"), float("inf"), [None]])
def test_a_field_without_an_answer_is_an_error(value):
    with pytest.raises(UserError, match="holds no answer"):
        gold_text(value)


def test_tolerance_fields():
    assert read_tolerance(None) == ()
    assert read_tolerance("") == ()
    assert read_tolerance("1e-1") == (0.1,)
    assert read_tolerance(0.1) == (0.1,)
    assert read_tolerance("1e-1,1e-2") == (0.1, 0.01)
    assert read_tolerance("1e-1,null") == (0.1, 0.0)
    for wrong in ("much", "-1", "nan", [1]):
        with pytest.raises(UserError, match="no tolerance"):
            read_tolerance(wrong)


def test_gold_answers_of_the_usual_data_sets():
    assert read_gold("9 * 2 = $<<9*2=18>>18\n#### 1,080", r"####\s*(.+)") == Gold("1,080")
    assert read_gold(r"L \simeq \boxed{4.5e33} \mathrm{ergs}", "boxed") == Gold("4.5e33")
    assert read_gold(["4.2"], unit="%", tolerance="1e-1") == Gold("4.2", "%", (0.1,))
    assert read_gold(27.0) == Gold("27")
    assert read_gold("no box", "boxed") is None


def test_places_are_tried_in_their_order():
    settings = AnswerFormat(completion=["boxed", "last_number"])
    assert settings.locate(r"\boxed{7}, not 8").text == "7"
    assert settings.locate("7, not 8").text == "8"
    assert settings.locate("none") is None


def test_an_unfinished_completion_has_no_answer_where_the_recipe_says_so():
    assert AnswerFormat(unfinished_is_wrong=True).locate(r"\boxed{7}", ended=False) is None
    assert AnswerFormat().locate(r"\boxed{7}", ended=False).text == "7"


@pytest.mark.parametrize(
    "wrong",
    [
        {"completion": "boxd"},
        {"completion": []},
        {"compare": "maths"},
        {"several": "list"},
        {"relative_tolerance": -0.1},
        {"relative_tolerance": 1.0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        AnswerFormat(**wrong)
