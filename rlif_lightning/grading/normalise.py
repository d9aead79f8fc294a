r"""Bring an answer into one form: `clean` keeps it valid LaTeX, `key` is what it is compared by.

Every pattern is simple and the callers cap the length, so hostile answers cost nothing here.
"""

import re
from collections.abc import Callable
from itertools import accumulate, pairwise

from rlif_lightning.grading.number import as_number

MAX_ANSWER = 1_000  # a longer answer is no answer to a question with a number or a formula as its answer
_UNICODE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,", "\u00f7": "/",
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u03c0": r"\pi ", "\u221e": r"\infty ",
    "\u00b0": r"^{\circ}", "\u2264": r"\leq ", "\u2265": r"\geq ", "\u2260": r"\neq ", "\u2208": r"\in ",
    "\u222a": r"\cup ", "\u2205": r"\emptyset ",
    "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}",
})  # fmt: skip
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_WRAPPERS = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname|rm)(?![A-Za-z])"

MONEY = ("dollar", "euro", "yen", "rupee", "cent")
_CURRENCIES = dict(zip("$€¥₹¢£", (*MONEY, "lb"), strict=True))
_CURRENCY = re.compile(r"(?<=\\)\$|[€£¥₹¢]|^(?:[-+]|US)?\s?\$(?=[^$]+$)")  # $18$ is a formula, $18 an amount
_VALUE = r"(?:[0-9]|\\(?:[dt]?frac|sqrt|pi)(?![A-Za-z]))"
_FRAC_PART = r"(\\pi(?![A-Za-z])|[0-9A-Za-z])"

_REWRITES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\+\$|[$€£¥₹¢]", ""),
        (r"^(-?)(?:US|Rs\.?)\s*(?=[-0-9.])", r"\1"),
        (r"^(-?)(USD|EUR|GBP)\.?\s*(-?[0-9.].*)$", r"\1\3 \2"),
        (r"^(?:=|\\approx(?![A-Za-z])|\u2248)\s*", ""),
        (rf"^(?:{_WRAPPERS}\s*\{{\s*\([A-E]\)\s*\}}|\([A-E]\)(?=\s|\\ ))(?:\s|\\ |~)*(?=-?{_VALUE})", ""),
        (r"(?<=[0-9])\{,\}(?=[0-9]+)(?![0-9]{3}(?![0-9]))", "."),  # 3{,}14, but 1{,}000
        (r",\s*\\!\s*|\{,\}", ","),
        (r"(?<!\\)\\!", ""),
        (r"(?<=[0-9])(?:\\[,;: ]|~)\s*(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\(?:[,;: ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~", " "),
        (r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lrm]?)(?=[^A-Za-z]|\\)", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\([lgn])eq?(?:slant)?(?![A-Za-z])", r"\\\1eq"),
        (r"^\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid|\||:)(.+)\\\}$", r"\1"),
        (r"(?<![A-Za-z\\])(?:np|math)\.([a-z]+)", r"\\\1"),
        (rf"\\(?:operatorname|mathrm|text)\s*\{{\s*({_FUNCTIONS}|pi)\s*\}}", r"\\\1 "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (rf"(?<![A-Za-z\\])({_FUNCTIONS})(?=\s*[(^_0-9\\]|\s+[A-Za-z](?![A-Za-z])|[xyz](?![a-z]))", r"\\\1 "),
        (r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"√\s*([0-9]+)", r"\\sqrt{\1}"),
        (r"√|(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt "),
        (r"\\sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
        ("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match.group().translate(_SUPERSCRIPT)}}}"),
        (r"(\\(?:overline|bar))\s*([0-9])", r"\1{\2}"),
        (
            r"([0-9]{0,99})\.([0-9]{0,99})\\(?:overline|bar)\s*\{([0-9]{1,99})\}",
            lambda match: _repeating(*match.groups()),
        ),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (rf"\\frac\s*{_FRAC_PART}", r"\\frac{\1}"),
        (rf"(\\frac\s?\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*{_FRAC_PART}", r"\1{\2}"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"(?<=[0-9])\s*\^?\s*\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}{1,2}$", ""),
        (r"(?<=[0-9])\s?x\s?(?=10\s?\^)", r"\\times "),
        (r"\^\s*\{?\s*\\circ\s*\}?\s*([CF])$", r"\\text{\1}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\s*(?<![A-Za-z\\])degrees?$", ""),
        (r"\s*(?:\\?%|\\text\s*\{\s*per\s?cent\s*\}|(?<![A-Za-z])per\s?cent(?![A-Za-z]))", r"\\%"),
        (r"(?<![0-9A-Za-z.\\])([0-9]+(?:\.[0-9]+)?)[eE]\+?(-?[0-9]+)(?![0-9A-Za-z.])", r"\1 \\times 10^{\2}"),
        (r"(?<=[0-9])\.(?![0-9])", ""),
        (r"\s+", " "),
        (r"(?<![0-9.,^_/}])([0-9]{1,9}) ([0-9]{1,9})\s?/\s?([0-9]{1,9})(?![0-9.])", r"\1\\frac{\2}{\3}"),
    )
)
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_THOUSANDS_ONLY = re.compile(r"[-+]?\s?[0-9]{1,3}(?:,[0-9]{3}|(?: [0-9]{3})(?=[ .\\]|$))+(?:\.[0-9]+)?\s?(?:\\%)?")
_WRAPPED = re.compile(rf"{_WRAPPERS}\s*\{{([^{{}}]*)\}}")
_UNIT = re.compile(
    rf"(?<=[0-9A-Za-z}})\]%])[\s/]*(?:\\cdot\s*)?{_WRAPPERS}\s*\{{(?!\s*[iexyznkabcdf]\s*\}})[^{{}}]*\}}"
    r"\s*(?:\^\s*\{?\s*-?[0-9]\s*\}?)?$"
)
_BARE_UNIT = re.compile(
    r"(?P<head>.*?(?:[0-9)}\]%]|\\pi(?= )))"
    r"(?P<unit>\s?[A-Za-z]+(?:(?:\s?[/-]\s?|\s?\\cdot\s?|\. ?| )[A-Za-z]+|\^\{?-?[0-9]\}?)*)\.?"
)
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|and|or|to|not|is|but|than|times|plus|minus|over|squared|cubed)\b"
)
_SPELT = {
    name: names.split()[0]
    for names in (
        "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre",
        "in inch inche", "ft foot feet", "yd yard", "mi mile", "2 square sq", "3 cubic cu", "l liter litre",
        "ml milliliter", "mg milligram", "g gram", "kg kilogram", "oz ounce", "lb pound gbp", "s sec second",
        "min minute", "h hr hour", "am", "pm", "dollar usd buck", "euro eur", "cent", "yen yuan", "rupee",
    )
    for name in names.split()
}  # fmt: skip
_ABBREVIATED = re.compile(r"\b([apu])\.\s?([ms])\b\.?")  # a.m., p.m., U.S.
_FIGURES = re.compile(r"\s*-?[0-9.,:]+(?:\s*\\(?:times|cdot)\s*10\s*\^\S*)?")
_FACTORS = ("mg", "ml", "mi", "in", "am", "pm")
LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")
_CHOICE = re.compile(r"^\(([A-Z])\)$")
_JOINTS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_KEPT_SPACE = re.compile(r"(?<=[0-9]) (?=[0-9])| (?=(?:and|or) )|(?<= and) |(?<= or) ")  # 1 4/5 is not 14/5
_ASSIGNED = re.compile(
    r"(?P<name>[A-Za-z\\(][A-Za-z0-9\\_{}', ()]{0,40}?)\s*"
    rf"(?:=(?:(?:(?!{_JOINTS.pattern})[^=<>,;])+=)*|\\in(?![A-Za-z]))\s*(?P<rest>[^=<>].*)",
    re.DOTALL,
)


