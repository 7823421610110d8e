import pytest

from upweight.curate.decoding import decode, repaired

FRENCH = "Le café où l’on mange des crêpes coûte 3 € à Noël."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_text_is_read_whatever_its_encoding(encoding: str) -> None:
    assert decode(FRENCH.encode(encoding)) == FRENCH


def test_pieces_of_another_encoding_in_utf_8_are_read() -> None:
    assert decode("naïve ".encode() + "café".encode("cp1252") + b" plain text after it") == (
        "naïve café plain text after it"
    )


@pytest.mark.parametrize(
    "data",
    [
        bytes(range(256)) * 4,
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00",
        "Это русский текст.".encode("cp1251"),  # most bytes foreign: no western language
        b"\xff\xfe\x00",  # a mark of UTF-16, and half a letter
    ],
)
def test_what_is_no_text_is_none(data: bytes) -> None:
    assert decode(data) is None


def test_misread_utf_8_is_put_right_once_or_twice() -> None:
    once = FRENCH.encode().decode("cp1252", "ignore")
    assert repaired("It’s a “test”".encode().decode("cp1252", "replace").replace("\ufffd", "\x9d")) == "It’s a “test”"
    assert "cafÃ©" in once
    assert repaired("café crème".encode().decode("cp1252")) == "café crème"
    assert repaired("café crème".encode().decode("cp1252").encode().decode("cp1252")) == "café crème"


@pytest.mark.parametrize(
    "text",
    [
        FRENCH,
        "«CAFÉ», «CRÊPERIE», «ÉTÉ», déjà vu à Noël",  # É» would be one misread letter; most letters here are not
        "In mojibake é becomes Ã© and à becomes Ã , which here is meant: été, naïveté, élève, là, où, ça",
        "one Ã© alone",
    ],
)
def test_special_letters_that_are_meant_stay(text: str) -> None:
    assert repaired(text) == text
