import pytest

from upweight.core.errors import UserError
from upweight.core.records import Document, Message, Problem
from upweight.curate.contamination import Problems, contaminated
from upweight.synthesize.stories import StoryDocuments, problem, story

RESERVED = [problem(story(7, index, fewest_steps=3, evaluation=True)) for index in range(300)]


def _question(one: Problem) -> str:
    return one.messages[0].content


def _problem(text: str) -> Problem:
    return Problem("p", (Message("user", text),), answer="1")


def test_every_planted_question_is_found_and_named() -> None:
    planted = []
    for index, one in enumerate(RESERVED):
        text = _question(one)
        told = (text, text.upper(), text.replace(". ", ".\n"), text.replace(" ", "  "))[index % 4]
        planted.append(Document.of(f"Some words before it. {told}\nThen an answer: {one.answer}", "web"))
    found = contaminated(planted, RESERVED)
    assert [hit.document_id for hit in found] == [document.id for document in planted]
    assert [hit.problem_id for hit in found] == [one.id for one in RESERVED]
    assert all(hit.share == 1.0 for hit in found)
    assert found[0].match.split() == _question(RESERVED[0]).rstrip("?").split()


def test_other_stories_are_left_alone() -> None:
    """Measured: 0 of 28,000 against 500 problems."""
    others = list(StoryDocuments(2000, seed=3).documents())
    assert len(contaminated(others, RESERVED)) < 0.005 * len(others)


def test_a_short_problem_counts_as_a_whole() -> None:
    guard = Problems([_problem("What is the capital of Peru?")])  # 6 words: one run
    hit, near_miss = (
        Document.of("He asked: what is the CAPITAL of\nPeru", "web"),
        Document.of("the capital of Peru", "web"),
    )
    assert [found.document_id for found in guard.find([hit, near_miss])] == [hit.id]


def test_a_problem_too_short_to_tell_anything_drops_no_document() -> None:
    guard = Problems([_problem("Solve for x:"), _problem("Find four words here")])
    assert guard.too_short == 1
    documents = [Document.of("To solve for x, divide.", "web"), Document.of("Find four words here.", "web")]
    assert [found.document_id for found in guard.find(documents)] == [documents[1].id]


def test_scripts_without_blanks_are_compared_by_their_characters() -> None:
    problem = "小明有三个苹果，妈妈又给了他五个，他吃掉了两个，请问小明现在还剩下多少个苹果？"
    guard = Problems([_problem(problem)])
    planted = Document.of(f"例题一{problem}答案是六个", "web")  # nothing stands between it and the text around it
    other = Document.of("小红有七个橘子，爸爸又买了四个，她送给同学三个，现在她的篮子里有八个橘子。", "web")
    hits = guard.find([other, planted])
    assert [(hit.document_id, hit.share) for hit in hits] == [(planted.id, 1.0)]
    assert hits[0].match == problem.rstrip("？")


def test_a_share_of_a_long_problem_is_enough_and_less_is_not() -> None:
    words = [f"w{number}" for number in range(27)]  # 20 runs of 8
    guard = Problems([_problem(" ".join(words))])
    documents = [Document.of(" ".join(words[:count]), "web") for count in (20, 21, 27)]
    # 20 words hold 13 runs (0.65), 21 words 14 runs (0.70)
    assert [(found.document_id, found.share) for found in guard.find(documents)] == [
        (documents[1].id, 0.7),
        (documents[2].id, 1.0),
    ]


def test_runs_do_not_cross_from_one_document_to_the_next() -> None:
    guard = Problems([_problem("one two three four five six seven eight")])
    assert guard.find([Document.of("one two three four", "a"), Document.of("five six seven eight", "a")]) == []


def test_nothing_is_found_without_problems_or_words() -> None:
    assert contaminated([Document.of("text", "a")], []) == []
    assert contaminated([Document.of("text", "a"), Document.of("...", "a")], [_problem("?!")]) == []
    assert Problems([_problem("one two")]).find([]) == []


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="share of 0"):
        Problems([], share=0.0)
