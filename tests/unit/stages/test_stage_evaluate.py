"""evaluate: a row for each checkpoint and family, differences in the order of the inputs, resumable by file."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "app"))
from tiny_checkpoint import tiny_checkpoint

from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.work import Estimate, Work
from upweight.evals.estimators import avg_at_k
from upweight.evals.measure import Sample, by_problem
from upweight.rollout.local import LocalSampler, open_local
from upweight.stages import evaluate
from upweight.store.jsonl import read_jsonl

CONFIG = evaluate.Config(problems={"stem": "stem.jsonl"}, samples=3, limits=Limits(max_new_tokens=6))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    problems = tmp_path / "problems"
    problems.mkdir()
    rows = [{"question": f"Ann has {i}?", "answer": str(i)} for i in range(4)]
    (problems / "stem.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(["base", "sft"]):
        tiny_checkpoint(tmp_path / name, seed)
    out = tmp_path / "out"
    out.mkdir()
    return Work(out, {"problems": problems, "base": tmp_path / "base", "sft": tmp_path / "sft"}, seed=5)


def test_the_table(work: Work) -> None:
    summary = evaluate.run(CONFIG, work)
    table = json.loads((work.out / "table.json").read_text())
    assert [(row["checkpoint"], row["family"]) for row in table["rows"]] == [("base", "stem"), ("sft", "stem")]
    assert [(row["before"], row["after"]) for row in table["differences"]] == [("base", "sft")]
    assert summary["rows"] == table["rows"]
    samples = read_jsonl(work.out / "samples" / "sft.stem.jsonl", Sample)
    assert len(samples) == 4 * 3
    assert table["rows"][1]["mean"] == round(avg_at_k(list(by_problem(samples).values())).mean, 6)


def test_checkpoints_are_opened_in_the_precision_of_the_config(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[torch.dtype] = []

    def recording(directory: Path, **options: Any) -> LocalSampler:
        sampler = open_local(directory, **options)
        opened.append(sampler.model.unembedding.dtype)
        return sampler

    monkeypatch.setattr(evaluate, "open_local", recording)
    evaluate.run(replace(CONFIG, dtype="bfloat16"), work)
    assert opened == [torch.bfloat16] * 2


def test_resumed_by_file_with_the_same_bytes(work: Work) -> None:
    evaluate.run(CONFIG, work)
    files = sorted(path for path in work.out.rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in files]
    (work.out / "samples" / "sft.stem.jsonl").unlink()
    evaluate.run(CONFIG, work)
    assert [path.read_bytes() for path in files] == contents


def test_benchmarks_of_the_package_are_measured_by_name(work: Work, tmp_path: Path) -> None:
    data = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"Ann has {i} and {i}?", "answer": f"So it is.\n#### {2 * i}"} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(CONFIG, benchmarks=(f"gsm8k={data}",), count=3)
    table = evaluate.run(config, work)
    assert {(row["checkpoint"], row["family"]) for row in table["rows"]} == {
        (name, family) for name in ("base", "sft") for family in ("stem", "gsm8k")
    }
    samples = read_jsonl(work.out / "samples" / "base.gsm8k.jsonl", Sample)
    assert [one.answer for one in samples[:: config.samples]] == ["4", "10", "16"]  # 3 of 9, evenly
    assert max(one.tokens for one in samples) <= config.limits.max_new_tokens
    alone = evaluate.Config(problems={}, benchmarks=(f"gsm8k={data}",), samples=1, count=1, limits=config.limits)
    (tmp_path / "alone").mkdir()
    inputs = {"base": work.inputs["base"]}
    assert len(evaluate.run(alone, Work(tmp_path / "alone", inputs))["rows"]) == 1
    with pytest.raises(UserError, match="no benchmark 'gsm9k'"):
        evaluate.Config(benchmarks=("gsm9k",))
    with pytest.raises(UserError, match="each by its own name"):
        evaluate.Config(problems={"gsm8k": "stem.jsonl"}, benchmarks=("gsm8k",))


def test_a_bad_file_is_refused_before_anything_is_sampled(work: Work) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        evaluate.run(evaluate.Config(problems={"stem": "stem.jsonl", "code": "none.jsonl"}), work)
    assert not (work.out / "samples").exists()


def test_inputs_are_needed(work: Work) -> None:
    with pytest.raises(UserError, match="at least one checkpoint"):
        evaluate.run(CONFIG, Work(work.out, {"problems": work.inputs["problems"]}))


def test_estimate() -> None:
    cost = evaluate.estimate(CONFIG, {"problems": Estimate(), "base": Estimate(parameters=1e6)})
    # 200 problems x 3 samples x 3 tokens of 6 allowed, two operations a parameter and token
    assert cost.flops == 2 * 1e6 * 200 * 3 * 3
