"""Which answers are equal: tables with verdicts by hand, tried both ways round."""

import time

import pytest

from rlif_lightning.grading import AnswerFormat, Gold, Grader


@pytest.fixture(scope="module")
def grader():
    grader = Grader(AnswerFormat(), seconds=5.0)  # generous: these tests are about verdicts
    yield grader
    grader.close()


def right(grader: Grader, gold: str | Gold, answer: str) -> bool:
    gold = Gold(gold) if isinstance(gold, str) else gold
    return grader.grade([(rf"so it is \boxed{{{answer}}}.", True, gold)])[0]


def rows(table: str) -> list[tuple[str, str]]:
    return [(one.strip(), other.strip()) for one, other in (line.split(" ~ ") for line in table.strip().splitlines())]


EQUAL = r"""
    y''+y=0 ~ y''=-y
    f'(x) ~ f^{\prime}(x)
    y'' ~ y^{\prime\prime}
    f'(x)=2x ~ 2x
    \frac{dy}{dx}=2x ~ 2x
    \frac{dy}{dx}+y=0 ~ \frac{dy}{dx}=-y
    \frac{d}{dx}(x^2) ~ 2x
    x'+y' ~ y'+x'
    2x-4=0 ~ x=2
    x^2=4 ~ x^2-4=0
    x^2-4=0 ~ 2x^2-8=0
    2x+4y-3=0 ~ y=-\frac12x+\frac34
    x^2+1=0 ~ -3x^2=3
    (x-1)^2=0 ~ x=1
    xy=1 ~ y=\frac{1}{x}
    2^3=8 ~ 8=2^3
    5x-7y+4=0 ~ \{7y-5x=4\}
    y=2x+1 ~ 2x+1
    x=2+3=5 ~ 5
    2+3=5 ~ 5
    x+y=7 ~ 7
    a+b=2+3=5 ~ 5
    a+b=2+3=5 ~ a+b=5
    1+2+3=3+3=6 ~ 6
    x=\pm 2 ~ \{2,-2\}
    x>2 ~ -2x<-4
    x^2<4 ~ |x|<2
    1<x<2 ~ 2>x>1
    x \neq 1 ~ (-\infty,1)\cup(1,\infty)
    [2,\infty) ~ x \geq 2
    x \in [-2,7] ~ -2 \leq x \leq 7
    x>2 ~ \{x \mid x>2\}
    (-\infty,1)\cup(1,\infty) ~ \mathbb{R}\setminus\{1\}
    \frac{x^2-1}{x-1} ~ x+1
    \sin^2 x+\cos^2 x ~ 1
    n! ~ n(n-1)!
    \sum_{k=1}^{n} k ~ \frac{n(n+1)}{2}
    0.5x ~ \frac{x}{2}
    \sqrt{5+2\sqrt6} ~ \sqrt2+\sqrt3
    \cos\frac{\pi}{5} ~ \frac{1+\sqrt5}{4}
    \frac{1}{2}\ln 3 ~ \ln\sqrt3
    \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1\\\frac{4}{2}\end{pmatrix}
    50\% ~ 0.5
    50\% ~ \frac12
    50\% ~ 50
    50\text{ percent} ~ 50\%
    1\,000 ~ 1000
    1 000 ~ 1,000
    5\text{ m} ~ 5
    5\text{ m} ~ 5 meters
    864 \mbox{ inches}^2 ~ 864 \text{ square inches}
    5 m ~ 5
    5 m ~ 5\text{ meters}
    5 m ~ 5m
    12 s ~ 12 seconds
    \frac{1}{2} g ~ \frac{g}{2}
    \frac{1}{2} mg ~ \frac{mg}{2}
    2mg ~ 2gm
    5 mg ~ 5
    3\sqrt{2}\text{ cm} ~ 3\sqrt{2} cm
    18 logs ~ 18
    18 secs ~ 18 seconds
    sin x + cosx ~ \cos x+\sin x
    60 miles per hour ~ 60\text{ miles}/\text{hour}
    5/4 ~ 1 1/4
    2\frac{1}{2} ~ 2.5
    -1\frac12 ~ -1.5
    2\pi ~ 2*pi
    7*sin(pi*x/5)+1 ~ 7\sin(\frac{\pi}{5}x)+1
    exp(x) ~ e^x
    log(2) ~ \log 2
    x**2+1 ~ x^2+1
    sqrt(x+1)/2 ~ \frac{\sqrt{x+1}}{2}
    infinity ~ \infty
    √2 ~ \sqrt2
    √12 ~ 2√3
    2² ~ 4
    5×10³ ~ 5000
    1½ ~ 1.5
    0.3\overline{6} ~ \frac{11}{30}
    0.3\bar6 ~ \frac{11}{30}
    i^2 ~ -1
    2i ~ \sqrt{-4}
    a+2i ~ 2i+a
    z=1+i ~ i+1=z
    e^{i\pi/3} ~ \frac12+\frac{\sqrt3}{2}i
    \sin 30^\circ ~ \frac12
    90^\circ ~ 90
    x<2 or x>3 ~ (-\infty,2)\cup(3,\infty)
    x<2 \text{ or } x>3 ~ (-\infty,2)\cup(3,\infty)
    x<2 \cup x>3 ~ x>3 \lor x<2
    x<2 or x>3 ~ x<2, x>3
    x \leq -1 or x \geq 2 ~ (-\infty,-1]\cup[2,\infty)
    1<x<2 or x>3 ~ (1,2)\cup(3,\infty)
    x<-1 or x>1 ~ |x|>1
    x<1 or x>1 ~ x \neq 1
    x<2 or y>3 ~ y>3 or x<2
    x>1 and x<2 ~ 1<x<2
    R^2-r^2 ~ (R-r)(R+r)
    4\pi r^2 ~ 4\pi R^2
    x+x=2x ~ 2x
    \frac13 ~ 0.333333
    \{\frac13,2\} ~ \{2,0.333333\}
    1\frac{1}{2}x ~ \frac{3x}{2}
    \frac\pi4 ~ \arctan 1
    \frac{\sqrt{2}}2 ~ \frac{1}{\sqrt2}
    3{,}14 ~ 3.14
    1{,}234 ~ 1234
    6.02 x 10^23 ~ 6.02e23
    \textbf{(B)}\ 12 ~ 12
    (C) \frac12 ~ 0.5
    =5 ~ 5
    x \approx 3.14 ~ \approx 3.14
    5^{\text{th}} ~ 5
    5\\ ~ 5
    \emptyset ~ \varnothing
    25°C ~ 25
    50\%\text{ of the eggs} ~ 50\%
    3.0\times10^8 m/s ~ 3e8
    10:30 am ~ 10:30
    10 a.m. ~ 10 am
    60 mph ~ 60 miles per hour
    \$18 ~ 18 dollars
    \$18 ~ 18 USD
    $18 ~ USD 18
    US\$18 ~ 18 US dollars
    €18 ~ 18 euros
    18¢ ~ 18 cents
    \$1,000 ~ 1000
    \$18 ~ \$18 per hour
    18 dollars ~ 18 dollars in all
    x=\$5 ~ 5 dollars
"""  # noqa: RUF001
DIFFERENT = r"""
    f'(x) ~ f(x)
    f''(x) ~ f'(x)
    x' ~ x
    y-y' ~ 0
    R'-R ~ 0
    y'=2x ~ y=2x
    y''+y=0 ~ y'+y=0
    f'(x)=2x ~ f'(x)=3x
    \frac{dy}{dx} ~ \frac{dx}{dy}
    \frac{dy}{dx} ~ 0
    \frac{\partial f}{\partial x} ~ 0
    \frac{dy}{dx}=2x ~ \frac{dy}{dx}=3x
    \frac{dy}{dx}+y=0 ~ y=0
    4 ~ 4\text{ is wrong, it is 5}
    x^2+1=0 ~ x^2+2=0
    x^2+1=0 ~ x^2-2x+10=0
    x^2+1=0 ~ 1=2
    1=1 ~ 2^3=8
    2^3=8 ~ 3^2=9
    \log 100=2 ~ 1=2
    x^2+1=0, 5 ~ x^2+2=0, 5
    x^2+1>0 ~ x^2+2>0
    x^2+1<0 ~ x^2+2<0
    \begin{pmatrix}1\\2\end{pmatrix}x=3 ~ \begin{pmatrix}1\\2\end{pmatrix}x=4
    \begin{pmatrix}1\\2\end{pmatrix}=3 ~ 1=2
    3x-y+13=0 ~ 3x+4y+14=0
    \sin x=0 ~ x^2-\pi x=0
    x=2 ~ y=2
    y=2x+1 ~ 2x+2
    x>2 ~ x<2
    x>2 ~ x \geq 2
    x>2 ~ -x>-2
    x>2 ~ \{x \mid x>3\}
    (2,\infty) ~ x \geq 2
    x \geq 5 ~ 5
    \frac1{20!} ~ \frac1{21!}
    \frac{1}{13!} ~ \frac{1}{13!-1}
    \frac{1}{2^{60}} ~ \frac{3}{2^{60}}
    \frac{\pi}{20!} ~ \frac{\pi}{21!}
    \frac{x}{20!} ~ \frac{x}{21!}
    (\frac{\pi}{20!}, 1) ~ (\frac{\pi}{21!}, 1)
    |x| ~ x
    \sqrt{x^2} ~ x
    1\% ~ 100\%
    10\% ~ 1000\%
    5\text{ m} ~ 5\text{ cm}
    5\text{ m} ~ 5 cm
    5 m ~ 5 s
    5\text{ eggs} ~ 5\text{ dollars}
    10 am ~ 10 pm
    5 ~ 5x
    5 ~ 5 x
    5 ~ 5xy
    3t ~ 3
    18 ~ 18 thousand
    18 ~ 18\text{ million}
    18 ~ 18 or so
    18 ~ 18 dollars and 50 cents
    1 ~ 1=1
    1 ~ 0=1
    2 ~ 1=2
    x ~ x=x
    1 4/5 ~ 14/5
    \cos 30^\circ ~ \frac12
    x+1=x ~ x+2=x
    x+1>x ~ x+2>x
    (x+1)^2=x^2+2x+2 ~ (x+1)^2=x^2+2x+3
    (x+1)^2=x^2+2x+2 ~ x=x+1
    x+y=y ~ x+y=y+1
    1 ~ 1=1=1
    1 ~ 1=0=1
    1 ~ 1=1.0
    x ~ x=x=x
    x ~ x+1=x
    x+1 ~ x=x+1
    x<2 or x>1 ~ x<2 and x>1
    x<2 or x>3 ~ (-\infty,2]\cup(3,\infty)
    x<2 or x>3 ~ y<2 or y>3
    x<2 or x>2 ~ x<3 or x>3
    x<1 or x>-1 ~ x<3 or x>2
    R-r ~ 0
    \pi(R^2-r^2) ~ 0
    A+a ~ 2a
    2\frac{1}{2}x ~ x
    (C) \frac12 ~ \frac{C}{2}
    \$18 ~ 18 cents
    $18 ~ 18 cents
    €18 ~ \$18
    £5 ~ €5
    USD 18 ~ EUR 18
    18¢ ~ \$18
    x=\$5 ~ 5 cents
    \$18 ~ 18 eggs
    \$18 ~ 18\%
    50\text{ eggs} ~ 50\%
    25°C ~ 25°F
    10 a.m. ~ 10 p.m.
    60 mph ~ 60 km/h
"""


