"""Names on the command line: typos, those of other tools, and settings that do nothing in a command."""

import subprocess
import sys

import pytest

from rlif_lightning.cli.given_names import INSTEAD, SHORT, UNUSED, USED, check_names, spelled_out
from rlif_lightning.cli.help_text import SETTINGS
from rlif_lightning.cli.parser import Parser
from rlif_lightning.cli.setting_names import CLASSES, setting_names
from rlif_lightning.cli.trainer import RLIFCLI
from rlif_lightning.data.module import PromptDataModule
from rlif_lightning.errors import UserError
from rlif_lightning.main import main
from rlif_lightning.training.module import RLIFModule


@pytest.fixture(scope="module")
def taken():
    """The names that the parser of ``rlif fit`` takes."""
    found = []

    def parse(self, *args, **kwargs):
        found.extend(action.dest for action in self._subcommands_action.choices["fit"]._actions)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse)
        with pytest.raises(SystemExit):
            RLIFCLI("fit", RLIFModule, PromptDataModule, **RLIFCLI.settings(["fit"]))
    return {name for name in found if not name.endswith(".help")}


def test_names_read_from_sources_are_those_of_the_parser(taken):
    assert {*setting_names(), *CLASSES} == taken


def test_what_is_unused_exists(taken):
    """A setting that was renamed must not stay in a table."""
    within = {name for whole in taken for name in (whole, whole.rpartition(".")[0])}
    for names in (*UNUSED.values(), USED, SHORT.values(), INSTEAD, {*INSTEAD.values()} - {*SHORT}):
        assert {*names} <= within | {"evaluation.limit"}


def test_the_help_of_a_command_shows_what_it_uses():
    also_used = {("fit", "data.test.path"), ("fit", "data.predict.path"), ("predict", "data.test.path")}
    for command in UNUSED:
        for name, _, _, commands in SETTINGS:
            words = spelled_out([f"--{name}"])
            if command in commands.split():
                check_names(command, words)
            elif (command, name) not in also_used:
                with pytest.raises(UserError, match="does nothing in rlif"):
                    check_names(command, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["test", "--evaluation.n", "50"], "--evaluation.n does nothing in rlif test\n  do: set --limit"),
        (["test", "--evaluation.every=5"], "leave it out; a recipe may hold it"),
        (["validate", "--trainer.limit_train_batches=2"], "does nothing in rlif validate"),
        (["validate", "--rollout.group_size=2"], "do: set --evaluation.samples"),
        (["predict", "--guard.action=stop"], "--guard.action does nothing"),
        (["predict", "--guard", "{action: stop}"], "--guard does nothing"),
        (["test", "--model.optimizer=torch.optim.SGD"], "does nothing"),
        (["test", "--model.optimizer.lr", "1"], "does nothing"),
        (["test", "--rollout.rewards+=Length"], "does nothing"),
        (["test", "--data.val.limit=5"], "does nothing"),
        (["test", "--lr", "1"], "--lr does nothing"),
        (["test", "--temperature", "1"], "did you mean --evaluation.temperature?"),
        (["test", "--limt", "1"], "did you mean --limit?"),
        (["fit", "--limit", "1"], "--limit does nothing in rlif fit\n  do: set --evaluation.n"),
        (["fit", "--lr", "1"], "did you mean --model.optimizer.lr?"),
        (["fit", "--model.nmae", "x"], "No setting is called '--model.nmae'\n  do: did you mean --model.name?"),
        (["fit", "--gaurd.action=stop"], "did you mean --guard.action?"),
        (["fit", "--xyz=stop"], "do: see rlif fit --help"),
    ],
)
def test_refused_by_its_name_alone(words, said, capsys, monkeypatch):
    monkeypatch.setattr("rlif_lightning.main.import_module", None)  # nothing heavy is imported for that
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "test",
            [
                "--rollout.sampler=x",
                "--rollout.sampler.rows=2",
                "--rollout.stop=[x]",
                "--model.lora={r: 2}",
                "--trainer.devices=2",
            ],
        ),
        ("test", ["--data.answers.completion=x", "--evaluation.limit=5", "--data.test.limit=5", "-chelp"]),
        ("predict", ["--data.test.path=x", "--data.predict.path=x", "--evaluation.predictions=rows"]),
        ("fit", ["--data.test.path=x", "--trainer.callbacks+=X", "--rollout.rewards.help", "--model", "{}"]),
        ("fit", ["--data.system_prompt", "--- Think = first", "--rollout.stop", "--- end"]),  # values
        ("fit", ["--model.dropout=true"]),  # which the parser knows as removed
    ],
)
def test_what_a_command_uses_is_left_to_its_parser(command, words):
    check_names(command, words)


def test_a_typo_imports_no_framework():
    """It took seven seconds of CPU time: torch, Lightning and transformers were imported."""
    code = (
        "import sys\nfrom rlif_lightning.main import main\n"
        "for words in (['fit', '--model.nmae', 'x'], ['test', '--evaluation.n', '5']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'lightning', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
