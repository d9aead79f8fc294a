"""The benchmarks still run, and their sides do the work that is asked of them. Nothing here is timed."""

import importlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import alternate, bar, growth, phases, result, shapes, where
from benchmarks.gate import Gate
from benchmarks.shapes import Work

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = shapes.save(tmp_path_factory.mktemp("bench") / "model", "tiny", prompt_tokens=6)
    return Work(folder, new_tokens=8, prompts=2, group=4, micro_batch=4, learning_rate=1e-3)


def run(side: str, work: Work) -> list[dict[str, Any]]:
    """A side in this process; returns what it reported: ready, then a line per step."""
    answers = io.StringIO()
    importlib.import_module(f"benchmarks.{side}").run(work, Gate(io.StringIO("go\n" * work.steps), answers))
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize("reward", ["self_certainty", "text"])
@pytest.mark.parametrize("side", ["our_side", "example_side", "trl_side"])
def test_a_side_does_its_steps(side: str, reward: Any, work: Work) -> None:
    if side == "trl_side":
        pytest.importorskip("trl", reason="TRL is the other side")
    kl = 0.04 if reward == "self_certainty" else 0.0
    ready, *steps = run(side, replace(work, kl=kl, reward=reward))
    assert "cpu" not in ready and len(steps) == work.steps
    for step in steps:
        alternate.checked(side, step, work)
        assert step["moved"] and step["finite"] and step["cpu"] > 0


@pytest.mark.parametrize("side", ["rollout_side", "hf_generate"])
def test_rollouts_have_the_lengths_asked_for(side: str, work: Work, tmp_path: Path) -> None:
    assert [s["tokens"] for s in run(side, work)[1:]] == [2 * 4 * 8] * 2
    folder = shapes.save(tmp_path / "ends", "tiny", 6, end_probability=1 / 8)
    steps = run(side, replace(work, folder=folder, new_tokens=64, group=32, prompts=8, fixed_length=False, steps=4))[
        1:
    ]
    mean = sum(s["tokens"] for s in steps) / (4 * 8 * 32)
    assert 6.5 < mean < 9.5  # 8 by calibration; the standard error is 0.23


def test_a_side_that_does_something_else_is_refused(work: Work) -> None:
    done = {"tokens": 64, "moved": True, "finite": True}
    assert alternate.checked("x", done, work) is done
    for wrong in ({"tokens": 63}, {"moved": False}, {"finite": False}):
        with pytest.raises(alternate.SideError):
            alternate.checked("x", {**done, **wrong}, work)
    alternate.checked("x", {**done, "tokens": 20}, replace(work, fixed_length=False))
    with pytest.raises(alternate.SideError):
        alternate.checked("x", {**done, "tokens": 7}, replace(work, fixed_length=False))


def test_phases_add_up(work: Work) -> None:
    steps = phases.measure(replace(work, kl=0.04), repeats=2)
    assert len(steps) == 2
    for step in steps:
        assert all(step[p] > 0 for p in phases.PHASES)
        assert sum(step[p] for p in phases.PHASES) < step["step"]
    assert "reference" in where.table({"tiny": where.split(steps)})


def test_power_law_and_picture(tmp_path: Path) -> None:
    sizes = [2, 4, 8]
    slope, factor = growth.power_law(sizes, [3 * n**1.5 for n in sizes])
    assert (slope, factor) == (pytest.approx(1.5), pytest.approx(3.0))
    points = {"group": {n: {"rollout": 1.0 * n, "reference": 2.0, "update": 0.5 * n**2} for n in sizes}}
    table = growth.table(points)
    assert all(f"n^{n}.00, at the end n^{n}.00" in table for n in (0, 1, 2))
    growth.draw(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_rows_are_judged_and_written(tmp_path: Path) -> None:
    line = bar.LINES["step_a"][0]
    row = bar.compare(line, {"TRL": [8.0, 10.0, 9.0], "ours": [4.0, 5.0, 3.0]}, "TRL", "ours")
    assert row.ratio == 9 / 4 and row.ratios == [2.0, 2.0, 3.0] and row.met
    assert not bar.compare(line, {"TRL": [7.9], "ours": [4.0]}, "TRL", "ours").met
    over = bar.LINES["overhead"][0]
    assert bar.compare(over, {"bare loop": [1.0], "ours": [1.04]}, "ours", "bare loop").met
    assert not bar.compare(over, {"bare loop": [1.0], "ours": [1.2]}, "ours", "bare loop").met
    rows = {
        "step_a": replace(row, setting=result.setting("command", 3, 1)),
        "vllm": replace(bar.LINES["vllm"][0], reason="vllm is not installed"),
    }
    result.write(tmp_path / "bar.json", rows)
    assert result.read(tmp_path / "bar.json") == rows
    document = tmp_path / "page.md"
    document.write_text(f"before\n{result.BEGIN}\nold\n{result.END}\nafter\n")
    result.fill(document, (tmp_path / "bar.md").read_text())
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "**2.25** (2.00 to 3.00)" in text and "not measured: vllm is not installed" in text
    with pytest.raises(ValueError, match="bar"):
        result.fill(document, "", begin="<!-- bar2 -->")


@pytest.mark.slow
def test_the_command_alternates_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bar", "--tiny", "--rows", "ragged", "--repeats", "2"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, cwd=ROOT, capture_output=True, timeout=300)
    row = result.read(tmp_path / "bar.json")["ragged"]
    assert list(row.sides) == ["generate", "ours"] and all(len(x) == 2 for x in row.sides.values())


def test_the_page_has_a_place_for_every_table() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for marker in (result.BEGIN, result.END, where.BEGIN, where.END, growth.BEGIN, growth.END):
        assert page.count(marker) == 1
