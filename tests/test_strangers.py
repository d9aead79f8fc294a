"""Files of others that would hang, ask for all memory, leave their folder or write to the terminal."""

import json
import shutil
import time

import pytest
import yaml

from rlif_lightning.callbacks.completions import append_rows
from rlif_lightning.cli.strict_yaml import compose
from rlif_lightning.data import prompts
from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Template
from rlif_lightning.errors import UserError, escaped
from rlif_lightning.models.hub import load_config, resolve_model
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.lora import check_lora
from tests.conftest import make_tokenizer

ESCAPES = "\x1b[31m \x9b31m \x85 \u2028 \u202e \u2066 \x00"
SHOWN = r"\u001b[31m \u009b31m \u0085 \u2028 \u202e \u2066 \u0000"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% import '/etc/passwd' as x %}{{ x }}",
    ],
    ids=["loops", "power", "recursion", "import"],
)
def test_a_chat_template_ends(monkeypatch, template):
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.2)
    start = time.process_time()
    with pytest.raises(UserError, match="The chat template fails"):
        Template(chat_template=template).render(Problem("1+1", None), make_tokenizer())
    assert time.process_time() - start < 5


def test_aliases_are_bounded():
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    laughs += "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(yaml.YAMLError, match="aliases written out"):
        compose(laughs)
    merged = "a: &a {x: 1}\n" + "".join(f"b{n}: {{<<: *a}}\n" for n in range(100))
    assert len(compose(merged).value) == 101


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder(), tmp_path / "model")


@pytest.mark.parametrize(
    "size", [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"text_config": {"n_layer": 10**9}}]
)
def test_a_model_beyond_any_size_is_refused_by_its_config(folder, size):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | size))
    with pytest.raises(UserError, match="larger than any"):
        resolve_model(str(folder))


def test_an_index_stays_in_its_folder(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other/model.safetensors"}}')
    with pytest.raises(UserError, match="outside of its folder"):
        resolve_model(str(folder))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_of_the_hub_is_code(folder, key):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "strange/kernel"}))
    with pytest.raises(UserError, match="attention is code of the hub"):
        load_config(str(folder), trust_remote_code=False)
    assert load_config(str(folder), trust_remote_code=True)._attn_implementation == "strange/kernel"


@pytest.mark.parametrize("lora", [{"r": 10**9}, {"r": 0}, {"r": 4, "rank_pattern": {"q_proj": 10**9}}])
def test_ranks_are_bounded(lora):
    with pytest.raises(UserError, match="rank is out of range"):
        check_lora(lora)


def test_code_of_a_model_is_said():
    with pytest.warns(UserWarning, match="runs the Python code that comes with x/y"):
        PolicySettings("x/y", trust_remote_code=True).check()


def test_texts_of_others_do_not_act_on_the_terminal(tmp_path, capsys, monkeypatch):
    from rlif_lightning import main

    assert escaped(f"a\tb\né 漢 {ESCAPES}") == f"a\tb\né 漢 {SHOWN}"
    assert str(UserError("x", got=ESCAPES)) == f"x\n  got: {SHOWN}"
    monkeypatch.setattr(main, "dispatch", lambda arguments: print(ESCAPES))
    main.main([])
    assert capsys.readouterr().out == SHOWN + "\n"
    append_rows(tmp_path / "rows", [{"text": f"漢 {ESCAPES}"}])
    text = (tmp_path / "rows").read_text()
    assert text == f'{{"text": "漢 {SHOWN}"}}\n'
    assert json.loads(text) == {"text": f"漢 {ESCAPES}"}
