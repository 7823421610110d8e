"""Annotation: a strong language model scores documents 0-9 on every dimension. The tagger is distilled from this.

The model is any Sampler. It is asked for one JSON object with a key for each dimension; what cannot be read is asked
for again with the reason, and what stays unreadable is counted and left out. What a document was given is kept in a
file as it comes, so that a run that was stopped pays for nothing twice.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.protocols import Limits, Sampler
from upweight.core.records import HIGHEST_SCORE, Document, Message, Tags
from upweight.core.work import Bar
from upweight.curate.dimensions import DIMENSIONS
from upweight.store.jsonl import iterate_jsonl

DOCUMENTS_AT_ONCE = 32
_OBJECT = re.compile(r"\{[^{}]*\}")
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)

INSTRUCTION = """Score an excerpt for training a reasoning language model: on each dimension an integer from 0 to 9.
0 is none of it or the worst, 2 little, 4-5 ordinary, 7 strong, 9 the best imaginable. Use the whole range.
Judge only the excerpt. That it starts or ends in the middle costs at most 2 points of self_containedness and 1 of
length_adequacy. Judge content, not the prestige of its topic. Code counts as text of its own kind.

{dimensions}

Answer with one JSON object and nothing else: each dimension's name with its score, in this order."""


SCHEMA = {
    "type": "object",
    "properties": {
        dimension.name: {"type": "integer", "minimum": 0, "maximum": HIGHEST_SCORE} for dimension in DIMENSIONS
    },
    "required": [dimension.name for dimension in DIMENSIONS],
    "additionalProperties": False,
}
"""The answer as a JSON schema, for servers that can hold a model to one."""


@dataclass(frozen=True)
class Asking:
    """How documents are put to the annotator.

    Attributes:
        attempts: how often one document is asked for at most.
        excerpt_characters: only this much of a document's beginning is shown.
        limits: of the answer; each further attempt draws with another seed.
        most_unreadable_share: a larger share of documents without a readable answer is an error, 0-1.
    """

    attempts: int = 3
    excerpt_characters: int = 1_500
    limits: Limits = Limits(max_new_tokens=400, temperature=0.0)  # noqa: RUF009 - frozen, so one instance serves all
    most_unreadable_share: float = 0.05


@dataclass(frozen=True)
class Annotation:
    """What came of annotating.

    Attributes:
        tags: of the documents whose answer could be read, in the order of the documents.
        unreadable: the ids of the others, each with what was wrong with its last answer.
        calls, characters_read, characters_written, tokens_written: what was asked of the model and what it wrote, in
            this run; a document that the file held already costs nothing. Tokens are 0 where the sampler gives none.
    """

    tags: tuple[Tags, ...]
    unreadable: dict[str, str]
    calls: int
    characters_read: int
    characters_written: int
    tokens_written: int


def messages_for(document: Document, excerpt_characters: int) -> tuple[Message, ...]:
    """The conversation that asks for one document's scores."""
    lines = "\n".join(
        f"{dimension.name}: {dimension.question} (0: {dimension.lowest}; 9: {dimension.highest})"
        for dimension in DIMENSIONS
    )
    excerpt = document.text[:excerpt_characters]
    return (
        Message("system", INSTRUCTION.format(dimensions=lines)),
        Message("user", f"Excerpt:\n<<<\n{excerpt}\n>>>"),
    )


