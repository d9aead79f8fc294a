"""From a problem's text to the token ids that the policy continues."""

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from rlif_lightning.data.problems import Problem
from rlif_lightning.data.rows import Message
from rlif_lightning.errors import UserError, did_you_mean, said_by_python
from rlif_lightning.models.tokenizer import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A problem as the policy sees it."""

    text: str
    ids: tuple[int, ...]
    problem: Problem


TEMPLATE_SECONDS = 5.0
PROBE, ANSWER = "What is 3 + 5?", "It is 8."


@dataclass(frozen=True)
class Template:
    """How a problem becomes a prompt: the settings of the same names in ``PromptDataModule``."""

    template: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse templates that would lose the problem or the system prompt."""
        if self.template is None or self.template == "chat":
            return
        if "{prompt}" not in self.template or "{{prompt}}" in self.template:
            wrong = "data.template has no place for the problem"
            raise UserError(wrong, got=repr(self.template), expected='"chat", null, or a text with {prompt}')
        if self.system_prompt or self.chat_template or self.chat_template_kwargs:
            raise UserError(
                "A format string takes no system prompt and no chat template",
                got=f"data.template {self.template!r}",
                do="write the instructions into data.template, or set it to chat",
            )

    def uses_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Whether the chat template applies; it must be there where it is asked for."""
        has = bool(self.chat_template or tokenizer.chat_template)
        if not has and (self.template == "chat" or self.system_prompt or self.chat_template_kwargs):
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
                    f"{problem.place} is a conversation, and without a chat template the model can't be given one",
                    got=f"messages of the roles {', '.join(m['role'] for m in problem.messages)}",
                    do="take a model with a chat template and data.template null, give one in data.chat_template, or "
                    "name a field of text in data.*.prompt",
                )
            # Not str.format: problems are full of braces.
            return (self.template or "{prompt}").replace("{prompt}", problem.text)
        messages = problem.messages or [_user(problem.text)]
        text = self._chat(tokenizer, messages, add_generation_prompt=True)
        for asked in (m["content"] for m in messages if m["role"] == "user"):
            if asked.strip() not in text:
                raise UserError(
                    f"{problem.place}: the chat template leaves a message of the user out, or changes it",
                    got=f"{text[-100:]!r} for the message {asked[:60]!r}",
                    do="take a chat template for such problems, or name one message in data.*.prompt",
                )
        return text

    def _chat(self, tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], **more: Any) -> str:
        """A conversation by the chat template, after the system prompt where it has none."""
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        settings = {"chat_template": self.chat_template, "tokenize": False, **more, **self.chat_template_kwargs}
        try:
            with _cpu_limit(TEMPLATE_SECONDS):
                return str(tokenizer.apply_chat_template(list(messages), **settings))
        except Exception as error:  # a template is a program and may raise anything
            do = "correct data.chat_template, data.chat_template_kwargs or data.system_prompt"
            raise UserError(f"The chat template fails: {said_by_python(error)}", do=do) from error

    def check(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse a chat template that fails, loses the problem or ignores a setting; warn if it reads the clock."""
        if not self.uses_chat(tokenizer):
            return
        words = set(re.findall(r"[A-Za-z_]\w*", str(tokenizer.get_chat_template(self.chat_template))))
        for name in self.chat_template_kwargs.keys() - words:
            wrong = "The chat template does not use a setting of data.chat_template_kwargs"
            expected = "a name that the chat template uses"
            raise UserError(wrong, got=name, expected=expected, do=did_you_mean(name, words))
        asked: list[str] = []

        def clock(form: str) -> str:
            asked.append(form)
            return form

        text = self._chat(tokenizer, [_user(PROBE)], add_generation_prompt=True, strftime_now=clock)
        for role, content in (("user", PROBE), ("system", self.system_prompt or "")):
            if content.strip() not in text:
                raise UserError(
                    f"The chat template leaves the {role}'s message out",
                    got=f"{text[-100:]!r} for the message {content[:60]!r}",
                    do=f"correct data.chat_template: it has to write message['content'] of the role {role}",
                )
        if asked:
            do = " Set data.chat_template_kwargs '{date_string: 1 Jan 2026}'." if "date_string" in words else ""
            rank_zero_warn(
                f"The chat template reads the clock (strftime_now), so a run can't be repeated exactly later.{do}"
            )

    def turn_end(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """The special token that follows an answer in the chat template; None without such a token or template."""
        if not self.uses_chat(tokenizer):
            return None
        try:
            text = self._chat(tokenizer, [_user(PROBE), {"role": "assistant", "content": ANSWER}])
        except UserError:  # a template for single problems
            return None
        rest = text.rpartition(ANSWER)[2].lstrip() if ANSWER in text else ""
        return max((token for token in special_tokens(tokenizer) if rest.startswith(token)), key=len, default=None)

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


class _Endless(BaseException):
    """No Exception: jinja takes those for an expression that it can't compute beforehand, and goes on."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError where the block takes more CPU time; signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _Endless

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _Endless:
        raise TimeoutError(f"it has not ended after {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
