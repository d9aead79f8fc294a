"""From a problem to token ids: templates, and the tokens that a tokenizer puts around a text."""

import sys

import pytest

from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Template
from rlif_lightning.errors import UserError


@pytest.fixture(scope="module")
def tokenizers():
    """``tokenizers(chat=..., bos=..., around="$A")``: a byte-level tokenizer and what it puts around texts."""
    import copy

    conftest = next(m for n, m in sys.modules.items() if n.endswith("conftest") and hasattr(m, "make_tokenizer"))
    plain = {chat: conftest.make_tokenizer(conftest.CHAT_TEMPLATE if chat else None) for chat in (True, False)}

    def make(chat=False, around=None, chat_template=None):
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        base = plain[chat]
        if around is None:
            return base
        rust = copy.deepcopy(base.backend_tokenizer)
        names = ["<|endoftext|>", "<|im_start|>"]  # the second one serves as BOS here
        special = [(n, rust.token_to_id(n)) for n in names if n in around]
        rust.post_processor = TemplateProcessing(single=around, special_tokens=special)
        return PreTrainedTokenizerFast(
            tokenizer_object=rust, eos_token="<|endoftext|>", bos_token="<|im_start|>", pad_token="<|endoftext|>",
            chat_template=chat_template or base.chat_template,
        )  # fmt: skip

    return make


BOS, EOS = "<|im_start|>", "<|endoftext|>"


def encode(tokenizer, text="What is 1?", **template):
    prompt = Template(**template).encode(Problem(text, None), tokenizer)
    return prompt.text, tokenizer.decode(list(prompt.ids))


def test_the_chat_template_where_there_is_one(tokenizers):
    text, decoded = encode(tokenizers(chat=True))
    assert text == decoded == f"{BOS}user\nWhat is 1?<|im_end|>\n{BOS}assistant\n"


def test_the_plain_problem_where_there_is_no_chat_template(tokenizers):
    assert encode(tokenizers()) == ("What is 1?", "What is 1?")


def test_a_system_prompt_is_the_first_message(tokenizers):
    text, _ = encode(tokenizers(chat=True), system_prompt="Be brief.")
    assert text.startswith(f"{BOS}system\nBe brief.<|im_end|>\n{BOS}user\n")


def test_a_given_chat_template_wins(tokenizers):
    given = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[answer]"
    for chat in (True, False):
        text, _ = encode(tokenizers(chat=chat), chat_template=given, system_prompt="S")
        assert text == "[system] S\n[user] What is 1?\n[answer]"


def test_a_format_string_takes_the_place_of_a_chat_template(tokenizers):
    text, decoded = encode(tokenizers(chat=True), template="Q: {prompt}\nA:")
    assert text == decoded == "Q: What is 1?\nA:"


def test_braces_mean_nothing(tokenizers):
    """Problems and templates are full of LaTeX and code, so the template is no str.format."""
    problem = r"$\frac{1}{2}$ {prompt} {0} {x!r} %s {{ 7 }}"
    text, decoded = encode(tokenizers(), problem, template=r"\boxed{} {{}} {prompt} A:")
    assert text == decoded == rf"\boxed{{}} {{{{}}}} {problem} A:"
    assert problem in encode(tokenizers(chat=True), problem)[0]


def test_special_tokens_within_a_problem_cannot_end_it(tokenizers):
    """What a problem says literally stays in the prompt; nothing is cut or doubled."""
    text, decoded = encode(tokenizers(), f"a {EOS} b {EOS}")
    assert text == decoded == f"a {EOS} b {EOS}"


def test_bos_is_there_once(tokenizers):
    tokenizer = tokenizers(around=f"{BOS} $A")
    assert encode(tokenizer)[1] == f"{BOS}What is 1?"
    assert encode(tokenizer, template=BOS + "{prompt}")[1] == f"{BOS}What is 1?"


def test_a_chat_template_that_writes_bos_gets_no_second_one(tokenizers):
    own = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = tokenizers(around=f"{BOS} $A", chat_template=own)
    assert encode(tokenizer)[1] == f"{BOS}What is 1?"


