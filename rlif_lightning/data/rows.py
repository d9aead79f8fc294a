"""What the fields of a row hold, as plain Python values; every message names the row's place."""

import ast
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rlif_lightning.errors import UserError

Message = dict[str, Any]  # role, content, and what else a chat template may ask for


@dataclass(frozen=True)
class Row:
    """A row of a data set."""

    place: str  # such as "Line 7 of problems.jsonl"
    values: dict[str, Any]

    def value(self, name: str, setting: str) -> Any:
        """What the field has that a setting names; one within another has a dot, one in a list its number."""
        if not self.has(name):
            without = ", or set it to null where the data has no answers" if setting == "answer" else ""
            raise UserError(
                f"{self.place} has no field '{name}'",
                got=f"fields {', '.join(_names(self.values)) or 'none'}"[:300],
                do=f"name the right one in data.*.{setting}{without}",
            )
        try:
            return _plain(self._find(name), f"{self.place}: '{name}'")
        except RecursionError as error:
            raise UserError(f"{self.place}: '{name}' is nested too deeply") from error

    def has(self, name: str) -> bool:
        """Whether there is such a field; one within an empty field is empty itself."""
        try:
            self._find(name)
        except (KeyError, TypeError, IndexError):
            return False
        return True

    def _find(self, name: str) -> Any:
        found: Any = self.values
        for part in [name] if name in self.values else name.split("."):
            place: Any = int(part) if isinstance(found, list) and part.isdecimal() else part
            found = None if found is None else found[place]
        return found

    def text(self, name: str, setting: str) -> str | None:
        """The field's text or number as text, None where it holds null; anything else is refused."""
        found = self.value(name, setting)
        if found is None or isinstance(found, str | int | float):
            return None if found is None else str(found)
        raise UserError(
            f"{self.place} has no text in '{name}'",
            got=named(found),
            expected="a text or a number",
            do=f"name another field in data.*.{setting}",
        )

    def prompt(self, name: str) -> Any:
        """What a field of prompts holds; a text that is a list of messages, as CSV files have them, becomes one."""
        found = self.value(name, "prompt")
        if isinstance(found, str) and found.lstrip().startswith("["):
            for read in (json.loads, ast.literal_eval):  # as JSON, and as pandas writes lists
                with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                    listed = read(found.strip())
                    return listed if _is_conversation(listed) else found
        return found

    def messages(self, name: str) -> list[Message]:
        """The conversation in a field, a list of role and content each, which the assistant is to continue."""
        found = self.prompt(name)
        if not _is_conversation(found):
            raise UserError(
                f"{self.place} has neither a text nor a conversation in '{name}'",
                got=named(found),
                expected="a text, or a list of messages such as {role: user, content: What is 1 + 1?}",
                do=f"name a field of text in data.*.prompt; one within a list has a number: {name}.0.content",
            )
        if found[-1]["role"] != "user" or is_empty(found[-1]["content"]):
            raise UserError(
                f"{self.place}: the conversation in '{name}' does not end with a question",
                got=f"role {found[-1]['role']}, content {found[-1]['content']!r}"[:80],
                expected="a message of the user, which the model is to answer",
                do=f"cut off what follows it, or name one message in data.*.prompt, such as {name}.0.content",
            )
        return [{key: value for key, value in message.items() if value is not None} for message in found]


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, only spaces, or an empty list."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def named(value: Any) -> str:
    """A value with its type, for a message."""
    return f"{repr(value)[:80]} ({type(value).__name__})"


def _is_conversation(value: Any) -> bool:
    messages = value if isinstance(value, list) else []
    texts = [m.get(key) for m in messages if isinstance(m, dict) for key in ("role", "content")]
    return 0 < 2 * len(messages) == len(texts) and all(isinstance(text, str) for text in texts)


def _names(values: dict[str, Any]) -> Iterator[str]:
    """The fields of a row, and those within them."""
    for name, value in values.items():
        yield from (f"{name}.{inner}" for inner in _names(value)) if isinstance(value, dict) and value else [name]


def _plain(value: Any, place: str) -> Any:
    """A value as JSON would have it; NaN, which pandas writes for a missing value, becomes None."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{place} holds bytes that are not UTF-8 text", got=repr(value)[:80]) from error
    if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
        raise UserError(f"{place} holds half a character", got=ascii(value)[:80])
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return _plain(value.tolist(), place)
    if isinstance(value, Decimal):
        return format(value, "f")  # every digit, unlike a float
    if isinstance(value, list):
        return [_plain(part, place) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part, place) for name, part in value.items()}
    return None if isinstance(value, float) and value != value else value
