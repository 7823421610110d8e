"""eval: samples are kept and read again while model, problem and decoding are the same, and made anew otherwise."""

import io
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from tiny_checkpoint import tiny_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from upweight.app.benchmarks import find_benchmarks
from upweight.app.measure import Decoding, measure_models
from upweight.app.sampler import open_sampler
from upweight.app.serve import ServeConfig
from upweight.core.errors import RootInUse, UserError
from upweight.core.identity import fingerprint
from upweight.core.records import Completion, Sample
from upweight.core.work import Machine
from upweight.evals.estimators import avg_at_k
from upweight.evals.measure import by_problem
from upweight.evals.rows import read_rows
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
        machine=Machine(),
        console=console,
        **{"k": 2, "decoding": Decoding(max_new_tokens=5, seed=seed), **given},
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


def test_a_changed_setting_of_the_model_is_another_model(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "a")
    on = [problems(tmp_path)]
    first, _ = measured(tmp_path, [str(model)], on)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 100.0, "rms_norm_eps": 0.1}))
    measured(tmp_path, [str(model)], on)
    origins = [json.loads(file.read_text()) for file in (tmp_path / "evals" / "cache").glob("*/origin.json")]
    assert len(origins) == 2  # the weights are the same
    assert len({origin["model"]["weights"] for origin in origins}) == 1
    (model / "config.json").write_text(json.dumps(config))
    assert measured(tmp_path, [str(model)], on)[0] == first


def test_so_is_one_of_another_architecture(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "a")
    made = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    made.save_pretrained(model)
    identities = []
    for epsilon in (1e-5, 1e-2):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": epsilon}))
        with open_sampler(str(model), root=tmp_path, machine=Machine()) as opened:
            identities.append(fingerprint(opened.identity))
    assert len(set(identities)) == 2


BY_ROWS = """
from upweight.core.protocols import Verifier
from upweight.core.records import Message, Problem, Verdict
from upweight.evals.rows import DataSet, Questions


class Fixed(Verifier):
    def score(self, problem, group):
        return [Verdict(SCORE, "so it is") for _ in group]


def problem(row, index):
    return Problem(str(index), (Message("user", row["question"]),), row["answer"])


def benchmark(setting):
    return Questions("by_rows", DataSet(), problem, Fixed(), 2, setting)
"""


def test_a_changed_judge_of_ones_own_judges_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = str(tiny_checkpoint(tmp_path / "a")), Path(problems(tmp_path))
    monkeypatch.setattr("upweight.evals.rows.DataSet.rows", lambda self, name, data: read_rows(rows))
    for score in (0.25, 0.75):
        (tmp_path / "by_rows.py").write_text(BY_ROWS.replace("SCORE", str(score)))
        monkeypatch.delitem(sys.modules, "by_rows", raising=False)
        table, _ = measured(tmp_path, [model], [str(tmp_path / "by_rows.py")])
        assert table["rows"][0]["mean"] == score
    monkeypatch.delitem(sys.modules, "by_rows")


def test_two_processes_do_not_tear_what_is_kept(tmp_path: Path) -> None:
    model, on = str(tiny_checkpoint(tmp_path / "a")), [problems(tmp_path)]
    measured(tmp_path, [model], on)
    (lock,) = (tmp_path / "evals" / "cache").glob("*/own.lock")
    holding = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RootInUse, match="another process measures the same model on own"):
            measured(tmp_path, [model], on)
        other.communicate(b"\n")
    measured(tmp_path, [model], on)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": 1e-9}, {"top_p": 0.0}])
def test_settings_that_are_none_are_told_in_words(tmp_path: Path, settings: dict[str, float]) -> None:
    model = str(tiny_checkpoint(tmp_path / "a"))
    with pytest.raises(UserError, match=next(iter(settings))):
        measured(tmp_path, [model], [problems(tmp_path)], decoding=Decoding(max_new_tokens=5, **settings))


def test_a_benchmark_of_ones_own_is_one_class(tmp_path: Path) -> None:
    (tmp_path / "my_benchmark.py").write_text(OWN)
    model = str(tiny_checkpoint(tmp_path / "a"))
    table, printed = measured(tmp_path, [model], [str(tmp_path / "my_benchmark.py")], k=0)
    assert table["rows"][0]["family"] == "mine"
    assert "mine, " in printed
    assert "letters" in table["rows"][0]["figures"]


def test_an_endpoint_is_measured_as_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"id": "served"}

    def get(url, **options):
        return httpx.Response(200, json={"data": [served]}, request=httpx.Request("GET", url))

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
    served["fingerprint"] = "trained anew"  # as `upweight serve` tells it, and under the same name
    measured(tmp_path, ["http://127.0.0.1:1/v1#served"], [problems(tmp_path)])
    origins = [json.loads(file.read_text()) for file in (tmp_path / "evals" / "cache").glob("*/origin.json")]
    assert {origin["model"]["weights"] for origin in origins} == {"", "trained anew"}


def test_an_endpoint_is_not_asked_for_more_than_our_server_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def sample(self, prompts, *, count, limits):
        asked.append(len(prompts) * count)
        return [[Completion((), (), "", "end", self.model)] * count for _ in prompts]

    monkeypatch.setattr("upweight.rollout.remote.RemoteSampler.sample", sample)
    measured(tmp_path, ["http://127.0.0.1:9/v1#served"], [problems(tmp_path, 60)], k=8)
    assert sum(asked) == 480
    assert max(asked) < ServeConfig().concurrent


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
    assert [benchmark.name for benchmark, _ in found] == ["gsm8k", "own"]
    with pytest.raises(UserError, match="no file 'gsm8': did you mean gsm8k"):
        find_benchmarks(["gsm8"], Setting())
    with pytest.raises(UserError, match="is named twice"):
        find_benchmarks([problems(tmp_path), problems(tmp_path)], Setting())
    with pytest.raises(UserError, match="name what to measure on"):
        find_benchmarks([","], Setting())
