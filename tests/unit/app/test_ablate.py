"""A claim over seeds: its figures can be computed again from the raw samples, and its section is put in place."""

import io
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from upweight.app.ablate import ablate, arms_of, outcome, put_section
from upweight.app.find import CLAIMS, find_recipe, recipe_names
from upweight.core.errors import UserError
from upweight.core.identity import plain
from upweight.core.records import Sample
from upweight.core.work import Machine
from upweight.store.artifact import LocalStore
from upweight.store.jsonl import write_jsonl

OWN = '''"""Large weights know more.

Nobody says so; it is a test."""

import random
from dataclasses import dataclass

import msgspec
from tiny_checkpoint import tiny_checkpoint

from upweight.app.recipe import Recipe, Step
from upweight.core.protocols import Limits
from upweight.core.records import Message, Problem
from upweight.core.work import Estimate
from upweight.stages import evaluate
from upweight.store.artifact import LocalStore
from upweight.store.jsonl import write_jsonl


class Ask:
    @dataclass(frozen=True)
    class Config:
        count: int

    @staticmethod
    def run(config, work):
        questions = [Problem(f"p{n}", (Message("user", f"{n}?"),), answer=str(n)) for n in range(config.count)]
        write_jsonl(work.out / "reserved_stem.jsonl", questions)
        return {}

    @staticmethod
    def estimate(config, inputs):
        return Estimate()


class Make:
    @dataclass(frozen=True)
    class Config:
        number: int

    @staticmethod
    def run(config, work):
        tiny_checkpoint(work.out, work.seed % 1000 + config.number)
        return {}

    @staticmethod
    def estimate(config, inputs):
        return Estimate(parameters=1000)


def recipe(seed: int = 0) -> Recipe:
    asked = Step("asked", Ask, Ask.Config(4))
    arms = {name: Step(name, Make, Make.Config(number)) for number, name in enumerate(("small", "large"))}
    config = evaluate.Config(
        problems={"stem": "reserved_stem.jsonl"},
        samples=3,
        limits=Limits(max_new_tokens=4),
        rewards={"stem": evaluate.RewardConfig(custom=Lottery())},
    )
    return Recipe("own", Step("table", evaluate, config, {"problems": asked, **arms}), seed=seed)
'''

LOTTERY = '''

from upweight.core.protocols import Verifier
from upweight.core.records import Verdict


@dataclass(frozen=True)
class Lottery(Verifier):
    """Scores by the tokens' sum, so that scores differ."""

    def score(self, problem, group):
        return [Verdict(float(sum(one.tokens) % 2), "") for one in group]
'''


def own_claim(folder: Path, name: str) -> str:
    path = folder / f"{name}.py"
    head, _, tail = OWN.partition("\n\nclass Ask")
    path.write_text(head + LOTTERY + "\n\nclass Ask" + tail)
    return str(path)


def test_figures_follow_from_the_raw_samples(tmp_path: Path) -> None:
    claim, page = own_claim(tmp_path, "large_weights"), tmp_path / "evidence.md"
    console = Console(file=io.StringIO(), width=140)
    given = {"seeds": [0, 1], "scale": None, "root": tmp_path / "runs", "machine": Machine(), "write": page}
    result = ablate(claim, **given, console=console)
    means: dict[str, list[float]] = {}
    by_problem: dict[str, list[dict[str, float]]] = {}
    for arm in ("small", "large"):
        for seed in (0, 1):
            path = tmp_path / "runs" / f"seed{seed}" / "own" / "table" / "samples" / f"{arm}.stem.jsonl"
            scores = defaultdict(list)
            for row in map(json.loads, path.read_text().splitlines()):
                scores[row["problem"]].append(row["score"])
            assert {len(found) for found in scores.values()} == {3}
            by_problem.setdefault(arm, []).append({name: fmean(found) for name, found in scores.items()})
            means.setdefault(arm, []).append(fmean(by_problem[arm][-1].values()))
    rows = {row["arm"]: row for row in result["arms"]}
    (difference,) = result["differences"]
    for arm in ("small", "large"):
        assert [run["mean"] for run in rows[arm]["by_seed"]] == pytest.approx(means[arm], abs=1e-6)
        assert rows[arm]["mean"] == pytest.approx(fmean(means[arm]), abs=1e-6)
    gaps = [large - small for small, large in zip(means["small"], means["large"], strict=True)]
    assert (difference["arm"], difference["against"]) == ("large", "small")
    assert difference["mean"] == pytest.approx(fmean(gaps), abs=1e-6)
    # two runs: t = 12.7062, SE = |a - b| / 2
    reach = 12.7062 * abs(gaps[0] - gaps[1]) / 2
    assert difference["high"] == pytest.approx(fmean(gaps) + reach, abs=1e-3)
    assert result == json.loads((tmp_path / "runs" / "large_weights.json").read_text())
    assert "Large weights know more." in page.read_text()
    first = page.read_text()
    again = ablate(claim, **given, console=console)
    assert {**again, "environment": 0} == {**result, "environment": 0}
    assert page.read_text() == first
    assert "table: complete, skipped" in console.file.getvalue()


