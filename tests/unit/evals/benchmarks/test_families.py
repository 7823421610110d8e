"""Each benchmark reads its published format, and judges a right and a wrong answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import REPORTED, Benchmark
from upweight.core.records import Completion, Problem, Sample
from upweight.evals.setting import Setting, open_named
from upweight.verify.choices import chosen_letter


def opened(folder: Path, name: str, rows: list[dict[str, Any]], **given: Any) -> Benchmark:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_named(name, Setting(data=path, **given))


def scores(benchmark: Benchmark, problem: Problem, *texts: str) -> list[float]:
    group = [Completion((), (), text, "end", "") for text in texts]
    return [verdict.score for verdict in benchmark.verifier.score(problem, group)]


@pytest.mark.parametrize(
    ("name", "row", "answer", "k"),
    [
        ("aime2024", {"id": 60, "problem": "Find n.", "answer": "204"}, "204", 8),
        ("aime2025", {"problem": "Find n.", "answer": "070", "id": "0"}, "70", 8),
        ("aime2025", {"question": "Find the angle.", "answer": "336^\\circ"}, "336", 8),
        ("math500", {"problem": "x?", "answer": "\\frac{1}{2}", "level": 3, "unique_id": "a/1"}, "\\frac{1}{2}", 3),
        ("gsm8k", {"question": "How many?", "answer": "3 * 400 = 1200\n#### 1,200"}, "1200", 3),
    ],
)
def test_mathematics(tmp_path: Path, name: str, row: dict[str, Any], answer: str, k: int) -> None:
    benchmark = opened(tmp_path, name, [row])
    (problem,) = benchmark.problems()
    assert problem.answer == answer
    assert problem.messages[-1].content.endswith("put your final answer within \\boxed{}.")
    assert (benchmark.samples, benchmark.limits) == (k, REPORTED)
    assert scores(benchmark, problem, f"<think>7</think>So \\boxed{{{answer}}}", "\\boxed{7}", "") == [1, 0, 0]


GPQA = {
    "Record ID": "rec1",
    "Question": "Which?",
    "Correct Answer": "right",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "High-level domain": "Physics",
}


def test_gpqa_shuffles_by_seed_and_id(tmp_path: Path) -> None:
    rows = [{**GPQA, "Record ID": f"rec{i}"} for i in range(40)]
    found = opened(tmp_path, "gpqa", rows).problems()
    assert found == opened(tmp_path, "gpqa", rows).problems()
    assert found != opened(tmp_path, "gpqa", rows, seed=1).problems()
    assert {problem.answer for problem in found} == set("ABCD")
    for problem in found:
        assert f"({problem.answer}) right" in problem.messages[-1].content
    benchmark = opened(tmp_path, "gpqa", rows[:1])
    (problem,) = benchmark.problems()
    right = str(problem.answer)
    wrong = "A" if right != "A" else "B"
    texts = [f"\\boxed{{{right}}}", f"The answer is ({right}) right", f"\\boxed{{\\text{{{wrong}}}}}", "\\boxed{right}"]
    assert scores(benchmark, problem, *texts) == [1, 1, 0, 0]


def test_a_letter_is_told_from_a_word() -> None:
    for answer, letter in (
        ("B", "B"),
        ("b", "B"),
        ("(b) 10 m", "B"),
        ("B because of it", "B"),
        ("option b since it fits", "B"),
        ("a mixture of both", None),
        ("a 10 m rope", None),
        ("\\text{C) 10 m}", "C"),
        ("Both", None),
    ):
        assert chosen_letter(answer) == letter, answer


def test_supergpqa(tmp_path: Path) -> None:
    row = {
        "uuid": "u1",
        "question": "Which?",
        "options": [f"option {i}" for i in range(10)],
        "answer": "option 9",
        "answer_letter": "J",
        "discipline": "Law",
    }
    benchmark = opened(tmp_path, "supergpqa", [row])
    (problem,) = benchmark.problems()
    assert "(J) option 9" in problem.messages[-1].content
    assert scores(benchmark, problem, "\\boxed{J}", "\\boxed{A}") == [1, 0]
    with pytest.raises(UserError, match="row 1 is not as"):
        opened(tmp_path, "supergpqa", [{**row, "answer_letter": "A"}]).problems()


HUMANEVAL = {
    "task_id": "T/0",
    "prompt": 'import math\n\n\ndef twice(x):\n    """ Twice the floor of x.\n    >>> twice(2.5)\n    4\n    """\n',
    "canonical_solution": "    return 2 * math.floor(x)\n",
    "test": "def check(candidate):\n    assert candidate(2.5) == 4\n    assert candidate(1) == 2\n",
    "entry_point": "twice",
}


def test_humaneval_takes_functions_and_bodies(tmp_path: Path) -> None:
    benchmark = opened(tmp_path, "humaneval", [HUMANEVAL])
    (problem,) = benchmark.problems()
    whole = HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    bare = "```python\ndef twice(x):\n    return 2 * math.floor(x)\n```"  # its import stands in the prompt
    stub = "def twice(x):\n    pass\n"
    shown = f"{bare}\nFor example:\n```python\nprint(twice(2.5))\n```\nprints\n```\n4\n```"
    texts = [whole, f"Here:\n```python\n{whole}```", HUMANEVAL["canonical_solution"], bare, shown, stub, "    pass\n"]
    assert scores(benchmark, problem, *texts) == [1, 1, 1, 1, 1, 0, 0]


def test_mbpp_reads_both_splits(tmp_path: Path) -> None:
    sanitized = {
        "task_id": 1,
        "prompt": "Write a function to add.",
        "test_imports": ["import math"],
        "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"],
    }
    full = {"task_id": 2, "text": "Add.", "test_setup_code": "", "test_list": ["assert add(1, 2) == 3"]}
    benchmark = opened(tmp_path, "mbpp", [sanitized, full])
    first, second = benchmark.problems()
    assert "assert add(1, 2) == 3" in first.messages[-1].content
    right, wrong = "```python\ndef add(a, b):\n    return a + b\n```", "```python\ndef add(a, b):\n    return 3\n```"
    shown = f"{right}\nFor example:\n```python\nprint(add(1, 2))\n```"
    assert scores(benchmark, first, right, wrong, shown) == [1, 0, 1]
    assert scores(benchmark, second, right, "def add(a, b):\n    return 0") == [1, 0]


def fullstack_row(number: int, code: str, **changed: Any) -> dict[str, Any]:
    labels = {"programming_language": "python", "execution_language": "python", "category": "Basic Programming"}
    row = {"id": number, "content": "Write add.", "canonical_solution": "", "labels": labels}
    return {**row, "test": {"code": code, "asset": None}, **changed}


def test_fullstack_asks_what_runs_here(tmp_path: Path) -> None:
    rows = [
        fullstack_row(1, "def test():\n    assert add(1, 2) == 3\n\ntest()\n"),
        fullstack_row(2, "#<INSERT>\nassert add(1, 2) == 3\n"),
        fullstack_row(3, "import numpy\nassert add(1, 2) == 3\n"),
        fullstack_row(4, "x", labels=json.dumps({"programming_language": "rust", "execution_language": "rust"})),
        fullstack_row(5, "assert open('a/n.txt').read() == str(add(1, 2))\n", test=json.dumps(
            {"code": "assert open('a/n.txt').read() == str(add(1, 2))\n", "asset": json.dumps({"a/n.txt": "Mw=="})})),
    ]  # fmt: skip
    benchmark = opened(tmp_path, "fullstack", rows)
    problems = benchmark.problems()
    assert [problem.id for problem in problems] == ["fullstack-1", "fullstack-2", "fullstack-5"]
    right = "```python\ndef add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    raise SystemExit(1)\n```"
    wrong, quits = "```python\ndef add(a, b):\n    return 0\n```", "```python\nimport os\nos._exit(0)\n```"
    for problem in problems:
        assert scores(benchmark, problem, right.partition("\n\nif")[0] + "\n```", wrong, quits) == [1, 0, 0], problem.id
    assert scores(benchmark, problems[0], right) == [1]  # what runs as a script is no part of it
    assert scores(benchmark, problems[0], f"{right}\n```python\nprint(add(1, 2))\n```") == [1]
    sample = Sample("fullstack-1", 0, 1.0, "", "end", 1, "", "", None)
    assert benchmark.figures([sample]) == {"share of the questions asked": 0.6}
    with pytest.raises(UserError, match="parts en and zh"):
        open_named("fullstack", Setting(parts=("de",)))


def test_ifeval_by_prompt_and_by_instruction(tmp_path: Path) -> None:
    row = {
        "key": 1000,
        "prompt": "Say hello without commas, in lower case.",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{"num_words": None}, {}],
    }
    benchmark = opened(tmp_path, "ifeval", [row])
    (problem,) = benchmark.problems()
    texts = ["<think>A, B</think>hello", "Hello", "Hello, you"]
    group = [Completion((), (), text, "end", "") for text in texts]
    verdicts = benchmark.verifier.score(problem, group)
    assert [verdict.score for verdict in verdicts] == [1, 0, 0]
    samples = [Sample(problem.id, i, v.score, v.reason, "end", 1, "", "", None) for i, v in enumerate(verdicts)]
    # 2 of 2, 1 of 2 and 0 of 2 instructions
    assert benchmark.figures(samples) == {"instructions followed": 0.5}
