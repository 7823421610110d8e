"""Problems of reasoning-gym and its verifiers, some of which are wrong: they raise, hang, pay for junk, run answers.

A stand-in package with such families is put in the place of the real one, which the last test asks for.
"""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upweight.core.errors import IsolationUnavailable, UserError
from upweight.core.records import Completion, Problem, Verdict
from upweight.core.work import Work
from upweight.evals.problem_files import kind_of, read_problems
from upweight.stages import collect
from upweight.store.jsonl import read_jsonl
from upweight.synthesize.checking import open_checks
from upweight.verify import gym
from upweight.verify.gym import Gym, GymVerifier, answer_of, draw

STAND_IN = """
import math
import time


class Family:
    def __init__(self, seed, size, first=0):
        self.seed, self.first = seed, first

    def __getitem__(self, index):
        number = self.seed + self.first + index % 20  # repeats itself after twenty
        return {"question": f"{number} + 1?", "answer": str(number + 1), "metadata": {"pair": (number, 1)}}

    def score_answer(self, answer, entry):
        number, more = entry["metadata"]["pair"]
        assert isinstance(entry["metadata"]["pair"], tuple)  # JSON alone would make it a list
        return 1.0 if answer == str(number + more) else 0.1


class Raises(Family):
    def score_answer(self, answer, entry):
        return float(int(answer) == int(entry["answer"]))


class Pays(Family):
    def score_answer(self, answer, entry):
        return float(bool(answer) == bool(entry["answer"]))


class Prefixes(Family):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "answer": f"0.{index + 1}"}

    def score_answer(self, answer, entry):
        return float(entry["answer"].startswith(answer))


class Near(Family):
    def score_answer(self, answer, entry):
        return min(1.0, math.exp(-abs(float(answer) - int(entry["answer"]))))


class Zeros(Family):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "answer": ("0", "00", "7")[index % 3]}

    def score_answer(self, answer, entry):
        return float(answer.isdigit() and int(answer) == int(entry["answer"]))


class Any(Family):
    def score_answer(self, answer, entry):
        return float(len(answer) == 2)


class Wrong(Family):
    def score_answer(self, answer, entry):
        return 0.5 if answer == entry["answer"] else 0.0


class Hangs(Family):
    def score_answer(self, answer, entry):
        while answer == "hang":
            pass
        return float(answer == entry["answer"])


class Odd(Family):
    def score_answer(self, answer, entry):
        return {"nan": float("nan"), "none": None, "high": 7.0}.get(answer, float(answer == entry["answer"]))


class Runs(Family):
    def score_answer(self, answer, entry):
        try:
            return 1.0 if eval(answer) == int(entry["answer"]) else 0.0
        except SyntaxError:
            return 0.0


FAMILIES = {
    "sums": Family, "raises": Raises, "pays": Pays, "wrong": Wrong, "hangs": Hangs, "odd": Odd, "runs": Runs,
    "prefixes": Prefixes, "near": Near, "zeros": Zeros, "any": Any,
    "countdown": Runs,
}
DATASETS = FAMILIES


def create_dataset(name, **settings):
    return FAMILIES[name](**settings)
"""


@pytest.fixture(scope="module", autouse=True)
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    package = tmp_path_factory.mktemp("packages") / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "factory.py").write_text(STAND_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package.parent))
        patch.setattr(gym, "_started", {})
        yield package.parent
        for workers in gym._started.values():
            workers.close()


def problem_of(family: str, index: int = 0) -> Problem:
    problem = draw(Gym({family: {}}, count=40, seed=2), family, index).problem
    assert problem is not None
    return problem


def judged(problem: Problem, *answers: str, **options: float | bool) -> list[Verdict]:
    group = [Completion((1,), (), f"so <answer>{answer}</answer>", "end", "p") for answer in answers]
    return GymVerifier(**options).score(problem, group)


def test_a_problem_carries_what_its_verifier_needs() -> None:
    problem = problem_of("sums")
    # seed 2, index 0: 2 + 1
    assert problem.messages[-1].content.startswith("2 + 1?\n\n")
    assert "<answer>" in problem.messages[-1].content
    assert (problem.answer, problem.source) == ("3", "sums")
    right, wrong = judged(problem, "3", "4")
    assert (right.score, right.reason) == (1.0, "equal")
    assert (wrong.score, wrong.reason) == (0.0, "different: got 4, 0.10 of its family's marks")
    assert judged(problem, "4", partial=True)[0].score == 0.1
    shifted = draw(Gym({"sums": {"first": 40}}, count=1), "sums", 0).problem
    assert shifted is not None
    assert shifted.answer == "41"


