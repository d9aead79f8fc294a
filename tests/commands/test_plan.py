"""``rlif plan``: counts against real models, memory against what real tensors take, and the command."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import memory as bench
from benchmarks import shapes
from rlif_lightning.callbacks import RolloutCallback
from rlif_lightning.callbacks.plan_settings import plan_settings
from rlif_lightning.commands.plan import device_count
from rlif_lightning.data.batch_plan import BatchPlan
from rlif_lightning.errors import UserError
from rlif_lightning.main import main
from rlif_lightning.models.fsdp2 import GatheredPolicy
from rlif_lightning.models.policy import set_training_mode
from rlif_lightning.models.references import References
from rlif_lightning.planning import dry_run
from rlif_lightning.planning.configs import FIGURES, known_config, model_config
from rlif_lightning.planning.devices import fits, parse_device, usable
from rlif_lightning.planning.dry_run import Alive, Batch
from rlif_lightning.planning.memory import GIB, memory
from rlif_lightning.planning.settings import Network, Settings
from rlif_lightning.planning.settings_to_change import EIGHT_BIT, settings_to_change, what_to_do
from rlif_lightning.planning.weights import NF4_BITS, count_weights, optimizer_memory
from rlif_lightning.rewards import SelfCertainty
from rlif_lightning.sampling.kv_cache import PreallocatedLayer, cache_room
from rlif_lightning.training.module import RLIFModule, default_optimizer
from tests.conftest import load_model, make_config, make_model

PARAMETERS = {  # as the models' cards and weight files have them
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}
LORA = {"r": 4, "target_modules": "all-linear"}


def settings(config=None, **changes):
    sizes = {"prompts_per_step": 4, "group_size": 4, "micro_batch_size": 4}
    sizes |= {k: changes.pop(k) for k in [*sizes] if k in changes}
    given = {
        "model": "x", "config": config or known_config("Qwen/Qwen2.5-1.5B"), "precision": "bf16-mixed",
        "batch": BatchPlan(**sizes), "max_new_tokens": 256, "prompt_tokens": 128, "rows": 16,
    }  # fmt: skip
    return Settings(**{**given, **changes})


# -- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_known_models(name):
    assert count_weights(settings(known_config(name))).parameters == PARAMETERS[name]


def test_a_folders_own_configuration_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config("qwen2", 320)
    config.save_pretrained(tmp_path / "Qwen/Qwen2.5-1.5B")
    assert model_config("Qwen/Qwen2.5-1.5B").hidden_size == 32
    monkeypatch.chdir("/")
    assert model_config("Qwen/Qwen2.5-1.5B").hidden_size == 1536
    assert model_config("Qwen/Qwen3-8B-Base").num_hidden_layers == 36
    with pytest.raises(UserError, match="nobody/nothing"):
        model_config("nobody/nothing")


CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class Own(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code(tmp_path, monkeypatch):
    """It is run where the recipe trusts it, and nobody is asked on stdin."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    folder = tmp_path / "own"
    make_config("qwen2", 320).save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "own.py").write_text(CODE)
    rollout = RolloutCallback(rewards=[SelfCertainty()])
    module = RLIFModule(str(folder), lora=LORA, trust_remote_code=True)
    s = plan_settings(module, rollout.collector, precision="32-true", prompt_tokens=9)
    usual = count_weights(settings(make_config("qwen2", 320), lora=LORA, precision="32-true"))
    assert type(s.config).__name__ == "OwnConfig" and count_weights(s) == usual
    assert memory(s).peak > 0
    with pytest.raises(UserError):
        plan_settings(RLIFModule(str(folder)), rollout.collector, precision="32-true", prompt_tokens=9)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_are_those_of_the_loaded_model(architecture, lora, precision, model_folder):
    """Numbers and bytes of policy, adapter and frozen copy, tied and untied heads, against tensors."""
    folder = str(model_folder(architecture))
    s = settings(model_config(folder), lora=lora, precision=precision)
    counted = count_weights(s)
    policy = load_model(folder, dtype=s.base, lora=lora)
    adapter = [p for n, p in policy.named_parameters() if "lora_" in n]
    own = [p for n, p in policy.named_parameters() if "lora_" not in n]
    assert counted.parameters == sum(p.numel() for p in own)
    assert counted.trainable == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert counted.loaded == sum(p.numel() * p.element_size() for p in own)
    assert counted.body == count_weights(s.changed(lora=None)).body
    assert counted.adapter == sum(p.numel() * p.element_size() for p in adapter)
    if lora is None:
        references = References()
        references.create({"frozen"}, policy, s.half or torch.float32, torch.device("cpu"))
        assert counted.frozen_copy == sum(p.numel() * p.element_size() for p in references.parameters())