def test_families_are_named_as_the_table_names_them(tmp_path: Path) -> None:
    recipe = find_recipe("sft_size", {"scale": 0.05}, CLAIMS)
    arms = arms_of(recipe, "sft_size")
    (tmp_path / "table.json").write_text(json.dumps({"rows": [{"checkpoint": "x", "family": "fullstack:zh"}]}))
    (tmp_path / "samples").mkdir()
    for place, arm in enumerate(arms):
        samples = [Sample("p", index, float(index < place), "", "end", 1, "", "", None) for index in range(2)]
        write_jsonl(tmp_path / "samples" / f"{arm}.fullstack:zh.jsonl", samples)

    class Store(LocalStore):
        def open(self, name: str) -> Path:
            return tmp_path

        def manifest(self, name: str) -> dict[str, Any]:
            return {"timings": {"processor_seconds": 1.0}}

    store = Store(tmp_path, "quickstart")
    found = outcome({0: recipe}, {0: store})
    assert [(row["family"], row["mean"]) for row in found["arms"]] == [("fullstack:zh", mean) for mean in (0, 0.5, 1)]


def test_sections_are_replaced_and_others_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("")
    put_section(page, "one", "## one\n\nfirst\n")
    put_section(page, "two", "## two\n\nsecond\n")
    put_section(page, "one", "## one\n\nthird\n")
    assert page.read_text() == "# Evidence\n\n## one\n\nthird\n\n## two\n\nsecond\n"


def test_what_is_no_comparison_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no_claim.py"
    path.write_text('"""Nothing."""\nfrom upweight.recipes.small import recipe\n')
    with pytest.raises(UserError, match="goal of a claim is a step of the stage evaluate"):
        ablate(str(path), seeds=[0], scale=None, root=tmp_path, machine=Machine())
    mute = Path(own_claim(tmp_path, "mute_claim"))
    mute.write_text(mute.read_text().partition('"""\n')[2])
    with pytest.raises(UserError, match="mute_claim has no docstring"):
        ablate(str(mute), seeds=[0], scale=None, root=tmp_path, machine=Machine())
    assert not (tmp_path / "seed0").exists()
    with pytest.raises(UserError, match="at least one seed"):
        ablate("difficulty_gate", seeds=[], scale=None, root=tmp_path, machine=Machine())
    with pytest.raises(UserError, match=r"there is no claim .difficulty_gates.: did you mean difficulty_gate"):
        ablate("difficulty_gates", seeds=[0], scale=None, root=tmp_path, machine=Machine())


@pytest.mark.parametrize("name", recipe_names(CLAIMS))
def test_every_claim_compares_arms_that_differ(name: str) -> None:
    options = {"annotated": "labels.jsonl"} if name.startswith("label_") else {"scale": 0.05}
    recipe = find_recipe(name, {**options, "seed": 3}, CLAIMS)
    identities = recipe.identities()
    arms = arms_of(recipe, name)
    goal = recipe.goals[-1]
    made = [goal.config.arms[arm] if step is goal else identities[step.name] for arm, step in arms.items()]
    assert len({json.dumps(plain(one), sort_keys=True) for one in made}) == len(arms) >= 2
