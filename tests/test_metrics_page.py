"""docs/metrics.md names what runs log, and nothing else."""

import re
from pathlib import Path

import pytest

from rlif_lightning.runs.descriptions import DESCRIPTIONS
from rlif_lightning.runs.metrics_csv import read_metrics

PAGE = (Path(__file__).parents[1] / "docs/metrics.md").read_text(encoding="utf-8")
NOT_LOGGED_HERE = "## With vLLM's engine, and in float16"  # tests/vllm and training/test_float16.py see them
EVERYTHING = [
    "--trainer.max_steps=2", "--rollout.prompts_per_step=4", "--rollout.top_p=0.99", "--rollout.agreement_band=[0,1]",
    "--rollout.rewards=[SelfCertainty,MajorityVote]", "--model.target_entropy=0.4", "--guard.warmup=0",
    "--guard.signals=[agreement,similarity,start_logprob]", "--evaluation.n=4", "--evaluation.every=1",
]  # fmt: skip


def rows_of(page):
    """The names in the first cells of a page's tables, each with the other cells: unit, direction, meaning."""
    rows = [line.replace(r"\|", "/").strip("| ") for line in page.splitlines() if line.startswith("| `")]
    cells = [row.split(" | ") for row in rows]
    return {name: others for first, *others in cells for name in re.findall("`(.+?)`", first)}


def pattern(name):
    """A placeholder such as <name> stands for one word."""
    return "".join(r"[\w@]+" if part.startswith("<") else re.escape(part) for part in re.split("(<.+?>)", name))


def both_ways(page, logged):
    """Names that are logged and lack a row, and rows of which nothing is logged."""
    rows = rows_of(page)
    missing = {name for name in logged if not any(re.fullmatch(pattern(row), name) for row in rows)}
    return missing, {row for row in rows if not any(re.fullmatch(pattern(row), name) for name in logged)}


def test_every_number_has_a_row_and_every_row_a_number(rlif):
    folder = rlif("fit", "--config", "quickstart", *EVERYTHING)
    logged = {*read_metrics(folder / "runs/quickstart/1/metrics.csv")}
    rlif("test", "--config", "quickstart", "--data.test.limit=4", "--evaluation.samples=2")
    logged |= {*read_metrics(folder / "runs/quickstart/test/1/metrics.csv")}
    elsewhere = rows_of(PAGE.partition(NOT_LOGGED_HERE)[2].partition("\n## ")[0])
    assert len(elsewhere) == 4
    assert both_ways(PAGE, logged) == (set(), {*elsewhere})


@pytest.mark.parametrize(("name", "cells"), rows_of(PAGE).items())
def test_a_row_says_unit_direction_and_meaning(name, cells):
    unit, direction, meaning = cells
    assert unit and direction in "↑↓0-" and meaning


def test_what_tensorboard_says_of_a_number_is_the_beginning_of_its_row():
    of_a_fit = PAGE.partition("## `rlif test`")[0]
    expected = {}
    for name, (unit, _, meaning) in rows_of(of_a_fit).items():
        words = re.sub(r"\[(.+?)\]\(.+?\)|[*`]", r"\1", re.sub(r" \(\[.+?\]\(.+?\)\)", "", meaning))
        expected[name] = f"{unit}: {re.split('; |: |[.] ', words)[0]}".replace("`", "")
    assert expected == DESCRIPTIONS


def test_what_is_missing_is_found():
    page = "| `a/b`, `a/c` | x | ↑ | y |\n| `a/<name>/d` | x | ↑ | y |"
    assert both_ways(page, {"a/b", "a/e/d", "a/f"}) == ({"a/f"}, {"a/c"})
