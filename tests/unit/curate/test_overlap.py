import random

import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.core.records import Document, Message, Problem
from upweight.curate.overlap import MinHash, clusters, contaminated, exact_key, near_duplicates, signatures


def sentence(seed: int, words: int = 200) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(words)]


def test_planted_near_duplicates_are_found_and_others_left() -> None:
    originals = [sentence(seed) for seed in range(100)]
    # One word of 200 replaced breaks 5 of 196 runs of five: Jaccard 191 / 201 = 0.95.
    changed = [[*words[:100], "changed", *words[101:]] for words in originals[:40]]
    texts = [" ".join(words) for words in originals + changed]
    expected = [*range(100), *range(40)]
    assert near_duplicates(texts).tolist() == expected


def test_marks_and_case_do_not_count() -> None:
    words = sentence(1)
    assert near_duplicates([" ".join(words), ", ".join(words).upper() + "!"]).tolist() == [0, 0]


def test_a_chain_of_near_duplicates_is_one_cluster() -> None:
    # a ~ b and b ~ c; the signatures say 0.9 for neighbours and 0.8 for the ends, the threshold is 0.85.
    method = MinHash(threshold=0.85, bands=20, rows=1)
    a = np.arange(20, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    b[:2] += 100
    c[:2] += 100
    c[2:4] += 200
    other = a + np.uint32(1000)
    assert clusters(np.stack([other, c, a, b]), method).tolist() == [0, 1, 1, 1]


def test_texts_without_words_are_near_nothing() -> None:
    assert near_duplicates(["", "...", "", "--"]).tolist() == [0, 1, 2, 3]
    assert near_duplicates([]).tolist() == []


def test_half_the_same_is_no_near_duplicate() -> None:
    # 100 of 200 words in common: 96 of 296 runs, Jaccard 0.32.
    first = sentence(1)
    assert near_duplicates([" ".join(first), " ".join(first[:100] + sentence(2)[:100])]).tolist() == [0, 1]


def test_signatures_do_not_depend_on_the_batch() -> None:
    texts = [" ".join(sentence(seed)) for seed in range(5)]
    assert np.array_equal(signatures(texts)[3:4], signatures(texts[3:4]))


def test_exact_key_ignores_blanks_and_case_only() -> None:
    assert exact_key("A  b\n") == exact_key("a b")
    assert exact_key("a b.") != exact_key("a b")


PROBLEM = Problem(
    "p",
    (
        Message(
            "user",
            "Mia has 14 pens. Then she buys 23 more and gives 5 of them to Tom. How many pens does Mia have now?",
        ),
    ),
)


def test_contamination_is_found_and_shown() -> None:
    inside = "Before it.\nMIA has 14 pens -- then she buys 23 more, and gives 5 of them to Tom: how many pens does Mia have now? After."
    documents = [
        Document.of("Nothing of the kind is said here, only other words about pens.", "x"),
        Document.of(inside, "x"),
    ]
    (found,) = contaminated(documents, [PROBLEM])
    assert (found.document_id, found.problem_id, found.share) == (documents[1].id, "p", 1.0)
    assert found.match == inside[inside.index("MIA") : inside.index("? After")]


def test_another_problem_of_the_template_is_no_contamination() -> None:
    other = "Mia has 31 pens. Then she buys 17 more and gives 8 of them to Tom. How many pens does Mia have now?"
    assert contaminated([Document.of(other, "x")], [PROBLEM]) == []


def test_part_of_a_problem() -> None:
    # 22 words are 15 runs of eight. Its first 18 words hold 11 of them: a share of 0.73, and 18 >= 13 words in a row.
    words = PROBLEM.messages[0].content.split()
    document = Document.of(" ".join(words[:18]), "x")
    (found,) = contaminated([document], [PROBLEM])
    assert found.share == pytest.approx(11 / 15)
    assert contaminated([document], [PROBLEM], share=0.75) == []


def test_short_problems_match_as_a_whole() -> None:
    short = Problem("s", (Message("user", "What is 17 times 23?"),))
    documents = [Document.of("So what is 17 times 23 then", "x"), Document.of("So what is 17 times 24 then", "x")]
    assert [found.document_id for found in contaminated(documents, [short])] == [documents[0].id]


def test_no_problem_and_no_words() -> None:
    assert contaminated([Document.of("text", "x")], []) == []
    assert contaminated([Document.of("text", "x")], [Problem("e", (Message("user", "?!"),))]) == []
    assert contaminated([], [PROBLEM]) == []
    with pytest.raises(UserError, match="share"):
        contaminated([], [PROBLEM], share=0.0)
