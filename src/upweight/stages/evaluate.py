"""evaluate: avg@k of every checkpoint on the same problems, with 95% intervals and paired differences.

The inputs are the artifact "problems" and any number of checkpoints; a checkpoint's row in the table carries its
input's name, and each is compared with the one before it in the order of the inputs. Benchmarks that come with the
package are measured by their names, beside the problems or instead of them.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Benchmark, Limits
from upweight.core.records import Sample
from upweight.core.work import Estimate, Summary, Work
from upweight.evals.measure import difference, measure, table_row
from upweight.evals.problem_files import ProblemFile, kind_of, read_problems
from upweight.evals.setting import Setting, asked_name, benchmark_names, open_named
from upweight.model.precision import Precision
from upweight.rollout.local import open_local, planned_bytes
from upweight.rollout.sandbox import Sandbox
from upweight.store.artifact import write_whole
from upweight.store.jsonl import read_jsonl
from upweight.text.conversations import evenly
from upweight.verify.reward import RewardConfig, open_verifier

PROBLEMS = "problems"
EXAMPLES = 3
ASSUMED_PROBLEMS = 200


@dataclass(frozen=True)
class Config:
    """Attributes:
    problems: files of the input "problems", by the name that the table gives to each. {} measures benchmarks alone.
    benchmarks: as `upweight eval --on` takes them: "gsm8k", "bfcl:multiple+parallel", "gpqa=gpqa_diamond.csv". They are
        sampled and decoded as this configuration says, not as they are by themselves.
    samples: the k of avg@k.
    count: the first so many problems of each file, so many of each benchmark, evenly from all; 0 takes all.
    rewards: how a family is judged; by default its tests, or else its answers.
    limits: how to decode; the seed is derived from the step's own, the same for every checkpoint.
    problems_a_block: problems sampled at once; the result does not depend on it.
    dtype: what the weights are held in: "bfloat16" is what GPUs are made for.
    """

    problems: Mapping[str, str] = field(
        default_factory=lambda: {"stem": "reserved_stem.jsonl", "code": "reserved_code.jsonl"}
    )
    benchmarks: tuple[str, ...] = ()
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict)
    samples: int = 8
    count: int = 0
    limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=256, temperature=1.0))
    problems_a_block: int = 64
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}: avg@k needs at least one")
        names = [*self.problems, *map(asked_name, self.benchmarks)]
        if not names or len(set(names)) < len(names):
            raise UserError(f"problems and benchmarks are named {names}: expected at least one, each by its own name")
        unknown = [name for name in map(asked_name, self.benchmarks) if name not in benchmark_names()]
        if unknown:
            raise UserError(f"there is no benchmark {unknown[0]!r}: there are {', '.join(benchmark_names())}")


def run(config: Config, work: Work) -> Summary:
    """Write `samples/<checkpoint>.<family>.jsonl` and `table.json`."""
    checkpoints = [name for name in work.inputs if name != PROBLEMS]
    if (config.problems and PROBLEMS not in work.inputs) or not checkpoints:
        raise UserError('evaluate needs an input "problems" and at least one checkpoint among its inputs')
    samples: dict[tuple[str, str], list[Sample]] = {}
    with ExitStack() as opened:
        benchmarks = [*_files(config, work, opened), *_named(config, work, opened)]
        for benchmark in benchmarks:
            for name in checkpoints:
                samples[name, benchmark.name] = _measured(config, work, benchmark, name)
    table = _table(config, checkpoints, benchmarks, samples)
    write_whole(work.out / "table.json", json.dumps(table, indent=1))
    return {**table, "examples": _examples(checkpoints, samples)}


def _files(config: Config, work: Work, opened: ExitStack) -> list[Benchmark]:
    """The files of problems, all read before anything is sampled."""
    paths = {family: work.inputs[PROBLEMS] / file for family, file in config.problems.items()}
    kinds = {family: kind_of(read_problems(path), path) for family, path in paths.items()}
    found: list[Benchmark] = []
    for family, path in paths.items():
        reward = config.rewards.get(family, RewardConfig(kind=kinds[family]))
        verifier = opened.enter_context(open_verifier(reward, work.inputs, work.machine))
        found.append(ProblemFile(family, path, verifier, samples=config.samples, count=config.count))
    return found


def _named(config: Config, work: Work, opened: ExitStack) -> list[Benchmark]:
    """The package's own. What they draw themselves is the same for every seed of the recipe."""
    if not config.benchmarks:
        return []
    sandbox = opened.enter_context(Sandbox(workers=work.machine.workers, unsafe=work.machine.unsafe_execution))
    setting = Setting(samples=config.samples, sandbox=sandbox, unsafe=work.machine.unsafe_execution)
    return [open_named(given, setting) for given in config.benchmarks]


