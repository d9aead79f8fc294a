"""Losses by name, the entropy bonus and the top-entropy tokens, through the real Trainer."""

import pytest
import torch

from rlif_lightning.errors import UserError
from rlif_lightning.functional.loss_records import LOSSES
from rlif_lightning.training.module import RLIFModule
from tests.short_runs import adamw, fit, many_ends

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}") for text in ("treespec, LeafSpec", "in eval mode", "is zero")
]
OFF_POLICY = {"passes": 2, "steps_per_rollout": 2}


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return many_ends(model_folder(), tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture
def train(folder, problems_file):
    def run(loss="grpo", model=None, **settings):
        settings = {"optimizer": adamw(1e-2), **settings}
        return fit(folder, problems_file, {"loss": loss, **(model or {})}, **settings)

    return run


def difference(a, b):
    """Largest difference of a trainable weight."""
    a, b = (x.weights() if not isinstance(x, dict) else x for x in (a, b))
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(train, loss):
    """One step on policy and three off it; cut into slices or not, the weights are the same."""
    settings = {"kl_coefficient": 0.05, "entropy_coefficient": 0.01, "top_entropy_fraction": 0.5}
    narrow = {"clip_low": 3e-3, "clip_high": 4e-3} if loss == "gspo" else {}
    model = {**settings, **narrow}
    runs = [train(loss, model, rollout={**OFF_POLICY, "micro_batch_size": m}, steps=4) for m in (None, 4, 1)]
    start = dict(runs[0].start.named_parameters())
    assert difference(runs[0], {n: p.detach() for n, p in start.items()}) > 1e-3
    for other in runs[1:]:
        assert difference(runs[0], other) < 2e-6
        for name in ("loss", "kl", "ratio_mean", "clip_fraction", "entropy", "grad_norm"):
            mine, whole = other.column(f"train/{name}"), runs[0].column(f"train/{name}")
            assert mine == pytest.approx(whole, rel=1e-4, abs=1e-6), name
    ratios = runs[0].column("train/ratio_mean")
    assert ratios[0] == pytest.approx(1, abs=1e-4) and all(abs(r - 1) > 1e-4 for r in ratios[1:])


@pytest.mark.parametrize("sizes", [{"passes": 2}, {"steps_per_rollout": 2}], ids=str)
def test_gspo_and_cispo_part_from_grpo_and_dapo_off_policy_only(train, sizes):
    """On policy all ratios are 1 and the gradients one; afterwards whose ratio it is and what a clip does matter."""
    model = {"clip_low": 1e-3, "clip_high": 1e-3}
    for new, old in (("gspo", "grpo"), ("cispo", "dapo")):
        for steps, same in ((1, True), (2, False)):
            rollout = sizes if steps == 2 else None
            a, b = (train(loss, model, rollout=rollout, steps=steps) for loss in (new, old))
            assert (difference(a, b) < 1e-6) == same, (new, steps)
            assert (a.column("train/clip_fraction")[-1] > 0) == (steps == 2)


def test_kl_estimators_are_handed_on(train):
    weights = {
        k: train(model={"kl_coefficient": 5.0, "kl_estimator": k}, rollout={"passes": 2}) for k in ("k2", "k3")
    }
    logged = {k: run.column("train/kl") for k, run in weights.items()}
    assert {values[0] for values in logged.values()} == {0.0}
    assert logged["k2"][1] != logged["k3"][1]
    assert difference(weights["k2"], weights["k3"]) > 1e-5


# -- entropy ---------------------------------------------------------------------------------------------------


def test_a_bonus_keeps_the_entropy_up(train):
    sizes = {"temperature": 0.7, "passes": 2}
    none, strong = (train(model={"entropy_coefficient": c}, rollout=sizes, steps=4) for c in (1e-9, 1.0))
    assert strong.column("train/entropy")[-1] > none.column("train/entropy")[-1] + 0.01
    # The first step is that of the sampler: the same entropy at the same temperature, counted by tokens.
    assert strong.column("train/entropy")[0] == pytest.approx(strong.column("rollout/entropy")[0], rel=1e-4)
    assert not strong.column("train/entropy_coefficient")


def test_without_a_bonus_no_entropy_is_taken(train):
    assert not train().column("train/entropy")


def test_the_coefficient_is_adapted(train):
    """A target out of reach: up by 0.005 a step, from the second one on. One far below: it never acts."""
    model = {"entropy_coefficient": 0.01, "target_entropy": 100.0}
    high = train(model=model, steps=4)
    assert high.column("train/entropy_coefficient") == pytest.approx([0.0, 0.015, 0.02, 0.025])
    assert high.module.entropy_bonus.coefficient == pytest.approx(0.03)
    low = train(model={"entropy_coefficient": 0.012, "target_entropy": 1e-3}, steps=4)
    assert low.column("train/entropy_coefficient") == [0.0] * 4
    assert low.module.entropy_bonus.coefficient == 0.0
    plain = train(steps=4)
    assert difference(low, plain) < 1e-6 < 1e-4 < difference(high, plain)
    assert low.column("train/entropy")[0] == high.column("train/entropy")[0] > 0


@pytest.mark.parametrize("at", [1, 3])
def test_an_adapted_coefficient_resumes_exactly(train, tmp_path, at):
    """The target lies between the entropies of this run, so the bonus comes and goes."""
    probe = train(model={"entropy_coefficient": 0.3, "target_entropy": 100.0}, steps=6).column("train/entropy")
    model = {"entropy_coefficient": 0.3, "target_entropy": sum(probe) / len(probe)}
    whole = train(model=model, steps=6)
    part = train(model=model, steps=at)
    part.trainer.save_checkpoint(tmp_path / "part.ckpt")
    state = torch.load(tmp_path / "part.ckpt", weights_only=True)["rlif_entropy"]
    assert state["coefficient"] == part.module.entropy_bonus.coefficient != 0.3
    rest = train(model=model, steps=6, resume=tmp_path / "part.ckpt")
    for name in ("train/entropy_coefficient", "train/entropy", "train/loss"):
        assert part.column(name) + rest.column(name) == whole.column(name), name
    assert len(set(whole.column("train/entropy_coefficient"))) > 2
    assert difference(rest, whole) == 0.0
    assert rest.module.entropy_bonus.coefficient == whole.module.entropy_bonus.coefficient


def test_a_step_without_a_token_adapts_nothing(model_folder, problems_file):
    """Its entropy is 0 / 0, not low: nothing ends within two tokens, and all that does not end is left out."""
    run = fit(
        model_folder(),
        problems_file,
        {"entropy_coefficient": 0.01, "target_entropy": 1.0, "top_entropy_fraction": 0.5},
        rollout={"mask_truncated": True, "max_new_tokens": 2},
    )
    assert run.column("train/loss") == run.column("train/entropy_coefficient") == [0.0, 0.0]
    assert run.module.entropy_bonus.coefficient == 0.01


# -- top-entropy tokens ----------------------------------------------------------------------------------------


def test_all_tokens_are_bit_by_bit_what_they_were(train):
    assert difference(train(), train(model={"top_entropy_fraction": 1.0})) == 0.0


@pytest.mark.parametrize("micro", [None, 2])
def test_the_tokens_that_learn_are_chosen_among_those_of_the_window(train, micro):
    """Steps of a rollout have thresholds of their own, and another pass deals the groups anew."""
    sizes = {**OFF_POLICY, "micro_batch_size": micro, "prompts_per_step": 4}
    some = train(model={"top_entropy_fraction": 0.2}, rollout=sizes, steps=4)
    assert difference(some, train(rollout=sizes, steps=4)) > 1e-4
    rollout, thresholds = some.rollouts[0], []
    for step in range(4):
        parts = [part for at, part, _ in some.slices if at == step]
        entropy, chosen = (
            torch.cat([f(p)[p.loss_mask] for p in parts])
            for f in (lambda p: p.samples.stats.entropy, lambda p: p.surrogate_mask)
        )
        assert torch.equal(chosen, entropy >= torch.quantile(entropy, 0.8))
        assert not any((p.surrogate_mask & ~p.loss_mask).any() for p in parts)
        thresholds.append(entropy[chosen].min().item())
    assert len(set(thresholds)) == 4
    assert len(rollout.seeds) == 32


def test_only_the_chosen_tokens_have_a_gradient(train, monkeypatch):
    """At the log-probabilities that the loss is given."""
    from rlif_lightning.training import slice_loss as home

    seen = []

    def spy(logprob, inputs, *args):
        logprob.retain_grad()
        seen.append((logprob, inputs.surrogate_mask))
        return loss(logprob, inputs, *args)

    loss = home.policy_loss
    monkeypatch.setattr(home, "policy_loss", spy)
    monkeypatch.setattr(home, "takes_fused_loss", lambda *_: False)  # autograd shows the gradient looked at below
    run = train(model={"top_entropy_fraction": 0.2}, steps=1)
    ((logprob, chosen),) = seen
    learning = run.rollouts[0].advantages != 0
    part = run.slices[0][1]
    assert learning.all()
    assert torch.equal(logprob.grad != 0, chosen) and torch.equal(chosen, part.surrogate_mask)


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ppo"}, "model.loss is unknown"),
        ({"clip_low": -0.1}, "model.clip_low is out of range\n  got: -0.1\n  expected: 0 or more"),
        ({"kl_coefficient": -0.1}, "model.kl_coefficient is out of range"),
        ({"entropy_coefficient": -0.1}, "model.entropy_coefficient is out of range"),
        ({"target_entropy": 0.0}, "target_entropy"),
        ({"target_entropy": -1.0}, "target_entropy"),
        ({"top_entropy_fraction": 0.0}, "top_entropy_fraction"),
        ({"top_entropy_fraction": 1.2}, "top_entropy_fraction"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RLIFModule("toy", **settings)


@pytest.mark.parametrize("setting", ["--model.loss=gpso", "--model.kl_estimator=k1"])
def test_an_unknown_name_is_refused_by_the_command_line(rlif, small_fit, capsys, setting):
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, setting)
    assert setting.split("=")[1] in capsys.readouterr().err
