import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Document
from upweight.curate.annotate import Asking, annotate, read_scores
from upweight.curate.dimensions import DIMENSIONS

GOOD = json.dumps({dimension.name: place % 10 for place, dimension in enumerate(DIMENSIONS)})
SCORES = tuple(place % 10 for place in range(20))
DOCUMENTS = [Document.of(f"text {number}", "x") for number in range(3)]


class Stub(Sampler):
    """Answers each document's questions with its list of answers in turn, the last one ever after."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.last_prompts: dict[str, Prompt] = {}

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        found = []
        for prompt in prompts:
            assert not isinstance(prompt, str)
            name = next(text for text in self.answers if f"<<<\n{text}\n>>>" in prompt[1].content)
            self.last_prompts[name] = prompt
            answers = self.answers[name]
            answer = answers[min(self.asked.count(name), len(answers) - 1)]
            self.asked.append(name)
            found.append([Completion((1, 2), (), answer, "end", "stub")] * count)
        return found


def test_scores_are_read_asked_again_and_counted() -> None:
    stub = Stub(
        {"text 0": [GOOD], "text 1": ["I like it", "<think>{}</think>\n```json\n" + GOOD + "\n```"], "text 2": [GOOD]}
    )
    found = annotate(DOCUMENTS, stub)
    assert [tags.document_id for tags in found.tags] == [document.id for document in DOCUMENTS]
    assert all(tags.scores == SCORES for tags in found.tags)
    # 3 documents, one of them asked twice; two tokens an answer.
    assert (found.calls, found.tokens_written, found.unreadable) == (4, 8, {})
    again = stub.last_prompts["text 1"]
    assert not isinstance(again, str)
    assert again[-1].content.startswith("That cannot be used: there is no JSON object in it")
    assert again[-2].content == "I like it"


def test_unreadable_answers_are_left_out_up_to_a_share() -> None:
    stub = Stub({"text 0": [GOOD], "text 1": ["no"], "text 2": [GOOD]})
    found = annotate(DOCUMENTS, stub, Asking(most_unreadable_share=0.5))
    assert [tags.document_id for tags in found.tags] == [DOCUMENTS[0].id, DOCUMENTS[2].id]
    assert found.unreadable == {DOCUMENTS[1].id: "there is no JSON object in it"}
    assert stub.asked.count("text 1") == 3
    with pytest.raises(UserError, match=r"1 of 3 documents got no readable scores"):
        annotate(DOCUMENTS, stub)


def test_what_is_kept_is_not_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    stub = Stub({"text 0": [GOOD], "text 1": [GOOD], "text 2": [GOOD]})
    annotate(DOCUMENTS[:2], stub, kept_in=path)
    with path.open("a") as file:
        file.write('{"document_id": "to')  # killed while it wrote
    found = annotate(DOCUMENTS, stub, kept_in=path)
    assert stub.asked == ["text 0", "text 1", "text 2"]
    assert found.calls == 1
    assert len(found.tags) == 3
    assert len(path.read_text().splitlines()) == 3
    path.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="is no file of annotations"):
        annotate(DOCUMENTS, stub, kept_in=path)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("{'a': 1}", "cannot be read"),
        ('{"safety": 1}', "these dimensions are missing: knowledge_density"),
        (GOOD.replace('"safety": 8', '"safety": 10'), "safety is 10"),
        (GOOD.replace('"safety": 8', '"safety": 7.5'), "safety is 7.5"),
        (GOOD.replace('"safety": 8', '"safety": true'), "safety is True"),
    ],
)
def test_answers_are_checked(answer: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_scores("d", answer)


def test_the_prompt_names_every_dimension_and_bounds_the_text() -> None:
    from upweight.curate.annotate import messages_for

    system, user = messages_for(Document.of("x" * 5000, "s"), 100)
    assert all(f"{dimension.name}: {dimension.question}" in system.content for dimension in DIMENSIONS)
    assert user.content.count("x") == 100 + "Excerpt".count("x")
