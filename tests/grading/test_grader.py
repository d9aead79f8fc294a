import os
import signal
import subprocess
import sys
import time

import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Gold, Grader
from rlif_lightning.grading import process as grading_process


def box(answer: str) -> str:
    return rf"so it is \boxed{{{answer}}}."


def grade(grader: Grader, *pairs: tuple[str, Gold | str]) -> list[bool]:
    return grader.grade([(box(a), True, Gold(g) if isinstance(g, str) else g) for a, g in pairs])


@pytest.fixture(scope="module")
def one():
    grader = Grader(AnswerFormat(), seconds=5.0)  # generous: these tests are about verdicts
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def several():
    grader = Grader(AnswerFormat(several="set"), seconds=5.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("27", "27.0"),
        ("25", "025"),
        (r"x = \frac{14}{3}", r"\frac{14}{3}"),
        (r"1 \cdot 2", "2"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        ("q-p+2p-2q", "p - q"),
        (r"\pi \cdot 288", r"288 \pi"),
        (r"\frac{9}{5}", r"1\frac{4}{5}"),
        (r"\text{east}", "East"),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        ("(0.5, 2)", r"(\frac{1}{2}, 2)"),
        (r"\begin{pmatrix} -0.5 \\ 2 \end{pmatrix}", r"\begin{pmatrix} -1/2 \\ 2 \end{pmatrix}"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        (r"[-2, 7]", r"x \in [-2,7]"),
        (r"2x+3", "y = 2x + 3"),
        (r"\frac{50}{100}", "50%"),
        ("52", "52_8"),
        (r"\sqrt [3]{5}", r"5^{1/3}"),
        ("((1-0)^2+(2)^2)^{1/2}", r"\sqrt{5}"),
        ("(1;2)", "(1,2)"),
        (r"\{1;2\}", r"\{2,1\}"),
    ],
)
def test_equal_answers_are_right(one, answer, gold):
    assert grade(one, (answer, gold)) == [True]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("28", "27"),
        ("1 or 2 or 3", "2"),
        ("1, 2, 3", "2"),
        (r"\{1, 2\}", "2"),
        ("2e-8", "1e-8"),
        (r"\frac{2}{10^8}", "1e-8"),
        ("(0,1)", "[0,1]"),
        ("(2, 1)", "(1, 2)"),
        ("seat", r"\text{east}"),
        ("x=2, y=3", "2"),
        ("y", "x"),
        ("52_9", "52_8"),
        (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("2^{100}", "2^{100}+1"),
        ("", "2"),
        (r"\text{or } 2 \text{ or } 3", "2"),
        ("99 = 42", "42"),
        (r"99 = \frac12", r"\frac12"),
        ("99 = x+1", "x+1"),
        ("{0}42", "42"),
        ("0{42}", "42"),
        ("[0]42", "42"),
        ("1;2", "(1,2)"),
        (r"\{1,2\}", "(1,2)"),
        ("(1,2,3)", r"\{1,2,3\}"),
        ("42 or 43", "42"),
        (r"\pm 42", "42"),
        (r"42 \neq 41", "42"),
    ],
)
def test_other_answers_are_wrong(one, answer, gold):
    assert grade(one, (answer, gold)) == [False]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("3, 1, 5", "1,3,5", True),
        ("1, 3", "1,3,5", False),
        ("1, 3, 5, 7", "1,3,5", False),
        ("1, 3, 5, 5", "1,3,5", True),
        ("-2", "-2,-2", True),
        (r"\frac{1}{2}, \frac{32}{9}", r"$\frac{32}{9}$,$\frac{1}{2}$", True),
        ("(2, 1), (3, 2)", "(1,1), (3,2)", False),
        ("(3,2), (1,1)", "$(1,1), (3,2)$", True),
        (r"1-\sqrt{19}, \sqrt{19}+1", r"1 \pm \sqrt{19}", True),
        ("x=1 \\text{ or } x=-2", "1,-2", True),
        (r"\sqrt{4}, 1 \cdot 3", "3,2", True),
        ("58500", "58,500", True),
        ("10,112,369", "10112369", True),
        ("a=3, b=2", "a=2, b=3", False),
        ("8, 221", "$221,$8$", True),
    ],
)
def test_sets_of_answers(several, answer, gold, right):
    assert grade(several, (answer, gold)) == [right]


def test_ordered_answers():
    grader = Grader(AnswerFormat(several="ordered"))
    assert grade(grader, ("1, 2", "1,2"), ("2, 1", "1,2"), ("1", "1,2")) == [True, False, False]


