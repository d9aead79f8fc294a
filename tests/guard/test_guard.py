"""The guard's rule against a naive re-implementation and hand-made curves; the callback through the real Trainer."""

import itertools
import json
import math
import random
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

from rlif_lightning.callbacks import CollapseGuard, RolloutCheckpoint
from rlif_lightning.errors import UserError
from rlif_lightning.functional.similarity import group_similarity
from rlif_lightning.guard.kept_weights import KeptWeights
from rlif_lightning.guard.rule import (
    AGREEMENT,
    REFERENCE,
    SIMILARITY,
    CollapseRule,
    RuleSettings,
    Watch,
    default_rule,
)
from rlif_lightning.models.checkpoints import read_checkpoint
from rlif_lightning.models.trainable import load_trainable, put_weights, save_trainable, trainable_weights
from rlif_lightning.runs.curves import curves_figure
from rlif_lightning.runs.metrics_csv import MetricsCSV, read_metrics
from rlif_lightning.runs.summary import summary_table
from rlif_lightning.training.module import RLIFModule
from tests.short_runs import adamw, fit

RISE_AND_FALL = [0.3, 0.5, 0.6, 0.7, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
PLAIN = {"patience": 2, "smoothing": 1.0, "warmup": 0}  # judged as they come: easy to follow by hand


def follow(rule, curve, name="x"):
    """The decisions over a curve of values, or of mappings, one every second step."""
    rows = [row if isinstance(row, dict) else {name: row} for row in curve]
    return [rule.update(2 * i, row) for i, row in enumerate(rows)]


def fired_at(rule, curve, name="x"):
    return [d.step // 2 for d in follow(rule, curve, name) if d.verdict == "fired"]


# -- the rule ------------------------------------------------------------------------------------------------


def naive(curve, drop, unit, patience, smoothing, warmup):
    """(index that fired or None, index of the best until then): everything anew at every rollout."""
    ema = []
    for x in curve:
        ema.append(x if not ema else (1 - smoothing) * ema[-1] + smoothing * x)
    for end in range(warmup, len(ema)):
        lows = []
        for i in range(max(warmup, end - patience + 1), end + 1):
            best = max(ema[warmup : i + 1])
            start = sum(curve[: max(1, warmup)]) / max(1, warmup)
            lows.append(best - ema[i] > drop * abs(best if unit == "best" else start))
        if len(lows) == patience and all(lows):
            return end, max(range(warmup, end + 1), key=lambda i: ema[i])
    return None, max(range(warmup, len(ema)), key=lambda i: ema[i])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_rule_is_the_naive_one(sign):
    noise, fired = random.Random(3), 0
    for _ in range(300):
        level, curve = 1.0, []
        for _ in range(40):
            level = max(0.05, level + noise.gauss(0, 0.05))
            curve.append(sign * level)
        settings = (
            noise.choice([0.02, 0.1, 0.3]),
            noise.choice(["best", "start"]),
            noise.randint(1, 4),
            noise.choice([0.2, 0.5, 1.0]),
            noise.randint(0, 5),
        )
        rule = CollapseRule([Watch("x", *settings)])
        found = fired_at(rule, curve)
        at, best = naive(curve, *settings)
        assert found == ([] if at is None else [at])
        assert rule.best_step == 2 * best
        fired += len(found)
    assert 50 < fired < 300


def test_a_fall_by_hand():
    rule = CollapseRule([Watch("x", 0.05, **PLAIN)])
    decisions = follow(rule, RISE_AND_FALL)
    assert [d.verdict for d in decisions] == [*["best"] * 5, "nothing", "fired", *["nothing"] * 3]
    d = decisions[6]
    assert (d.step, d.signal, d.value, d.best, d.best_step) == (12, "x", 0.6, 0.8, 8)
    assert d.threshold == pytest.approx(0.76)
    assert d.reason == "at step 12 x was 0.6, for 2 rollouts in a row below 0.76; its best was 0.8 at step 8"
    assert rule.best_step == 8 and rule.needed_steps == {8}


def test_smoothing_and_warmup_by_hand():
    """A warm-up value enters the average but is never the best."""
    watch = Watch("x", 0.05, patience=1, smoothing=0.5, warmup=1)
    follow(CollapseRule([watch]), [0.9, 0.5, 0.9])
    assert watch.smoothed == pytest.approx([0.9, 0.7, 0.8]) and watch.best_step == 4


def test_of_equal_values_the_first_is_the_best():
    rule = CollapseRule([Watch("x", 0.05, **PLAIN)])
    assert [d.verdict for d in follow(rule, [0.5, 0.5, 0.5])] == ["best", "nothing", "nothing"]
    assert rule.best_step == 0


def test_one_bad_rollout_does_not_fire():
    rule = CollapseRule([Watch("x", 0.05, **PLAIN)])
    assert fired_at(rule, [0.5, 0.8, 0.1, 0.8, 0.1, 0.79, 0.0, 0.77]) == []
    noise = random.Random(0)
    steady = [min(1.0, 0.3 + i / 50) + noise.gauss(0, 0.01) for i in range(100)]
    steady[60] = 0.75  # the average forgets it within two rollouts; a fall to 0.6 would take it more
    assert fired_at(default_rule(), steady, AGREEMENT) == []


def test_a_drop_in_units_of_the_start():
    """Close to 0 a log-likelihood may wiggle: -0.05 to -0.2 is four times the best, and 15 % of the start."""
    rise = [-1.0, -1.2, -0.8, -0.3, -0.05]
    wiggles = [*rise, -0.19, -0.19, -0.19]
    plain = {**PLAIN, "warmup": 3}
    assert fired_at(CollapseRule([Watch("x", 0.15, "start", **plain)]), wiggles) == []
    assert fired_at(CollapseRule([Watch("x", 0.15, "best", **plain)]), wiggles) == [6]
    assert fired_at(CollapseRule([Watch("x", 0.15, "start", **plain)]), [*rise, -0.21, -0.21]) == [6]


def test_a_log_likelihood_drops_relative_to_its_size():
    rule = CollapseRule([Watch("x", 0.25, **PLAIN)])
    assert fired_at(rule, [-1.0, -0.8, -0.99, -0.99, -0.99]) == []
    assert follow(rule, [-1.01, -1.01])[1].verdict == "fired"
    assert CollapseRule([Watch("x", 0.25, **PLAIN)]).update(0, {"x": -1.0}).verdict == "best"


def test_missing_values_leave_no_trace():
    plain, holes = (CollapseRule([Watch("x", 0.05, **PLAIN)]) for _ in range(2))
    curve = [0.5, 0.8, 0.7, 0.6, 0.5]
    follow(plain, curve)
    for i, x in enumerate(curve):
        for nothing in ({}, {"x": math.nan}, {"x": -math.inf}):
            assert holes.update(10 * i, nothing).verdict == "nothing"
        holes.update(10 * i + 1, {"x": x})
    assert holes.watches[0].smoothed == plain.watches[0].smoothed
    assert holes.fired.best_step == 11


def test_agreement_that_is_gone_has_fallen():
    """Without labels a rollout in which no completion has an answer logs no agreement at all."""
    rule = default_rule(settings=RuleSettings(warmup=0))
    curve = [{SIMILARITY: 0.5}] * 3 + [{AGREEMENT: 0.5, SIMILARITY: 0.5}] * 3 + [{SIMILARITY: 0.5}] * 3
    decisions = follow(rule, curve)
    assert decisions[-1].verdict == "fired" and decisions[-1].signal == AGREEMENT
    assert rule.watches[0].raw == [0.5] * 3 + [0.0] * 3


def test_similarity_counts_where_agreement_never_is():
    falling = [0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    alone = default_rule()
    assert fired_at(alone, falling, SIMILARITY) and alone.best_step == 6 and alone.fired.signal == SIMILARITY
    both = default_rule()
    assert fired_at(both, [{AGREEMENT: 0.5, SIMILARITY: x} for x in falling]) == []
    assert both.active[0].signal == AGREEMENT
    asked = default_rule(signals=[SIMILARITY, AGREEMENT])
    assert asked.watches[0].unless == AGREEMENT  # both asked for: similarity stands in
    assert default_rule(signals=[SIMILARITY]).watches[0].unless is None


def test_the_signal_that_fires_hands_back_its_own_best():
    """Confident and wrong: agreement still rises when the reference's log-likelihood fires."""
    rule = CollapseRule([Watch("a", 0.05, **PLAIN), Watch("r", 0.15, **PLAIN)])
    curve = [{"a": 0.1 * i, "r": -0.1 * abs(i - 2) - 1} for i in range(8)]
    follow(rule, curve[:5])
    assert rule.best_step == 8 and rule.needed_steps == {4, 8}  # as yet the first one's, of either's
    assert follow(rule, curve[5:])[0].verdict == "fired"
    assert rule.fired.signal == "r" and rule.best_step == 4
    assert rule.needed_steps == {4}


def test_weights_that_may_be_handed_back():
    rule = CollapseRule([Watch("x", 0.05, **PLAIN)])
    needed = []
    for i, x in enumerate(RISE_AND_FALL):
        rule.update(2 * i, {"x": x})
        needed.append(rule.needed_steps)
    assert needed == [{0}, {2}, {4}, {6}] + [{8}] * 6 and rule.best_step == 8
    two = CollapseRule([Watch("a", 0.05, **PLAIN), Watch("r", 0.15, **PLAIN)])
    follow(two, [{"a": 1, "r": -1}, {"a": 2, "r": -1.05}])
    assert two.needed_steps == {0, 2}


@pytest.mark.parametrize("warmup", [0, 3])
def test_what_is_needed_was_never_let_go(warmup):
    rule, kept = default_rule(settings=RuleSettings(warmup=warmup)), set()
    for i, x in enumerate(RISE_AND_FALL):
        rule.update(2 * i, {AGREEMENT: x})
        kept = {n for n in kept | {2 * i} if n in rule.needed_steps}
        assert kept == rule.needed_steps
    assert rule.best_step in kept


def test_a_state_in_the_middle_is_enough():
    noise = random.Random(1)
    curve = [
        {AGREEMENT: min(1, 0.3 + 0.05 * i) if i < 12 else 0.9 - 0.06 * (i - 12), REFERENCE: -noise.random()}
        | ({SIMILARITY: noise.random()} if i % 3 else {})
        for i in range(24)
    ]
    whole = default_rule()
    decisions = follow(whole, curve)
    assert any(d.verdict == "fired" for d in decisions)
    for cut in range(len(curve)):
        first = default_rule()
        follow(first, curve[:cut])
        second = default_rule()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.needed_steps == first.needed_steps and second.fired == first.fired
        rest = [second.update(2 * i, row) for i, row in enumerate(curve) if i >= cut]
        assert repr(rest) == repr(decisions[cut:])  # nan in decisions that say nothing
        assert second.state_dict() == whole.state_dict()
        assert [w.smoothed for w in second.watches] == [w.smoothed for w in whole.watches]


# -- similarity ----------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 0], [5, 6, 9, 9], [5, 6, 8, 8], [7, 9, 9, 9], [3, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    # {12, 23} and {12, 24}: a third; alike up to padding; no bigrams at all
    torch.testing.assert_close(group_similarity(ids, mask, 2), torch.tensor([1 / 3, 1.0, 1.0]))
    assert group_similarity(ids, mask, 1).isnan().all()
    assert group_similarity(ids[:, :1], mask[:, :1], 2).tolist() == [1.0] * 3  # every completion is an end token


def test_similarity_is_that_of_sets():
    torch.manual_seed(0)
    ids, lengths = torch.randint(0, 6, (12, 9)), torch.randint(1, 10, (12,))
    mask = torch.arange(9) < lengths[:, None]
    sets = [
        {tuple(row[i : i + 2]) for i in range(n - 1)} for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]

    def jaccard(a, b):
        return len(a & b) / len(a | b) if a | b else 1.0

    expected = []
    for group in (sets[:4], sets[4:8], sets[8:]):
        pairs = list(itertools.combinations(group, 2))
        expected.append(sum(jaccard(a, b) for a, b in pairs) / len(pairs))
    torch.testing.assert_close(group_similarity(ids, mask, 4), torch.tensor(expected))


# -- weights -------------------------------------------------------------------------------------------------


def test_weights_are_kept_by_name(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    kept = trainable_weights(model)
    assert list(kept) == ["0.bias", "1.weight", "1.bias"]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert not torch.equal(kept["1.weight"], model[1].weight)
    frozen = model[0].weight.clone()
    save_trainable(kept, tmp_path / "a" / "w.safetensors", step=7)
    read, facts = load_trainable(tmp_path / "a" / "w.safetensors")
    assert facts == {"step": "7"}
    before = {id(p) for p in model.parameters()}
    put_weights(model, read)
    assert {id(p) for p in model.parameters()} == before
    for name, p in model.named_parameters():
        assert torch.equal(p, kept.get(name, frozen))


def test_weights_of_another_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"do not belong[\s\S]*bias"):
        put_weights(torch.nn.Linear(2, 3), {"weight": torch.zeros(3, 2)})
    with pytest.raises(UserError, match="do not belong"):
        put_weights(torch.nn.Linear(2, 3), {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})
    (tmp_path / "w").write_text("no weights")
    for name in ("w", "nowhere"):
        with pytest.raises(UserError, match="can't be read"):
            load_trainable(tmp_path / name)


@pytest.mark.parametrize("kind", ["cut short", "no step"])
def test_damaged_weights_are_done_without(tmp_path, kind):
    """A run could not be continued because of them, and nothing said which file to delete."""
    good, bad = tmp_path / "step=3.safetensors", tmp_path / "weights.safetensors"
    for path, facts in ((good, {"step": 3}), (bad, {} if kind == "no step" else {"step": 2})):
        save_trainable({"w": torch.ones(3)}, path, **facts)
    if kind == "cut short":
        bad.write_bytes(bad.read_bytes()[:-5])
    kept = KeptWeights()
    with pytest.warns(UserWarning, match=rf"{bad} is damaged"):
        assert kept.read(tmp_path, {2, 3}) == []
    assert list(kept.steps) == [3]


# -- the callback --------------------------------------------------------------------------------------------


class Script(Callback):
    """Stands between rollouts and guard: says what the agreement of each rollout is, and copies the weights."""

    def __init__(self, curve):
        self.curve, self.seen = iter(curve), {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not batch["slice"]:
            self.seen[trainer.global_step] = trainable_weights(pl_module.policy.model)
            batch["metrics"]["rollout/agreement"] = next(self.curve)


@pytest.fixture
def guarded(model_folder, problems_file, tmp_path):
    """``guarded(curve, **guard)``: a run of six steps over a scripted agreement; run, guard and script."""

    def run(curve=(0.5, 0.8, 0.7, 0.6, 0.5, 0.4), steps=6, more=(), model=None, rollout=None, every=100, **settings):
        guard, script = CollapseGuard(**{"drop": 0.05, **PLAIN, **settings}), Script(curve)
        callbacks = [script, *more, guard, RolloutCheckpoint(every=every)]
        done = fit(
            model_folder(), problems_file, model=model, rollout=rollout, optimizer=adamw(0.02), steps=steps,
            callbacks=callbacks, trainer={"default_root_dir": str(tmp_path), "enable_checkpointing": True},
        )  # fmt: skip
        return done, guard, script

    return run


def decision(folder):
    return json.loads((folder / "guard.json").read_text())


def saved(folder):
    return load_trainable(folder / "checkpoints" / "guard" / "weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


UNCOMPARED = ("time/", "memory/", "rollout/tokens_per_second", "guard/")


def logged(run):
    return {
        (s, n): v
        for s, row in run.trainer.logger.steps.items()
        for n, v in row.items()
        if not n.startswith(UNCOMPARED)
    }


LORA = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}}


@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
def test_warn_keeps_the_best_weights_and_changes_nothing(guarded, tmp_path, model):
    with pytest.warns(UserWarning, match="at step 3 rollout/agreement was 0.6, for 2 rollouts in a row below 0.76"):
        run, _, script = guarded(model=model)
    weights, facts = saved(tmp_path)
    assert same(weights, script.seen[1]) and not same(weights, script.seen[0])
    assert facts["step"] == "1" and float(facts[AGREEMENT]) == pytest.approx(0.8)
    assert facts["fingerprint"] == run.module.policy.identity.fingerprint
    told = decision(tmp_path)
    assert (told["fired"]["step"], told["best_step"], told["handed_back_step"], told["taken"]) == (
        3,
        1,
        1,
        "recorded",
    )
    assert told["weights"] == "checkpoints/guard/weights.safetensors" and told["accuracy"] == {}
    assert told["signals"][AGREEMENT]["steps"] == list(range(6))
    assert told["signals"][AGREEMENT]["raw"] == pytest.approx([0.5, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert run.column("guard/best_step") == [0, *[1.0] * 5]
    assert run.column("guard/agreement") == pytest.approx([0.5, 0.8, 0.7, 0.6, 0.5, 0.4])
    head_weight_only, *_ = guarded(model=model, action="off")
    assert run.trainer.global_step == 6 and same(run.weights(), head_weight_only.weights())
    assert logged(run) == logged(head_weight_only)


def test_off_leaves_nothing(guarded, tmp_path):
    run, guard, _ = guarded(action="off", signals=["start_logprob"])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    assert {p.suffix for p in (tmp_path / "checkpoints").iterdir()} == {".ckpt"}
    assert guard.state_dict() == {} and not run.column("guard/best_step")
    assert "CollapseGuard" not in torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]


@pytest.mark.filterwarnings("ignore:Collapse guard")
def test_stop_ends_between_two_rollouts(guarded, tmp_path):
    """Rollouts serve four steps: the decision falls at step 12, the run ends at 16."""
    sizes = {"passes": 2, "steps_per_rollout": 2, "micro_batch_size": 4}
    run, guard, script = guarded(steps=24, rollout=sizes, action="stop")
    assert guard.rule.fired.step == 12 and run.trainer.global_step == 16 and guard.taken == "stopped"
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 16
    end = {f"model.{name}": weight for name, weight in run.weights().items()}
    assert same(checkpoint["state_dict"], end)
    assert same(saved(tmp_path)[0], script.seen[4]) and not same(run.weights(), script.seen[4])
    assert decision(tmp_path)["taken"] == "stopped"


@pytest.mark.filterwarnings("ignore:Collapse guard")
@pytest.mark.parametrize("every", [1, 100], ids=["checkpoint due", "checkpoint at the end"])
def test_restore_leaves_the_kept_weights_in_policy_and_checkpoint(guarded, tmp_path, every):
    run, guard, script = guarded(action="restore", every=every)
    assert run.trainer.global_step == 4 and guard.taken == decision(tmp_path)["taken"] == "restored"
    assert same(run.weights(), script.seen[1])
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert same({n.removeprefix("model."): w for n, w in state["state_dict"].items()}, script.seen[1])


def test_a_healthy_run_keeps_its_running_best(guarded, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Collapse guard")
        run, _, script = guarded(curve=[0.1, 0.2, 0.3, 0.4, 0.5, 0.49], action="restore")
    told = decision(tmp_path)
    assert told["fired"] is None and told["best_step"] == 4 and told["taken"] == "none"
    assert same(saved(tmp_path)[0], script.seen[4])
    assert run.trainer.global_step == 6 and not same(run.weights(), script.seen[4])


@pytest.mark.parametrize("model", [None, LORA], ids=["all weights", "LoRA"])
def test_kept_weights_read_like_a_checkpoint_of_the_same_model(guarded, model, tmp_path):
    run, _, script = guarded(model=model)
    kept = read_checkpoint(tmp_path / "checkpoints" / "guard" / "weights.safetensors")
    assert kept["global_step"] == 1
    run.module.on_load_checkpoint(kept)  # refuses another model, other LoRA settings, other names and shapes
    run.module.load_state_dict(kept["state_dict"], strict=False)
    assert same(run.weights(), script.seen[1])


def test_a_safetensors_file_of_something_else_is_no_checkpoint(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no weights that the collapse guard has kept"):
        read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "halt"}, "guard.action"),
        ({"drop": 0.0}, "guard.drop"),
        ({"drop": 5}, "5 per cent"),
        ({"reference_drop": -1}, "guard.reference_drop"),
        ({"patience": 0}, "guard.patience"),
        ({"smoothing": 0}, "guard.smoothing"),
        ({"warmup": -1}, "guard.warmup"),
        ({"signals": []}, "guard.signals"),
        ({"signals": ["agreement", "agreement"]}, "each signal once"),
        ({"signals": ["entropy"]}, r"unknown signal[\s\S]*entropy[\s\S]*start_logprob"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        CollapseGuard(**settings)


def test_a_signal_that_the_run_lacks(guarded, tmp_path):
    with pytest.raises(UserError, match=r"kl_coefficient 0[\s\S]*do: set model.kl_coefficient"):
        guarded(signals=["start_logprob"])
    with pytest.raises(UserError, match=r"model.reference ema[\s\S]*with model.reference frozen"):
        guarded(signals=["start_logprob"], model={"kl_coefficient": 0.01, "reference": "ema"})
    _, guard, _ = guarded(curve=[0.5], steps=1, signals=["start_logprob"], model={"kl_coefficient": 0.01})
    assert [w.signal for w in guard.rule.watches] == [REFERENCE] and len(guard.rule.watches[0].raw) == 1
    _, guard, _ = guarded(curve=[0.5], steps=1, model={"kl_coefficient": 0.01})
    assert [w.signal for w in guard.rule.watches] == [AGREEMENT, SIMILARITY, REFERENCE]


def test_agreement_on_open_ended_texts(model_folder, problems_file, tmp_path):
    """The random model never writes a box: its texts have no answers."""
    settings = {"default_root_dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"holds an answer[\s\S]*data.answers.completion"):
        fit(model_folder(), problems_file, callbacks=[CollapseGuard(signals=["agreement"])], trainer=settings)
    guard = CollapseGuard(warmup=0)
    run = fit(model_folder(), problems_file, callbacks=[guard], trainer=settings)
    assert guard.rule.active[0].signal == SIMILARITY
    similarity = run.column("rollout/similarity")
    assert len(similarity) == 2 and all(0 <= x < 1 for x in similarity)
    rollout = run.rollouts[0].samples
    expected = group_similarity(rollout.completion_ids, rollout.completion_mask, 4).mean()
    assert similarity[0] == pytest.approx(float(expected))


def test_it_stands_after_what_it_watches(model_folder, problems_file):
    run = fit(model_folder(), problems_file, steps=1)
    guard = CollapseGuard()
    guard.setup(run.trainer, run.module, "fit")
    with pytest.raises(UserError, match="list RolloutCallback before"):
        guard.on_train_batch_start(run.trainer, run.module, {"slice": 0}, 0)


# -- from the command line -----------------------------------------------------------------------------------

RULE = ["--guard.signals=[similarity]", "--guard.warmup=0", "--guard.patience=1", "--guard.smoothing=1"]


class Killed(Exception):
    """Ends a run as a kill does."""


@pytest.fixture
def train(rlif, small_fit, problems_file, monkeypatch, tmp_path):
    """``train(runs, *settings, kill_at=None)``: eight steps; dies in a step's update; returns the run folder."""
    arguments = [
        *small_fit, "--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=4",
        "--evaluation.every=4", "--trainer.max_steps=8", "--checkpoint.every=1", "--model.optimizer.lr=0.02",
        "--guard.drop=0.2", *RULE,
    ]  # fmt: skip
    step = RLIFModule.training_step

    def run(runs, *settings, kill_at=None):
        def dying(self, batch, batch_idx):
            if self.trainer.global_step == kill_at:
                raise Killed
            return step(self, batch, batch_idx)

        monkeypatch.setattr(RLIFModule, "training_step", dying)
        try:
            rlif("fit", *arguments, "--runs", runs, *settings)
        except Killed:
            assert kill_at is not None
        return tmp_path / runs / "run" / "1"

    return run


def left(run):
    """All that a guard leaves behind, without times."""
    told = decision(run)
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    files = {p.name: load_trainable(p) for p in (run / "checkpoints/guard").iterdir()}
    scalars = {name: curve for name, curve in read_metrics(run / "metrics.csv").items() if name.startswith("guard/")}
    weights = {name: ({k: w.tolist() for k, w in weights.items()}, facts) for name, (weights, facts) in files.items()}
    return told, state["callbacks"]["CollapseGuard"], scalars, weights


@pytest.mark.filterwarnings("ignore:Collapse guard")
def test_killed_and_continued(train):
    """Before the firing, in the update of its very rollout, and after it."""
    whole = train("whole")
    fired = decision(whole)["fired"]["step"]
    assert 1 < fired < 7 and set(decision(whole)["accuracy"]) == {"start", "handed_back", "end"}
    for kill in (-1, 0, 1):
        part = train(f"part{kill}", kill_at=fired + kill)
        assert train(f"part{kill}", "--ckpt_path=last") == part
        assert left(part) == left(whole)


@pytest.mark.filterwarnings("ignore:Collapse guard")
def test_going_back_behind_the_kept_weights(train, capsys):
    run = train("runs", "--checkpoint.keep=null")
    told = left(run)
    best = told[0]["best_step"]
    assert best > 0
    train("runs", "--ckpt_path", run / "checkpoints" / f"step={best}.ckpt", "--checkpoint.keep=null", kill_at=best)
    assert decision(run)["fired"] is None  # the file was cut back with the run
    train("runs", "--ckpt_path=last")
    assert left(run) == told


@pytest.mark.filterwarnings("ignore:Collapse guard")
def test_a_run_that_the_guard_ended_stays_ended(train, capsys):
    run = train("runs", "--guard.action=stop")
    told, whole = decision(run), train("whole")
    assert told["taken"] == "stopped" and told["fired"] == decision(whole)["fired"]
    metrics = (run / "metrics.csv").read_bytes()
    for action in ("stop", "restore"):
        with pytest.raises(SystemExit):
            train("runs", f"--guard.action={action}", "--ckpt_path=last")
        message = capsys.readouterr().err
        assert "has ended this run" in message and f"at step {told['fired']['step']} rollout/similarity" in message
    assert (run / "metrics.csv").read_bytes() == metrics
    train("runs", "--guard.action=warn", "--ckpt_path=last")
    assert left(run)[1:] == left(whole)[1:] and decision(run)["taken"] == "recorded"


@pytest.mark.filterwarnings("ignore:Collapse guard")
def test_restored_weights_are_evaluated_and_the_end_as_well(train):
    whole, run = (
        train("whole", "--evaluation.every=1"),
        train("runs", "--evaluation.every=0", "--guard.action=restore"),
    )
    told, curves = decision(run), read_metrics(whole / "metrics.csv")
    end = told["fired"]["step"] + 1
    assert told["taken"] == "restored" and max(read_metrics(run / "metrics.csv")["val/accuracy"]) == end
    for key, step in (("start", 0), ("handed_back", told["handed_back_step"]), ("end", end)):
        assert told["accuracy"][key] == {name: curves[name][step] for name in told["accuracy"]["start"]}
    own = read_metrics(run / "metrics.csv")  # the curve shows the end as it was
    assert told["accuracy"]["end"] == {name: own[name][end] for name in told["accuracy"]["start"]}
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert same({n.removeprefix("model."): w for n, w in state.items()}, saved(whole)[0])


def test_handed_back_weights_score_as_the_step_they_came_from(train):
    """Every step is evaluated: the kept weights must give the very numbers of their step."""
    with pytest.warns(UserWarning, match="Collapse guard"):
        run = train("runs", "--evaluation.every=1", "--evaluation.max_new_tokens=64")  # long enough to differ
    told, curves = decision(run), read_metrics(run / "metrics.csv")
    for key, step in (("start", 0), ("handed_back", told["handed_back_step"]), ("end", 8)):
        values = told["accuracy"][key]
        assert len(values) == 6 and values == {name: curves[name][step] for name in values}
    assert told["accuracy"]["handed_back"] != told["accuracy"]["end"]


@pytest.mark.filterwarnings("ignore:Collapse guard")
def test_off_on_the_command_line(train, capsys):
    """And a guard that only warns saves the very same end, after it has evaluated other weights."""
    run, other = (
        train("runs", "--guard.action=off", "--checkpoint.every=100"),
        train("other", "--checkpoint.every=100"),
    )
    states = [torch.load(x / "checkpoints/last.ckpt", weights_only=True) for x in (run, other)]
    assert states[0]["global_step"] == 8 and same(states[0]["state_dict"], states[1]["state_dict"])
    assert decision(other)["accuracy"]["handed_back"]
    assert not (run / "guard.json").exists() and not (run / "checkpoints/guard").exists()
    with pytest.raises(SystemExit):
        train("runs", "--guard.signals=[entropy]")
    assert "guard.signals" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("runs", "--guard.signals=[start_logprob]", "--model.kl_coefficient=0")
    assert "set model.kl_coefficient above 0" in capsys.readouterr().err


# -- table and picture, from files alone ---------------------------------------------------------------------


@pytest.fixture
def past(tmp_path):
    """A run folder with a guard's decision; ``past(labels=False)``: without accuracies."""

    def make(labels=True):
        folder = tmp_path / "q" / str(int(labels))
        folder.mkdir(parents=True)
        table = MetricsCSV(folder / "metrics.csv")
        for step in range(7):
            table.log(step, {"rollout/reward": step, "rollout/agreement": 0.1 * min(step, 6 - step)})
            if labels:
                table.log(step, {"val/accuracy_sampled": 0.2 + 0.1 * min(step, 6 - step)})
        values = {"start": 0.2, "handed_back": 0.512, "end": 0.2}
        guard = {
            "fired": {"step": 5, "reason": "because"},
            "handed_back_step": 3,
            "weights": "checkpoints/guard/weights.safetensors",
            "accuracy": {name: {"val/accuracy_sampled": x} for name, x in values.items()} if labels else {},
        }
        (folder / "guard.json").write_text(json.dumps(guard))
        return folder

    return make


def verticals(ax):
    return [
        line.get_xdata()[0] for line in ax.lines if list(line.get_ydata()) == [0, 1] and len(line.get_xdata()) == 2
    ]


def test_the_picture_shows_the_decision(past):
    figure = curves_figure([past()])
    accuracy = figure.axes[0]
    assert verticals(accuracy) == [5]
    assert all(verticals(ax) == [5, 3] for ax in figure.axes[1:])
    (diamond,) = [line for line in accuracy.lines if line.get_marker() == "D"]
    assert (list(diamond.get_xdata()), list(diamond.get_ydata())) == ([3], [0.512])
    (words,) = [text.get_text() for text in accuracy.texts if "guard" in text.get_text()]
    assert words == "the guard hands back step 3: 0.512\n(it saw no labels; it fired at step 5)"
    assert [bool(ax.get_legend()) for ax in figure.axes[1:]] == [True] + [False] * (len(figure.axes) - 2)


def test_the_picture_without_labels_and_of_several_runs(past):
    blind = past(labels=False)
    figure = curves_figure([blind])
    assert all(verticals(ax) == [5, 3] for ax in figure.axes)
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert words[-1] == "guard: back to step 3"
    assert not any(verticals(ax) for ax in curves_figure([blind, past()]).axes)


def test_the_table_names_three_accuracies(past):
    run = past()
    weights = run / "checkpoints/guard/weights.safetensors"
    said = f"The collapse guard, which sees no labels, fired at step 5 and kept {weights} (of step 3"
    text = summary_table(run)
    assert f"{said}, accuracy 0.512)." in text
    head, row = (line.split() for line in text.splitlines()[-4:-2])
    assert head == ["start", "best", "at", "step", "handed", "back", "end"]
    assert (row[0], row[1], *row[-2:]) == ("val/accuracy_sampled", "0.200", "0.512", "0.200")
    blind = past(labels=False)
    assert f"{said}).".replace(str(run), str(blind)) in summary_table(blind)
    told = decision(run)
    (run / "guard.json").write_text(json.dumps({**told, "fired": None, "accuracy": {}}))
    assert "did not fire" in summary_table(run) and not any(verticals(ax) for ax in curves_figure([run]).axes)
    (run / "guard.json").write_text("{")
    with pytest.raises(UserError, match=r"guard.json is damaged"):
        summary_table(run)
