"""The prompt of training as a chat template, so that ``apply_chat_template`` of an export gives the same tokens."""

import copy
import re
from pathlib import Path
from typing import Any

import torch

from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Template

# Texts that a template must render as training did. Spaces, quotes and braces are where templates go wrong.
PROBES = (
    "What is 3 + 5?",
    '  Let "x" be \\frac{1}{2}.\n\nFind {x} and {{ y }}, it\'s {% raw %} 100% so. ',
    "3+5-9",
)


def chat_template(template: Template, tokenizer: Any) -> str | dict[str, str]:
    """A Jinja template that renders a user's message as the prompt of training; by name where there are several.

    Where training used a chat template, it is that one with the recipe's settings, and adds the recipe's system
    prompt to a conversation without one. Where training used a format string, it is that string around each user's
    message, after the tokens that the tokenizer puts in front of a text; the end token follows each of the model's.
    """
    if not template.uses_chat(tokenizer):
        texts = (template.template or "{prompt}").split("{prompt}")  # around the problem, which may come twice
        return _turns(" + message['content'] + ".join(map(_literal, texts)), tokenizer)
    own = template.chat_template or tokenizer.chat_template
    first = "".join(  # what apply_chat_template is given by name still wins
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif -%}}\n"
        for name, value in template.chat_template_kwargs.items()
    )
    if template.system_prompt:
        first += _system_message(template.system_prompt)
    return {name: first + t for name, t in own.items()} if isinstance(own, dict) else first + own


def _system_message(text: str) -> str:
    """Jinja that puts a system message before a conversation without one."""
    message = f"{{'role': 'system', 'content': {_literal(text)}}}"
    added = f"{{%- set messages = [{message}] + messages %}}"
    return f"{{%- if messages[0]['role'] != 'system' %}}{added}{{%- endif -%}}\n"


def differing_prompts(template: Template, tokenizer: Any, exported: Any) -> list[str]:
    """The probes for which ``apply_chat_template`` of the exported tokenizer gives other tokens than training did."""
    found = []
    for text in PROBES:
        conversation = [{"role": "user", "content": text}]
        chat = exported.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        if list(chat["input_ids"]) != list(template.encode(Problem(text, None), tokenizer).ids):
            found.append(text)
    return found


def save_tokenizer(template: Template, tokenizer: Any, folder: Path) -> bool:
    """Write the tokenizer with the prompt of training as its chat template; returns whether its tokens differ."""
    exported = copy.deepcopy(tokenizer)
    exported.chat_template = chat_template(template, tokenizer)
    exported.save_pretrained(folder)
    different = differing_prompts(template, tokenizer, exported)
    if different:
        print(
            "warning: apply_chat_template of the export gives other tokens than training did, because this tokenizer "
            f"reads a text in one piece differently: {different[0]!r}"
        )
    return bool(different)


def probe_prompts(template: Template, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Prompts of training and arbitrary token ids below ``vocabulary``, some dozens of tokens in all."""
    prompts = [list(template.encode(Problem(text, None), tokenizer).ids)[:64] for text in PROBES]
    ids = torch.randint(len(tokenizer.get_vocab()), (16,), generator=torch.Generator().manual_seed(0))
    return [*prompts, ids.clamp(max=vocabulary - 1).tolist()]


TURNS = """{{- FRONT -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- USER -}}
{%- elif message['role'] == 'assistant' -%}
{{- message['content'] + END -}}
{%- else -%}
{{- raise_exception('The model was trained without messages of the role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}"""


def _turns(user: str, tokenizer: Any) -> str:
    """A chat template of turns without a system message; ``user`` is a Jinja expression."""
    front, end = _literal("".join(_front_tokens(tokenizer))), _literal(tokenizer.eos_token)
    return re.sub("FRONT|USER|END", lambda word: {"FRONT": front, "USER": user, "END": end}[word[0]], TURNS)


def _front_tokens(tokenizer: Any) -> list[str]:
    """The tokens that the tokenizer puts in front of every text; a chat template must write them out."""
    text = PROBES[0]
    bare, full = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return tokenizer.convert_ids_to_tokens(full[:start])


def _literal(text: str) -> str:
    """A text as a Jinja string."""
    for plain, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, written)
    return f"'{text}'"
