"""The command line: what each command reads, refuses and suggests; no model is loaded before it is needed."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch  # noqa: F401  its log goes to the stderr of its import, which must not be a test's
import pytest
import yaml

from rlif_lightning.cli.help_text import ALIASES, SETTINGS
from rlif_lightning.main import main

NOWHERE = "/nowhere/at/all"


@pytest.fixture
def no_loading(monkeypatch):
    """Any attempt to load a model or a tokenizer fails the test."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def refuse(*args, **kwargs):
        raise AssertionError("a model or a tokenizer was loaded")

    for cls in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(cls, "from_pretrained", refuse)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch, no_loading):
    """``refused("fit", ...)``: the command's complaint, which exits with 2, is short and shows no traceback."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in args])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert err.startswith("error: "), err
        assert len(err.splitlines()) <= 3, err
        assert max(map(len, err.splitlines())) <= 400, err
        return err

    return run


@pytest.fixture
def settings(capsys, tmp_path, monkeypatch, no_loading):
    """``settings("fit", ...)``: what --print_config says."""
    monkeypatch.chdir(tmp_path)

    def run(command, *args):
        with pytest.raises(SystemExit) as exit_:
            main([command, *map(str, args), "--print_config"])
        assert exit_.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


# -- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_loads_nothing_and_begins_with_one_line_of_usage(command, capsys, no_loading):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert out.splitlines()[0] == f"usage: rlif {command} [--config RECIPE ...] [--setting VALUE ...]"
    assert "--model.name" in out
    assert "--evaluation.samples" in out
    assert len(out.splitlines()) <= 45 and max(map(len, out.splitlines())) <= 80


def test_the_examples_of_the_help_are_settings(settings):
    """Every example of the screen is taken by the command, and means what its name says."""
    words = [
        (f"--{name}", value) for name, value, _, use in SETTINGS if "fit" in use and name not in ("config", "runs")
    ]
    taken = settings("fit", "--config", "gsm8k", *(word for pair in words for word in pair))
    assert taken["model"]["optimizer"]["init_args"]["lr"] == 1e-5 and taken["trainer"]["max_steps"] == 60
    assert taken["model"]["lora"] == {"r": 32} and taken["guard"]["action"] == "stop"


@pytest.mark.parametrize("name", ALIASES.values())
def test_names_of_other_tools_lead_to_settings_of_the_help(name):
    assert name in {setting for setting, *_ in SETTINGS} | {"trainer.max_epochs"}


def test_help_about_a_word(capsys):
    helps = {}
    for word in ("all", "guard", "lr"):
        with pytest.raises(SystemExit):
            main(["fit", "--help", word])
        helps[word] = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in helps["all"] and "--rollout.top_p" in helps["all"]
    assert "--guard.action" in helps["guard"] and "--rollout.top_p" not in helps["guard"]
    assert "--model.optimizer.lr" in helps["lr"]


def test_help_names_every_command(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("fit", "validate", "test", "predict", "report"))


def test_without_a_command_the_help_is_shown_and_the_exit_code_says_that_nothing_was_done(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "rlif fit --config quickstart" in capsys.readouterr().out


def test_version(capsys):
    main(["--version"])
    assert version("rlif-lightning") in capsys.readouterr().out


def test_help_and_version_import_no_framework():
    """``rlif --help`` used to take five seconds: it imported torch, Lightning and transformers."""
    code = (
        "import sys\nfrom rlif_lightning.main import main\n"
        "for words in (['--help'], ['--version'], ['fit', '--help'], ['fit', '--lr', '1'], ['fit', '--config', 'gsm']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("text", ["Q: {question}", "# {question}", "Q: # {question}"])
@pytest.mark.parametrize("form", ["one word", "two words"])
def test_texts_of_a_source_are_no_yaml_on_the_command_line(form, text, settings):
    names = ("--data.val.prompt", "--data.val.gold", "--data.answers.completion")
    given = [[f"{name}={text}"] if form == "one word" else [name, text] for name in names]
    data = settings("fit", *(word for words in given for word in words), "--config", "quickstart")["data"]
    assert data["val"]["prompt"] == data["val"]["gold"] == data["answers"]["completion"] == text
    assert data["val"]["path"] == "toy" and data["answers"]["compare"] == "exact", "the rest stays"


def test_texts_within_a_source_are_no_yaml_either(settings):
    words = ["--data.train.path=toy", "--data.train.answers.completion", "A: (.+)", "--data.train.by", "[a, 3]"]
    train = settings("fit", *words, "--data.train.prompt=[a]")["data"]["train"]
    assert (train["answers"]["completion"], train["by"], train["prompt"]) == ("A: (.+)", "[a, 3]", "[a]")
    assert settings("fit", words[0], "--data.train.by=[a, b]")["data"]["train"]["by"] == ["a", "b"]


@pytest.mark.parametrize(
    ("setting", "name", "path"),
    [
        ("model.optimizer", "SGD", "torch.optim.SGD"),
        ("rollout.sampler", "NativeSampler", "rlif_lightning.sampling.NativeSampler"),
        ("trainer.logger", "CSVLogger", "lightning.pytorch.loggers.CSVLogger"),
    ],
)
def test_a_class_named_alone_is_that_of_the_settings_own_package(setting, name, path, settings, tmp_path):
    """A recipe's class of another package (an optimizer of bitsandbytes) made SGD ambiguous."""
    (tmp_path / "others.py").write_text(
        "import torch, lightning.pytorch.loggers as loggers, rlif_lightning.sampling as sampling\n"
        "class SGD(torch.optim.SGD):\n    def __init__(self, params, lr: float, blocks: int = 3): ...\n"
        "class CSVLogger(loggers.CSVLogger): ...\n"
        "class NativeSampler(sampling.NativeSampler): ...\n"
    )
    group, _, key = setting.partition(".")
    recipe = {group: {key: {"class_path": f"others.{name}", "init_args": {}}}}
    needed = {"model.optimizer": {"lr": 0.1, "blocks": 2}, "trainer.logger": {"save_dir": "x"}}.get(setting, {})
    recipe[group][key]["init_args"] = needed
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    found = settings("fit", "--config", "own.yaml", f"--{setting}", name)[group][key]
    assert found["class_path"] == path
    assert "blocks" not in found["init_args"] and found["init_args"].get("lr", 0.1) == 0.1


