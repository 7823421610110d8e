"""eval: samples are kept and read again while model, problem and decoding are the same, and made anew otherwise."""

import io
import json
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from tiny_checkpoint import tiny_checkpoint

from upweight.app.benchmarks import find_benchmarks
from upweight.app.measure import Decoding, measure_models
from upweight.core.errors import UserError
from upweight.core.records import Sample
from upweight.core.work import Machine
from upweight.evals.estimators import avg_at_k
from upweight.evals.measure import by_problem
from upweight.evals.setting import Setting
from upweight.store.jsonl import read_jsonl

OWN = """
from upweight.core.protocols import Benchmark, Verifier
from upweight.core.records import Message, Problem, Verdict


class Longer(Verifier):
    def score(self, problem, group):
        return [Verdict(float(len(c.text) > 2), "its length") for c in group]


class Mine(Benchmark):
    name, samples, verifier = "mine", 2, Longer()

    def problems(self):
        return [Problem("p", (Message("user", "Say much."),))]

    def figures(self, samples):
        return {"letters": sum(len(s.text) for s in samples)}


benchmark = Mine()
"""


def problems(folder: Path, count: int = 2) -> str:
    rows = [{"question": f"{i} + 3?", "answer": str(i + 3)} for i in range(count)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "own.jsonl")


def measured(folder: Path, models: list[str], on: list[str], seed: int = 0, **given) -> tuple[dict, str]:
    console = Console(file=io.StringIO(), width=120)
    table = measure_models(
        models,
        on,
        root=folder / "runs",
        out=folder / "evals",
        decoding=Decoding(max_new_tokens=5, seed=seed),
        machine=Machine(),
        console=console,
        **{"k": 2, **given},
    )
    return table, console.file.getvalue()


def sampled(printed: str) -> int:
    """How many samples the printed bars say were made."""
    return printed.count("samples/s")


def test_two_models_side_by_side_and_again(tmp_path: Path) -> None:
    models = [str(tiny_checkpoint(tmp_path / name, seed)) for seed, name in enumerate(["a", "b"])]
    on = [problems(tmp_path)]
    table, printed = measured(tmp_path, models, on)
    assert [row["checkpoint"] for row in table["rows"]] == models
    assert "within the noise" in printed
    assert json.loads((tmp_path / "evals" / "table.json").read_text()) == table
    for row in table["rows"]:  # the table can be computed from the files
        (file,) = (tmp_path / "evals").glob(f"*{'a' if row is table['rows'][0] else 'b'}_model/own.jsonl")
        estimate = avg_at_k(list(by_problem(read_jsonl(file, Sample)).values()))
        assert (round(estimate.mean, 6), round(estimate.low, 6)) == (row["mean"], row["low"])
    assert measured(tmp_path, models, on)[0] == table


def test_a_problem_that_was_asked_before_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    model = str(tiny_checkpoint(tmp_path / "a"))
    from upweight.rollout.local import LocalSampler

    sample = LocalSampler.sample

    def counted(self, prompts, *, count, limits):
        asked.append(len(prompts) * count)
        return sample(self, prompts, count=count, limits=limits)

    monkeypatch.setattr(LocalSampler, "sample", counted)
    first, _ = measured(tmp_path, [model], [problems(tmp_path, 3)])
    assert sum(asked) == 6
    assert measured(tmp_path, [model], [problems(tmp_path, 3)])[0] == first
    assert sum(asked) == 6
    measured(tmp_path, [model], [problems(tmp_path, 5)])  # two new problems
    assert sum(asked) == 10
    fewer, _ = measured(tmp_path, [model], [problems(tmp_path, 5)], k=1, count=2)
    assert sum(asked) == 10
    assert (fewer["rows"][0]["problems"], fewer["rows"][0]["k"]) == (2, 1)
    measured(tmp_path, [model], [problems(tmp_path, 5)], seed=1)
    assert sum(asked) == 20


def test_a_benchmark_of_ones_own_is_one_class(tmp_path: Path) -> None:
    (tmp_path / "my_benchmark.py").write_text(OWN)
    model = str(tiny_checkpoint(tmp_path / "a"))
    table, printed = measured(tmp_path, [model], [str(tmp_path / "my_benchmark.py")], k=0)
    assert table["rows"][0]["family"] == "mine"
    assert "mine, " in printed
    assert "letters" in table["rows"][0]["figures"]


def test_an_endpoint_is_measured_as_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upweight.core.records import Completion

    def get(url, **options):
        return httpx.Response(200, json={"data": [{"id": "served"}]}, request=httpx.Request("GET", url))

    monkeypatch.setattr("upweight.app.sampler.httpx.get", get)
    monkeypatch.setattr(
        "upweight.rollout.remote.RemoteSampler.sample",
        lambda self, prompts, *, count, limits: [
            [Completion((), (), "\\boxed{3}", "end", self.model)] * count for _ in prompts
        ],
    )
    table, printed = measured(tmp_path, ["http://127.0.0.1:1/v1"], [problems(tmp_path)])
    assert table["rows"][0]["mean"] == 0.5  # 0 + 3 is right, 1 + 3 is not
    assert printed.rstrip().endswith("-")  # an endpoint tells no tokens


def test_what_is_missing_is_said_before_anything_is_sampled(tmp_path: Path) -> None:
    model = str(tiny_checkpoint(tmp_path / "a"))
    with pytest.raises(UserError, match="does not exist"):
        measured(tmp_path, [model], [str(tmp_path / "none.jsonl")])
    with pytest.raises(UserError, match="at least one model"):
        measured(tmp_path, [], [problems(tmp_path)])
    with pytest.raises(UserError, match="is no model directory"):
        measured(tmp_path, ["elsewhere"], [problems(tmp_path)])
    with pytest.raises(UserError, match="does not say which models it serves"):
        measured(tmp_path, ["http://127.0.0.1:9/v1"], [problems(tmp_path)])


def test_names_are_found(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    found = find_benchmarks([f"gsm8k={tmp_path}/rows.jsonl,{problems(tmp_path)}"], Setting())
    assert [benchmark.name for benchmark in found] == ["gsm8k", "own"]
    with pytest.raises(UserError, match="no file 'gsm8': did you mean gsm8k"):
        find_benchmarks(["gsm8"], Setting())
    with pytest.raises(UserError, match="is named twice"):
        find_benchmarks([problems(tmp_path), problems(tmp_path)], Setting())
    with pytest.raises(UserError, match="name what to measure on"):
        find_benchmarks([","], Setting())
