"""Loading, adapters, dropout and gradient checkpointing of the policy."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlif_lightning.errors import UserError
from rlif_lightning.functional.token_stats import token_stats
from rlif_lightning.models import scoring
from rlif_lightning.models.identity import fingerprint
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.lora import adapter_off, add_lora, check_lora
from rlif_lightning.models.policy import Policy, set_training_mode
from rlif_lightning.models.references import frozen_copy
from rlif_lightning.models.tokenizer import load_tokenizer
from rlif_lightning.sampling import NativeSampler, Sampling
from tests.conftest import ARCHITECTURES, completion_logits, load_model, make_model, make_tokenizer
from tests.short_runs import adamw, fit, many_ends

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}") for text in ("treespec, LeafSpec", "in eval mode", "is zero")
]
# Non-zero B: with B = 0 neither the adapter nor its dropout would show.
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
IDS = torch.randint(1, 320, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def samples_of(model, seed=0):
    sampler = NativeSampler()
    sampler.update(model, [0], 0)
    return sampler.sample(IDS.tolist(), 2, torch.arange(4) + seed, Sampling(6))


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return many_ends(model_folder(), tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture(scope="module")
def dropout_folder(folder, tmp_path_factory):
    """The same model with dropout in its attention."""
    target = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    return target


# -- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_float32_and_all_that_trains(folder, dtype):
    policy = load_model(str(folder), dtype=dtype, lora=LORA)
    trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 3 * 2 and all("lora_" in n for n in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {dtype}
    assert not policy.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_off_is_bit_by_bit_the_base(folder, dtype):
    policy = load_model(str(folder), dtype=dtype, lora={**LORA, "lora_dropout": 0.5})
    base = logits(load_model(str(folder), dtype=dtype))
    on = logits(policy)
    assert (on - base).abs().max() > 1e-2
    with adapter_off(policy) as reference:
        assert torch.equal(logits(reference), base)
    assert torch.equal(logits(policy), on)
    trainable = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert len(trainable) == 12  # switching it off and on leaves it trainable


def test_a_fresh_adapter_starts_at_the_base(folder):
    fresh = {k: v for k, v in LORA.items() if k != "init_lora_weights"}
    policy = load_model(str(folder), lora=fresh)
    assert torch.equal(logits(policy), logits(load_model(str(folder))))


def test_rollouts_change_when_only_the_adapter_changes(folder):
    """Also the other way round: they are sampled through the adapter, and without it from the base."""
    policy = load_model(str(folder), lora=LORA)
    one = samples_of(policy)
    with adapter_off(policy) as reference:
        base = samples_of(reference)
    plain = samples_of(load_model(str(folder)))
    assert torch.equal(base.completion_ids, plain.completion_ids)
    torch.testing.assert_close(base.logprob, plain.logprob, atol=1e-5, rtol=0)
    assert not torch.equal(one.logprob[:, 0], base.logprob[:, 0])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    other = samples_of(policy)
    assert (other.logprob[:, 0] - one.logprob[:, 0]).abs().max() > 1e-3
    assert not torch.equal(other.completion_ids, one.completion_ids)


def test_rollouts_of_a_run_come_from_the_trained_adapter(folder, problems_file):
    """Same prompts and seeds, another learning rate: the first rollout is the same, the second is not."""
    runs = [fit(folder, problems_file, {"lora": LORA}, optimizer=adamw(lr, weight_decay=0.0)) for lr in (0.0, 0.05)]
    (a0, a1), (b0, b1) = ([r.samples for r in run.rollouts] for run in runs)
    assert torch.equal(a0.completion_ids, b0.completion_ids) and torch.equal(a0.logprob, b0.logprob)
    assert (a1.logprob[:, 0] - b1.logprob[:, 0]).abs().max() > 1e-3
    with torch.no_grad():  # and they are those of the weights that the step left
        for run, second in zip(runs, (a1, b1), strict=True):
            assert torch.equal(run.rollouts[1].seeds, runs[0].rollouts[1].seeds)
            moved = max(
                float((w - dict(run.start.named_parameters())[n]).abs().max()) for n, w in run.weights().items()
            )
            assert (moved > 0) == (run is runs[1])
            if run is runs[0]:
                stats = token_stats(completion_logits(run.module.policy.model.eval(), second), second.completion_ids)
                mask = second.completion_mask
                torch.testing.assert_close(stats.logprob[mask], second.logprob[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 4, "target_modules": ["q_prj"]}, ["does not fit the model", "q_prj"]),
        ({"r": 0, "target_modules": ["q_proj"]}, ["rank is out of range", "got: 0"]),
        ({"ranks": 4}, ["no setting 'ranks'", "peft.LoraConfig"]),
        ({"r": 4, "lora_alfa": 8}, ["no setting 'lora_alfa'", "did you mean lora_alpha?"]),
    ],
)
def test_lora_settings_that_cannot_work_are_refused(lora, words):
    with pytest.raises(UserError) as error:
        add_lora(make_model(), lora)
    assert all(w in str(error.value) for w in words)


def test_a_task_type_in_the_settings_is_no_clash():
    """It is a field of LoraConfig, and passing it twice raised a TypeError."""
    check_lora({"task_type": "CAUSAL_LM"})
    assert add_lora(make_model(), {**LORA, "task_type": "CAUSAL_LM"}) is not None


# -- loading ---------------------------------------------------------------------------------------------------


def broken(kind, folder, tmp_path):
    target = tmp_path / kind
    shutil.copytree(folder, target)
    if kind == "no-weights":
        (target / "model.safetensors").unlink()
    if kind == "pickled":
        (target / "model.safetensors").rename(target / "pytorch_model.bin")
    if kind == "no-config":
        (target / "config.json").unlink()
    if kind == "no-tokenizer":
        for path in target.glob("token*"):
            path.unlink()
    if kind == "half-a-tokenizer":
        (target / "tokenizer.json").unlink()
    if kind == "other-tokenizer":
        path = target / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 151645]}))
    if kind == "cut-off":
        path = target / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return target


BROKEN = {
    "no-weights": ["holds no weights in safetensors format", "copy the weights"],
    "pickled": ["holds no weights in safetensors format", "pytorch_model.bin", "convert the .bin files"],
    "no-config": ["holds no config.json", "save_pretrained()"],
    "no-tokenizer": ["tokenizer", "tokenizer.json"],
    "half-a-tokenizer": ["The tokenizer has no vocabulary", "tokenizer.json"],
    "other-tokenizer": ["The tokenizer does not belong to the model", "151645", "below 320"],
    "cut-off": ["could not be loaded", "cut-off"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_folder_is_one_short_error(kind, model_folder, tmp_path, rlif, small_fit, capsys):
    target = broken(kind, model_folder(), tmp_path)
    small_fit[small_fit.index("--model.name") + 1] = str(target)
    with pytest.raises(SystemExit) as exit_:
        rlif("fit", *small_fit)
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    message = text[text.index("error: ") :]
    assert "Traceback" not in text and len(message.splitlines()) <= 5
    assert all(w in message for w in BROKEN[kind]), message


def test_a_missing_folder_and_a_hub_name_offline(tmp_path, rlif, small_fit, capsys):
    for name, words in (
        (str(tmp_path / "nowhere"), "The model folder does not exist"),
        ("someone/some-model", "Hugging Face hub"),
    ):
        small_fit[small_fit.index("--model.name") + 1] = name
        with pytest.raises(SystemExit):
            rlif("fit", *small_fit)
        text = capsys.readouterr().err
        assert words in text and name in text and "Traceback" not in text


@pytest.mark.parametrize("setting", ["{ranks: 4}", "{r: 4, target_modules: [q_prj]}"])
def test_wrong_lora_settings_show_no_traceback(setting, rlif, small_fit, capsys):
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, f"--model.lora={setting}")
    text = capsys.readouterr().err
    assert "LoRA" in text or "model.lora" in text
    assert "Traceback" not in text and "error: " in text


def test_a_tokenizer_without_padding_pads_with_its_end(model_folder, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(model_folder(), target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    tokenizer = load_tokenizer(str(target))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_a_tokenizer_without_an_end_is_refused(model_folder, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(UserError, match=r"(?s)no end-of-sequence token.*eos_token"):
        load_tokenizer(str(model_folder()))


def test_a_frozen_copy_is_its_own(folder):
    policy = load_model(str(folder))
    copy_ = frozen_copy(policy, torch.bfloat16)
    assert not any(p.requires_grad for p in copy_.parameters()) and not copy_.training
    for name, weight in copy_.named_parameters():
        assert weight.dtype == (torch.bfloat16 if "proj" in name or "lm_head" in name else torch.float32), name
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(copy_)
        assert torch.equal(logits(policy), before)
        with torch.no_grad():
            for p in policy.parameters():
                p.zero_()
        assert torch.equal(logits(copy_), before)
    assert all(p.requires_grad for p in policy.parameters())


# -- fingerprint -----------------------------------------------------------------------------------------------


def test_a_fingerprint_knows_the_model_not_how_it_was_loaded(folder, model_folder):
    name = str(folder)
    marks = {
        fingerprint(load_model(name, dtype=dtype, lora=lora))
        for dtype in (torch.float32, torch.bfloat16)
        for lora in (
            None,
            LORA,
            {"r": 2, "target_modules": "all-linear", "use_dora": True},
            {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
        )
    }
    assert len(marks) == 1
    assert marks == {fingerprint(frozen_copy(load_model(name), torch.bfloat16))}
    other = load_model(str(model_folder("qwen2", seed=1)))
    assert fingerprint(other) not in marks


def test_a_fingerprint_tells_models_apart():
    models = [make_model(a) for a in ARCHITECTURES if a != "mistral"]  # random weights of llama and it are the same
    models += [make_model("qwen2", seed=5), make_model("qwen2", num_hidden_layers=3), make_model("qwen2", 321)]
    assert len({fingerprint(m) for m in models}) == len(models)


# -- training mode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [None, {**LORA, "lora_dropout": 0.5}], ids=["full", "lora"])
def test_training_without_dropout_computes_what_sampling_computes(architecture, lora):
    model = make_model(architecture, attention_dropout=0.5)
    model = model if lora is None else add_lora(model, lora)
    set_training_mode(model, training=False)
    assert not any(m.training for m in model.modules())
    still = logits(model)
    set_training_mode(model, training=True)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 2 and all(x.training for x in layers)
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert not any(m.training for m in dropouts) and len(dropouts) == (6 if lora else 0)
    assert torch.equal(logits(model), still)
    model.train()
    assert (logits(model) - still).abs().max() > 1e-3  # so that the line above can fail
    set_training_mode(model, training=False)
    assert not any(m.training for m in model.modules())
    assert torch.equal(logits(model), still)


class Recomputations:
    """Counts forwards with gradient of each decoder layer's MLP inside a fit: forward, and again in backward."""

    def __init__(self, monkeypatch):
        from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

        self.calls, plain = 0, Qwen2MLP.forward

        def forward(mlp, x):
            self.calls += torch.is_grad_enabled()
            return plain(mlp, x)

        monkeypatch.setattr(Qwen2MLP, "forward", forward)


