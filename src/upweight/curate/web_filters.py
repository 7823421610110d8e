"""The filters that web pages are put through before anything is learned from them, at their published thresholds.

Their like is written for prose: code, tables and worked problems fail many of them. `WEB_FILTERS` is for a source of
pages; the filters of normalise.py are what every source can stand.

    Gopher, GopherRepetition    Rae et al. 2021, section A1.1
    Lines                       Penedo et al. 2024 (FineWeb), section 3.6; policy phrases: Raffel et al. 2020 (C4)
    Language                    by py3langid (Lui and Baldwin 2012)
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from upweight.core.errors import UserError
from upweight.curate.normalise import DEFAULT_FILTERS, Dropped, Filter

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "•", "‣", "·", "○", "▪")
_PARAGRAPHS = re.compile(r"\n{2,}")
_POLICY = re.compile(
    r"terms of (?:use|service)|privacy policy|cookie policy|(?:uses?|use of) cookies|all rights reserved"
    r"|(?:enable|requires?|turn on) javascript|sign up for our newsletter|subscribe to our|click here",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Gopher(Filter):
    """Drops what does not look like prose.

    Attributes:
        fewest_words, most_words: of a text.
        shortest_mean, longest_mean: letters of a word, on average.
        most_symbols: # and ellipses, for each word.
        least_alphabetic: share of the words that hold a letter.
        most_bullets: share of the lines that start with one.
        most_ellipses: share of the lines that end with one.
        fewest_stop_words: of "the", "be", "to", "of", "and", "that", "have", "with"; 0 for texts that are not English.
    """

    fewest_words: int = 50
    most_words: int = 100_000
    shortest_mean: float = 3.0
    longest_mean: float = 10.0
    most_symbols: float = 0.1
    least_alphabetic: float = 0.8
    most_bullets: float = 0.9
    most_ellipses: float = 0.3
    fewest_stop_words: int = 2

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        words = text.split()
        count = len(words)
        if not self.fewest_words <= count <= self.most_words:
            return Dropped("too few or too many words", f"{count:,} words")
        mean = (len(text) - sum(map(str.isspace, text))) / count
        if not self.shortest_mean <= mean <= self.longest_mean:
            return Dropped("words of odd length", f"{mean:.1f} letters on average")
        symbols = (text.count("#") + text.count("…") + text.count("...")) / count
        if symbols > self.most_symbols:
            return Dropped("many symbols", f"{symbols:.2f} a word")
        alphabetic = sum(1 for word in words if word.isalpha() or any(map(str.isalpha, word))) / count
        if alphabetic < self.least_alphabetic:
            return Dropped("few words with letters", f"{alphabetic:.2f} of them")
        lines = text.splitlines()
        bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines)
        if bullets > self.most_bullets:
            return Dropped("a list", f"{bullets:.2f} of the lines start with a bullet")
        ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
        if ellipses > self.most_ellipses:
            return Dropped("lines that break off", f"{ellipses:.2f} of them")
        found = _STOP_WORDS.intersection(map(str.lower, words))
        if len(found) < self.fewest_stop_words:
            return Dropped("no running text", f"{len(found)} of {len(_STOP_WORDS)} stop words")
        return None


def _top_shares() -> Mapping[int, float]:
    return {2: 0.20, 3: 0.18, 4: 0.16}


def _repeated_shares() -> Mapping[int, float]:
    return {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class GopherRepetition(Filter):
    """Drops what repeats itself.

    Attributes:
        most_lines, most_paragraphs: share of them that occurred before.
        most_line_characters, most_paragraph_characters: share of the characters that these hold.
        most_top: by n, share of the characters in the most frequent run of n words.
        most_repeated: by n, share of the characters in runs of n words that occurred before, none counted twice.
    """

    most_lines: float = 0.3
    most_paragraphs: float = 0.3
    most_line_characters: float = 0.2
    most_paragraph_characters: float = 0.2
    most_top: Mapping[int, float] = field(default_factory=_top_shares)
    most_repeated: Mapping[int, float] = field(default_factory=_repeated_shares)

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        for what, pieces, most, most_characters in (
            ("paragraphs", _PARAGRAPHS.split(text), self.most_paragraphs, self.most_paragraph_characters),
            ("lines", [line for line in text.split("\n") if line], self.most_lines, self.most_line_characters),
        ):
            if len(pieces) < 2:
                continue
            again, characters = _again(pieces)
            if again > most * len(pieces):
                return Dropped(f"repeated {what}", f"{again} of {len(pieces)}")
            if characters > most_characters * len(text):
                return Dropped(f"repeated {what}", f"{characters / len(text):.2f} of the characters")
        words = text.split()
        for size, most in self.most_top.items():
            share = _top(words, size) / max(1, len(text))
            if share > most:
                return Dropped("one phrase repeated", f"{share:.2f} of the characters in one run of {size} words")
        for size, most in self.most_repeated.items():
            share = _repeated(words, size) / max(1, len(text))
            if share > most:
                return Dropped("phrases repeated", f"{share:.2f} of the characters in repeated runs of {size} words")
        return None


def _again(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces occurred before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        else:
            seen.add(piece)
    return count, characters


def _runs(words: Sequence[str], size: int) -> "list[tuple[str, ...]]":
    return list(zip(*(words[place:] for place in range(size)), strict=False))


def _top(words: Sequence[str], size: int) -> int:
    """The characters in all occurrences of the most frequent run; 0 where none occurs twice."""
    counts = Counter(_runs(words, size))
    if not counts:
        return 0
    run, times = counts.most_common(1)[0]
    return times * (sum(map(len, run)) + size - 1) if times > 1 else 0


def _repeated(words: Sequence[str], size: int) -> int:
    """The characters in runs that occurred before; after such a run the search goes on behind it."""
    runs = _runs(words, size)
    if len(set(runs)) == len(runs):
        return 0
    seen: set[tuple[str, ...]] = set()
    place = characters = 0
    while place < len(runs):
        run = runs[place]
        if run in seen:
            characters += sum(map(len, run))
            place += size
        else:
            seen.add(run)
            place += 1
    return characters


@dataclass(frozen=True)
class Lines(Filter):
    """Drops what reads like the frame of a page: menus, notices, placeholders.

    Attributes:
        least_stopped: share of the lines that end with a full stop or the like.
        most_short: share of the lines of at most 30 letters.
        most_repeated_characters: share of the characters in lines that occurred before.
        most_policy: share of the lines with a phrase like "privacy policy".
        fewest_lines: texts of fewer are not looked at.
    """

    least_stopped: float = 0.12
    most_short: float = 0.67
    most_repeated_characters: float = 0.1
    most_policy: float = 0.2
    fewest_lines: int = 3

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        if "lorem ipsum" in text.lower():
            return Dropped("a placeholder", "lorem ipsum")
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        policy = sum(_POLICY.search(line) is not None for line in lines)
        if policy > self.most_policy * len(lines):
            return Dropped("notices of a site", f"{policy} of {len(lines)} lines")
        if len(lines) < self.fewest_lines:
            return None
        stopped = sum(line.endswith((".", "!", "?", '"', "'", "”", "’", "。", "！", "？", ":", ";")) for line in lines)
        if stopped < self.least_stopped * len(lines):
            return Dropped("lines without an end", f"{stopped} of {len(lines)} lines end with a stop")
        short = sum(len(line) <= 30 for line in lines)
        if short > self.most_short * len(lines):
            return Dropped("short lines", f"{short} of {len(lines)}")
        characters = _again(lines)[1]
        if characters > self.most_repeated_characters * len(text):
            return Dropped("repeated lines", f"{characters / len(text):.2f} of the characters")
        return None


@dataclass(frozen=True)
class Language(Filter):
    """Drops what is in another language than these. Needs the extra `web`.

    Attributes:
        languages: ISO 639-1 codes, "en".
        least_probability: that it is in the most probable one, 0-1; what is less sure is dropped too.
        read_characters: of a text, from its beginning.
    """

    languages: tuple[str, ...] = ("en",)
    least_probability: float = 0.65
    read_characters: int = 2_000

    def check(self, text: str) -> Dropped | None:
        """Why the text is dropped, None where it stays."""
        found, probability = _identifier().classify(text[: self.read_characters])
        if found not in self.languages:
            return Dropped("another language", f"{found}, probability {probability:.2f}")
        if probability < self.least_probability:
            return Dropped("unsure language", f"{found}, probability {probability:.2f}")
        return None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        # an optional extra
        from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("identifying languages needs the extra: pip install 'upweight[web]'") from None
    return LanguageIdentifier.from_modelpath(MODEL_DIR / MODEL_FILE, norm_probs=True)


WEB_FILTERS: tuple[Filter, ...] = (*DEFAULT_FILTERS, Language(), Gopher(), GopherRepetition(), Lines())
"""For English web pages, in the order in which they are cheap."""
