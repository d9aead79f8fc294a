"""Prompts that a model can't read: tokens without an embedding, and more tokens than it has positions for."""

import json
import shutil
import warnings

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from rlif_lightning.data.limits import learns_positions
from rlif_lightning.models.tokenizer import load_tokenizer
from tests.conftest import make_config
from tests.processes import used_by


@pytest.fixture
def model(model_folder, tmp_path):
    """``model(max_position_embeddings=24)``: the tiny model, or GPT-2, with other settings in config.json."""

    def make(kind="qwen2", tokens=(), **settings):
        folder = shutil.copytree(model_folder(), tmp_path / kind)
        if kind == "gpt2":
            sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4}
            config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **settings)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        else:
            file = folder / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        tokenizer.save_pretrained(folder)
        return folder

    return make


WORDS = {
    "fit": [],
    "validate": ["--data.val.path=data", "--data.val.answer=null"],
    "test": ["--data.test.path=data", "--data.test.answer=null"],
    "predict": ["--data.predict.path=data", "--data.predict.answer=null"],
    "diagnose": ["--prompts=2"],
    "mix": ["--prompts=2", "--tuned=model"],
}


@pytest.fixture
def said(rlif, small_fit, capsys, tmp_path, problems_file):
    """What a command says about a model and the problems, the training's or those that the command answers."""

    def run(command, folder, *more, problems=problems_file):
        args = [a for a in small_fit if a != str(problems_file)]
        args[args.index("--model.name") + 1] = folder
        args[args.index("--data.train.path")] = f"--data.train.path={problems}"
        words = [w.replace("=data", f"={problems}").replace("=model", f"={folder}") for w in WORDS[command]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rlif(command, *used_by(command, args), *words, *more)

    return run


@pytest.mark.parametrize("command", WORDS)
def test_a_token_without_an_embedding(command, said, model, tmp_path, capsys):
    """The embedding raised an IndexError with a traceback."""
    rows = [{"question": f"{i}?" + " <think>" * (i == 6), "answer": "#### 1"} for i in range(9)]
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as ended:
        said(command, model(tokens=["<think>"]), problems=problems)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert all(w in err for w in ("Line 7 of", "p.jsonl", "token 320, '<think>'", "ids below 320")), err


@pytest.fixture
def longest(model_folder, problems_file):
    """Tokens of the longest problem; the tokenizer is trained anew in each session."""
    tokenizer = load_tokenizer(str(model_folder()))
    return max(len(tokenizer(json.loads(line)["question"] + " ")["input_ids"]) for line in problems_file.open())


@pytest.mark.parametrize("command", WORDS)
def test_learned_positions_end(command, said, model, longest, capsys):
    """Of GPT-2 the embedding of positions raised an IndexError with a traceback."""
    with pytest.raises(SystemExit) as ended:
        said(command, model("gpt2", n_positions=longest + 7))
    err = capsys.readouterr().err
    assert ended.value.code == 2
    setting = "evaluation" if command in ("validate", "test", "predict") else "rollout"
    assert f"got: {longest} tokens (Line " in err and f"+ {setting}.max_new_tokens 8" in err
    assert f"at most {longest + 7} in all" in err


@pytest.mark.parametrize(("more", "lines"), [(7, 1), (8, 0)])
def test_others_go_on_with_one_line(more, lines, rlif, small_fit, model, longest):
    small_fit[small_fit.index("--model.name") + 1] = str(model(max_position_embeddings=longest + more))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rlif("fit", *small_fit, "--trainer.max_steps=1")
    assert len([w for w in caught if f"than the {longest + more} tokens" in str(w.message)]) == lines


def test_which_positions_are_learned():
    opt = OPTConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=16
    )
    assert learns_positions(GPT2Config(n_layer=1), 1024, False)
    assert learns_positions(opt, opt.max_position_embeddings, False)
    assert not learns_positions(make_config("qwen2", 320), 512, False)
