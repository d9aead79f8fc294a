"""What fields may hold, in the shapes of files and of other trainers' data sets; what is refused names its row."""

import csv
import json
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlif_lightning.data.problems import Source, read_problems
from rlif_lightning.data.rows import Row
from rlif_lightning.errors import UserError

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}
TURNS = [USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2 + 2?"}]


@pytest.fixture
def read(tmp_path):
    """Write rows, or columns of Parquet, and read the problems."""

    def run(rows, split="train", **source):
        path = tmp_path / ("a.parquet" if isinstance(rows, dict) else "a.jsonl")
        if isinstance(rows, dict):
            pq.write_table(pa.table(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_problems(Source(str(path), **source), split)

    return run


@pytest.fixture
def refused(read):
    """The complaint about rows; it must hold all parts."""

    def run(rows, parts, split="train", **source):
        with pytest.raises(UserError) as error:
            read(rows, split, **source)
        assert len(str(error.value).splitlines()) <= 4
        assert all(part in str(error.value) for part in parts), error.value

    return run


# -- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "text", "gold"),
    [
        (pa.array([b"caf\xc3\xa9?"]), pa.array([b"72"]), "café?", "72"),
        (pa.array([b"a"], pa.large_binary()), pa.array([[b"1", b"2"]]), "a", "1, 2"),
        (pa.array([0]), pa.array([Decimal("1.50")]), "0", "1.50"),
        (pa.array([2.5]), pa.array([Decimal("12345678901234567890.123")]), "2.5", "12345678901234567890.123"),
        (pa.array(["a"]).dictionary_encode(), pa.array([1.5], pa.float16()), "a", "1.5"),
        (pa.array([7], pa.uint8()), pa.array([True]), "7", "True"),
    ],
)
def test_values_of_parquet(question, answer, text, gold, read):
    """The bytes 72 were once the right answer `55, 50`."""
    (problem,) = read({"question": question, "answer": answer})
    assert (problem.text, problem.gold.text) == (text, gold)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.str_("a"), "a"),
        (np.bytes_(b"a"), "a"),
        (memoryview(b"a"), "a"),
        (np.array([1, 2]), [1, 2]),
        (np.array([{"role": "user", "content": b"x"}], dtype=object), [{"role": "user", "content": "x"}]),
        (float("nan"), None),
        (np.float64("nan"), None),
        ([b"a", [Decimal("1E+2")]], ["a", ["100"]]),
    ],
)
def test_values_become_plain_python(value, plain):
    found = Row("Row 1", {"a": value}).value("a", "answer")
    assert found == plain and type(found) is type(plain)


@pytest.mark.parametrize(
    ("column", "parts"),
    [
        (pa.array([b"1", b"\xff"]), ["Row 2 of", "'answer' holds bytes that are not UTF-8 text", "xff"]),
        (pa.array([date(2020, 1, 2)] * 2), ["Row 1 of", "no answer", "datetime.date(2020, 1, 2) (date)"]),
        (pa.array([datetime(2020, 1, 2)] * 2), ["Row 1 of", "(datetime)"]),
        (pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), ["Row 1 of", "no answer", "('a', 1)"]),
        (pa.array([["1"], ["1", None]]), ["Row 2 of", "no answer", "None (NoneType)"]),
        (pa.array([[["1"]]] * 2), ["Row 1 of", "no answer", "[['1']] (list)"]),
        (pa.array([{"value": "1"}] * 2), ["Row 1 of", "{'value': '1'} (dict)", "with a dot"]),
        (pa.array([1.0, float("inf")]), ["Row 2 of", "inf (float)"]),
    ],
)
def test_answers_of_a_wrong_kind_are_refused_by_name(column, parts, refused):
    refused({"question": ["a", "b"], "answer": column}, ["a.parquet", *parts])


@pytest.mark.parametrize(
    ("row", "parts", "source"),
    [
        ({"question": None}, ["no text in 'question'", "null"], {}),
        ({"question": ""}, ["no text in 'question'"], {}),
        ({"question": {"de": "x"}}, ["no text in 'question'", "{'de': 'x'} (dict)"], {}),
        ({"question": ["x"]}, ["neither a text nor a conversation", "['x'] (list)", "role: user"], {}),
        ({"question": ["x"]}, ["no text in 'question'", "['x'] (list)"], {"prompt": "{question}"}),
        ({"answer": "\ud800"}, ["'answer' holds half a character"], {}),
        ({"unit": ["m"]}, ["no text in 'unit'", "['m'] (list)"], {"unit": "unit"}),
        ({"error": "much"}, ["no tolerance", "'much'"], {"tolerance": "error"}),
        ({"level": {"x": 1}}, ["no text in 'level'", "data.*.by"], {"by": "level"}),
    ],
)
def test_other_fields_of_a_wrong_kind_are_refused_by_name(row, parts, source, refused):
    rows = [
        {"question": "a", "answer": "1", "unit": "m", "error": 1, "level": 1},
        {"question": "a", "answer": "1", **row},
    ]
    refused(rows, ["Line 2 of", "a.jsonl", *parts], **source)


