"""Exports: what plain transformers and PEFT make of them, prompts, cards, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlif_lightning.cli.run_objects import choose_checkpoint
from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Template
from rlif_lightning.errors import UserError
from rlif_lightning.exporting import hub
from rlif_lightning.exporting.card import _header, code, fenced
from rlif_lightning.exporting.check import compare_logits, load_export
from rlif_lightning.exporting.prompt import chat_template, differing_prompts
from rlif_lightning.models.merging import merge
from rlif_lightning.runs.folder import GUARD_WEIGHTS
from tests.conftest import CHAT_TEMPLATE, make_model, make_tokenizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}
IDS = torch.arange(3, 43).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(run, base, lora=None, weights="last.ckpt"):
    """The policy at the end of a run, put together here: the base, PEFT, and the checkpoint's tensors."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    stored = torch.load(run / "checkpoints" / weights, weights_only=True)["state_dict"]
    missed = model.load_state_dict({k.removeprefix("model."): v for k, v in stored.items()}, strict=False)
    assert not missed.unexpected_keys
    assert stored
    return model


def load_adapter(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.fixture
def fit(rlif, small_fit):
    """A finished run of a few steps that change a lot."""

    def run(*settings, steps=2):
        root = rlif("fit", *small_fit, f"--trainer.max_steps={steps}", "--model.optimizer.lr=0.02", *settings)
        return root / "runs" / "run" / "1"

    return run


# -- weights ------------------------------------------------------------------------------------------------


def test_a_full_run_in_plain_transformers(rlif, fit, model_folder, capsys):
    run = fit()
    rlif("export", run)
    folder = run / "export" / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    close(logits(model), logits(trained(run, model_folder())))
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(model_folder())), atol=0.01)
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "rlif_export.json", "tokenizer.json", "tokenizer_config.json", "curves.png",
    }  # fmt: skip
    assert str(run) not in "".join(p.read_text() for p in folder.glob("*.json"))
    assert "those of step 2" in capsys.readouterr().out
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LORA | {"use_dora": True},
        LORA | {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        LORA | {"use_rslora": True, "target_modules": "all-linear"},
    ],
    ids=["lora", "dora", "head and saved embedding", "rslora"],
)
def test_a_lora_run_merged_and_as_an_adapter(rlif, fit, model_folder, lora):
    run = fit(f"--model.lora={json.dumps(lora)}")
    expected = logits(trained(run, model_folder(), lora))
    for form in ("merged", "adapter"):
        rlif("export", run, "--format", form)
    merged = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    close(logits(merged), expected)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "base_layer" in name]
    folder = run / "export" / "adapter"
    close(logits(load_adapter(model_folder(), folder)), expected)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == model_folder().name
    for file in [*folder.iterdir(), *(run / "export" / "merged").iterdir()]:  # no place of this machine
        assert str(model_folder().parent).encode() not in file.read_bytes(), file
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(model_folder())), atol=0.01)


def test_a_4_bit_run_is_merged_into_the_whole_weights(rlif, fit, model_folder, capsys):
    run = fit(f"--model.lora={json.dumps(LORA)}", "--model.quantization=nf4")
    expected = logits(trained(run, model_folder(), LORA))  # on the base as its file has it
    for form in ("merged", "adapter"):
        rlif("export", run, "--format", form)
        said = capsys.readouterr().out
        assert "held in 4 bits while training (nf4)" in said
        assert said.rpartition("Read again")[2].strip().splitlines()[0] in (
            (run / "export" / form / "README.md").read_text()
        )
    close(logits(AutoModelForCausalLM.from_pretrained(run / "export" / "merged")), expected)
    close(logits(load_adapter(model_folder(), run / "export" / "adapter")), expected)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(run / "export" / "merged").config, "quantization_config")
    off = refused(rlif, capsys, run, "--model.quantization", "null")
    assert "model.quantization nf4" in off


