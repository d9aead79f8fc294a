"""What the README and the page of rewards print does what they say."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def block(page, kind):
    """The first block of code of a kind on a page."""
    return re.search(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]


@pytest.mark.slow
def test_python_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("README.md", "python"), "README.md", "exec"), {})
    assert float(capsys.readouterr().out.strip().splitlines()[-1].strip("tensor()")) > 0.4


def test_reward_of_your_own(tmp_path, rlif, small_fit):
    """The classes of the page in a file of the user's, named by class path next to a shipped reward."""
    (tmp_path / "my_rewards.py").write_text(block("docs/rewards.md", "python"))
    own = "{class_path: my_rewards.Brevity, init_args: {weight: 0.1}}"
    rewards = f"[{{class_path: rlif_lightning.rewards.SelfCertainty}}, my_rewards.Gini, {own}]"
    folder = rlif("fit", *small_fit, f"--rollout.rewards={rewards}")
    header = (folder / "runs/run/1/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"rollout/reward/{name}" for name in ("self_certainty", "gini", "brevity")} <= set(header)


@pytest.mark.parametrize(("page", "below"), [("README.md", []), ("docs/data.md", ["--config", "gsm8k"])])
def test_problems_of_your_own(tmp_path, rlif, model_folder, page, below):
    """A whole recipe, and settings over those of GSM8K, whose `gold` must not be looked for in other data."""
    for name, rows in (
        ("problems", [{"question": f"What is {i} + 1?"} for i in range(4)]),
        ("held_out", [{"question": "What is 2 + 2?", "solution": r"So \boxed{4}, not 5."}] * 3),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(block(page, "yaml"))
    small = [
        "--trainer.max_steps=1", "--trainer.precision=32", "--rollout.prompts_per_step=2", "--rollout.group_size=2",
        "--rollout.micro_batch_size=4", "--rollout.max_new_tokens=4", "--evaluation.max_new_tokens=4",
    ]  # fmt: skip
    folder = rlif("fit", *below, "--config", "mine.yaml", "--model.name", model_folder(chat=True), *small)
    run = folder / f"runs/{'+'.join([*below[1:], 'mine'])}/1"
    row = json.loads((run / "completions.jsonl").read_text().splitlines()[0])
    assert row["prompt"].count("Think step by step and put the final answer into \\boxed{}.") == 1
    assert "gold" not in row
    assert "val/accuracy" in set((run / "metrics.csv").read_text().splitlines()[0].split(","))