def test_a_missing_unit_is_none(read):
    """pandas writes NaN for it, which became the unit "nan"."""
    rows = [{"question": "a", "answer": 1, "unit": x, "error": x} for x in (float("nan"), None, "")]
    assert {(p.gold.unit, p.gold.tolerance) for p in read(rows, unit="unit", tolerance="error")} == {(None, ())}


# -- rows without an answer -----------------------------------------------------------------------------------------

EMPTY = [None, "", " ", [], float("nan")]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize(
    ("split", "more"),
    [
        ("train", ["data.train.answer null if no reward needs answers"]),
        ("predict", ["data.predict.answer null if nothing is to be graded"]),
        ("test", []),
    ],
)
def test_rows_without_an_answer_are_counted(empty, split, more, refused, read, caplog):
    full = {"question": "a", "answer": "1"}
    rows = [full, {"question": "b", "answer": empty}, full, {"question": "c"}, full]
    skip = f"set data.{split}.without_answer skip"
    refused(rows, ["Line 2 of", "a.jsonl", "no answer in 'answer'", "(2 of 5 rows have none)", skip, *more], split)
    kept = read(rows, split, without_answer="skip")
    assert [(p.text, p.gold.text) for p in kept] == [("a", "1")] * 3
    assert [p.place.split(" of")[0] for p in kept] == ["Line 1", "Line 3", "Line 5"]  # as in the file
    assert "a.jsonl: 2 of 5 rows have no answer and are left out" in caplog.text
    assert len(read(rows, split, answer=None)) == 5


def test_training_advice_is_not_given_where_answers_are_needed(read):
    with pytest.raises(UserError) as error:
        read([{"question": "a", "answer": "1"}, {"question": "a", "answer": ""}], "val")
    assert "null" not in str(error.value)


@pytest.mark.parametrize("choice", ["error", "skip"])
def test_no_row_has_an_answer(choice, refused):
    where = {"without_answer": choice}
    refused([{"question": "a"}] * 2, ["Line 1 of", "no field 'answer'", "fields question", "null"], **where)
    refused([{"question": "a", "answer": None}], ["1 of 1 rows", "name the field of the answer"], **where)
    refused([{"question": "a", "answer": "x"}], ["'boxed'", "got: 'x'", "data.train.gold"], gold="boxed", **where)


def test_rows_whose_answer_stands_elsewhere(refused, read):
    rows = [{"question": "a", "answer": r"So \boxed{2}"}, {"question": "b", "answer": "So 3"}]
    refused(rows, ["Line 2 of", "at 'boxed' (1 of 2 rows", "'So 3'", "data.val.gold", "skip"], "val", gold="boxed")
    assert [p.gold.text for p in read(rows, gold="boxed", without_answer="skip")] == ["2"]


# -- shapes of other trainers ---------------------------------------------------------------------------------------

VERL = {"data_source": "openai/gsm8k", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "2"}}
VERL["extra_info"] = {"index": 0, "level": "easy", "question": "What is 1 + 1?"}


@pytest.mark.parametrize(
    ("row", "text", "messages", "gold"),
    [
        ({"prompt": "a?", "answer": "1"}, "a?", [], "1"),
        ({"problem": "a?", "answer": "1"}, "a?", [], "1"),
        ({"question": "a?", "prompt": "no", "answer": "1", "ground_truth": "no"}, "a?", [], "1"),
        ({"prompt": [USER], "ground_truth": "2"}, USER["content"], [USER], "2"),
        ({"question": [USER], "answer": 2}, USER["content"], [USER], "2"),
        (VERL, USER["content"], [USER], "2"),
        ({**VERL, "prompt": [SYSTEM, USER]}, "system: Be brief.\n\nuser: What is 1 + 1?", [SYSTEM, USER], "2"),
    ],
)
@pytest.mark.parametrize("file", ["jsonl", "parquet"])
def test_shapes_that_need_no_settings(row, text, messages, gold, file, read):
    (problem,) = read({name: [value] for name, value in row.items()} if file == "parquet" else [row])
    assert (problem.text, list(problem.messages), problem.gold.text) == (text, messages, gold)


def test_which_fields_stand_in_is_said_once(read, caplog):
    read([VERL] * 3)
    assert caplog.text.count("no field 'question': 'prompt' stands in") == 1
    assert caplog.text.count("no field 'answer': 'reward_model.ground_truth' stands in") == 1