def test_bits_of_nf4():
    """Against bitsandbytes' own tensors; its codebooks of 16 and 256 numbers are the same for all weights."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(1024, 2048)
    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    size = packed.numel() * packed.element_size()
    size += state.absmax.numel() * state.absmax.element_size() + state.state2.absmax.numel() * 4
    assert pytest.approx(8 * size / weight.numel(), rel=1e-3) == NF4_BITS


def test_memory_of_optimisers():
    """Bytes per number, and whether torch's copy all weights on a GPU."""
    bnb = pytest.importorskip("bitsandbytes")
    assert optimizer_memory(default_optimizer) == (8, True)
    assert optimizer_memory(lambda p: torch.optim.AdamW(p, lr=1.0, foreach=False)) == (8, False)
    assert optimizer_memory(lambda p: torch.optim.AdamW(p, lr=1.0, fused=True)) == (8, False)
    assert optimizer_memory(lambda p: torch.optim.SGD(p, lr=1.0)) == (0, True)
    assert optimizer_memory(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)) == (4, True)
    states, at_once = optimizer_memory(lambda p: bnb.optim.AdamW8bit(p, lr=1.0))
    assert pytest.approx(states, rel=0.05) == EIGHT_BIT and not at_once


# -- activations -----------------------------------------------------------------------------------------------


def test_tracker_counts_what_lives():
    a = torch.ones(1000)
    with Alive() as alive:
        b = a * 2  # 4000 bytes
        c = b.view(10, 100)[2:]  # a view
        b.add_(1)
        assert (alive.now, alive.peak) == (4000, 4000)
        d = c.sum() + a  # 4 bytes for a moment, then 4000
        assert alive.now == 8000 and alive.peak == 8004
        del b
        assert alive.now == 8000  # c still needs it
        del c
        assert alive.now == 4000
        del d
    assert alive.now == 0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("shares", [False, True])
def test_dry_run_is_a_real_forward(architecture, shares, monkeypatch):
    """Extrapolated from three layers to five, against the storages that autograd keeps of a real forward."""
    config = make_config(architecture, 320, num_hidden_layers=5)
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False)  # as padding
    network, batch = Network(config=config, precision="32-true"), Batch(4, 2 if shares else 4, 24, 40)
    planned = dry_run.update(network, batch)
    model = make_model(architecture, num_hidden_layers=5)
    set_training_mode(model, training=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = dry_run._hidden(model, batch)
    keep(hidden)
    assert planned.kept == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.06)
    assert planned.backward > planned.kept_backward > 0


def test_checkpointing_keeps_little():
    network = Network(config=make_config("qwen2", 320, num_hidden_layers=12), precision="32-true")
    checked = replace(network, gradient_checkpointing=True)
    batch = Batch(4, 4, 24, 40)
    plain, few = dry_run.update(network, batch), dry_run.update(checked, batch)
    assert few.kept < plain.kept / 5
    assert few.backward < plain.backward / 3


def test_room_of_the_cache():
    for prompt, tokens in ((5, 3), (100, 40), (512, 768), (700, 3072), (10, 1)):
        layer = PreallocatedLayer()
        layer.update(*[torch.zeros(1, 1, prompt, 1)] * 2)
        for _ in range(tokens - 1):
            layer.update(*[torch.zeros(1, 1, 1, 1)] * 2)
        assert layer.keys.shape[2] == cache_room(prompt, tokens)


