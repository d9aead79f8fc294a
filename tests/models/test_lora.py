"""LoRA in all its variants, and training that starts from an adapter: what it samples, learns, keeps and refuses."""

import json
import shutil
import warnings

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlif_lightning.cli.recipe_objects import RecipeObjects
from rlif_lightning.errors import UserError
from rlif_lightning.mixing.weights import Pair, mix
from rlif_lightning.models.identity import fingerprint
from rlif_lightning.models.lora import adapter_off, add_adapter, add_lora, find_adapter
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.models.scoring import CompletionScores
from rlif_lightning.models.trainable import trainable
from rlif_lightning.sampling.check_decoding import decoding_error
from tests.conftest import completion_logits, load_model, make_model
from tests.processes import used_by
from tests.short_runs import adamw, fit, many_ends
from tests.training.test_resume import assert_same_run, checkpoint
from tests.training.test_resume import fit as resumable  # noqa: F401
from tests.training.test_slice_loss import assert_same_update, rollout_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|treespec, LeafSpec|in eval mode|is zero)")
ADAPTER = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
VARIANTS = {
    "dora": {"r": 4, "target_modules": "all-linear", "use_dora": True},
    "dora on the head": {"r": 4, "target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "rslora": {**ATTENTION, "use_rslora": True, "lora_alpha": 3},
    "patterns": {**ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "a regular expression": {"r": 4, "target_modules": r".*layers\.1\..*(up|down)_proj"},
    "one layer": {**ATTENTION, "layers_to_transform": [1]},
    "bias": {**ATTENTION, "bias": "all"},
    "bias of B": {**ATTENTION, "lora_bias": True},
    "embeddings": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "o_proj"]},
    "saved head": {**ATTENTION, "modules_to_save": ["lm_head"]},
    "saved embeddings": {**ATTENTION, "modules_to_save": ["embed_tokens"]},
    "saved norms": {**ATTENTION, "modules_to_save": ["norm", "input_layernorm", "q_norm"]},
    "saved layers": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "saved attention": {"r": 4, "target_modules": ["up_proj"], "modules_to_save": ["self_attn"]},
    "tokens": {**ATTENTION, "trainable_token_indices": [5, 9]},
}


def moved(policy, seed=0, by=0.1):
    """The policy after its trainable weights have changed, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(policy).values():
            weight.add_(by * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return many_ends(model_folder(), tmp_path_factory.mktemp("ends") / "model")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A trained adapter of the model, as PEFT writes it."""
    torch.manual_seed(1)
    target = tmp_path_factory.mktemp("adapter") / "trained"
    moved(add_lora(AutoModelForCausalLM.from_pretrained(folder), ADAPTER)).save_pretrained(target)
    return target


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


