"""Weights that a model's files lack, have under other names, in other shapes or as NaN: said before training."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from rlif_lightning.errors import UserError
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from rlif_lightning.models.trainable import put_weights, trainable_weights
from rlif_lightning.models.weight_files import check_finite
from rlif_lightning.models.weight_names import misfit, nearest
from tests.conftest import make_model, make_tokenizer
from tests.processes import used_by

LORA = {"r": 2, "target_modules": ["q_proj"]}
UP = "model.layers.1.mlp.up_proj.weight"


def change(folder, spoil):
    """Spoil the weights of a model folder: ``spoil(weights)`` returns those to write."""
    file = folder / "model.safetensors"
    save_file(spoil(load_file(file)), file, metadata={"format": "pt"})


def without(weights):
    return {name: weight for name, weight in weights.items() if name != UP}


def renamed(weights):
    return {f"_orig_mod.{name}": weight for name, weight in weights.items()}


def other_shape(weights):
    return {**weights, UP: torch.zeros(4, 3)}


def not_numbers(weights):
    weights[UP][3, 4] = float("nan")
    return weights


def packed(weights):
    return {**weights, UP: (weights[UP] * 10).to(torch.int8)}


def eight_bits(weights):
    return {**weights, UP: weights[UP].to(torch.float8_e4m3fn)}


SPOILT = {
    without: ["do not hold all of its weights", f"1 missing, such as {UP}", "from one source"],
    renamed: [
        "27 missing, such as lm_head.weight; the most similar name there is _orig_mod.lm_head.weight",
        "without what puts '_orig_mod.' before its names",
    ],
    other_shape: [f"1 of another shape, such as {UP} [4, 3], in the model [48, 32]"],
    packed: ["no plain floating-point numbers", f"{UP} in I8"],
    eight_bits: ["names no quantization_config", f"{UP} in F8_E4M3"],
    not_numbers: ["The model's weights hold NaN or infinity", UP],
}


@pytest.fixture
def copied(model_folder, tmp_path):
    """A copy of the tiny model to spoil."""
    return shutil.copytree(model_folder(), tmp_path / "copied")


@pytest.mark.parametrize(
    "settings", [{}, {"lora": LORA}, {"lora": LORA, "quantization": "nf4"}], ids=["", "lora", "nf4"]
)
@pytest.mark.parametrize("spoil", SPOILT)
def test_spoilt_weights_are_refused(spoil, settings, copied, monkeypatch):
    """In 4 bits transformers takes weights of any shape, and NaN becomes a number."""
    change(copied, spoil)
    if spoil is not not_numbers:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(UserError) as error:
        Policy.load(PolicySettings(str(copied), **settings))
    assert all(part in str(error.value) for part in SPOILT[spoil]), error.value


def test_what_the_headers_could_not_tell_is_seen_after_loading(copied, monkeypatch):
    change(copied, without)
    monkeypatch.setattr("rlif_lightning.models.weight_files.meta_model", None)
    with pytest.raises(UserError, match="1 missing, such as"):
        Policy.load(PolicySettings(str(copied)))


def test_weights_in_several_files(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    Policy.load(PolicySettings(str(tmp_path)))
    index = tmp_path / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    file = tmp_path / files[UP]
    save_file(without(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 missing, such as {UP}"):
        Policy.load(PolicySettings(str(tmp_path)))


def test_one_weight_in_two_files(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    file = tmp_path / next(file for file in files.values() if file != files[UP])
    save_file({**load_file(file), UP: torch.zeros(48, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"hold a weight twice\n.*{UP}"):
        Policy.load(PolicySettings(str(tmp_path)))


@pytest.mark.parametrize("index", ['{"weight_map": ["a"]}', '{"weight_map": {}, "metadata": 1}', "[]", "{"])
def test_a_damaged_index_is_said(index, tmp_path, rlif, small_fit, capsys):
    make_model().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SystemExit) as error:
        rlif("fit", *small_fit, "--model.name", tmp_path / "m")
    assert error.value.code == 2 and capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_head_is_not_missing(left_out, tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    weight = model.get_input_embeddings().weight.detach().clone()
    one = "lm_head.weight" if left_out.startswith("model") else "model.embed_tokens.weight"
    change(
        tmp_path,
        lambda weights: {n: w for n, w in weights.items() if n != "model.embed_tokens.weight"} | {one: weight},
    )
    loaded = Policy.load(PolicySettings(str(tmp_path))).model
    assert torch.equal(loaded.get_input_embeddings().weight, weight)
    assert torch.equal(loaded.get_output_embeddings().weight, weight)


def test_weights_too_many_are_one_line_and_buffers_none(copied, capfd):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as files once had it
    change(copied, lambda weights: {**weights, **inv_freq})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Policy.load(PolicySettings(str(copied)))
    change(copied, lambda weights: {**weights, "vision.a": torch.ones(2), "vision.b": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"does not have are left out: vision\.a and 1 more") as caught:
        Policy.load(PolicySettings(str(copied)))
    assert len(caught) == 1 and "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "diagnose", "mix", "tuned", "export"])
def test_every_command_refuses_them(
    command, copied, rlif, small_fit, model_folder, problems_file, capfd, monkeypatch
):
    name = small_fit.index("--model.name") + 1
    small_fit[name] = str(copied)
    words = ["--prompts=2"] if command in ("diagnose", "mix", "tuned") else []
    for split in {"validate": ["val"], "test": ["test"], "predict": ["test"]}.get(command, []):
        words += [f"--data.{split}.path", problems_file, f"--data.{split}.answer=null"]
    if command == "export":
        rlif("fit", *small_fit, "--trainer.max_steps=1")
        small_fit, words = [], ["runs/run/1"]
    elif command in ("mix", "tuned"):
        words += ["--base", copied if command == "mix" else model_folder()]
        words += ["--tuned", copied if command == "tuned" else model_folder(seed=1)]
    change(copied, renamed)
    plain = AutoModelForCausalLM.from_pretrained

    def load(path, **options):
        assert str(path) != str(copied), "weights were read"
        return plain(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        rlif("mix" if command == "tuned" else command, *words, *used_by(command, small_fit))
    err = capfd.readouterr().err
    assert ended.value.code == 2
    assert "27 missing" in err and "_orig_mod." in err and "REPORT" not in err and "Traceback" not in err
    assert command == "export" or not Path("runs").exists()


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize(("file", "do"), [("a.gguf", "that it was made from"), ("a.safetensors", "the file lies in")])
def test_a_file_is_no_model(command, file, do, rlif, small_fit, tmp_path, capsys):
    (tmp_path / file).write_text("GGUF")
    with pytest.raises(SystemExit) as ended:
        rlif(command, *small_fit, "--model.name", tmp_path / file)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert "The model is a file" in err and do in err and "safetensors format" in err


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_no_model(alone, copied):
    (copied / "adapter_config.json").write_text("{}")
    if alone:
        (copied / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds an adapter(.|\n)*--model\.adapter"):
        Policy.load(PolicySettings(str(copied)))


def test_checkpoints_and_kept_weights_that_lack_one_name_it(model_folder):
    policy = Policy.load(PolicySettings(str(model_folder()), lora=LORA))
    weights = trainable_weights(policy.model)
    gone, *_ = sorted(weights)
    weights[gone.replace("lora_A", "lora_C")] = weights.pop(gone)
    wrong = rf"1 missing, such as {gone}; the most similar name there is .*lora_C"
    with pytest.raises(UserError, match=wrong):
        put_weights(policy.model, weights)
    with pytest.raises(UserError, match=wrong):
        policy.restore({"state_dict": weights, "rlif": vars(policy.identity)})


def test_a_checkpoint_that_holds_nan_is_not_used(model_folder):
    policy = Policy.load(PolicySettings(str(model_folder()), lora=LORA))
    weights = trainable_weights(policy.model)
    bad = min(weights)
    weights[bad][0, 0] = torch.nan
    with pytest.raises(UserError, match=f"NaN or infinity(.|\n)*the checkpoint: {bad} "):
        policy.restore({"state_dict": weights, "rlif": vars(policy.identity)})


def test_looking_for_nan_takes_little_memory():
    """A CPU made a float32 copy of an embedding in half precision, twice its size."""
    weight = torch.zeros(2**13, 2**12, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        check_finite([("embedding", weight)], "model")
    events = recorded.profiler.kineto_results.events()
    taken = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert taken and max(taken) <= weight.nbytes
    for place in (0, -1):
        spoilt = weight.clone()
        spoilt.view(-1)[place] = float("nan")
        with pytest.raises(UserError, match="NaN"):
            check_finite([("embedding", spoilt)], "model")


def test_misfits_are_told_one_at_a_time():
    own = {"a.x": [2, 3], "a.y": [3]}
    assert misfit(own, {"a.x": (2, 3), "a.y": torch.Size([3])}) == ""
    assert misfit(own, {}) == "2 missing, such as a.x"
    assert misfit(own, {**own, "a.z": [1]}) == "1 too many, such as a.z: no such weight in the model"
    assert misfit(own, {"a.x": [2, 3], "a.y": [4]}).endswith("such as a.y [4], in the model [3]")
    assert nearest("a.x", ["b.a.y", "z.b.a.x", "b.a.x"]) == "b.a.x"
    assert nearest("a.x", []) is None
