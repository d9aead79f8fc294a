"""The README's Python blocks do what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
def test_python_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert float(capsys.readouterr().out.strip().splitlines()[-1].strip("tensor()")) > 0.4


def test_reward_of_your_own(tmp_path, rlif, small_fit):
    """The classes of the README in a file of the user's, named by class path next to a shipped reward."""
    (tmp_path / "my_rewards.py").write_text(BLOCKS[1])
    own = "{class_path: my_rewards.Brevity, init_args: {weight: 0.1}}"
    rewards = f"[{{class_path: rlif_lightning.rewards.SelfCertainty}}, my_rewards.Gini, {own}]"
    folder = rlif("fit", *small_fit, f"--rollout.rewards={rewards}")
    header = (folder / "runs/run/1/metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"rollout/reward/{name}" for name in ("self_certainty", "gini", "brevity")} <= set(header)
