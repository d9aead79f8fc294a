from fractions import Fraction

import pytest

from rlif_lightning.grading.normalise import clean, key, measured, split_answers, without_name
from rlif_lightning.grading.number import as_number, same_number


def normalise(answer: str, unit: str | None = None) -> str:
    return key(measured(answer, unit)[0])


@pytest.mark.parametrize(
    "same",
    [
        [
            "27",
            "27.0",
            "027",
            "27.",
            "+27",
            "$27$",
            r"\$27",
            "27%",
            r"27\%",
            " 27 ",
            "**27**",
            r"\(27\)",
            r"27^\circ",
            r"27^{\circ}",
        ],
        ["10,080", r"10,\!080", "10080", "10{,}080", "$10,080.00"],
        ["11,111,111,100", r"11,\! 111,\! 111,\! 100"],
        [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\frac12", "1/2", "0.5", ".5", "2/4", "0.50"],
        [r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", r"\dfrac{270}{7}^\circ"],
        ["4.5e33", r"4.5 \times 10^{33}", "4.5E+33", r"4.5\cdot 10^{33}", "4.5\u00d710^33"],
        ["-1./3", "-1/3", r"-\frac{1}{3}"],
        [".0000672", "6.72e-5", r"6.72 \times 10^{-5}"],
        [r"\text{Evelyn}", "Evelyn"],
        [r"\text{(C)}", "(C)", "C"],
        [r"864 \mbox{ inches}^2", "864"],
        [r"300 \mathrm{~km} / \mathrm{s}", "300"],
        [r"11\sqrt2", r"11 \sqrt{2}"],
        [r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", r"\big(3, \dfrac{\pi}{2}\big)"],
        ["52_8", "52_{8}"],
        [r"(-\infty, 2]", "(-∞,2]"],
    ],
)
def test_usual_ways_of_writing_one_answer_share_a_key(same):
    assert len({normalise(text) for text in same}) == 1, [normalise(text) for text in same]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("27", "28"),
        ("1 4/5", "14/5"),
        ("(0,1)", "[0,1]"),
        ("1e-8", "2e-8"),
        ("x", "X"),
        ("-2", "2"),
        ("1,2", "12"),
        ("1.5", "15"),
        ("52_8", "52_9"),
    ],
)
def test_different_answers_keep_different_keys(one, other):
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(
    ("answer", "unit"),
    [
        ("45", "minute"),
        (r"45 \text{ minute}", "minute"),
        ("45 minute", "minute"),
        ("45min", "min"),
        (r"45\text{ cm}^2", "$cm^2$"),
        ("45 cm^2", "$cm^2$"),
        ("45 km/h", "km/h"),
        (r"45 \text{km/h}", "km/h"),
        (r"45^{\circ}", r"^{\circ}"),
        ("45%", "%"),
    ],
)
def test_a_given_unit_is_dropped(answer, unit):
    assert normalise(answer, unit) == "45"


def test_a_formula_stays_a_formula():
    assert clean(r"2\pi x + e^{x}") == r"2\pi x + e^{x}"
    assert clean(r"\frac{600}{7} km/h") == r"\frac{600}{7}"
    assert clean("3+2\\mathrm{i}") == "3+2\\mathrm{i}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2", ["1", "2"]),
        ("$69$,$84$", ["69", "84"]),
        ("$221,$8$", ["221", "8"]),
        ("(1, 2), (3, 4)", ["(1, 2)", "(3, 4)"]),
        (r"(3, \pi/2)", [r"(3, \pi/2)"]),
        ("(3,4]", ["(3,4]"]),
        ("58,500", ["58500"]),
        ("2400, 1350, 864", ["2400", "1350", "864"]),
        (r"\{1\pm\sqrt{5},-2\}", [r"1+\sqrt{5}", r"1-\sqrt{5}", "-2"]),
        (r"1 \text{ or } 2", ["1", "2"]),
        ("1, 2 and 3", ["1", "2", "3"]),
        (r"x=1, 2", ["1", "2"]),
        ("a=2, a=-6", ["a=2", "a=-6"]),
        ("x=5", ["x=5"]),
        ("", []),
    ],
)
def test_several_answers_are_cut_outside_brackets(text, parts):
    assert split_answers(text) == parts


def test_names():
    assert without_name("x = 5") == ("x", "5")
    assert without_name("f(x)=2 x") == ("f(x)", "2 x")
    assert without_name(r"x \in [-2,7]") == ("x", "[-2,7]")
    assert without_name("5") == (None, "5")
    assert without_name("a=2, a=3") == (None, "a=2, a=3")
    assert without_name("x+y=3") == (None, "x+y=3")


def test_numbers_are_read_exactly():
    assert as_number("0.1").value == Fraction(1, 10)
    assert as_number("-3/4").value == Fraction(-3, 4)
    assert as_number(r"-\frac{3}{4}").value == Fraction(-3, 4)
    assert as_number("1e400").value == 10**400
    for text in ("1e401", "1/0", "9" * 2_000, "x", "", "1 2", "--1", "1e", "nan", "inf", "٣"):
        assert as_number(text) is None, text


@pytest.mark.parametrize(
    ("gold", "answer", "tolerances", "right"),
    [
        ("1000000", "1000001", {}, False),
        ("1/3", "0.333333", {}, True),
        ("0.333333", "1/3", {}, True),
        ("1/3", "0.3333", {}, False),
        ("1e-8", "2e-8", {}, False),
        ("0.5", "50%", {}, True),
        ("50%", "0.5", {}, True),
        ("50", "0.5", {}, False),
        ("4.2", "4.25", {"absolute": 0.1}, True),
        ("4.2", "4.35", {"absolute": 0.1}, False),
        ("41.8", "41.81", {"relative": 0.01}, True),
        ("41.8", "42.8", {"relative": 0.01}, False),
        ("0", "0.001", {"relative": 0.01}, False),
    ],
)
def test_numbers_are_compared_with_their_tolerance(gold, answer, tolerances, right):
    assert same_number(as_number(gold), as_number(answer), **tolerances) is right