@pytest.mark.parametrize(("one", "other"), rows(EQUAL))
def test_equal_in_value(grader, one, other):
    assert right(grader, one, other)
    assert right(grader, other, one)


@pytest.mark.parametrize(("one", "other"), rows(DIFFERENT))
def test_different_in_value(grader, one, other):
    assert not right(grader, one, other)
    assert not right(grader, other, one)


WAYS = r"""
    1,080       1{,}080       1\,080        1 080        $1080$      \$1,080     1080.0        1080.      \$1080.00
    €1080       USD 1080      1080 USD      1080 dollars  1,080 dollars  1080 eggs  1080 eggs per day   1080 km/h
    1080 m      1080\text{ dollars}   1080 \text{ cm}^2   \text{1080 dollars}   \mathbf{1080}   **1080**   \(1080\)
    x = 1080    x = 1,080 dollars     +1080   1.08e3   1.08 \times 10^3   1.08×10³    \frac{2160}{2}    20 \cdot 54
    20 * 54 = 1080      \text{Total} = 1080   1080^\circ   \displaystyle 1080   2 \times 540 = 1080 dollars
"""  # noqa: RUF001


@pytest.mark.parametrize(
    "way", [way for line in WAYS.strip().splitlines() for way in line.strip().split("  ") if way]
)
def test_ways_of_writing_a_number(grader, way):
    assert right(grader, "1080", way.strip())
    assert not right(grader, "1081", way.strip())