# -- every variant of LoRA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_sampled_and_scored_as_by_its_own_forward(variant, architecture):
    """Decoded by our own layers (qwen3) and with a tied head (gemma3), against Hugging Face's forward."""
    base = make_model(architecture, attention_bias=True) if variant == "bias" else make_model(architecture)
    mark = fingerprint(base)
    policy = moved(add_lora(base, VARIANTS[variant]))
    assert fingerprint(policy) == mark or variant == "bias"  # whose own biases have moved
    assert decoding_error(policy, [0], 0) < 2e-4
    rollout, _ = rollout_of(policy, 320)
    ids, mask = rollout.samples.completion_ids, rollout.samples.completion_mask
    with torch.no_grad():
        logits = completion_logits(policy, rollout.samples)
        with adapter_off(policy) as head_weight_only:
            assert (completion_logits(head_weight_only, rollout.samples) - logits).abs().max() > 0.01
        expected = (logits / 0.8).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        for bare_head in (True, False):
            got = CompletionScores(policy, rollout.samples, head_weight_only=bare_head).logprobs(0.8)
            torch.testing.assert_close(got[mask], expected[mask], atol=2e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_by_the_gradient_of_its_own_forward(variant):
    assert_same_update(moved(add_lora(make_model("qwen3"), VARIANTS[variant])), tolerance=1e-4)


@pytest.mark.parametrize("variant", ["dora", "saved head", "saved norms", "bias"])
def test_every_variant_starts_at_its_reference_and_leaves_it_alone(folder, problems_file, variant):
    """Training biases of the base stay on where an adapter is switched off: the reference moved along."""
    model = {"lora": VARIANTS[variant], "kl_coefficient": 0.1}
    run = fit(folder, problems_file, model, steps=3, optimizer=adamw(0.05))
    kl = run.column("train/kl")
    assert kl[0] == 0.0 and min(kl[1:]) > 1e-4
    base = load_model(str(folder))
    for _, rollout, _ in run.slices:
        with torch.no_grad():
            expected = CompletionScores(base, rollout.samples).logprobs(rollout.temperature)
        torch.testing.assert_close(rollout.kl_logprob, expected, atol=1e-5, rtol=0)


def test_a_fresh_adapters_reference_is_the_base_bit_by_bit_while_rollouts_follow_the_adapter(folder, problems_file):
    model = {"lora": ADAPTER, "kl_coefficient": 0.1}
    run = fit(folder, problems_file, model, steps=3, optimizer=adamw(0.05))
    base = load_model(str(folder))
    set_training_mode(base, training=False)
    last = run.rollouts[-1]
    with torch.no_grad():
        for _, rollout, _ in run.slices:
            assert torch.equal(rollout.kl_logprob, CompletionScores(base, rollout.samples).logprobs(1.0))
        assert (last.samples.logprob - CompletionScores(base, last.samples).logprobs(1.0)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({**ATTENTION, "init_lora_weights": "pissa"}, ["init_lora_weights", "pissa", "frozen weights"]),
        ({**ATTENTION, "layer_replication": [[0, 1], [0, 2]]}, ["layer_replication", "another model"]),
        ({**ATTENTION, "alora_invocation_tokens": [5]}, ["alora_invocation_tokens", "some tokens"]),
        ({**ATTENTION, "eva_config": {"rho": 2.0}}, ["eva_config", "data"]),
        ({"r": 4, "target_modules": ["q_prj"]}, ["does not fit the model", "q_prj"]),
        ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [7]}, ["does not fit the model"]),
    ],
    ids=["pissa", "replication", "alora", "eva", "targets", "layers"],
)
def test_what_cannot_work_is_refused_before_the_weights_are_read(folder, problems_file, no_weights, lora, words):
    with pytest.raises(UserError) as error:
        fit(folder, problems_file, {"lora": lora})
    assert all(word in str(error.value) for word in words), error.value


# -- starting from an adapter ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder, adapter, problems_file):
    model = {"adapter": str(adapter), "kl_coefficient": 0.1}
    return fit(folder, problems_file, model, steps=3, optimizer=adamw(0.02))


@pytest.fixture(scope="module")
def oracle(folder, adapter):
    """PEFT's own loading."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()


def logprobs(model, rollout):
    with torch.no_grad():
        logits = completion_logits(model, rollout.samples)
    return logits.log_softmax(-1).gather(-1, rollout.samples.completion_ids[..., None]).squeeze(-1)


def test_it_samples_with_the_adapter_from_the_start(trained, oracle):
    first = trained.rollouts[0]
    mask = first.samples.completion_mask
    torch.testing.assert_close(first.samples.logprob[mask], logprobs(oracle, first)[mask], atol=1e-5, rtol=0)
    with oracle.disable_adapter():
        assert (first.samples.logprob - logprobs(oracle, first))[mask].abs().max() > 0.05


def test_the_reference_is_the_adapter_as_it_was(trained, oracle, adapter):
    """Not the bare base; it stays what it was to the last bit while the policy moves."""
    kl = trained.column("train/kl")
    assert kl[0] == 0.0 and min(kl[1:]) > 1e-4
    for _, rollout, _ in trained.slices:
        mask = rollout.samples.completion_mask
        torch.testing.assert_close(rollout.kl_logprob[mask], logprobs(oracle, rollout)[mask], atol=1e-5, rtol=0)
    stored = {
        name.replace(".weight", ".default.weight"): w
        for name, w in load_file(adapter / "adapter_model.safetensors").items()
    }
    names = list(trainable(trained.module.policy.model))
    reference = trained.module.references.snapshots["frozen"].weights
    assert names and set(names) == set(stored)
    assert all(torch.equal(w, stored[name]) for name, w in zip(names, reference, strict=True))
    assert all(not torch.equal(w, stored[name]) for name, w in trained.weights().items())


def test_its_own_settings_hold_and_only_it_trains(trained):
    lora = trained.module.policy.settings.lora
    assert lora == {"r": 4, "lora_alpha": 16, "target_modules": sorted(ADAPTER["target_modules"])}
    assert all("lora_" in name for name in trained.weights()) and len(trained.weights()) == 2 * 3 * 2
    assert {w.dtype for w in trained.weights().values()} == {torch.float32}


def test_another_b_makes_other_rollouts(folder, adapter, problems_file, tmp_path, trained):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({n: w * 2 if "lora_B" in n else w for n, w in weights.items()}, other / "adapter_model.safetensors")
    run = fit(folder, problems_file, {"adapter": str(other), "kl_coefficient": 0.1}, steps=1)
    one, two = trained.rollouts[0].samples, run.rollouts[0].samples
    assert (one.logprob[:, 0] - two.logprob[:, 0]).abs().max() > 1e-3
    assert run.column("train/kl") == [0.0]
    assert run.module.policy.identity.adapter_mark != trained.module.policy.identity.adapter_mark
    assert run.module.policy.identity.fingerprint == trained.module.policy.identity.fingerprint


def test_adapters_with_embeddings_beside_them(folder, tmp_path):
    """PEFT writes the base's embeddings as well where an adapter is on them."""
    for name in ("embeddings", "head", "saved head", "tokens", "dora", "bias"):
        torch.manual_seed(0)
        policy = moved(add_lora(AutoModelForCausalLM.from_pretrained(folder), VARIANTS[name]))
        policy.save_pretrained(tmp_path / name)
        again = load_model(str(folder), adapter=str(tmp_path / name))
        assert trainable(again).keys() == trainable(policy).keys()
        assert all(torch.equal(w, trainable(policy)[n]) for n, w in trainable(again).items()), name
    file = tmp_path / "head" / "adapter_model.safetensors"
    weights = load_file(file)
    (name,) = (n for n in weights if "lora_" not in n)
    save_file({**weights, name: weights[name] + 1}, file)
    with pytest.raises(UserError, match="embeddings of its own"):
        add_adapter(AutoModelForCausalLM.from_pretrained(folder), find_adapter(str(tmp_path / "head")))


