"""The command line as a person meets it: help, errors of one paragraph, exit codes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.app.tiny_checkpoint import tiny_checkpoint

from upweight import cli

SMALL = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent / "app")!r})
from small_stages import Count, Total
from upweight.app.recipe import Recipe, Step

def recipe(scale: float = 1.0, seed: int = 0) -> Recipe:
    numbers = Step("numbers", Count, Count.Config(to=round(10 * scale)))
    return Recipe("small", Step("total", Total, Total.Config(), {{"numbers": numbers}}), seed=seed)
"""


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def upweight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in this process, in a directory of its own: starting Python anew each time would take minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["upweight", *arguments])
        sys.modules.pop("small_recipe", None)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Result(code, out, err)

    yield call
    sys.modules.pop("small_recipe", None)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small_recipe.py").write_text(SMALL)
    return tmp_path


def told(result: Result, code: int) -> str:
    """The one paragraph on stderr."""
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("upweight: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


VERBS = ["run", "plan", "show", "report", "eval", "ablate", "distill", "compare", "chat", "serve", "new", "annotate"]


@pytest.mark.parametrize("verb", [*VERBS, "tagger train", "tagger score"])
def test_every_verb_explains_itself(upweight, verb: str) -> None:
    result = upweight(*verb.split(), "--help")
    assert result.returncode == 0
    assert f"usage: upweight {verb}" in result.stdout


def test_no_verb_is_left_out(upweight) -> None:
    listed = re.search(r"\{([a-z,]+)\}", upweight("--help").stdout)
    assert listed is not None
    assert set(listed[1].split(",")) == {*VERBS, "tagger"}


def test_help_names_every_verb(upweight) -> None:
    result = upweight("--help")
    assert result.returncode == 0
    for verb in ("run", "plan", "show", "report", "eval", "chat", "serve", "new", "tagger"):
        assert f"• {verb} " in result.stdout


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = "import sys, upweight.cli; assert not {'torch', 'rich.progress', 'bokeh', 'fastapi'} & set(sys.modules)"
    before = os.times()
    subprocess.run([sys.executable, "-c", heavy], check=True)
    after = os.times()
    # 0.3 s on a free core; processor time, because tests share the machine, and room for a slower one
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(upweight, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    upweight("--help")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    upweight("--help")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_run_from_its_plan_to_its_end(upweight, small: Path) -> None:
    assert "total" in upweight("plan", "small_recipe.py").stdout
    assert "build     numbers" in upweight("run", "small_recipe.py", "--dry-run").stdout
    assert not (small / "runs").exists()
    first = upweight("run", "small_recipe.py")
    assert first.returncode == 0, first.stderr
    # 0 + 1 + ... + 9 = 45
    assert (small / "runs/small/total/total.txt").read_text() == "45.0\n"
    assert upweight("run", "small_recipe.py").stdout.count("skipped") == 2
    shown = upweight("show", "small_recipe.py").stdout
    assert shown.partition("no checkpoint")[0].count(" complete ") == 2
    changed = told(upweight("run", "small_recipe.py", "--scale", "2"), 3)
    assert "config.to was 10, now 20" in changed
    rebuilt = upweight("run", "small_recipe.py", "--scale", "2", "--rebuild", "numbers")
    assert rebuilt.returncode == 0
    # 0 + ... + 19 = 190
    assert (small / "runs/small/total/total.txt").read_text() == "190.0\n"


def test_errors_are_one_paragraph(upweight, small: Path) -> None:
    assert "did you mean quickstart?" in told(upweight("run", "quikstart"), 2)
    assert "no step 'totl': did you mean total?" in told(upweight("run", "small_recipe.py", "--until", "totl"), 2)
    assert "--device cpu" in told(upweight("run", "small_recipe.py", "--device", "cuda"), 2)
    (small / "runs").write_text("a file")
    assert "runs" in told(upweight("run", "small_recipe.py"), 2)


def test_the_report_is_written_where_it_is_asked_for(upweight, small: Path) -> None:
    assert upweight("run", "small_recipe.py").returncode == 0
    assert upweight("report", "small_recipe.py", "--out", "pages/of/mine.html").returncode == 0
    assert "<h1>small</h1>" in (small / "pages/of/mine.html").read_text()
    assert "pages/report.html" in told(upweight("report", "small_recipe.py", "--out", "pages"), 2)


def test_a_machine_to_plan_for_is_named(upweight, small: Path) -> None:
    for flags in (["--gpus", "8"], ["--gpu-price", "2.5"], ["--attained", "0.2"]):
        assert "name its GPU with --gpu" in told(upweight("plan", "small_recipe.py", *flags), 2)
    given = ["--gpu", "H100", "--price-per-hour", "3"]
    assert "say --gpu-price" in told(upweight("plan", "small_recipe.py", *given), 2)
    assert "attained is 0.0" in told(upweight("plan", "small_recipe.py", "--gpu", "H100", "--attained", "0"), 2)
    printed = upweight("plan", "small_recipe.py", "--gpu", "H100", "--gpu-price", "2.5").stdout
    assert "0 GPU-hours" not in printed.replace("\n", " ").split()
    assert "about 0 at" not in printed


def test_what_was_built_from_other_settings_can_be_rebuilt_as_the_error_says(upweight, small: Path) -> None:
    pairs = [{"prompt": f"{n} + 3?", "chosen": str(n + 3), "rejected": str(n + 4)} for n in range(8)]
    (small / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tiny_checkpoint(small)
    command = ["distill", "model", "--pairs", "pairs.jsonl", "--pairs-a-step", "4", "--threads", "1"]
    assert upweight(*command).returncode == 0
    assert "--rebuild distilled" in told(upweight(*command, "--beta", "0.2"), 3)
    assert upweight(*command, "--beta", "0.2", "--rebuild", "distilled").returncode == 0


def test_a_model_that_is_not_there(upweight, small: Path) -> None:
    assert "is no model directory" in told(upweight("chat", "nothing"), 2)
    missing = upweight("eval", "small_recipe.py", "--on", "none.jsonl")
    assert "no complete checkpoint yet" in told(missing, 2)


def test_the_tagger_scores_files(upweight, small: Path) -> None:
    (small / "a.txt").write_text("A lemma is a small theorem. We prove it by induction on the number of steps.\n" * 5)
    (small / "b.txt").write_bytes(b"caf\xe9")
    result = upweight("tagger", "score", "a.txt")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)["scores"]
    assert len(scores) == 20
    assert all(0 <= score <= 9 for score in scores.values())
    assert "b.txt is not UTF-8 (byte 3)" in told(upweight("tagger", "score", "b.txt"), 2)
