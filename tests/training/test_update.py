"""Updates through the real Trainer, held against a hand-written step in float64."""

import copy
import math
import re
from contextlib import nullcontext

import pytest
import torch

from rlif_lightning.errors import UserError
from rlif_lightning.training.module import RLIFModule
from tests.short_runs import adamw, fit, many_ends

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}") for text in ("treespec, LeafSpec", "in eval mode", "is zero")
]
LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo")
# Random A and non-zero B: with B = 0 adapter and base agree and many errors can't show.
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return many_ends(model_folder(), tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture
def train(folder, problems_file):
    def run(loss="grpo", kl=0.05, lora=None, model=None, **settings):
        return fit(
            folder, problems_file, {"loss": loss, "kl_coefficient": kl, "lora": lora, **(model or {})}, **settings
        )

    return run


def assert_same_weights(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name].double(), b[name].double(), atol=atol, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved(run):
    """Largest change of a weight."""
    start = dict(run.start.named_parameters())
    return max(float((w - start[n].detach()).abs().max()) for n, w in run.weights().items())


# -- the step against one written by hand ----------------------------------------------------------------------


def token_table(model, prompt, completion, tau):
    """log softmax [T, V] of an unpadded row, in the model's own precision (float64 here)."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / tau).log_softmax(-1)


def texts_of(rollout):
    s = rollout.samples
    rows = []
    for i in range(len(s.ended)):
        rows.append((s.prompt_ids[i, s.prompt_mask[i]].tolist(), s.completion_ids[i, s.completion_mask[i]].tolist()))
    return rows


def by_hand(run, *, loss, kl, tau, lr, weight_decay=0.1, t_max=12, group=4, low=0.2, high=0.2, lora=False):
    """The whole update again, from nothing but the tokens that were sampled: plain loops, float64.

    Returns the trainable weights, and each step's mean ratio and clipped share.
    """
    policy = copy.deepcopy(run.start).double()
    initial = copy.deepcopy(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=1e-2, weight_decay=weight_decay)
    windows = {}
    for step, part, _ in run.slices:
        windows.setdefault(step, []).extend(part.seeds.tolist())
    rollouts = {tuple(r.seeds.tolist()): r for r in run.rollouts}
    held, ratios, clips = None, [], []
    for step in sorted(windows):
        rollout = next(r for seeds, r in rollouts.items() if set(windows[step]) <= set(seeds))
        rows = texts_of(rollout)
        if rollout is not held:  # a new rollout: its rewards and old log-probabilities are the current policy's
            held, old, rewards = rollout, [], []
            with torch.no_grad():
                for prompt, completion in rows:
                    table = token_table(policy, prompt, completion, tau)
                    old.append(table.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
                    certainty = [-float(p.mean()) - math.log(len(p)) for p in table]
                    rewards.append(sum(certainty) / len(certainty))
        advantages = []
        for g in range(0, len(rows), group):
            mean = sum(rewards[g : g + group]) / group
            std = math.sqrt(sum((r - mean) ** 2 for r in rewards[g : g + group]) / (group - 1))
            advantages += [(r - mean) / (std + 1e-4) for r in rewards[g : g + group]]
        chosen = [rollout.seeds.tolist().index(seed) for seed in windows[step]]
        tokens = sum(len(rows[i][1]) for i in chosen)
        total, ratio_sum, clipped = 0.0, 0.0, 0
        for i in chosen:
            prompt, completion = rows[i]
            ids = torch.tensor(completion)[:, None]
            logprob = token_table(policy, prompt, completion, tau).gather(1, ids).squeeze(1)
            with torch.no_grad(), initial.disable_adapter() if lora else nullcontext():
                reference = token_table(initial, prompt, completion, tau).gather(1, ids).squeeze(1)
            row = 0.0
            for t in range(len(completion)):
                ratio, a = (logprob[t] - old[i][t]).exp(), advantages[i]
                bounded = ratio if 1 - low <= ratio <= 1 + high else (1 - low if ratio < 1 else 1 + high)
                surrogate = min(ratio * a, bounded * a)
                clipped += (ratio * a > bounded * a).item() if torch.is_tensor(ratio) else 0
                ratio_sum += ratio.item()
                d = reference[t] - logprob[t]
                row = row - surrogate + kl * (d.exp() - d - 1)
            weight = {
                "grpo": 1 / (len(completion) * len(chosen)),
                "dapo": 1 / tokens,
                "bnpo": 1 / tokens,
                "dr_grpo": 1 / (len(chosen) * t_max),
            }[loss]
            total = total + weight * row
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ratios.append(ratio_sum / tokens)
        clips.append(clipped / tokens)
    return {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}, ratios, clips


@pytest.mark.parametrize(
    ("loss", "micro", "lora"),
    [
        ("grpo", None, None),
        ("grpo", 2, None),
        ("dapo", 2, None),
        ("bnpo", 4, None),
        ("dr_grpo", 2, None),
        ("grpo", 4, LORA),
        ("dapo", None, LORA),
    ],
)
def test_two_steps_are_those_written_by_hand(train, loss, micro, lora):
    """Other code, other precision, no padding, no slices: the same weights."""
    run = train(loss, lora=lora, rollout={"micro_batch_size": micro, "temperature": 0.8}, optimizer=adamw(1e-2))
    expected, *_ = by_hand(run, loss=loss, kl=0.05, tau=0.8, lr=1e-2, lora=lora is not None)
    lengths = torch.cat([r.samples.lengths for r in run.rollouts])
    assert lengths.min() < lengths.max()  # else grpo and dapo were one
    assert_same_weights(run.weights(), expected, atol=2e-6)
    assert moved(run) > 1e-3


@pytest.mark.parametrize("micro", [None, 2])
def test_several_updates_from_one_rollout_are_those_written_by_hand(train, micro):
    """2 passes x 2 steps with a large learning rate: ratios leave 1, both clips act, by their own bounds."""
    run = train(
        "dapo",
        rollout={"micro_batch_size": micro, "passes": 2, "steps_per_rollout": 2},
        model={"clip_low": 0.1, "clip_high": 0.3},
        optimizer=adamw(5e-2),
        steps=8,
    )
    assert len(run.rollouts) == 2 and run.trainer.global_step == 8
    expected, ratios, clips = by_hand(run, loss="dapo", kl=0.05, tau=1.0, lr=5e-2, low=0.1, high=0.3)
    assert_same_weights(run.weights(), expected, atol=2e-5)
    assert run.column("train/ratio_mean") == pytest.approx(ratios, abs=1e-4)
    assert run.column("train/clip_fraction") == pytest.approx(clips, abs=1e-6)
    assert max(clips) > 0.1 and clips[0] == clips[4] == 0
    first, later = run.column("train/ratio_mean")[::4], run.column("train/ratio_mean")[1:4]
    assert first == pytest.approx([1, 1], abs=1e-4) and all(abs(r - 1) > 1e-3 for r in later)
    assert all(old is not None for *_, old in run.slices)


# -- slices do not matter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_change_nothing(train, loss, lora):
    # Both steps from one rollout: a rounding may move a second rollout's draw over the edge to another token.
    runs = [train(loss, lora=lora, rollout={"micro_batch_size": m, "passes": 2}) for m in (None, 4, 1)]
    for other in runs[1:]:
        assert_same_weights(other.weights(), runs[0].weights(), atol=1e-6)
        for name in ("loss", "kl", "ratio_mean", "clip_fraction", "grad_norm"):
            mine, whole = other.column(f"train/{name}"), runs[0].column(f"train/{name}")
            assert mine == pytest.approx(whole, rel=1e-4, abs=1e-6), name
    assert [r.trainer.accumulate_grad_batches for r in runs] == [1, 2, 8]
    assert all(r.trainer.global_step == 2 for r in runs) and moved(runs[0]) > 1e-4


def test_losses_differ(train):
    """Completions of several lengths: the four normalisations are three different steps."""
    a, b, c, d = (train(loss, trainer={"gradient_clip_val": None}).weights() for loss in LOSSES)

    def distance(x, y):
        return max(float((x[n] - y[n]).abs().max()) for n in x)

    assert distance(b, c) == 0
    assert min(distance(a, b), distance(a, d), distance(b, d)) > 1e-6


# -- exactness at step 0 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("lora", [None, {**LORA, "init_lora_weights": True}], ids=["full", "lora"])
def test_divergence_is_exactly_0_and_the_ratio_exactly_1_at_the_start(train, lora, micro):
    run = train(lora=lora, rollout={"micro_batch_size": micro}, optimizer=adamw(1e-2))
    assert run.column("train/kl")[0] == 0.0 and run.column("train/kl")[1] > 1e-6
    assert run.column("train/ratio_mean") == [1.0, 1.0]
    assert run.column("train/clip_fraction") == [0.0, 0.0]
    assert abs(run.column("rollout/kl")[0]) < 1e-9  # the sampler's cached forward rounds in its own way
    assert run.column("rollout/kl")[1] > 1e-6


ON_THE_HEAD = {**LORA, "target_modules": ["lm_head"], "init_lora_weights": True}  # B is 0: equal to its reference


@pytest.mark.parametrize(
    "model",
    [
        {"loss": "gspo"},
        {"entropy_coefficient": 0.01},
        {"lora": ON_THE_HEAD},
        {"gradient_checkpointing": True},
    ],
    ids=["gspo", "bonus", "lora", "checkpointing"],
)
def test_the_divergence_starts_at_0_however_the_logits_are_made(train, model):
    rest = {k: v for k, v in model.items() if k not in ("loss", "lora")}
    run = train(model.get("loss", "grpo"), lora=model.get("lora"), model=rest)
    assert run.column("train/kl")[0] == 0.0 < run.column("train/kl")[1]


def test_the_logged_loss_is_that_of_the_whole_step(train):
    """On policy it is -mean A = 0 for grpo, plus the KL; dr_grpo has length-weighted advantages: not 0."""
    run = train("dr_grpo", kl=0.0, rollout={"micro_batch_size": 2})
    rollout = run.rollouts[0]
    expected = -(rollout.advantages * rollout.samples.lengths).sum() / (8 * 12)
    assert run.column("train/loss")[0] == pytest.approx(float(expected), rel=1e-4)
    assert abs(float(expected)) > 1e-3


# -- the reference ---------------------------------------------------------------------------------------------


def test_the_frozen_copy_stays_at_the_start(train):
    run = train(steps=3, optimizer=adamw(1e-2))
    start = run.start.state_dict()
    reference = run.module.references.frozen.state_dict()
    assert all(torch.equal(reference[n], start[n]) for n in start)
    assert not any(p.requires_grad for p in run.module.references.frozen.parameters())
    assert not run.module.references.frozen.training
    assert moved(run) > 1e-3
    group = run.trainer.optimizers[0].param_groups[0]["params"]
    assert len(group) == len(run.weights())


def test_lora_refers_to_its_base_and_trains_the_adapter_only(train):
    run = train(lora=LORA, steps=3, optimizer=adamw(1e-2))
    assert run.module.references.frozen is None
    names = set(run.weights())
    assert names and all("lora_" in n for n in names)
    start = run.start.state_dict()
    for name, weight in run.module.policy.model.state_dict().items():
        assert torch.equal(weight, start[name]) == (name not in names), name
    assert run.column("train/kl")[0] > 1e-3  # B is not 0: the policy does not start at its reference


def test_no_reference_is_loaded_or_logged_where_none_is_asked_for(train):
    run = train(kl=0.0)
    assert run.module.references.frozen is None
    assert not run.column("train/kl") and not run.column("rollout/kl")
    assert run.rollouts[0].kl_logprob is None


def test_a_kl_penalty_holds_the_policy_back(train):
    free, held = (train(kl=k, steps=6, optimizer=adamw(1e-2)).column("rollout/kl") for k in (1e-9, 30.0))
    assert held[-1] < free[-1] / 2


# -- truncated completions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 1])
def test_truncated_completions_are_left_out_of_statistics_and_loss(train, micro):
    run = train("grpo", rollout={"mask_truncated": True, "max_new_tokens": 6, "micro_batch_size": micro}, steps=1)
    rollout = run.rollouts[0]
    ended = rollout.samples.ended
    assert 0 < ended.sum() < len(ended)
    assert (rollout.advantages[~ended] == 0).all() and not rollout.loss_mask[~ended].any()
    assert torch.equal(rollout.loss_mask[ended], rollout.samples.completion_mask[ended])
    for group in range(2):
        rows = torch.arange(4 * group, 4 * group + 4)[ended[4 * group : 4 * group + 4]]
        if len(rows) > 1:
            r = rollout.rewards["self_certainty"][rows]
            torch.testing.assert_close(rollout.advantages[rows], (r - r.mean()) / (r.std() + 1e-4))
    assert math.isfinite(run.column("train/loss")[0]) and moved(run) > 0


def test_a_step_without_any_ended_completion_changes_nothing(model_folder, problems_file):
    """Neither through the advantage nor through the KL: the adapter is not the base, and still not drawn to it."""
    run = fit(
        model_folder(),
        problems_file,
        {"lora": LORA, "kl_coefficient": 1.0},
        rollout={"mask_truncated": True, "max_new_tokens": 2},
        optimizer=adamw(1e-2, weight_decay=0.0),
    )
    assert not any(r.samples.ended.any() for r in run.rollouts)
    assert run.column("rollout/kl")[0] > 1e-3
    assert run.column("train/loss") == run.column("train/kl") == [0.0, 0.0] and moved(run) == 0.0


# -- number of steps, learning rate, precision -----------------------------------------------------------------


@pytest.mark.parametrize(("passes", "steps_per_rollout", "micro"), [(2, 1, None), (1, 2, 4), (2, 2, 2)])
def test_each_rollout_serves_its_number_of_steps(train, passes, steps_per_rollout, micro):
    sizes = {"passes": passes, "steps_per_rollout": steps_per_rollout, "micro_batch_size": micro}
    per_rollout = passes * steps_per_rollout
    run = train(rollout=sizes, steps=2 * per_rollout)
    assert run.trainer.global_step == 2 * per_rollout and len(run.rollouts) == 2
    assert len(run.rollouts[0].seeds) == 8 * steps_per_rollout
    assert len(run.column("rollout/reward")) == 2
    assert len(run.column("train/ratio_mean")) == 2 * per_rollout
    for step in range(2 * per_rollout):
        rows = [s for at, part, _ in run.slices if at == step for s in part.seeds.tolist()]
        assert len(rows) == len(set(rows)) == 8
        assert set(rows) <= set(run.rollouts[step // per_rollout].seeds.tolist())
    # The old log-probabilities are those of the sampler, at every pass.
    for step, part, old in run.slices:
        whole = run.rollouts[step // per_rollout]
        for i, seed in enumerate(part.seeds.tolist()):
            row = whole.seeds.tolist().index(seed)
            n = int(part.samples.lengths[i])
            assert torch.equal(old[i, :n], whole.samples.logprob[row, :n])


def expected_rates(schedule, total, warmup, lr=1e-3):
    def share(s):
        if s < warmup:
            return s / warmup
        left = (s - warmup) / (total - warmup)
        return {"constant": 1, "linear": 1 - left, "cosine": (1 + math.cos(math.pi * left)) / 2}[schedule]

    return [lr * share(s) for s in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_of_each_step(train, schedule):
    """Logged at a step: the rate that this step was taken with, not the next one's."""
    run = train(model={"schedule": schedule, "warmup_ratio": 0.25}, rollout={"micro_batch_size": 4}, steps=8)
    assert run.column("train/learning_rate") == pytest.approx(expected_rates(schedule, 8, 2), abs=1e-9)
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 if schedule == "constant" else 0.0)