def clean(answer: str) -> str:
    r"""Tidy an answer into plain LaTeX that means the same.

    Dollar signs, spacing commands, `\left`/`\right`, degrees, units and a trailing dot go; `\dfrac` becomes `\frac`,
    `4.5e33` becomes `4.5 \times 10^{33}`, `2*pi` becomes `2\cdot \pi`.
    """
    return measured(answer)[0]


def measured(answer: str, unit: str | None = None) -> tuple[str, tuple[str, ...]]:
    r"""An answer as `clean` tidies it, and the words of its unit, if any; `unit` is one that it may have."""
    text = answer.strip().translate(_UNICODE)
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    while text[:2] + text[-2:] in (r"\(\)", r"\[\]"):
        text = text[2:-2]
    text, units, usual = _trim(_rewritten(text)), "", unit_words(unit or "")
    while found := _split_unit(text, usual):
        text, units = _trim(found[0]), f"{found[1]} {units}"
    if _THOUSANDS_ONLY.fullmatch(text):
        text = re.sub("(?<=[0-9])[, ]", "", text)
    words = unit_words(units)
    money = unit_words(" ".join({_CURRENCIES[mark[-1]] for mark in _CURRENCY.findall(answer.strip())}))
    return text, tuple(sorted((*words, *set(money).difference(words))))


def unit_words(unit: str) -> tuple[str, ...]:
    """The words of a unit in one spelling and order: `square meters`, `m^2` and `metre^2` are one."""
    text = _WRAPPED.sub(r"\1", _rewritten(unit)).replace(r"\cdot", " ").lower()
    text = _ABBREVIATED.sub(r"\1\2", text).replace("mph", "mi h")
    words = re.findall(r"[a-z]+|[0-9]", text)
    single = [word.removesuffix("s") if len(word) > 2 else word for word in words if word not in ("per", "us")]
    return tuple(sorted(_SPELT.get(word, word) for word in single))


