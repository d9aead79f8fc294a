"""``--print_config``: a recipe with a line about each setting, which gives the same settings when it is read."""

from itertools import pairwise

import pytest
import yaml

from rlif_lightning.cli.printed_config import with_comments
from rlif_lightning.main import main

PROMPT = "First: think.\n  rollout:\n# then: answer\n'name': \"x\"  # 1"


@pytest.fixture
def printed(capsys, tmp_path, monkeypatch):
    """``printed("fit", ...)``: what the command prints."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        with pytest.raises(SystemExit) as exit_:
            main([*args, "--print_config"])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("command", ["fit", "test", "diagnose"])
def test_what_is_printed_is_read_as_the_same_settings(command, printed, tmp_path):
    words = ["--config", "gsm8k", "--data.system_prompt", PROMPT, "--trainer.callbacks+=Timer"]
    text = printed(command, *words)
    (tmp_path / "own.yaml").write_text(text)
    assert printed(command, "--config", "own.yaml") == text
    settings = yaml.safe_load(text)
    assert settings["data"]["system_prompt"] == PROMPT and settings["trainer"]["callbacks"]


def test_every_setting_of_ours_has_its_line(printed):
    lines = printed("fit", "--config", "quickstart").splitlines()
    assert max(map(len, lines)) <= 118 and not any("\b" in line or ":func:" in line for line in lines)
    above: dict[str, str] = {}
    for before, line in pairwise(lines):
        above.setdefault(line.strip(), before.strip())
    assert above["name: toy"] == "# The model: `toy`, a Hugging Face folder, or a name on the hub."
    assert above["lr: 0.0003"] == "# Learning rate."
    assert above["path: toy"].startswith("# A .jsonl"), "the first source of data is explained"
    assert above["ckpt_path: null"].startswith("# Checkpoint to start from")
    group, bare = "", []
    for before, line in pairwise(lines):
        indent = len(line) - len(line.lstrip())
        group = line if not indent else group
        if indent == 2 and ":" in line and line.strip()[0] not in "#-" and "#" not in before:
            bare.append(group + line.partition(":")[0])
    assert not bare, bare


def test_comments_stand_between_settings_only():
    """Each text comes once in a group, and never within a text of several lines."""
    recipe = "a:\n  x: 'one\n\n    y: two'\n  y: 3\n  z: 4\nb:\n  y: [1, 2]\nc: {}\n"
    texts = {
        "a.x": "First.",
        "a.y": "A ``y``; 100%%.",
        "a.z": "A ``y``; 100%%.",
        "b.y": "A ``y``; 100%%.",
        "c": "Last.",
    }
    said = with_comments(recipe, texts)
    assert yaml.safe_load(said) == yaml.safe_load(recipe)
    assert said == (
        "a:\n  # First.\n  x: 'one\n\n    y: two'\n  # A `y`; 100%.\n  y: 3\n  z: 4\n"
        "b:\n  # A `y`; 100%.\n  y: [1, 2]\n# Last.\nc: {}\n"
    )
    assert with_comments("null\n", texts) == "null\n"
