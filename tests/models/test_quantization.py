"""Frozen weights in 4 bits, on a CPU: what is computed, learned, kept and refused."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from transformers import AutoModelForCausalLM

from rlif_lightning.errors import UserError
from rlif_lightning.mixing.weights import Pair, mix
from rlif_lightning.models.identity import fingerprint
from rlif_lightning.models.lora import adapter_off, add_lora
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.models.quantization import check_quantization
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.models.strategies import FSDP2Strategy, shares_out
from rlif_lightning.models.trainable import put_weights, trainable, trainable_weights
from rlif_lightning.sampling.check_decoding import decoding_error
from rlif_lightning.training.slice_loss import slice_loss
from tests.conftest import completion_logits, load_model, make_model, make_tokenizer
from tests.models.test_lora import moved
from tests.processes import used_by
from tests.short_runs import adamw, fit, many_ends
from tests.training.test_resume import assert_same_run, checkpoint
from tests.training.test_resume import fit as resumable  # noqa: F401
from tests.training.test_slice_loss import SETTINGS, gradients, reference_loss, rollout_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(treespec, LeafSpec|in eval mode|is zero|gemm_4bit|get_state_buffer)"
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
NF4 = {"lora": LORA, "quantization": "nf4"}
IDS = torch.randint(1, 320, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return many_ends(model_folder(), tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def wide_folder(request, tmp_path_factory):
    """Wide enough for bitsandbytes to pack weights anew on a CPU, which must not happen; gemma3's head is tied."""
    target = tmp_path_factory.mktemp("wide") / request.param
    make_model(request.param, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


def quantised(folder, dtype=torch.float32, lora=LORA, **settings):
    return load_model(str(folder), dtype=dtype, lora=lora, quantization="nf4", **settings)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def packed(policy):
    return {n: p.detach().clone() for n, p in policy.named_parameters() if p.dtype == torch.uint8}


# -- what is computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_but_for_the_head_are_in_4_bits(folder, dtype):
    policy = quantised(folder, dtype)
    layers = [m for m in policy.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7 == len(packed(policy))
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, dtype)
    assert policy.get_output_embeddings().weight.dtype == policy.get_input_embeddings().weight.dtype == dtype
    assert {p.dtype for p in trainable(policy).values()} == {torch.float32}
    assert len(trainable(policy)) == 2 * 7 * 2
    plain = load_model(str(folder))
    difference = (logits(policy).float() - logits(plain)).std() / logits(plain).std()
    assert 0.01 < difference < 1  # random weights forgive no rounding


def test_an_adapter_in_4_bits_computes_what_it_does_on_the_dequantised_model(wide_folder):
    """Forward and gradients against Hugging Face's own dequantised model; decoding against the plain forward."""
    policy = moved(quantised(wide_folder))
    model = quantised(wide_folder, lora=None).dequantize()
    assert not any(isinstance(m, Linear4bit) for m in model.modules())
    exact = add_lora(model.float(), LORA)
    put_weights(exact, trainable_weights(policy))
    before = packed(policy)
    torch.testing.assert_close(logits(policy), logits(exact), atol=1e-4, rtol=0)
    assert decoding_error(policy, [0], 0) < 2e-4
    rollout, old = rollout_of(policy, 320)
    ids, mask = rollout.samples.completion_ids, rollout.samples.completion_mask
    with torch.no_grad():
        expected = (completion_logits(exact, rollout.samples) / 0.8).log_softmax(-1)
        expected = expected.gather(-1, ids[..., None]).squeeze(-1)
        got = CompletionScores(policy, rollout.samples).logprobs(0.8)
        torch.testing.assert_close(got[mask], expected[mask], atol=2e-4, rtol=0)
    want = gradients(exact, reference_loss(exact, rollout, old, 10.0, SETTINGS))
    for checkpointing in (False, True):
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        set_training_mode(policy, training=True)
        found = gradients(policy, slice_loss(policy, rollout, 10.0, old, SETTINGS))
        assert want.keys() == found.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)
            assert gradient.abs().max() > 0
        set_training_mode(policy, training=False)
    assert all(torch.equal(w, before[n]) for n, w in packed(policy).items())  # never packed anew, never trained


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["dora", "saved"])
def test_variants_of_lora(wide_folder, variant):
    policy = moved(quantised(wide_folder, lora={**LORA, **variant}))
    assert decoding_error(policy, [0], 0) < 2e-4
    with adapter_off(policy) as head_weight_only:
        assert torch.equal(logits(head_weight_only), logits(quantised(wide_folder, lora=None)))


def test_a_fingerprint_in_4_bits(folder, model_folder):
    marks = {
        fingerprint(quantised(folder, dtype, lora))
        for dtype in (torch.float32, torch.bfloat16)
        for lora in (None, LORA, {**LORA, "modules_to_save": ["lm_head"]})
    }
    assert len(marks) == 1
    assert fingerprint(load_model(str(folder))) not in marks
    assert fingerprint(quantised(model_folder("qwen2", seed=1))) not in marks


