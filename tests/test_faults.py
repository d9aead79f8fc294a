"""The harnesses of benchmarks/faults still inject what they say, and see it; docs/reliability.md has their tables."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.faults import answers, compare, power, table
from benchmarks.faults.runs import newest
from benchmarks.faults.table import Options, Row

ROOT = Path(__file__).parent.parent
SHARED = {"__init__", "compare", "runs", "table"}
HARNESSES = sorted({file.stem for file in (ROOT / "benchmarks" / "faults").glob("*.py")} - SHARED)


def test_a_killed_run_is_continued_and_compared(tmp_path):
    """Through the command: one kill, one table, exit code 0 because the promise holds."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- kills -->\nold\n<!-- /kills -->\nafter\n")
    words = ["-m", "benchmarks.faults.kills", "--tiny", "--n", "1", "--seed", "2", "--out"]
    command = [sys.executable, *words, tmp_path, "--docs", page]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "| SIGKILL in " in text and "| the same | 1 | kept |" in text and "1 of 1 as promised" in text
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    runs = [newest(tmp_path / "kills" / name) for name in ("whole", "kill0")]
    assert compare.differences(*runs) == []
    checkpoint = runs[1] / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    next(iter(state["state_dict"].values())).view(-1)[0] += 1e-6
    torch.save(state, checkpoint)
    (runs[1] / "curves.png").unlink()
    (runs[1] / ".left.new").touch()
    assert compare.differences(*runs) == ["state_dict", "curves.png (missing)", ".left.new (left over)"]


def test_hostile_answers_are_graded_by_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = list(answers.answers(Options(len(answers.FAMILIES), 0, True)))
    assert [row.injected for row in rows][: len(answers.FAMILIES)] == [
        f"answers: {name}" for name in answers.FAMILIES
    ]
    assert all(row.kept for row in rows)


@pytest.mark.parametrize("name", HARNESSES)
def test_every_harness_is_a_command_with_a_place_on_the_page(name):
    module = importlib.import_module(f"benchmarks.faults.{name}")
    assert f"python -m benchmarks.faults.{name}" in module.__doc__
    assert callable(getattr(module, name))  # what `run` takes the name from
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert page.count(f"<!-- {name} -->") == page.count(f"<!-- /{name} -->") == 1


def test_a_broken_promise_is_counted_and_exits_with_1(tmp_path, monkeypatch, capsys):
    def two(options):
        yield Row("a fault", "lost", False)
        yield Row("a fault", "lost", False)
        yield Row("another", "root is missing", None)
        yield Row("a third", f"{options.seed} | fine", True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table.runs, "preload", lambda toy: None)
    with pytest.raises(SystemExit) as stop:
        table.run(two, arguments=["--seed", "7"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "| a fault | lost | 2 | **broken** |" in out and "| another | root is missing | 1 | not tried |" in out
    assert "| a third | 7 \\| fine | 1 | kept |" in out and "1 of 3 as promised, 1 not tried" in out
    assert Path.cwd() == tmp_path / "runs" / "faults" / "two"


def test_cases_are_drawn_in_their_order():
    assert Options(None, 0, False).drawn([1, 2, 3]) == Options(9, 0, False).drawn([1, 2, 3]) == [1, 2, 3]
    one, other = (Options(3, seed, False).drawn(list(range(20))) for seed in (0, 1))
    assert one != other and one == sorted(one) and len(set(one)) == 3


CALLS = {
    "write": '77 write(3</r/1/checkpoints/.last.ckpt.new>, ""..., 9) = 9',
    "sync": "77 fsync(3</r/1/checkpoints/.last.ckpt.new>) = 0",
    "move": '77 rename("r/1/checkpoints/.last.ckpt.new", "r/1/checkpoints/last.ckpt") = 0',
    "sync folder": "77 fsync(5</r/1/checkpoints>) = 0",
    "write row": '77 write(4</r/1/metrics.csv>, ""..., 9) = 9',
    "sync row": "77 fsync(4</r/1/metrics.csv>) = 0",
}


@pytest.mark.parametrize(
    ("calls", "wrong"),
    [
        (["write", "sync", "move", "sync folder"], []),
        (["write", "move", "sync folder"], ["last.ckpt takes its place before it is on the disk"]),
        (["write", "sync", "move"], ["the new name of last.ckpt is not brought to the disk"]),
        (
            ["write row", "write", "sync", "move", "sync folder"],
            ["last.ckpt takes its place before metrics.csv is on the disk"],
        ),
        (["write row", "sync row", "write", "sync", "move", "sync folder"], []),
    ],
)
def test_the_order_on_the_disk_is_read_from_system_calls(calls, wrong):
    assert list(power.broken([CALLS[call] for call in calls], Path("/r"))) == wrong
