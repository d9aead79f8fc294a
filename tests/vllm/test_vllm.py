"""VLLMSampler on vLLM's CPU build: `.ci/vllm` makes its environment."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from rlif_lightning.errors import UserError
from rlif_lightning.models.lora import add_lora
from rlif_lightning.models.policy import Policy, PolicySettings
from rlif_lightning.rewards.base import statistics_of
from rlif_lightning.rollout import Rollout
from rlif_lightning.runs.metrics_csv import read_metrics
from rlif_lightning.sampling import NativeSampler, Sampling, VLLMSampler
from rlif_lightning.toy.pretraining import build_toy
from rlif_lightning.toy.recipe import ARCHITECTURE, PHASES
from rlif_lightning.training.scores import with_scores
from tests.conftest import completion_logits, load_model, make_model
from tests.rewards.own_rewards import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm runs these tests"
    ),
]
PROMPTS = [[1, 5, 6, 7, 3], [1, 4, 5, 6, 7, 9, 3], [1, 8, 14, 9, 3]]
END, PAD = 2, 0
SEEDS = torch.arange(12) + 2**62  # as large as they come
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}


@pytest.fixture(scope="session")
def wide_toy(tmp_path_factory):
    """The folder of a toy with two heads of 32 in place of four of 16, which vLLM's kernels for a CPU don't take."""
    folder = tmp_path_factory.mktemp("wide-toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURE, "num_attention_heads", 2)
        patch.setitem(ARCHITECTURE, "num_key_value_heads", 2)
        build_toy(folder, PHASES["toy"], 0, progress=False)
    return folder


@pytest.fixture
def toy(wide_toy):
    return load_model(str(wide_toy)).eval()


@pytest.fixture(scope="module")
def engine():
    return VLLMSampler()


def draw(engine, policy, sampling, seeds=SEEDS, prompts=PROMPTS):
    """Completions with the policy's current weights, and the largest difference to its own log-probabilities."""
    engine.update(policy, [END], PAD)
    return measured(engine, policy, sampling, seeds, prompts)