def test_the_first_row_decides_which_fields_stand_in(refused):
    refused([{"prompt": "a", "answer": 1}, {"question": "b", "answer": 1}], ["Line 2 of", "no field 'prompt'"])


@pytest.mark.parametrize(
    ("source", "text", "gold", "by"),
    [
        ({"prompt": "extra_info.question"}, USER["content"], "2", {}),
        ({"prompt": "{extra_info.question} ({extra_info.level}) {n.x"}, "What is 1 + 1? (easy) {n.x", "2", {}),
        ({"by": ["extra_info.level"]}, USER["content"], "2", {"extra_info.level": "easy"}),
        ({"answer": "reward_model.style"}, USER["content"], "rule", {}),
        ({"answer": "dotted.name"}, USER["content"], "7", {}),
        ({"prompt": "turns.0.content", "answer": "turns.1.content"}, USER["content"], "2", {}),
        ({"prompt": "So {turns.0.content}"}, f"So {USER['content']}", "2", {}),
    ],
)
def test_fields_within_fields(source, text, gold, by, read):
    (problem,) = read([{**VERL, "dotted.name": 7, "dotted": {"name": 8}, "turns": TURNS}], **source)
    assert (problem.text, problem.gold.text, problem.by) == (text, gold, by)


@pytest.mark.parametrize(
    "name", ["extra_info.nosuch", "data_source.x", "prompt.content", "prompt.1.content", "extra_info.level.x"]
)
def test_a_missing_field_within_a_field_says_which_there_are(name, refused):
    refused([VERL], ["Line 1 of", f"no field '{name}'", "extra_info.level", "reward_model.ground_truth"], prompt=name)


def test_a_field_within_an_empty_field_is_empty(refused):
    rows = {"question": ["a", "b"], "reward_model": [{"ground_truth": "1"}, None]}
    refused(rows, ["Row 2 of", "no answer in 'reward_model.ground_truth'", "1 of 2 rows"])


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        ([], ["neither a text nor a conversation", "[] (list)"]),
        ([{"role": "user"}], ["neither a text nor a conversation", "'role': 'user'"]),
        ([{"role": "user", "content": [{"type": "image"}]}], ["neither a text nor a conversation", "image"]),
        ([{"from": "human", "value": "a"}], ["neither a text nor a conversation", "human"]),
        ([*TURNS, {"role": "assistant", "content": "4"}], ["does not end with a question", "role assistant"]),
        ([SYSTEM], ["does not end with a question", "role system"]),
        ([{"role": "user", "content": " "}], ["does not end with a question"]),
        ([{"role": "system", "content": "\ud800"}, USER], ["half a character"]),
    ],
)
def test_lists_that_are_no_question_are_refused(messages, parts, refused):
    refused([{"prompt": messages, "answer": "1"}], ["Line 1 of", *parts])


def test_choices_stand_below_the_last_message(read):
    row = {"prompt": TURNS, "choices": [Decimal("1.50"), "4"], "answer": "B"}
    (problem,) = read({name: [value] for name, value in {**row, "choices": ["1.50", "4"]}.items()}, options="choices")
    assert problem.messages[-1]["content"] == "And 2 + 2?\n\nA. 1.50\nB. 4"
    assert list(problem.messages[:-1]) == TURNS[:-1] and problem.gold.text == "B"


@pytest.mark.parametrize("written", [json.dumps, repr, lambda turns: f"\n{json.dumps(turns, indent=1)} "])
def test_a_conversation_in_a_text_is_one(written, read, tmp_path):
    """Cells of CSV files hold lists as JSON, or as pandas writes them; they were taken for the problem's text."""
    rows = [{"prompt": written(TURNS), "answer": "4"}, {"prompt": written([USER]), "answer": "2"}]
    assert [list(p.messages) for p in read(rows)] == [TURNS, [USER]]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "answer"])
        table.writeheader()
        table.writerows(rows)
    assert [list(p.messages) for p in read_problems(Source(str(tmp_path / "a.csv")))] == [TURNS, [USER]]


@pytest.mark.parametrize("text", ["[1, 2] is what?", "[1, 2]", '["a"]', "[]", '[{"role": "user"}]', "[" * 100_000])
def test_other_texts_in_brackets_stay_texts(text, read):
    (problem,) = read([{"prompt": text, "answer": "1"}])
    assert (problem.text, list(problem.messages)) == (text, [])


def test_a_conversation_in_a_text_must_end_with_a_question_too(refused):
    refused([{"prompt": json.dumps(TURNS[:2]), "answer": "1"}], ["Line 1 of", "does not end with a question"])


def test_empty_keys_of_messages_are_no_part_of_them(read):
    """Parquet gives every message every key."""
    (problem,) = read([{"prompt": [{**USER, "name": None, "tool_calls": None}], "answer": 1}])
    assert problem.messages == [USER]
