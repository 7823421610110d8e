import random

import numpy as np
import pytest

from upweight.curate.overlap import (
    MinHash,
    _candidates,
    _components,
    estimated_similarity,
    exact_key,
    near_duplicates,
    signatures,
)
from upweight.synthesize.stories import StoryDocuments

CHANCE = random.Random(5)
WORDS = ["".join(CHANCE.choice("abcdefghij") for _ in range(7)) for _ in range(3000)]


def _text(chance: random.Random, words: int) -> list[str]:
    return [chance.choice(WORDS) for _ in range(words)]


def _jaccard(first: list[str], second: list[str], words: int = 5) -> float:
    one, other = ({tuple(text[at : at + words]) for at in range(len(text) - words + 1)} for text in (first, second))
    return len(one & other) / len(one | other)


def test_exact_keys_overlook_blanks_and_case_alone() -> None:
    assert exact_key("A  line\nand more") == exact_key("a line and MORE")
    assert exact_key("a line, and more") != exact_key("a line and more")


def test_planted_near_duplicates_are_found_and_different_texts_kept() -> None:
    chance = random.Random(1)
    texts, origin = [], []
    for group in range(150):
        words = _text(chance, 200)
        texts.append(" ".join(words))
        origin.append(group)
        if group < 75:  # 2 words changed: 196 runs of five, at most 10 differ, J >= 186/206 = 0.90
            for _ in range(2):
                words[chance.randrange(200)] = "changed"
            texts.append(" ".join(words).upper().replace(" ", ",\n"))  # marks, line ends and case do not count
            origin.append(group)
    first = near_duplicates(texts)
    found = sum(int(first[i]) == i - 1 for i in range(1, len(texts)) if origin[i] == origin[i - 1])
    assert found >= 73
    assert all(origin[int(label)] == origin[i] for i, label in enumerate(first))


def test_near_duplicates_without_blanks_between_words_are_found() -> None:
    chance = random.Random(3)
    clauses = ["".join(chr(chance.randrange(0x4E00, 0x9FA5)) for _ in range(12)) for _ in range(60)]
    texts = ["，".join(clauses[:30]), "，".join([*clauses[:14], clauses[50], *clauses[15:30]]), "，".join(clauses[30:])]
    # 12 of 360 characters are others: of 356 runs of five 16 are, J = 340 / 372 = 0.91
    assert near_duplicates(texts).tolist() == [0, 0, 2]


def test_candidates_of_all_bands_are_told_once() -> None:
    none = 0xFFFFFFFF  # a text without a word
    signed = np.array([[1, 7], [none, none], [1, 7], [1, 8], [2, 8], [none, none]], np.uint32)
    # 0, 2 and 3 share the first band: each with the one before and with the first; 3 and 4 the second, as 0 and 2 do
    pairs = _candidates(signed, MinHash(bands=2, rows=1))
    assert pairs.tolist() == [[0, 2], [0, 3], [2, 3], [3, 4]]


def test_the_threshold_decides_over_pairs_that_resemble_each_other() -> None:
    chance = random.Random(4)
    texts = []
    for _ in range(30):
        words = _text(chance, 200)  # 196 runs of five, of which the last 40 change: J = 156 / 236 = 0.66
        texts += [" ".join(words), " ".join(words[:160] + _text(chance, 40))]
    # P(candidate) = 1 - (1 - 0.66^6)^20 = 0.82, so 25 of 30 pairs are compared; the standard error of J is 0.043
    merged = {
        threshold: int((near_duplicates(texts, MinHash(threshold=threshold)) != np.arange(60)).sum())
        for threshold in (0.5, 0.8)
    }
    assert merged[0.5] >= 18
    assert merged[0.8] <= 1


def test_the_estimate_is_the_jaccard_similarity() -> None:
    chance = random.Random(2)
    errors = []
    for _ in range(60):
        one = _text(chance, 120)
        other = one[: chance.randrange(30, 120)] + _text(chance, 40)
        signed = signatures([" ".join(one), " ".join(other)])
        estimate = float(estimated_similarity(signed, np.array([0]), np.array([1]))[0])
        errors.append(estimate - _jaccard(one, other))
    # 120 values: the standard error is sqrt(J(1-J)/120) <= 0.046; of the mean of 60, 0.006
    assert abs(float(np.mean(errors))) < 0.02
    assert float(np.std(errors)) < 0.06


def test_texts_of_few_or_no_words_are_not_thrown_together() -> None:
    texts = ["", "...", "!!", "one two", "one three", "one two"]
    assert near_duplicates(texts).tolist() == [0, 1, 2, 3, 4, 3]
    assert near_duplicates([]).tolist() == []


def test_components_against_a_walk_over_the_graph() -> None:
    chance = random.Random(3)
    for _ in range(50):
        count = chance.randrange(1, 40)
        pairs = [(chance.randrange(count), chance.randrange(count)) for _ in range(chance.randrange(count))]
        expected = list(range(count))
        while True:
            before = list(expected)
            for one, other in pairs:
                expected[one] = expected[other] = min(expected[one], expected[other])
            if before == expected:
                break
        first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
        assert _components(count, first, second).tolist() == expected


def test_different_stories_are_no_near_duplicates() -> None:
    """Stories are told in the same few phrases. Measured: 0 of 28,000."""
    told = list(dict.fromkeys(document.text for document in StoryDocuments(1200, dialogue_share=0.15).documents()))
    dropped = int((near_duplicates(told) != np.arange(len(told))).sum())
    assert dropped < 0.03 * len(told)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="threshold"):
        MinHash(threshold=0.0)
    with pytest.raises(ValueError, match="counts of 1 or more"):
        MinHash(bands=0)
