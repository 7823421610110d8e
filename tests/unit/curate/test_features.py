import numpy as np
import pytest

from upweight.curate import features
from upweight.curate.features import SURFACE, Batch, counted, surface

TEXTS = ["Two words", "", "a b a b a b", "naïve café — 1,000 €", "line one\n\n  line two.\n"]


def column(name: str, text: str) -> float:
    return float(surface([text])[0, SURFACE.index(name)])


def test_a_text_has_the_same_features_in_any_batch() -> None:
    together = surface(TEXTS)
    assert together.shape == (5, len(SURFACE))
    assert len(set(SURFACE)) == len(SURFACE)
    assert np.isfinite(together).all()
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(together[row], surface([text])[0])
    assert surface([]).shape == (0, len(SURFACE))


def test_shares_by_hand() -> None:
    # "aB 1" and the newline that ends every text: 5 bytes, one each of lower, upper, space, digit, newline.
    for name in ("lower", "upper", "space", "digit", "newline"):
        assert column(f"class_{name}", "aB 1") == pytest.approx((1 / 5) ** 0.5)
    assert column("words", "one two three") == pytest.approx(np.log(4))
    assert column("distinct", "one two one two") == pytest.approx(0.5)
    assert column("word_mean", "a bbb") == pytest.approx(2.0)
    assert column("lines", "a\nb\nc") == pytest.approx(np.log(4))
    assert column("blank", "a\n\nb\n\nc") == pytest.approx(2 / 5)
    assert column("starts_upper", "Yes") == 1
    assert column("ends_stopped", "Yes.") == 1
    assert column("ends_stopped", "Yes") == 0
    # Of three long lines two repeat the first.
    assert column("repeated", "a long line\na long line\na long line") == pytest.approx(2 / 3)
    assert column("equations_wrong_share", "1+1=2. 1+1=3.") == pytest.approx(0.5)


def test_words_are_told_apart_by_their_letters_and_not_by_their_place() -> None:
    batch = Batch.of(["cat act cat", "cat"])
    found = features.words(batch)
    assert found.lengths.tolist() == [3, 3, 3, 3]
    assert found.grams.document.tolist() == [0, 0, 0, 1]
    cat, act, again, other = found.grams.key.tolist()
    assert cat == again == other != act


def test_grams_stay_inside_their_document() -> None:
    # "abc\n" has 4 bytes: 3 pairs, 2 triples; "d\n" has 1 pair.
    pairs, triples = features.character_grams(Batch.of(["abc", "d"]), (2, 3))
    assert pairs.document.tolist() == [0, 0, 0, 1]
    assert triples.document.tolist() == [0, 0]


def test_counts() -> None:
    entries = counted(features.words(Batch.of(["one two one", "two"])).grams, 18)
    assert entries.document.tolist() == [0, 0, 1]
    assert sorted(entries.times.tolist()) == [1, 1, 2]
    wide = counted(features.words(Batch.of(["one two one", "two"])).grams, 40)
    assert np.array_equal(wide.bucket >> 22, entries.bucket)
    nothing = counted(features.words(Batch.of(["..."])).grams, 18)
    assert len(nothing.document) == 0
