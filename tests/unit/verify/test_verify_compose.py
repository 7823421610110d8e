from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pytest

from upweight.core.errors import IsolationUnavailable, UserError
from upweight.core.identity import canonical_json
from upweight.core.protocols import Limits, Prompt, Sampler, Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.core.work import Machine
from upweight.verify import reward
from upweight.verify.answers import AnswerVerifier
from upweight.verify.compose import BudgetVerifier, FormatVerifier, LengthVerifier, Part, WeightedVerifier
from upweight.verify.guard import GuardedVerifier
from upweight.verify.reward import RewardConfig, Weighted, open_verifier

PROBLEM = Problem("p", (Message("user", "6 x 7?"),), answer="42")


def completion(text: str, count: int = 1, stop: str = "end") -> Completion:
    return Completion(tokens=(1,) * count, logprobs=(), text=text, stop=stop, policy="test")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<think>\nso\n</think>\n\\boxed{42}", None),
        ("so\n</think>\n\\boxed{42}", None),  # the prompt opened the thought
        ("\\boxed{42}", "one thought"),
        ("<think>a</think><think>b</think>\\boxed{42}", "one thought"),
        ("first <think>a</think>\\boxed{42}", "one thought"),
        ("<think>a \\boxed{42}", "one thought"),
        ("<think>a</think>\n", "nothing after"),
        ("<think>a</think>\nwell", "no answer"),
    ],
)
def test_format(text: str, fault: str | None) -> None:
    verdict = FormatVerifier().score(PROBLEM, [completion(text)])[0]
    assert verdict.score == (1.0 if fault is None else 0.0)
    assert (fault or "well formed") in verdict.reason


def test_format_without_thought() -> None:
    group = [completion("fine"), completion("<think>a</think>fine"), completion("fine", stop="length")]
    scores = [verdict.score for verdict in FormatVerifier(thought=False, answer=False).score(PROBLEM, group)]
    assert scores == [1.0, 0.0, 0.0]


def test_length_falls_linearly() -> None:
    group = [completion("", count) for count in (5, 10, 15, 20, 25)] + [completion("", 5, "length")]
    # (20 - 15) / (20 - 10) = 1/2
    scores = [verdict.score for verdict in LengthVerifier(free_tokens=10, most_tokens=20).score(PROBLEM, group)]
    assert scores == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="free_tokens"):
        LengthVerifier(free_tokens=20, most_tokens=20)


def _sum(only_if_right: str | None) -> WeightedVerifier:
    parts = (Part("answer", AnswerVerifier(), 0.75), Part("format", FormatVerifier(), 0.25))
    return WeightedVerifier(parts, only_if_right=only_if_right)


def test_weighted_sum() -> None:
    group = [completion("<think>a</think>\\boxed{42}"), completion("<think>a</think>\\boxed{41}"), completion("no")]
    verdicts = _sum(None).score(PROBLEM, group)
    assert [verdict.score for verdict in verdicts] == [1.0, 0.25, 0.0]
    assert verdicts[1].reason == "answer 0 (different: got 41); format 1 (well formed)"
    # form is not paid for alone
    assert [verdict.score for verdict in _sum("answer").score(PROBLEM, group)] == [1.0, 0.0, 0.0]


def test_weighted_sum_has_an_identity_and_refuses_nonsense() -> None:
    assert "AnswerVerifier" in canonical_json(_sum(None))
    with pytest.raises(ValueError, match="at least one"):
        WeightedVerifier(())
    with pytest.raises(ValueError, match="none of the parts"):
        _sum("style")
    with pytest.raises(ValueError, match="finite"):
        Part("answer", AnswerVerifier(), float("nan"))


def test_a_budget_takes_from_what_is_longer_than_its_problem_takes() -> None:
    verifier = BudgetVerifier(AnswerVerifier(), {"p": 10.0}, slack=1.5, span=2.0, least=0.1)
    group = [completion("\\boxed{42}", count) for count in (5, 15, 25, 100)] + [completion("\\boxed{1}", 100)]
    # 25 tokens are 2.5 times: 1 - (2.5 - 1.5) / 2 = 0.5; 100 tokens would be below the least share
    assert [verdict.score for verdict in verifier.score(PROBLEM, group)] == [1.0, 1.0, 0.5, 0.1, 0.0]
    assert "2.5 times the usual length" in verifier.score(PROBLEM, group)[2].reason
    unknown = Problem("other", PROBLEM.messages, answer="42")
    assert verifier.score(unknown, group)[3].score == 1.0
    # a penalty stays what it is: a wrong answer gains nothing by its length
    penalised = WeightedVerifier((Part("wrong", AnswerVerifier(), -1.0),))
    longer = BudgetVerifier(penalised, {"p": 10.0}).score(PROBLEM, [completion("\\boxed{42}", n) for n in (5, 100)])
    assert [verdict.score for verdict in longer] == [-1.0, -1.0]


