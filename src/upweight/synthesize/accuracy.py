"""Is a conversation worth imitating? Decided by rule where a rule can, and by a model that gives 0 to 9."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from upweight.core.errors import UserError
from upweight.core.protocols import Sampler, Verifier
from upweight.core.records import HIGHEST_SCORE, Completion, Conversation, Problem
from upweight.synthesize.prompts import fill, read_prompt, require
from upweight.synthesize.refine import question_of
from upweight.synthesize.structured import Asking, FormError, ask, json_object
from upweight.verify.answers import equivalent, extract, visible_part


@dataclass(frozen=True)
class Checks:
    """What a conversation has to keep to.

    Attributes:
        thought: whether its last turn has to hold a closed thought ("required"), may, or must not ("none").
        agree: whether an answer that the thought boxes or states has to be the answer that is given.
        least_score: what the judge has to give at least, 0-9, where there is one.
        prompt, asking: how the judge is asked.
    """

    thought: str = "allowed"
    agree: bool = True
    least_score: int = 7
    prompt: str = field(default_factory=partial(read_prompt, "accuracy"))
    asking: Asking = Asking()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.thought not in ("required", "allowed", "none") or not 0 <= self.least_score <= HIGHEST_SCORE:
            raise UserError(
                f"thought is {self.thought!r} and least_score {self.least_score}: expected 'required', 'allowed' or "
                "'none', and a score in 0-9"
            )
        require("accuracy", self.prompt, "problem", "answer")


def fault(talk: Conversation, checks: Checks) -> str:
    """The rule that a conversation breaks; "" where it breaks none."""
    last = talk.messages[-1]
    if last.role != "assistant" or not any(turn.role == "user" for turn in talk.messages):
        return "no answer to a question"
    visible = visible_part(last.content)
    if visible is None:
        return "the thought never ends"
    if not visible.strip() and not last.tool_calls:
        return "nothing is said"
    before, closed, _ = last.content.rpartition("</think>")
    if (checks.thought == "required" and not closed) or (checks.thought == "none" and closed):
        return "no thought" if not closed else "a thought"
    if checks.agree and closed:
        thought, said = extract(before.partition("<think>")[2]), extract(visible)
        if thought is not None and said is not None and not equivalent(thought, said):
            return "thought and answer disagree"
    return ""


def verified(talk: Conversation, known: Mapping[str, Problem], verifier: Verifier) -> bool | None:
    """Whether the last turn answers a problem that can be checked rightly; None where the problem is not known."""
    problem = known.get(question_of(Problem("", talk.messages[:-1])))
    if problem is None:
        return None
    return verifier.score(problem, [Completion((), (), talk.messages[-1].content, "end", "data")])[0].score >= 1


def judged(talks: Sequence[Conversation], judge: Sampler, checks: Checks, seed: int) -> list[tuple[int | None, str]]:
    """The judge's score of each conversation and its reason; None where it could not be read. Raises NeverInForm."""
    asking = replace(checks.asking, limits=replace(checks.asking.limits, seed=seed))
    prompts = [
        fill(
            checks.prompt,
            problem=question_of(Problem("", talk.messages[:-1])),
            answer=(visible_part(talk.messages[-1].content) or "").strip(),
        )
        for talk in talks
    ]
    replies = ask(judge, prompts, [_score] * len(prompts), asking, part="judge of accuracy")
    return [(None, reply.why) if reply.value is None else reply.value for reply in replies]


def _score(text: str) -> tuple[int, str]:
    found = json_object(text)
    score, reason = found.get("score"), found.get("reason", "")
    if isinstance(score, bool) or not isinstance(score, int) or not 0 <= score <= HIGHEST_SCORE:
        raise FormError(f'"score" has to be an integer from 0 to {HIGHEST_SCORE}')
    return score, str(reason)