# -- a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_moves_the_adapter_and_nothing_else(folder, problems_file, precision):
    """The reference is the quantised base without the adapter, bit by bit."""
    model = {**NF4, "kl_coefficient": 0.1}
    run = fit(folder, problems_file, model, trainer={"precision": precision}, steps=3, optimizer=adamw(0.05))
    kl = run.column("train/kl")
    assert kl[0] == 0.0 and min(kl[1:]) > 1e-4
    base = quantised(folder, torch.bfloat16 if precision == "bf16-mixed" else torch.float32, lora=None)
    for _, rollout, _ in run.slices:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            assert torch.equal(rollout.kl_logprob, CompletionScores(base, rollout.samples).logprobs(1.0))
    start, end = packed(run.start), packed(run.module.policy.model)
    assert start.keys() == end.keys() and all(torch.equal(w, start[n]) for n, w in end.items())
    moved_ = dict(run.start.named_parameters())
    assert all(not torch.equal(w, moved_[n]) for n, w in run.weights().items() if "lora_B" in n)
    assert (run.rollouts[0].samples.logprob[:, 0] - run.rollouts[-1].samples.logprob[:, 0]).abs().max() > 1e-3


def test_gradient_checkpointing_takes_the_same_steps(folder, problems_file):
    runs = [
        fit(folder, problems_file, {**NF4, "gradient_checkpointing": on}, steps=3, optimizer=adamw(0.02))
        for on in (False, True)
    ]
    for name, weight in runs[0].weights().items():
        torch.testing.assert_close(weight, runs[1].weights()[name], atol=1e-5, rtol=1e-4)


def test_it_starts_from_an_adapter(folder, problems_file, tmp_path):
    torch.manual_seed(1)
    moved(add_lora(AutoModelForCausalLM.from_pretrained(folder), LORA)).save_pretrained(tmp_path / "adapter")
    model = {"adapter": str(tmp_path / "adapter"), "quantization": "nf4", "kl_coefficient": 0.1}
    run = fit(folder, problems_file, model, steps=2, optimizer=adamw(0.05))
    kl = run.column("train/kl")
    assert kl[0] == 0.0 and kl[1] > 1e-4


PAGED = [
    "--model.quantization=nf4", "--model.lora={r: 64, lora_alpha: 8, target_modules: all-linear}",
    "--model.optimizer=bitsandbytes.optim.PagedAdamW8bit", "--model.optimizer.lr=0.003",
    "--model.optimizer.min_8bit_size=1024", "--trainer.max_steps=5",
]  # fmt: skip


def test_killed_and_continued_with_paged_8_bit_adamw(resumable):  # noqa: F811
    whole = resumable("whole", *PAGED)
    part = resumable("part", *PAGED, kill_at=7)
    assert resumable("part", *PAGED, "--ckpt_path=last") == part
    assert_same_run(whole, part)
    stored = checkpoint(part)
    assert len(stored["state_dict"]) == 2 * 7 * 2  # no packed weights, no scales of theirs
    assert all("lora_" in n and w.dtype == torch.float32 for n, w in stored["state_dict"].items())
    states = [s["__bnb_optimizer_quant_state__"] for s in stored["optimizer_states"][0]["state"].values()]
    assert {s["state1"].dtype for s in states} == {torch.uint8}


def test_a_checkpoint_is_evaluated_in_4_bits_only(rlif, small_fit, model_folder, problems_file, capsys):
    held_out = ["--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=4"]
    own = ["--model.quantization=nf4", f"--model.lora={json.dumps(LORA)}", "--guard.warmup=0"]
    runs = rlif("fit", *small_fit, *held_out, *own) / "runs" / "run"
    words, adapts = used_by("validate", [*small_fit, *held_out]), used_by("validate", own)
    capsys.readouterr()
    for file in ("last.ckpt", "guard/weights.safetensors"):
        path = runs / "1" / "checkpoints" / file
        rlif("validate", *words, *adapts, "--ckpt_path", path)
        with pytest.raises(SystemExit):
            rlif("validate", *words, *adapts[1:], "--ckpt_path", path)
        text = capsys.readouterr().err
        assert "model.quantization" in text and "Traceback" not in text
    assert json.loads((runs / "validate" / "1" / "results.json").read_text())["quantization"] == "nf4"
    with pytest.raises(UserError, match="trained on 4-bit weights"):
        mix(Pair(str(model_folder()), str(runs / "1")), 0.5)
    rlif("validate", *words, "--model.quantization=nf4")  # a base alone can be evaluated in 4 bits


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_4_bit_weights_alone_are_not_trained(folder, problems_file, no_weights):
    with pytest.raises(UserError, match=r"(?s)only an adapter.*--model\.lora"):
        fit(folder, problems_file, {"quantization": "nf4"})


def test_a_quantised_file_is_not_trained(folder, problems_file, no_weights, tmp_path):
    target = many_ends(folder, tmp_path / "quantised")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"(?s)quantised weights.*gptq"):
        fit(target, problems_file, {"lora": LORA})


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharding_is_refused(kind):
    sharded = shares_out(object.__new__(kind))  # without what it needs of the machine
    with pytest.raises(UserError, match=r"(?s)cut into shards.*fsdp2"):
        check_quantization(torch.device("cpu"), sharded)
    check_quantization(torch.device("cpu"), shares_out(DDPStrategy()))


def test_sharding_is_refused_before_the_weights_are_read(folder, problems_file, no_weights):
    with pytest.raises(UserError, match="cut into shards"):
        fit(folder, problems_file, NF4, trainer={"strategy": FSDP2Strategy(), "devices": 1})


def test_other_devices_and_no_bitsandbytes_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"(?s)do not work on this device.*xla"):
        check_quantization(torch.device("xla"), False)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda *args: False)
    with pytest.raises(UserError, match="bitsandbytes, which is missing or too old"):
        check_quantization(torch.device("cpu"), False)


def test_another_quantization_is_a_short_error(rlif, small_fit, capsys):
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--model.quantization=nf3")
    text = capsys.readouterr().err
    assert "model.quantization can't be 'nf3'" in text and "nf4" in text