def read_scores(document_id: str, answer: str) -> Tags:
    """The scores in an answer; ValueError with the reason, put so that the model can mend it."""
    found = _OBJECT.findall(_THINKING.sub("", answer))
    if not found:
        raise ValueError("there is no JSON object in it")
    try:
        scores = json.loads(found[-1])
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON cannot be read: {error}") from None
    missing = [dimension.name for dimension in DIMENSIONS if dimension.name not in scores]
    if missing:
        raise ValueError(f"these dimensions are missing: {', '.join(missing)}")
    values = [scores[dimension.name] for dimension in DIMENSIONS]
    for dimension, value in zip(DIMENSIONS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= HIGHEST_SCORE:
            raise ValueError(f"{dimension.name} is {value!r}, expected an integer from 0 to {HIGHEST_SCORE}")
    return Tags(document_id, tuple(values))


def annotate(
    documents: Sequence[Document],
    annotator: Sampler,
    asking: Asking | None = None,
    *,
    kept_in: Path | None = None,
    bar: Bar | None = None,
) -> Annotation:
    """Have `annotator` score `documents`.

    Args:
        documents: each is scored once, by its id.
        annotator: the model.
        asking: how it is asked.
        kept_in: a file that keeps each answer (one JSON object a line: document_id, scores). Documents that it holds
            are not asked for again, unless they were put in other words then.
        bar: told of each document that is done, also of those that are kept.

    Raises UserError where more than the tolerated share of the documents stays without a readable answer.
    """
    asking = asking or Asking()
    asked = fingerprint([INSTRUCTION, messages_for(Document("", "", ""), asking.excerpt_characters)])
    wanted = {document.id for document in documents}
    known = {tags.document_id: tags for tags in _kept(kept_in, asked) if tags.document_id in wanted}
    if bar is not None:
        bar.advance(len(known))
    counter = _Counter()
    unreadable: dict[str, str] = {}
    waiting = list({document.id: document for document in documents if document.id not in known}.values())
    for start in range(0, len(waiting), DOCUMENTS_AT_ONCE):
        fresh, failed = _ask(waiting[start : start + DOCUMENTS_AT_ONCE], annotator, asking, counter)
        if kept_in is not None:
            with kept_in.open("a", encoding="utf-8") as file:
                lines = ({"document_id": tags.document_id, "scores": tags.scores, "asked": asked} for tags in fresh)
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        if bar is not None:
            bar.advance(len(fresh) + len(failed), unreadable=len(unreadable) + len(failed))
        known |= {tags.document_id: tags for tags in fresh}
        unreadable |= failed
    if len(unreadable) > asking.most_unreadable_share * len(documents):
        name, why = next(iter(unreadable.items()))
        raise UserError(
            f"{len(unreadable):,} of {len(documents):,} documents got no readable scores in {asking.attempts} "
            f"attempts, for example {name}: {why}. Use a stronger annotator, or more new tokens in Asking.limits"
        )
    tags = tuple(known[name] for name in dict.fromkeys(document.id for document in documents) if name in known)
    return Annotation(
        tags, unreadable, counter.calls, counter.characters_read, counter.characters_written, counter.tokens_written
    )


class _Counter:
    """What was asked and written."""

    def __init__(self) -> None:
        self.calls = self.characters_read = self.characters_written = self.tokens_written = 0


def _ask(
    documents: Sequence[Document], annotator: Sampler, asking: Asking, counter: _Counter
) -> tuple[list[Tags], dict[str, str]]:
    """The scores of some documents, and of those without readable ones what was wrong."""
    conversations = {document.id: messages_for(document, asking.excerpt_characters) for document in documents}
    found: dict[str, Tags] = {}
    wrong: dict[str, str] = {}
    for attempt in range(asking.attempts):
        names = [document.id for document in documents if document.id not in found]
        if not names:
            break
        limits = replace(asking.limits, seed=asking.limits.seed + attempt)
        prompts = [conversations[name] for name in names]
        for name, (completion,) in zip(names, annotator.sample(prompts, count=1, limits=limits), strict=True):
            counter.calls += 1
            counter.characters_read += sum(len(message.content) for message in conversations[name])
            counter.characters_written += len(completion.text)
            counter.tokens_written += len(completion.tokens)
            try:
                found[name] = read_scores(name, completion.text)
            except ValueError as error:
                wrong[name] = str(error)
                # begin anew from the question: several bad answers in the context would only be copied
                conversations[name] = (
                    *conversations[name][:2],
                    Message("assistant", completion.text),
                    Message("user", f"That cannot be used: {error}. Answer again, with the JSON object alone."),
                )
    return [found[document.id] for document in documents if document.id in found], {
        name: why for name, why in wrong.items() if name not in found
    }


def _kept(path: Path | None, asked: str) -> Iterator[Tags]:
    if path is not None and path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):  # a run that was killed tore its last line
            path.write_bytes(data[: data.rfind(b"\n") + 1])
        for record in iterate_jsonl(path, dict):
            if record.get("asked", asked) != asked:
                continue
            try:
                yield Tags(str(record["document_id"]), tuple(record["scores"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} is no file of annotations ({error}): name another file to keep them in"
                ) from None
