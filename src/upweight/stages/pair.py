"""pair: sample teacher and student on the same problems, judge both, and keep the pairs that are clearly apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from upweight.core.errors import Refusal, UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits
from upweight.core.records import Completion, Pair, Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.rollout.local import planned_bytes
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.checking import open_checks
from upweight.synthesize.pairs import Candidates, PairRules, balanced, judge, length_bias, pairs_of, statistics
from upweight.synthesize.portions import Portions, listed, read_portions
from upweight.synthesize.roles import Checkpoint, Part, cast
from upweight.text.chat import encode_reply, render
from upweight.text.tokenizer import Tokenizer

EXAMPLES = 3
SAID_BIAS = 0.5
"""A length bias beyond which the person who waits is told."""
PROMPT_TOKENS = 60
"""Of a question, for the plan: over three seeds of the quickstart 58 to 60."""
ASSUMED_KEPT_SHARE = 1 / 3
"""Of the problems, those that give a pair, for the plan."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    problems: which problems of the input "problems" to sample on.
    teacher, student: who answers: checkpoints among the step's inputs, endpoints, or a Sampler of one's own. What a
        teacher of another tokenizer writes is read again with the student's (see `reread`).
    reread: whether a checkpoint of another tokenizer than the student's may be the teacher. Its text is then encoded
        anew; its distributions do not fit the student's tokens, so `distill` needs positive=0, negative=0, or a signal
        that `teach` aligned. Endpoints are always read again: nobody knows their tokens.
    teacher_samples, student_samples: completions of each problem.
    teacher_limits, student_limits: how to sample; the seeds are derived from the step's own.
    rules: when a pair is clear.
    block: problems worked off together, and lost at most in a kill.
    """

    problems: Portions = field(default_factory=lambda: {"stem.jsonl": 0})
    teacher: Part = Checkpoint("teacher")  # noqa: RUF009 - frozen
    student: Part = Checkpoint("student")  # noqa: RUF009 - frozen
    reread: bool = False
    teacher_samples: int = 4
    student_samples: int = 4
    teacher_limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=96))
    student_limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=96))
    rules: PairRules = field(default_factory=PairRules)
    block: int = 256

    def __post_init__(self) -> None:
        if self.teacher_samples < 1 or self.student_samples < 1 or self.block < 1:
            raise UserError("pairs need at least one sample of the teacher, one of the student, and a block of one")


def run(config: Config, work: Work) -> Summary:
    """Write `pairs.jsonl` and `dropped.jsonl` from the teacher, the student and the input "problems"."""
    problems = read_portions(work.inputs["problems"], config.problems)
    teacher = cast(config.teacher, work.inputs, work.machine)
    student = cast(config.student, work.inputs, work.machine)
    reader = _reader(config, work)
    teacher_limits = replace(config.teacher_limits, seed=seed_for(work.seed, "teacher"))
    student_limits = replace(config.student_limits, seed=seed_for(work.seed, "student"))
    pairs: list[Pair] = []
    dropped: list[dict[str, str]] = []
    judged: list[Candidates] = []
    with open_checks(problems, work.machine) as verifier:

        def work_off(block: Sequence[Problem]) -> Sequence[Candidates]:
            asked = [problem.messages for problem in block]
            positives = teacher.sample(asked, count=config.teacher_samples, limits=teacher_limits)
            negatives = student.sample(asked, count=config.student_samples, limits=student_limits)
            if reader is not None:
                prompts = [render(reader, messages) for messages in asked]
                positives = [
                    [_read_again(reader, prompt, one) for one in group]
                    for prompt, group in zip(prompts, positives, strict=True)
                ]
            return [judge(*found, verifier) for found in zip(block, positives, negatives, strict=True)]

        for block in in_blocks(
            work.out / "blocks", problems, config.block, Candidates, work_off, work.monitor, "sample pairs"
        ):
            for found in block:
                result = pairs_of(found, config.rules)
                if isinstance(result, str):
                    dropped.append({"problem": found.problem.id, "source": found.problem.source, "reason": result})
                else:
                    pairs += result
            judged += block
    pairs, unbalanced = balanced(pairs, config.rules)
    dropped += [
        {"problem": pair.problem.id, "source": pair.problem.source, "reason": "one side is longer too often"}
        for pair in unbalanced
    ]
    bias = length_bias(pairs)
    if abs(bias) > SAID_BIAS:
        longer = "positives" if bias > 0 else "negatives"
        work.monitor.say(
            f"length bias {bias:+.2f}: the {longer} are longer in most of {len(pairs)} pairs, and preference training "
            "will learn it; rules.length_bias bounds it"
        )
    write_jsonl(work.out / "pairs.jsonl", pairs)
    write_jsonl(work.out / "dropped.jsonl", dropped)
    clear(work.out / "blocks")
    figures = statistics(judged, pairs, [row["reason"] for row in dropped])
    if not pairs:
        raise UserError(
            f"no problem of {len(problems)} gave a clear pair ({figures['dropped']}): "
            "use a better teacher, harder problems, more samples, or looser rules"
        )
    return {**figures, "examples": [_example(pair) for pair in pairs[:EXAMPLES]]}


def _reader(config: Config, work: Work) -> Tokenizer | None:
    """The student's tokenizer where the teacher's completions have to be read again with it.

    Raises Refusal where the teacher is a checkpoint of another tokenizer and the configuration does not allow that.
    """
    if not isinstance(config.student, Checkpoint):
        return None  # nobody knows its tokens: those that come with the completions are kept
    student = Tokenizer.load(work.inputs[config.student.input] / "model")
    if not isinstance(config.teacher, Checkpoint):
        return student
    teacher = Tokenizer.load(work.inputs[config.teacher.input] / "model")
    if teacher.fingerprint == student.fingerprint:
        return None
    if not config.reread:
        raise Refusal(
            "teacher and student have different tokenizers, so the teacher's tokens mean other text to the student: "
            "use a teacher with the student's tokenizer, or set reread=True, which encodes its text anew"
        )
    return student


def _read_again(tokenizer: Tokenizer, prompt: Sequence[int], completion: Completion) -> Completion:
    """The same text in the student's tokens; one that was cut off stays without an end."""
    if not completion.text:
        return replace(completion, tokens=(), logprobs=())
    tokens = encode_reply(tokenizer, prompt, completion.text, ended=not completion.truncated)
    return replace(completion, tokens=tuple(tokens), logprobs=())


