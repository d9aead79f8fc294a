"""The example's step runs, learns, and is the step that the Trainer takes."""

import runpy
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


def test_it_fits_on_a_screen():
    assert len((ROOT / "examples/one_step.py").read_text().splitlines()) <= 60


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
