"""BFCL through the package's own checker: its reference answers are right, broken ones are wrong, in every category.

Skips without the package (pip install --no-deps bfcl-eval). tests/acceptance/benchmarks.py does the same for all cases.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion
from upweight.evals.benchmarks.bfcl import MULTI_TURN, Bfcl, NoCall, decoded, written
from upweight.evals.bfcl_package import callable_here
from upweight.evals.setting import Setting, open_named

PACKAGED = importlib.util.find_spec("bfcl_eval") is not None
packaged = pytest.mark.skipif(not PACKAGED, reason="needs bfcl-eval")


def completion(text: str, stop: str = "end") -> Completion:
    return Completion((), (), text, stop, "")


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[f(a=1, b="x"), g()]', [{"f": {"a": 1, "b": "x"}}, {"g": {}}]),
        ("<think>f(a=2)</think>f(a=-1.5, b=[1, {'k': None}])", [{"f": {"a": -1.5, "b": [1, {"k": None}]}}]),
        ("```python\n[m.f(a=x)]\n```", [{"m.f": {"a": "x"}}]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>', [{"f": {"a": [1]}}]),
        ("[f(from='a', to='from=b')]", [{"f": {"from": "a", "to": "from=b"}}]),
        ("[f(a=2 * 30, b=-1 / 4, c=[7 % 4], d=1 // 0)]", [{"f": {"a": 60, "b": -0.25, "c": [3], "d": "1 // 0"}}]),
    ],
)
def test_calls_are_read_in_both_forms(text: str, calls: list[dict[str, Any]]) -> None:
    assert decoded(text) == calls


@pytest.mark.parametrize(
    ("text", "given"),
    [
        (
            "[A.f(ids=new ArrayList<>(Arrays.asList(1, 2)), n=5L)]",
            {"ids": "new ArrayList<>(Arrays.asList(1, 2))", "n": "5L"},
        ),
        ('A.f(m=new HashMap<String, Integer>(), s="a, b=(");', {"m": "new HashMap<String, Integer>()", "s": "a, b=("}),
        ("[A.f(run=(x, y) => x == y, k='it\\'s', c='c')]", {"run": "(x, y) => x == y", "k": "it\\'s", "c": "c"}),
        ("A.f(a={1, 2}, b=[{1}], c=true, d='x')", {"a": "{1, 2}", "b": "[{1}]", "c": "true", "d": "x"}),
    ],
)
def test_values_of_java_and_javascript_are_read_as_they_are_written(text: str, given: dict[str, str]) -> None:
    assert decoded(text, texts_only=True) == [{"A.f": given}]


@pytest.mark.parametrize("text", ["A.f(n=5L", "A.f(new X())", "I would call A.f(n=5L)", "A.f(n=(5L]", "A.f(s='x)"])
def test_no_call_of_java(text: str) -> None:
    with pytest.raises(NoCall):
        decoded(text, texts_only=True)


@pytest.mark.parametrize(
    "text", ["I cannot do that.", "[1, 2]", "[f(a={[1]: x})]", "[f(**x)]", "<tool_call>{</tool_call>", "f(", "("]
)
def test_no_call(text: str) -> None:
    with pytest.raises(NoCall):
        decoded(text)


def test_what_is_executed_is_written_anew_from_literals() -> None:
    (call,) = decoded("[__import__('os').system(command=open('x').read(), n=1)]".replace("__import__('os').", "os."))
    assert written(call) == "system(command=\"open('x').read()\", n=1)"
    with pytest.raises(NoCall):
        decoded("[__import__('os').system('x')]")


def test_only_functions_of_the_services_are_called() -> None:
    entry = {"callable": frozenset({"cd", "ls"})}
    for text, allowed in (
        ("[cd(folder='a')]", True),
        ("[fs.ls()]", True),
        ("[exec('import os')]", False),
        ("[x.__init__()]", False),
        ("[cd.ls.eval('1')]", False),
    ):
        (call,) = decoded(text)
        assert callable_here(entry, written(call)) == allowed, text


@packaged
def test_a_model_cannot_run_python_through_the_services(tmp_path: Path) -> None:
    benchmark = open_named("bfcl", Setting(parts=("multi_turn_base",), samples=1))
    assert isinstance(benchmark, Bfcl)
    problem = benchmark.problems()[0]
    truth = benchmark.entries[problem.id]["ground_truth"]
    mark = tmp_path / "mark"
    hostile = f"[exec(\"open('{mark}', 'w')\")]"
    ((answer,),) = benchmark.ask(Reference([[hostile[1:-1]]] * len(truth)), [problem], Limits(100))
    assert hostile in json.loads(answer.text)[0]
    (verdict,) = benchmark.verifier.score(problem, [answer])
    assert verdict.score == 0
    assert not mark.exists()


def test_the_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upweight.evals.bfcl_package.package_directory", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps bfcl-eval"):
        open_named("bfcl", Setting(parts=("simple_python",)))
    with pytest.raises(UserError, match="no category 'memory'"):
        open_named("bfcl", Setting(parts=("memory",)))


def gold(entry: Mapping[str, Any]) -> str:
    """The first of the possible values of each argument, of optional ones those that are required."""

    def first(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: first(next(v for v in some if v != "")) for key, some in value.items() if "" not in some}
        return [first(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value

    calls = []
    for call in entry["ground_truth"]:
        ((name, possible),) = call.items()
        required = next(f["parameters"].get("required", []) for f in entry["function"] if f["name"] == name)
        given = {
            key: first(next((v for v in values if v != ""), ""))
            for key, values in possible.items()
            if "" not in values or key in required
        }
        calls.append(f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})")
    return f"[{', '.join(calls)}]"


@packaged
@pytest.mark.parametrize(
    "category",
    ["simple_python", "simple_javascript", "multiple", "parallel", "parallel_multiple", "live_simple", "live_parallel"],
)
def test_reference_answers_are_right_and_broken_ones_wrong(category: str) -> None:
    benchmark = open_named("bfcl", Setting(parts=(category,)))
    assert isinstance(benchmark, Bfcl)
    for problem in benchmark.problems()[::13]:
        right = gold(benchmark.entries[problem.id])
        broken = [right.replace("(", "_other(", 1), "[]", "I cannot do that.", right.replace("(", "(bogus=1, ", 1)]
        verdicts = benchmark.verifier.score(problem, [completion(text) for text in [right, *broken]])
        assert [verdict.score for verdict in verdicts] == [1, 0, 0, 0, 0], (problem.id, verdicts[0].reason)


@packaged
def test_relevance() -> None:
    benchmark = open_named("bfcl", Setting(parts=("irrelevance", "live_relevance")))
    by_category = {problem.source: problem for problem in benchmark.problems()}
    group = [completion("[f(a=1)]"), completion("None of them fits."), completion("[]"), completion("[f(", "length")]
    verdicts = benchmark.verifier.score(by_category["irrelevance"], group)
    assert [verdict.score for verdict in verdicts] == [0, 1, 1, 0]
    verdicts = benchmark.verifier.score(by_category["live_relevance"], group)
    assert [verdict.score for verdict in verdicts] == [1, 0, 0, 0]


class Reference(Sampler):
    """Plays the reference calls of a case, one step a turn, and says so when it has read their results."""

    def __init__(self, truth: Sequence[Sequence[str]], last: str = "done") -> None:
        self.truth, self.last = truth, last

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [[completion(self._reply(prompt))] * count for prompt in prompts]

    def _reply(self, prompt: Prompt) -> str:
        said = [message.content for message in prompt if message.role == "user"]
        read = [text for text in said if text.startswith("[{'role': 'tool'")]
        calls = self.truth[len(said) - len(read) - 1]
        return self.last if said[-1] in read or not calls else f"[{', '.join(calls)}]"


class Steps(Sampler):
    """Calls a function so many times in the last turn, and says so then."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        made = [sum(message.role == "assistant" for message in prompt) for prompt in prompts]
        return [[completion("[pwd()]" if calls < self.calls else "done")] * count for calls in made]