@pytest.mark.parametrize("lora", [None, {**LORA, "lora_dropout": 0.5}], ids=["full", "lora"])
def test_gradient_checkpointing_recomputes_every_layer(folder, problems_file, monkeypatch, lora):
    """Lightning keeps the eval mode of from_pretrained, in which checkpointing is silently inactive."""
    # Prompts and completions together, with checkpointing or not: one call of each layer.
    monkeypatch.setattr(scoring, "_distinct", lambda ids, mask: (ids, None))
    counted = Recomputations(monkeypatch)
    calls, runs = [], []
    for checkpointing in (False, True):
        counted.calls = 0
        runs.append(
            fit(
                folder,
                problems_file,
                {"gradient_checkpointing": checkpointing, "lora": lora, "kl_coefficient": 0.1},
                rollout={"micro_batch_size": 4, "passes": 2},
                optimizer=adamw(1e-2),
            )
        )
        calls.append(counted.calls)
    slices, layers = 4, 2
    assert calls == [slices * layers, 2 * slices * layers]
    for name, weight in runs[0].weights().items():  # a recomputation changes no number
        torch.testing.assert_close(runs[1].weights()[name], weight, atol=1e-6, rtol=1e-5)


# -- dropout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {**LORA, "lora_dropout": 0.5}], ids=["full", "lora"])
def test_dropout_is_off_in_sampling_scoring_and_update(dropout_folder, problems_file, lora):
    """B is not 0: the update's own log-probabilities are those of the sampler, dropout configured or not."""
    run = fit(dropout_folder, problems_file, {"lora": lora, "kl_coefficient": 0.1}, steps=1)
    assert run.start.config.attention_dropout == 0.3
    assert run.column("train/ratio_mean") == [1.0]
    assert (run.column("train/kl")[0] == 0.0) == (lora is None)
    two = fit(
        dropout_folder,
        problems_file,
        {"lora": lora, "kl_coefficient": 0.1},
        rollout={"passes": 2, "steps_per_rollout": 2},
        optimizer=adamw(1e-2),
        steps=4,
    )
    ratios = two.column("train/ratio_mean")
    assert ratios[0] == pytest.approx(1, abs=1e-4) and abs(ratios[2] - 1) > 1e-4
    rollout = two.rollouts[0]
    mask = rollout.samples.completion_mask
    with torch.no_grad():
        set_training_mode(two.start, training=True)
        mine = token_stats(completion_logits(two.start, rollout.samples), rollout.samples.completion_ids, 1.0).logprob
    torch.testing.assert_close(mine[mask], rollout.samples.logprob[mask], atol=1e-4, rtol=0)
    if lora is None:
        reference = rollout.kl_logprob
        torch.testing.assert_close(reference[mask], rollout.samples.logprob[mask], atol=1e-4, rtol=0)


def test_a_fingerprint_sees_every_weight():
    """Tuned variants of a model often share its embedding."""
    one, other = make_model(), make_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.neg_()
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("precision", ["transformer-engine", "float32"])
def test_a_precision_that_only_a_trainer_has_is_refused(precision):
    with pytest.raises(UserError, match=f"needs a Trainer(?s:.*){precision}"):
        Policy.load(PolicySettings("nowhere/at-all"), precision=precision)
