"""A reward over the answer's tokens alone, written in a file of the user's own."""

import csv

import torch

from rlif_lightning.rollout import Rollout, Samples

OWN = """
from rlif_lightning.rewards import ProbabilityMargin

class AnswerMargin(ProbabilityMargin):
    '''Mean probability margin over the tokens of the answer, in [0, 1]; NaN where there is none.'''

    requires = frozenset({"answer_mask"})

    def __call__(self, rollout):
        margin, mask = self.token_values(rollout.statistics(self.annotator)), rollout.answer_mask
        return margin.where(mask, 0).sum(1) / mask.sum(1)
"""


def test_a_reward_over_the_answers_tokens_trains(rlif, small_fit, tmp_path, monkeypatch):
    """Random texts: an answer is the last run of two to four small letters, which some completions have."""
    (tmp_path / "answer_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    place = [r"--data.answers.completion=([a-z]{2,4})[^a-z]*$", "--data.answers.compare=exact"]
    own = "--rollout.rewards=[answer_rewards.AnswerMargin]"
    folder = rlif("fit", *small_fit, *place, own)
    with next(folder.glob("runs/*/*/metrics.csv")).open() as file:
        steps = [row for row in csv.DictReader(file) if row["rollout/reward"]]
    assert len(steps) == 2
    for row in steps:
        assert 0 < float(row["rollout/answered_fraction"]) <= 1
        assert 0 < float(row["rollout/reward"]) <= 1
        assert float(row["rollout/advantage_size"]) > 0


def test_a_slice_carries_its_rows():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    answers = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    samples = Samples(mask.long(), mask, mask.long(), mask, mask[:, 0])
    rollout = Rollout(samples, 2, 1.0, torch.arange(4), answer_mask=answers)
    assert rollout.slice(torch.tensor([3, 1])).answer_mask.tolist() == [[False, False], [False, True]]