@packaged
@pytest.mark.parametrize(("calls", "whole"), [(19, True), (20, True), (21, False)])
def test_a_turn_of_twenty_calls_may_end(calls: int, whole: bool) -> None:
    benchmark = open_named("bfcl", Setting(parts=("multi_turn_base",), samples=1))
    assert isinstance(benchmark, Bfcl)
    problem = benchmark.problems()[0]
    entry = benchmark.entries[problem.id]
    entry["question"], entry["ground_truth"] = entry["question"][:1], entry["ground_truth"][:1]
    ((answer,),) = benchmark.ask(Steps(calls), [problem], Limits(100))
    assert json.loads(answer.text) == ([["[pwd()]"] * calls + ["done"]] if whole else [])


def test_a_file_is_not_passed_over() -> None:
    with pytest.raises(UserError, match="bfcl takes no file"):
        open_named("bfcl=cases.jsonl", Setting())
    with pytest.raises(UserError, match="reasoning_gym takes no file"):
        open_named("reasoning_gym=cases.jsonl", Setting())


@packaged
def test_turns_are_played_on_the_simulated_services() -> None:
    benchmark = open_named("bfcl", Setting(parts=MULTI_TURN, samples=2))
    assert isinstance(benchmark, Bfcl)
    for problem in benchmark.problems()[::160]:
        truth = benchmark.entries[problem.id]["ground_truth"]
        ((one, other),) = benchmark.ask(Reference(truth), [problem], Limits(100))
        assert one.text == other.text
        assert len(json.loads(one.text)) == len(truth)
        idle = completion(json.dumps([["done"]] * len(truth)))
        short = completion(json.dumps(json.loads(one.text)[:-1]))
        verdicts = benchmark.verifier.score(problem, [one, idle, short])
        assert [verdict.score for verdict in verdicts] == [1, 0, 0], (problem.id, verdicts)
    looping = Reference(truth, last=f"[{truth[0][0]}]")  # calls again and again, and is broken off
    ((broken, _),) = benchmark.ask(looping, [problem], Limits(100))
    (verdict,) = benchmark.verifier.score(problem, [broken])
    assert verdict.reason == f"wrong: broken off in turn 0 of {len(truth)}"
