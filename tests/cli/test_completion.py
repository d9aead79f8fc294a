"""Completion in bash: what it offers for the beginning of a line."""

import shutil
import subprocess
import sys

import pytest

from rlif_lightning.main import main

OFFER = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_shtab_rlif rlif "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_offers_commands_settings_recipes_and_files(capsys, tmp_path):
    pytest.importorskip("shtab", reason="shtab, which writes completions, is not installed")
    main(["--print_completion", "bash"])
    (tmp_path / "rlif.bash").write_text(capsys.readouterr().out)
    (tmp_path / "own.yaml").touch()
    (tmp_path / "runs").mkdir()

    def offered(*words):
        line = ["bash", "-c", OFFER, "bash", "rlif.bash", "rlif", *words]
        return subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()

    assert offered("di") == ["diagnose"]
    assert offered("fit", "--model.na") == ["--model.name"]
    assert offered("fit", "--limi") == [] and offered("test", "--limi") == ["--limit"]
    assert offered("fit", "--guard.act") == ["--guard.action"] and offered("test", "--guard.act") == []
    assert offered("fit", "--config", "math") == ["math500"]
    assert offered("fit", "--config", "ow") == ["own.yaml"]
    assert offered("export", "ru") == ["runs"]


@pytest.mark.parametrize("words", [[], ["bsh"], ["bash", "zsh"]])
def test_another_shell_is_refused(words, capsys):
    pytest.importorskip("shtab", reason="shtab, which writes completions, is not installed")
    with pytest.raises(SystemExit) as exit_:
        main(["--print_completion", *words])
    assert exit_.value.code == 2 and "expected: one of bash" in capsys.readouterr().err


def test_the_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit):
        main(["--print_completion", "bash"])
    assert "pip install shtab" in capsys.readouterr().err