def _measured(config: Config, work: Work, benchmark: Benchmark, name: str) -> list[Sample]:
    """The samples of one checkpoint; those of an earlier, killed run are read, and its model is not even loaded."""
    path = work.out / "samples" / f"{name}.{benchmark.name}.jsonl"
    if path.exists():
        return read_jsonl(path, Sample)
    problems = benchmark.problems()
    return measure(
        open_local(work.inputs[name] / "model", device=work.machine.device, dtype=config.dtype),
        benchmark,
        path,
        limits=replace(config.limits, seed=seed_for(work.seed, benchmark.name)),
        monitor=work.monitor,
        label=f"{name} on {benchmark.name}",
        problems=list(evenly(problems, len(problems), config.count)) if config.count else problems,
        problems_a_block=config.problems_a_block,
    )


def _table(
    config: Config,
    checkpoints: Sequence[str],
    benchmarks: Sequence[Benchmark],
    samples: Mapping[tuple[str, str], Sequence[Sample]],
) -> dict[str, Any]:
    """Rows (one for each checkpoint and family) and differences (each checkpoint and the one before it)."""
    return {
        "temperature": config.limits.temperature,
        "k": config.samples,
        "rows": [
            {"checkpoint": name, "family": benchmark.name, **table_row(benchmark, samples[name, benchmark.name])}
            for name in checkpoints
            for benchmark in benchmarks
        ],
        "differences": [
            {"before": before, "after": after, "family": benchmark.name}
            | difference(samples[before, benchmark.name], samples[after, benchmark.name])
            for before, after in pairwise(checkpoints)
            for benchmark in benchmarks
        ],
    }


def _examples(checkpoints: Sequence[str], samples: Mapping[tuple[str, str], Sequence[Sample]]) -> list[dict[str, Any]]:
    """The first sample of the same few problems by every checkpoint, for the report."""
    families = dict.fromkeys(family for _, family in samples)
    found = []
    for family in families:
        for name in checkpoints:
            first = [sample for sample in samples[name, family] if sample.index == 0][:EXAMPLES]
            found += [{"checkpoint": name, "family": family, **asdict(sample)} for sample in first]
    return found


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Each checkpoint reads a prompt and writes, on average, half of the tokens allowed; two operations a parameter.
    One checkpoint at a time is in memory, with what decoding a block of problems holds."""
    held = inputs[PROBLEMS].records if PROBLEMS in inputs else {}
    files = [*config.problems.values(), *config.benchmarks]
    found = [held.get(file, config.count or ASSUMED_PROBLEMS) for file in files]
    count = sum(min(one, config.count or one) for one in found)
    models = [item for name, item in inputs.items() if name != PROBLEMS]
    tokens = count * config.samples * config.limits.max_new_tokens / 2
    at_once = min(count, config.problems_a_block) * config.samples
    return Estimate(
        tokens=tokens * len(models),
        flops=sum(2 * item.parameters * tokens for item in models),
        sampled_flops=sum(2 * item.parameters * tokens for item in models),
        memory_bytes=5e8
        + max(
            (4 * item.parameters + planned_bytes(item.held_bytes, at_once, config.limits) for item in models), default=0
        ),
        disk_bytes=500 * count * config.samples * len(models),
    )