# -- memory ----------------------------------------------------------------------------------------------------


def test_hand_worked_parts():
    """Full fine-tuning of 1.5 G parameters, in GiB by hand."""
    w = 1_543_714_304
    s = settings(references=frozenset({"frozen"}), gradient_checkpointing=True)
    phases = memory(s).phases
    assert phases["update"]["weights"] == 4 * w
    assert phases["update"]["gradients"] == 4 * w
    assert phases["update"]["optimiser"] == 8 * w
    assert phases["rollout"]["optimiser"] == 8 * w
    assert phases["optimiser step"]["temporary"] == 4 * w
    tied = 151_936 * 1536  # and norms and biases stay in fp32
    assert phases["update"]["reference"] == pytest.approx(2 * (w - tied) + 4 * tied, rel=1e-3)
    # 16 rows with room for 385 tokens, 28 layers, 2 heads of 128, bf16.
    assert phases["rollout"]["KV cache"] == 16 * 385 * 28 * 2 * 128 * (2 + 2)
    adapted = memory(settings(lora=LORA, precision="bf16-mixed")).phases
    assert adapted["rollout"]["KV cache"] == 16 * 385 * 28 * 2 * 128 * (2 + 2)


def test_what_changes_the_peak():
    s = settings(lora=LORA, references=frozenset({"frozen"}))
    base = memory(s)
    assert "reference" not in base.phases["update"]  # the adapter switched off
    assert memory(s.changed(from_adapter=True)).phases["update"]["reference"] == 4 * base.weights.trainable
    assert memory(s.changed(gradient_checkpointing=True)).peak < base.peak
    assert memory(s.changed(micro_batch_size=2)).peak < base.peak
    assert memory(s.changed(quantization="nf4")).phases["update"]["weights"] < 0.4 * base.phases["update"]["weights"]
    assert memory(s.changed(steps_at_once=False)).phases["optimiser step"].get("temporary", 0) == 0
    full = memory(settings())
    half = memory(settings(shards=2))
    assert half.phases["update"]["optimiser"] == full.phases["update"]["optimiser"] // 2


def test_buckets_of_ddp():
    """As DDP allocates them: 4 bytes of each number that trains, from the start to the end of a run."""
    two = replace(settings().batch, world_size=2)
    for lora in (None, LORA):
        alone, several = memory(settings(lora=lora)), memory(settings(lora=lora, batch=two))
        assert several.phases["load"] == alone.phases["load"]
        for phase in ("rollout", "update", "optimiser step"):
            assert several.phases[phase]["buckets"] == 4 * alone.weights.trainable
            assert "buckets" not in alone.phases[phase]
    assert "buckets" not in memory(settings(batch=two, shards=2)).phases["update"]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])  # one of them with a tied head
@pytest.mark.parametrize("lora", [None, LORA])
def test_gathered_weights_are_those_of_the_module(architecture, lora, model_folder):
    folder = str(model_folder(architecture))
    s = settings(model_config(folder), lora=lora, shards=4, references=frozenset({"frozen"}))
    phases = memory(s).phases
    policy = load_model(folder, dtype=s.base, lora=lora)
    in_layers = [p for n, p in policy.named_parameters() if ".layers." in n]
    others = [p for n, p in policy.named_parameters() if ".layers." not in n]
    layers = s.config.num_hidden_layers
    expected = sum(p.nbytes for p in others) + sum(p.nbytes for p in in_layers) * 2 / layers
    assert phases["update"]["gathered"] == pytest.approx(expected, rel=0.01)  # the last norm
    whole = GatheredPolicy(policy, torch.device("cpu"), torch.bfloat16)
    with whole.holding("policy", dict(policy.named_parameters())) as model:
        expected = sum(p.nbytes for p in model.parameters())
    assert phases["rollout"]["gathered"] == phases["reference"]["gathered"] == expected