@torch.no_grad()
def measured(engine, policy, sampling, seeds=SEEDS, prompts=PROMPTS):
    samples = engine.sample(prompts, len(seeds) // len(prompts), seeds, sampling)
    scored = with_scores(Rollout(samples, 4, sampling.temperature or 1.0, seeds), policy, sampling).samples
    mask = samples.completion_mask
    if samples.engine_logprob is None:
        return samples, None
    assert not samples.engine_logprob[~mask].any()
    return samples, float((scored.logprob - samples.engine_logprob)[mask].abs().max())


def shaken(policy, size=0.05, seed=0):
    """Change every trainable weight in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=generator)


# -- weights ------------------------------------------------------------------------------------------------


def test_a_changed_weight_changes_the_next_rollout_and_an_unchanged_one_does_not(engine, toy):
    """Stale weights, or keys and values of old weights, are the classic bug."""
    sampling = Sampling(32)
    first, off = draw(engine, toy, sampling)
    assert off < 1e-4
    again, _ = draw(engine, toy, sampling)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert torch.equal(first.engine_logprob, again.engine_logprob)
    shaken(toy)
    _, stale = measured(engine, toy, sampling)
    assert stale > 0.1  # the engine has not been told yet
    changed, off = draw(engine, toy, sampling)
    assert off < 1e-4
    assert not torch.equal(first.completion_ids, changed.completion_ids)


def test_cached_prompts_of_old_weights_are_forgotten(engine, toy):
    """A prompt of more than one block of the cache, 128 tokens: shorter ones are never kept."""
    prompt = [[1, *(4 + i % 10 for i in range(150)), 3]]
    for seed in range(2):
        samples, off = draw(engine, toy, Sampling(16), SEEDS[:4], prompt)
        assert off < 1e-4
        cached = engine.sample(prompt, 4, SEEDS[:4], Sampling(16))
        assert torch.equal(cached.completion_ids, samples.completion_ids)
        shaken(toy, seed=seed)


@pytest.mark.parametrize("name", [None, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
                                  "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight",
                                  "model.layers.1.input_layernorm.weight"])  # fmt: skip
def test_each_weight_arrives(engine, toy, name):
    draw(engine, toy, Sampling(8))
    with torch.no_grad():
        for own, weight in toy.named_parameters():
            if name in (None, own):
                weight *= 1.2
    _, stale = measured(engine, toy, Sampling(8))
    assert stale > 1e-3
    assert draw(engine, toy, Sampling(8))[1] < 1e-4


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_act_and_stay_apart(engine, toy, more):
    base, _ = draw(engine, toy, Sampling(32))
    policy = add_lora(toy, {**LORA, **more})
    fresh, off = draw(engine, policy, Sampling(32))
    assert off < 1e-4 and torch.equal(base.completion_ids, fresh.completion_ids)
    shaken(policy, 0.2)
    before = {n: w.clone() for n, w in policy.state_dict().items()}
    tuned, off = draw(engine, policy, Sampling(32))
    assert off < 1e-4 and not torch.equal(base.completion_ids, tuned.completion_ids)
    assert all(torch.equal(w, before[n]) for n, w in policy.state_dict().items())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma3", "mistral"])
def test_every_architecture(architecture):
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    prompts = [list(range(5, 50)), [7, 8, 9]]
    _, off = draw(VLLMSampler(), make_model(architecture, **sizes), Sampling(12), torch.arange(8), prompts)
    assert off < 1e-3


def test_tied_embeddings_that_an_adapter_parts():
    policy = make_model("qwen2", hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
                        tie_word_embeddings=True)  # fmt: skip
    policy = add_lora(policy, {**LORA, "target_modules": ["lm_head", "q_proj"]})
    shaken(policy, 0.2)
    assert draw(VLLMSampler(), policy, Sampling(12))[1] < 1e-3


# -- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_those_at_the_temperature(engine, toy, temperature):
    samples, off = draw(engine, toy, Sampling(32, temperature))
    assert off < 1e-4
    if temperature != 1:
        with torch.no_grad():
            plain = with_scores(Rollout(samples, 4, 1.0, SEEDS), toy, Sampling(32)).samples
        assert (plain.logprob - samples.engine_logprob)[samples.completion_mask].abs().max() > 0.05


def test_a_completion_depends_on_its_own_seed_alone(engine, toy):
    samples, _ = draw(engine, toy, Sampling(32))
    alone = engine.sample(PROMPTS[1:2], 1, SEEDS[6:7], Sampling(32))
    n = int(alone.lengths[0])
    assert n == int(samples.lengths[6]) and torch.equal(alone.completion_ids[0], samples.completion_ids[6, :n])
    other, _ = measured(engine, toy, Sampling(32), SEEDS + 1)
    assert not torch.equal(samples.completion_ids, other.completion_ids)


def test_the_distribution_is_the_policys(engine, toy):
    """First tokens of many completions against the policy's probabilities, as many as the native sampler's."""
    count, distribution = 4000, Sampling(1)
    engine.update(toy, [END], PAD)
    drawn = engine.sample(PROMPTS[:1], count, torch.arange(count), distribution).completion_ids[:, 0]
    with torch.no_grad():
        p = toy(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1)
    share = torch.bincount(drawn, minlength=len(p)).double() / count
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / count).sqrt() + 1e-3).all()


def test_greedy_and_filters(engine, toy):
    native = NativeSampler()
    native.update(toy, [END], PAD)
    engine.update(toy, [END], PAD)
    for distribution in (Sampling(32, 0.0), Sampling(32, 1.0, top_k=1), Sampling(32, 1.0, top_p=1e-6)):
        mine, theirs = (x.sample(PROMPTS, 1, torch.arange(3), distribution) for x in (engine, native))
        assert torch.equal(mine.completion_ids, theirs.completion_ids)
        assert torch.equal(mine.ended, theirs.ended) and torch.equal(mine.prompt_ids, theirs.prompt_ids)
        assert torch.equal(mine.completion_mask, theirs.completion_mask)
        assert mine.engine_logprob is None  # nothing comparable
    few = engine.sample(PROMPTS, 40, torch.arange(120), Sampling(1, 2.0, min_p=0.5)).completion_ids[:, 0]
    all_ = engine.sample(PROMPTS, 40, torch.arange(120), Sampling(1, 2.0)).completion_ids[:, 0]
    assert few.unique().numel() < all_.unique().numel()
    with pytest.raises(UserError, match="above what vLLM takes"):  # said before weights are loaded
        engine.check(PROMPTS, Sampling(1, 2.5), torch.device("cpu"))


def test_ends(engine, toy):
    """End tokens close a completion and stay in it, whichever they are; others are cut off."""
    engine.update(toy, [END, 17], PAD)
    samples = engine.sample(PROMPTS, 4, SEEDS, Sampling(3))
    for row, n, ended in zip(samples.completion_ids.tolist(), samples.lengths.tolist(), samples.ended, strict=True):
        assert not {END, 17} & set(row[: n - 1])
        assert bool(ended) == (row[n - 1] in (END, 17))
        assert ended or n == 3
    assert samples.ended.any() and not samples.ended.all()


# -- the process --------------------------------------------------------------------------------------------


def test_the_process_is_left_as_it_was(engine, toy):
    import random

    import numpy as np

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    want = torch.rand(3), random.random(), np.random.rand()
    threads = torch.set_num_threads
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    VLLMSampler(max_model_len=128).update(toy, [END], PAD)  # starts an engine
    draw(engine, toy, Sampling(8))
    assert torch.equal(torch.rand(3), want[0]) and (random.random(), np.random.rand()) == want[1:]
    assert torch.set_num_threads is threads


def test_one_engine_serves_rollouts_and_evaluations(engine, toy):
    other = VLLMSampler()
    for sampler in (engine, other):
        sampler.update(toy, [END], PAD)
    assert other._llm is engine._llm


def test_autocast_sets_the_engines_dtype_and_stays_out_of_it(toy):
    half = VLLMSampler()
    with torch.autocast("cpu", torch.bfloat16):
        _, off = draw(half, toy, Sampling(32))
        assert half._llm.llm_engine.model_config.dtype == torch.bfloat16
        assert 1e-4 < off < 0.5
        exact = VLLMSampler(engine={"dtype": "float32"})
        exact.update(toy, [END], PAD)
        drawn = exact.sample(PROMPTS, 4, SEEDS, Sampling(32))
    with torch.no_grad():
        own = with_scores(Rollout(drawn, 4, 1.0, SEEDS), toy, Sampling(32)).samples
    assert (own.logprob - drawn.engine_logprob)[drawn.completion_mask].abs().max() < 1e-4


def test_prompts_without_room_and_diverged_weights_are_said(engine, toy):
    engine.update(toy, [END], PAD)
    with pytest.raises(UserError, match="no room"):
        engine.sample([[1] * 250], 1, SEEDS[:1], Sampling(32))
    with torch.no_grad():
        toy.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="training has diverged"):
        draw(engine, toy, Sampling(4))


def test_heads_that_no_kernel_knows_are_refused():
    with pytest.raises(UserError, match="attention heads of this size"):
        VLLMSampler().update(make_model("qwen3"), [0], 0)


def test_heads_that_no_kernel_takes_are_refused():
    with pytest.raises(UserError, match="attention heads of this size"):
        VLLMSampler().update(make_model("llama", head_dim=8), [END], PAD)


def test_an_engine_that_can_not_start_says_why(toy):
    with pytest.raises(UserError, match="can't start an engine"):
        VLLMSampler(max_model_len=100_000).update(toy, [END], PAD)


# -- training -----------------------------------------------------------------------------------------------


def fit(folder, toy, *args):
    done = subprocess.run(
        [sys.executable, "-m", "rlif_lightning", "fit", "--config", "quickstart", f"--model.name={toy}",
         "--rollout.sampler=rlif_lightning.sampling.VLLMSampler", "--trainer.enable_progress_bar=false", *args],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(folder / "runs/quickstart/1/metrics.csv")


def test_the_quickstart_rises_as_it_does_without(tmp_path, wide_toy):
    evaluation = "--evaluation.sampler=rlif_lightning.sampling.VLLMSampler"
    metrics = fit(tmp_path, wide_toy, "--trainer.max_steps=30", evaluation)
    curve = metrics["val/accuracy_sampled"]
    assert max(curve.values()) - curve[0] >= 0.30  # as in tests/test_quickstart.py
    assert max(metrics["rollout/engine_kl"].values()) < 1e-6
    assert max(metrics["rollout/engine_ratio_max"].values()) < 1.001
    assert metrics["train/kl"][0] == 0.0 and metrics["train/ratio_mean"][0] == 1.0
    assert set(metrics["rollout/importance_capped"].values()) == {0.0}


def test_a_reward_of_the_users_own(tmp_path, wide_toy):
    """From the scoring pass: as the native sampler gives it, for the same completions."""
    reward = load(tmp_path, "Gini")()
    policy, sampling = load_model(str(wide_toy)).eval(), Sampling(32, statistics=statistics_of([reward]))
    samples, _ = draw(VLLMSampler(), policy, sampling)
    with torch.no_grad():
        rollout = with_scores(Rollout(samples, 4, 1.0, SEEDS), policy, sampling)
        p = completion_logits(policy, samples).double().softmax(-1).sort(-1).values
    v = p.shape[-1]
    tokens = (2 * (p * torch.arange(1, v + 1)).sum(-1) - v - 1) / v
    mask = samples.completion_mask
    want = tokens.where(mask, 0).sum(1) / mask.sum(1)
    torch.testing.assert_close(reward(rollout).double(), want, atol=1e-5, rtol=1e-5)
    fit(tmp_path, wide_toy, "--rollout.rewards", "my_rewards.Gini", "--trainer.max_steps=2", "--evaluation.n=16")
    rows = (tmp_path / "runs/quickstart/1/completions.jsonl").read_text().splitlines()
    assert all(0.5 < json.loads(row)["rewards"]["gini"] < 1 for row in rows)


def test_two_processes_have_an_engine_each(tmp_path, wide_toy):
    metrics = fit(
        tmp_path,
        wide_toy,
        "--trainer.max_steps=2",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--evaluation.n=16",
    )
    assert max(metrics["rollout/engine_kl"].values()) < 1e-6
    rows = [json.loads(x) for x in (tmp_path / "runs/quickstart/1/completions.jsonl").read_text().splitlines()]
    assert len({r["prompt"] for r in rows}) > 1


# -- stop strings -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_completions_end_with_the_token_that_completes_a_string(wide_toy, monkeypatch):
    """The same draws as without strings, cut by the native sampler's rule; a later batch has none again."""
    policy = Policy.load(PolicySettings(str(wide_toy), stop=["=1", "#", "5;5"]))
    sampler, sampling = VLLMSampler(), Sampling(32)
    sampler.update(policy.model, policy.end_ids, policy.pad_id)
    whole = sampler.sample(PROMPTS, 4, SEEDS, sampling)
    sampler.update(policy.model, policy.end_ids, policy.pad_id, policy.stop)
    drawn, generate = [], sampler._generate
    monkeypatch.setattr(sampler, "_generate", lambda *asked: drawn.append(generate(*asked)) or drawn[-1])
    stopped = sampler.sample(PROMPTS, 4, SEEDS, sampling)
    assert [len(x.outputs[0].token_ids) for x in drawn[0]] == stopped.lengths.tolist()  # vLLM itself draws no more
    places = set()
    for i in range(12):
        ids = whole.completion_ids[i, : int(whole.lengths[i])].tolist()
        found, _ = policy.stop.find(ids)
        n = found or len(ids)
        assert stopped.completion_ids[i, : int(stopped.lengths[i])].tolist() == ids[:n]
        assert stopped.ended[i] == (found is not None or ids[-1] in policy.end_ids)
        torch.testing.assert_close(stopped.engine_logprob[i, :n], whole.engine_logprob[i, :n], atol=1e-4, rtol=0)
        assert not stopped.engine_logprob[i, n:].any()
        places.add(found)
    assert len(places) > 3
    sampler.update(policy.model, policy.end_ids, policy.pad_id)
    assert torch.equal(sampler.sample(PROMPTS, 4, SEEDS, sampling).completion_ids, whole.completion_ids)
