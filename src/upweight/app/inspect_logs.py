"""Results of `upweight eval` as logs of inspect-ai, so that its viewer opens them: inspect view --log-dir DIR."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.protocols import Limits
from upweight.core.records import Sample

REASONS = {"length": "max_tokens", "end": "stop", "stop": "stop"}
METRICS = {
    "mean": "avg_at_k",
    "standard_error": "stderr",
    "low": "ci95_low",
    "high": "ci95_high",
    "pass_at_k": "pass_at_k",
    "maj_at_k": "maj_at_k",
}


def require_inspect() -> None:
    """Raises UserError where inspect-ai is not installed, before hours are spent on what it is to show."""
    try:
        import inspect_ai  # noqa: F401 - an optional extra
    except ImportError:
        raise UserError("logs for inspect-ai need the package: pip install 'upweight[inspect]'") from None


def write_log(
    folder: Path, *, model: str, benchmark: str, samples: Sequence[Sample], row: Mapping[str, Any], limits: Limits
) -> Path:
    """Write the samples of one model on one benchmark as one log, each with its verdict and reason.

    Args:
        row: the table's row of them, whose figures become the metrics.
    """
    require_inspect()
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSample, EvalSpec, write_eval_log
    from inspect_ai.log import EvalMetric, EvalScore, EvalStats  # isort: skip
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig, ModelOutput
    from inspect_ai.scorer import Score

    made = []
    for sample in samples:
        output = ModelOutput.from_content(model, sample.text, stop_reason=REASONS.get(sample.stop, "unknown"))
        answered = ChatMessageAssistant(content=sample.text, model=model, source="generate")
        made.append(
            EvalSample(
                id=sample.problem,
                epoch=sample.index + 1,
                input=sample.question,
                target=sample.answer or "",
                messages=[ChatMessageUser(content=sample.question, source="input"), answered],
                output=output,
                scores={"verdict": Score(value=sample.score, answer=sample.text[-400:], explanation=sample.reason)},
                metadata={"tokens": sample.tokens},
            )
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    names = list(dict.fromkeys(sample.problem for sample in samples))
    metrics = {
        shown: EvalMetric(name=shown, value=row[name]) for name, shown in METRICS.items() if row.get(name) is not None
    }
    metrics |= {name: EvalMetric(name=name, value=value) for name, value in row.get("figures", {}).items()}
    decoding = GenerateConfig(
        temperature=limits.temperature, top_p=limits.top_p, max_tokens=limits.max_new_tokens, seed=limits.seed
    )
    log = EvalLog(
        status="success",
        eval=EvalSpec(
            created=now,
            task=benchmark,
            task_id=fingerprint([benchmark, model]),
            eval_id=fingerprint([benchmark, model, now]),
            run_id=fingerprint([now]),
            dataset=EvalDataset(name=benchmark, samples=len(names), sample_ids=names),
            model=f"upweight/{model}",
            model_generate_config=decoding,
            config=EvalConfig(epochs=row["k"]),
            metadata={"limits": asdict(limits)},
        ),
        results=EvalResults(
            total_samples=len(made),
            completed_samples=len(made),
            scores=[EvalScore(name="verdict", scorer="verdict", metrics=metrics)],
        ),
        stats=EvalStats(started_at=now, completed_at=now),
        samples=made,
    )
    folder.mkdir(parents=True, exist_ok=True)
    stamp = now.replace(":", "-").replace("+00-00", "Z")
    path = folder / f"{stamp}_{_plain(benchmark)}_{_plain(model)}.eval"
    write_eval_log(log, str(path))
    return path


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-")