def test_sharded_layers_that_recompute_keep_no_casts():
    """2 bytes per number of the body's linear layers, less what a copy takes for a moment."""
    s = settings(gradient_checkpointing=True)
    batch, body = Batch(4, 4, 128, 256), 2 * count_weights(s).body
    kept, sharded = (dry_run.update(x.network, batch).kept for x in (s, s.changed(shards=2)))
    assert kept - sharded == pytest.approx(body, rel=0.01)


def test_gradients_wait_where_a_prompt_is_shared():
    """Next to no tokens, so the end of the backward is the peak: the embedding's gradient, and all that waits."""
    s = settings(max_new_tokens=2, prompt_tokens=4, prompts_per_step=2, precision="32-true")
    update = memory(s).phases["update"]
    assert update["temporary"] == update["gradients"]
    assert update["head"] == 4 * memory(s).weights.head  # tied: it waits for the embedding's
    assert memory(s.changed(gradient_checkpointing=True)).phases["update"]["temporary"] < update["gradients"] / 2


def test_rows_follow_the_memory():
    s = settings(lora=LORA, rows=None, prompts_per_step=512, max_new_tokens=4096)
    small, large = (memory(s, usable(size)) for size in (8, 24))
    assert 4 <= small.rows < large.rows < 512 * 4
    for size, plan in ((8, small), (24, large)):
        assert sum(plan.phases["rollout"].values()) <= usable(size)


def test_settings_to_change_lead_to_their_peaks():
    s = settings(references=frozenset({"frozen"}), max_new_tokens=1024)
    assert not fits(s)[24] and fits(s.changed(lora=LORA, gradient_checkpointing=True))[24]
    plan = memory(s, usable(24))
    found = settings_to_change(s, plan, usable(24))
    peaks = {c.words.split()[0]: c.peak for c in found}
    assert list(peaks.values()) == sorted(peaks.values()) and found[-1].peak < plan.peak
    assert peaks["--model.gradient_checkpointing"] == memory(s.changed(gradient_checkpointing=True)).peak
    assert peaks["--rollout.max_new_tokens"] == memory(s.changed(max_new_tokens=512)).peak
    assert peaks["--rollout.micro_batch_size"] == memory(s.changed(micro_batch_size=2)).peak
    assert {"--model.lora", "--model.optimizer"} < set(peaks)
    adapted = s.changed(lora=LORA)
    words = [c.words for c in settings_to_change(adapted, memory(adapted), None)]
    assert "--model.quantization nf4" in words and not any("model.lora" in w for w in words)


def test_what_to_do_names_what_is_enough():
    s = settings(references=frozenset({"frozen"}), max_new_tokens=1024)
    found = settings_to_change(s, memory(s), None)
    enough = what_to_do(found, found[0].peak)
    assert enough.startswith("set one of --model.lora") and "--model.optimizer" not in enough
    assert what_to_do(found, found[0].peak - 1).startswith("set several of --model.lora")
    assert what_to_do([], 1) is None


# -- against the allocator -------------------------------------------------------------------------------------


def check(case, tmp_path, least, rel=0.2):
    shapes.save(tmp_path, "A", case.prompt, **case.sizes)
    found, planned, parameters = bench.measured(case, str(tmp_path))
    assert parameters >= least
    assert max(planned.values()) == pytest.approx(max(found.values()), rel=rel)
    for phase in found:
        assert planned[phase] == pytest.approx(found[phase], rel=0.3, abs=2e6), phase


DEEP = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768}
BROAD = {"vocab_size": 16384, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024}


@pytest.mark.parametrize(
    ("sizes", "model", "rel"),
    [
        (DEEP, {"kl_coefficient": 0.01}, 0.06),  # shared prompts: gradients wait for the second use of the weights
        (DEEP, {"lora": bench.LORA, "gradient_checkpointing": True}, 0.2),
        (BROAD, {}, 0.06),  # the gradients of a tied head, last of all
    ],
)
def test_small_model_against_the_allocator(sizes, model, rel, tmp_path):
    check(bench.Case("small", sizes, model, tokens=24), tmp_path, 4e6, rel)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"kl_coefficient": 0.01}])  # with LoRA: the small one above
