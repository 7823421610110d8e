"""The 20 quality dimensions: their order is the order of the scores in every tags artifact."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["content", "format"]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension, scored 0-9: 0 none of it or the worst, 9 the best imaginable for training a reasoning model."""

    name: str
    kind: Kind
    question: str


DIMENSIONS: tuple[Dimension, ...] = (
    Dimension("knowledge_density", "content", "facts, definitions, technical knowledge per sentence"),
    Dimension("reasoning_density", "content", "explicit multi-step reasoning, derivation, argument, cause and effect"),
    Dimension("educational_value", "content", "a learner would come away knowing or able to do something new"),
    Dimension("factual_reliability", "content", "claims look correct and consistent; neutral unverifiable ones are 5"),
    Dimension("domain_depth", "content", "specialised, beyond a lay summary"),
    Dimension("originality", "content", "says something that is not boilerplate or templated"),
    Dimension("coherence", "content", "one thread, each sentence follows"),
    Dimension("self_containedness", "content", "understandable without the missing context"),
    Dimension("mathematical_content", "content", "correct mathematics, quantities reasoned about"),
    Dimension("code_content", "content", "useful code or technical procedure that could be followed or run"),
    Dimension("explanation_clarity", "content", "says why and how, not only what"),
    Dimension("problem_and_solution", "content", "poses a question or problem and solves it; a worked exercise is 9"),
    Dimension("fluency", "format", "grammatical natural language or well-formed code"),
    Dimension("structure", "format", "paragraphs, headings, lists, code layout that serve the reader"),
    Dimension("cleanliness", "format", "free of navigation, markup debris, headers, tracking links, boilerplate"),
    Dimension("non_repetition", "format", "free of repeated phrases or near-identical lines"),
    Dimension("length_adequacy", "format", "enough substance for what it sets out to say"),
    Dimension("non_promotional", "format", "free of advertising, calls to buy or click"),
    Dimension("safety", "format", "free of scams, hate, adult content, private data"),
    Dimension("character_integrity", "format", "free of encoding damage, recognition noise, random characters"),
)
