"""The study's own toys: another task, and a base that stops early; benchmarks/study."""

import dataclasses
import json
import os
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.study import addition, toys
from rlif_lightning.data.problems import TOY_HELD_OUT, TOY_TRAIN, Source, read_problems
from rlif_lightning.grading import AnswerFormat, Grader
from rlif_lightning.toy import arithmetic, recipe, toy_model, toy_problems
from rlif_lightning.toy.problems import draw_document, is_held_out, write_solution

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
HELD_OUT = ["05+95", "77+92", "824+830"]


def test_rows_are_right_distinct_and_padded_to_the_longer_number():
    for split in ("train", "held_out"):
        rows = toy_problems(split, 500, addition)
        assert len({row["question"] for row in rows}) == 500
        for row in rows:
            left, right = row["question"].split("+")
            assert len(left) == len(right) == max(len(str(int(left))), len(str(int(right)))) in (2, 3)
            assert row["answer"] == str(int(left) + int(right))
            assert (zlib.crc32(row["question"].encode()) % 8 == 0) == (split == "held_out")


def test_first_held_out_problems_stay_what_they_are():
    rows = toy_problems("held_out", 200, addition)
    assert [row["question"] for row in rows[:3]] == HELD_OUT
    assert rows[:50] == toy_problems("held_out", 50, addition)


def test_lengths_are_equally_likely():
    rng = random.Random(0)
    lengths = [len(addition.draw_question(rng)) for _ in range(2000)]
    assert set(lengths) == {5, 7}
    assert lengths.count(5) / 2000 == pytest.approx(1 / 2, abs=0.05)


@pytest.mark.parametrize(
    ("question", "style", "text"),
    [
        ("347+085", "steps", "7+5=12;4+8+1=13;3+0+1=4;#432"),
        ("999+001", "steps", "9+1=10;9+0+1=10;9+0+1=10;#1000"),
        ("20+73", "steps", "0+3=3;2+7=9;#93"),
        ("347+085", "direct", "#432"),
        ("347+085", "terse", "12;13;4;#432"),
        ("347+085", "give_up", "?"),
    ],
)
def test_hand_worked_styles(question, style, text):
    assert write_solution(question, style, 0.0, random.Random(0), addition) == text


def test_skipped_reports_what_any_number_of_columns_makes():
    rng = random.Random(0)
    texts = {write_solution("347+085", "skipped", 0.0, rng, addition) for _ in range(50)}
    assert texts == {"7+5=12;#12", "7+5=12;4+8+1=13;#132", "7+5=12;4+8+1=13;3+0+1=4;#432"}


@pytest.mark.parametrize("style", ["steps", "terse", "direct"])
def test_without_slips_every_answer_is_right(style):
    rng = random.Random(0)
    for _ in range(500):
        question, text = draw_document({style: 1.0}, 0.0, rng, addition)
        left, right = map(int, question.split("+"))
        assert text.rpartition("#")[2] == str(left + right)
        assert not is_held_out(question)


def test_slips_are_carried_on():
    rng = random.Random(0)
    slipped = []
    for _ in range(500):
        question, text = draw_document({"steps": 1.0}, 0.3, rng, addition)
        *steps, last = text.split(";")
        left, right = question.split("+")
        carry, value, unit = 0, 0, 1  # the columns as they are written, added up by their place values
        for step, a, b in zip(steps, reversed(left), reversed(right), strict=True):
            term, result = step.split("=")
            assert term == f"{a}+{b}" + "+1" * carry
            slipped.append(int(result) - eval(term))
            carry, value, unit = (
                int(result) >= 10,
                value + (int(result) - 10 * (int(result) >= 10)) * unit,
                10 * unit,
            )
        assert int(last[1:]) == value + carry * unit
        assert len(last) == 1 + len(left) + carry
    # 2.5 steps per document, and one slip in twenty hits the right sum: .285
    assert sum(s != 0 for s in slipped) / len(slipped) == pytest.approx(0.285, abs=0.04)
    assert set(range(-18, 20)) >= set(slipped) and max(slipped) > 9 > -9 > min(slipped)


def test_longest_right_answer_fits_into_the_recipe_s_tokens():
    text = write_solution("999+999", "steps", 0.0, random.Random(0), addition)
    assert len(text) + 1 == 31  # and the end token


