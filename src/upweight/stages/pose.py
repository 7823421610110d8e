"""pose: make the problems. Stories with exact answers, programs with hidden tests, preferences, and what is held back.

Everything is procedural and deterministic. Problems for training are never reserved ones, problems for evaluation
always are. A coding problem is kept only where running it shows that its solution passes and wrong programs fail.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count as counting
from itertools import islice
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.records import Conversation, Problem
from upweight.core.work import Estimate, Summary, Work
from upweight.rollout.sandbox import Sandbox
from upweight.store.jsonl import write_jsonl
from upweight.synthesize import pipelines, programs, stories
from upweight.synthesize.preferences import preference_pairs
from upweight.synthesize.validation import Posed, Runner, flaws, sandboxed

EXAMPLES = 3
PROGRAMS_AT_ONCE = 32
DRAWS_PER_PROBLEM = 50
"""A domain that gives no new sound problem in so many draws is taken to be exhausted."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    stem, code, preference: how many problems to train on.
    reserved_stem, reserved_code: how many to evaluate on, from those reserved by hash.
    gold_stem, gold_code: how many worked conversations.
    preference_pairs: how many pairs for a reward model.
    fewest_steps, most_steps: steps of a story to train on.
    fewest_reserved_steps, most_reserved_steps: steps of a story to evaluate on.
    largest_value: of every value in a story.
    fewest_operations, most_operations: of a program, for training and evaluation alike.
    tests: hidden tests of a coding problem.
    """

    stem: int = 2000
    code: int = 400
    preference: int = 1000
    reserved_stem: int = 200
    reserved_code: int = 50
    gold_stem: int = 96
    gold_code: int = 32
    preference_pairs: int = 2000
    fewest_steps: int = 2
    most_steps: int = 5
    fewest_reserved_steps: int = 3
    most_reserved_steps: int = 5
    largest_value: int = stories.LARGEST_VALUE
    fewest_operations: int = 1
    most_operations: int = 3
    tests: int = 8

    def __post_init__(self) -> None:
        if self.tests < 1:
            raise UserError(f"tests is {self.tests}: a coding problem is judged by at least one")


def run(config: Config, work: Work) -> Summary:
    """Write stem, code, preference, reserved_stem, reserved_code, gold and preference_pairs, each a .jsonl file."""
    seed = work.seed
    dropped: Counter[str] = Counter()
    examples: dict[str, Any] = {}
    for name, wanted, reserved in (
        ("stem", config.stem, False),
        ("preference", config.preference, False),
        ("reserved_stem", config.reserved_stem, True),
    ):
        made = list(_stories(config, seed_for(seed, name), wanted, reserved, name.removeprefix("reserved_")))
        write_jsonl(work.out / f"{name}.jsonl", made)
        examples[name] = [f"{one.messages[-1].content} -> {one.answer}" for one in made[:EXAMPLES]]
    with (
        Sandbox(workers=1, unsafe=work.machine.unsafe_execution) as sandbox,
        work.monitor.track("validate programs", total=config.code + config.reserved_code, unit="problems") as bar,
    ):
        for name, wanted, reserved in (("code", config.code, False), ("reserved_code", config.reserved_code, True)):
            sound: list[Problem] = []
            for one, flaw in _programs(config, seed_for(seed, name), wanted, reserved, sandboxed(sandbox)):
                if flaw is None:
                    sound.append(one)
                    bar.advance()
                else:
                    dropped[flaw.partition(":")[0]] += 1
                    work.monitor.record(dropped=one.messages[-1].content, reason=flaw)
            write_jsonl(work.out / f"{name}.jsonl", sound)
            examples[name] = [[one.messages[-1].content, one.tests[0]] for one in sound[:EXAMPLES]]
    gold = [*_gold(config, seed_for(seed, "gold"))]
    write_jsonl(work.out / "gold.jsonl", gold)
    pairs = list(
        preference_pairs(
            config.preference_pairs,
            seed_for(seed, "preference_pairs"),
            fewest_steps=config.fewest_steps,
            most_steps=config.most_steps,
            largest_value=config.largest_value,
        )
    )
    write_jsonl(work.out / "preference_pairs.jsonl", pairs)
    return {
        "stem": config.stem,
        "code": config.code,
        "preference": config.preference,
        "reserved_stem": config.reserved_stem,
        "reserved_code": config.reserved_code,
        "gold": len(gold),
        "preference_pairs": len(pairs),
        "programs_dropped": dict(dropped),
        "preference_failures": dict(Counter(pair.rejected.policy.removeprefix("procedural: ") for pair in pairs)),
        "examples": examples,
    }


def _stories(config: Config, seed: int, wanted: int, reserved: bool, source: str) -> Iterator[Problem]:
    fewest = config.fewest_reserved_steps if reserved else config.fewest_steps
    most = config.most_reserved_steps if reserved else config.most_steps
    seen: set[str] = set()
    for index in _draws(wanted, seen, f"stories of {fewest} to {most} steps"):
        told = stories.story(
            seed,
            index,
            fewest_steps=fewest,
            most_steps=most,
            largest_value=config.largest_value,
            evaluation=reserved,
        )
        made = stories.problem(told, source)
        if made.id not in seen:
            seen.add(made.id)
            yield made


def _programs(
    config: Config, seed: int, wanted: int, reserved: bool, runner: Runner
) -> Iterator[tuple[Problem, str | None]]:
    """Each different program once, with its flaw if it has one, until as many sound ones as wanted have come."""
    fewest, most = config.fewest_operations, config.most_operations
    found: set[str] = set()
    unfit: set[str] = set()
    draws = _draws(wanted, found, f"programs of {fewest} to {most} operations")
    while batch := list(islice(draws, PROGRAMS_AT_ONCE)):
        posed: dict[str, Posed] = {}
        for index in batch:
            drawn = pipelines.program(seed, index, fewest_steps=fewest, most_steps=most, evaluation=reserved)
            made = programs.problem(drawn, tests=config.tests)
            if made.id not in found | unfit:
                wrong = programs.wrong_solutions(drawn, tests=config.tests)
                posed[made.id] = Posed(made, drawn.solution, wrong)
        for one, flaw in zip(posed.values(), flaws(list(posed.values()), runner), strict=True):
            if len(found) < wanted:
                (found if flaw is None else unfit).add(one.problem.id)
                yield one.problem, flaw


def _draws(wanted: int, seen: set[str], domain: str) -> Iterator[int]:
    """Numbers 0, 1, 2 ... until `seen` holds as many as wanted."""
    for index in counting():
        if len(seen) >= wanted:
            return
        if index >= DRAWS_PER_PROBLEM * max(wanted, 10):
            raise UserError(
                f"the domain gave {len(seen):,} different {domain} in {index:,} draws, {wanted:,} were asked for: "
                "ask for fewer, or allow more steps"
            )
        yield index


def _gold(config: Config, seed: int) -> Iterator[Conversation]:
    """Stories and programs evenly mixed, so that the first so many of them hold both in the same shares."""
    for index in range(config.gold_stem + config.gold_code):
        # how many programs there are among the first `index`, and among the first `index + 1`
        before, after = (
            part * config.gold_code // (config.gold_stem + config.gold_code) for part in (index, index + 1)
        )
        if after > before:
            fewest, most = config.fewest_operations, config.most_operations
            yield programs.conversation(
                pipelines.program(seed, before, fewest_steps=fewest, most_steps=most), "gold-code"
            )
        else:
            told = stories.story(
                seed,
                index - before,
                fewest_steps=config.fewest_steps,
                most_steps=config.most_steps,
                largest_value=config.largest_value,
            )
            yield stories.conversation(told, "gold-stem")


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Stories cost 60 microseconds, reserved ones ten times that; running a program and its mutants a millisecond."""
    drawn = config.stem + config.preference + config.preference_pairs + 10 * config.reserved_stem
    checked = config.code + config.reserved_code
    problems = drawn + checked
    return Estimate(
        seconds=6e-5 * drawn + 1e-3 * checked,
        disk_bytes=600.0 * problems,
        memory_bytes=2e8 + 2000 * problems,
        records={
            "stem.jsonl": config.stem,
            "code.jsonl": config.code,
            "preference.jsonl": config.preference,
            "reserved_stem.jsonl": config.reserved_stem,
            "reserved_code.jsonl": config.reserved_code,
            "gold.jsonl": config.gold_stem + config.gold_code,
            "preference_pairs.jsonl": config.preference_pairs,
        },
    )
