"""Every number of the table can be computed again from the stored samples, and a killed measurement goes on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler, Verifier
from upweight.core.records import Completion, Problem, Sample, Verdict
from upweight.core.work import Silent
from upweight.evals.measure import by_problem, difference, measure, summary, table_row
from upweight.evals.problem_files import ProblemFile, kind_of, read_problems
from upweight.store.jsonl import read_jsonl
from upweight.verify.answers import AnswerVerifier
from upweight.verify.choices import ChoiceVerifier


class Scripted(Sampler):
    """Says the number of the sample; every third is cut off."""

    def __init__(self, fail_after: int = 1000) -> None:
        self.calls, self.fail_after = 0, fail_after

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        return [
            [
                Completion((1,) * (i + 1), (), str(i), "length" if i % 3 == 2 else "end", "scripted")
                for i in range(count)
            ]
            for _ in prompts
        ]


class Equal(Verifier):
    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(float(completion.text == problem.answer), "compared") for completion in group]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    # of samples "0", "1", "2", "3" one is right for answers below 4, none for 9
    rows = [{"id": f"p{i}", "question": f"say {i}", "answer": answer} for i, answer in enumerate([0, 1, 9, 3, 9])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(path: Path, problems: Path, sampler: Sampler, block: int = 2) -> list[Sample]:
    benchmark = ProblemFile("numbers", problems, Equal(), samples=4)
    return measure(
        sampler, benchmark, path, limits=Limits(8), monitor=Silent(), label="numbers", problems_a_block=block
    )


def test_measured(tmp_path: Path, problems: Path) -> None:
    path = tmp_path / "samples" / "model.jsonl"
    samples = measured(path, problems, Scripted())
    assert read_jsonl(path, Sample) == samples
    assert len(samples) == 5 * 4
    row = summary(samples)
    # three problems have 1 right of 4, two have none: (3 * 0.25) / 5 = 0.15
    assert row["mean"] == 0.15
    # pass@4: three of five problems
    assert row["pass_at_k"] == 0.6
    # the third of each four samples is cut off; lengths 1, 2, 3, 4
    assert row["truncated_share"] == 0.25
    assert row["mean_tokens"] == 2.5
    assert row["low"] < 0.15 < row["high"]
    assert sum(map(sum, by_problem(samples).values())) / 20 == 0.15


def test_problems_of_one_id_are_refused(tmp_path: Path, problems: Path) -> None:
    benchmark = ProblemFile("numbers", problems, Equal(), samples=4)
    twice = [replace(problem, id="p") for problem in benchmark.problems()]
    given = {"limits": Limits(8), "monitor": Silent(), "label": "numbers", "problems": twice}
    with pytest.raises(UserError, match="5 problems of the id 'p'"):
        measure(Scripted(), benchmark, tmp_path / "s.jsonl", **given)


def test_what_is_complete_is_not_sampled_again(tmp_path: Path, problems: Path) -> None:
    first = measured(tmp_path / "s.jsonl", problems, Scripted())
    assert measured(tmp_path / "s.jsonl", problems, Scripted(fail_after=0)) == first


def test_after_a_kill_whole_blocks_are_kept(tmp_path: Path, problems: Path) -> None:
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measured(path, problems, Scripted(fail_after=1))
    assert not path.exists()
    with (tmp_path / ".s.jsonl.begun").open("a") as file:
        file.write('{"problem": "p2", "ind')  # a line that the kill cut short
    sampler = Scripted()
    assert measured(path, problems, sampler) == measured(tmp_path / "other.jsonl", problems, Scripted())
    assert sampler.calls == 2  # five problems in blocks of two are three blocks, one was done
    assert not (tmp_path / ".s.jsonl.begun").exists()


def test_a_difference_is_paired(tmp_path: Path, problems: Path) -> None:
    samples = measured(tmp_path / "s.jsonl", problems, Scripted())
    better = [Sample(**{name: getattr(s, name) for name in s.__slots__} | {"score": 1.0}) for s in samples]
    # every problem gains: three gain 0.75 and two gain 1, (3 * 0.75 + 2) / 5 = 0.85
    row = difference(samples, better)
    assert row["mean"] == 0.85
    assert row["significant"]
    with pytest.raises(UserError, match="same problems"):
        difference(samples, better[4:])


def test_problems_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "2 + 3?", "answer": 5}\n{"question": "1?", "answer": "1", "source": "mine"}\n')
    found = read_problems(path)
    assert [problem.answer for problem in found] == ["5", "1"]
    assert found[0].messages[0].content == "2 + 3?"
    assert kind_of(found, path) == "answer"
    path.write_text('{"question": "add", "tests": "assert add(1, 2) == 3"}\n')
    assert kind_of(read_problems(path), path) == "code"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"question": "x"}', "neither an answer nor tests"),
        ('{"answer": "x"}', "has no question"),
        ('{"question": "x", "anwser": "1"}', r"unknown fields \['anwser'\]"),
        ('{"question": "x", "tests": [1]}', "list of Python sources"),
        ('{"id": "a", "messages": [{"role": "robot", "content": "x"}], "answer": "1"}', "robot"),
        ('{"id": "p", "question": "x", "answer": "1"}\n{"id": "p", "question": "y", "answer": "1"}', "taken"),
        ("", "holds no problem"),
    ],
)
def test_bad_problems_are_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=told):
        read_problems(path)


def test_answers_and_tests_do_not_mix_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "x", "answer": "1"}\n{"question": "y", "tests": ["assert f()"]}\n')
    with pytest.raises(UserError, match="mixes problems judged in several ways"):
        kind_of(read_problems(path), path)


def test_in_votes_equal_answers_are_one_and_what_was_cut_off_has_none(tmp_path: Path) -> None:
    texts = {
        "p": [("\\boxed{0.5}", 1.0, "end"), ("\\boxed{3}", 0.0, "end"), ("The answer is 1/2.", 1.0, "end")],
        "q": [("\\boxed{8}", 0.0, "end"), ("\\boxed{8}", 0.0, "length"), ("\\boxed{7}", 1.0, "end")],
    }
    samples = [
        Sample(problem, index, score, "", stop, 1, text, "", None)
        for problem, group in texts.items()
        for index, (text, score, stop) in enumerate(group)
    ]
    numbers = ProblemFile("numbers", tmp_path, AnswerVerifier(), samples=3)
    assert table_row(numbers, samples)["maj_at_k"] == 0.75  # 1/2 has two of three votes; 7 and 8 share theirs
    programs = ProblemFile("programs", tmp_path, Equal(), samples=3)
    assert table_row(programs, samples)["maj_at_k"] is None
    assert "maj_at_k" not in table_row(numbers, [sample for sample in samples if not sample.index])
    assert AnswerVerifier().answer_of("\\boxed{18 \\text{ eggs}}") == AnswerVerifier().answer_of("\\boxed{18}")
    assert ChoiceVerifier().answer_of("So it is (b).\nAnswer: (b) 10 m") == "B"
    assert AnswerVerifier().answer_of("\\boxed{\\frac{2}{4}}") == AnswerVerifier().answer_of("#### 0.50") == "1/2"
