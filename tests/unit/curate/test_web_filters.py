import pytest

from upweight.curate.normalise import Filter, check
from upweight.curate.web_filters import WEB_FILTERS, Gopher, GopherRepetition, Language, Lines

PROSE = """The river rises in the hills to the north, and falls to the sea after forty miles of slow water.
Farmers have used it for centuries: they built mills along its banks, and with the mills came roads and small towns.
When the railway arrived in 1850, most of that trade moved away, and the mills were left to be homes or ruins.
Today the valley is known for its birds. Herons, kingfishers and several kinds of duck nest there each spring."""


def _reason(filter_: Filter, text: str) -> str:
    dropped = filter_.check(text)
    return dropped.reason if dropped else ""


def test_prose_passes_all_of_them() -> None:
    pytest.importorskip("py3langid")
    assert check(PROSE, WEB_FILTERS) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("too short to be a page", "too few or too many words"),
        (" ".join("abc123def456ghi789" for _ in range(60)), "words of odd length"),
        (PROSE.replace(" ", " # "), "words of odd length"),
        (PROSE.replace(" the ", " the ### "), "many symbols"),
        (" ".join(f"the of 12345 {number}000" for number in range(40)), "few words with letters"),
        ("\n".join("- " + line for line in [PROSE.replace("\n", " ")] * 2), "a list"),
        (PROSE.replace(".\n", "...\n"), "lines that break off"),
        (" ".join(["lettuce", "tomatoes", "cucumber", "onions", "peppers"] * 12), "no running text"),
    ],
)
def test_what_does_not_look_like_prose_is_dropped(text: str, reason: str) -> None:
    assert _reason(Gopher(), text) == reason


def test_repetition_is_dropped_by_its_kind() -> None:
    first, second, third, _ = PROSE.split("\n")
    assert _reason(GopherRepetition(), PROSE) == ""
    # 2 of 5 lines occurred before: more than 0.3
    assert _reason(GopherRepetition(), "\n".join([first, second, third, first, second])) == "repeated lines"
    assert _reason(GopherRepetition(), "\n\n".join([first, first, second])) == "repeated paragraphs"
    assert _reason(GopherRepetition(), "buy now " * 10 + PROSE[:150]) == "one phrase repeated"
    # half of the words are a second copy, in one line
    doubled = PROSE.replace("\n", " ")
    assert _reason(GopherRepetition(), doubled + " And so once more. " + doubled) == "phrases repeated"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, ""),
        ("Lorem ipsum dolor sit amet", "a placeholder"),
        ("Home\nThis site uses cookies.\nPrivacy policy\nA story begins here.", "notices of a site"),
        (
            "\n".join(f"Category number {number} of what we sell" for number in range(10)),
            "lines without an end",
        ),
        ("\n".join(f"Go to {number}." for number in range(10)), "short lines"),
    ],
)
def test_the_frame_of_a_page_is_dropped(text: str, reason: str) -> None:
    assert _reason(Lines(), text) == reason


def test_languages_are_told_apart() -> None:
    pytest.importorskip("py3langid")
    german = "Der Fluss entspringt in den Hügeln und mündet nach vierzig Meilen ins Meer, wo die Fischer wohnen."
    assert _reason(Language(), PROSE) == ""
    assert _reason(Language(), german) == "another language"
    assert _reason(Language(("de", "en")), german) == ""
