"""ArenaHard: both orders are judged, and a win that only form explains vanishes at equal form."""

import json
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Completion, Sample
from upweight.evals.setting import Setting, open_named
from upweight.evals.style import controlled, difference, features
from upweight.rollout.scripted import ScriptedSampler


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"uid": "u1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write code."},
        {"uid": "u2", "category": "creative_writing", "subcategory": "", "prompt": "Write a poem."},
    ]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model_answer").mkdir()
    for model, uid, content in (
        ("o3-mini-2025-01-31", "u1", {"answer": "baseline code"}),
        ("gemini-2.0-flash-001", "u2", "baseline poem"),
    ):
        answer = {"uid": uid, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]}
        (tmp_path / "model_answer" / f"{model}.jsonl").write_text(json.dumps(answer) + "\n")
    return tmp_path


def prefers(good: str, first: str, second: str):
    """A judge that knows which answer is good."""

    def reply(prompt, sample):
        above = prompt[-1].content.partition("<answer_B>")[0]
        return f"My own answer ... [[{first if good in above else second}]]"

    return ScriptedSampler(reply)


def test_both_orders_count(data: Path) -> None:
    benchmark = open_named("arena_hard", Setting(data=data, judge=prefers("good", "A>>B", "B>A")))
    code, poem = benchmark.problems()
    assert (code.answer, poem.answer) == ("baseline code", "baseline poem")
    group = [Completion((), (), text, stop, "") for text, stop in
             [("<think>x</think>good", "end"), ("bad", "end"), ("good", "length"), ("<think>good", "end")]]  # fmt: skip
    verdicts = benchmark.verifier.score(code, group)
    # the good answer as A: A>>B, three wins; as B: B>A, one win. The bad one as A: B>A, then as B: also B>A, which wins
    assert [verdict.score for verdict in verdicts] == [1.0, 0.5, 0.0, 0.0]
    assert [verdict.reason for verdict in verdicts] == ["A>>B; B>A", "B>A; B>A", "no answer", "no answer"]
    samples = [Sample(code.id, i, v.score, v.reason, "end", 1, c.text, "", code.answer)
               for i, (v, c) in enumerate(zip(verdicts, group, strict=True))]  # fmt: skip
    # games: 1 1 1 1, then 0 1, then the two without an answer, which lose both games clearly, as six: 5 of 18
    assert benchmark.figures(samples)["win rate of all games"] == pytest.approx(5 / 18)


def test_parts_and_a_missing_judge(data: Path) -> None:
    judge = ScriptedSampler({"*": "no idea"})
    coding = open_named("arena_hard", Setting(data=data, judge=judge, parts=("coding",)))
    assert [problem.id for problem in coding.problems()] == ["u1"]
    (verdict,) = coding.verifier.score(coding.problems()[0], [Completion((), (), "x", "end", "")])
    assert (verdict.score, verdict.reason) == (0.5, "unclear; unclear")
    with pytest.raises(UserError, match="needs a judge"):
        open_named("arena_hard", Setting(data=data))
    with pytest.raises(UserError, match=r"has no question\.jsonl"):
        open_named("arena_hard", Setting(data=data / "model_answer", judge=judge))


def test_form_is_counted_outside_of_code() -> None:
    text = "# Title\n\n- **bold** item\n1. second\n```\n# no heading\n- no item\n```\n"
    assert list(features(text)[1:]) == [1, 2, 1]


def test_style_control_takes_out_what_form_explains() -> None:
    long, short = features("word " * 200), features("word " * 50)
    # longer answers win 90%, shorter ones 10%, whoever wrote them; ours are longer in 8 of 10 games
    apart = [difference(long, short)] * 80 + [difference(short, long)] * 20
    won = [1.0] * 72 + [0.0] * 8 + [1.0] * 2 + [0.0] * 18
    assert sum(won) / len(won) == pytest.approx(0.74)
    assert controlled(won, apart) == pytest.approx(0.5, abs=0.03)
    # with equal form it is the win rate
    assert controlled([1.0, 1.0, 1.0, 0.0], [difference(long, long)] * 4) == pytest.approx(0.75, abs=1e-3)
