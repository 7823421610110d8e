"""Measuring one model on one benchmark: sample, judge, keep every sample, and sum up.

Every sample is one line of a JSONL file with its verdict and reason, so that each number of the table can be computed
again from it. Problems are worked off in blocks and written as they come; after a kill those that were written are
kept, and the rest is sampled as it would have been.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.protocols import Benchmark, Limits, Sampler
from upweight.core.records import Completion, Problem, Sample, Verdict
from upweight.core.work import Monitor
from upweight.evals.estimators import Estimate, avg_at_k, maj_at_k, paired_difference, pass_at_k
from upweight.store.jsonl import iterate_jsonl, read_jsonl, write_jsonl


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one problem, as a measurement that goes on keeps them. `key` is the fingerprint of the problem."""

    key: str
    samples: tuple[Sample, ...]


def measure(
    sampler: Sampler,
    benchmark: Benchmark,
    path: Path,
    *,
    limits: Limits,
    monitor: Monitor,
    label: str,
    problems: Sequence[Problem] | None = None,
    problems_a_block: int = 64,
    kept: Path | None = None,
) -> list[Sample]:
    """Sample `benchmark.samples` completions of each problem, judge them, and keep them in `path`.

    Truncated completions are judged as they are (an unfinished answer is no answer) and counted in the table.

    Args:
        path: where all samples lie in the end. Without `kept`, one that exists is read instead: it is complete.
        limits: how to decode; the same seed gives every model the same random numbers.
        label: what the progress bar calls it.
        problems: those to ask; None takes all of the benchmark's.
        problems_a_block: problems sampled at once, and lost at most in a kill.
        kept: a file of groups that outlives this call, from which problems that were asked before are answered. It has
            to belong to this sampler, these limits and this benchmark; of more samples than needed the first count.
    """
    if kept is None and path.exists():
        return read_jsonl(path, Sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = benchmark.problems() if problems is None else problems
    for name, count in Counter(problem.id for problem in wanted).items():
        if count > 1:
            raise UserError(f"{benchmark.name} has {count} problems of the id {name!r}: give each an id of its own")
    asked = {fingerprint(problem): problem for problem in wanted}
    begun = path.with_name(f".{path.name}.begun") if kept is None else kept
    done = {group.key: group.samples[: benchmark.samples] for group in _groups(begun, benchmark.samples)}
    done = {key: samples for key, samples in done.items() if key in asked}
    left = [key for key in asked if key not in done]
    total = len(asked) * benchmark.samples
    with (
        begun.open("ab") as file,
        monitor.track(label, total=total, unit="samples", done=len(done) * benchmark.samples) as bar,
    ):
        for start in range(0, len(left), problems_a_block):
            keys = left[start : start + problems_a_block]
            for key, samples in zip(
                keys, _block(sampler, benchmark, [asked[key] for key in keys], limits), strict=True
            ):
                done[key] = samples
                file.write(msgspec.json.encode(Group(key, samples)) + b"\n")
                bar.advance(len(samples), score=fmean(sample.score for group in done.values() for sample in group))
            file.flush()
    write_jsonl(path, (sample for key in asked for sample in done[key]))
    if kept is None:
        begun.unlink()
    return read_jsonl(path, Sample)


def _block(
    sampler: Sampler, benchmark: Benchmark, problems: Sequence[Problem], limits: Limits
) -> Iterator[tuple[Sample, ...]]:
    groups = benchmark.ask(sampler, problems, limits)
    for problem, group in zip(problems, groups, strict=True):
        verdicts = benchmark.verifier.score(problem, group)
        yield tuple(_sample(problem, *judged) for judged in enumerate(zip(group, verdicts, strict=True)))


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


def _groups(path: Path, samples: int) -> list[Group]:
    """The groups of at least so many samples that `path` holds; a last line that a kill cut short is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return [group for group in iterate_jsonl(path, Group) if len(group.samples) >= samples]


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


def table_row(benchmark: Benchmark, samples: Sequence[Sample]) -> dict[str, Any]:
    """The summary of a benchmark's samples, with maj@k. Where lower is better nothing passes, and it says so."""
    figures = summary(samples)
    if benchmark.lower_is_better:
        return {**figures, "pass_at_k": None, "lower_is_better": True}
    return {**figures, "maj_at_k": _majority(benchmark, samples)} if figures["k"] > 1 else figures


def _majority(benchmark: Benchmark, samples: Sequence[Sample]) -> float | None:
    """maj@k: the score of the answer that most samples of a problem give; None where answers cannot be counted."""
    # a verifier of one's own may have no more than `score`
    answer_of = getattr(benchmark.verifier, "answer_of", lambda text: None)
    answers: dict[str, list[str | None]] = {}
    for sample in samples:
        settled = None if sample.stop == "length" else answer_of(sample.text)
        answers.setdefault(sample.problem, []).append(settled)
    if not any(answer for given in answers.values() for answer in given):
        return None
    return round(maj_at_k([*answers.values()], [*by_problem(samples).values()]).mean, 6)


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
