"""Rows of a data set: every kind of file, the mapping of fields, data without answers."""

import csv
import json

import pytest

from rlif_lightning.data.problems import TOY_HELD_OUT, Source, read_problems
from rlif_lightning.errors import UserError
from rlif_lightning.toy import toy_problems
from tests.processes import used_by

ROWS = [
    {"question": "What is 2 + 2? Think {hard}.", "answer": "So\n#### 4"},
    {"question": 'Two lines,\n"quoted", süß: 3 + 4?', "answer": "So\n#### 1,007"},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_problems(ending, tmp_path):
    path = write(tmp_path / f"rows{ending}", ROWS)
    problems = read_problems(Source(path, gold=r"####\s*(.+)"))
    assert [p.text for p in problems] == [r["question"] for r in ROWS]
    assert [p.gold.text for p in problems] == ["4", "1,007"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_reading_a_file_leaves_nothing_in_the_users_home(ending, tmp_path, monkeypatch):
    """Reading with `datasets` copied every local file into its cache there."""
    import datasets

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setenv("HOME", str(home))
    read_problems(Source(write(tmp_path / f"rows{ending}", ROWS)))
    assert list(home.iterdir()) == []


def test_json_objects_one_per_line_under_a_json_ending(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert len(read_problems(Source(str(path)))) == 2


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name, text in (
        ("a.csv", "question,answer\na,1\n"),
        ("a.jsonl", json.dumps(ROWS[0])),
        ("a.json", json.dumps(ROWS)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_problems(Source(str(tmp_path / name)))


def problem(tmp_path, row, **source):
    return read_problems(Source(write(tmp_path / "a.jsonl", [row]), **source))[0]


def test_fields_have_any_names(tmp_path):
    row = {"id": 1, "problem": "a", "solution": "b", "final": "7", "unit": "km", "error": "1e-1"}
    found = problem(tmp_path, row, prompt="problem", answer="final", unit="unit", tolerance="error")
    assert (found.text, found.gold.text, found.gold.unit, found.gold.tolerance) == ("a", "7", "km", (0.1,))


@pytest.mark.parametrize(
    ("answer", "gold", "text"),
    [
        ("27", "whole", "27"),
        (27.0, "whole", "27"),
        (27, "whole", "27"),
        (2.5, "whole", "2.5"),
        (["1", "2"], "whole", "1, 2"),
        (r"so \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        ("It is <<4>>.\n#### 4", r"####\s*(.+)", "4"),
        ("first 3 then 1,234.", "last_number", "1234"),
    ],
)
def test_the_place_of_the_reference_answer(answer, gold, text, tmp_path):
    assert problem(tmp_path, {"question": "a", "answer": answer}, gold=gold).gold.text == text


def test_empty_unit_and_tolerance_are_none(tmp_path):
    row = {"question": "a", "answer": "7", "unit": None, "error": None}
    gold = problem(tmp_path, row, unit="unit", tolerance="error").gold
    assert (gold.unit, gold.tolerance) == (None, ())


def test_the_limit_takes_the_first_rows_and_reads_no_further(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + "broken\n")
    assert [p.text for p in read_problems(Source(str(path), limit=2))] == [r["question"] for r in ROWS]
    with pytest.raises(UserError, match="Line 3 of"):
        read_problems(Source(str(path)))


@pytest.mark.parametrize("path", ["toy", "toy:3", "toy-tuned"])
def test_the_toy(path):
    train, held_out = (read_problems(Source(path, limit=50), split) for split in ("train", "val"))
    assert [(p.text, p.gold.text) for p in held_out] == [
        (r["question"], r["answer"]) for r in toy_problems("held_out", TOY_HELD_OUT)[:50]
    ]
    assert not {p.text for p in train} & {p.text for p in held_out}


def test_data_without_answers(tmp_path):
    found = problem(tmp_path, {"question": "a", "answer": 3}, answer=None)
    assert found.gold is None


def metric_names(folder):
    return set((folder / "metrics.csv").read_text().splitlines()[0].split(","))


def test_training_and_evaluating_without_answers(rlif, small_fit, tmp_path):
    """Nothing that compares answers is logged, and nothing fails."""
    path = write(tmp_path / "a.jsonl", [{"question": f"What is {i}?"} for i in range(8)])
    sources = [f"--data.{name}.{key}={value}" for name in ("train", "val", "test")
               for key, value in (("path", path), ("answer", "null"))]  # fmt: skip
    args = [*(a for a in small_fit if "gold" not in a and "####" not in a and "[#]" not in a), *sources]
    folder = rlif("fit", *args) / "runs/run/1"
    names = metric_names(folder)
    assert {"rollout/reward", "rollout/entropy", "val/mean_tokens_sampled", "train/loss"} <= names
    assert not [n for n in names if "accuracy" in n], names
    row = json.loads((folder / "completions.jsonl").read_text().splitlines()[0])
    assert not {"gold", "correct"} & set(row)
    rlif("test", *used_by("test", args), "--ckpt_path=last", "--evaluation.samples=2")
    results = json.loads((tmp_path / "runs/run/test/1/results.json").read_text())
    assert results["n"] == 8
    assert not [k for k in results if k.startswith(("accuracy", "pass@", "maj@"))]
    assert {"mean_tokens", "truncated_fraction", "mean_tokens_sampled"} <= set(results)


# -- several fields, choices, groups ---------------------------------------------------------------------------

CHOICES = [
    {"question": "Which {n}?", "options": ["{x}", "two", 3], "answer": "B", "answer_index": 1, "category": "law"},
    {"question": "Where?", "options": ["here", "there"], "answer": "a", "answer_index": 0, "category": 7},
]


def test_a_prompt_of_several_fields_is_filled_in_one_pass(tmp_path):
    rows = [{"code": "def f(input):\n    return {input}", "input": "{code}", "n": 2, "output": "1"}]
    path = write(tmp_path / "rows.jsonl", rows)
    (problem,) = read_problems(Source(path, prompt="{code}\n{n}: f({input}) == {} {2}", answer="output"))
    assert problem.text == "def f(input):\n    return {input}\n2: f({code}) == {} {2}"
    for prompt, message in (("{code} {nosuch}", "no field 'nosuch'"), ("{none}", "no text in 'none'")):
        with pytest.raises(UserError, match=message):
            read_problems(Source(write(tmp_path / "rows.jsonl", [{**rows[0], "none": None}]), prompt=prompt))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_choices(ending, tmp_path):
    rows = [{**row, "options": [str(x) for x in row["options"]], "category": "law"} for row in CHOICES]
    path = write(tmp_path / f"rows{ending}", rows)
    plain = read_problems(Source(path, options="options"))
    assert [p.text for p in plain] == ["Which {n}?\n\nA. {x}\nB. two\nC. 3", "Where?\n\nA. here\nB. there"]
    assert [p.gold.text for p in plain] == ["B", "A"]
    placed = read_problems(Source(path, prompt="{options}\n{question}", options="options", answer="answer_index"))
    assert [p.text for p in placed] == ["A. {x}\nB. two\nC. 3\nWhich {n}?", "A. here\nB. there\nWhere?"]
    assert [p.gold.text for p in placed] == ["B", "A"]
    assert [p.gold for p in read_problems(Source(path, options="options", answer=None))] == [None, None]


def test_fields_that_results_are_given_by(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**row, "level": None} for row in CHOICES])
    assert [p.by for p in read_problems(Source(path))] == [{}, {}]
    assert [p.by for p in read_problems(Source(path, by="category"))] == [{"category": "law"}, {"category": "7"}]
    both = read_problems(Source(path, by=["level", "category"]))
    assert [list(p.by.items()) for p in both][1] == [("level", "null"), ("category", "7")]


def test_each_source_is_graded_in_its_own_format(rlif, small_fit, problems_file):
    """Training reads answers from the first character, validation by data.answers, test by both in its own order."""
    words = [f"--data.{split}.{key}={value}" for split in ("val", "test")
             for key, value in (("path", problems_file), ("gold", "[#]{4}\\s*(.+)"))]  # fmt: skip
    words += ["--data.train.answers.completion=^([ -~])", "--data.test.answers.completion=[boxed, last_number]"]
    words += ["--data.answers.compare=text"]
    folder = rlif("fit", *small_fit, *words, "--trainer.max_steps=1") / "runs/run"
    for line in (folder / "1/completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        first = row["completion"][:1]
        assert row["answer"] == (first if " " <= first <= "~" else None)
    for command, places in (("validate", "last_number"), ("test", ["boxed", "last_number"])):
        rlif(command, *used_by(command, [*small_fit, *words]))
        answers = json.loads((folder / f"{command}/1/results.json").read_text())["answers"]
        assert (answers["completion"], answers["compare"]) == (places, "text")
