"""Measuring one model on one benchmark: sample, judge, keep every sample, and sum up.

Every sample is one line of a JSONL file with its verdict and reason, so that each number of the table can be computed
again from it. Problems are worked off in blocks and written as they come; after a kill the whole blocks are kept, and
the rest is sampled as it would have been.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Limits, Sampler
from upweight.core.records import Completion, Problem, Verdict
from upweight.core.work import Bar, Monitor
from upweight.evals.estimators import Estimate, avg_at_k, paired_difference, pass_at_k
from upweight.store.jsonl import iterate_jsonl, read_jsonl, write_jsonl


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of a problem and its verdict, as stored."""

    problem: str
    index: int
    score: float
    reason: str
    stop: str
    tokens: int
    text: str
    question: str
    answer: str | None


def measure(
    sampler: Sampler,
    benchmark: Benchmark,
    path: Path,
    *,
    limits: Limits,
    monitor: Monitor,
    label: str,
    problems_a_block: int = 64,
) -> list[Sample]:
    """Sample `benchmark.samples` completions of each problem, judge them, and keep them in `path`.

    A `path` that exists is read instead: it is complete. Truncated completions are judged as they are (an unfinished
    answer is no answer) and counted in the table.

    Args:
        limits: how to decode; the same seed gives every model the same random numbers.
        label: what the progress bar calls it.
        problems_a_block: problems sampled at once, and lost at most in a kill.
    """
    if path.exists():
        return read_jsonl(path, Sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = benchmark.problems()
    begun = path.with_name(f".{path.name}.begun")
    done = _whole_blocks(begun, benchmark.samples * problems_a_block)
    total = len(problems) * benchmark.samples
    with begun.open("ab") as file, monitor.track(label, total=total, unit="samples", done=done) as bar:
        for start in range(done // benchmark.samples, len(problems), problems_a_block):
            rows = _block(sampler, benchmark, problems[start : start + problems_a_block], limits, bar)
            file.write(b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in rows))
            file.flush()
    write_jsonl(path, iterate_jsonl(begun, Sample))
    begun.unlink()
    return read_jsonl(path, Sample)


def _block(
    sampler: Sampler, benchmark: Benchmark, problems: Sequence[Problem], limits: Limits, bar: Bar
) -> list[Sample]:
    groups = sampler.sample([problem.messages for problem in problems], count=benchmark.samples, limits=limits)
    rows = []
    for problem, group in zip(problems, groups, strict=True):
        verdicts = benchmark.verifier.score(problem, group)
        rows += [_sample(problem, *judged) for judged in enumerate(zip(group, verdicts, strict=True))]
        bar.advance(len(group), score=fmean(row.score for row in rows))
    return rows


def _sample(problem: Problem, index: int, judged: tuple[Completion, Verdict]) -> Sample:
    completion, verdict = judged
    return Sample(
        problem=problem.id,
        index=index,
        score=verdict.score,
        reason=verdict.reason,
        stop=completion.stop,
        tokens=len(completion.tokens),
        text=completion.text,
        question=problem.messages[-1].content,
        answer=problem.answer,
    )


def _whole_blocks(path: Path, block: int) -> int:
    """Samples of the whole blocks that a killed run left in `path`; what follows them is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    kept = len(lines) // block * block
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines[:kept])))
    return kept


def by_problem(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """The scores of each problem, in the order of the file."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        scores.setdefault(sample.problem, []).append(sample.score)
    return scores


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of the table: avg@k with its 95% interval, pass@k, share cut off, mean length in tokens."""
    scores = list(by_problem(samples).values())
    average = avg_at_k(scores)
    return {
        **_figures(average),
        "k": average.samples,
        "problems": average.problems,
        "pass_at_k": round(pass_at_k(scores, average.samples).mean, 6),
        "truncated_share": round(fmean(sample.stop == "length" for sample in samples), 6),
        "mean_tokens": round(fmean(sample.tokens for sample in samples), 2),
    }


def difference(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, Any]:
    """How much better `after` is than `before`, paired by problem, with its 95% interval.

    Raises UserError where the two answered other problems.
    """
    first, second = by_problem(before), by_problem(after)
    if first.keys() != second.keys():
        raise UserError("two models can be compared on the same problems only: measure both on the same file and count")
    paired = paired_difference(list(first.values()), [second[problem] for problem in first])
    return {**_figures(paired), "significant": paired.excludes_zero}


def _figures(estimate: Estimate) -> Mapping[str, float | None]:
    """JSON has no infinity: with a single problem there is no interval, and its ends are null."""
    single = estimate.problems == 1
    return {
        "mean": round(estimate.mean, 6),
        "low": None if single else round(estimate.low, 6),
        "high": None if single else round(estimate.high, 6),
        "standard_error": None if single else round(estimate.standard_error, 6),
    }
