"""Rollouts by another engine than the policy itself: scored by the policy, measured against it, weighed."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlif_lightning.callbacks import RolloutCallback
from rlif_lightning.errors import UserError
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.models.stop_strings import StopStrings
from rlif_lightning.rewards import ProbabilityMargin
from rlif_lightning.rollout import Rollout, Samples
from rlif_lightning.sampling import NativeSampler, Sampling, VLLMSampler
from rlif_lightning.sampling.protocol import Progress
from rlif_lightning.sampling.vllm import start as vllm
from rlif_lightning.training.scores import with_importance, with_scores
from tests.conftest import make_model
from tests.processes import used_by
from tests.short_runs import fit


class Engine(NativeSampler):
    """Gives tokens and log-probabilities as vLLM does, off by some noise."""

    noise, released, updated = 0.0, 0, 0

    def update(
        self, policy: torch.nn.Module, end_ids: Sequence[int], pad_id: int, stop: StopStrings | None = None
    ) -> None:
        super().update(policy, end_ids, pad_id, stop)
        self.updated += 1

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seeds: torch.Tensor,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> Samples:
        samples = super().sample(prompts, group_size, seeds, sampling, progress)
        noise = self.noise * torch.randn(samples.logprob.shape, generator=torch.Generator().manual_seed(0))
        return replace(samples, engine_logprob=samples.logprob + noise, logprob=None, stats=None)

    def release(self) -> None:
        self.released += 1


def drawn(noise=0.3, tau=0.7, wanted=None):
    """A rollout by an engine, and what the native sampler says of the same completions."""
    statistics = ProbabilityMargin().statistics
    model, sampling = make_model(), Sampling(12, tau, statistics_temperature=wanted, statistics=statistics)
    native, engine = NativeSampler(), Engine()
    engine.noise = noise
    samples = []
    for sampler in (native, engine):
        sampler.update(model, range(0, 320, 15), 0)
        samples.append(sampler.sample([[5, 6, 7], [8, 9, 10, 11, 12]], 4, torch.arange(8), sampling))
    return model, sampling, Rollout(samples[1], 4, tau, torch.arange(8)), samples[0]


@pytest.mark.parametrize("wanted", [None, 1.3])
@pytest.mark.parametrize("slices", [None, [torch.tensor([7, 0, 3]), torch.tensor([1, 2, 4, 5, 6])]])
def test_one_scoring_pass_gives_what_the_engine_does_not(wanted, slices):
    model, sampling, rollout, native = drawn(wanted=wanted)
    with torch.no_grad():
        scored = with_scores(rollout, model, sampling, slices).samples
    torch.testing.assert_close(scored.logprob, native.logprob, atol=1e-5, rtol=1e-4)
    assert scored.stats.own.keys() == native.stats.own.keys() == sampling.statistics.keys()
    for mine, theirs in zip(scored.stats.tensors, native.stats.tensors, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert torch.equal(scored.engine_logprob, rollout.samples.engine_logprob)
    whole = Rollout(native, 4, 0.7, torch.arange(8))
    assert with_scores(whole, model, sampling) is whole


def test_the_weight_is_the_ratio_up_to_the_cap():
    model, sampling, rollout, native = drawn(noise=0.5)
    with torch.no_grad():
        rollout = with_scores(rollout, model, sampling)
    weights = with_importance(rollout, 1.3).importance
    for i in range(8):
        for t in range(weights.shape[1]):
            inside = t < native.lengths[i]
            ratio = float((rollout.samples.logprob[i, t] - rollout.samples.engine_logprob[i, t]).double().exp())
            assert float(weights[i, t]) == pytest.approx(min(ratio, 1.3) if inside else 1.0, rel=1e-5)
    assert (weights == 1.3).any() and (weights < 1).any()
    part = with_importance(rollout, 1.3).slice(torch.tensor([4, 1]))
    assert torch.equal(part.importance, weights[[4, 1], : part.importance.shape[1]])
    assert with_importance(rollout, None).importance is None
    assert with_importance(Rollout(native, 4, 0.7, torch.arange(8)), 2.0).importance is None


def run(model_folder, problems_file, sampler, **rollout):
    sizes = {"micro_batch_size": 4, "sampler": sampler, "max_new_tokens": 16, **rollout}
    return fit(model_folder(), problems_file, model={"kl_coefficient": 0.05}, rollout=sizes, steps=4)


def test_training_with_an_engine_that_is_exact_is_training_without_one(model_folder, problems_file):
    native = run(model_folder, problems_file, NativeSampler(), passes=2)
    engine = Engine()
    other = run(model_folder, problems_file, engine, passes=2)
    for name, weight in native.weights().items():
        torch.testing.assert_close(other.weights()[name], weight, atol=1e-5, rtol=1e-4)
    assert "rollout/engine_kl" not in native.trainer.logger.steps[0]
    assert max(other.column("rollout/engine_kl")) < 1e-9
    assert other.column("rollout/engine_ratio_max") == pytest.approx([1.0, 1.0], abs=1e-4)
    # CompletionScores on the slices that the update uses: the first ratio is 1 to the last bit, as it is on policy.
    assert other.column("train/ratio_mean")[0] == 1.0 and other.column("train/ratio_mean")[1] != 1.0
    assert engine.released == 2


def test_the_mismatch_is_logged_and_corrected(model_folder, problems_file):
    ends = {}
    for cap in (1.05, None):
        engine = Engine()
        engine.noise = 0.1
        done = run(model_folder, problems_file, engine, importance_cap=cap)
        ends[cap] = torch.cat([x.flatten() for x in done.weights().values()])
        samples = done.rollouts[0].samples
        mask = samples.completion_mask
        d = (samples.logprob - samples.engine_logprob)[mask].double()
        first = done.trainer.logger.steps[0]
        assert first["rollout/engine_kl"] == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-4)
        assert first["rollout/engine_ratio_max"] == pytest.approx(float(d.exp().max()), rel=1e-4)
        if cap:
            share = float((d.exp() > cap).double().mean())
            assert 0.1 < share < 0.6 and first["rollout/importance_capped"] == pytest.approx(share)
        else:
            assert "rollout/importance_capped" not in first and done.rollouts[0].importance is None
    assert (ends[1.05] - ends[None]).abs().max() > 1e-5


def test_an_engine_that_is_another_model_is_refused(model_folder, problems_file):
    engine = Engine()
    engine.noise = 1.0
    with pytest.raises(UserError, match="computes something else than the policy"):
        run(model_folder, problems_file, engine)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_weights_go_over_once_in_an_evaluation(rlif, small_fit, problems_file, monkeypatch, command):
    engines = []
    monkeypatch.setattr(Engine, "__init__", lambda self: (NativeSampler.__init__(self), engines.append(self))[0])
    data = "val" if command in ("fit", "validate") else command
    rlif(command, *used_by(command, small_fit), f"--data.{data}.path={problems_file}", "--evaluation.batch_size=8",
         "--evaluation.sampler=tests.sampling.test_engine.Engine")  # fmt: skip
    counts = [(e.updated, e.released) for e in engines if e.updated]
    assert counts == ([(2, 2)] if command == "fit" else [(1, 1)])  # of 40 problems: before and after, or once


@pytest.mark.parametrize("command", ["diagnose", "mix"])
def test_commands_score_no_more_rows_at_a_time_than_an_update(rlif, small_fit, model_folder, monkeypatch, command):
    rows = []

    class Counted(CompletionScores):
        def __init__(self, model, samples, **settings):
            rows.append(len(samples.completion_ids))
            super().__init__(model, samples, **settings)

    monkeypatch.setattr("rlif_lightning.training.scores.CompletionScores", Counted)
    more = {"diagnose": ["--gradients=false"], "mix": ["--tuned", model_folder(seed=1), "--ratios", 0]}[command]
    settings = ["--rollout.sampler=tests.sampling.test_engine.Engine", "--prompts=5", "--output=out", *more]
    rlif(command, *small_fit, *settings, "--rollout.micro_batch_size=2")
    assert rows == [2] * 10
    rows.clear()
    rlif(command, *small_fit, *settings[:2], "--output=whole", *more)
    assert rows == [8, 8, 4]


@pytest.mark.parametrize(("sampler", "told"), [(NativeSampler, "kept_mass logs"), (VLLMSampler, "neither measured")])
def test_a_filters_warning_names_what_is_logged(sampler, told):
    callback = RolloutCallback(prompts_per_step=2, group_size=4, top_k=5, sampler=sampler())
    with pytest.warns(UserWarning, match=told):
        callback.on_train_start(None, SimpleNamespace(total_steps=lambda: 2))


# -- VLLMSampler where vLLM is not --------------------------------------------------------------------------


def test_importing_the_sampler_does_not_import_vllm():
    code = "import sys, rlif_lightning.sampling, rlif_lightning.callbacks; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"engine": {"logprobs_mode": "raw_logprobs"}}, "logprobs_mode"),
        ({"engine": {"tensor_parallel_size": 2}}, "tensor_parallel_size"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        VLLMSampler(**settings)


class Recorded:
    """In vLLM's place: what it is asked, in order."""

    def __init__(self):
        self.calls, self.llm_engine, self.sleeping = [], self, False
        self.weights = {}

    def is_sleeping(self):
        return self.sleeping

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.sleeping = True

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")
        self.sleeping = tags != ["kv_cache"]

    def collective_rpc(self, name, kwargs):
        self.calls.append(name)
        self.weights = dict(kwargs["weights_iterator"])

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")