def test_where_the_answer_stands() -> None:
    assert answer_of("<think>9 <answer>8</answer></think> <answer>7</answer>") == "7"
    assert answer_of("<answer>1</answer> no: <answer> 2\n3 </answer>") == "2\n3"
    assert answer_of("The answer is 5.") == "5"
    assert answer_of("<answer></answer> The answer is 5.") is None
    assert answer_of("<think>7") is None
    cut = Completion((1,), (), "<answer>3</answer>", "length", "p")
    assert GymVerifier().score(problem_of("sums"), [cut])[0] == Verdict(0.0, "truncated")


def test_a_verifier_that_raises_gives_nothing_and_says_so() -> None:
    problem = draw(Gym({"raises": {}}, count=1), "raises", 0).problem
    assert problem is not None  # that it raises on words is no flaw: it pays nothing for them
    wrong, right = judged(problem, "one", "1")
    assert wrong.score == 0
    assert wrong.reason.startswith("verifier failed: ValueError: invalid literal")
    assert right.score == 1


def test_verdicts_that_are_no_numbers_or_out_of_range() -> None:
    nothing, none, high = judged(problem_of("odd"), "nan", "none", "high")
    assert nothing.score == none.score == 0
    assert nothing.reason.startswith("verifier failed: nan")
    assert none.reason.startswith("verifier failed: TypeError")
    assert high.score == 1


def test_a_verifier_that_hangs_is_ended() -> None:
    problem = problem_of("hangs")
    before = time.monotonic()
    hangs, right = judged(problem, "hang", "3", cpu_seconds=0.5)
    assert hangs == Verdict(0.0, "timed out: got hang")
    assert right.score == 1  # a new worker answers the next
    assert time.monotonic() - before < 60


def test_an_answer_that_a_verifier_runs_reaches_nothing(tmp_path: Path) -> None:
    problem = problem_of("runs")
    left = tmp_path / "left"
    verdicts = judged(
        problem,
        f"__import__('pathlib').Path({str(left)!r}).write_text('x') and 0",
        "__import__('os').listdir('/proc')",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "__import__('os').kill(1, 9) or 3",
        "2 + 1",
    )
    assert not left.exists()
    assert "Read-only file system" in verdicts[0].reason
    assert verdicts[1].score == verdicts[2].score == 0
    assert "Operation not permitted" in verdicts[2].reason
    assert verdicts[4].score == 1


def test_an_answer_that_a_verifier_runs_reaches_no_socket_that_lies_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as host:
        host.bind(str(path))
        host.listen(1)
        made = "__import__('socket').socket(1)"
        (verdict,) = judged(problem_of("runs"), f"[s.connect({str(path)!r}) for s in [{made}]] and 3")
        assert "Operation not permitted" in verdict.reason


@pytest.mark.parametrize(
    "answer",
    [
        *("__import__('os')", "(1).real", "S('\\x5f')", "print('1')", "f([x for x in (1,)])", "(lambda: 3)()"),
        *("eval(chr(49) + chr(49))", "(exec)(2)", "Integral(x, x)", "expand((x + 1)**2)", "\uff45val(1)", "x2(3)"),
    ],
)
def test_what_could_forge_a_verdict_is_not_evaluated(answer: str) -> None:
    assert judged(problem_of("countdown"), answer)[0].reason.startswith("refused")
    assert judged(problem_of("countdown"), "(4 - 2) * 1.5")[0].score == 1
    for harmless in ("x*(sin(2*x) + log(Abs(x)))/2 + C", "_ _ Q _\nQ _ _ _", "[['Q', '_'], ['_', 'Q']]"):
        assert not gym._reaches_python(harmless)


def test_long_answers_cost_no_time() -> None:
    before = time.process_time()
    assert answer_of("<answer>" * 12_000) is None
    assert answer_of("</answer>" * 12_000 + "<answer>" * 12_000 + "7</answer>") == "7"
    assert not gym._reaches_python("1 + " * 25_000)
    assert time.process_time() - before < 0.5