def test_units_and_tolerances():
    grader = Grader(AnswerFormat(several="set"))
    percent = Gold("4.2", "%", (0.1,))
    assert grade(grader, (r"4.25\%", percent), ("4.2", percent), ("4.4", percent)) == [True, True, False]
    each = Gold("1, 20", None, (0.1, 2.0))
    assert grade(grader, ("21, 1.05", each), ("1.5, 20", each)) == [True, False]
    speed = Gold(r"$\frac{600}{7}$", "km/h")
    assert grade(grader, (r"\frac{600}{7} \text{ km/h}", speed), (r"\dfrac{600}{7}", speed)) == [True, True]
    science = Grader(AnswerFormat(relative_tolerance=0.01))
    assert grade(science, (r"7.6 \times 10^{-6}", "7.55e-6"), ("8e-6", "7.55e-6")) == [True, False]


def test_exact_and_text_need_no_worker():
    toy = Grader(AnswerFormat(completion=r"#(\d)$", compare="exact", unfinished_is_wrong=True))
    items = [
        ("3+4#7", True, Gold("7")),
        ("3+4#7", False, Gold("7")),
        ("3+4#8", True, Gold("7")),
        ("7", True, Gold("7")),
    ]
    assert toy.grade(items) == [True, False, False, False]
    text = Grader(AnswerFormat(compare="text"))
    assert grade(text, ("27.0", "27"), (r"\text{Evelyn}", "Evelyn"), (r"1 \cdot 2", "2")) == [
        True,
        True,
        False,
    ]
    assert toy._workers == text._workers == []


def test_numbers_and_equal_texts_need_no_worker():
    grader = Grader(AnswerFormat())
    assert grade(grader, ("18", "18"), ("1,080", "1080"), ("17", "18"), (r"\pi", r"$\pi$")) == [
        True,
        True,
        False,
        True,
    ]
    assert grader.grade([]) == []
    assert grader._workers == []


def test_answers_for_grouping():
    grader = Grader(AnswerFormat(several="set", unfinished_is_wrong=True))
    texts = [
        (box("x = 27.0"), True),
        (box("27"), True),
        (box("27"), False),
        ("none", True),
        (box("2, 1"), True),
        (box("1,2"), True),
    ]
    assert grader.extract_answers(texts) == ["27", "27", None, None, "1,2", "1,2"]
    keys = grader.extract_answers([(box(text), True) for text in (r"x=25\pi", r"x \in [0,1]", "f(x)=2x", "y=2x")])
    assert keys == [r"25\pi", "[0,1]", "2x", "y=2x"]
    assert grader.extract_answers([(box("9" * 1_000_000), True), (box("(" * 3_000), True)]) == [None, None]


def classes(grader: Grader, *answers: str | None) -> list[int | None]:
    texts = ["no answer" if a is None else box(a) for a in answers]
    return grader.classes(grader.extract_answers([(text, True) for text in texts]))


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["1/2", "0.5", r"\frac{1}{2}", "0.50", "x = 0.5"], [0, 0, 0, 0, 0]),
        (["2", "1", "2.0", None, "1", "3"], [0, 1, 0, None, 1, 2]),
        (["(x+1)^2", "x^2", "x^2 + 2x + 1", "x x", "1 + x(x+2)"], [0, 1, 0, 1, 0]),
        ([r"\sqrt{12}", r"2 \sqrt 3", "3", r"\sqrt{9}"], [0, 0, 1, 1]),
        ([r"\text{East}", "west", "east", r"\text{ West }"], [0, 1, 0, 1]),
        (["(", "2", "((", "(", r"\nonsense{"], [0, 1, 2, 0, None]),  # unparsable: equal to its own copies only
        (["9" * 2_000, "1", "(" * 3_000], [None, 0, None]),  # of no plausible size
        ([None, None], [None, None]),
        ([], []),
    ],
)
def test_classes_of_equivalent_answers(one, answers, wanted):
    assert classes(one, *answers) == wanted


def test_classes_of_several_answers(several):
    answers = ["1, 2", "2, 1", "1", r"\{2, 1\}", "1/2, 2", "2, 0.5", r"\sqrt{4}, 1", "1, 2, 3"]
    assert classes(several, *answers) == [0, 0, 1, 0, 2, 2, 0, 3]