def test_an_equation_is_no_answer_where_its_solutions_are_asked_for(grader):
    assert right(grader, "x^2=4", r"\{2,-2\}")
    assert not right(grader, r"\{2,-2\}", "x^2=4")
    assert not right(grader, "(-2,2)", "x^2<4")


@pytest.mark.parametrize("nothing", ["1=1", "0=1", "x=x", "1=2", "2^3=8", "1=1=1", "1=0=1", "x+1=x", "x=x+1"])
def test_a_statement_without_content_is_no_answer(grader, nothing):
    for gold in (
        "0",
        "1",
        "x",
        "x=1",
        r"\frac12",
        r"x^2+1=0",
        r"[2,\infty)",
        "(1,2)",
        r"\{1\}",
        "x>1",
        r"\text{true}",
        "x+1",
        "2x=x",
        "x+2=x",
        "x<1 or x>2",
    ):
        assert not right(grader, gold, nothing)


@pytest.mark.parametrize("size", [3, 9, 15, 21, 30])
def test_a_difference_counts_however_small_it_is(grader, size):
    """Expanded products with letters, roots and constants, and the same off by 10^-size."""
    product = r"(x-\sqrt{2})(x+\pi y)\cdot\frac{3}{7}"
    expanded = r"\frac{3x^2}{7}+\frac{3\pi xy}{7}-\frac{3\sqrt{2}x}{7}-\frac{3\sqrt{2}\pi y}{7}"
    assert right(grader, product, expanded)
    assert right(grader, "z=" + product, f"-2z=-2({expanded})")
    assert not right(grader, product, rf"{expanded}+\frac{{1}}{{10^{{{size}}}}}")
    assert not right(grader, "z=" + product, rf"-2z=-2({expanded})+\frac{{1}}{{10^{{{size}}}}}")