def test_the_learning_rate_over_epochs(train):
    """40 prompts: 2 epochs of 5 rollouts of 8 prompts are 10 steps, however they are sliced."""
    run = train(
        model={"schedule": "cosine", "warmup_ratio": 0.2},
        rollout={"prompts_per_step": 8, "group_size": 2, "micro_batch_size": 8, "max_new_tokens": 3},
        trainer={"max_steps": -1, "max_epochs": 2},
    )
    assert run.trainer.global_step == 10
    assert run.column("train/learning_rate") == pytest.approx(expected_rates("cosine", 10, 2), abs=1e-9)


def test_a_run_ends_its_schedule_where_it_ends(train):
    """Both limits given: the earlier one ends the run, and so the schedule."""
    run = train(
        model={"schedule": "linear"},
        rollout={"prompts_per_step": 8, "group_size": 2, "max_new_tokens": 3},
        trainer={"max_steps": 100, "max_epochs": 1},
    )
    assert run.trainer.global_step == 5
    assert run.column("train/learning_rate") == pytest.approx(expected_rates("linear", 5, 0), abs=1e-9)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_training_in_half_precision_is_refused(train, precision, lora):
    with pytest.raises(UserError, match=precision.replace("true", "mixed")):
        train(lora=lora, trainer={"precision": precision})