# -- checkpoints -----------------------------------------------------------------------------------------------


def test_killed_and_continued(resumable, adapter):  # noqa: F811
    settings = ["--model.adapter", adapter, "--trainer.max_steps=5"]
    whole = resumable("whole", *settings)
    part = resumable("part", *settings, kill_at=7)
    assert resumable("part", *settings, "--ckpt_path=last") == part
    assert_same_run(whole, part)
    stored = checkpoint(part)
    assert len(stored["state_dict"]) == 12 and all("lora_" in name for name in stored["state_dict"])


def test_a_checkpoint_belongs_to_its_adapter(resumable, adapter, tmp_path, capsys):  # noqa: F811
    run = resumable("runs", "--model.adapter", adapter, "--trainer.max_steps=1")
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    resumable("runs", "--model.adapter", other, "--ckpt_path=last", "--trainer.max_steps=2")  # folders move
    weights = load_file(other / "adapter_model.safetensors")
    save_file({n: w * 2 for n, w in weights.items()}, other / "adapter_model.safetensors")
    lora = json.dumps({**find_adapter(str(adapter)).lora})
    for settings in (["--model.adapter", other], [f"--model.lora={lora}"]):
        with pytest.raises(SystemExit):
            resumable("runs", *settings, "--ckpt_path=last")
        assert "began with another adapter" in capsys.readouterr().err
    assert checkpoint(run)["global_step"] == 2


