"""Which documents hold problems of the evaluation: overlap in runs of words, with the matching run shown.

    share(document, problem) = distinct runs of n words of the problem that the document holds / those of the problem

A document is contaminated from a stated share on, if one stretch of at least 13 words matches as well, or all words of
a shorter problem: problems from one template share most of their runs and differ in a number. A problem of fewer than n
words is one run by itself; one of fewer than FEWEST_WORDS ("Solve:") is not looked for, as it stands in texts that have
nothing to do with it. Words are letters and digits in lower case; marks and line ends do not count. In scripts without
blanks each character is a word.

The words of the problems are numbered, so that a document costs one dictionary lookup a word; a run is only looked up
where all its words are known.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from upweight.core.errors import UserError
from upweight.core.records import Document, Problem

RUN_WORDS = 8
LEAST_SHARE = 0.7
LEAST_STRETCH_WORDS = 13
FEWEST_WORDS = 4
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
"""A character of Chinese or Japanese, and a word of any other script."""
_BLANKS = re.compile(rb"  +")
_ASCII_WORDS = bytes(
    ord(chr(code).lower()) if code < 128 and (chr(code).isalnum() or code == ord("_")) else ord(" ")
    for code in range(256)
)
_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Contamination(NamedTuple):
    """A document that holds (much of) a problem: the share of the problem's runs, and the longest match as it reads."""

    document_id: str
    problem_id: str
    share: float
    match: str


class Problems:
    """The runs of words of some problems, ready to be looked for.

    Args:
        problems: their messages count, their answers and tests do not.
        words: the length of a run.
        share: the share of a problem's runs from which a document is contaminated, 0-1.

    Attributes:
        ids: of the problems, in their order.
        too_short: how many of them are not looked for.
    """

    def __init__(self, problems: Sequence[Problem], *, words: int = RUN_WORDS, share: float = LEAST_SHARE) -> None:
        if words < 1 or not 0 < share <= 1:
            raise UserError(
                f"decontamination with runs of {words} words and a share of {share}: expected 1 or more words "
                "and a share in (0, 1]"
            )
        self._share = share
        self.ids = [problem.id for problem in problems]
        self._numbers: dict[str, int] = {}
        self._runs_of: list[int] = []
        self._words_of: list[int] = []
        by_length: dict[int, defaultdict[int, list[int]]] = {}
        for index, problem in enumerate(problems):
            text = "\n".join(message.content for message in problem.messages)
            numbers = [self._numbers.setdefault(word, len(self._numbers)) for word in words_of(text)]
            length = min(words, len(numbers)) if len(numbers) >= FEWEST_WORDS else 0
            runs = set(_runs(np.asarray(numbers, np.int64), length).tolist()) if length else set()
            self._runs_of.append(len(runs))
            self._words_of.append(len(numbers))
            for run in runs:
                by_length.setdefault(length, defaultdict(list))[run].append(index)
        self.too_short = sum(count < FEWEST_WORDS for count in self._words_of)
        self._by_length = [(length, table, np.array(sorted(table), np.uint64)) for length, table in by_length.items()]

    def find(self, documents: Sequence[Document], split: Sequence[Sequence[str]] | None = None) -> list[Contamination]:
        """The contaminated ones among some documents, each with the problem of which it holds the largest share.

        Args:
            split: the words of each document (`words_of`), where they are known.
        """
        if not self._by_length or not documents:
            return []
        if split is None:
            split = [words_of(document.text) for document in documents]
        lookup = self._numbers.get
        numbers = np.fromiter((lookup(word, -1) for words in split for word in (*words, "")), np.int64)
        ends = np.cumsum([len(words) + 1 for words in split])  # a word of no problem stands between documents
        matched: defaultdict[int, defaultdict[int, dict[int, tuple[int, int]]]] = defaultdict(lambda: defaultdict(dict))
        for length, table, known_runs in self._by_length:
            runs = _runs(numbers, length)
            known = np.convolve(numbers < 0, np.ones(length, np.int64))[length - 1 : len(numbers)] == 0
            places = np.flatnonzero(known)
            slots = np.minimum(np.searchsorted(known_runs, runs[places]), len(known_runs) - 1)
            for place in places[known_runs[slots] == runs[places]].tolist():
                document = int(np.searchsorted(ends, place, side="right"))
                start = place - (int(ends[document - 1]) if document else 0)
                for problem in table[int(runs[place])]:
                    matched[document][problem].setdefault(int(runs[place]), (start, start + length))
        return [
            found
            for document, problems in sorted(matched.items())
            if (found := self._worst(documents[document], problems)) is not None
        ]

    def _worst(self, document: Document, problems: dict[int, dict[int, tuple[int, int]]]) -> Contamination | None:
        shares = {problem: len(runs) / self._runs_of[problem] for problem, runs in problems.items()}
        for problem in sorted(shares, key=lambda problem: (-shares[problem], problem)):
            if shares[problem] < self._share:
                return None
            first, last = _longest(list(problems[problem].values()))
            if last - first >= min(LEAST_STRETCH_WORDS, self._words_of[problem]):
                return Contamination(
                    document.id, self.ids[problem], shares[problem], _stretch(document.text, first, last)
                )
        return None


def _stretch(text: str, first: int, last: int) -> str:
    """The words `first` to before `last` of a text, as they read."""
    lowered = text.lower()
    spans = [match.span() for match in _WORD.finditer(lowered)]
    shown = text if len(lowered) == len(text) else lowered  # a few letters grow when they are lowered
    return shown[spans[first][0] : spans[last - 1][1]]


def contaminated(
    documents: Sequence[Document],
    problems: Sequence[Problem],
    *,
    words: int = RUN_WORDS,
    share: float = LEAST_SHARE,
) -> list[Contamination]:
    """The documents that hold at least `share` of the runs of `words` words of a problem, in the order given."""
    return Problems(problems, words=words, share=share).find(documents)


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared: letters and digits in lower case, without the marks between them."""
    return spaced_words(text).split()


def spaced_words(text: str) -> str:
    """The same words in one string, a blank between them."""
    if text.isascii():  # the same, several times faster
        return single_blanks(text.encode().translate(_ASCII_WORDS)).decode()
    return " ".join(_WORD.findall(text.lower()))


def single_blanks(data: bytes) -> bytes:
    """Runs of blanks as one each, and none around it."""
    return _BLANKS.sub(b" ", data).strip(b" ")


def _runs(numbers: Int64[np.ndarray, " word"], length: int) -> UInt64[np.ndarray, " run"]:
    """A hash of each run of `length` word numbers."""
    if len(numbers) < length:
        return np.zeros(0, np.uint64)
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * _MIX
    mixed ^= mixed >> np.uint64(31)
    count = len(numbers) - length + 1
    hashed = np.zeros(count, np.uint64)
    for place in range(length):
        hashed = hashed * _PRIME + mixed[place : place + count]
    return hashed * _MIX


def _longest(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """The longest stretch that overlapping or adjoining spans cover."""
    stretches: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if stretches and start <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(end, stretches[-1][1]))
        else:
            stretches.append((start, end))
    return max(stretches, key=lambda stretch: stretch[1] - stretch[0])
