"""From a problem's text to the token ids that the policy continues."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from rlif_lightning.data.problems import Problem
from rlif_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A problem as the policy sees it."""

    text: str
    ids: tuple[int, ...]
    problem: Problem


@dataclass(frozen=True)
class Template:
    """How a problem becomes a prompt: the settings of the same names in ``PromptDataModule``."""

    template: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Refuse templates that would lose the problem or the system prompt."""
        if self.template is None or self.template == "chat":
            return
        if "{prompt}" not in self.template:
            raise UserError(
                "data.template has no place for the problem",
                got=repr(self.template),
                expected='"chat", null, or a text with {prompt}',
            )
        if self.system_prompt or self.chat_template:
            raise UserError(
                "A format string takes no system prompt and no chat template",
                got=f"data.template {self.template!r}",
                do="write the instructions into data.template, or set it to chat",
            )

    def uses_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the chat template applies; it must be there where it is asked for."""
        has = bool(self.chat_template or tokenizer.chat_template)
        if not has and (self.template == "chat" or self.system_prompt):
            raise UserError(
                "The tokenizer has no chat template",
                do='give one in data.chat_template, or a format string in data.template, such as "{prompt}\\n"',
            )
        return has and self.template in (None, "chat")

    def keeps_system_message_of(self, problem: Problem) -> bool:
        """Whether a conversation has a system message, which stands where ``system_prompt`` would."""
        return bool(self.system_prompt and problem.messages and problem.messages[0]["role"] == "system")

    def render(self, problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The prompt as text, the start of the answer included."""
        if not self.uses_chat(tokenizer):
            if len(problem.messages) > 1:
                raise UserError(
                    f"{problem.place} is a conversation, which only a chat template can tell a model",
                    got=f"messages of the roles {', '.join(m['role'] for m in problem.messages)}",
                    do="take a model with a chat template and data.template null, give one in data.chat_template, or "
                    "name a field of text in data.*.prompt",
                )
            # Not str.format: problems are full of braces.
            return (self.template or "{prompt}").replace("{prompt}", problem.text)
        messages = list(problem.messages) or [{"role": "user", "content": problem.text}]
        if self.system_prompt and not self.keeps_system_message_of(problem):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        apply = partial(tokenizer.apply_chat_template, messages, chat_template=self.chat_template)
        try:
            return str(apply(tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            do = "correct data.chat_template or data.system_prompt"
            raise UserError("The chat template fails", got=error, do=do) from error

    def encode(self, problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
        """Token ids of a problem's prompt; the beginning-of-sequence token is never doubled."""
        text = self.render(problem, tokenizer)
        bos = tokenizer.bos_token
        written = self.uses_chat(tokenizer) or bool(bos and text.startswith(bos))
        ids = tokenizer(text, add_special_tokens=not written)["input_ids"]
        # Some tokenizers end a text with their end token: the policy must continue the prompt.
        if not written and ids and ids[-1] == tokenizer.eos_token_id:
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids[:-1][-len(own) :] == own:
                ids = ids[:-1]
        if not ids:
            raise UserError("A prompt has no tokens", got=f"problem {problem.text[:80]!r}", do="see data.template")
        return Prompt(text, tuple(ids), problem)
