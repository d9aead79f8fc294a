"""References: of the KL term, and as annotators of rewards."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from rlif_lightning.errors import UserError
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.models import references
from rlif_lightning.models.references import References, Snapshot, free_memory
from rlif_lightning.models.trainable import trainable
from rlif_lightning.rewards import SelfCertainty, TokenEntropy, TrajectoryEntropy
from tests.conftest import completion_logits
from tests.short_runs import adamw, fit

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture
def train(model_folder, problems_file):
    """``train(model={...}, rollout={...}, steps=3)``: a small run whose weights move visibly."""

    def run(steps=3, **settings):
        return fit(model_folder(), problems_file, steps=steps, optimizer=adamw(1e-2), **settings)

    return run


class Trail(pl.Callback):
    """The policy's trainable weights at the start and after each step."""

    def __init__(self):
        self.weights = []

    def on_train_start(self, trainer, pl_module):
        self.weights.append({n: p.detach().double() for n, p in trainable(pl_module.policy.model).items()})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_ema_against_a_naive_mean(train, lora):
    trail = Trail()
    model = {"kl_coefficient": 0.01, "reference": "ema", "ema_decay": 0.8, "lora": lora}
    run = train(model=model, callbacks=[trail])
    want = trail.weights[0]
    for weights in trail.weights[1:]:
        want = {n: 0.8 * w + 0.2 * weights[n] for n, w in want.items()}
    got = dict(zip(want, run.module.references.snapshots["ema"].weights, strict=True))
    assert run.module.references.frozen is None
    for name, weight in got.items():
        torch.testing.assert_close(weight.double(), want[name], rtol=0, atol=1e-6)
    assert any((got[n] - trail.weights[-1][n]).abs().max() > 1e-3 for n in got)
    assert any((got[n] - trail.weights[0][n]).abs().max() > 1e-3 for n in got)


def test_synced_reference_is_renewed_every_k_steps(train):
    trail = Trail()
    model = {"kl_coefficient": 0.01, "reference": "synced", "reference_every": 2}
    run = train(model=model, steps=5, callbacks=[trail])
    for own, name in zip(run.module.references.snapshots["synced"].weights, trail.weights[4], strict=True):
        assert torch.equal(own.double(), trail.weights[4][name])  # steps 2 and 4; not 5
    kl = run.column("train/kl")
    assert kl[0] == 0 == kl[2] == kl[4]  # just renewed: exactly the policy
    assert kl[1] > 0 < kl[3]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_loss_refers_to_that_reference(train, lora):
    run = train(model={"kl_coefficient": 0.01, "reference": "ema", "ema_decay": 0.5, "lora": lora}, steps=2)
    rollout = run.rollouts[1]
    # ema after one step: half the start, half the current weights
    policy = copy.deepcopy(run.start)
    moved = copy.deepcopy(run.start)
    again = train(model={"kl_coefficient": 0.01, "reference": "ema", "ema_decay": 0.5, "lora": lora}, steps=1)
    moved.load_state_dict(again.module.policy.model.state_dict())
    with torch.no_grad():
        for p, m in zip(trainable(policy).values(), trainable(moved).values(), strict=True):
            p.lerp_(m, 0.5)
        logits = completion_logits(policy, rollout.samples)
    want = token_stats(logits, rollout.samples.completion_ids).logprob
    mask = rollout.samples.completion_mask
    torch.testing.assert_close(rollout.kl_logprob[mask], want[mask], rtol=0, atol=1e-5)
    assert rollout.start_logprob is None and not run.column("rollout/start_logprob")


def test_weights_are_swapped_and_come_back_bit_by_bit(model_folder):
    from tests.conftest import load_model

    policy = load_model(str(model_folder()))
    snapshot = Snapshot(trainable(policy))
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p))
    now = {n: p.detach().clone() for n, p in policy.named_parameters()}

    def inside():
        with snapshot.in_place(policy):
            assert all(torch.equal(p, start[n]) for n, p in policy.named_parameters())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        inside()
    assert all(torch.equal(p, now[n]) for n, p in policy.named_parameters())
    assert all(torch.equal(w, s) for w, s in zip(snapshot.weights, start.values(), strict=True))


