"""Answers that are plain numbers, read and compared without rounding: the path that most of training takes.

Integers, decimals, fractions, mixed numbers, percent, thousands separators, scientific notation, and the LaTeX of
these. No number is rounded, so 0.333333 is not 1/3. Everything else is left to symbolic.py.
"""

import re
from functools import lru_cache
from typing import NamedTuple

LONGEST_ANSWER = 1000
"""Characters. Longer texts are no answers, and integers stay below Python's own limit of 4,300 digits."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(
    rf"([+-]?) ?\$? ?({_DIGITS}|[0-9]{{1,3}}(?: [0-9]{{3}})+)?(?:\.([0-9]+))?"
    r"(?:[eE]([+-]?[0-9]{1,3})| ?(?:\\times|\\cdot|\*|x|×) ?10(?:\^|\*\*)\{?([+-]?[0-9]{1,3})\}?)? ?(%?)"
)
_FRACTION = re.compile(rf"([+-]?) ?\$?(?:([0-9]+) +)?({_DIGITS}) ?/ ?([+-]?)({_DIGITS})")
_LATEX_FRACTION = re.compile(
    r"([+-]?) ?([0-9]*) ?\\frac ?(?:\{ ?([+-]?)([0-9]+) ?\}|([0-9])) ?(?:\{ ?([+-]?)([0-9]+) ?\}|([0-9]))"
)
_LATEX_NOISE = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\^\{?\\circ\}?|(?<=[0-9])\{,\}(?=[0-9])"
    r"|(?<!\\)\\(?:[!,;:]|(?=[%$ ]))"  # not the second of the two that end a row of a matrix
)
_LATEX_SAME = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(?:le|ge|ne)q(?![a-z])"), lambda found: found.group()[:-1]),
    (re.compile(r"\\varnothing(?![a-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    (re.compile(r"^\\approx(?![a-z])"), ""),
)
_LATEX_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|boxed)\s*\{((?:[^{}\\]|\\[$%])*)\}")
_LATEX_BLANK = re.compile(r"~|\\q?quad(?![a-z])")
_REPEATING = re.compile(r"([+-]?) ?([0-9]*)\.([0-9]*)\\(?:overline|bar) ?\{?([0-9]+)\}?( ?%)?")
_UNICODE = str.maketrans(
    {
        "−": "-",
        "°": "",
        "\N{NO-BREAK SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}",
        "≈": r"\approx ",
        "±": r"\pm ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "÷": "/",
        "½": " 1/2",
        "⅓": " 1/3",
        "⅔": " 2/3",
        "¼": " 1/4",
        "¾": " 3/4",
        "²": "^2",
        "³": "^3",
        "⁴": "^4",
    }
)
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))")
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


class Number(NamedTuple):
    """numerator / denominator, the denominator above zero; `percent` where a percent sign followed it."""

    numerator: int
    denominator: int
    percent: bool


def tidy(text: str) -> str:
    """`text` without what carries no meaning: math delimiters, spacing commands, a final full stop, degree signs."""
    text = text.strip()
    for start, end in _WRAPPERS:
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
            text = text[len(start) : -len(end)].strip()
    if not text.isascii():
        text = _ROOT.sub(lambda found: rf"\sqrt{{{found.group(1) or found.group(2)}}}", text.translate(_UNICODE))
    if "\\" in text or "{,}" in text:
        text = _LATEX_WORDS.sub(r"\1", _LATEX_BLANK.sub(" ", text))
        text = _LATEX_NOISE.sub("", text).replace("{,}", ",")
        for pattern, meaning in _LATEX_SAME:
            text = pattern.sub(meaning, text)
    return " ".join(text.strip().removesuffix(".").split())


@lru_cache(maxsize=16384)
def number(text: str) -> Number | None:
    """The number that the tidied `text` writes, None where it is anything else or divides by zero."""
    if text.isdigit() and text.isascii() and len(text) <= LONGEST_ANSWER:
        return Number(int(text), 1, False)
    if not text or len(text) > LONGEST_ANSWER:
        return None
    return _decimal(text) or _fraction(text) or _latex_fraction(text) or _repeating(text)


def same(one: Number, other: Number) -> bool:
    """Whether two numbers are equal. Against a number without the sign, 50% is equal to 50 and to 0.5: a question
    that asks "what percent" is answered either way."""
    left, right = one.numerator * other.denominator, other.numerator * one.denominator
    if left == right:
        return True
    if one.percent == other.percent:
        return False
    return left == 100 * right if one.percent else 100 * left == right


def _integer(digits: str) -> int:
    return int(digits.replace(",", "").replace(" ", "") or "0")


def _decimal(text: str) -> Number | None:
    found = _DECIMAL.fullmatch(text)
    if found is None:
        return None
    sign, whole, places, exponent, power, percent = found.groups()
    if whole is None and places is None:
        return None
    places = places or ""
    numerator, denominator = _integer(whole or "") * 10 ** len(places) + _integer(places), 10 ** len(places)
    shift = int(exponent or power or 0)
    numerator, denominator = numerator * 10 ** max(shift, 0), denominator * 10 ** max(-shift, 0)
    return Number(-numerator if sign == "-" else numerator, denominator, bool(percent))


def _repeating(text: str) -> Number | None:
    r"""0.1\overline{6} is (16 - 1) / 90."""
    found = _REPEATING.fullmatch(text)
    if found is None:
        return None
    sign, whole, fixed, again, percent = found.groups()
    numerator = _integer(whole + fixed + again) - _integer(whole + fixed)
    denominator = (10 ** len(again) - 1) * 10 ** len(fixed)
    return Number(-numerator if sign == "-" else numerator, denominator, bool(percent))


def _quotient(negative: bool, whole: str | None, above: str, below: str) -> Number | None:
    denominator = _integer(below)
    if denominator == 0:
        return None
    numerator = _integer(above) + _integer(whole or "") * denominator
    return Number(-numerator if negative else numerator, denominator, False)


def _fraction(text: str) -> Number | None:
    found = _FRACTION.fullmatch(text)
    if found is None:
        return None
    sign, whole, above, sign_below, below = found.groups()
    return _quotient((sign == "-") != (sign_below == "-"), whole, above, below)


def _latex_fraction(text: str) -> Number | None:
    found = _LATEX_FRACTION.fullmatch(text)
    if found is None:
        return None
    sign, whole, sign_above, above, above_digit, sign_below, below, below_digit = found.groups()
    negative = [sign, sign_above, sign_below].count("-") % 2 == 1
    return _quotient(negative, whole, above or above_digit, below or below_digit)
