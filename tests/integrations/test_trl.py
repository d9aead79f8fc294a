"""Rewards and guard inside a real GRPOTrainer of TRL, on tiny random models."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlif_lightning import AnswerFormat, score
from rlif_lightning.errors import UserError
from rlif_lightning.functional.similarity import group_similarity
from rlif_lightning.grading import agreement
from rlif_lightning.guard.rule import AGREEMENT, REFERENCE, SIMILARITY, RuleSettings
from rlif_lightning.integrations.trl import GuardCallback, InternalReward
from rlif_lightning.models.trainable import trainable_weights
from rlif_lightning.rewards import (
    ExpectedAgreement,
    Length,
    MajorityVote,
    ProbabilityMargin,
    Random,
    SelfCertainty,
    Shuffled,
    TokenEntropy,
    TrajectoryEntropy,
    Verifiable,
)
from tests.integrations.test_scores import Gini, loop, means

trl = pytest.importorskip("trl", reason="pip install -e '.[test]'")
pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["How many clips?", "Solve for $x$: 36", "What is 2 + 2?", "1"]
LETTER = AnswerFormat(completion=r"([a-z])", compare="exact")
PLAIN = RuleSettings(patience=2, smoothing=1.0, warmup=0)


class Noted(InternalReward):
    """Notes what it was given and what it gave, and scores the same by hand with the weights of that moment."""

    def __call__(self, prompts, completions, completion_ids, **columns):
        values = super().__call__(prompts, completions, completion_ids, **columns)
        self.calls = [*getattr(self, "calls", []), (prompts, completions, completion_ids, values)]
        self.scores = score(
            self.model, self.tokenizer, prompts, completion_ids, temperature=0.8, rewards=[self.reward], group_size=4
        )
        return values


class Kept(TrainerCallback):
    """The weights before each step."""

    def on_train_begin(self, args, state, control, **trainer):
        self.weights = []

    def on_step_begin(self, args, state, control, model, **trainer):
        self.weights.append(trainable_weights(model))


def trainer_of(folder, tmp_path, rewards, callbacks, conversations=False, peft=None, **settings):
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        temperature=0.8, learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", seed=0, dataloader_pin_memory=False,
        **{"max_steps": 2, "logging_steps": 1, **settings},
    )  # fmt: skip
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if conversations else PROMPTS
    return trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=callbacks,
        peft_config=peft,
    )


INTERNAL = [
    SelfCertainty(),
    TokenEntropy("sum"),
    TrajectoryEntropy(),
    ExpectedAgreement(),
    ProbabilityMargin(),
    Gini(),
]


@pytest.mark.parametrize("reward", INTERNAL, ids=lambda reward: reward.name)
def test_rewards_equal_score(model_folder, tmp_path, reward):
    noted = Noted(reward)
    trainer = trainer_of(model_folder(), tmp_path, noted, [noted])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(noted.calls) == len(logs) == 2
    for (*_, values), row in zip(noted.calls, logs, strict=True):
        assert row[f"rewards/{reward.name}/mean"] == pytest.approx(sum(values) / 8, rel=1e-5)
    assert len({round(x, 5) for x in values}) > 1
    assert values == noted.scores.rewards[reward.name].tolist()
    samples = noted.scores.rollout.samples
    want = float(group_similarity(samples.completion_ids, samples.completion_mask, 4).mean())
    assert logs[-1][SIMILARITY] == pytest.approx(want)


def test_self_certainty_by_a_loop(model_folder, tmp_path):
    """TRL's own prompts, as it has tokenised them, through the model's own forward."""
    seen = {}

    class Looped(Noted):
        def __call__(self, prompts, completions, completion_ids, **columns):
            values = super().__call__(prompts, completions, completion_ids, **columns)
            ids, *_ = trainer._tokenize_prompts(prompts)
            loops = [means(loop(self.model, p, c, 0.8))[2] for p, c in zip(ids, completion_ids, strict=True)]
            seen.update(values=values, loops=loops)
            return values

    looped = Looped(SelfCertainty())
    trainer = trainer_of(model_folder(chat=True), tmp_path, looped, [looped], True, max_steps=1)
    trainer.train()
    assert seen["values"] == pytest.approx(seen["loops"], abs=2e-5)


@pytest.mark.parametrize(
    "peft", [None, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])], ids=["full", "lora"]
)
def test_a_frozen_reference(model_folder, tmp_path, peft):
    """The start's distributions, while the policy has moved away from them; and the guard's signal of it."""
    frozen, moving = (InternalReward(TrajectoryEntropy(annotator=x)) for x in ("reference", "ema"))
    folder, logged, calls = model_folder(), Logged(), []

    def note(prompts, completions, completion_ids, **columns):
        calls.append((prompts, completion_ids))
        return [0.0] * len(prompts)

    trainer = trainer_of(folder, tmp_path, [frozen, moving, note], [frozen, moving, logged], peft=peft, max_steps=3)
    trainer.train()
    start, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for (prompts, ids), row in zip(calls, logged.rows, strict=True):
        found = score(start, tokenizer, prompts, ids, temperature=0.8)
        assert row["rewards/trajectory_entropy_reference/mean"] == pytest.approx(
            float(found.logprob.mean()), abs=1e-5
        )
        tokens = found.tokens.logprob.sum() / found.lengths.sum()
        assert row[REFERENCE] == pytest.approx(float(tokens), abs=1e-5)
    apart = [row[f"rewards/{moving.__name__}/mean"] - row[f"rewards/{frozen.__name__}/mean"] for row in logged.rows]
    assert apart[0] == 0 and 0 < abs(apart[2]) < 0.1


class Logged(TrainerCallback):
    """Rows of the log with a reward."""

    def on_init_end(self, args, state, control, **trainer):
        self.rows = []

    def on_log(self, args, state, control, logs, **trainer):
        self.rows += [dict(logs)] if "reward" in logs else []


def test_rewards_of_answers_and_controls(model_folder, tmp_path):
    votes = InternalReward(MajorityVote(), LETTER)
    others = [InternalReward(x) for x in (Length("short"), Random(), Shuffled(SelfCertainty()))]
    calls = []

    def note(prompts, completions, completion_ids, **columns):
        calls.append((completions, completion_ids))
        return [0.0] * len(prompts)

    logged = Logged()
    trainer = trainer_of(model_folder(), tmp_path, [votes, *others, note], [votes, *others, logged])
    trainer.train()
    randoms = set()
    for (texts, ids), row in zip(calls, logged.rows, strict=True):
        answers = [(re.findall("[a-z]", text) or [None])[-1] for text in texts]
        groups = [answers[:4], answers[4:]]
        majority = [max(filter(None, g), key=g.count, default=None) for g in groups for _ in g]
        assert row[AGREEMENT] == pytest.approx(sum(map(agreement, groups)) / 2)
        assert row["rewards/length_short/mean"] == pytest.approx(-sum(map(len, ids)) / 8)
        randoms.add(row["rewards/random/mean"])
        assert (
            row["rewards/majority_vote/mean"] == sum(a == m for a, m in zip(answers, majority, strict=True) if a) / 8
        )
    assert len(randoms) == 2


# -- the guard ---------------------------------------------------------------------------------------------------


class Scripted(InternalReward):
    """Its similarity is a script; the reward is the real one."""

    script = (0.5, 0.6, 0.9, 0.4, 0.3, 0.2, 0.1)

    def _signals(self, rollout):
        self.step = getattr(self, "step", -1) + 1
        yield SIMILARITY, self.script[self.step]


@pytest.mark.parametrize("action", ["warn", "stop", "restore"])
def test_the_guard_stops_and_goes_back(model_folder, tmp_path, action):
    """The best rollout is that of the weights after two steps; the second low one in a row comes after four."""
    reward, guard, kept = Scripted(SelfCertainty()), GuardCallback(action, PLAIN), Kept()
    trainer = trainer_of(model_folder(), tmp_path, reward, [reward, guard, kept], max_steps=6)
    trainer.train()
    assert guard.rule.fired.best_step == 2 and guard.rule.fired.step == 4
    assert trainer.state.global_step == (6 if action == "warn" else 5)
    best = load_file(tmp_path / "out/guard/weights.safetensors")
    assert best.keys() == kept.weights[2].keys()
    assert all(torch.equal(best[name], kept.weights[2][name]) for name in best)
    assert any(not torch.equal(best[name], kept.weights[4][name]) for name in best)
    now = trainable_weights(trainer.model)
    assert all(torch.equal(now[name], best[name]) for name in best) is (action == "restore")
    assert [p.name for p in (tmp_path / "out/guard").iterdir()] == ["weights.safetensors"]


def test_the_guard_under_lora_keeps_the_adapter(model_folder, tmp_path):
    reward, guard = Scripted(SelfCertainty()), GuardCallback("restore", PLAIN)
    peft = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = trainer_of(model_folder(), tmp_path, reward, [reward, guard], peft=peft, max_steps=6)
    trainer.train()
    best = load_file(tmp_path / "out/guard/weights.safetensors")
    assert best and all("lora" in name for name in best)
    assert all(torch.equal(trainable_weights(trainer.model)[name], best[name]) for name in best)


def test_the_guard_with_several_steps_per_rollout(model_folder, tmp_path):
    """A rollout of two steps is judged once, and its weights are those before the first of them."""
    reward, guard = Scripted(SelfCertainty()), GuardCallback("stop", PLAIN)
    trainer = trainer_of(model_folder(), tmp_path, reward, [reward, guard], max_steps=12, num_iterations=2)
    trainer.train()
    assert guard.rule.steps == [0, 2, 4, 6, 8] and guard.rule.fired.best_step == 4


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InternalReward(Verifiable()), "Verifiable lacks something here\n  got: labels"),
        (lambda: InternalReward(MajorityVote()), "give answers=AnswerFormat"),
        (lambda: InternalReward(SelfCertainty())([], [], []), "name it among the callbacks"),
    ],
)
def test_what_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_what_is_refused_in_training(model_folder, tmp_path):
    reward = InternalReward(SelfCertainty())
    trainer = trainer_of(model_folder(), tmp_path, reward, [reward, GuardCallback()], logging_steps=10)
    with pytest.raises(UserError, match="logging_steps 10"):
        trainer.train()
    plain = trainer_of(model_folder(), tmp_path, lambda completions, **_: [0.0] * len(completions), [GuardCallback()])
    with pytest.raises(UserError, match="none of its signals"):
        plain.train()