def test_autocast_sees_the_swapped_weights(model_folder):
    """It keeps bfloat16 copies by identity of the tensor, within one context."""
    layer = torch.nn.Linear(4, 4)
    snapshot = Snapshot(trainable(layer))
    with torch.no_grad():
        layer.weight.add_(1)
    x = torch.ones(1, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        now = layer(x)
        with snapshot.in_place(layer):
            then = layer(x)
        again = layer(x)
    assert not torch.equal(now, then)
    assert torch.equal(now, again)


# -- annotators ------------------------------------------------------------------------------------------------

REWARDS = {SelfCertainty: "self_certainty", TokenEntropy: "entropy", TrajectoryEntropy: "logprob"}


@pytest.mark.parametrize("reward", list(REWARDS))
def test_the_frozen_annotator_scores_with_the_weights_of_the_start(train, reward):
    run = train(rollout={"rewards": [reward(annotator="reference")], "statistics_temperature": 0.7}, steps=3)
    rollout = run.rollouts[2]
    with torch.no_grad():
        stats = token_stats(completion_logits(run.start, rollout.samples), rollout.samples.completion_ids, 0.7)
    values, mask = getattr(stats, REWARDS[reward]), rollout.samples.completion_mask
    want = torch.stack([v[m].mean() for v, m in zip(values, mask, strict=True)])
    want = -want if reward is TokenEntropy else want
    (name,) = rollout.rewards
    assert name.endswith("_reference")
    torch.testing.assert_close(rollout.rewards[name], want, rtol=0, atol=1e-5)
    online = reward()(rollout)
    assert (online - want).abs().max() > 1e-3
    assert run.column("rollout/start_logprob")  # the frozen policy was asked anyway


def test_at_the_start_all_annotators_agree(train):
    rewards = [SelfCertainty(annotator=a) for a in ("policy", "reference", "ema")]
    run = train(rollout={"rewards": rewards}, steps=3)
    first, last = run.rollouts[0].rewards, run.rollouts[2].rewards
    names = ["self_certainty", "self_certainty_reference", "self_certainty_ema"]
    assert list(first) == names
    for name in names[1:]:
        torch.testing.assert_close(first[name], first["self_certainty"], rtol=0, atol=1e-5)
        assert (last[name] - last["self_certainty"]).abs().max() > 1e-3
    assert set(run.module.needs) == {"frozen", "ema"} and run.module.loss.kl_coefficient == 0
    assert not run.column("train/kl") or run.rollouts[0].kl_logprob is not None


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_resume_keeps_the_references(rlif, small_fit, lora):
    """Four steps at once, and two and two: the same weights and the same running mean, bit by bit."""
    import yaml

    more = ["--model.reference=ema", "--model.ema_decay=0.7", "--checkpoint.every=1", "--evaluation.every=0"]
    more += [f"--model.lora={yaml.safe_dump(lora, default_flow_style=True).strip()}"] if lora else []
    here = rlif("fit", *small_fit, *more, "--runs=a", "--trainer.max_steps=4")
    rlif("fit", *small_fit, *more, "--runs=b", "--trainer.max_steps=2")
    rlif("fit", *small_fit, *more, "--runs=b", "--trainer.max_steps=4", "--ckpt_path=last")
    once, twice = (torch.load(here / run / "run/1/checkpoints/last.ckpt", weights_only=True) for run in ("a", "b"))
    for left, right in (
        (once["state_dict"], twice["state_dict"]),
        (once["rlif"]["versions"]["ema"], twice["rlif"]["versions"]["ema"]),
    ):
        assert left.keys() == right.keys() and left
        assert all(torch.equal(left[n], right[n]) for n in left)


def test_a_reference_that_the_checkpoint_lacks_is_refused(rlif, small_fit, capsys):
    here = rlif("fit", *small_fit, "--trainer.max_steps=1", "--checkpoint.every=1")
    (path,) = here.glob("runs/*/1/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["rlif"]["versions"]  # as of an earlier release, which only knew the frozen one
    torch.save(checkpoint, path)
    rlif("fit", *small_fit, "--ckpt_path=last")
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--ckpt_path=last", "--trainer.max_steps=3", "--model.reference=ema")
    assert "no ema reference" in capsys.readouterr().err


# -- memory ----------------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_training(train, monkeypatch):
    monkeypatch.setattr(references, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="not enough memory for copies of the policy's weights"):
        train(model={"kl_coefficient": 0.01, "reference": "ema"})
    with pytest.raises(UserError, match=r"\(frozen\)"):
        train(rollout={"rewards": [SelfCertainty(annotator="reference")]})
    train(model={"lora": LORA, "kl_coefficient": 0.01}, steps=1)  # the adapter is switched off: nothing to copy


def test_a_policy_too_large_by_itself_is_not_for_the_references_to_say(monkeypatch):
    monkeypatch.setattr(references, "free_memory", lambda device: 1000)
    policy, found = nn.Linear(99, 99), References()
    found.create(set(), policy, torch.float32, torch.device("meta"))
    with pytest.raises(UserError, match=r"\(ema\)"):
        found.create({"ema"}, policy, torch.float32, torch.device("meta"))


def test_free_memory_of_this_machine():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_free_memory_of_a_gpu_counts_what_torch_keeps_for_later(monkeypatch):
    for name, value in [("mem_get_info", (300, 1000)), ("memory_reserved", 600), ("memory_allocated", 450)]:
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 300 + 150
