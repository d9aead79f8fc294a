"""A user's mistake: what is wrong, what was given, what to do; exit code 2, no traceback, before a model loads."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from rlif_lightning.main import main
from rlif_lightning.runs.folder import discard_run_folder
from tests.processes import used_by


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch, small_fit):
    """Run ``rlif fit`` with one setting wrong; returns the complaint. No weights may be loaded for it."""
    from transformers import AutoModelForCausalLM

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)

    def run(*args, command="fit"):
        with pytest.raises(SystemExit) as exit_:
            main([command, *used_by(command, [*small_fit, *args])])
        err = capsys.readouterr().err
        assert exit_.value.code == 2, err
        message = err[err.rindex("error: ") :]
        assert len(message.splitlines()) <= 4, message
        assert not (tmp_path / "runs").exists(), "a failed start took a run's number"
        return message

    return run


# -- data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"question": "a", "answer": "#### 1"}\n{"question": \n', ["Line 2 of", "a.jsonl", "not JSON"]),
        ("a.jsonl", '{"question": "a", "answer": "#### 1"}\n\n[1]\n', ["Line 3 of", "not a JSON object"]),
        ("a.jsonl", b'{"question": "caf\xe9", "answer": "1"}', ["not UTF-8 text", "save it as UTF-8"]),
        ("a.jsonl", "\n", ["data set is empty", "a.jsonl"]),
        ("a.jsonl", "", ["data set is empty"]),
        ("a.json", '[{"question": "a",\n "answer": }]', ["Line 2 of", "a.json", "not JSON"]),
        ("a.json", '[{"question": "a", "answer": "#### 1"}, 3]', ["Row 2 of", "not a JSON object"]),
        ("a.json", "[]", ["data set is empty"]),
        ("a.csv", "question,answer\nWhat?,#### 1\nWhy?\n", ["Line 3 of", "number of fields"]),
        ("a.csv", "", ["data set is empty"]),
        ("a.parquet", "x", ["not a Parquet file"]),
        ("a.txt", "x", ["no known ending", ".jsonl, .ndjson, .json, .csv, .parquet", ".gz"]),
        ("a.jsonl", '{"question": "  ", "answer": "#### 1"}', ["Line 1 of", "no text in 'question'"]),
        ("a.jsonl", '{"question": "a \\ud800", "answer": "#### 1"}', ["Line 1 of", "half a character"]),
        ("a.jsonl", '{"question": "a", "answer": "none"}', ["Line 1 of", "no answer", "'none'", "data.train.gold"]),
        ("a.jsonl", '{"question": "a", "answer": null}', ["Line 1 of", "no answer", "data.train.answer null"]),
        ("a.jsonl", '{"question": "a", "answer": ' + "9" * 5000 + "}", ["Line 1 of", "a.jsonl", "5000 digits"]),
        ("a.jsonl.gz", "x", ["not a whole gzip file", "a.jsonl.gz"]),
        ("a.jsonl", '{"question": ' + "[" * 900 + "]" * 900 + "}", ["Line 1 of", "'question' is nested too deeply"]),
    ],
)  # fmt: skip
def test_broken_data(name, content, parts, refused, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused("--data.train.path", tmp_path / name)
    assert all(part in message for part in parts), message


def test_what_is_no_data_file(refused, tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    assert "is a folder" in refused("--data.train.path", tmp_path / "a.jsonl")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b.jsonl")
        assert "is no ordinary file" in refused("--data.train.path", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"options": ["x", "y"], "answer": "C"}, ["Line 2 of", "none of the options", "from A to B"]),
        ({"options": ["x"] * 27, "answer": "A"}, ["Line 2 of", "not a list of choices", "2 to 26"]),
        ({"options": [], "answer": "A"}, ["Line 2 of", "not a list of choices", "got: []"]),
        ({"options": "x, y", "answer": "A"}, ["Line 2 of", "not a list of choices", "got: 'x, y'"]),
        ({"options": ["x", None], "answer": "A"}, ["Line 2 of", "not a list of choices", "None"]),
        ({"options": ["x", "y"], "answer": "A", "kind": ["k"]}, ["Line 2 of", "no text in 'kind'", "data.*.by"]),
        ({"answer": "A"}, ["Line 2 of", "no field 'options'"]),
    ],
)
def test_broken_choices(row, parts, refused, tmp_path):
    rows = [
        {"question": "a?", "options": ["x", "y"], "answer": "A", "kind": "k"},
        {"question": "b?", "kind": "k", **row},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    choices = ["--data.train.path", tmp_path / "a.jsonl", "--data.train.options=options", "--data.train.by=kind"]
    message = refused(*choices)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--data.train.path="], ["data.*.path is empty", "a name"]),
        (["--data.train.path=nosuch.jsonl"], ["does not exist", "nosuch.jsonl"]),
        (["--data.train.path=https://x.org/a.jsonl"], ["is a URL", "https://x.org/a.jsonl", "download the file"]),
        (["--data.train.path=https://huggingface.co/datasets/openai/gsm8k"], ["is a URL", "the name, openai/gsm8k"]),
        (["--data.train.path=."], ["is a folder"]),
        (["--data.train.split=train[:10%]"], ["data.train.split", "got: train[:10%]", "train[-500:]"]),
        (["--data.train.split=train+test", "--data.train.path=toy"], ["data.train.split", "train[-500:]"]),
        (["--data.train.split=train[5000:]"], ["is empty", "split train[5000:]"]),
        (["--data.train.path=toy-tunned"], ["did you mean 'toy-tuned'"]),
        (["--model.name=toy-tunned:2"], ["did you mean 'toy-tuned'"]),
        (["--data.train.prompt=problem"], ["Line 1 of", "no field 'problem'", "question, answer", "data.*.prompt"]),
        (["--data.train.answer=solution"], ["no field 'solution'", "set it to null"]),
        (["--data.train.unit=unit"], ["no field 'unit'", "data.*.unit"]),
        (["--data.train.limit=0"], ["limit is too small"]),
        (["--data.train.by=subject"], ["Line 1 of", "no field 'subject'", "data.*.by"]),
        (["--data.train.by=[question,level]"], ["Line 1 of", "no field 'level'", "data.*.by"]),
        (["--data.train.options=choices"], ["Line 1 of", "no field 'choices'", "data.*.options"]),
        (["--data.train.options=question"], ["Line 1 of", "not a list of choices", "2 to 26"]),
        (["--data.train.prompt={question} {x}"], ["Line 1 of", "no field 'x'", "data.*.prompt"]),
        (["--data.answers.compare=literal", "--data.train.gold=whole"], ["Line 1", "not a Python literal", "<<0>>"]),
        (["--data.answers.compare=litral"], ["compare"]),
        (["--data.answers.completion=choise"], ["choice"]),
        (["--evaluation.predictions=alpaca_eval", "--evaluation.samples=2"], ["one output per instruction"]),
        (["--evaluation.predictions=alpaca"], ["predictions", "alpaca_eval"]),
        (["--data.train.gold=(x"], ["not a valid regular expression"]),
        (["--data.train.gold=####"], ["pattern with one group, not with 0", "got: '####'"]),
        (["--data.answers.completion=(x"], ["not a valid regular expression"]),
        (["--data.answers.completion=x"], ["pattern with one group, not with 0"]),
        (["--data.answers.completion=boxd"], ["boxed"]),
        (["--data.max_prompt_tokens=1"], ["longer than data.max_prompt_tokens", "14 tokens", "--data.max_prompt"]),
        (["--data.template=hello"], ["no place for the problem", "{prompt}"]),
        (["--data.template=chat"], ["no chat template", "data.chat_template"]),
        (["--data.template=null", "--data.system_prompt=Hi"], ["no chat template"]),
        (["--data.system_prompt=Hi"], ["format string takes no system prompt"]),
        (["--data.template=null", "--data.chat_template={% for"], ["chat template fails"]),
        (["--rollout.prompts_per_step=100"], ["smaller than one rollout", "40 prompts", "at least 100"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_data(args, parts, refused):
    message = refused(*args)
    assert all(part in message for part in parts), message


def test_a_system_prompt_that_the_chat_template_refuses(refused):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    message = refused("--data.template=null", "--data.system_prompt=Hi", f"--data.chat_template={template}")
    assert "no system role" in message


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_command_without_data(command, small_fit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([command, *used_by(command, small_fit)])
    assert f"data.{'val' if command == 'validate' else command} is empty" in capsys.readouterr().err


# -- models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(model_folder, tmp_path):
    """A copy of the tiny model to spoil."""
    shutil.copytree(model_folder(), tmp_path / "spoilt")
    return tmp_path / "spoilt"


def test_a_missing_model_folder(refused):
    for name in ("./nosuch", "/nosuch/model", "models/of/mine"):
        assert "model folder does not exist" in refused("--model.name", name)


def test_a_model_folder_without_weights(refused, spoilt):
    (spoilt / "model.safetensors").unlink()
    message = refused("--model.name", spoilt)
    assert "no weights in safetensors format" in message
    assert "tokenizer.json" in message


def test_pickled_weights_are_never_loaded(refused, spoilt):
    (spoilt / "model.safetensors").rename(spoilt / "pytorch_model.bin")
    message = refused("--model.name", spoilt)
    assert "pickled weights can run code" in message
    assert "save_pretrained()" in message


def test_a_model_folder_without_tokenizer(refused, spoilt):
    """transformers made up an empty tokenizer: every prompt had no tokens, and the embedding raised."""
    for file in spoilt.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in refused("--model.name", spoilt)


def test_a_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused("--model.name", tmp_path / "empty")
    assert "no config.json" in message
    assert "no files" in message


def test_broken_json_in_the_model_folder(refused, spoilt):
    (spoilt / "config.json").write_text("{")
    assert "not a valid JSON file" in refused("--model.name", spoilt)


def test_a_tokenizer_without_end_token(refused, spoilt):
    file = spoilt / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None, "pad_token": None}))
    assert "no end-of-sequence token" in refused("--model.name", spoilt)


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(spoilt):
    from rlif_lightning.models.tokenizer import load_tokenizer

    file = spoilt / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    tokenizer = load_tokenizer(str(spoilt))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_broken_weights(rlif, small_fit, spoilt, capsys):
    (spoilt / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(SystemExit) as exit_:
        rlif("fit", *small_fit, "--model.name", spoilt)
    assert exit_.value.code == 2
    assert "error: The model could not be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("arg", ["--model.name=some/model", "--model.name=gpt99", "--data.train.path=some/data"])
@pytest.mark.parametrize("switched_off", [True, False])
def test_a_hub_name_without_hub_is_one_line_at_once(arg, switched_off, refused, monkeypatch):
    """Not switched off, the libraries tried again and again for 24 (data) and 47 (model) seconds."""
    import socket

    from huggingface_hub import constants

    from rlif_lightning.models import hub

    def no_address(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switched_off)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if switched_off else "0")
    hub.hub_answers.cache_clear()
    start = time.perf_counter()
    try:
        message = refused(arg)
    finally:
        hub.hub_answers.cache_clear()
    assert time.perf_counter() - start < 60
    assert len(message.splitlines()) == 1
    assert arg.partition("=")[2] in message
    assert "give the path" in message
    assert "hub does not answer" in message


# -- sizes and settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--rollout.group_size=1"], ["group_size is too small", "2 or more"]),
        (["--rollout.micro_batch_size=3"], ["does not divide", "8 completions", "one of 1, 2, 4, 8"]),
        (["--rollout.prompts_per_step=0"], ["prompts_per_step is out of range", "1 to "]),
        (["--rollout.temperature=0"], ["rollout.temperature is out of range", "teaches nothing"]),
        (["--rollout.temperature=-1"], ["rollout.temperature is out of range", "teaches nothing"]),
        (["--rollout.top_p=0"], ["top_p is out of range"]),
        (["--rollout.max_new_tokens=0"], ["max_new_tokens is out of range"]),
        (["--rollout.steps_per_rollout=2", "--trainer.max_steps=3"], ["middle of a rollout", "a multiple of 2"]),
        (["--rollout.importance_cap=0.5"], ["importance_cap is out of range", "1 or more"]),
        (["--trainer.accumulate_grad_batches=2"], ["derived from", "--rollout.micro_batch_size"]),
        (["--rollout.rewards=[Random,Random]"], ["named twice"]),
        (["--rollout.rewards=[Random]", "--rollout.rewards.weight=0"], ["weight 0"]),
        (["--rollout.rewards=[Verifiable]", "--data.train.answer=null"], ["compares answers", "--data.train.answer"]),
        (["--model.clip_low=-0.1"], ["model.clip_low is out of range"]),
        (["--model.kl_coefficient=-1"], ["model.kl_coefficient is out of range"]),
        (["--model.clip_low=.nan"], ["model.clip_low is out of range", "got: nan"]),
        (["--model.kl_coefficient=.inf"], ["model.kl_coefficient is out of range"]),
        (["--model.optimizer.lr=.inf"], ["model.optimizer.lr is out of range"]),
        (["--rollout.rewards=[Random]", "--rollout.rewards.weight=[[0, 1], [9, .nan]]"], ["weight is out of range"]),
        (["--rollout.temperature=1e-30"], ["temperature is out of range", "0.001 to 1000"]),
        (["--trainer.gradient_clip_val=-1"], ["gradient_clip_val is out of range", "null: no clipping"]),
        (["--model.warmup_ratio=1"], ["warmup_ratio is out of range"]),
        (["--model.lora.rr=4"], ["no setting 'rr'", "did you mean r?"]),
        (["--model.optimizer.lr=-1"], ["model.optimizer: AdamW can't be made", "Invalid learning rate: -1"]),
        (["--evaluation.samples=0", "--evaluation.greedy=false"], ["evaluation.samples", "evaluation.greedy true"]),
        (["--evaluation.temperature=0"], ["evaluation.temperature", "above 0, or --evaluation.samples 0"]),
        (["--evaluation.n=0"], ["evaluation.n is out of range"]),
        (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val is out of range"]),
        (["--checkpoint.keep=-1"], ["checkpoint.keep is out of range"]),
        (["--rollout.sampler=rlif_lightning.sampling.NativeSampler", "--rollout.sampler.rows=0"],
         ["sampler.rows is out of range"]),
        (["--model.optimizer=torch.optim.AdamW", "--model.optimizer.fused=true", "--trainer.precision=bf16-mixed"],
         ["fused optimizer", "gradients be clipped", "leave out the optimizer's fused"]),
        (["--checkpoint.every=0"], ["checkpoint.every is out of range"]),
        (["--completions.keep=-1"], ["completions.keep is out of range"]),
        (["--ckpt_path=last"], ["no checkpoint to continue"]),
        (["--ckpt_path=nosuch.ckpt"], ["checkpoint does not exist", "nosuch.ckpt"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(args, parts, refused):
    message = refused(*args)
    assert all(part in message for part in parts), message


VLLM = "--rollout.sampler=rlif_lightning.sampling.VLLMSampler"


@pytest.mark.parametrize("command", ["fit", "validate", "diagnose", "mix"])
def test_vllm_that_is_not_installed(refused, monkeypatch, command, model_folder, problems_file):
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine.is_installed", lambda: False)
    more = {
        "validate": ["--data.val.path", problems_file],
        "diagnose": ["--prompts=2"],
        "mix": ["--tuned", model_folder(seed=1)],
    }
    message = refused(VLLM, *more.get(command, []), command=command)
    assert "vLLM, which is not installed" in message and "rlif-lightning[vllm]" in message


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--rollout.temperature=2.5"], "temperature"),
        (["--evaluation.temperature=2.1"], "temperature"),
        (["--rollout.sampler.max_model_len=20"], "no room"),
        (["--rollout.sampler.max_model_len=100", "--evaluation.max_new_tokens=90"], "no room"),
    ],
)
def test_what_vllm_can_not_sample(refused, monkeypatch, problems_file, args, told):
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine.is_installed", lambda: True)
    assert told in refused(VLLM, *args, "--data.val.path", problems_file)


@pytest.mark.parametrize("command", ["fit", "export", "plan", "mix"])
def test_settings_with_vllm_are_read_without_it(monkeypatch, rlif, small_fit, command, capsys):
    monkeypatch.setattr("rlif_lightning.sampling.vllm.engine.is_installed", lambda: False)
    if command == "export":
        rlif("fit", *small_fit, "--trainer.max_steps=1")
        config = Path("runs/run/1/config.yaml")
        text = config.read_text()
        assert text.count("sampler: null") == 2  # the run of a machine with vLLM
        config.write_text(text.replace("sampler: null", "sampler: rlif_lightning.sampling.VLLMSampler"))
        rlif("export", "runs/run/1")
        assert Path("runs/run/1/export/merged/model.safetensors").is_file()
    elif command == "plan":
        rlif("plan", *small_fit, VLLM)
    else:
        with pytest.raises(SystemExit) as end:
            rlif(command, *small_fit, VLLM, *(["--tuned=toy"] if command == "mix" else []), "--print_config")
        assert end.value.code == 0 and "VLLMSampler" in capsys.readouterr().out


# -- output ---------------------------------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written_to(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert "can't be written to" in refused("--runs", folder)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    message = refused("--runs", tmp_path / "other" / "runs")
    assert "can't be written to" in message
    assert "--runs" in message


def test_a_file_where_the_recipes_folder_should_be(small_fit, rlif, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").write_text("")
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--runs", "out")
    assert "run folder cannot be created" in capsys.readouterr().err


def test_a_failed_start_leaves_earlier_runs_alone_and_takes_no_number(rlif, small_fit, tmp_path):
    rlif("fit", *small_fit, "--trainer.max_steps=1")

    def content():  # an event file without events may come
        files = (tmp_path / "runs/run/1").iterdir()
        return sorted((p.name, p.stat().st_size) for p in files if "tfevents" not in p.name)

    before = content()
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--data.train.path=nosuch.jsonl")
    with pytest.raises(SystemExit):
        rlif("fit", *small_fit, "--data.train.path=nosuch.jsonl", "--ckpt_path=last")
    assert [p.name for p in (tmp_path / "runs/run").iterdir()] == ["1"]
    assert content() == before


@pytest.mark.parametrize("name", ["metrics.csv", "results.json", "checkpoints/step=1.ckpt", "notes.txt"])
@pytest.mark.parametrize("run", ["run/1", "run/test/1"])
def test_a_folder_that_holds_anything_of_worth_is_kept(name, run, tmp_path):
    folder = tmp_path / "runs" / run
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("")
    (folder / "config.yaml").write_text("")
    discard_run_folder(tmp_path / "runs", folder)
    assert (folder / name).exists()
    (folder / name).unlink()
    discard_run_folder(tmp_path / "runs", folder)
    assert not (tmp_path / "runs").exists()


# -- processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["--trainer.strategy=fsdp"], ["first FSDP is not supported", "fsdp", "--trainer.strategy fsdp2"]),
        (["--trainer.strategy=deepspeed_stage_2"], ["DeepSpeed is not supported", "deepspeed_stage_2"]),
        (["--trainer.strategy=DeepSpeedStrategy"], ["DeepSpeed is not supported"]),
        (["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"], ["first FSDP is not supported"]),
        (["--trainer.strategy=ModelParallelStrategy"], ["Tensor parallelism, ", "fsdp2"]),
        (
            ["--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.tensor_parallel_size=2"],
            ["Tensor parallelism, ", "fsdp2"],
        ),
        (["--trainer.devices=3", "--trainer.strategy=ddp"], ["2 prompts, 3 processes", "a multiple of 3"]),
        (["--trainer.devices=2", "--trainer.num_nodes=4", "--trainer.strategy=fsdp2"], ["2 prompts, 8 processes"]),
    ],
)
def test_strategies_and_processes(settings, parts, refused):
    message = refused(*settings)
    for part in parts:
        assert part in message


@pytest.fixture
def alone():
    """What a strategy of several processes has set up for its one is taken down again."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_an_8_bit_optimizer_on_shares(refused):
    message = refused(
        "--trainer.strategy=fsdp2", "--trainer.devices=1", "--model.optimizer=bitsandbytes.optim.AdamW8bit"
    )
    assert "bitsandbytes can't work on weights that processes share out" in message and "AdamW8bit" in message


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("strategy", "callbacks", "wrong"),
    [
        ("ModelParallelStrategy", 1, r"Tensor parallelism, .* is not supported"),
        ("SingleDeviceStrategy", 2, "more than one RolloutCallback"),
    ],
)
def test_a_trainer_in_python_that_can_not_work(strategy, callbacks, wrong, model_folder, problems_file):
    from lightning.pytorch import Trainer, strategies

    from rlif_lightning.callbacks import RolloutCallback
    from rlif_lightning.data.module import PromptDataModule
    from rlif_lightning.data.problems import Source
    from rlif_lightning.errors import UserError
    from rlif_lightning.training.module import RLIFModule

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=getattr(strategies, strategy)(),
        logger=False,
        callbacks=[RolloutCallback(2, 2) for _ in range(callbacks)],
    )
    with pytest.raises(UserError, match=wrong):
        trainer.fit(RLIFModule(str(model_folder())), PromptDataModule(Source(str(problems_file))))