def test_a_common_letter_behind_a_constant_is_a_unit(grader):
    assert right(grader, "5", "5m") and right(grader, r"11\sqrt2", r"11\sqrt2 m")
    assert not right(grader, "5m", "5") and not right(grader, "x", "x m")


def test_a_unit_that_the_problem_names():
    grader = Grader(AnswerFormat(), seconds=5.0)
    meters = Gold(r"2\sqrt{3}", "m")
    assert right(grader, meters, r"2\sqrt{3} m") and right(grader, meters, r"\sqrt{12}\text{ meters}")
    assert not right(grader, meters, r"2\sqrt{3}\text{ cm}")
    assert right(grader, Gold("45", "$cm^2$"), r"45\text{ square centimeters}")
    grader.close()


def test_votes_count_figures_and_use_the_same_equality(grader):
    votes = ["18 eggs", "18", r"18\text{ dollars}", "1%", "100%", "1", "y=2x", "4x-2y=0", "x=3", "3"]
    votes += ["x^2+1=0", "x^2+2=0", "x+1=x", "x+2=x", "x+1=x", "x<2 or x>3", r"(-\infty,2)\cup(3,\infty)"]
    answers = grader.extract_answers([(rf"\boxed{{{vote}}}", True) for vote in votes])
    assert grader.classes(answers) == [0, 0, 0, 1, 2, 1, 3, 3, 4, 4, 5, 6, 7, 8, 7, 9, 9]


@pytest.mark.parametrize(
    ("several", "votes"),
    [("one", ["18 cents", r"\$18", "18", "€18", "18 dollars"]), ("set", ["5 km, 6 km", "5, 6", "5 m, 6 m"])],
)
def test_votes_with_and_without_units_are_one_class_in_any_order(several, votes):
    grader = Grader(AnswerFormat(several=several), seconds=5.0)
    for _ in votes:
        votes = [*votes[1:], votes[0]]
        answers = grader.extract_answers([(rf"\boxed{{{vote}}}", True) for vote in votes])
        assert set(grader.classes(answers)) == {0}, votes
    grader.close()


def test_units_that_differ_do_not_match_as_text_either():
    grader = Grader(AnswerFormat(compare="text"))
    assert right(grader, r"\$18", "18 dollars") and right(grader, "18", r"\$18") and right(grader, "5 km", "5")
    assert not right(grader, r"\$18", "18 cents") and not right(grader, "5 km", "5 m")
    assert right(grader, Gold("45", "km"), "45 km") and not right(grader, Gold("45", "km"), "45 m")


def test_hostile_equations_cost_the_votes_their_time_once_each():
    grader = Grader(AnswerFormat(), seconds=0.5)
    votes = [rf"(x+{n})^{{9999}}=y+x" for n in range(1, 4)] + ["1", "y=2x", "2y=4x", "1"]
    answers = grader.extract_answers([(rf"\boxed{{{vote}}}", True) for vote in votes])
    start = time.monotonic()
    assert grader.classes(answers)[3:] == [3, 4, 4, 3]
    assert grader.timeouts <= 3 and time.monotonic() - start < 20
    grader.close()