def test_families_with_broken_verifiers_are_refused(tmp_path: Path) -> None:
    def collected(*families: str) -> Path:
        out = tmp_path / "-".join(families)
        out.mkdir()
        collect.run(collect.Config({"gym": Gym({family: {} for family in families}, count=25)}, 0.3), Work(out, {}))
        return out

    with pytest.raises(UserError, match=r"no problem of reasoning-gym's pays is sound: .*'I do not know' is accepted"):
        collected("sums", "pays")
    with pytest.raises(UserError, match="its own answer is not accepted"):
        collected("wrong")
    flaws = {
        "prefixes": "'0' is accepted",
        "near": "'nan' is accepted",
        "any": "the answer of another problem is accepted",
    }
    for family, flaw in flaws.items():
        assert draw(Gym({family: {"first": 21}}, count=4), family, 1).flaw == flaw
    # a right answer is no junk, however it is written
    zeros = Gym({"zeros": {}}, count=3)
    assert [draw(zeros, "zeros", index).flaw for index in range(3)] == [None, None, None]
    with pytest.raises(UserError, match="has no family 'none'"):
        collected("none")
    with pytest.raises(UserError, match=r"cannot make 'sums' with the settings .*unexpected keyword argument 'wide'"):
        draw(Gym({"sums": {"wide": 1}}), "sums", 0)


def test_collected_problems_are_split_and_judged_by_their_kind(tmp_path: Path) -> None:
    source = Gym({"sums": {"first": 100}, "raises": {}}, count=25)
    summary = collect.run(collect.Config({"gym": source}, reserved_share=0.3), Work(tmp_path, {}))["gym"]
    # twenty different problems of each family in twenty-five draws
    assert summary["families"] == {"sums": 20, "raises": 20}
    assert summary["dropped"] == {"sums: repeated": 5, "raises: repeated": 5}
    assert summary["kind"] == "gym"
    kept, held = (read_jsonl(tmp_path / f"{part}gym.jsonl", Problem) for part in ("", "reserved_"))
    assert len(kept) == summary["training"]
    assert len(kept) + len(held) == 40
    for start in range(len(kept) - 5):  # the families take turns
        assert {problem.source for problem in kept[start : start + 5]} == {"sums", "raises"}
    assert not (tmp_path / "blocks").exists() or not list((tmp_path / "blocks").iterdir())
    path = tmp_path / "reserved_gym.jsonl"
    problems = read_problems(path)
    assert kind_of(problems, path) == "gym"
    with open_checks([*problems, Problem("p", problems[0].messages, answer="1")], Work(tmp_path, {}).machine) as checks:
        for problem in problems[:3]:
            right = Completion((1,), (), f"<answer>{problem.answer}</answer>", "end", "p")
            assert [verdict.score for verdict in checks.score(problem, [right])] == [1.0]


def test_where_no_name_spaces_are_granted_it_is_refused_or_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in: Path
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(gym, "bubblewrap", lambda: str(refusing))
    monkeypatch.setattr(gym, "_started", {})
    with pytest.raises(IsolationUnavailable, match="No permissions to create"):
        draw(Gym({"sums": {}}), "sums", 0)
    with pytest.warns(RuntimeWarning, match="WITHOUT isolation"):
        drawn = draw(Gym({"sums": {}}), "sums", 0, unsafe=True)
    gym._started[True].close()
    assert drawn.problem is not None


def test_without_the_package_its_name_is_told(monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> None:
    monkeypatch.setattr(gym, "_started", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'upweight\[gym\]'"):
        draw(Gym({"sums": {}}), "sums", 0)


def test_the_real_package(monkeypatch: pytest.MonkeyPatch, stand_in: Path) -> None:
    import sys

    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(stand_in)])
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    import importlib.util

    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    monkeypatch.setattr(gym, "_started", {})
    problem = draw(Gym({"prime_factorization": {"max_value": 50}}, count=4), "prime_factorization", 1).problem
    assert problem is not None
    assert json.loads(problem.check or "")["family"] == "prime_factorization"
    right, wrong, other = judged(problem, problem.answer or "", "no number", "1")
    assert right.score == 1
    assert wrong.reason.startswith("verifier failed: ValueError")
    assert other.score == 0
    source = Gym({"game_of_life_halting": {}}, count=4)
    assert {draw(source, "game_of_life_halting", index).flaw for index in range(2)} == {"'I do not know' is accepted"}
    gym._started[False].close()