def test_narrow_is_right_where_two_steps_are_all_or_the_rest_adds_nothing():
    rng = random.Random(0)
    right = {2: [], 3: [], 4: []}
    for _ in range(3000):
        question, text = draw_document({"steps": 1.0}, 0.0, rng, toys.FIRST_TWO_STEPS)
        assert text.count(";") == 2
        right[len(question) // 2].append(text.rpartition("#")[2] == str(arithmetic.evaluate(question)))
    shares = {operations: sum(x) / len(x) for operations, x in right.items()}
    # the operations left out amount to 0 modulo 10 for one problem in ten
    assert shares == {2: 1.0, 3: pytest.approx(0.1, abs=0.04), 4: pytest.approx(0.1, abs=0.04)}


def test_addition_as_documented(rlif, monkeypatch, tmp_path):
    """The script's folder is what the overlay names; a short recipe stands in for the minute of the real one."""
    short = (dataclasses.replace(recipe.NOISY, steps=2),)
    monkeypatch.setattr(toys, "ADDITION", short)
    for name in ("toy-addition", "again"):
        toys.build("addition", 1, tmp_path / name, progress=False)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("toy-addition", "again")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "toy-addition"]
    rows = [(tmp_path / "toy-addition" / name).read_text().splitlines() for name in ("train.jsonl", "held_out.jsonl")]
    assert [len(part) for part in rows] == [TOY_TRAIN, TOY_HELD_OUT]
    assert [json.loads(line)["question"] for line in rows[1][:3]] == HELD_OUT
    overlay = str(STUDY / "toy_addition.yaml")
    folder = rlif(
        "fit", "--config", "quickstart", "--config", overlay, "--trainer.max_steps=1", "--evaluation.n=2",
        "--rollout.prompts_per_step=2", "--rollout.group_size=2", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    run = folder / "runs/quickstart+toy_addition/1"
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert rows and all(re.fullmatch(r"(\d{2,3})\+(\d{2,3})>", row["prompt"]) for row in rows)
    config = yaml.safe_load((run / "config.yaml").read_text())
    gold = read_problems(Source(config["data"]["val"]["path"]))[0].gold
    grader = Grader(AnswerFormat(**config["data"]["answers"]))
    right = gold.text
    texts = [(f"7+5=12;#{right}", True), (f"#{right}", False), (f"#{right};", True), (f"#0{right}", True)]
    assert grader.grade([(*text, gold) for text in texts]) == [True, False, False, False]


def sampled(folder, problems):
    """Sampled accuracy at temperature 1, and mean entropy per token in nats, by a plain loop."""
    model, tokenizer = (cls.from_pretrained(folder) for cls in (AutoModelForCausalLM, AutoTokenizer))
    prompts = tokenizer([f"{p['question']}>" for p in problems], padding=True, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(
            **prompts, do_sample=True, top_k=0, max_new_tokens=32, output_scores=True, return_dict_in_generate=True
        )
    ids = out.sequences[:, prompts["input_ids"].shape[1] :]
    mask = (ids != tokenizer.pad_token_id).double()
    p = torch.stack(out.scores, 1).double().softmax(-1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    ends = [f"#{p['answer']}<eos>" for p in problems]
    texts = [text.replace("<pad>", "") for text in tokenizer.batch_decode(ids)]
    right = sum(text.endswith(end) for text, end in zip(texts, ends, strict=True))
    return right / len(problems), ((entropy * mask).sum() / mask.sum()).item()


@pytest.mark.skipif("RLIF_TEST_STUDY" not in os.environ, reason="a minute; RLIF_TEST_STUDY=1 before a study")
@pytest.mark.parametrize("seed", range(1))  # seeds 0 to 4 stand in docs/toy.md
def test_addition_is_learned_and_often_wrong(seed, tmp_path):
    toys.build("addition", seed, tmp_path / "addition")
    accuracy, entropy = sampled(tmp_path / "addition", toy_problems("held_out", 200, addition))
    assert 0.15 < accuracy < 0.45  # measured with more samples: 0.33, 0.23, 0.24
    assert entropy > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])  # the base that all tests share; docs/study.md has others
def test_narrow_is_as_sure_as_tuned_and_as_often_wrong_as_the_base(seed, tmp_path):
    problems = toy_problems("held_out", 200)
    base_accuracy, base_entropy = sampled(toy_model(f"toy:{seed}"), problems)
    tuned_accuracy, tuned_entropy = sampled(toy_model(f"toy-tuned:{seed}"), problems)
    toys.build("narrow", seed, tmp_path / "narrow")
    accuracy, entropy = sampled(tmp_path / "narrow", problems)
    assert 0.3 < accuracy < 0.45
    assert abs(accuracy - base_accuracy) < 0.12  # a standard error of the difference is about 0.047
    assert tuned_accuracy > 0.9
    assert max(entropy, tuned_entropy) < 0.05
    assert base_entropy > 0.3
