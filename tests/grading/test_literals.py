"""Python literals: found, compared by value, and cheap whatever a model writes."""

import ast
import itertools

import pytest

from rlif_lightning.errors import UserError
from rlif_lightning.grading import AnswerFormat, Gold, Grader, check_gold
from rlif_lightning.grading import literals as module
from rlif_lightning.grading.extraction import extract
from rlif_lightning.grading.literals import canonical_literal, read_literal, same_literal

VALUES = [
    "1", "1.0", "True", "0", "False", "-0.0", "''", "None", "'1'", "b'1'", "1+0j", "1+2j", "(1+2j)", "1e3",
    "1_000", "0x10", "16", "[]", "()", "{}", "set()", "[1]", "(1,)", "{1}", "{True, 1}", "{1: 2}", "{True: 2.0}",
    "{'a': 1, 'b': [2]}", "{'b': [2], 'a': 1}", "{'b': (2,), 'a': 1}", "[[1, 2], (3, {4: {5, 6}})]",
    "[[1, 2.0], (3, {4: {6, 5}})]", "'a' 'b'", "'ab'", '"ab"', "'''ab'''", r"'\x61b'", "r'ab'", "'å'", r"b'\xe5'",
    "1, 2", "(1, 2)", "[1, 2]", "[2, 1]", "1e999", "-1e999", r"'it\'s'", '"it\'s"', "'[ANSWER] == 5'", "'a\\nb'",
]  # fmt: skip
HOSTILE = [
    "9**9**9", "__import__('os').system('x')", "f'{1+1}'", "lambda: 1", "[x for x in (1,)]", "{**{}}", "[*[1]]",
    "1 + 1", "(" * 5_000 + "1" + ")" * 5_000, "[" * 5_000, "-" * 9_000 + "1", "1" + "-1" * 4_000,
    "1" + "-1j" * 3_000, "not " * 2_000 + "1", "[0]" * 3_000, "'a'[0]" * 1_500, "9" * 9_999, "9" * 1_000_000,
    "1_" * 4_000, "'" * 9_999, "'''\\" * 2_500, "'\\N{" * 2_000, "\0", "'\0'", "'\ud800'", "{[1]}", "{{}: 1}",
    "set() or 1", "a.b.c", "1 if 1 else 2", "print", "...", "nan", "float('nan')", "", " ",
    "{1:" * 60 + "1" + "}" * 60, ":", "1:2", "[1", "1]",
]  # fmt: skip
LONG = [
    "== " * 100_000, "==1" * 30_000, "= 1," * 20_000, ": " * 50_000, "is '" * 20_000, "==[1," * 10_000,
    "[:1," * 10_000, '"""' * 20_000, "[ANSWER]" * 50_000, "[/ANSWER]" * 50_000, "[ANSWER]1,[/ANSWER]" * 20_000,
    "=" + "[" * 40 + "1," * 20_000, "\n" * 200_000,
]  # fmt: skip


def test_equal_as_python_finds_them_equal():
    """Against Python's own comparison of the same trusted literals: `assert f(x) == y` is CRUXEval's rule."""
    for one, other in itertools.product(VALUES, repeat=2):
        equal = ast.literal_eval(one) == ast.literal_eval(other)
        assert same_literal(one, other) == equal, (one, other)
        assert (canonical_literal(one) == canonical_literal(other)) == equal, (one, other)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_literal_is_wrong(text):
    assert read_literal(text) == ()
    assert canonical_literal(text) is None
    assert not same_literal("1", text) and not same_literal(text, text)
    found = extract(text, "literal")
    assert found is None or len(found) < 10


def test_the_parser_sees_nothing_but_literals(monkeypatch):
    """No code, no tree deeper than its brackets, nothing long; nothing that Python would have to refuse."""
    seen = []
    monkeypatch.setattr(module.ast, "literal_eval", lambda text: seen.append(text) or 0)
    for text in [*HOSTILE, *LONG]:
        extract(text, "literal")
        same_literal("1", text)
    deepest = max(max(itertools.accumulate((c in "([{") - (c in ")]}") for c in text)) for text in seen)
    assert deepest <= module.MAX_DEPTH and max(map(len, seen)) <= module.MAX_LITERAL
    assert len(seen) < 10 * len(HOSTILE + LONG)  # hostile texts are hardly ever tried
    assert not {"[0]" * 3_000, "'a'[0]" * 1_500, "1" + "-1" * 4_000} & set(seen)  # trees as deep as they are long
    assert not any("**" in text or "lambda" in text or "f'" in text for text in seen)


def test_long_texts_cost_little(monkeypatch):
    """Counted, not timed: letters that the scanner looks at."""
    letters = 0
    match = module._TOKEN.match

    class Counting:
        def match(self, text, place):
            nonlocal letters
            token = match(text, place)
            letters += 1 if token is None else token.end() - place
            return token

    monkeypatch.setattr(module, "_TOKEN", Counting())
    for text in LONG:
        letters = 0
        extract(text, "literal")
        assert letters < 200 * module.MAX_LITERAL, text[:20]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n[ANSWER] [1, 2] [/ANSWER]", "[1, 2]"),
        ("[ANSWER]assert f('a == b') == 'c == d'[/ANSWER]", "'c == d'"),
        ("[ANSWER]\nassert f(1) == {'a':\n 1}\n[/ANSWER] [ANSWER] 2 [/ANSWER]", "{'a':\n 1}"),  # it went on writing
        ("I write [ANSWER] value [/ANSWER]: [ANSWER] 3 [/ANSWER]", "3"),
        ("[ANSWER] 'cut", None),
        ("[ANSWER] 5", "5"),
        ("[ANSWER] no idea [/ANSWER]\n7", "7"),
        ("thus\nassert f('==', 2) == '=='\n", "'=='"),
        ("```python\nassert f(1) == 5\n```", "5"),
        ("1\n2", "2"),
        ("The output is `'ab'`.", "'ab'"),
        ("Output: **(1, 2)**", "(1, 2)"),
        ("f(2) returns {1: 'x'}", "{1: 'x'}"),
        ("f(2) -> None", "None"),
        ("it is 5.5.", "5.5"),
        ("it is 5 or 6", None),
        ("I don't know", None),
        ("hello", None),
        ("", None),
    ],
)
def test_where_the_answer_stands(text, answer):
    assert extract(text, "literal") == answer


def test_the_grader_compares_values():
    grader = Grader(AnswerFormat(completion=["literal", "boxed"], compare="literal"))
    gold = Gold("{'b': 1, 'a': (2, 3)}")
    texts = [
        "[ANSWER] {'a': (2, 3), 'b': True} [/ANSWER]",
        r"so \boxed{{'a': (2, 3.0), 'b': 1}}",
        "{'a': [2, 3], 'b': 1}",
        "?",
    ]
    assert grader.grade([(text, True, gold) for text in texts]) == [True, True, False, False]
    answers = grader.extract_answers([(text, True) for text in texts])
    assert grader.classes(answers) == [0, 0, 1, None]
    assert not grader._workers  # no process is needed for this


def test_a_right_answer_that_is_no_literal_is_refused():
    check_gold(AnswerFormat(compare="exact"), Gold("nine"), "Row 3")
    check_gold(AnswerFormat(compare="literal"), Gold("'nine'"), "Row 3")
    with pytest.raises(UserError, match=r"Row 3: .*not a Python literal"):
        check_gold(AnswerFormat(compare="literal"), Gold("nine"), "Row 3")
