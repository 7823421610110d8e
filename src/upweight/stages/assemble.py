"""assemble: an SFT set by shares: the report's cold start is 50% mathematics, 30% science, 20% code.

Each part is checked by rules, where its problems are known against their answers and tests, and by a judge where one is
given; near duplicates and what holds problems of the evaluation are dropped. Then as many conversations of each part
are taken as its share of the tokens (or of the samples) says. The ledger tells for each part and source what was read,
what was dropped and why, and what was taken, beside what was asked for. A curriculum is two sets and two sft steps, one
after the other: within one step conversations are shuffled.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Sampler
from upweight.core.records import Conversation, Document, Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.curate.contamination import Problems
from upweight.curate.overlap import MinHash, clusters, exact_key, signatures
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.synthesize.accuracy import Checks, fault, judged, verified
from upweight.synthesize.blocks import clear, in_blocks
from upweight.synthesize.checking import open_checks
from upweight.synthesize.refine import question_of
from upweight.synthesize.roles import Part as Role
from upweight.synthesize.roles import cast
from upweight.synthesize.talks import Source, conversations
from upweight.text.chat import encode_turns
from upweight.text.tokenizer import Tokenizer
from upweight.verify.reward import CheckVerifier

RESERVED = "reserved_*.jsonl"
COMPARED_AT_ONCE = 2_000


@dataclass(frozen=True)
class Share:
    """One part of the set: where its conversations come from, and its share of the whole, 0-1."""

    data: tuple[Source, ...]
    share: float


@dataclass(frozen=True)
class Config:
    """Attributes:
    parts: by name; their shares sum to 1.
    by: what the shares are of: tokens, as the student's template renders a conversation, or samples.
    total: tokens (or samples) of the set; 0 takes as many as the scarcest part allows.
    context: a conversation of more tokens is dropped.
    checks: what every conversation has to keep to.
    judge: a model that scores accuracy; None goes without.
    near: how near duplicates are found, over all parts together; None leaves them in.
    answers: files of the input "problems" whose problems verify conversations that ask the same; none are needed.
    block: conversations worked off together, and lost at most in a kill.
    """

    parts: Mapping[str, Share]
    by: Literal["tokens", "samples"] = "tokens"
    total: int = 0
    context: int = 32_768
    checks: Checks = field(default_factory=Checks)
    judge: Role | None = None
    near: MinHash | None = MinHash()  # noqa: RUF009 - frozen
    answers: tuple[str, ...] = ()
    block: int = 1024

    def __post_init__(self) -> None:
        shares = [part.share for part in self.parts.values()]
        if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"the shares are {dict(zip(self.parts, shares, strict=True))}: expected one part or more, each above "
                "0, that sum to 1"
            )


@dataclass(frozen=True, slots=True)
class Looked:
    """A conversation as it was found: its part, its size in tokens, and the rule by which it is dropped ("" for none).

    Attributes:
        verified: whether its answer is right, None where its problem is not known.
        score: the judge's, None where it gave none.
    """

    part: str
    conversation: Conversation
    tokens: int
    fault: str
    detail: str
    verified: bool | None
    score: int | None


class _Found(NamedTuple):
    part: str
    conversation: Conversation


def run(config: Config, work: Work) -> Summary:
    """Write `conversations.jsonl`, `dropped.jsonl` and the ledger, from the data and the tokenizer of input "model"."""
    tokenizer = Tokenizer.load(work.inputs["model"] / "model")
    known = _known(config, work)
    judge = None if config.judge is None else cast(config.judge, work.inputs, work.machine)
    found = list(_read(config, work))
    looked: list[Looked] = []
    with open_checks(list(known.values()), work.machine) as verifier:

        def look(block: Sequence[_Found]) -> Sequence[Looked]:
            return _looked(block, config, tokenizer, known, verifier, judge, work.seed)

        for block in in_blocks(work.out / "blocks", found, config.block, Looked, look, work.monitor, "check"):
            looked += block
    faults = _repeated(looked, config, work)
    kept = [index for index in range(len(looked)) if not looked[index].fault and index not in faults]
    taken = _taken(config, [looked[index] for index in kept], work.seed)
    chosen = [looked[kept[place]] for place in taken]
    write_jsonl(work.out / "conversations.jsonl", [one.conversation for one in chosen])
    write_jsonl(work.out / "dropped.jsonl", _dropped(looked, faults))
    clear(work.out / "blocks")
    return _ledger(config, looked, faults, chosen)


def _known(config: Config, work: Work) -> dict[str, Problem]:
    if not config.answers:
        return {}
    if "problems" not in work.inputs:
        raise UserError("answers are named, but the step has no input 'problems' to read them from: add it")
    problems = [one for file in config.answers for one in read_jsonl(work.inputs["problems"] / file, Problem)]
    return {question_of(one): one for one in problems}


def _read(config: Config, work: Work) -> Iterator[_Found]:
    for name, part in config.parts.items():
        read = 0
        for source in part.data:
            for talk in conversations(source, work.inputs):
                read += 1
                yield _Found(name, talk)
        if not read:
            raise UserError(f"the part {name} holds no conversation: name other data, or leave the part out")


def _looked(
    block: Sequence[_Found],
    config: Config,
    tokenizer: Tokenizer,
    known: Mapping[str, Problem],
    verifier: CheckVerifier,
    judge: Sampler | None,
    seed: int,
) -> list[Looked]:
    made = []
    for name, talk in block:
        told, detail, right, tokens = fault(talk, config.checks), "", None, 0
        if not told:
            try:
                tokens = sum(
                    len(one.tokens) for one in encode_turns(tokenizer, talk.messages, tools=talk.tools or None)
                )
            except UserError as error:
                told, detail = "it cannot be rendered", str(error)
        if not told and tokens > config.context:
            told, detail = "longer than the context", f"{tokens} tokens"
        if not told:
            right = verified(talk, known, verifier)
            told = "verified wrong" if right is False else ""
        made.append(Looked(name, talk, tokens, told, detail, right, None))
    if judge is not None:
        asked = [index for index, one in enumerate(made) if not one.fault]
        scores = judged([made[index].conversation for index in asked], judge, config.checks, seed_for(seed, "judge"))
        for index, (score, reason) in zip(asked, scores, strict=True):
            one = made[index]
            low = "" if score is not None and score >= config.checks.least_score else "judged inaccurate"
            made[index] = Looked(
                one.part, one.conversation, one.tokens, low, reason if low else "", one.verified, score
            )
    return made


def _repeated(looked: Sequence[Looked], config: Config, work: Work) -> dict[int, tuple[str, str]]:
    """What else is dropped: conversations that hold a problem of the evaluation, and repeats of earlier ones."""
    sound = [index for index, one in enumerate(looked) if not one.fault]
    texts = {index: "\n".join(turn.content for turn in looked[index].conversation.messages) for index in sound}
    fates: dict[int, tuple[str, str]] = {}
    reserved = sorted(work.inputs["problems"].glob(RESERVED)) if "problems" in work.inputs else []
    problems = [problem for file in reserved for problem in read_jsonl(file, Problem)]
    if problems:
        guard = Problems(problems)
        for start in range(0, len(sound), COMPARED_AT_ONCE):
            some = sound[start : start + COMPARED_AT_ONCE]
            for hit in guard.find([Document(str(index), texts[index], "sft") for index in some]):
                fates[int(hit.document_id)] = ("holds a problem of the evaluation", f"{hit.problem_id}: {hit.match}")
    first: dict[bytes, int] = {}
    unique = []
    for index in sound:
        if index in fates:
            continue
        key = exact_key(texts[index])
        if key in first:
            fates[index] = ("the same as an earlier one", f"of conversation {first[key]}")
        else:
            first[key] = index
            unique.append(index)
    if config.near is not None and unique:
        label = clusters(signatures([texts[index] for index in unique], config.near), config.near)
        for place in np.flatnonzero(label != np.arange(len(label))).tolist():
            fates[unique[place]] = ("nearly the same as an earlier one", f"of conversation {unique[int(label[place])]}")
    return fates


def _size(one: Looked, config: Config) -> int:
    return one.tokens if config.by == "tokens" else 1


def _taken(config: Config, kept: Sequence[Looked], seed: int) -> list[int]:
    """Indices into `kept`, shuffled: of each part as many as its share says."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(kept):
        places[one.part].append(index)
    there = {name: sum(_size(kept[index], config) for index in places[name]) for name in config.parts}
    allowed = min(there[name] / part.share for name, part in config.parts.items())
    if config.total > allowed or not allowed:
        short = {name: f"{there[name]:,} of {part.share * config.total:,.0f}" for name, part in config.parts.items()}
        raise UserError(
            f"a set of {config.total:,} {config.by} cannot be had by these shares; there are {short} after the checks. "
            f"With what is there it can have {allowed:,.0f}: lower total (0 takes what there is), change the shares, "
            "or add data"
        )
    total = config.total or allowed
    taken: list[int] = []
    for name, part in config.parts.items():
        order, held, wanted = places[name], 0, part.share * total
        Random(seed_for(seed, name)).shuffle(order)
        for index in order:
            size = _size(kept[index], config)
            if held + size / 2 > wanted:  # nearer to what is wanted without it
                break
            taken.append(index)
            held += size
    Random(seed_for(seed, "order")).shuffle(taken)
    return taken