@pytest.mark.parametrize("lora", [None, {**LORA, "init_lora_weights": True}], ids=["full", "lora"])
def test_bf16_mixed_keeps_what_is_trained_in_float32(train, lora):
    run = train(lora=lora, trainer={"precision": "bf16-mixed"}, optimizer=adamw(1e-3))
    assert {w.dtype for w in run.weights().values()} == {torch.float32}
    frozen = run.module.references.frozen if lora is None else run.module.policy.model
    linear = {p.dtype for n, p in frozen.named_parameters() if not p.requires_grad and "proj" in n}
    assert linear == {torch.bfloat16}
    assert run.column("train/ratio_mean") == [1.0, 1.0]
    assert run.column("train/kl")[0] == 0.0
    assert moved(run) > 0


def test_a_run_is_repeatable(train):
    one, two = (train(rollout={"micro_batch_size": 2, "steps_per_rollout": 2}) for _ in range(2))
    assert_same_weights(one.weights(), two.weights(), atol=0)
    assert one.column("train/loss") == two.column("train/loss")


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_divergence_is_exactly_0_at_the_start_under_mixed_precision(rlif, small_fit, model_folder, architecture):
    """A reference that is bf16 throughout rounds the residual stream, which the policy keeps in float32."""
    folder = rlif("fit", *small_fit, "--trainer.precision=bf16-mixed", "--model.name", model_folder(architecture))
    from rlif_lightning.runs.metrics_csv import read_metrics

    metrics = read_metrics(folder / "runs/run/1/metrics.csv")
    assert metrics["train/kl"][0] == 0.0 and metrics["train/kl"][1] > 0.0
    assert metrics["train/ratio_mean"][0] == 1.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[0.0] * len(rollout.texts)", "got: list"),
        ("rollout.samples.lengths[:3].float()", r"got: a tensor of shape \[3\]"),
        ("rollout.samples.lengths * float('nan')", "no finite number"),
    ],
)
def test_a_wrong_reward_is_named(rlif, small_fit, tmp_path, capsys, body, message):
    name = f"own_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(
        "from rlif_lightning.rewards import Reward\n\n\nclass Own(Reward):\n"
        f"    def __call__(self, rollout):\n        return {body}\n"
    )
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, f"--rollout.rewards=[{{class_path: {name}.Own}}]")
    error = capsys.readouterr().err
    assert f"{name}.Own" in error and re.search(message, error) and "Traceback" not in error


def test_weights_that_were_loaded_to_be_evaluated_do_not_train(train, monkeypatch):
    """They may be in half precision, and have no reference next to them."""
    init = RLIFModule.__init__

    def loaded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.configure_model()

    monkeypatch.setattr(RLIFModule, "__init__", loaded)
    with pytest.raises(UserError, match="loaded for an evaluation"):
        train(steps=1)
