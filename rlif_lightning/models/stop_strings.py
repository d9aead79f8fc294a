"""Strings that end a completion: with which token its text first contains one."""

import json
import re
from collections.abc import Sequence
from typing import Any

from rlif_lightning.errors import UserError
from rlif_lightning.models.token_text import Spelling
from rlif_lightning.models.tokenizer import special_tokens

EXPECTED = """a list of texts that are not empty, such as ["\\nQuestion:", "\\n\\n"]"""


def check_stop(strings: Any) -> tuple[str, ...]:
    """The strings of a setting; None: there are none. A string alone is refused: it would be a list of letters.

    Raises:
        UserError: It is not a list of texts, or one of them is empty, which every text contains.
    """
    given = () if strings is None else strings
    if not isinstance(given, list | tuple) or not all(isinstance(s, str) and s for s in given):
        raise UserError("rollout.stop can't be used", got=json.dumps(strings, default=repr), expected=EXPECTED)
    return tuple(given)


class StopStrings:
    r"""Finds the token with which the text of a completion first contains a string, at its end or inside.

    It reads the bytes that the tokens spell, one after the other: a string may lie across tokens, a character too.
    Special tokens spell nothing, as in the texts that are graded. The text continues the prompt: the space that a
    SentencePiece decoder drops at the start of a text counts. What comes before a completion does not belong to it.

    Raises:
        UserError: The strings are not a list of texts, or one of them contains a special token.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings, self.tokenizer = check_stop(strings), tokenizer
        self._spelling = Spelling(tokenizer)
        spelled = [s.encode(errors="surrogatepass") for s in self.strings]  # half a character is in no text
        self._any = re.compile(b"|".join(map(re.escape, spelled)))
        self._kept = max(map(len, spelled))  # bytes at the end of a text in which a string may have begun
        for token in special_tokens(tokenizer):
            for text in self.strings:
                if token and token in text:
                    raise UserError(
                        "A string of rollout.stop contains a special token, and the text of a completion has none",
                        got=json.dumps(text),
                        do=f"name the token in model.end_tokens: {json.dumps([token])}",
                    )

    def find(self, ids: Sequence[int], before: bytes = b"") -> tuple[int | None, bytes]:
        """How many of the next tokens complete a string, None if they do not; and what to keep for the next call.

        ``before`` is what the previous call has returned to keep.
        """
        for count, token in enumerate(ids, 1):
            before += self._spelling[token]
            if self._any.search(before):
                return count, b""
            before = before[-self._kept :]
        return None, before

    def cut(self, text: str) -> str:
        """A text up to the end of the string that is complete first, all of it if there is none.

        The last token of a completion may say more than the string, and no answer may be read from that.
        """
        ends = [text.find(s) + len(s) for s in self.strings if s in text]
        return text[: min(ends)] if ends else text
