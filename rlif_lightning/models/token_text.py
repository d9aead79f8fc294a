"""Which tokens spell which characters of a completion's text, without encoding it again."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rlif_lightning.errors import UserError
from rlif_lightning.rollout import Samples

UNKNOWN = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

Span = tuple[int, int]


def answer_mask(samples: Samples, texts: Sequence[str], spans: Sequence[Span | None], tokenizer: Any) -> Tensor:
    r"""Mark the tokens [N, T] that carry any character of an answer, such as one that straddles `{` and the answer.

    Sampled tokens need not be those that the tokenizer would choose for the text, so each token is spelled by
    itself. Special tokens, which the texts [N] leave out, are never marked, nor is anything without an answer: spans
    are [N] characters [start, end), or None. The tokenizer is that of the texts, of byte-level BPE or SentencePiece's
    kind (spaces as U+2581, byte fallback); one that decodes another text than its tokens spell is refused.
    """
    spelling = Spelling(tokenizer)
    mask = torch.zeros_like(samples.completion_mask, device="cpu")
    rows = zip(samples.completion_ids.tolist(), samples.lengths.tolist(), texts, spans, strict=True)
    for row, (ids, length, text, span) in enumerate(rows):
        if span is not None:
            mask[row, spelling.tokens_of(ids[:length], text, span)] = True
    return mask.to(samples.completion_mask.device)


class Spelling(dict[int, bytes]):
    """The UTF-8 bytes that each token adds to a text; a token is spelled when it is first asked for."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        super().__init__()
        self._byte_of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special.update(tokenizer.all_special_ids)
        self._fallback: dict[int, bytes] = {}  # the byte tokens among them, as SentencePiece has them

    def __missing__(self, token: int) -> bytes:
        name = None if token in self._special else self._tokenizer.convert_ids_to_tokens(token)
        self[token] = b"" if name is None else self._spell(token, name)
        return self[token]

    def tokens_of(self, ids: Sequence[int], text: str, span: Span) -> list[int]:
        """The places in `ids` of the tokens that carry any of the characters [start, end) of their text."""
        pieces = [self[token] for token in ids]
        if not self._fallback.keys().isdisjoint(ids):
            pieces = self._with_unknown_bytes(ids, pieces)
        spelled = b"".join(pieces)
        whole = spelled.decode(errors="replace")
        blank = len(whole) - len(whole.lstrip())
        dropped = blank - (len(text) - len(text.lstrip()))  # SentencePiece: the space before the first word
        if dropped < 0 or not whole.startswith(text, dropped):  # a text may end before its last token does
            raise UserError(
                "The answer's tokens cannot be found: the tokenizer decodes a completion to another text than its "
                "tokens spell",
                got=f"{text[:60]!r}, tokens {whole[:60]!r}",
                do="set clean_up_tokenization_spaces to false in tokenizer_config.json, or choose a reward that "
                "needs no answer_mask",
            )
        start, end = (_byte_of(spelled, dropped + place) for place in span)
        ends = list(accumulate(map(len, pieces)))
        return [place for place in range(bisect_right(ends, start), bisect_left(ends, end) + 1) if pieces[place]]

    def _spell(self, token: int, name: str) -> bytes:
        # After another token, for a decoder may drop the space before the first one.
        piece = str(self._tokenizer.convert_tokens_to_string(["a", name]))[1:]
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte and piece != name:
            self._fallback[token] = bytes([int(byte[1], 16)])
            return self._fallback[token]
        if UNKNOWN in piece and self._byte_of_letter.keys() >= set(name):
            return bytes(self._byte_of_letter[letter] for letter in name)  # a part of a character
        return piece.encode()

    def _with_unknown_bytes(self, ids: Sequence[int], pieces: list[bytes]) -> list[bytes]:
        """Byte fallback's rule: a run of byte tokens that is not UTF-8 is one unknown character for each byte."""
        pieces, run = list(pieces), list[int]()
        for place, token in enumerate([*ids, None]):
            if token in self._fallback:
                run.append(place)
            elif token is None or pieces[place]:
                if UNKNOWN in b"".join(pieces[i] for i in run).decode(errors="replace"):
                    for i in run:
                        pieces[i] = UNKNOWN.encode()
                run = []
        return pieces


def _byte_of(spelled: bytes, place: int) -> int:
    """Where in `spelled` the character `place` of its lossy decoding begins."""
    return bisect_right(range(len(spelled)), place, key=lambda b: len(spelled[: b + 1].decode(errors="replace")))
