import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.curate.embed import HashedEmbedder, SentenceEmbedder, hashed


def test_a_text_is_closest_to_itself_then_to_its_relatives() -> None:
    embedder = HashedEmbedder()
    vectors = embedder.embed(["the cat counts apples", "cats counted the apple", "quantum field theory"])
    cosines = vectors @ vectors[0]
    # The same text: exactly 1. Shared trigrams (cat, coun, appl): well above the noise of 1/sqrt(256) = 0.06.
    # Nothing in common: within four times that noise.
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines[1] > 0.3
    assert abs(cosines[2]) < 0.25


def test_vectors_do_not_depend_on_the_batch_and_have_length_one() -> None:
    texts = ["one two three", "", "two\nthree 4+5=9.", "ZWEI drei 数学の本"]
    embedder = HashedEmbedder(width=64, seed=3)
    embedder.count(texts)
    together = embedder.embed(texts)
    np.testing.assert_allclose(together, np.concatenate([embedder.embed([text]) for text in texts]), atol=1e-6)
    # The empty text has no words: a row of zeros.
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), [1, 0, 1, 1], atol=1e-5)
    assert together.dtype == np.float32
    assert HashedEmbedder(width=64).embed([]).shape == (0, 64)


def test_same_seed_same_vectors_another_seed_others() -> None:
    first, same, other = (HashedEmbedder(32, seed).embed(["a few words"]) for seed in (1, 1, 2))
    assert first.tobytes() == same.tobytes()
    assert first.tobytes() != other.tobytes()


def test_rare_words_weigh_more_and_are_the_key_words() -> None:
    embedder = HashedEmbedder()
    embedder.count(["the sum", "the product", "the quotient"])
    # 3 documents: "the" in all, ln(4/4) + 1 = 1; "sum" in one, ln(4/2) + 1.
    assert embedder.rarity_of("the") == pytest.approx(1)
    assert embedder.rarity_of("sum") == pytest.approx(np.log(2) + 1)
    assert embedder.rarity()[hashed("sum")[0]] == pytest.approx(np.log(2) + 1)
    # Never seen: ln(4/1) + 1 is the rarest; marks are no key words.
    assert embedder.key_words("the sum! of the", 2) == ["of", "sum"]


def test_a_missing_package_is_said() -> None:
    with pytest.raises(UserError, match=r"needs the extra: pip install .upweight\[embed\]"):
        SentenceEmbedder("some/model")