def test_the_other_commands_take_it(rlif, small_fit, adapter, model_folder, problems_file, capsys):
    """Evaluation with the adapter alone and with a checkpoint; weights of the guard; mixing."""
    held_out = ["--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--evaluation.n=4"]
    settings = [*small_fit, *held_out, "--model.adapter", adapter, "--model.optimizer.lr=0.05", "--guard.warmup=0"]
    runs = rlif("fit", *settings) / "runs" / "run"
    kept = runs / "1" / "checkpoints" / "guard" / "weights.safetensors"
    for number, extra in enumerate(([], ["--ckpt_path", runs / "1"], ["--ckpt_path", kept]), start=1):
        rlif("validate", *used_by("validate", settings), *extra)
        result = json.loads((runs / "validate" / str(number) / "results.json").read_text())
        assert result["adapter"] == str(adapter) and result["lora"]["r"] == 4
    base = str(model_folder())
    tuned = dict(mix(Pair(base, str(runs / "1")), 1).model.named_parameters())
    stored = torch.load(runs / "1" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    layer = "model.layers.0.self_attn.q_proj"
    b, a = (stored[f"model.base_model.model.{layer}.lora_{x}.default.weight"] for x in "BA")
    own = AutoModelForCausalLM.from_pretrained(base).get_parameter(f"{layer}.weight")
    torch.testing.assert_close(tuned[f"{layer}.weight"], own + 4 * b @ a, atol=1e-5, rtol=0)
    with pytest.raises(SystemExit):
        rlif("mix", *settings, "--tuned", adapter)
    assert "takes an adapter as the tuned model" in capsys.readouterr().err


def test_a_command_without_a_trainer_has_the_adapter_and_its_reference(tmp_path, monkeypatch, small_fit, adapter):
    monkeypatch.chdir(tmp_path)
    objects = RecipeObjects("diagnose", [*small_fit, "--model.adapter", str(adapter)], lambda parser: None)
    loaded = objects.policy(training=True)
    loaded.make_references({"frozen"})
    policy = loaded.model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        on = policy(ids).logits
        moved(policy)
        with loaded.reference("frozen") as reference:
            assert torch.equal(reference(ids).logits, on)
        assert not torch.equal(policy(ids).logits, on)


# -- what is refused -------------------------------------------------------------------------------------------


def broken(kind, adapter, folder, tmp_path):
    target = tmp_path / kind
    model = AutoModelForCausalLM.from_pretrained(folder)
    if kind == "ia3":
        get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(target)
    elif kind in ("deeper", "wider"):
        changes = {"num_hidden_layers": 3} if kind == "deeper" else {"hidden_size": 64}
        add_lora(make_model(**changes), ADAPTER).save_pretrained(target)
    elif kind != "missing":
        shutil.copytree(adapter, target)
    config, weights = target / "adapter_config.json", target / "adapter_model.safetensors"
    if kind == "no-config":
        config.unlink()
    if kind == "no-json":
        config.write_text("{")
    if kind == "pickled":
        torch.save(load_file(weights), target / "adapter_model.bin")
        weights.unlink()
    if kind == "cut-off":
        weights.write_bytes(weights.read_bytes()[:100])
    if kind == "pissa":
        config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))
    if kind == "other-targets":
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj"]}))
    if kind == "no-such-targets":
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["query"]}))
    return target


BROKEN = {
    "missing": ["The adapter's folder does not exist", "--model.adapter"],
    "no-config": ["holds no adapter_config.json"],
    "no-json": ["adapter_config.json can't be read"],
    "pickled": ["no weights in safetensors format", "pickled weights"],
    "cut-off": ["weights can't be read"],
    "ia3": ["not a LoRA adapter", "IA3"],
    "pissa": ["can't be trained on here", "pissa"],
    "deeper": ["belongs to another one", "layers.2", "no such weight"],
    "wider": ["belongs to another one", "[64, 4]", "[32, 4]"],
    "other-targets": ["belongs to another one", "no such weight"],
    "no-such-targets": ["does not fit the model", "query"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_adapter_that_cannot_be_used_is_refused_before_the_weights_are_read(
    kind, adapter, folder, problems_file, tmp_path, monkeypatch
):
    target = broken(kind, adapter, folder, tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError) as error:
        fit(folder, problems_file, {"adapter": str(target)})
    assert all(word in str(error.value) for word in BROKEN[kind]), error.value


def test_on_the_command_line(rlif, small_fit, adapter, capsys, no_weights):
    for settings, words in (
        (["--model.adapter", adapter, "--model.lora={r: 4}"], "exclude each other"),
        (["--model.adapter=someone/some-adapter"], "The adapter 'someone/some-adapter'"),
        (["--model.adapter", adapter, "--model.lora={r: 4, target_modules: [q_prj]}"], "exclude each other"),
    ):
        with pytest.raises(SystemExit) as ended:
            rlif("fit", *small_fit, *settings)
        text = capsys.readouterr().err
        assert ended.value.code == 2 and words in text and "Traceback" not in text


def test_a_name_that_differs_is_a_warning(folder, problems_file, adapter, tmp_path):
    target = tmp_path / "renamed"
    shutil.copytree(adapter, target)
    config = json.loads((target / "adapter_config.json").read_text())
    for base, warned in (("somewhere/else", True), (f"elsewhere/{folder.name}", False), (None, False)):
        (target / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(folder, problems_file, {"adapter": str(target)}, steps=1)
        assert any("was made for somewhere/else" in str(w.message) for w in said) == warned