def _split_unit(text: str, usual: tuple[str, ...]) -> tuple[str, str] | None:
    """Cut off a unit in one of the text commands, a usual one, or any words after a number; None without one."""
    if match := _UNIT.search(text):
        return None if _NO_UNIT.search(match.group()) else (text[: match.start()], match.group())
    match = _BARE_UNIT.fullmatch(_WRAPPED.sub(r"\1", text))
    if match is None or _NO_UNIT.search(match["unit"]):
        return None
    head, unit = match.group("head", "unit")
    words, value = unit_words(unit), head.rpartition("=")[2]
    spaced, long = unit.startswith(" "), re.search("[A-Za-z]{3}", unit)
    if words == usual or (spaced and long and not LETTER.search(value)):
        return head, unit
    # 5 mg is a mass, \frac{1}{2} mg half a weight
    sure = long or any(len(word) > 1 and word not in _FACTORS for word in words)
    known = all(word in _SPELT for word in words) and (sure or (spaced and _FIGURES.fullmatch(value)))
    return (head, unit) if known else None


def key(text: str) -> str:
    r"""One string for all the usual ways of writing one answer, which is cleaned already.

    Numbers become exact (`27.0`, `027` and `27` are one, so are `0.5`, `1/2` and `\frac{1}{2}`), thousands
    commas and spaces go, `\text{East}` becomes `East`, `(C)` becomes `C`, a leading plus goes.
    """
    if number := as_number(text):
        return str(number)
    text = _WRAPPED.sub(r"\1", text)
    text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text) if "(" not in text else text
    text = _KEPT_SPACE.sub("\0", re.sub(r"\s+", " ", text)).replace(" ", "").replace("\0", " ")
    text = re.sub(r"([_^])\{([0-9A-Za-z])\}", r"\1\2", text)
    text = _CHOICE.sub(r"\1", text.removesuffix(r"\%").removeprefix("+"))
    return str(as_number(text) or text)


def answer_key(answer: str) -> str:
    """`key` without the `x =` or `f(x) =` in front; the `y =` of an equation between letters stays."""
    name, value = without_name(answer)
    return key(answer if name and "(" not in name and LETTER.search(value) else value)


def without_name(answer: str) -> tuple[str | None, str]:
    r"""Split a cleaned `x = 5` into `x` and `5`, also `f(x) = ...` and `x \in ...`; other texts have no name."""
    match = _ASSIGNED.fullmatch(answer)
    name, rest = match.group("name", "rest") if match else ("", "")
    itself = "=" in answer and re.search(rf"(?<![A-Za-z\\]){re.escape(name.strip())}(?![A-Za-z_{{])", rest)
    if not match or "=" in rest or itself or name.count("{") != name.count("}"):  # x = x + 1 is no value of x
        return None, answer
    return re.sub(r"\s+", "", name), rest


def split_answers(answer: str) -> list[str]:
    r"""The several answers of one text: `(1, 2), (3, 4)` are two, `1 \pm \sqrt{2}` as well.

    It is cut at commas, semicolons and `and`/`or` outside all brackets. A number with thousands commas and
    no spaces (`58,500`) is one answer; the braces of `\{1, 2\}` are opened.
    """
    text = clean(answer)
    if text.startswith(r"\{") and text.endswith(r"\}") and r"\}" not in text[2:-2]:
        text = text[2:-2]
    name, value = without_name(text) if "," not in text.partition("=")[0] else (None, text)
    value = _JOINTS.sub(",", value)
    cuts = [place for place, depth in enumerate(depths(value)) if depth <= 0 and value[place] in ",;"]
    pieces = [value[begin + 1 : end] for begin, end in pairwise([-1, *cuts, len(value)])]
    parts = [signed for part in map(_trim, pieces) if part for signed in _both_signs(part)]
    return [f"{name}={parts[0]}"] if name is not None and len(parts) == 1 else parts


def _both_signs(part: str) -> list[str]:
    if r"\pm" not in part:
        return [part]
    plus, minus = (_trim(part.replace(r"\pm", pm).replace(r"\mp", mp)) for pm, mp in ("+-", "-+"))
    return [plus.removeprefix("+"), minus]


def depths(text: str) -> list[int]:
    """How many brackets are open after each letter; half-open intervals count as closed."""
    return list(accumulate((letter in "([{") - (letter in ")]}") for letter in text))


def _repeating(whole: str, once: str, again: str) -> str:
    """A decimal whose last digits repeat, as a fraction."""
    over = int(whole + once + again) - int(whole + once or "0")
    return rf"\frac{{{over}}}{{{10 ** len(once) * (10 ** len(again) - 1)}}}"


def _rewritten(text: str) -> str:
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _trim(text: str) -> str:
    return text.strip().rstrip(".,;: \\").lstrip(",; ")
