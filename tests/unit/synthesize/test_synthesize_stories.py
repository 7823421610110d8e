"""Stories: deterministic, right, within bounds, readable back, and never a reserved one among those for training."""

from random import Random

import pytest

from upweight.synthesize import stories
from upweight.synthesize.reading import read
from upweight.synthesize.stories import Step, Story, StoryDocuments, story
from upweight.verify.answers import extract


def test_a_story_by_hand() -> None:
    # 14 + 23 = 37; 37 - 5 = 32; 32 / 2 = 16
    told = Story("", 14, (Step("+", 23), Step("-", 5), Step("half", 2)))
    assert told.chain == "14+23=37. 37-5=32. 32/2=16."
    assert told.answer == "16"
    assert stories.worked(told) == "\n14+23=37. 37-5=32. 32/2=16.\n\\boxed{16}"


def test_stories_depend_on_seed_and_index_alone() -> None:
    first = [story(7, index) for index in range(50)]
    assert [story(7, index) for index in reversed(range(50))] == first[::-1]
    assert story(8, 0) != first[0]
    # a golden: the stream must not change between versions of Python or of ours without being noticed
    assert story(0, 0).question == GOLDEN_QUESTION
    assert story(0, 0).chain == GOLDEN_CHAIN


GOLDEN_QUESTION = (
    "Sam owns 13 cups. Then he sells 7 cups. Next Eva takes 5 of them. Next Eva brings 6 more c"
    "ups. Then he loses 6 of them. Later he finds 9 more. How many cups does Sam have at the end?"
)
GOLDEN_CHAIN = "13-7=6. 6-5=1. 1+6=7. 7-6=1. 1+9=10."


def test_every_value_stays_within_0_and_99_and_every_equation_is_true() -> None:
    for index in range(500):
        told = story(1, index, fewest_steps=1, most_steps=6)
        assert 1 <= len(told.steps) <= 6
        value = told.start
        for equation in told.chain.split(" "):
            left, result = equation.rstrip(".").split("=")
            # Python reads the equation as it stands
            assert eval(left) == int(result)  # noqa: S307 - digits and signs made above
            assert left.startswith(str(value))
            value = int(result)
            assert 0 < value <= 99
        assert told.answer == str(value)


def test_reserved_questions_are_never_made_for_training_and_only_they_for_evaluation() -> None:
    assert not any(stories.reserved(story(3, index).question) for index in range(2000))
    held_out = [story(3, index, evaluation=True) for index in range(100)]
    assert all(stories.reserved(told.question) for told in held_out)
    assert stories.reserved(held_out[0].question.replace(" ", "\n "))  # the words count, not the blanks


def test_a_sixteenth_of_all_questions_is_reserved() -> None:
    # 4,000 questions: 250 expected, standard deviation sqrt(4000 x 15/256) = 15
    assert 175 < sum(stories.reserved(f"How many are {index} apples?") for index in range(4000)) < 325


def test_values_stay_within_the_range_that_was_asked_for() -> None:
    for index in range(200):
        told = story(6, index, largest_value=20)
        assert all(int(part.rstrip(".").partition("=")[2]) <= 20 for part in told.chain.split(" "))
    with pytest.raises(ValueError, match="largest_value"):
        story(0, 0, largest_value=3)


def test_every_story_can_be_read_back() -> None:
    for index in range(1000):
        told = story(5, index, fewest_steps=1, most_steps=6)
        assert read(told.question) == told


def test_what_is_no_story_is_not_read() -> None:
    told = story(0, 0)
    assert read("What is the capital of France?") is None
    assert read(told.question.replace("How many", "How few").replace("What is", "Who is")) is None
    assert read(f"The moon fell down. {told.question}") is None


def test_documents_are_marked_by_what_was_done_to_them() -> None:
    made = list(StoryDocuments(400, seed=2, damaged_share=0.25).documents())
    damaged = [document for document in made if document.source == stories.DAMAGED]
    # 400 x 0.25 = 100, standard deviation sqrt(400 x 3/16) = 8.7
    assert 65 < len(damaged) < 135
    assert list(StoryDocuments(400, seed=2, damaged_share=0.25).documents()) == made
    for document in made:
        if document.source == stories.WORKED:
            question, chain, box = document.text.split("\n")
            told = read(question)
            assert told is not None
            assert (chain, box) == (told.chain, f"\\boxed{{{told.answer}}}")


def test_damage_is_damage() -> None:
    for index in range(300):
        told = story(9, index)
        assert stories.damaged(told, Random(index)) != stories.worked(told)
        chain, answer = stories.wrong_chain(told, Random(index))
        assert answer != told.answer
        assert chain.endswith(f"={answer}.")


def test_a_conversation_thinks_and_then_answers_in_a_box() -> None:
    told = story(0, 1)
    talk = stories.conversation(told)
    assert talk.messages[0].content == told.question
    assert talk.messages[1].content == f"<think>\n{told.chain}\n</think>\n\\boxed{{{told.answer}}}"
    assert extract(talk.messages[1].content) == stories.problem(told).answer


@pytest.mark.parametrize(("fewest", "most"), [(0, 3), (4, 3)])
def test_impossible_numbers_of_steps_are_refused(fewest: int, most: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        story(0, 0, fewest_steps=fewest, most_steps=most)