def test_a_mixture_of_rewards_is_opened_from_plain_values() -> None:
    config = RewardConfig(
        mixture=(
            Weighted("answer", 0.9, RewardConfig("answer")),
            Weighted("form", 0.1, RewardConfig(custom=FormatVerifier())),
        ),
        only_if_right="answer",
    )
    canonical_json(config)  # it can stand in a recipe
    assert not config.relative
    assert RewardConfig(mixture=(Weighted("win", 1.0, RewardConfig("preference")),)).relative
    with open_verifier(config, {}, Machine()) as verifier:
        group = [completion("<think>a</think>\\boxed{42}"), completion("\\boxed{42}"), completion("<think>a</think>x")]
        assert [verdict.score for verdict in verifier.score(PROBLEM, group)] == [1.0, 0.9, 0.0]


@dataclass(frozen=True)
class Rearranges(Verifier):
    """Puts its group in order first."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        cast("list[Completion]", group).sort(key=lambda one: len(one.text))
        return [Verdict(float(len(one.text)), "") for one in group]


def test_a_verifier_that_rearranges_its_group_is_named() -> None:
    # its verdicts would be taken for those of other completions
    group = [completion("three"), completion("1")]
    with pytest.raises(UserError, match=r"Rearranges on problem p .* has no attribute 'sort'"):
        GuardedVerifier(Rearranges()).score(PROBLEM, group)
    assert [one.text for one in group] == ["three", "1"]


@dataclass(frozen=True)
class Says(Sampler):
    """One text, to whatever it is asked."""

    text: str

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        assert limits.temperature == 0
        return [[Completion((), (), self.text, "end", "said")] * count for _ in prompts]


@dataclass(frozen=True)
class Described:
    """Plain values that open a sampler, as an endpoint's are."""

    text: str

    def open(self) -> Sampler:
        return Says(self.text)


def test_agents_and_judges_are_named_in_plain_values() -> None:
    problem = Problem("p", PROBLEM.messages, answer="x^2 + y")
    # rules decide the first answer, the agent is asked about the second
    group = [completion("\\boxed{x^2 + y}"), completion("\\boxed{the square of x and y together}")]
    for judge in (Says("Verdict: equal"), Described("Verdict: equal")):
        config = RewardConfig("agent", judge=judge)
        canonical_json(config)
        assert not config.relative
        try:
            with open_verifier(config, {}, Machine()) as verifier:
                first, second = verifier.score(problem, group)
        except IsolationUnavailable as error:
            pytest.skip(f"THE SANDBOX IS NOT TESTED HERE: {error}")
        assert (first.score, first.reason) == (1.0, "equal")
        assert second.score == 1.0
        assert "equal by the agent" in second.reason
    config = RewardConfig("judge", judge=Says("A"))
    assert config.relative
    with open_verifier(config, {}, Machine()) as verifier:
        # whoever stands first is preferred: over both orders that is a draw
        assert [verdict.score for verdict in verifier.score(problem, group)] == [0.5, 0.5]
    with pytest.raises(UserError, match='needs a language model: give the step an input named "judge"'):
        open_verifier(RewardConfig("judge"), {}, Machine()).__enter__()


def test_each_problem_is_judged_by_its_own_check_and_only_what_is_needed_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    real = reward.open_verifier

    def counting(config: RewardConfig, *rest):
        opened.append(config.kind)
        return real(config, *rest)

    monkeypatch.setattr(reward, "open_verifier", counting)
    program = Problem("c", (Message("user", "double"),), tests=("assert double(4) == 8",))
    with real(RewardConfig("check"), {}, Machine(workers=1)) as verifier:
        assert [one.score for one in verifier.score(PROBLEM, [completion("\\boxed{42}"), completion("41")])] == [1, 0]
        assert opened == ["answer"]  # no sandbox for answers
        right = completion("```python\ndef double(x):\n    return 2 * x\n```")
        assert [one.score for one in verifier.score(program, [right, completion("x = 1")])] == [1, 0]
        assert verifier.score(PROBLEM, [completion("\\boxed{42}")])[0].score == 1
    assert opened == ["answer", "code"]