@pytest.mark.parametrize("sleeps", [True, False])
def test_order_of_an_update_and_of_a_release(monkeypatch, sleeps):
    """Sleeping has never run on a GPU here: this is what it would be told."""
    engine = Recorded()
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine.check_head_size", lambda config: None)
    monkeypatch.setattr(
        "rlif_lightning.sampling.vllm.engine.start_engine", lambda config, settings, device, tokenizer: engine
    )
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine._ENGINES", {})
    monkeypatch.setattr(VLLMSampler, "_sleeps", sleeps)
    sampler, model = VLLMSampler(), make_model()
    sampler.release()
    for _ in range(2):
        sampler.update(model, [0], 0)
        sampler.release()
        sampler.release()
    load = ["reload_weights", "reset_prefix_cache"]
    woken = ["wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache"]
    assert engine.calls == ([*load, "sleep 2", *woken, "sleep 2"] if sleeps else load * 2)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert engine.weights.keys() == own.keys() and all(torch.equal(x, own[n]) for n, x in engine.weights.items())


def test_sharding_is_refused_before_weights_are_loaded(monkeypatch):
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine.is_installed", lambda: True)
    with pytest.raises(UserError, match="cuts it into shards"):
        VLLMSampler().check([], Sampling(8), None)
    NativeSampler().check([], Sampling(8), None)


@pytest.mark.parametrize(("device", "processes", "right"), [
    ("cuda:0", 1, True), ("cuda:1", 1, False), ("cuda:1", 2, True), ("cpu", 1, True),
])  # fmt: skip
def test_one_process_has_the_gpu_that_vllm_takes(monkeypatch, device, processes, right):
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine.is_installed", lambda: True)
    if right:
        VLLMSampler().check([], Sampling(8), torch.device(device), processes)
    else:
        with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
            VLLMSampler().check([], Sampling(8), torch.device(device), processes)


@pytest.mark.parametrize("launched", [{}, {"LOCAL_RANK": "0"}], ids=["slurm", "lightning"])
def test_each_process_has_its_own_gpu(monkeypatch, launched):
    """Process 9 on the second GPU of its node; what Lightning reads itself stays."""
    seen = {}

    def start(*args, **kwargs):
        seen.update(os.environ)

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 9)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    for name, value in vllm.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = {"distributed_executor_backend": "external_launcher"}
    vllm.start_engine(make_model().config, settings, torch.device("cuda:1"))
    assert (seen["RANK"], seen["LOCAL_RANK"]) == ("9", "1")
    assert {n: os.environ[n] for n in ("RANK", "LOCAL_RANK") if n in os.environ} == launched
