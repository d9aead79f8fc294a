"""Plain numbers read exactly, without a computer algebra system and without costly input."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400  # longer numbers and larger exponents of ten are not read as numbers
DECIMAL_PRECISION = Fraction(1_000_001, 10**12)
"""A decimal equals what it is rounded from within this relative difference: 0.333333 is 1/3, in floats too."""

_INTEGER = r"[0-9]{1,400}"
_DECIMAL = rf"(?:{_INTEGER}\.?[0-9]{{0,400}}|\.{_INTEGER})"
_PLAIN = re.compile(
    rf"(?P<sign>[-+]?)(?P<over>{_DECIMAL})(?:\s*/\s*(?P<under>{_DECIMAL})"
    rf"|(?:[eE]|\s*\\(?:times|cdot)\s*10\s*\^)\s*\{{?\s*(?P<exponent>[-+]?[0-9]{{1,4}})\s*\}}?)?"
)
_FRAC = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<whole>{_INTEGER}(?=\s*\\frac\{{[0-9]))?\s*"
    rf"\\frac\{{(?P<over>-?{_DECIMAL})\}}\{{(?P<under>-?{_DECIMAL})\}}"
)
_PERCENT = re.compile(r"\s*\\?%$")


@dataclass(frozen=True)
class Number:
    """A number and how it was written."""

    value: Fraction  # a percentage as its figure: 50 for 50 %
    decimal: bool = False  # written with a decimal point or a power of ten, so possibly rounded
    percent: bool = False  # followed by a per cent sign

    def __str__(self) -> str:
        """One text per value: 27.0 is 27, 0.50 and 2/4 are 1/2; the per cent sign is dropped."""
        return str(self.value)


def as_number(text: str) -> Number | None:
    r"""Read `-12`, `1.5`, `.5`, `3/4`, `\frac{3}{4}`, `4.5e33`, `4.5 \times 10^{33}`, `1\frac{1}{2}`, with % or not.

    `text` is a cleaned answer (no thousands commas); overlong numbers and zero denominators are none.
    """
    if len(text) > 3 * MAX_DIGITS:
        return None
    bare = _PERCENT.sub("", text)
    percent, bare = bare != text, bare.strip()
    match = _PLAIN.fullmatch(bare) or _FRAC.fullmatch(bare)
    if match is None:
        return None
    names = ("whole", "over", "under", "exponent")
    whole, over, under, exponent = (match.groupdict().get(name) or "" for name in names)
    ten = int(exponent or 0)
    if abs(ten) > MAX_DIGITS or (under and not Fraction(under)):
        return None
    value = int(whole or 0) + Fraction(over) / Fraction(under or 1) * Fraction(10) ** ten
    decimal = bool(exponent) or any("." in part.rstrip(".") for part in (over, under))
    return Number(-value if match["sign"] == "-" else value, decimal, percent)


def same_number(gold: Number, answer: Number, *, absolute: float = 0.0, relative: float = 0.0) -> bool:
    """Whether two numbers are equal, or differ by at most `absolute` or a share `relative` of the gold value.

    Integers and fractions are compared exactly. Where either side is a decimal, `DECIMAL_PRECISION` applies. Where
    only one side is in per cent, 50 % may be 50 or 1/2.
    """
    precision = DECIMAL_PRECISION if gold.decimal or answer.decimal else 0
    for scale in (1, 100) if gold.percent != answer.percent else (1,):
        wanted, value = (x.value / (scale if x.percent else 1) for x in (gold, answer))
        rounding = precision * max(abs(wanted), abs(value))
        if abs(wanted - value) <= max(Fraction(absolute), Fraction(relative) * abs(wanted), rounding):
            return True
    return False
