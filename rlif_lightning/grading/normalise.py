r"""Bring an answer into one form: `clean` keeps it valid LaTeX, `normalise` makes a key to compare by.

Every pattern is simple and the callers cap the length, so hostile answers cost nothing here.
"""

import re

from rlif_lightning.grading.number import as_number

MAX_ANSWER = 1_000
"""A longer answer is no answer to a question with a number or a formula as its answer."""

_UNICODE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^{\circ}",
    "\u2264": r"\leq ", "\u2265": r"\geq ", "\u222a": r"\cup ",
})  # fmt: skip
_WRAPPERS = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname|rm)(?![A-Za-z])"

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\+\$|\$", ""),
        (r",\s*\\!\s*|\{,\}", ","),
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~", " "),
        (r"\\(?:left|right)\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?=[^A-Za-z]|\\)", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(leq|geq)slant(?![A-Za-z])", r"\\\1"),
        (r"\\([lg])e(?![A-Za-z])", r"\\\1eq"),
        (r"\\frac\s*([0-9A-Za-z])", r"\\frac{\1}"),
        (r"(\\frac\s?\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\s*(?<![A-Za-z\\])degrees?$", ""),
        (r"\s*\\?%", r"\\%"),
        (r"(?<![A-Za-z\\])(?:np|math)\.([a-z]+)", r"\\\1"),
        (r"(?<![0-9A-Za-z.\\])([0-9]+(?:\.[0-9]+)?)[eE]\+?(-?[0-9]+)(?![0-9A-Za-z.])", r"\1 \\times 10^{\2}"),
        (r"(?<=[0-9])\.(?![0-9])", ""),
        (r"\s+", " "),
    )
)
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_THOUSANDS_ONLY = re.compile(r"[-+]?\s?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?\s?(?:\\%)?")
_WRAPPED = re.compile(rf"{_WRAPPERS}\s*\{{([^{{}}]*)\}}")
_UNIT = re.compile(
    rf"(?<=[0-9A-Za-z}})])[\s/]*(?:\\cdot\s*)?{_WRAPPERS}\s*\{{(?!\s*[iexyznkabcdf]\s*\}})[^{{}}]*\}}"
    r"\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?)?$"
)
_CHOICE = re.compile(r"^\(([A-Z])\)$")
_ASSIGNED = re.compile(
    r"(?P<name>[A-Za-z\\(][A-Za-z0-9\\_{}', ()]{0,40}?)\s*(?:=|\\in(?![A-Za-z]))\s*(?P<rest>[^=<>].*)",
    re.DOTALL,
)
_JOINTS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_OPEN, _CLOSE = "([{", ")]}"


def clean(answer: str, unit: str | None = None) -> str:
    r"""Tidy an answer into plain LaTeX that means the same.

    Dollar signs, spacing commands, `\left`/`\right`, degrees, units in text and a trailing dot go;
    `\dfrac` becomes `\frac`, `4.5e33` becomes `4.5 \times 10^{33}`, `\frac12` gets its braces. The `unit`, such as
    `km/h`, may follow the answer and says nothing new.
    """
    text = answer.strip().translate(_UNICODE)
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    while text[:2] + text[-2:] in (r"\(\)", r"\[\]"):
        text = text[2:-2]
    text = _trim(_rewritten(text))
    if unit:
        text = _without_unit(text, unit)
    while (shorter := _trim(_UNIT.sub("", text))) != text:
        text = shorter
    return text


def normalise(answer: str, unit: str | None = None) -> str:
    r"""One string for all the usual ways of writing one answer; arguments as for `clean`.

    Numbers become exact (`27.0`, `027` and `27` are one, so are `0.5`, `1/2` and `\frac{1}{2}`), thousands
    commas and spaces go, `\text{East}` becomes `East`, `(C)` becomes `C`, a leading plus goes.
    """
    text = clean(answer, unit)
    if _THOUSANDS_ONLY.fullmatch(text):
        text = text.replace(",", "")
    if number := as_number(text):
        return str(number)
    text = _WRAPPED.sub(r"\1", text)
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text) if "(" not in text else text
    text = re.sub(r"(?<=[0-9]) (?=[0-9])", "\0", text)  # 1 4/5 is not 14/5
    text = re.sub(r"\s+", "", text).replace("\0", " ")
    text = re.sub(r"([_^])\{([0-9A-Za-z])\}", r"\1\2", text)
    text = _CHOICE.sub(r"\1", text.removesuffix(r"\%").removeprefix("+"))
    return str(as_number(text) or text)


def answer_key(answer: str) -> str:
    """`normalise` for a cleaned answer, without the `x =` that it may begin with."""
    return normalise(without_name(answer)[1])


def without_name(answer: str) -> tuple[str | None, str]:
    r"""Split a cleaned `x = 5` into `x` and `5`, also `f(x) = ...` and `x \in ...`; other texts have no name."""
    match = _ASSIGNED.fullmatch(answer)
    if match is None or "=" in match["rest"] or match["name"].strip() in _CLOSE:
        return None, answer
    return re.sub(r"\s+", "", match["name"]), match["rest"]


def split_answers(answer: str) -> list[str]:
    r"""The several answers of one text: `(1, 2), (3, 4)` are two, `1 \pm \sqrt{2}` as well.

    It is cut at commas, semicolons and `and`/`or` outside all brackets. A number with thousands commas and
    no spaces (`58,500`) is one answer; the braces of `\{1, 2\}` are opened.
    """
    text = clean(answer)
    if _THOUSANDS_ONLY.fullmatch(text):
        return [text]
    if text.startswith(r"\{") and text.endswith(r"\}") and r"\}" not in text[2:-2]:
        text = text[2:-2]
    name, value = without_name(text) if "," not in text.partition("=")[0] else (None, text)
    parts = [part for part in map(_trim, _cut(_JOINTS.sub(",", value))) if part]
    parts = [signed for part in parts for signed in _both_signs(part)]
    return [f"{name}={parts[0]}"] if name is not None and len(parts) == 1 else parts


def _both_signs(part: str) -> list[str]:
    if r"\pm" not in part:
        return [part]
    plus, minus = (_trim(part.replace(r"\pm", pm).replace(r"\mp", mp)) for pm, mp in ("+-", "-+"))
    return [plus.removeprefix("+"), minus]


def _cut(text: str) -> list[str]:
    """Cut at commas and semicolons that stand outside every bracket; half-open intervals count as closed."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth = max(depth - 1, 0)
        elif letter in ",;" and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _rewritten(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _trim(text: str) -> str:
    return text.strip().rstrip(".,;: ").lstrip(",; ")


def _without_unit(text: str, unit: str) -> str:
    """Drop the given unit at the end, written in any of the text commands or plainly."""
    letters = re.sub(r"[\s{}]", "", _WRAPPED.sub(r"\1", _rewritten(unit)))
    bare = _WRAPPED.sub(r"\1", text).rstrip()
    found = re.search("[ {}]*".join(map(re.escape, letters)) + "[ {}]*$", bare) if letters else None
    rest = _trim(bare[: found.start()]) if found else ""
    # Only a whole word is a unit: "km" ends "5 km", not "\pkm"; braces must still balance.
    if not rest or re.search(r"\\[A-Za-z]*$", rest) or rest.count("{") != rest.count("}"):
        return text
    return rest
