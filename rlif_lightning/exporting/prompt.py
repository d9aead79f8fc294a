"""The prompt of training as a chat template, so that ``apply_chat_template`` of an export gives the same tokens."""

from typing import Any

from rlif_lightning.data.problems import Problem
from rlif_lightning.data.prompts import Template

# Texts that a template must render as training did; spaces, quotes and braces are where templates go wrong.
PROBES = (
    "What is 3 + 5?",
    '  Let "x" be \\frac{1}{2}.\n\nFind {x} and {{ y }}, it\'s {% raw %} 100% so. ',
    "3+5-9",
)


def chat_template(template: Template, tokenizer: Any) -> str | dict[str, str]:
    """A Jinja template that renders a user's message as the prompt of training.

    Where training used a chat template, it is that one, with the recipe's system prompt where a conversation brings
    none. Where training used a format string, it is that string around each user's message, with the tokens that the
    tokenizer puts in front of a text, and the end token after what the model has said.

    Args:
        template: Of the recipe.
        tokenizer: Of the model.

    Returns:
        The template; templates by name where the tokenizer has several.
    """
    if not template.uses_chat(tokenizer):
        before, _, after = (template.template or "{prompt}").partition("{prompt}")
        if "{prompt}" in after:  # in it twice: Jinja can do that as well
            return _around(
                " + message['content'] + ".join(map(_literal, [before, *after.split("{prompt}")])), tokenizer
            )
        return _around(f"{_literal(before)} + message['content'] + {_literal(after)}", tokenizer)
    own = template.chat_template or tokenizer.chat_template
    if not template.system_prompt:
        return own
    first = (
        "{%- if messages[0]['role'] != 'system' %}{%- set messages = [{'role': 'system', 'content': "
        + _literal(template.system_prompt)
        + "}] + messages %}{%- endif -%}\n"
    )
    return {name: first + t for name, t in own.items()} if isinstance(own, dict) else first + own


def differing(template: Template, tokenizer: Any, exported: Any) -> list[str]:
    """Probes whose tokens by ``apply_chat_template`` of the export are not those of training.

    Args:
        template: Of the recipe.
        tokenizer: As in training.
        exported: The tokenizer with the exported chat template.
    """
    found = []
    for text in PROBES:
        chat = exported.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        if list(chat["input_ids"]) != list(template.encode(Problem(text, None), tokenizer).ids):
            found.append(text)
    return found


def _around(user: str, tokenizer: Any) -> str:
    front = _literal("".join(_front_tokens(tokenizer)))
    end = _literal(tokenizer.eos_token)
    return (
        f"{{{{- {front} -}}}}\n"
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'user' -%}\n"
        f"{{{{- {user} -}}}}\n"
        "{%- elif message['role'] == 'assistant' -%}\n"
        f"{{{{- message['content'] + {end} -}}}}\n"
        "{%- else -%}\n"
        "{{- raise_exception('The model was trained without messages of the role ' + message['role']) -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    )


def _front_tokens(tokenizer: Any) -> list[str]:
    """What the tokenizer puts in front of every text; a chat template has to write it out."""
    text = PROBES[0]
    head_weight_only, full = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(head_weight_only)] == head_weight_only), 0)
    return tokenizer.convert_ids_to_tokens(full[:start])


def _literal(text: str) -> str:
    """A text as a Jinja string."""
    for plain, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, written)
    return f"'{text}'"
