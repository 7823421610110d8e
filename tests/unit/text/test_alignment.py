"""Where tokens of two tokenizers coincide."""

from upweight.text.alignment import coinciding, shared_tokens, spans
from upweight.text.tokenizer import Tokenizer

ONE = Tokenizer.train(["the cat sat on the mat\n"] * 50, 280)
OTHER = Tokenizer.train(["the dog ran to the rat\n"] * 50, 276)


def test_spans_cover_the_text() -> None:
    text = "the cat ran to 42"
    tokens = [*ONE.encode(text), ONE.end_of_text]
    found = spans(ONE, tokens, text)
    assert found[-1] == (len(text), len(text))
    assert "".join(text[begin:end] for begin, end in found[:-1]) == text


def test_a_token_within_a_character_has_no_span() -> None:
    text = "a\u2211b"  # three bytes, three tokens
    found = spans(ONE, ONE.encode(text), text)
    assert found[0] == (0, 1)
    assert found.count(None) == 3  # neither the first byte nor what ends within it, nor the last, begins and ends whole
    assert found[-1] == (2, 3)


def test_coinciding_tokens_stand_for_the_same_text() -> None:
    text = "the cat ran to the mat"
    one, other = ONE.encode(text), OTHER.encode(text)
    places = coinciding(spans(ONE, one, text), spans(OTHER, other, text))
    assert 0 < len(places) < max(len(one), len(other))
    for mine, theirs in places:
        assert ONE.decode([one[mine]]) == OTHER.decode([other[theirs]])


def test_shared_tokens_mean_the_same_bytes() -> None:
    shared = shared_tokens(ONE, OTHER)
    assert len(shared) >= 256  # the bytes
    for theirs, mine in shared.items():
        if theirs != OTHER.end_of_turn:
            assert OTHER.token_text(theirs) == ONE.token_text(mine)
    assert shared[OTHER.end_of_turn] == ONE.end_of_turn
    assert len(set(shared.values())) == len(shared)