def test_classes_letter_for_letter():
    toy = Grader(AnswerFormat(completion=r"#(\S*)$", compare="exact", unfinished_is_wrong=True))
    texts = ["#1/2", "#0.5", "#1/2", "none", "#", "#7", "#0.5"]
    ended = [True, True, True, True, True, False, True]
    answers = toy.extract_answers(list(zip(texts, ended, strict=True)))
    assert toy.classes(answers) == [0, 1, 0, None, None, None, 1]
    text = Grader(AnswerFormat(compare="text"))
    assert classes(text, "1/2", "0.5", r"1 \cdot 2", "2") == [0, 0, 1, 2]
    assert toy._workers == text._workers == []


def test_a_class_does_not_grow_by_steps():
    """Each answer is within one per cent of the one before it, the third not of the first."""
    science = Grader(AnswerFormat(relative_tolerance=0.01))
    assert classes(science, "100", "100.9", "101.8", "102.7") == [0, 0, 1, 1]


HOSTILE = {
    "tower": "9**9**9",
    "tower in LaTeX": "9^{9^{9}}",
    "brackets": "(" * 3_000 + "1" + ")" * 3_000,
    "a megabyte of digits": "9" * 1_000_000,
    "factorials": "((9!)!)!",
    "more factorials": "9!!!!!",
    "exponent": "1e999999999",
    "two thousand fractions": r"\frac{1}{" * 2_000 + "1" + "}" * 2_000,
    "list": ",".join(map(str, range(300))),
    "not text": "\0\ud800\u202e",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_at_once(one, name):
    start = time.monotonic()
    assert grade(one, (HOSTILE[name], "2")) == [False]
    assert time.monotonic() - start < 6.0
    assert one.timeouts == 0


SLOW = r"\binom{999999}{500000}"  # looks harmless, and nothing but time ends it


def test_a_slow_answer_is_killed_and_the_batch_goes_on_in_order():
    grader = Grader(AnswerFormat(), seconds=1.5)
    assert grade(grader, (r"1 \cdot 2", "2")) == [True]  # workers are up
    first = grader._workers[0]
    start = time.monotonic()
    verdicts = grade(grader, (r"3 \cdot 2", "6"), (SLOW, "2"), (r"3 \cdot 4", "12"), (r"3 \cdot 5", "16"))
    assert time.monotonic() - start < 6.0
    assert verdicts == [True, False, True, False]
    assert grader.timeouts == 1
    assert grader._workers[0] is not first and first._process.returncode == -signal.SIGKILL
    assert grade(grader, (SLOW, "2")) == [False]
    assert grader.timeouts == 1  # the same pair is not compared again
    grader.close()


def test_a_slow_answer_costs_the_classes_its_time_once():
    grader = Grader(AnswerFormat(), seconds=1.5)
    votes = (r"1 \cdot x", SLOW, "x+1", "1+x", SLOW, r"x \cdot 1", "2")
    assert classes(grader, *votes) == [0, 1, 2, 2, 1, 0, 3]
    assert grader.timeouts == 1  # not once for every other answer
    assert classes(grader, *votes) == [0, 1, 2, 2, 1, 0, 3]
    assert grader.timeouts == 1
    grader.close()


def test_the_answers_of_a_rollout_have_a_time_together():
    grader = Grader(AnswerFormat(), seconds=0.5, budget=0.6)
    assert grade(grader, (r"1 \cdot 2", "2")) == [True]  # workers are up
    slow = [rf"{SLOW}+{n}" for n in range(40)]
    grader.begin()
    start = time.monotonic()
    assert classes(grader, *slow, "1", "1.0", *slow) == [*range(41), 40, *range(40)]
    assert grade(grader, (r"\sqrt{4}", "2"), ("2.0", "2")) == [False, True]
    assert grader.timeouts == 41  # each answer once, those to which no time was left as well
    assert time.monotonic() - start < 5.0  # not 40 times half a second
    grader.begin()
    assert grade(grader, (r"\sqrt{4}", "2")) == [True]  # known now: there is time again
    assert grader.timeouts == 0
    grader.close()


HOPELESS = {
    "tower": "e^{e^{e^{e}}}",
    "tower of digits": "2^{3^{4^5}}",
    "tower of functions": r"\exp(\exp(\exp(9)))",
    "factorial above": "x^{n!}",
    "power of a power": "((a+1)^{99})^{99}",
    "union": r"\cup".join(f"({n},{n}.5)" for n in range(21)),
    "digits": "7" * 5_000,
    "tower below one": "5^{-18^{30}}",
    "binomial of powers": r"\binom{10^{4}}{13 \cdot 10^8}",
    "sum": r"\sum_{k=1}^{10^9} \frac{1}{k^{3}}",
    "integral": r"\int_0^{10^9} e^{-x^{3}} \sin(x^x) dx",
    "limit": r"\lim_{x \to \infty} (1 + \frac{7}{x})^{x^{3}}",
}


def test_a_formula_that_is_still_to_be_worked_out_equals_its_own_text():
    grader = Grader(AnswerFormat())
    assert grade(grader, (r"\sum_{k=1}^n k^2", r"\sum_{k=1}^n k^2"), (r"\limits", r"\limits")) == [True, True]


@pytest.mark.parametrize("name", HOPELESS)
def test_hopeless_formulas_are_refused_at_a_glance(name):
    grader = Grader(AnswerFormat())
    assert grade(grader, (HOPELESS[name], "2")) == [False]
    assert grader._workers == []


def test_a_worker_that_dies_by_itself_is_replaced():
    grader = Grader(AnswerFormat(), seconds=5.0)
    assert grade(grader, (r"1 \cdot 2", "2")) == [True]
    for worker in grader._workers:
        worker._process.kill()
        worker._process.wait()
    assert grade(grader, (r"3 \cdot 2", "6"), (r"3 \cdot 2", "7")) == [True, False]
    grader.close()


def test_a_worker_that_dies_over_an_answer_makes_it_wrong(monkeypatch):
    grader = Grader(AnswerFormat(), seconds=5.0)
    assert grade(grader, (r"1 \cdot 2", "2")) == [True]
    worker = grader._workers[0]
    monkeypatch.setattr(worker, "_receive", lambda seconds: (_ for _ in ()).throw(EOFError))
    assert grade(grader, (r"3 \cdot 2", "6"), (r"3 \cdot 3", "9")) == [False, True]
    assert grader.errors == 1
    grader.close()


def test_close_ends_the_processes_and_work_can_go_on():
    grader = Grader(AnswerFormat(), seconds=5.0)
    assert grade(grader, (r"1 \cdot 2", "2")) == [True]
    processes = [worker._process for worker in grader._workers]
    grader.close()
    assert all(process.poll() is not None for process in processes)
    assert grade(grader, (r"1 \cdot 3", "3")) == [True]
    processes = [worker._process for worker in grader._workers]
    del grader
    assert all(process.poll() is not None for process in processes)


PROGRAM = r"""
import sys, time
from rlif_lightning.grading import AnswerFormat, Gold, Grader
grader = Grader(AnswerFormat())
assert grader.grade([(r"\boxed{1 \cdot 2}", True, Gold("2"))]) == [True]
heavy = {"torch", "lightning", "transformers", "sympy", "math_verify"} & set(sys.modules)
assert not heavy, heavy
print(*[worker._process.pid for worker in grader._workers], flush=True)
if len(sys.argv) > 1:
    time.sleep(60)
"""


def _gone(pid: int) -> bool:
    """Whether a process has ended, a zombie that nobody collected included."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
@pytest.mark.parametrize("killed", [False, True])
def test_no_worker_outlives_its_parent(killed):
    command = [sys.executable, "-c", PROGRAM, *(["stay"] if killed else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if killed:
            os.kill(parent.pid, signal.SIGKILL)
        parent.wait(timeout=30)
    assert len(pids) == 2
    assert parent.returncode == (-signal.SIGKILL if killed else 0)
    deadline = time.monotonic() + 30
    while not all(map(_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(_gone, pids))


def test_a_missing_math_verify_is_the_users_to_mend(monkeypatch):
    program = """
from multiprocessing.connection import Connection
Connection(0).send_bytes(b'"No module named math_verify"')
"""
    monkeypatch.setattr(grading_process, "COMMAND", (sys.executable, "-c", program))
    with pytest.raises(UserError, match="No module named math_verify"):
        grade(Grader(AnswerFormat()), (r"1 \cdot 2", "2"))


def test_a_worker_that_never_starts_is_an_error(monkeypatch):
    monkeypatch.setattr(grading_process, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    grader = Grader(AnswerFormat())
    with pytest.raises(UserError, match="the grading worker does not start"):
        grade(grader, (r"1 \cdot 2", "2"))
    assert grader._workers == []


def test_files_in_the_users_folder_do_not_shadow_the_workers_modules(tmp_path, monkeypatch):
    """`python -m` looks into the current folder first: a fractions.py there ended every worker."""
    (tmp_path / "fractions.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "sympy.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    grader = Grader(AnswerFormat())
    assert grader.grade([(r"\boxed{x^2 + 2x + 1}", True, Gold("(x+1)^2"))]) == [True]
    grader.close()
