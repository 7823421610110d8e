import json
from pathlib import Path

import numpy as np
import pytest

from upweight.core.errors import UserError
from upweight.curate.dimensions import DIMENSIONS
from upweight.curate.forest import Growth
from upweight.curate.scores import NAMES
from upweight.curate.tagger import EXCERPT_OF_LONG, SHIPPED, Tagger, excerpts_of
from upweight.curate.tagger_figures import agreement, as_markdown, ranks
from upweight.curate.tagger_training import Annotated, Training, held_back, read_annotated, train

PROSE = (
    "The heart pumps blood through two circuits. In the first, blood that carries little oxygen flows from the right "
    "ventricle to the lungs, where it takes up oxygen and gives off carbon dioxide. It returns to the left atrium, and "
    "the left ventricle then drives it through the aorta into the body, because the muscle there is much stronger."
)
SPAM = "CLICK HERE NOW!!! Buy cheap watches $$$ FREE shipping >>> http://cheap.example/buy?id=1 <<< Limited offer!!!"
CODE = (
    "def mean(values):\n"
    '    """The arithmetic mean of a non-empty list."""\n'
    "    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n"
)
NOISE = "\ufffd\ufffd x9#k \ufffd~~|| q7\ufffd zz%% \ufffd\ufffd}{ 0x \ufffd pl@@ \ufffd\ufffd !! \ufffd" * 4


@pytest.fixture(scope="module")
def shipped() -> Tagger:
    return Tagger.load()


def of(tagger: Tagger, name: str, text: str) -> int:
    return int(tagger.score([text])[0, NAMES.index(name)])


def test_the_shipped_tagger_is_small_and_says_how_good_it_is(shipped: Tagger) -> None:
    assert SHIPPED.stat().st_size < 5_000_000
    assert shipped.figures["spearman"] >= 0.76
    assert min(row["spearman"] for row in shipped.figures["by_dimension"].values()) >= 0.5
    assert list(shipped.figures["by_dimension"]) == [dimension.name for dimension in DIMENSIONS]


def test_it_tells_obvious_texts_apart(shipped: Tagger) -> None:
    assert of(shipped, "knowledge_density", PROSE) > of(shipped, "knowledge_density", SPAM) + 2
    assert of(shipped, "non_promotional", PROSE) > of(shipped, "non_promotional", SPAM) + 2
    assert of(shipped, "code_content", CODE) > of(shipped, "code_content", PROSE) + 2
    assert of(shipped, "character_integrity", PROSE) > of(shipped, "character_integrity", NOISE) + 2
    assert of(shipped, "fluency", PROSE) > of(shipped, "fluency", NOISE) + 2


def test_a_wrong_step_costs_reliability(shipped: Tagger) -> None:
    right = "Problem. Ann has 40 cups. Ann buys 9 more. Ann buys 5 more. How many cups does Ann have now?\n"
    right += "Solution. First, 40 + 9 = 49. Then, 49 + 5 = 54. The answer is 54."
    wrong = right.replace("49 + 5 = 54", "49 + 5 = 56").replace("is 54", "is 56")
    assert of(shipped, "factual_reliability", right) > of(shipped, "factual_reliability", wrong)


def test_scores_do_not_depend_on_the_batch(shipped: Tagger) -> None:
    texts = [PROSE, SPAM, CODE, NOISE, PROSE * 20, "", "x"] * 12
    together = shipped.score(texts)
    assert together.shape == (84, 20)
    assert together.min() >= 0
    assert together.max() <= 9
    for row, text in enumerate(texts[:7]):
        np.testing.assert_array_equal(together[row], shipped.score([text])[0])
    assert shipped.score([]).shape == (0, 20)


def test_long_texts_are_read_at_three_places() -> None:
    text = "".join(chr(ord("a") + place % 26) for place in range(10_000))
    parts = excerpts_of(text)
    assert [len(part) for part in parts] == [EXCERPT_OF_LONG] * 3
    assert text.startswith(parts[0])
    assert text.endswith(parts[2])
    assert excerpts_of(text[:1500]) == [text[:1500]]


def test_no_tagger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Tagger.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is no tagger"):
        Tagger.load(tmp_path / "bad.npz")
    (tmp_path / "cut.npz").write_bytes(SHIPPED.read_bytes()[:100_000])
    with pytest.raises(UserError, match="is no tagger"):
        Tagger.load(tmp_path / "cut.npz")


def annotated(count: int) -> Annotated:
    """Texts of two kinds that differ in every score."""
    texts = [f"{PROSE} {number}" if number % 2 else f"{SPAM} {number}" for number in range(count)]
    scores = np.array([[8.0 if number % 2 else 2.0] * 20 for number in range(count)])
    return Annotated([str(number) for number in range(count)], texts, scores)


def test_training_saving_and_loading(tmp_path: Path) -> None:
    growth = Growth(rounds=20, rate=0.2, leaves=4)
    tagger = train(annotated(120), Training(forests=1, folds=3, growth=growth))
    assert tagger.figures["spearman"] > 0.9
    assert tagger.figures["trained_on"] + tagger.figures["held_back"] == 120
    tagger.save(tmp_path / "own.npz")
    loaded = Tagger.load(tmp_path / "own.npz")
    texts = [PROSE, SPAM, CODE]
    # Weights are stored in 8 bits: a text near a threshold may fall to its other side in one of the 20 small trees.
    np.testing.assert_allclose(loaded.expect(texts), tagger.expect(texts), atol=0.5)
    assert loaded.figures == tagger.figures
    assert "| safety |" in as_markdown(loaded.figures)
    assert [path.name for path in tmp_path.iterdir()] == ["own.npz"]


def test_what_is_held_back_follows_from_the_id() -> None:
    ids = [str(number) for number in range(1000)]
    held = held_back(ids, 5)
    assert np.array_equal(held_back(ids[500:], 5), held[500:])
    assert 150 < held.sum() < 250  # 200 expected, standard deviation 13


def test_annotations_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "scores": [1] * 19}) + "\n")
    with pytest.raises(UserError, match="record 1: scores are"):
        read_annotated(path)
    path.write_text(json.dumps({"text": " ", "scores": [1] * 20}) + "\n")
    with pytest.raises(UserError, match="record 1 has no text"):
        read_annotated(path)
    path.write_text(json.dumps({"text": "x", "scores": [1] * 20}) + "\n")
    with pytest.raises(UserError, match="at least 50"):
        read_annotated(path)


def test_spearman_by_hand() -> None:
    # Values 5, 1, 1, 9: ranks 3, 1.5, 1.5, 4.
    assert ranks(np.array([5.0, 1.0, 1.0, 9.0])).tolist() == [3.0, 1.5, 1.5, 4.0]
    first = np.array([[1.0], [2.0], [3.0], [4.0]])
    # Ranks 2, 1, 4, 3 against 1, 2, 3, 4: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6.
    second = np.array([[20.0], [10.0], [40.0], [30.0]])
    assert agreement(first, second)[0] == pytest.approx(0.6)
    assert agreement(first, np.ones((4, 1)))[0] == 0.0
