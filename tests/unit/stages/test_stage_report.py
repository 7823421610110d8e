"""The page opens offline, holds every step, and nothing that a document says becomes markup."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from upweight.core.errors import UserError
from upweight.core.identity import fingerprint
from upweight.core.work import Work
from upweight.evals.curves import curves, intervals, read_metrics
from upweight.evals.page import _records, readable, shape
from upweight.stages import report
from upweight.store.artifact import LocalStore

HOSTILE = "<script>alert('x')</script>"


def artifact(root: Path, step: str, inputs: Mapping[str, str], summary: Mapping[str, Any]) -> Path:
    store = LocalStore(root, "recipe")
    identity = {
        "stage": step,
        "config": {"type": "Config", "rate": 0.001},
        "inputs": {name: {"step": name, "fingerprint": print_} for name, print_ in inputs.items()},
        "seed": 0,
    }
    notes = {
        "summary": dict(summary),
        "planned": {"seconds": 10.0, "memory_bytes": 1e9},
        "timings": {
            "started": "2026-01-02T03:04:05+00:00",
            "finished": "2026-01-02T03:05:05+00:00",
            "seconds": 60.0,
            "processor_seconds": 50.0,
            "attempts": 1,
        },
        "peak_memory_bytes": 5e8,
        "disk_bytes": 1e6,
        "environment": {"python": "3.11", "versions": {"torch": "2.13"}},
    }
    with store.create(step, identity, notes) as out:
        if step == "mixture":
            (out / "documents").mkdir()
            table = pyarrow.table({"id": ["a"], "text": [HOSTILE], "source": ["web"], "tier": ["high"]})
            pyarrow.parquet.write_table(table, out / "documents" / "high.parquet")
        if step == "base":
            rows = [
                {"step": i, "consumed": 100 * i, "phase": "warmup" if i < 5 else "decay", "loss": 3 / (1 + i)}
                for i in range(20)
            ]
            (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (out / "rollouts").mkdir()
            rollout = {
                "problem": {"id": "p", "messages": [{"role": "user", "content": "2 + 3?"}], "answer": "5"},
                "completions": [{"tokens": [1, 2], "logprobs": [0.0, 0.0], "text": "It is 5", "stop": "end"}],
                "verdicts": [{"score": 1.0, "reason": "equal"}],
            }
            (out / "rollouts" / "step-1.jsonl").write_text(json.dumps(rollout) + "\n")
    return store.open(step)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    row = {"k": 8, "problems": 10, "pass_at_k": 0.9, "truncated_share": 0.01, "mean_tokens": 20.0}
    table = {
        "temperature": 1,
        "rows": [
            {"checkpoint": "base", "family": "stem", "mean": 0.4, "low": 0.3, "high": 0.5, **row},
            {"checkpoint": "sft", "family": "stem", "mean": 0.6, "low": 0.5, "high": 0.7, **row},
        ],
        "differences": [
            {
                "before": "base",
                "after": "sft",
                "family": "stem",
                "mean": 0.2,
                "low": 0.1,
                "high": 0.3,
                "significant": True,
            }
        ],
    }
    mixture = artifact(
        tmp_path, "mixture", {}, {"kept": 12_345, "by tier": {"high": {"documents": 3}}, "note": HOSTILE}
    )
    base = artifact(tmp_path, "base", {"mixture": fingerprint("x")}, {"final_loss": 0.15})
    return {"mixture": mixture, "base": base, "evaluation": artifact(tmp_path, "evaluation", {"base": "x"}, table)}


def test_the_page(tmp_path: Path, inputs: dict[str, Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    summary = report.run(report.Config("a title"), Work(out, inputs))
    page = (out / "report.html").read_text()
    assert summary["bytes"] == len(page.encode()) < 5_000_000
    for wanted in ("a title", "12,345", "0.600", "+0.200", "0.500 to 0.700", "It is 5", "warmup", "1m00s", "3.11"):
        assert wanted in page
    # what documents say is text: the hostile string stands escaped, in the summary and in the example
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") == 2
    # offline: nothing is fetched
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", page)


def test_while_a_run_goes_on(tmp_path: Path, inputs: dict[str, Path]) -> None:
    begun = tmp_path / "recipe" / ".building-sft"
    begun.mkdir()
    source = next(iter(inputs))
    identity = {"stage": "sft", "config": {"epochs": 3}, "inputs": {"model": {"step": source, "fingerprint": "0"}}}
    (begun / ".identity.json").write_text(json.dumps(identity))
    (begun / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    report.write_page({**inputs, "sft": begun}, tmp_path / "page.html", title="live")
    (begun / ".identity.json").write_text("{")  # cut short
    report.write_page({**inputs, "sft": begun}, tmp_path / "unknown.html", title="live")
    page = (tmp_path / "page.html").read_text()
    assert "3 of 4 steps are complete" in page
    assert "in progress" in page
    link = '<a href="#step-sft">sft'
    assert f"{link}<small>from {source}</small>" in page
    unknown = (tmp_path / "unknown.html").read_text()
    assert f"{link}</a>" in unknown


def test_files_that_are_being_written_are_passed_over(tmp_path: Path) -> None:
    begun = tmp_path / "recipe" / ".building-sft"
    (begun / "rollouts").mkdir(parents=True)
    (begun / "rollouts" / "step-1.jsonl").write_text('{"text": "whole"}\n{"text": "cut sh')
    (begun / "high.parquet").write_bytes(b"PAR1 and no end yet")
    report.write_page({"sft": begun}, tmp_path / "page.html", title="live")
    page = (tmp_path / "page.html").read_text()
    assert "whole" in page
    assert "cut sh" not in page


def test_a_large_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.evals.page.WHOLE_BYTES", 100)
    lines = [json.dumps({"n": number}) for number in range(1000)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n")
    found = [record["n"] for record in _records(tmp_path / "many.jsonl")]
    assert found[0] == 0
    assert 330 < found[1] < 345  # a third and two thirds of the bytes
    assert 660 < found[2] < 675


def test_of_a_loss_the_lowest_is_the_best(tmp_path: Path) -> None:
    row = {"family": "bits", "k": 1, "problems": 9, "pass_at_k": None, "truncated_share": 0.0, "mean_tokens": 2.0}
    rows = [
        {"checkpoint": name, "mean": mean, "low": mean - 0.1, "high": mean + 0.1, "lower_is_better": True, **row}
        for name, mean in (("base", 1.9), ("sft", 1.4))
    ]
    apart = {"before": "base", "after": "sft", "family": "bits", "mean": -0.5, "low": -0.6, "high": -0.4}
    table = {"temperature": 1, "rows": rows, "differences": [{**apart, "significant": True}]}
    report.write_page({"e": artifact(tmp_path, "e", {}, table)}, tmp_path / "page.html", title="t")
    page = (tmp_path / "page.html").read_text()
    assert "<b>1.400</b>best: sft" in page
    assert '<td class="good">-0.500</td>' in page
    assert intervals("bits", rows).y_range.end > 1.9  # the bars are not cut off


def test_the_lineage_does_not_depend_on_the_order_of_the_inputs(tmp_path: Path) -> None:
    chain = [("tags", {}), ("sft", {"tags": "x"}), ("dpd", {"sft": "x", "outside": "x"}), ("alone", {})]
    found = {name: artifact(tmp_path, name, inputs, {}) for name, inputs in chain}
    report.write_page({name: found[name] for name, _ in reversed(chain)}, tmp_path / "page.html", title="t")
    ranks = re.findall(r'<div class="rank">(.*?)</div>', (tmp_path / "page.html").read_text())
    assert [re.findall("#step-([a-z]+)", rank) for rank in ranks] == [["alone", "tags"], ["sft"], ["dpd"]]


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no inputs"):
        report.run(report.Config(), Work(tmp_path, {}))


def test_of_a_step_recorded_twice_the_later_row_counts(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 2.0},
        {"rollout_step": 2, "reward": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(tmp_path / "metrics.jsonl") == [rows[0], rows[2], rows[3]]


def test_curves_of_both_counters() -> None:
    rows = [{"step": i, "loss": float(i), "tokens": 5, "gradient_norm": 1.0} for i in range(3)]
    rows += [{"rollout_step": i, "reward": i / 10} for i in range(3)]
    # the constant gradient norm and the tokens of a step are no curves
    assert [made.title.text for made in curves(rows)] == ["loss", "reward"]


@pytest.mark.parametrize("count", [400, 401, 799, 12_345])
def test_a_curve_has_few_points_and_ends_where_the_run_did(count: int) -> None:
    (made,) = curves([{"step": i, "loss": float(i)} for i in range(count)])
    (source,) = {renderer.data_source for renderer in made.renderers}
    assert count / 31 < len(source.data["x"]) <= 401
    assert [source.data["x"][0], source.data["x"][-1]] == [0, count - 1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "empty"),
        ({}, "empty"),
        (3, "number"),
        ("short", "word"),
        ("two\nlines", "text"),
        ([1, 2.5, "a"], "line"),
        ([{"a": 1}, {"a": 2}], "table"),
        ([{"a": "x" * 100}], "list"),
        ({"a": 1}, "figures"),
        ({"a": 1, "b": "x" * 100}, "fields"),
        ({"a": {"n": 1}, "b": {"n": 2}}, "matrix"),
        ([{"role": "user", "content": "x" * 100}], "messages"),
    ],
)
def test_shapes(value: object, expected: str) -> None:
    assert shape(value) == expected


def test_long_texts_are_cut_and_tokens_left_out() -> None:
    shown = readable({"text": "x" * 2000, "tokens": [1, 2, 3], "logprobs": [0.1]})
    assert shown == {"text": "x" * 1200 + " [... 800 more characters]"}