def test_a_chat_template_that_leaves_bos_out_gets_none(tokenizers):
    """As apply_chat_template(tokenize=True) does: the template says all."""
    tokenizer = tokenizers(around=f"{BOS} $A", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert encode(tokenizer)[1] == "What is 1?"
    messages = [{"role": "user", "content": "What is 1?"}]
    reference = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenizer.decode(reference) == "What is 1?"


@pytest.mark.parametrize("around", [f"$A {EOS}", f"{BOS} $A {EOS}"])
def test_an_end_token_behind_the_text_is_taken_away(around, tokenizers):
    """The policy is to continue the prompt: after an end token it begins another text."""
    text, decoded = encode(tokenizers(around=around), template="{prompt} A:")
    assert text == "What is 1? A:"
    assert decoded == (BOS if BOS in around else "") + text


def test_an_end_token_that_the_template_writes_stays(tokenizers):
    _, decoded = encode(tokenizers(), template="{prompt}" + EOS)
    assert decoded == f"What is 1?{EOS}"


def test_an_end_token_that_both_write_stays_once(tokenizers):
    _, decoded = encode(tokenizers(around=f"$A {EOS}"), template="{prompt}" + EOS)
    assert decoded == f"What is 1?{EOS}"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"template": "no place"}, "no place for the problem"),
        ({"template": "{{prompt}}"}, "no place for the problem"),
        ({"template": "{prompt}", "system_prompt": "S"}, "no system prompt"),
        ({"template": "{prompt}", "chat_template": "C"}, "no chat template"),
    ],
)
def test_templates_that_lose_something_are_refused(settings, part):
    with pytest.raises(UserError, match=part):
        Template(**settings)


def test_an_empty_prompt_is_refused(tokenizers):
    with pytest.raises(UserError, match="leaves a message of the user out"):
        encode(tokenizers(), chat_template="{{ '' }}", template="chat")


def test_a_chat_template_that_is_asked_for_must_exist(tokenizers):
    for settings in ({"template": "chat"}, {"system_prompt": "S"}):
        with pytest.raises(UserError, match="no chat template"):
            encode(tokenizers(), **settings)


# -- conversations ----------------------------------------------------------------------------------------------

SYSTEM, USER = {"role": "system", "content": "Own."}, {"role": "user", "content": "What is 1?"}
TURNS = [USER, {"role": "assistant", "content": "One."}, {"role": "user", "content": "And 2?"}]


def encode_conversation(tokenizer, messages, **template):
    problem = Problem("shown", None, messages=messages, place="Line 7 of a.jsonl")
    prompt = Template(**template).encode(problem, tokenizer)
    return prompt.text, tokenizer.decode(list(prompt.ids))


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], TURNS, [SYSTEM, *TURNS]])
def test_a_conversation_goes_through_the_chat_template_as_it_is(messages, tokenizers):
    tokenizer = tokenizers(chat=True)
    text, decoded = encode_conversation(tokenizer, messages)
    assert text == decoded == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    told = "".join(f"{BOS}{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert text == f"{told}{BOS}assistant\n"


@pytest.mark.parametrize(
    ("messages", "first"), [([SYSTEM, USER], "Own."), (TURNS, "Of the recipe."), ([USER], "Of the recipe.")]
)
def test_a_system_message_of_its_own_wins_over_the_recipes(messages, first, tokenizers):
    text, _ = encode_conversation(tokenizers(chat=True), messages, system_prompt="Of the recipe.")
    assert text.startswith(f"{BOS}system\n{first}<|im_end|>\n{BOS}user\n")
    assert text.count("system") == 1


@pytest.mark.parametrize("template", [None, "{prompt}>"])
@pytest.mark.parametrize("messages", [[SYSTEM, USER], TURNS])
def test_a_conversation_without_a_chat_template_is_refused(template, messages, tokenizers):
    with pytest.raises(UserError) as error:
        encode_conversation(tokenizers(), messages, template=template)
    for part in (
        "Line 7 of a.jsonl",
        messages[0]["role"],
        messages[1]["role"],
        "data.chat_template",
        "data.*.prompt",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("lossy", ["{{ messages[-1].content }}", "{{ messages[0].content }}"])
def test_a_chat_template_for_single_problems_loses_no_message_of_a_conversation(lossy, tokenizers):
    with pytest.raises(UserError, match=r"Line 7 of a\.jsonl: the chat template leaves a message of the user out"):
        encode_conversation(tokenizers(), TURNS, chat_template=lossy)


@pytest.mark.parametrize(("template", "text"), [(None, "shown"), ("{prompt}>", "shown>")])
@pytest.mark.parametrize("chat", [True, False])
def test_one_message_of_the_user_is_a_problem_like_any_other(chat, template, text, tokenizers):
    if chat and template is None:
        text = f"{BOS}user\n{USER['content']}<|im_end|>\n{BOS}assistant\n"
    assert encode_conversation(tokenizers(chat=chat), [USER], template=template)[0] == text
