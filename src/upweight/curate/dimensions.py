"""The 20 quality dimensions: their order is the order of the scores in every tags artifact.

Each is data: what an annotator is asked, and what a 0 and a 9 look like. A further dimension is one more entry (and a
tagger trained on its annotations).
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["content", "format"]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension, scored 0-9: 0 none of it or the worst, 9 the best imaginable for training a reasoning model.

    Attributes:
        name: the column's name.
        kind: about what is said, or about how it is put.
        question: what is judged.
        lowest, highest: what a text looks like that gets a 0, and one that gets a 9.
    """

    name: str
    kind: Kind
    question: str
    lowest: str
    highest: str


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension(
        "knowledge_density",
        "content",
        "facts, definitions, technical knowledge per sentence",
        "says nothing that one could know",
        "every sentence adds a fact or a definition",
    ),
    Dimension(
        "reasoning_density",
        "content",
        "explicit multi-step reasoning, derivation, argument, cause and effect",
        "no inference at all",
        "a chain of steps throughout, each following from those before",
    ),
    Dimension(
        "educational_value",
        "content",
        "a learner would come away knowing or able to do something new",
        "nothing to learn",
        "teaches like a very good textbook",
    ),
    Dimension(
        "factual_reliability",
        "content",
        "claims look correct and consistent; neutral unverifiable ones are 5",
        "wrong arithmetic, false claims, nonsense",
        "everything that can be checked is right",
    ),
    Dimension(
        "domain_depth",
        "content",
        "specialised, beyond a lay summary",
        "everyday talk",
        "written by and for specialists",
    ),
    Dimension(
        "originality",
        "content",
        "says something that is not boilerplate or templated",
        "pure boilerplate, a filled-in form",
        "a thought of its own",
    ),
    Dimension(
        "coherence",
        "content",
        "one thread, each sentence follows",
        "unconnected pieces",
        "one line of thought from beginning to end",
    ),
    Dimension(
        "self_containedness",
        "content",
        "understandable without the missing context",
        "cannot be understood without what is missing",
        "whole in itself",
    ),
    Dimension(
        "mathematical_content",
        "content",
        "correct mathematics, quantities reasoned about",
        "no mathematics, or none that is right",
        "mathematics throughout, stated exactly and correct",
    ),
    Dimension(
        "code_content",
        "content",
        "useful code or technical procedure that could be followed or run",
        "none",
        "complete, useful, could be run as it stands",
    ),
    Dimension(
        "explanation_clarity",
        "content",
        "says why and how, not only what",
        "explains nothing",
        "every step has its reason",
    ),
    Dimension(
        "problem_and_solution",
        "content",
        "poses a question or problem and solves it; a bare answer is 3-4",
        "no question and no answer",
        "an exercise with its worked solution",
    ),
    Dimension(
        "fluency",
        "format",
        "grammatical natural language or well-formed code",
        "no sentence and no statement is well formed",
        "flawless",
    ),
    Dimension(
        "structure",
        "format",
        "paragraphs, headings, lists, code layout that serve the reader",
        "one undivided heap",
        "layout that shows what belongs together",
    ),
    Dimension(
        "cleanliness",
        "format",
        "free of navigation, markup debris, headers, tracking links, boilerplate",
        "nothing but debris",
        "nothing that does not belong to the text",
    ),
    Dimension(
        "non_repetition",
        "format",
        "free of repeated phrases or near-identical lines",
        "the same thing over and over",
        "says nothing twice",
    ),
    Dimension(
        "length_adequacy",
        "format",
        "enough substance for what it sets out to say",
        "breaks off before it has begun",
        "as long as its matter needs",
    ),
    Dimension(
        "non_promotional",
        "format",
        "free of advertising, calls to buy or click",
        "nothing but advertising",
        "no advertising at all",
    ),
    Dimension(
        "safety",
        "format",
        "free of scams, hate, adult content, private data",
        "a fraud, hate, or somebody's private data",
        "harmless",
    ),
    Dimension(
        "character_integrity",
        "format",
        "free of encoding damage, recognition noise, random characters",
        "unreadable for damaged characters",
        "every character as it was meant",
    ),
)
