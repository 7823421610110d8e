import random
import re
import unicodedata

import pytest

from upweight.curate.contamination import words_of
from upweight.curate.normalise import DEFAULT_FILTERS, Filter, Length, Letters, Repetition, check, normalise


@pytest.mark.parametrize(
    ("raw", "stored"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("e\u0301", "\u00e9"),  # e and an accent of its own become one character
        ("e\u200b\u0301", "\u00e9"),  # and so where a zero-width space kept them apart
        ("a\x00b\ufeffc\ud800d\u200be", "abcde"),
        ("a  \t\nb\u00a0\nc", "a\nb\nc"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("\n\n  a\n   indented\n\n", "a\n   indented"),
        ("a\tb", "a\tb"),
        ("", ""),
    ],
)
def test_one_text_has_one_form(raw: str, stored: str) -> None:
    assert normalise(raw) == stored


def test_normalising_twice_changes_nothing() -> None:
    chance = random.Random(0)
    letters = "ab \t\n\r\x0b\x0c\x85\x00\u200b\ufeff\u0301\u0323e\u00e9\u00a0\u2028\ud800\u3000\uac00\u11a8"
    for _ in range(3000):
        text = normalise("".join(chance.choice(letters) for _ in range(chance.randrange(12))))
        assert normalise(text) == text
        assert unicodedata.is_normalized("NFC", text)
        text.encode()


PROSE = "The river rises in the hills, and falls to the sea after some forty miles of meadow."
CJK = "派森语言是一种功能强大而完善的通用型计算机程序设计语言，已经具有十多年的发展历史，成熟且稳定。" * 2


@pytest.mark.parametrize(
    ("filter_", "text", "reason"),
    [
        (Length(40, 200), "a" * 39, "too short"),
        (Length(40, 200), "a" * 40, None),
        (Length(40, 200), "a" * 200, None),
        (Length(40, 200), "a" * 201, "too long"),
        (Letters(0.3), "=" * 71 + "a" * 29, "hardly any letters"),  # 0.29 of the characters
        (Letters(0.3), "=" * 70 + "a" * 30 + " " * 500, None),  # 0.30; blanks do not count
        (Repetition(0.7, 8), "\n".join(["same"] * 6 + ["a", "b"]), "one line repeated"),  # 6 of 8 = 0.75
        (Repetition(0.7, 8), "\n".join(["same"] * 5 + ["a", "b", "c"]), None),  # 5 of 8 = 0.63
        (Repetition(0.7, 8), "\n".join(["same"] * 7), None),  # too few lines to say
    ],
)
def test_filters_at_their_bounds(filter_: Filter, text: str, reason: str | None) -> None:
    dropped = filter_.check(text)
    assert (dropped.reason if dropped else None) == reason


@pytest.mark.parametrize(
    "text", [PROSE, CJK, "x = [\n" + "    0,\n    1,\n" * 10 + "]\n" + PROSE, "| a | b |\n|---|---|\n" + PROSE]
)
def test_ordinary_text_of_any_script_passes(text: str) -> None:
    assert check(text, DEFAULT_FILTERS) is None


def test_the_first_objection_counts_and_shows_what_was_seen() -> None:
    dropped = check("====", DEFAULT_FILTERS)
    assert dropped is not None
    assert (dropped.reason, dropped.detail) == ("too short", "4 characters, at least 40")


def _ascii_texts() -> list[str]:
    chooser = random.Random(0)
    letters = [*"ab_7 \t\n\n.=#", "  \n", "\n\n\n\n", "\r\n", "\x0b", "\x00", "\x7f", "\x1c"]
    return ["".join(chooser.choices(letters[: chooser.choice((9, 12, len(letters)))], k=40)) for _ in range(2_000)]


def test_the_fast_way_for_ascii_does_what_the_slow_way_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _ascii_texts()
    fast = [normalise(text) for text in texts]
    with monkeypatch.context() as patched:
        patched.setattr("upweight.curate.normalise._is_changed", lambda _: True)
        assert fast == [normalise(text) for text in texts]
    assert sum(before == after for before, after in zip(texts, fast, strict=True)) > 20
    for text in texts:
        written = re.sub(r"\s+", "", text)
        share = len(re.sub(r"\w+", "", written)) / max(1, len(written))
        assert (Letters(0.5).check(text) is None) == (1 - share >= 0.5)
        assert words_of(text) == re.findall(r"\w+", text.lower())