def test_an_empty_group_of_a_recipe_sets_nothing(settings, tmp_path):
    (tmp_path / "own.yaml").write_text("rollout:\n")
    (tmp_path / "other.yaml").write_text("guard: ~\nckpt_path: null\nrollout: {group_size: 4}\n")
    found = settings("fit", "--config", "quickstart", "--config", "own.yaml", "--config", "other.yaml")
    assert (found["rollout"]["group_size"], found["rollout"]["max_new_tokens"]) == (4, 32)


def test_print_config_asks_for_no_model(settings):
    config = settings("fit", "--config", "quickstart", "--model.name", NOWHERE)
    assert config["model"]["name"] == NOWHERE
    assert config["rollout"]["group_size"] == 8


def test_print_config_prints_nothing_else_and_imports_no_architecture(tmp_path):
    """Seen from outside: no deprecation warnings of the libraries between us and the command line."""
    code = (
        "import sys\nfrom rlif_lightning.main import main\n"
        f"try: main(['fit', '--config', 'quickstart', '--model.name', {NOWHERE!r}, '--print_config'])\n"
        "finally: print('FOUND', [m for m in sys.modules if '.modeling_llama' in m or m == 'peft.peft_model'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "FOUND []"
    assert yaml.safe_load(done.stdout.rpartition("FOUND")[0])["model"]["name"] == NOWHERE
    assert done.stderr == ""


# -- what is refused ----------------------------------------------------------------------------------------

# ruff: noqa: E501  the table reads best in one line each
MISTAKES = {  # the words of a command, and what its complaint must hold
    "command": (["fitt"], "'fitt'", "rlif fit?"),
    "other command": (["repport"], "'repport'", "rlif report?"),
    "recipe as command": (["quickstart"], "'quickstart'", "rlif fit --config quickstart?"),
    "option first": (["--config", "quickstart", "fit"], "comes first", "rlif fit --config"),
    "recipe": (["fit", "--config", "quickstar"], "'quickstar'", "'quickstart'"),
    "recipe file": (["fit", "--config", "quickstart.yaml"], "does not exist", "'quickstart'"),
    "recipe as word": (["fit", "quickstart"], "'quickstart'", "--config quickstart?"),
    "key": (["fit", "--rollout.group_sise", "4"], "'--rollout.group_sise'", "--rollout.group_size?"),
    "abbreviation": (["fit", "--trainer.max_step", "1"], "'--trainer.max_step'", "--trainer.max_steps?"),
    "room": (["fit", "--rolout.group_size=4"], "'--rolout.group_size'", "--rollout.group_size?"),
    "key of a source": (["fit", "--data.train.pth", "x"], "data.train", "path?"),
    "key of an optimizer": (
        ["fit", "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lrr", "1"], "'lrr'", "lr?",
    ),
    "key of a reward": (
        ["fit", "--rollout.rewards=[SelfCertainty]", "--rollout.rewards.agregation=sum"], "'agregation'", "aggregation?",
    ),
    "number": (["fit", "--rollout.group_size", "eight"], "rollout.group_size can't be 'eight'", "a whole number"),
    "number or null": (["fit", "--evaluation.n", "x"], "evaluation.n can't be 'x'", "a whole number or null"),
    "truth": (["fit", "--model.gradient_checkpointing", "maybe"], "'maybe'", "true or false"),
    "choice": (["fit", "--model.loss", "grpoo"], "grpo, dapo, bnpo, dr_grpo, gspo or cispo", "did you mean grpo?"),
    "choice in a group": (["fit", "--data.answers.compare", "mat"], "data.answers.compare", "did you mean math?"),
    "number in a group": (["fit", "--data.train.limit", "x"], "data.train.limit can't be 'x'", "a whole number or null"),
    "class in a list": (
        ["fit", "--rollout.rewards=[SelfCertanty]"], "'SelfCertanty'", "rlif_lightning.rewards.SelfCertainty?",
    ),
    "class without list": (["fit", "--rollout.rewards=SelfCertanty"], "rewards.SelfCertainty?"),
    "class path": (["fit", "--model.optimizer=torch.optim.AdmW"], "'torch.optim.AdmW'", "torch.optim.AdamW?"),
    "sampler": (["fit", "--rollout.sampler=NativSampler"], "'NativSampler'", "rlif_lightning.sampling.NativeSampler?"),
    "list for a class": (["fit", "--model.optimizer=[SGD]"], "model.optimizer can't be '[SGD]'", "AdamW"),
    "nothing for a class": (["fit", "--rollout.rewards={}"], "rollout.rewards can't be '{}'", "SelfCertainty"),
    "setting next to a class path": (
        ["fit", "--model.optimizer={class_path: SGD, lr: 0.1}"], "takes class_path and init_args, not 'lr'", "below init_args",
    ),
    "nothing for a group": (["fit", "--rollout="], "rollout takes settings, not ''", "--rollout.prompts_per_step"),
    "callback": (["fit", "--trainer.callbacks+=EarlyStoping"], "'EarlyStoping'", "lightning.pytorch.callbacks.EarlyStopping?"),
    "wrong class": (["fit", "--rollout.rewards=[torch.nn.Linear]"], "torch.nn.Linear is no Reward", "SelfCertainty"),
    "text for a group": (["fit", "--data.train", "p.jsonl"], "'p.jsonl'", "--data.train.path p.jsonl?"),
    "source without a path": (["fit", "--data.test.limit", "7"], "data.test.path is missing", "--data.test.path VALUE"),
    "class without its setting": (
        ["fit", "--rollout.rewards=[Length]"], "rollout.rewards: Length needs its setting 'prefer'", "--rollout.rewards.prefer",
    ),
    "settings before the class": (["fit", "--rollout.rewards.weight", "1"], "the class comes before", "SelfCertainty"),
    "value of a reward": (
        ["fit", "--rollout.rewards=[SelfCertainty]", "--rollout.rewards.aggregation", "summ"],
        "rollout.rewards.aggregation can't be 'summ'", "did you mean sum?",
    ),
    "value of an optimizer": (
        ["fit", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.betas=[0.9]"],
        "model.optimizer.betas can't be '[0.9]'", "a list of 2 values",
    ),
    "class without every method": (["fit", "--rollout.sampler=torch.nn.Linear"], "torch.nn.Linear is no Sampler", "NativeSampler"),
    "class of a help": (["fit", "--rollout.rewards.help", "SelfCertanty"], "'SelfCertanty'", "rlif_lightning.rewards.SelfCertainty?"),
    "empty value": (["fit", "--rollout.group_size="], "rollout.group_size can't be ''", "a whole number"),
    "text for a group of settings": (["fit", "--model", "qwen"], "'qwen'", "--model.name qwen?"),
    "no value": (["fit", "--model.name"], "--model.name", "no value"),
    "key twice in a value": (["fit", "--model.lora={r: 4, r: 8}"], "model.lora can't be", "'r' stands twice"),
    "digits": (["fit", f"--rollout.group_size={'1' * 5000}"], "rollout.group_size can't be '111", "a number of 5000 digits"),
    "64 bits": (["fit", f"--trainer.max_steps={10**20}"], "trainer.max_steps is out of range", str(10**20)),
    "not a number": (["fit", "--model.kl_coefficient=.nan"], "model.kl_coefficient is out of range", "nan"),
    "not a number in a list": (["fit", "--rollout.agreement_band=[0.1,.nan]"], "rollout.agreement_band is out of range", "nan"),
    "keyword of no class": (
        ["fit", "--rollout.rewards={class_path: TokenEntropy, dict_kwargs: {a: 1}}"], "TokenEntropy can't be made", "keyword argument 'a'",
    ),
    "nothing for a name": (["fit", "--ckpt_path="], "ckpt_path is empty", "write --ckpt_path VALUE"),
    "nothing for a model": (["fit", "--model.name="], "model.name is empty", "write --model.name VALUE"),
    "tokens": (["fit", f"--rollout.max_new_tokens={10**12}"], "max_new_tokens is out of range", "1 to 10000000"),
    "group": (["fit", f"--rollout.group_size={10**12}"], "A rollout is too large", "at most 10000000"),
    "passes": (["fit", f"--rollout.passes={10**12}"], "passes is out of range", "1 to 10000000"),
    "votes": (["fit", f"--rollout.votes={10**12}"], "rollout.votes is out of range", "to 10000000"),
    "samples": (["fit", f"--evaluation.samples={10**12}"], "evaluation.samples is out of range", "0 to 10000000"),
    "seed": (["fit", "--seed_everything", "-1"], "seed_everything is out of range", "0 to 4294967295"),
    "renamed": (["fit", "--probe.action", "off"], "no setting probe.action any more", "memory_check.action"),
    "removed": (["fit", "--model.dropout=true"], "no setting model.dropout any more", "dropout is always off"),
    "removed from a class": (
        ["fit", "--rollout.sampler=rlif_lightning.sampling.NativeSampler", "--rollout.sampler.plain=true"], "rollout.sampler.plain any more", "leave it out",
    ),
    "callback that is there": (
        ["fit", "--trainer.callbacks=[rlif_lightning.callbacks.RolloutCallback]"], "names RolloutCallback", "--rollout.*",
    ),
    "abstract reward": (["fit", "--rollout.rewards=rlif_lightning.rewards.InternalReward"], "lacks a method", "statistic(self, logp)"),
    "logger that is none": (["fit", "--trainer.logger=maybe"], "trainer.logger can't be 'maybe'", "true or false"),
    "package": (["fit", "--trainer.logger", "CometLogger"], "trainer.logger: CometLogger needs comet", "pip install comet"),
    "package of Lightning": (["fit", "--trainer.strategy.class_path=XLAStrategy"], "XLAStrategy needs torch_xla", "pip install torch_xla"),
    "word": (["fit", "extra"], "'extra'", "settings begin with --"),
    "missing": (["fit"], "--model.name is missing", "--config"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_three_lines_with_a_suggestion(mistake, refused):
    args, *parts = MISTAKES[mistake]
    if args[0] == "fit" and mistake not in ("missing", "class of a help"):
        args = [*args, *([] if args[-1].startswith("--model.name") else ["--model.name", NOWHERE])]
    message = refused(*args)
    assert all(part in message for part in parts), message


def test_a_word_of_the_command_line_is_not_looked_for_in_a_recipe(refused):
    message = refused("fit", "--config", "quickstart", "--rollout.rewards", "rlif_lightning.rewards.SelfCertanty")
    assert message.startswith("error: rollout.rewards: there is no class")


def test_a_word_after_a_runs_own_recipe_is_not_looked_for_in_it(refused, tmp_path):
    run = tmp_path / "runs/a/1"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/last.ckpt").touch()
    (run / "config.yaml").write_text("model: {name: x}\nevaluation: {predictions: rows}\n")
    assert refused("export", run, "--format", "lora").startswith("error: format can't be 'lora'\n")


def test_a_right_setting_before_the_wrong_one_is_not_blamed(refused):
    """The braces of a template were read as a mapping, and the template refused."""
    words = ["--model.name", NOWHERE, "--data.template={prompt}", "--data.train.gold=[#]+(.+)", "--evaluation.n=null"]
    assert "guard.signals" in refused("fit", *words, "--guard.signals=[agreemnt]")


def test_no_reward_at_all(refused):
    assert "rollout.rewards is empty" in refused("fit", "--config", "quickstart", "--rollout.rewards=[]")


def test_ctrl_c_outside_of_training_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlif_lightning.main.dispatch", interrupt)
    with pytest.raises(SystemExit) as exit_:
        main(["fit"])
    assert exit_.value.code == 130
    assert capsys.readouterr().err.strip() == "Stopped."


FILES = {  # a recipe, and what its complaint must hold: always the file, and the line where there is one
    "rollout: {group_sise: 4}": ("line 1", "rollout.group_size?"),
    "model:\n  name: x\nrolout:\n  group_size: 4": ("line 4", "rollout.group_size?"),
    "rollout:\n  group_size: eight": ("line 2", "a whole number"),
    "rollout:\n  group_size: 4\n   rewards: [": ("line 3", "not valid YAML"),
    "\tmodel: x": ("line 1", "not valid YAML"),
    "- a\n- b": ("holds no settings",),
    "rollout: {group_size: 4}\nguard: {}\nrollout: {passes: 1}": (
        "line 3",
        "'rollout' stands twice, here and in line 1",
    ),
    "rollout: {passes: 1}\nrollout.group_size: 4": ("line 2", "'rollout' stands twice, here and in line 1"),
    "rollout.group_size: 4\nrollout: {passes: 1}": ("line 2", "'rollout' stands twice, here and in line 1"),
    "rollout:\n  rewards:\n  - class_path: SelfCertainty\n    init_args:\n      k: 1\n      weight: 1\n      k: 2": (
        "line 7",
        "'k' stands twice, here and in line 5",
    ),
    "rollout:\n  rewards: [TokenEntropy]\n  rewards+: [Random]": (
        "line 3",
        "'rewards' stands twice, here and in line 2",
    ),
    "? [a]\n: 1": ("line 1", "a name is not a word"),
    "model: !!python/name:os.system": ("line 1", "an unknown tag"),
    "rollout:\n  rewards:\n  - class_path: SelfCertainty\n    init_args: 3": (
        "line 3",
        "init_args takes settings, not '3'",
    ),
    "a: &a {b: *a}": ("line 1", "an anchor holds itself"),
    f"rollout: {{group_size: {'1' * 5000}}}": ("line 1", "a number of 5000 digits"),
    "evaluation: {<<: {n: 7}, n: 9}\nguard: {acton: warn}": ("line 2", "did you mean guard.action?"),
    "model: {dropout: true}": ("line 1", "dropout is always off"),
    "guard:\n  lag: 0\nprobe:\n  action: try": ("line 4", "memory_check.action"),
    "": ("is empty",),
    "rollout:\n  rewards:\n  - class_path: rlif_lightning.rewards.SelfCertanty": ("line 3", "rewards.SelfCertainty?"),
    "rollout:\n  rewards:\n  - class_path: SelfCertainty\n    init_args: {agregation: sum}": (
        "line 4",
        "aggregation?",
    ),
    "rollout:\n  rewards:\n  - class_path: SelfCertainty\n    init_args:\n      aggregation: summ": (
        "line 5",
        "mean?",
        "sum?",
    ),
    "rollout:\n  rewards:\n  - class_path: SelfCertainty\n  - class_path: Length": (
        "line 4",
        "Length needs",
        "'prefer'",
    ),
    "rollout:\n  rewards:\n  - class_path: SelfCertainty\n    weight: 3": ("line 4", "below init_args"),
    "rollout: 3": ("line 1", "rollout takes settings"),
    "guard: {}\nrollout: []": ("line 2", "rollout takes settings, not '[]'"),
    "guard:\n  action: off": ("line 2", "guard.action can't be 'False'", "put it into quotes: 'off'"),
    "model: {name: 123}": ("line 1", "put it into quotes: '123'"),
    "trainer: {max_steps: 010}": ("line 1", "010 is a number to base 8 or 60"),
    "trainer: {max_steps: 1:30}": ("line 1", "1:30 is a number to base 8 or 60"),
    "rollout:\n  rewards:\n  - null": ("line 3", "rollout.rewards can't be 'null'"),
    'rollout: ""': ("line 1", "rollout takes settings, not ''"),
    "data:\n  train: {path: a, by: [a, 3]}": ("line 2", "data.train.by can't be '3'", "text"),
    "model:\n  optimizer: [SGD]": ("line 2", "can't be '['SGD']'"),
    "model:\n  optimizer:\n    init_args: {lr: fast}": ("line 3", "a number"),
    "data:\n  val: null\n  train: {path: p.jsonl, promt: x}": ("line 3", "did you mean prompt?"),
    "data:\n  train: p.jsonl": ("line 2", "did you mean data.train.path: p.jsonl?"),
    "data:\n  answers:\n    compare: mat": ("line 3", "did you mean math?"),
    "trainer:\n  max_steps: 1\n  max_step: 4": ("line 3", "trainer.max_steps?"),
    "model:\n  name: x\n  optimizer:\n    class_path: torch.optim.AdamW\n    init_args: {lrr: 1}": ("line 5", "lr?"),
}


@pytest.mark.parametrize("text", FILES)
def test_a_mistake_in_a_recipe_is_named_by_file_and_line(text, refused, tmp_path):
    """jsonargparse names neither; an overlay among several is then hard to find."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/overlay.yaml").write_text(text)
    message = refused("fit", "--config", "quickstart", "--config", "own/overlay.yaml", "--model.name", NOWHERE)
    place, *parts = FILES[text]
    assert "own/overlay.yaml" in message
    assert place in message
    assert any(p in message for p in parts) or not parts, message


def test_a_recipe_that_is_no_text(refused, tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"model: {name: \xff}")
    assert "a.yaml" in refused("fit", "--config", "a.yaml")


def test_lightnings_own_refusals_are_mistakes_not_crashes(rlif, capsys, small_fit):
    for wrong in ("--trainer.accelerator=cppu", "--trainer.max_steps=-5", "--trainer.devices=x"):
        with pytest.raises(SystemExit) as exit_:
            rlif("fit", *small_fit, wrong)
        err = capsys.readouterr().err
        assert exit_.value.code == 2
        assert err.splitlines()[-3] == "error: The Trainer refuses its settings"
        assert not (Path.cwd() / "runs").exists()


# -- how recipes compose ------------------------------------------------------------------------------------


def write(path, **content):
    Path(path).write_text(yaml.safe_dump(content))
    return path


def test_later_recipes_win_and_the_command_line_wins_over_all(settings, tmp_path):
    one = write(tmp_path / "one.yaml", rollout={"group_size": 4, "prompts_per_step": 6, "max_new_tokens": 9})
    two = write(tmp_path / "two.yaml", rollout={"group_size": 5, "prompts_per_step": 7})
    configs = ["--config", "quickstart", "--config", one, "--config", two]
    rollout = settings("fit", *configs, "--rollout.group_size=6")["rollout"]
    assert (rollout["group_size"], rollout["prompts_per_step"], rollout["max_new_tokens"]) == (6, 7, 9)
    assert settings("fit", *configs)["rollout"]["group_size"] == 5


def test_the_command_line_wins_wherever_it_stands(settings, tmp_path):
    one = str(write(tmp_path / "one.yaml", rollout={"group_size": 4, "max_new_tokens": 9}))
    two = str(write(tmp_path / "two.yaml", rollout={"group_size": 5, "prompts_per_step": 7}))
    words = ["--rollout.group_size", "6", "-c", "quickstart", "--rollout.passes=2", f"--config={one}", f"-c{two}"]
    for command in ("fit", "diagnose", "plan", "export"):
        rollout = settings(command, *words)["rollout"]
        found = [rollout[name] for name in ("group_size", "passes", "max_new_tokens", "prompts_per_step")]
        assert found == [6, 2, 9, 7]
    words = ["--rollout.rewards+", "Length", "--rollout.rewards.prefer=long", "--config", "quickstart"]
    assert [name for name, _ in rewards_of(settings("fit", *words))] == ["SelfCertainty", "Length"]


def test_a_recipe_without_a_value_takes_no_word_of_others(refused):
    assert "'extra'" in refused("fit", "extra", "--config")


def test_anchors_and_merge_keys_stay_legal(settings, tmp_path):
    text = "evaluation: &e {<<: {n: 7, every: 3}, n: 9}\nguard: &g {action: stop}\n"
    (tmp_path / "a.yaml").write_text(text)
    config = settings("fit", "--config", "quickstart", "--config", "a.yaml")
    assert (config["evaluation"]["n"], config["evaluation"]["every"], config["guard"]["action"]) == (9, 3, "stop")
    words = ["--config", "quickstart", "--data.system_prompt", "{a: 1, a: 2}"]  # a text, whatever it looks like
    assert settings("fit", *words)["data"]["system_prompt"] == "{a: 1, a: 2}"


OLD = """model: {name: x, dropout: true, plain_forward: false}
probe: {action: try}
guard: {lag: 2, action: stop}
completions: {show: 4, every: 3}
"""


def test_settings_that_were_removed_are_left_out_where_they_change_nothing(settings, refused, tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text(OLD)
    with pytest.warns(UserWarning, match="removed.*probe.action, model.dropout, model.plain_forward, guard.lag"):
        config = settings("test", "--config", old)
    assert (config["guard"]["action"], config["completions"]) == (
        "stop",
        {"every": 3, "keep": 32, "limit_mb": 1000},
    )
    assert config["memory_check"] == {"action": "auto"} and not {"lag", "probe", "show"} & {*config, *config["guard"]}
    with pytest.warns(UserWarning, match="removed"):
        assert "old.yaml, line 1: There is no setting model.dropout any more" in refused("fit", "--config", old)
    old.write_text(OLD.replace("true", "false").replace("lag: 2", "lag: 0").replace("try", "auto"))
    with pytest.warns(UserWarning, match="removed"):
        assert settings("fit", "--config", old)["guard"]["action"] == "stop"


def rewards_of(config):
    return [(r["class_path"].split(".")[-1], r["init_args"]) for r in config["rollout"]["rewards"]]


def test_an_overlay_replaces_the_list_of_rewards_whole(settings, tmp_path):
    """Two rewards with settings, then one of another class: nothing of the two may be left in it."""
    room = "rlif_lightning.rewards."
    two = [
        {"class_path": room + "TokenEntropy", "init_args": {"aggregation": "sum", "weight": 0.5}},
        {"class_path": room + "Random", "init_args": {"weight": 0.25}},
    ]
    first = write(tmp_path / "first.yaml", rollout={"rewards": two})
    second = write(tmp_path / "second.yaml", rollout={"rewards": [{"class_path": room + "TrajectoryEntropy"}]})
    same = write(tmp_path / "same.yaml", rollout={"rewards": [{"class_path": room + "TokenEntropy"}]})
    configs = ["--config", "quickstart", "--config", first]
    assert [name for name, _ in rewards_of(settings("fit", *configs))] == ["TokenEntropy", "Random"]
    default = {"aggregation": "mean", "k": 16, "q": 0.2, "annotator": "policy", "weight": 1.0}
    one = settings("fit", *configs, "--config", second)
    assert rewards_of(one) == [("TrajectoryEntropy", default)]
    again = settings("fit", *configs, "--config", same)
    assert rewards_of(again) == [("TokenEntropy", default)]
    back = settings("fit", *configs, "--config", second, "--config", first)
    assert [(n, a["weight"]) for n, a in rewards_of(back)] == [("TokenEntropy", 0.5), ("Random", 0.25)]


@pytest.mark.parametrize("reward", ["SelfCertainty", "TokenEntropy"])
def test_a_list_as_long_as_the_one_before_inherits_nothing(settings, tmp_path, reward):
    """The frozen annotator of one overlay's reward must not stay in that of the next."""
    path = f"rlif_lightning.rewards.{reward}"
    for number, item in enumerate((reward, path, {"class_path": path})):
        overlay = write(tmp_path / f"{number}.yaml", rollout={"rewards": [item]})
        found = settings("fit", "--config", "quickstart", "--config", "frozen_annotator", "--config", overlay)
        assert [(name, own["annotator"]) for name, own in rewards_of(found)] == [(reward, "policy")]
    for words in ([f"--rollout.rewards=[{reward}]"], ["--rollout.rewards", f"[{{class_path: {path}}}]"]):
        found = settings("fit", "--config", "quickstart", "--config", "frozen_annotator", *words)
        assert [(name, own["annotator"]) for name, own in rewards_of(found)] == [(reward, "policy")]
    part = write(tmp_path / "part.yaml", rollout={"rewards": [{"init_args": {"weight": 2.0}}]})
    ((_, own),) = rewards_of(
        settings("fit", "--config", "quickstart", "--config", "frozen_annotator", "--config", part)
    )
    assert (own["annotator"], own["weight"]) == ("reference", 2.0)


def test_an_overlay_from_the_command_line_replaces_the_rewards(settings):
    config = settings("fit", "--config", "quickstart", "--rollout.rewards=[Random]")
    assert [name for name, _ in rewards_of(config)] == ["Random"]


def test_a_local_file_wins_over_a_shipped_recipe_only_where_it_is_named_as_a_path(settings, tmp_path):
    for name in ("quickstart", "quickstart.yaml"):
        write(tmp_path / name, model={"name": "local"}, rollout={"group_size": 3})
    assert settings("fit", "--config", "quickstart")["rollout"]["group_size"] == 8
    assert settings("fit", "--config", "./quickstart")["rollout"]["group_size"] == 3
    assert settings("fit", "--config", "quickstart.yaml")["rollout"]["group_size"] == 3


def test_a_folder_is_no_recipe(refused, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    assert "does not exist" in refused("fit", "--config", "folder.yaml")


def test_the_run_folder_is_named_after_the_recipes(rlif, small_fit, tmp_path):
    own = write(tmp_path / "b.yaml", rollout={"temperature": 0.9})
    args = ["--config", "self_certainty", "--config", own, *small_fit, "--trainer.max_steps=1"]
    folder = rlif("fit", *args) / "runs/self_certainty+b/1"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["rollout"]["temperature"] == 0.9
    assert json.loads((folder / "completions.jsonl").read_text().splitlines()[0])["step"] == 0
    # config.yaml is a recipe itself
    rlif("fit", "--config", folder / "config.yaml", "--trainer.max_steps=1")
    assert (tmp_path / "runs/config/1/metrics.csv").is_file()


def test_a_warning_of_ours_is_its_text_and_others_keep_their_place(rlif, small_fit, recwarn):
    import warnings

    from rlif_lightning.callbacks import guard

    rlif("fit", *small_fit, "--trainer.max_steps=1")
    assert warnings.formatwarning("text", UserWarning, guard.__file__, 7) == "warning: text\n"
    assert "elsewhere.py:7" in warnings.formatwarning("text", UserWarning, "/somewhere/elsewhere.py", 7)
