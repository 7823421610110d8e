"""The process in which math-verify and sympy run: one JSON request a line in, one JSON answer a line out.

A program of its own, started by file name by symbolic.py. Nothing of upweight is imported, so a start costs what
sympy costs. Its limits are the kernel's: memory, and processor time renewed for each request, so that a verdict does
not depend on how busy the machine is. An expression that exceeds them ends the process.
"""

import json
import logging
import re
import resource
import sys
import time

import sympy
from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 4 * 2**30

_I = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")


def _parsed(text: str) -> list[object]:
    return list(parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None))


def equal(candidate: str, reference: str) -> bool:
    """Whether both parse to something and mean the same, by math-verify's rules; not where sympy cannot tell."""
    try:
        return _equal(candidate, reference)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever sympy raises of an expression: it would end the process
        return False


def _equal(candidate: str, reference: str) -> bool:
    known, given = _parsed(reference), _parsed(candidate)
    if not known or not given:
        return False
    if _same(known, given):
        return True
    # to math-verify a letter like any other
    return bool(_I.search(candidate) or _I.search(reference)) and _same(_imaginary(known), _imaginary(given))


def _same(known: list[object], given: list[object]) -> bool:
    return bool(verify(known, given, allow_set_relation_comp=True, timeout_seconds=None))


def _imaginary(parsed: list[object]) -> list[object]:
    """The expressions with i as the imaginary unit and e as Euler's number."""
    meant = {"i": sympy.I, "e": sympy.E}
    return [
        sympy.simplify(one.subs({letter: meant[letter.name] for letter in one.free_symbols if letter.name in meant}))
        for one in parsed
        if isinstance(one, sympy.Expr)
    ]


def main() -> None:
    """Serve until standard input ends."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    equal("\\frac{x+1}{2}", "x^2")  # loads the grammar, which takes as long as fifty comparisons
    replies = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        candidate, reference, cpu_seconds = json.loads(line)
        spent = int(time.process_time()) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds, hard))
        print(json.dumps(equal(candidate, reference)), file=replies, flush=True)


if __name__ == "__main__":
    main()
