"""Where conversations come from: files of a step's inputs, files of one's own, data sets; all read in one way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from upweight.core.errors import UserError
from upweight.core.records import Conversation
from upweight.store.jsonl import iterate_jsonl
from upweight.text.conversations import ConversationDataset, ConversationFiles


@dataclass(frozen=True)
class Part:
    """Conversations of this run: `file` is "<input>/<file>.jsonl". At most `most` of them are taken, 0 takes all."""

    file: str
    most: int = 0


Source = Part | ConversationFiles | ConversationDataset


def conversations(source: Source, inputs: Mapping[str, Path]) -> Iterator[Conversation]:
    """All conversations of a source. Raises UserError where it names an input that the step does not have.

    Of a Part all come, whatever `most` says: whoever reads it chooses.
    """
    if not isinstance(source, Part):
        return source.conversations()
    name, _, file = source.file.partition("/")
    if name not in inputs:
        raise UserError(f"data {source.file!r}: the step has no input {name!r}; it has {sorted(inputs)}")
    return iterate_jsonl(inputs[name] / file, Conversation)


def label(source: Source) -> str:
    """What a source is called."""
    match source:
        case Part():
            return source.file
        case ConversationFiles():
            return source.paths
        case ConversationDataset():
            return source.name
