r"""A rule-based expert for the procedural domain, in every part of refinement and reconstruction.

It stands where a strong model would, answers the same prompts in the same form, and says in its policy name that it is
rule-based. It is given no reference answer: it reads the story or the statement with the domain's own phrasings
(reading.py) and works the problem out. A problem that it cannot read it does not pretend to know.

It knows its part by the first line of the prompt ("Task: critique"), and the problem and the answer by their tags; a
prompt that is to be played by it keeps these.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import HIGHEST_SCORE, Completion
from upweight.synthesize.reading import read, read_program
from upweight.synthesize.structured import FormError, between
from upweight.verify.answers import equivalent, extract

POLICY = "rule-based expert"
KNOWN_CRITERIA = frozenset({"right-answer", "one-box", "answer-alone", "passes", "only-code"})


class _Worked(NamedTuple):
    """What the expert knows of a problem: its kind, outline, chain and solution text."""

    kind: str
    outline: str
    chain: str
    solution: str


@dataclass(frozen=True)
class RuleBasedExpert(Sampler):
    """Writes checklists, critiques, revisions, summaries and chains for stories and programs of the domain."""

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """The same answer `count` times: rules have no temperature."""
        return [[Completion((), (), self._answer(prompt), "end", POLICY)] * count for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str:
        text = prompt if isinstance(prompt, str) else prompt[0].content
        task = text.partition("\n")[0]
        question = _part(text, "problem")
        worked = _work_out(question)
        match task:
            case "Task: checklist":
                return _checklist(worked)
            case "Task: critique":
                return _critique(worked, text)
            case "Task: revision":
                answer = worked.solution if worked else _part(text, "answer")
                return f"<solution>\n{answer or 'I cannot read this problem.'}\n</solution>"
            case "Task: summary":
                return f"<summary>\n{worked.outline if worked else 'I cannot read this problem.'}\n</summary>"
            case "Task: chain":
                return f"<chain>\n{worked.chain if worked else 'I cannot read this problem.'}\n</chain>"
            case _:
                raise UserError(
                    f"the rule-based expert does not know the part that begins {task[:60]!r}: it plays the tasks "
                    "checklist, critique, revision, summary and chain, named in the first line of the prompt"
                )


def _work_out(question: str) -> _Worked | None:
    told = read(question)
    if told is not None:
        outline = f"Start with {told.start}, then follow the {len(told.steps)} changes one by one."
        return _Worked("story", outline, told.chain, f"\\boxed{{{told.answer}}}")
    made = read_program(question)
    if made is not None:
        outline = f"Build the expression by the {len(made.pipeline)} operations in their order."
        return _Worked("program", outline, made.chain, made.solution)
    return None


def _checklist(worked: _Worked | None) -> str:
    criteria: list[dict[str, object]]
    if worked is not None and worked.kind == "program":
        criteria = [
            {
                "name": "passes",
                "aspect": "executability",
                "requirement": "The code defines f, runs, and does every operation of the statement in its order.",
                "weight": 5,
                "check": "verify",
            },
            {
                "name": "only-code",
                "aspect": "consistency",
                "requirement": "The answer is the function and nothing besides.",
                "weight": 1,
                "check": "judge",
            },
        ]
    else:
        criteria = [
            {
                "name": "right-answer",
                "aspect": "correctness",
                "requirement": "The final answer is the value that the question asks for.",
                "weight": 5,
                "check": "verify",
            },
            {
                "name": "one-box",
                "aspect": "completeness",
                "requirement": "The final answer stands in one \\boxed{}.",
                "weight": 2,
                "check": "judge",
            },
            {
                "name": "answer-alone",
                "aspect": "consistency",
                "requirement": "The answer stands alone: the working belongs to the thought before it.",
                "weight": 2,
                "check": "judge",
            },
        ]
    return json.dumps({"criteria": criteria})


def _critique(worked: _Worked | None, text: str) -> str:
    """Scores for the criteria that the checklist names, and what is wrong."""
    answer = _part(text, "answer")
    names = [json.loads(line)["name"] for line in _part(text, "checklist").splitlines() if line.strip()]
    if worked is None:
        scores = dict.fromkeys(names, 0)
        return json.dumps({"scores": scores, "critique": "I cannot read this problem, so I can vouch for nothing."})
    faults = _story_faults(worked, answer) if worked.kind == "story" else _program_faults(worked, answer)
    # a criterion of somebody else's checklist is granted only to an answer that has no fault at all
    doubtful = 0 if faults else HIGHEST_SCORE
    scores = {name: 0 if name in faults else HIGHEST_SCORE if name in KNOWN_CRITERIA else doubtful for name in names}
    critique = " ".join(faults.values())
    return json.dumps({"scores": scores, "critique": critique or "Nothing is wrong."})


def _story_faults(worked: _Worked, answer: str) -> dict[str, str]:
    """What is wrong, by the name of the criterion that it breaks."""
    faults = {}
    given, wanted = extract(answer), extract(worked.solution) or ""
    if given is None or not equivalent(given, wanted):
        faults["right-answer"] = f"The answer {given or '(none)'} is wrong: {worked.chain}"
    if answer.count("\\boxed{") != 1:
        faults["one-box"] = "Put the final answer in exactly one \\boxed{}."
    if answer.strip() != f"\\boxed{{{given}}}":
        faults["answer-alone"] = "Give the answer alone, the working belongs to the thought."
    return faults


def _program_faults(worked: _Worked, answer: str) -> dict[str, str]:
    faults = {}
    if worked.solution.split() != answer.split():
        faults["passes"] = f"I would have written {worked.solution.splitlines()[-1].strip()!r}."
    if not answer.lstrip().startswith("def f("):
        faults["only-code"] = "Give the function alone."
    return faults


def _part(text: str, tag: str) -> str:
    """The first tagged part of a prompt, the rest of a short prompt's lines where it has no tags; may be empty."""
    if f"<{tag}>" not in text:
        return ""
    try:
        return between(tag)(text[: text.index(f"</{tag}>", text.index(f"<{tag}>")) + len(tag) + 3])
    except (FormError, ValueError):
        return ""
