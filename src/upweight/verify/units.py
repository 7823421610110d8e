r"""Numbers with a unit: 5 km, 5000 m, \$5 million, 10 m/s^2, 18 eggs. Exactly compared, where the units are known.

Any words behind a number are a unit too, of a kind of its own. Against a number without a unit the number alone counts,
since a question often names the unit itself.
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from upweight.verify.exact import Number, number, same

LONGEST_QUANTITY = 80
"""Characters."""

_CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_LISTED = """
    metre: mm millimeter millimetre = 1/1000, cm centimeter centimetre = 1/100, dm decimeter decimetre = 1/10,
        m meter metre = 1, km kilometer kilometre = 1000, in inch inches = 127/5000, ft foot feet = 381/1250,
        yd yard = 1143/1250, mi mile = 201168/125
    gram: mg milligram = 1/1000, g gram = 1, kg kilogram = 1000
    pound: oz ounce = 1/16, lb lbs pound = 1
    second: ms millisecond = 1/1000, s sec second = 1, min minute = 60, h hr hour = 3600, day = 86400, week = 604800
    month: month = 1, yr year = 12
    litre: mL ml milliliter millilitre = 1/1000, L l liter litre = 1
    dollar: cent = 1/100, dollar USD = 1
    euro: euro EUR = 1
    yen: yen = 1
    degree: degree deg = 1
    joule: J joule = 1, kJ kilojoule = 1000
    newton: N newton = 1
    watt: W watt = 1, kW kilowatt = 1000
    volt: V volt = 1
    kelvin: K kelvin = 1
    hertz: Hz hertz = 1
    mole: mol mole = 1
"""
"""Of each kind its units, by all their names, and what they are a multiple of."""


def _units() -> dict[str, tuple[str, Fraction]]:
    found: dict[str, tuple[str, Fraction]] = {}
    for kind, listed in re.findall(r"(\w+):([^:]*)(?=\n +\w+:|\n$)", _LISTED):
        for entry in listed.split(","):
            names, _, factor = entry.partition("=")
            for name in names.split():
                found[name] = (kind, Fraction(factor.strip()))
                if len(name) > 2:
                    found.setdefault(f"{name}s", found[name])
    return found


_UNITS = _units()
_KINDS = frozenset(kind for kind, _ in _UNITS.values()).union(_CURRENCIES.values())
_THING = re.compile(r"([A-Za-z]{3,})(?:[ /-](?:[A-Za-z]{2,}|a))*")
_LISTED_CHANGING = """
    and or nor not plus minus over mod modulo base less more than dozen percent factorial squared cubed if when where
    hundred thousand million billion trillion sin cos tan cot sec csc log ln exp sqrt pi inf infinity
    alpha beta gamma delta theta lambda sigma phi psi omega
"""
"""Words that make another number of the one before them."""
_CHANGING = frozenset(_LISTED_CHANGING.split())
_BEFORE_UNIT = re.compile(r"(?<=[0-9}]) ?(?=[A-Za-z])")
_TERM = re.compile(r" ?(/|\bper\b|\*|\\cdot|·)? ?([A-Za-z]+)(?:\^?\{?(-?[1-9])\}?)?")


class Quantity(NamedTuple):
    """A number, the factor of its unit, and what it measures, each kind with its power; nothing for a mere number."""

    number: Number
    factor: Fraction
    measures: tuple[tuple[str, int], ...]


def same_quantity(candidate: str, reference: str) -> bool | None:
    """Whether two tidied texts are the same quantity; None where one is none, and where words differ that may be names
    of one thing, or letters of a product."""
    one, other = quantity(candidate), quantity(reference)
    if one is None or other is None:
        return None
    if one.measures and other.measures and one.measures != other.measures:
        return False if _KINDS.issuperset(kind for kind, _ in one.measures + other.measures) else None
    if one.measures and other.measures:
        return same(_times(one.number, one.factor), _times(other.number, other.factor))
    return same(one.number, other.number)


@lru_cache(maxsize=4096)
def quantity(text: str) -> Quantity | None:
    """The quantity that the tidied `text` writes, None where it is anything else or its unit is not known."""
    if len(text) > LONGEST_QUANTITY:
        return None
    sign, symbol, amount = _without_symbol(text)
    measures = ((_CURRENCIES[symbol], 1),) if symbol else ()
    plain = number(sign + amount)
    if plain is not None:
        return Quantity(plain, Fraction(1), measures)
    for place in _BEFORE_UNIT.finditer(amount):
        value = number(sign + amount[: place.start()])
        scale, unit = _scaled(amount[place.end() :])
        told = None if value is None else _unit(unit) or _things(unit, apart=bool(place.group()))
        # a letter at a number, 5m, is more often a variable
        if value is None or told is None or (len(unit) == 1 and not place.group()) or (symbol and told[1]):
            continue
        return Quantity(_times(value, Fraction(scale)), told[0], told[1] or measures)
    return None


def _things(unit: str, *, apart: bool) -> tuple[Fraction, tuple[tuple[str, int], ...]] | None:
    """A unit that is not listed: words of what is counted. Three letters at a number, 3abc, are a product."""
    found = _THING.fullmatch(unit)
    words = re.split("[ /-]", unit.lower())
    if found is None or not (apart or len(found.group(1)) > 3) or not _CHANGING.isdisjoint(words):
        return None
    return Fraction(1), ((" ".join(word.removesuffix("s") for word in words), 1),)


def _scaled(unit: str) -> tuple[int, str]:
    """The number word that a unit may begin with, and the rest."""
    word, _, rest = unit.partition(" ")
    return (_SCALES[word], rest) if word in _SCALES else (1, unit)


def _without_symbol(text: str) -> tuple[str, str, str]:
    found = re.match(r"([+-]?) ?([$€£¥]) ?(?=[0-9.])", text)
    return (found.group(1), found.group(2), text[found.end() :]) if found else ("", "", text)


def _unit(text: str) -> tuple[Fraction, tuple[tuple[str, int], ...]] | None:
    """Its factor and what it measures; None where a part of it is not known."""
    factor, measures, power, at = Fraction(1), Counter[str](), 1, 0
    while at < len(text):
        found = _TERM.match(text, at)
        if found is None:
            return None
        at, (between, name, exponent) = found.end(), found.groups()
        if name in _POWERS:
            power = _POWERS[name]
        elif name in _UNITS:
            kind, multiple = _UNITS[name]
            raised = power * int(exponent or 1) * (-1 if between in ("/", "per") else 1)
            factor, power = factor * multiple**raised, 1
            measures[kind] += raised
        else:
            return None
    return factor, tuple(sorted((kind, raised) for kind, raised in measures.items() if raised))


def _times(value: Number, factor: Fraction) -> Number:
    return Number(value.numerator * factor.numerator, value.denominator * factor.denominator, value.percent)
