"""The examples run and show what they promise; the step of the one is the step that the Trainer takes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.one_step import collect, update
from rlif_lightning.functional.loss_records import LossSettings
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.rewards import SelfCertainty
from rlif_lightning.sampling import Sampling
from tests.short_runs import adamw, fit, many_ends

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*(treespec, LeafSpec|in eval mode|is zero)")


def output(folder, *command):
    """What a script prints, run in a folder."""
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command]
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_they_fit_on_a_screen(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= (60 if name == "one_step.py" else 40)


def test_score(tmp_path):
    """The slip is the unlikeliest token by far."""
    right, wrong = re.findall(r"logprob (\S+) nats", output(tmp_path, ROOT / "examples/score.py"))
    assert float(right) > float(wrong) + 0.1


def test_own_reward(tmp_path):
    lines = output(tmp_path, ROOT / "examples/own_reward.py").splitlines()
    direct, worked = (float(x) for x in lines[0].split()[1:])
    assert 0 < direct < worked < 1
    assert lines[1:] == ["brevity -2.000 -20.000", "of plain logits [0.5]"]


@pytest.mark.slow
def test_trl_reward(tmp_path):
    """The model hedges, agrees with itself, collapses, and the guard goes back to the most agreement."""
    pytest.importorskip("trl", reason="pip install -e '.[test]'")
    told = output(tmp_path, ROOT / "examples/trl_reward.py")
    curve = [(int(step), float(x)) for step, x in re.findall(r"step (\d+): agreement (\S+),", told)]
    best = int(re.search(r"weights of step (\d+)", told)[1])
    assert max(x for _, x in curve) > curve[0][1] + 0.2
    assert 0 < best < curve[-1][0] < 95
    assert (tmp_path / "runs/trl/guard/weights.safetensors").is_file()


@pytest.mark.slow
def test_first_run(tmp_path):
    """The notebook's cells one after another; it is stored without their outputs."""
    cells = json.loads((ROOT / "examples/first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in code), encoding="utf-8")
    told = output(tmp_path, "cells.py")
    line = next(line for line in told.splitlines() if line.startswith("val/accuracy_sampled 0:"))
    accuracy = [float(x) for x in re.findall(r": (\S+)", line)]
    assert len(accuracy) == 7 and max(accuracy) > accuracy[0] + 0.3 and accuracy[-1] < max(accuracy) - 0.2
    assert "fired at step" in told and (tmp_path / "runs/quickstart/1/curves.png").is_file()


def test_it_learns_without_labels(capsys):
    """Self-certainty rises, and with it the share of right answers: 0.35 to 0.75 as it stands."""
    runpy.run_path(str(ROOT / "examples/one_step.py"), run_name="__main__")
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    certainty, right = [float(x[1]) for x in lines], [float(x[-1]) for x in lines]
    assert len(lines) == 20
    assert certainty[-1] > certainty[0] + 1
    assert sum(right[-5:]) / 5 > sum(right[:2]) / 2 + 0.2


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_its_step_is_the_trainers(model_folder, problems_file, tmp_path, loss, micro_batch):
    """The same completions, and the same weights but for roundings: the step moves them by more than 1e-3."""
    folder = many_ends(model_folder(), tmp_path / "model")
    run = fit(
        folder,
        problems_file,
        {"loss": loss, "kl_coefficient": 0.05},
        rollout={"micro_batch_size": micro_batch},
        optimizer=adamw(1e-2),
        steps=1,
    )
    theirs, policy = run.rollouts[0], Policy.load(PolicySettings(str(folder)), training=True)
    policy.make_references(["frozen"])
    ids, mask = theirs.samples.prompt_ids, theirs.samples.prompt_mask
    prompts = [ids[row, mask[row]].tolist() for row in range(0, len(ids), 4)]
    ours = collect(policy, prompts, theirs.seeds, Sampling(12), SelfCertainty())
    assert torch.equal(ours.samples.completion_ids, theirs.samples.completion_ids)
    assert ours.texts == theirs.texts
    torch.testing.assert_close(ours.advantages, theirs.advantages, rtol=0, atol=1e-5)
    settings, optimizer = LossSettings(loss, kl_coefficient=0.05), adamw(1e-2)(policy.model.parameters())
    update(policy, optimizer, ours, settings, 12, micro_batch)
    start = dict(run.start.named_parameters())
    weights = dict(policy.model.named_parameters())
    assert max(float((w - start[name]).abs().max()) for name, w in run.weights().items()) > 1e-3
    for name, weight in run.weights().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
