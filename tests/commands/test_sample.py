"""``rlif sample``: answers are those of transformers with the run's weights; questions, and what is refused."""

import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlif_lightning.errors import UserError, escaped
from rlif_lightning.models.policy import Policy


@pytest.fixture(scope="module")
def shared():
    """The run of this module's tests, made by the first of them."""
    return {}


@pytest.fixture
def run(rlif, small_fit, tmp_path_factory, shared):
    """A run whose last step's weights are not those that the guard hands back."""
    if not shared:
        root = tmp_path_factory.mktemp("sampled")
        steps = ["--trainer.max_steps=3", "--model.optimizer.lr=0.02", "--evaluation.every=0", "--guard.warmup=0"]
        rlif("fit", *small_fit, *steps, "--runs", root)
        shared["run"] = root / "run" / "1"
    return shared["run"]


def greedy(model, question, tokens=8):
    """What transformers' own generate answers to the prompt of ``small_fit``."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    inputs = tokenizer(f"{question} ", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text if int(ids[0, -1]) == tokenizer.eos_token_id else f"{text} [...]"


def with_weights(folder, checkpoint):
    """A model with the weights of a checkpoint, put together here."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not model.load_state_dict({k.removeprefix("model."): v for k, v in stored.items()}, strict=False)[1]
    return model


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_greedy_answers_are_those_of_transformers(rlif, run, model_folder, capsys):
    questions = ["What is 3 + 5?", "Who has 48 clips?"]
    rlif("sample", run, *questions, "--ckpt_path=last")
    out, err = capsys.readouterr()
    last = with_weights(model_folder(), run / "checkpoints" / "last.ckpt")
    assert out == escaped("".join(f"> {q}\n{greedy(last, q)}\n\n" for q in questions))
    assert f"weights: {run}/checkpoints/last.ckpt" in err
    rlif("sample", "--max_new_tokens", 3, run, questions[0], "--ckpt_path", "last")
    assert capsys.readouterr().out == escaped(greedy(last, questions[0], tokens=3)) + "\n"


def test_the_guards_weights_come_first(rlif, run, capsys):
    rlif("sample", run, "3 + 5")
    assert f"weights: {run}/checkpoints/guard/weights.safetensors" in capsys.readouterr().err


def test_the_folder_of_a_model_is_asked_as_it_is(rlif, model_folder, capsys):
    rlif("sample", model_folder(), "What is 3 + 5?", "--data.template={prompt} ", "--max_new_tokens=8")
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    assert capsys.readouterr().out == escaped(greedy(model, "What is 3 + 5?")) + "\n"


def test_a_pipe_gives_a_question_a_line(rlif, run, capsys, monkeypatch):
    piped(monkeypatch, b"What is 3?\n\n 4\xff + 4 \r\n")
    rlif("sample", run, "--temperature=1", "--samples=2")
    blocks = capsys.readouterr().out.split("> ")
    assert [block.partition("\n")[0] for block in blocks] == ["", "What is 3?", "4\ufffd + 4"]


@pytest.mark.parametrize("words", [["-x + 3 = 5", "- 7"], ["--", "-x + 3 = 5", "- 7"]])
def test_a_question_may_begin_with_a_dash(words, rlif, run, capsys):
    rlif("sample", run, "--max_new_tokens", 3, *words)
    assert [line for line in capsys.readouterr().out.splitlines() if line[:2] == "> "] == ["> -x + 3 = 5", "> - 7"]


def test_after_two_dashes_no_word_is_a_setting(rlif, run, capsys):
    rlif("sample", run, "--max_new_tokens", 3, "--", "-5", "--x=1")
    assert [line for line in capsys.readouterr().out.splitlines() if line[:2] == "> "] == ["> -5", "> --x=1"]


def test_samples_differ_and_come_again(rlif, run, capsys):
    words = ("sample", run, "3 + 5", "--temperature=2", "--max_new_tokens=5", "--samples")
    rlif(*words, 8)
    many = capsys.readouterr().out
    rlif(*words, 8)
    assert many == capsys.readouterr().out and len(set(many.splitlines())) > 4
    rlif(*words, 1)
    assert many.startswith(capsys.readouterr().out)


def test_a_terminal_is_asked_until_it_ends(rlif, run, capsys, monkeypatch):
    """A question that can't be answered ends nothing, and one that is asked again is drawn anew."""
    typed = iter(["What is 3?", "", "too long", "What is 3?"])

    def read(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    def check(prompts, *rest):
        if prompts[0].problem.text == "too long":
            raise UserError("The prompt is too long")

    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("rlif_lightning.commands.sample.check_prompts", check)
    monkeypatch.setattr(Policy, "decode", lambda self, ids: [f"answer {row}" for row in ids])
    rlif("sample", run, "--temperature=3")
    out, err = capsys.readouterr()
    first, second = (line for line in out.splitlines() if line)
    assert first.startswith("answer") and second.startswith("answer") and first != second
    assert "error: The prompt is too long" in err and "a question per line" in err


def test_answers_do_not_act_on_the_terminal(rlif, run, capsys, monkeypatch):
    monkeypatch.setattr(Policy, "decode", lambda self, ids: ["\x1b[2J\u202ex"] * len(ids))
    rlif("sample", run, "3 + 5")
    assert capsys.readouterr().out.startswith("\\u001b[2J\\u202ex")


def test_classes_of_a_strangers_run_are_not_imported(rlif, run, tmp_path, capsys):
    """Its rewards and their code are of no use for an answer."""
    settings = run / "config.yaml"
    text = settings.read_text()
    (tmp_path / "strange.py").write_text("raise SystemExit('imported')")
    try:
        settings.write_text(text.replace("rewards: null", "rewards: [{class_path: strange.Reward}]"))
        assert settings.read_text() != text
        rlif("sample", run, "3 + 5")
    finally:
        settings.write_text(text)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "rlif sample needs a run"),
        (["nowhere/1", "3 + 5"], "The run folder does not exist"),
        (["RUN"], "There is no question"),
        (["RUN", " "], "There is no question"),
        (["RUN", "a", "--samples=2"], "give --temperature 1 as well"),
        (["RUN", "a", "--samples=0"], "samples is out of range"),
        (["RUN", "a", "--max_new_tokens=0"], "max_new_tokens is out of range"),
        (["RUN", "a", "--temperature=-1"], "temperature is out of range"),
        (["RUN", "a", "--tempersture=1"], "did you mean --temperature?"),
    ],
)
def test_mistakes_are_seen_before_weights_are_loaded(words, said, rlif, run, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Policy, "load", refuse)
    piped(monkeypatch, b"\n")
    with pytest.raises(SystemExit) as exit_:
        rlif("sample", *(run if word == "RUN" else word for word in words))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert said in err and not out and "Traceback" not in err