def test_a_run_that_began_with_an_adapter(rlif, fit, model_folder, tmp_path):
    start = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", **LORA))
    start.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(0.1)
    start.save_pretrained(tmp_path / "start")
    run = fit(f"--model.adapter={tmp_path / 'start'}")
    expected = logits(trained(run, model_folder(), LORA))
    for form in ("merged", "adapter"):
        rlif("export", run, "--format", form)
    close(logits(AutoModelForCausalLM.from_pretrained(run / "export" / "merged")), expected)
    close(logits(load_adapter(model_folder(), run / "export" / "adapter")), expected)
    assert ".../start" in (run / "export" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
    ],
    ids=lambda lora: "-".join(f"{k}" for v in lora.values() for k in v),
)
def test_an_adapter_on_tied_weights_is_merged_into_one_of_them(tmp_path, lora):
    model = make_model(tie_word_embeddings=True)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **lora)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.2, generator=generator))
    expected = logits(policy)
    assert float((expected - logits(make_model(tie_word_embeddings=True))).abs().max()) > 0.1
    merge(policy, torch.float32).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(again), expected)
    still_tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert still_tied == (lora == {"target_modules": ["q_proj"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_once_and_says_so(rlif, fit, model_folder, capsys, dtype):
    run = fit(f"--model.lora={json.dumps(LORA)}")
    rlif("export", run, "--dtype", dtype)
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "merged")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    exact = trained(run, model_folder(), LORA).merge_and_unload()
    base = dict(AutoModelForCausalLM.from_pretrained(model_folder()).named_parameters())
    for name, weight in exact.named_parameters():
        rounding = weight.abs() * 2**-8 + base[name].abs() * 2**-8  # of the base, and of the sum
        assert ((dict(model.named_parameters())[name].float() - weight).abs() <= rounding).all()
    assert dtype in capsys.readouterr().out
    assert dtype in (run / "export" / "merged" / "README.md").read_text()


def test_an_update_lost_in_rounding_is_said(rlif, fit, capsys):
    run = fit(f"--model.lora={json.dumps(LORA)}", "--model.optimizer.lr=5e-3")
    rlif("export", run, "--dtype", "bfloat16")
    assert "rounding has cost" in capsys.readouterr().out
    rlif("export", run, "--dtype", "float32")
    assert "rounding has cost" not in capsys.readouterr().out


def test_an_update_below_rounding_is_not_kept(rlif, fit, capsys):
    run = fit(f"--model.lora={json.dumps(LORA)}", "--model.optimizer.lr=1e-5")
    assert "has lost what the adapter learned" in refused(rlif, capsys, run, "--dtype", "bfloat16")
    rlif("export", run, "--dtype", "float32")
    rlif("export", run, "--format", "adapter")


def test_an_update_below_the_runs_own_rounding_is_exported_in_float32(rlif, fit, model_folder, capsys):
    """The default was refused, though nobody had asked for bfloat16."""
    run = fit(f"--model.lora={json.dumps(LORA)}", "--model.optimizer.lr=1e-5", "--trainer.precision=bf16-mixed")
    assert "has lost what the adapter learned" in refused(rlif, capsys, run, "--dtype", "bfloat16")
    rlif("export", run)
    said = capsys.readouterr().out
    assert "not in bfloat16" in said and "written in float32" in said and "do:" not in said
    folder = run / "export" / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    close(logits(model), logits(trained(run, model_folder(), LORA)))
    assert "a whole model in float32" in (folder / "README.md").read_text()


def test_a_run_in_bfloat16_is_exported_in_bfloat16(rlif, fit):
    run = fit("--trainer.precision=bf16-mixed")
    rlif("export", run)
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in AutoModelForCausalLM.from_pretrained(run / "export" / "merged").named_parameters():
        assert torch.equal(weight, stored[f"model.{name}"].bfloat16())


def test_logits_that_differ_or_are_no_numbers_are_refused():
    expected = torch.tensor([[1.0, 20.0]])
    assert compare_logits(expected + 1e-4, expected, None, torch.float32).largest == pytest.approx(1e-4, rel=0.1)
    for found in (expected + 3e-4, expected * float("nan")):
        with pytest.raises(UserError, match="was not kept"):
            compare_logits(found, expected, None, torch.float32)
    assert compare_logits(expected, expected, expected - 2, torch.float32).adapter == 2
    assert compare_logits(expected - 0.5, expected, expected - 0.6, torch.bfloat16).largest == 0.5
    assert compare_logits(expected + 1e-4, expected, expected - 1e-4, torch.float32).largest > 0
    with pytest.raises(UserError, match="has lost"):
        compare_logits(expected - 0.5, expected, expected - 0.5, torch.bfloat16)


def test_a_wrong_export_is_not_kept(rlif, fit, monkeypatch, capsys):
    def wrong(*args):
        model = load_export(*args)
        model.lm_head.weight.data[0, 0] += 0.1
        return model

    run = fit()
    monkeypatch.setattr("rlif_lightning.exporting.check.load_export", wrong)
    with pytest.raises(SystemExit):
        rlif("export", run)
    assert "was not kept" in capsys.readouterr().err
    assert not any((run / "export").iterdir())


def test_a_merge_that_drops_the_adapter_is_not_kept(rlif, fit, monkeypatch, capsys):
    """In bfloat16, which would take as much for rounding."""
    run = fit(f"--model.lora={json.dumps(LORA)}", "--model.optimizer.lr=0.002")

    def drop(policy, dtype):
        return policy.unload().to(dtype)

    monkeypatch.setattr("rlif_lightning.commands.export.merge", drop)
    assert "has lost what the adapter learned" in refused(rlif, capsys, run, "--dtype", "bfloat16")


# -- the toy ------------------------------------------------------------------------------------------------


def greedy(folder, questions):
    """Completions by transformers' own generate from the exported folder alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": q}] for q in questions],
        add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**prompts, do_sample=False, max_new_tokens=32)[:, prompts["input_ids"].shape[1] :]
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def test_the_trained_toy_says_the_same_from_the_folder_alone(rlif, capsys):
    root = rlif("fit", "--config", "quickstart", "--trainer.max_steps=6", "--trainer.enable_progress_bar=false",
                "--evaluation.n=20")  # fmt: skip
    test = ["--config", "quickstart", "--data.test.limit=40", "--trainer.enable_progress_bar=false"]
    rlif("test", *test, "--ckpt_path", root / "runs/quickstart/1/checkpoints/guard/weights.safetensors")
    said = [json.loads(line) for line in (root / "runs/quickstart/test/1/problems.jsonl").read_text().splitlines()]
    capsys.readouterr()
    rlif("export", "--config", "quickstart")  # the newest run of the recipe that was trained
    out = capsys.readouterr().out
    assert "what the collapse guard hands back" in out
    assert "--ckpt_path last" in out
    folder = root / "runs/quickstart/1/export/merged"
    own = [row["greedy"][0]["text"] for row in said]
    assert greedy(folder, [row["problem"] for row in said]) == own
    assert len(set(own)) > 20
    rlif("test", *test, "--model.name", folder)
    again = (root / "runs/quickstart/test/2/problems.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == said


def test_generation_settings(rlif, fit, model_folder, tmp_path):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"eos_token_id": [7, 9], "do_sample": True, "top_k": 20, "repetition_penalty": 1.3}
    (base / "generation_config.json").write_text(json.dumps(settings))
    run = fit("--model.name", base, '--model.end_tokens=["<|im_end|>"]', "--evaluation.temperature=0.7")
    rlif("export", run)
    found = GenerationConfig.from_pretrained(run / "export" / "merged")
    assert found.eos_token_id == [0, 2, 7, 9]
    assert (found.do_sample, found.temperature, found.top_p, found.top_k) == (True, 0.7, 1.0, 0)
    assert found.repetition_penalty in (None, 1.0)
    assert found.max_new_tokens is None
    card = (run / "export" / "merged" / "README.md").read_text()
    assert "`<|im_end|>`" in card.replace("\\|", "|")


# -- which weights ------------------------------------------------------------------------------------------


def test_the_guards_weights_come_first_and_any_checkpoint_may_be_named(tmp_path):
    run = tmp_path / "runs" / "recipe" / "3"
    (run / GUARD_WEIGHTS).parent.mkdir(parents=True)
    files = [run / GUARD_WEIGHTS, run / "checkpoints" / "last.ckpt", run / "checkpoints" / "step=1.ckpt"]
    for file in [*files, run / "config.yaml"]:
        file.touch()
    root = tmp_path / "runs"
    for asked, folder, expected in (
        (None, run, 0), (None, None, 0), (str(run), None, 0), ("last", run, 1), ("last", None, 1),
        (str(files[2]), run, 2), (str(files[0]), None, 0),
    ):  # fmt: skip
        assert choose_checkpoint(asked, folder, root, "recipe") == files[expected]
    files[0].unlink()
    assert choose_checkpoint(None, run, root, "recipe") == files[1]


def test_a_named_checkpoint_of_a_run(rlif, fit, model_folder):
    run = fit("--checkpoint.every=1", "--checkpoint.keep=null")
    rlif("export", run, "--ckpt_path", run / "checkpoints" / "step=1.ckpt", "--output", "out")
    model = AutoModelForCausalLM.from_pretrained("out")
    close(logits(model), logits(trained(run, model_folder(), weights="step=1.ckpt")))
    assert not torch.allclose(logits(model), logits(trained(run, model_folder())), atol=1e-3)
    assert json.loads(Path("out/rlif_export.json").read_text())["step"] == 1


def test_a_recipe_names_its_newest_run_and_that_runs_settings_count(rlif, small_fit, model_folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {kl_coefficient: 0.02}\n")
    more = ["--model.loss=dr_grpo", f"--model.lora={json.dumps(LORA)}"]  # not in the recipe
    more += ["--checkpoint.every=1", "--checkpoint.keep=null"]
    for _ in range(2):
        rlif("fit", *small_fit, "--config", "mine.yaml", *more)
    rlif("export", "--config", "mine.yaml", "--model.name", model_folder(), "--evaluation.temperature=0.5")
    assert not (tmp_path / "runs/mine/1/export").exists()
    folder = tmp_path / "runs/mine/2/export/merged"
    assert "dr_grpo" in (folder / "README.md").read_text()
    assert GenerationConfig.from_pretrained(folder).temperature == 0.5  # the command line's word is the last
    rlif("fit", *small_fit, "--config", "mine.yaml", *more, "--trainer.max_steps=3",
         "--ckpt_path", tmp_path / "runs/mine/2/checkpoints/step=1.ckpt")  # fmt: skip
    rlif("export", tmp_path / "runs/mine/2")  # its settings now name the checkpoint that it went on from
    assert json.loads((folder / "rlif_export.json").read_text())["step"] == 3


# -- prompts ------------------------------------------------------------------------------------------------

SYSTEM = 'Answer in \\boxed{}, "shortly".\n{{ not }} {% jinja %}\r\nit\'s \U0001f600 ä'


def with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    return tokenizer


SETTINGS = "{% for m in messages %}{{ m.content }}{% endfor %} {{ on }} {{ of }}"


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [
        (Template("Q: {prompt}\nIt's {{x}} \\n {% raw %}\n\nA:"), make_tokenizer()),
        (Template("{prompt}>"), with_bos(make_tokenizer())),
        (Template("  {prompt} and again {prompt}\n"), with_bos(make_tokenizer())),
        (Template(), make_tokenizer()),
        (Template("{prompt} "), make_tokenizer(CHAT_TEMPLATE)),  # a format string next to a chat template
        (Template(), make_tokenizer(CHAT_TEMPLATE)),
        (Template("chat", SYSTEM), make_tokenizer(CHAT_TEMPLATE)),
        (Template(None, SYSTEM, "{{ bos_token }}" + CHAT_TEMPLATE + "<think>\n"), with_bos(make_tokenizer())),
        (Template(None, SYSTEM), make_tokenizer({"default": CHAT_TEMPLATE, "tool_use": "x"})),
        (Template(None, SYSTEM, SETTINGS, {"on": False, "of": {"a": "it's\n", "b": [1, None]}}), make_tokenizer()),
    ],
)
def test_apply_chat_template_gives_the_tokens_of_training(tmp_path, template, tokenizer):
    tokenizer.chat_template, before = chat_template(template, tokenizer), tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = before
    for text in ("What is 3 + 5?", " {braces} {{ }} \"quotes\" 'and' \\boxed{7}\n\n", "über 😀"):
        expected = list(template.encode(Problem(text, None), tokenizer).ids)
        found = exported.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        assert found["input_ids"] == expected
    assert differing_prompts(template, tokenizer, exported) == []


def test_a_system_message_of_the_conversation_wins():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.chat_template = chat_template(Template(None, "Be brief."), tokenizer)
    other = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(other, tokenize=False)
    assert "Be long." in text
    assert "Be brief." not in text


def test_settings_that_the_template_is_given_win():
    tokenizer = make_tokenizer(SETTINGS)
    tokenizer.chat_template = chat_template(Template(chat_template_kwargs={"on": False}), tokenizer)
    chat = [{"role": "user", "content": "Hi"}]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, **given) for given in ({}, {"on": True})]
    assert texts == ["Hi False ", "Hi True "]


def test_a_format_string_has_turns_and_no_system_message():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template(Template("Q {prompt} A"), tokenizer)
    turns = [{"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"), ("user", "3"))]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "Q 1 A2<|endoftext|>Q 3 A"
    with pytest.raises(Exception, match="without messages of the role system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_another_prompt_than_that_of_training_is_noticed():
    tokenizer, exported = make_tokenizer(), make_tokenizer("{{ messages[0]['content'] | trim }}>")
    assert len(differing_prompts(Template("{prompt}>"), tokenizer, exported)) == 1  # the probe with spaces in front
    assert len(differing_prompts(Template("{prompt}"), tokenizer, exported)) == 3


# -- the card -----------------------------------------------------------------------------------------------


def test_the_card_states_method_data_metrics_and_the_guard(rlif, fit, problems_file):
    run = fit("--data.val.path", problems_file, "--data.val.gold", r"[#]{4}\s*(.+)", "--data.val.limit=5",
              "--evaluation.every=1", "--model.loss=dr_grpo", steps=3)  # fmt: skip
    rlif("export", run)
    card = (run / "export" / "merged" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers"
    assert {"rlif", "dr_grpo", "SelfCertainty"} <= set(header["tags"])
    assert "base_model" not in header  # a folder is no name on the hub
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    entropy = rows[0].index("rollout/entropy")
    assert (
        f"| rollout/entropy | {float(rows[1][entropy]):.3f} |  |  | {float(rows[3][entropy]):.3f} (at step 2) |"
        in card
    )
    for text in ("3 optimiser steps", "SelfCertainty", "dr_grpo", "0.01 x k3", "problems.jsonl",
                 "Collapse guard: it did", "{prompt} ", "AdamW(lr=0.02", "curves.png", "transformers 5",
                 "held-out problems."):  # fmt: skip
        assert text in card
    assert str(problems_file.parent) not in card
    fired = {"step": 2, "reason": "at step 2: agreement fell"}
    guard = {"fired": fired, "handed_back_step": 1, "weights": None, "accuracy": {}}
    (run / "guard.json").write_text(json.dumps(guard))
    rlif("export", run)
    card = (run / "export" / "merged" / "README.md").read_text()
    assert "it fired at step 2: agreement fell. It hands back the weights of step 1." in card


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_header_names_the_base_and_its_license(model_folder, tmp_path, form):
    model = {"name": "someone/a-model", "loss": "grpo"}
    found = _header(model, ["SelfCertainty"], form).to_dict()
    assert found["base_model"] == "someone/a-model"
    assert found["base_model_relation"] == {"merged": "finetune", "adapter": "adapter"}[form]
    assert "license" not in found  # not in the hub's cache
    base = shutil.copytree(model_folder(), tmp_path / "base")
    for readme, expected in (
        ("---\nlicense: mit\n---\n# A", "mit"),
        ("# No header", None),
        ("---\na: [\n---\n", None),
    ):
        (base / "README.md").write_text(readme)
        found = _header(model | {"name": str(base)}, ["SelfCertainty"], form).to_dict()
        assert (found.get("license"), found.get("base_model")) == (expected, None)
    assert _header(model | {"name": "toy"}, [], form).license == "apache-2.0"


def test_hostile_text_stays_text():
    for text in ("a ``` b\n```\n# Title\n<script>", "````", "x" * 10_000):
        block = fenced(text)
        fence = block.split("\n")[0]
        assert block.count(fence + "\n") == 1
        assert block.endswith("\n" + fence)
        assert fence not in block[len(fence) : -len(fence)]
        assert len(block) < 5_000
    assert code("a`b``c|d\n# e") == "```a`b``c\\|d # e```"
    assert code("`x`") == "`` `x` ``"
    assert len(code("y" * 1000)) < 250


def test_the_card_quotes_a_template_that_looks_like_markdown(rlif, fit):
    run = fit("--data.template=```\n---\n# Owned\n{prompt}")
    rlif("export", run)
    card = (run / "export" / "merged" / "README.md").read_text()
    assert "````\n```\n---\n# Owned\n{prompt}\n````" in card


# -- what is refused ----------------------------------------------------------------------------------------


def refused(rlif, capsys, *args, code=2):
    with pytest.raises(SystemExit) as ended:
        rlif("export", *args)
    assert ended.value.code == code
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert "Traceback" not in error
    return error


def test_mistakes_are_named(rlif, fit, model_folder, capsys, tmp_path, monkeypatch):
    assert "does not exist" in refused(rlif, capsys, "runs/run/7")
    assert "no checkpoint" in refused(rlif, capsys, "--config", "quickstart")
    run = fit()
    capsys.readouterr()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    for args, message in (
        (["runs"], "name one of runs/run/1"),
        ([run, "--format", "adapter"], "no adapter to export"),
        ([run, "--format", "gguf"], "merged"),
        ([run, "--dtype", "int8"], "bfloat16"),
        ([run, "--output", "mine"], "something else"),
        ([run, "--output", "file"], "something else"),
        ([run, "--output", model_folder()], "replace the model"),
        ([run, "--ckpt_path", "nowhere.ckpt"], "does not exist"),
        ([run, "--ckpt_path", run / "metrics.csv"], "can't be read"),
        ([run, "--push_to_hub", "a/b/c"], "name of a repository"),
        ([run, "--push_to_hub", "me/model"], "does not answer or is off"),
        ([run, "--model.name", "nowhere/at/all"], "does not exist"),
    ):
        assert message in refused(rlif, capsys, *args)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    with monkeypatch.context() as patch:
        # a run of somebody else
        patch.setattr("os.access", lambda path, mode, real=os.access: Path(path) != run and real(path, mode))
        assert "another one with --output" in refused(rlif, capsys, run)
    (run / "checkpoints" / "last.ckpt").unlink()
    assert "no last checkpoint" in refused(rlif, capsys, run)
    (run / "checkpoints" / "last.ckpt").mkdir()
    assert "in shards" in refused(rlif, capsys, run)
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint" in refused(rlif, capsys, run)


def test_a_checkpoint_of_another_model_is_refused(rlif, fit, model_folder, capsys):
    run = fit()
    assert "belongs to another model" in refused(rlif, capsys, run, "--model.name", model_folder(seed=1))
    assert "other trainable weights" in refused(rlif, capsys, run, f"--model.lora={json.dumps(LORA)}")
    assert not (run / "export").exists() or not any((run / "export").iterdir())


def test_a_later_export_takes_the_place_of_an_earlier_one(rlif, fit, monkeypatch, capsys):
    run = fit("--checkpoint.every=1", "--checkpoint.keep=null")
    rlif("export", run, "--ckpt_path", run / "checkpoints" / "step=1.ckpt", "--output", "out")
    before = Path("out/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:  # the disk is full
        patch.setattr(
            Path, "write_text", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert "No space left" in refused(rlif, capsys, run, "--output", "out", code=1)
    assert Path("out/model.safetensors").read_bytes() == before
    rlif("export", run, "--output", "out")
    assert Path("out/model.safetensors").read_bytes() != before
    assert not [p.name for p in Path().iterdir() if p.name.startswith(".out")]


# -- the hub ------------------------------------------------------------------------------------------------


class Api:
    """Takes down what it is asked to do."""

    def __init__(self):
        self.asked = []

    def create_repo(self, name, **settings):
        self.asked.append(("create", name, settings["private"], settings["exist_ok"]))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, repo_id, repo_type):
        self.asked.append(("upload", folder_path, repo_id, repo_type))
        return "https://huggingface.co/me/model/commit/1"


def test_push_uploads_the_folder_to_a_private_repository(tmp_path, monkeypatch):
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    assert hub.push(tmp_path, "model").endswith("commit/1")
    assert api.asked == [("create", "model", True, True), ("upload", str(tmp_path), "me/model", "model")]


def test_a_push_that_fails_says_how_to_go_on(tmp_path, monkeypatch):
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    api.upload_folder = lambda **kwargs: (_ for _ in ()).throw(OSError("connection reset"))
    with pytest.raises(UserError, match=r"connection reset(.|\n)*hf upload model"):
        hub.push(tmp_path, "model")


def test_pushing_needs_a_hub_a_token_and_a_base_that_others_have(rlif, fit, monkeypatch, capsys):
    run = fit(f"--model.lora={json.dumps(LORA)}")
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "Nobody is logged in" in refused(rlif, capsys, run, "--push_to_hub", "me/model")
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    error = refused(rlif, capsys, run, "--push_to_hub", "me/model", "--format", "adapter")
    assert "base model is not on the hub" in error
    api = Api()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    rlif("export", run, "--push_to_hub", "me/model")
    assert api.asked[1][1] == str(run / "export" / "merged")
    assert 'name = "me/model"' in (run / "export" / "merged" / "README.md").read_text()


# -- a stranger's run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["rollout.rewards", "model.optimizer", "trainer.callbacks"])
def test_a_run_of_others_runs_no_code(rlif, fit, tmp_path, setting):
    run = fit(steps=1)
    group, _, name = setting.partition(".")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    strange = {"class_path": "stranger_module.R", "init_args": {"prefer": "long"}}
    settings[group][name] = strange if setting == "model.optimizer" else [strange]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "stranger_module.py").write_text(
        f"open('{tmp_path}/ran', 'w')\nfrom rlif_lightning.rewards import Length as R\n"
    )
    rlif("export", run)
    with pytest.warns(UserWarning, match=f"as a run may be a stranger's: {setting}"):
        rlif("plan", "--config", run / "config.yaml")
    rlif("report", run)
    assert not (tmp_path / "ran").exists()
    if setting == "rollout.rewards":
        assert "R(prefer=long)" in (run / "export" / "merged" / "README.md").read_text()
        rlif("plan", "--config", run / "config.yaml", "--trust_run")
        assert (tmp_path / "ran").exists()