def _example(pair: Pair) -> dict[str, Any]:
    return {
        "question": pair.problem.messages[-1].content,
        "answer": pair.problem.answer,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Each sample writes about half of the tokens allowed; two operations a parameter and token."""
    teacher, student = (
        inputs[part.input] if isinstance(part, Checkpoint) else Estimate() for part in (config.teacher, config.student)
    )
    count = listed(config.problems, inputs["problems"].records if "problems" in inputs else {})
    by_teacher = count * config.teacher_samples * config.teacher_limits.max_new_tokens / 2
    by_student = count * config.student_samples * config.student_limits.max_new_tokens / 2
    block = min(count, config.block)
    held = max(
        planned_bytes(teacher.held_bytes, block * config.teacher_samples, config.teacher_limits),
        planned_bytes(student.held_bytes, block * config.student_samples, config.student_limits),
    )
    return Estimate(
        tokens=by_teacher + by_student,
        flops=2 * (teacher.parameters * by_teacher + student.parameters * by_student),
        sampled_flops=2 * (teacher.parameters * by_teacher + student.parameters * by_student),
        memory_bytes=4 * (teacher.parameters + student.parameters) + held + 5e8,
        disk_bytes=2500.0 * count * ASSUMED_KEPT_SHARE,
        records={"pairs.jsonl": count * ASSUMED_KEPT_SHARE},
        record_tokens=PROMPT_TOKENS
        + max(config.teacher_limits.max_new_tokens, config.student_limits.max_new_tokens) / 2,
    )
