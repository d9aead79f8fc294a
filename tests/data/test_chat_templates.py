"""Chat templates: what ends an answer, what they are given, and those that lose, fail or read the clock."""

import json
import warnings

import pytest

from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Template
from rlif_lightning.errors import UserError
from rlif_lightning.models.loading import PolicySettings
from rlif_lightning.models.policy import Policy
from tests.conftest import CHAT_TEMPLATE, make_tokenizer
from tests.processes import used_by

END = "<|im_end|>"
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "[assistant]{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
)


def of(template):
    """A tokenizer whose chat template writes turns as given, the answer in ``A``."""
    turns = (
        "{% for m in messages %}{% if m.role == 'assistant' %}TURN{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    return make_tokenizer(turns.replace("TURN", template.replace("A", "{{ m.content }}")))


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        (f"<|im_start|>A{END}\n", END),
        (f"A\n{END}", END),
        (f"{{{{ 'think' }}}}: A{END}<|endoftext|>", END),
        ("A {{ eos_token }}", "<|endoftext|>"),
        ("A\n\n", None),
        ("A.<|im_end|>", None),
        ("{{ raise_exception('no answers') }}", None),
        ("an answer", None),
    ],
)
def test_the_token_behind_an_answer(turn, end):
    assert Template().turn_end(of(turn)) == end


def test_no_chat_template_ends_nothing():
    assert Template().turn_end(make_tokenizer()) is None
    assert Template("{prompt}").turn_end(make_tokenizer(CHAT_TEMPLATE)) is None


def test_a_longer_token_wins():
    tokenizer = of("A<|im_end|>more")
    tokenizer.add_tokens(["<|im_end|>more"], special_tokens=True)
    assert Template().turn_end(tokenizer) == "<|im_end|>more"


@pytest.mark.parametrize("command", ["fit", "validate", "diagnose"])
def test_completions_end_where_answers_do(command, rlif, small_fit, model_folder, problems_file, caplog):
    """Completions ran on to their longest length: the tokenizer's own end is another token."""
    small_fit[small_fit.index("--model.name") + 1] = str(model_folder(chat=True))
    small_fit[small_fit.index("--data.template={prompt} ")] = "--data.template=null"
    words = {"validate": ["--data.val.path", problems_file, "--data.val.answer=null"], "diagnose": ["--prompts=2"]}
    folder = rlif(command, *used_by(command, small_fit), *words.get(command, []))
    assert caplog.text.count(f"{END} ends a completion") == 1
    if command == "validate":
        report = json.loads(next(folder.glob("runs/**/results.json")).read_text())
        assert report["end_token_ids"] == [0, 2]


def test_an_end_that_is_known_is_not_said(model_folder, caplog):
    name = str(model_folder(chat=True))
    assert Policy.load(PolicySettings(name)).end_ids == [0]
    assert Policy.load(PolicySettings(name, end_tokens=[END], turn_end=END)).end_ids == [0, 2]
    assert Policy.load(PolicySettings(name, turn_end="<|endoftext|>")).end_ids == [0]
    assert not caplog.records
    assert Policy.load(PolicySettings(name, turn_end=END)).end_ids == [0, 2]


def test_settings_reach_the_template():
    tokenizer = make_tokenizer(THINKING)
    texts = [
        Template(chat_template_kwargs=given).encode(Problem("1?", None), tokenizer).text
        for given in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert texts == ["[user]1?[assistant]"] * 2 + ["[user]1?[assistant]<no>"]


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_settings_on_the_command_line(command, rlif, small_fit, problems_file):
    settings = "--data.chat_template_kwargs={enable_thinking: false}"
    data = ["--data.template=null", f"--data.chat_template={THINKING}", settings]
    folder = rlif(
        command,
        *used_by(command, small_fit),
        *data,
        "--data.predict.path",
        problems_file,
        "--data.predict.answer=null",
    )
    written = next(folder.glob("runs/**/completions.jsonl" if command == "fit" else "runs/**/predictions.jsonl"))
    assert json.loads(written.read_text().splitlines()[0])["prompt"].endswith("[assistant]<no>")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"chat_template": "{{ 1/0 }}"}, ["The chat template fails: ZeroDivisionError: division by zero"]),
        ({"chat_template": "{{ messages[7].content }}"}, ["The chat template fails: UndefinedError"]),
        ({"chat_template": "{% for"}, ["The chat template fails: TemplateSyntaxError"]),
        ({"chat_template": "Hi"}, ["leaves the user's message out", "'Hi'", "What is 3 + 5?"]),
        (
            {"chat_template": "{{ messages[-1].content }}", "system_prompt": "Be brief."},
            ["leaves the system's message out", "Be brief."],
        ),
        ({"chat_template_kwargs": {"enable_thinkin": False}}, ["enable_thinkin", "did you mean enable_thinking?"]),
        ({"chat_template_kwargs": {"zzz": 1}}, ["zzz", "a name that the chat template uses"]),
        ({"chat_template_kwargs": {"tokenize": True}}, ["tokenize"]),
        ({"chat_template_kwargs": {"enable_thinking": 1}, "template": "{prompt}"}, ["takes no system prompt"]),
    ],
)
def test_what_would_go_wrong_is_refused(settings, parts):
    with pytest.raises(UserError) as error:
        Template(**settings).check(make_tokenizer(THINKING))
    assert all(part in str(error.value) for part in parts), error.value
    assert len(str(error.value).splitlines()) <= 4


def test_settings_without_a_chat_template_are_refused():
    with pytest.raises(UserError, match="no chat template"):
        Template(chat_template_kwargs={"enable_thinking": False}).check(make_tokenizer())


def test_a_template_that_reads_the_clock_is_said():
    """Not one that only could: what it is given may keep it from doing so."""
    day = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}"
    template = day + "{{ date_string }}{{ messages[0].content }}"
    with pytest.warns(UserWarning, match=r"reads the clock.*data\.chat_template_kwargs '{date_string") as caught:
        Template(chat_template=template).check(make_tokenizer())
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Template(chat_template=template, chat_template_kwargs={"date_string": "1 Jan"}).check(make_tokenizer())