def _dropped(looked: Sequence[Looked], faults: Mapping[int, tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for index, one in enumerate(looked):
        reason, detail = (one.fault, one.detail) if one.fault else faults.get(index, ("", ""))
        if reason:
            yield {
                "part": one.part,
                "source": one.conversation.source,
                "reason": reason,
                "detail": detail,
                "conversation": one.conversation,
            }


def _ledger(
    config: Config, looked: Sequence[Looked], faults: Mapping[int, tuple[str, str]], chosen: Sequence[Looked]
) -> Summary:
    total = sum(_size(one, config) for one in chosen)
    by_part: dict[str, Any] = {}
    for name, part in config.parts.items():
        mine = [(index, one) for index, one in enumerate(looked) if one.part == name]
        reasons = Counter(one.fault or faults[index][0] for index, one in mine if one.fault or index in faults)
        took = [one for one in chosen if one.part == name]
        by_part[name] = {
            "asked_share": part.share,
            "share": round(sum(_size(one, config) for one in took) / total, 4) if total else 0.0,
            "read": len(mine),
            "dropped": dict(reasons),
            "verified": sum(one.verified is True for _, one in mine),
            "samples": len(took),
            "tokens": sum(one.tokens for one in took),
            "by_source": dict(Counter(one.conversation.source for one in took)),
        }
    return {
        "samples": len(chosen),
        "tokens": sum(one.tokens for one in chosen),
        "by": config.by,
        "dropped": dict(sum((Counter(part["dropped"]) for part in by_part.values()), Counter())),
        "ledger": by_part,
    }


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Reading, rendering and comparing: about 2 MB a second."""
    size = sum((given.disk_bytes for name, given in inputs.items() if name != "model"), 0.0)
    return Estimate(
        tokens=config.total or size / 4, disk_bytes=size, memory_bytes=5e8 + 4 * size, seconds=2 + size / 2e6
    )