def test_large_model_against_the_allocator(model, tmp_path):
    """More than 100 M parameters, two steps of the real Trainer, within 20 % of the allocator's peak."""
    check(bench.Case("large", bench.TALL, model, tokens=32), tmp_path, 1e8)


# -- the command -----------------------------------------------------------------------------------------------


def plan(*arguments):
    main(["plan", *arguments])


def test_command(capsys, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights are loaded
    files = [f"--picture={tmp_path / 'plan.png'}", f"--json={tmp_path / 'plan.json'}"]
    plan("--config", "gsm8k", "--device", "rtx4090", *files)
    out = capsys.readouterr().out
    assert "1,543,714,304 parameters" in out and "32 prompts x 8 completions = 256" in out
    assert "fits GPUs of 8, 12, 16, 24, 48, 80 GB" in out
    assert max(map(len, out.splitlines())) <= 130 and len(out.splitlines()) < 35
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["peak"] == max(sum(p.values()) for p in report["phases"].values())


def test_command_refuses_what_cannot_fit_and_says_what_would(capsys):
    recipe = ["--config", "intuitor", "--device", "24GB"]
    with pytest.raises(SystemExit) as caught:
        plan(*recipe)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "does not fit on 24 GB" in error and "Traceback" not in error
    told = re.search(r"do: set one of --model.lora '({.*?})' \(peak ([\d.]+) GiB\)", error)
    plan(*recipe, "--model.lora", told[1])
    assert f"(peak now {told[2]} GiB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "gsm8k", "--model.name", "nobody/nothing"], "nobody/nothing"),
        (["--config", "gsm8k", "--device", "toaster"], "neither a size nor a known GPU"),
        (["--config", "gsm8k", "--rollout.micro_batch_size", "7"], "does not divide"),
        (["--config", "gsm8k", "--model.name", "./missing/folder"], "model folder does not exist"),
    ],
)
def test_users_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        plan(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_of_the_trainer():
    assert [device_count(x) for x in ("auto", -1, 4, "4", [0, 2], "0,1,")] == [1, 1, 4, 4, 2, 2]
    with pytest.raises(UserError, match="not a number"):
        device_count("many")
    assert parse_device("RTX 3060") == 12 and parse_device("24 GB") == 24


@pytest.mark.parametrize(
    ("strategy", "line"),
    [("fsdp2", "by 2 processes"), ("rlif_lightning.models.strategies.FSDP2Strategy", "by 2 processes"), ("ddp", "")],
)
def test_strategy_of_a_recipe(strategy, line, capsys):
    plan("--config", "quickstart", "--trainer.strategy", strategy, "--trainer.devices", "2")
    out = capsys.readouterr().out
    assert line in out and ("shared by" in out) == bool(line) and "2 processes x" in out


def test_settings_of_a_recipe(model_folder):
    module = RLIFModule(str(model_folder()), kl_coefficient=0.1, reference="ema", loss="gspo", lora=LORA)
    rollout = RolloutCallback(prompts_per_step=8, rewards=[SelfCertainty(annotator="reference")])
    found = plan_settings(module, rollout.collector, precision="32-true", prompt_tokens=9, processes=2, shards=2)
    assert found.references == {"ema", "frozen"} and not found.fused_loss and found.batch.world_size == 2
    assert found.base == torch.float32 and found.half is None and found.rows is None and found.native


def test_an_adapters_own_settings(model_folder, tmp_path):
    """All that decide about its size; its weights are not needed, a broken file is a message."""
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "rank_pattern": {"v_proj": 8}}
    folder = str(model_folder())
    load_model(folder, lora=lora).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    rollout = RolloutCallback(rewards=[SelfCertainty()])

    def read():
        module = RLIFModule(folder, adapter=str(tmp_path))
        return plan_settings(module, rollout.collector, precision="32-true", prompt_tokens=9)

    assert count_weights(read()) == count_weights(settings(model_config(folder), lora=lora, precision="32-true"))
    assert read().from_adapter and read().lora["bias"] == "lora_only"
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        read()


def test_larger_gpus_leave_more():
    assert usable(8) < 8 * GIB and usable(24) > 21 * GIB
