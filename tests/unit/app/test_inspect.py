"""inspect-ai runs our checkpoints and programs, and opens our results. Skips without the extra."""

import asyncio
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_checkpoint

pytest.importorskip("inspect_ai")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample as Asked
from inspect_ai.log import read_eval_log
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver
from inspect_ai.util import sandbox

from upweight.app.inspect_extension import UpweightModel, UpweightSandbox
from upweight.app.inspect_logs import write_log
from upweight.core.protocols import Limits
from upweight.core.records import Sample
from upweight.rollout.sandbox import Sandbox


def test_a_task_runs_against_a_checkpoint(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    task = Task(
        dataset=[Asked(input="Ann has 3?", target="3"), Asked(input="Bob?", target="5")],
        solver=generate(),
        scorer=includes(),
    )
    (log,) = eval(
        task,
        model=f"upweight/{directory}",
        epochs=3,
        max_tokens=8,
        temperature=1.0,
        log_dir=str(tmp_path / "logs"),
        display="none",
    )
    assert log.status == "success", log.error
    assert len(log.samples) == 6
    assert {sample.output.stop_reason for sample in log.samples} <= {"stop", "max_tokens"}
    assert len({sample.output.completion for sample in log.samples}) > 2  # epochs are samples of their own
    assert all(0 < sample.output.usage.output_tokens <= 8 for sample in log.samples)


@solver
def runs_python():
    async def solve(state, generate):
        await sandbox().write_file("data/n.txt", "41")
        done = await sandbox().exec(["python3", "-c", "print(int(open('data/n.txt').read()) + 1)"], timeout=10)
        state.output.completion = done.stdout.strip()
        return state

    return solve


def test_programs_run_in_our_sandbox(tmp_path: Path) -> None:
    task = Task(dataset=[Asked(input="x", target="42")], solver=runs_python(), scorer=includes(), sandbox="upweight")
    (log,) = eval(task, model=f"upweight/{tiny_checkpoint(tmp_path)}", log_dir=str(tmp_path / "logs"), display="none")
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1.0


def test_what_the_sandbox_does_not_run() -> None:
    with Sandbox(workers=1) as pool:
        made = UpweightSandbox(pool)

        def run(*words: str, **given):
            return asyncio.run(made.exec(list(words), **given))

        assert run("bash", "-c", "ls").returncode == 127
        assert run("python", "-c", "raise SystemExit(3)").returncode == 3
        assert run("python", "-", input="print(input)").success
        assert "1" in run("python3", "-c", "import sys; print(sys.argv[1])", "1").stdout
        with pytest.raises(TimeoutError):
            run("python", "-c", "while True: pass", timeout=1)
        asyncio.run(made.write_file("main.py", "print('from a file')"))
        assert run("python", "main.py").stdout == "from a file\n"
        assert asyncio.run(made.read_file("main.py")) == "print('from a file')"
        with pytest.raises(FileNotFoundError):
            asyncio.run(made.read_file("none"))


def test_our_results_are_its_logs(tmp_path: Path) -> None:
    samples = [
        Sample("p", i, float(i), "equal" if i else "different", "end", 5, f"text {i}", "2 + 3?", "5") for i in (0, 1)
    ]
    row = {
        "k": 2,
        "mean": 0.5,
        "low": None,
        "high": None,
        "standard_error": None,
        "pass_at_k": 1.0,
        "figures": {"x": 1.0},
    }
    path = write_log(
        tmp_path, model="a/b:c", benchmark="own", samples=samples, row=row, limits=Limits(64, temperature=0.6)
    )
    log = read_eval_log(str(path))
    assert log.status == "success"
    assert log.eval.task == "own"
    assert [sample.scores["verdict"].value for sample in log.samples] == [0.0, 1.0]
    assert log.samples[1].scores["verdict"].explanation == "equal"
    assert [sample.epoch for sample in log.samples] == [1, 2]
    assert {name: metric.value for name, metric in log.results.scores[0].metrics.items()} == {
        "avg_at_k": 0.5,
        "pass_at_k": 1.0,
        "x": 1.0,
    }


def test_the_thought_stands_apart(tmp_path: Path) -> None:
    model = UpweightModel(str(tiny_checkpoint(tmp_path)))
    from upweight.app.engine import Piece

    choice = model._choice([Piece(1, -0.1, "<think>two plus</think>\nFive"), Piece(2, -0.1, "", "end")], logprobs=False)
    assert choice.message.text == "Five"
    assert choice.stop_reason == "stop"
    asyncio.run(model.aclose())
