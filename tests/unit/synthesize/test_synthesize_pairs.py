"""Pairs are clear or dropped by a named rule; preference pairs fail in the way they say; the gate."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler, Verifier
from upweight.core.records import Completion, Message, Pair, Problem, Verdict
from upweight.synthesize.difficulty import Gate, histogram, measure
from upweight.synthesize.encoded import encode_pair
from upweight.synthesize.pairs import Candidates, PairRules, balanced, judge, length_bias, pairs_of, statistics
from upweight.synthesize.preferences import FAILURES, preference_pairs
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer
from upweight.verify.answers import AnswerVerifier
from upweight.verify.compose import FormatVerifier

SUM = Problem("sum", (Message("user", "What is 2+3?"),), answer="5")


def written(answer: int, tokens: int, stop: str = "end", mark: int = 0) -> Completion:
    text = f"<think>\n2+3\n</think>\n\\boxed{{{answer}}}"
    return Completion(tuple(range(mark, mark + tokens)), (), text, stop, "model")


def candidates(teacher: list[Completion], student: list[Completion]) -> Candidates:
    return judge(SUM, teacher, student, AnswerVerifier())


def test_the_pair_closest_in_length_is_taken() -> None:
    # ratios: 12/10 = 1.2 against 10/6 = 1.67 and 20/12 = 1.67
    found = candidates([written(5, 10), written(5, 20)], [written(4, 12), written(4, 6)])
    pairs = pairs_of(found, PairRules())
    assert not isinstance(pairs, str)
    assert [(len(pair.chosen.tokens), len(pair.rejected.tokens)) for pair in pairs] == [(10, 12)]


def test_no_completion_is_used_twice() -> None:
    found = candidates([written(5, 10), written(5, 11)], [written(4, 10, mark=50), written(4, 11, mark=50)])
    pairs = pairs_of(found, PairRules(pairs_per_problem=3))
    assert not isinstance(pairs, str)
    assert [(len(pair.chosen.tokens), len(pair.rejected.tokens)) for pair in pairs] == [(10, 10), (11, 11)]


@pytest.mark.parametrize(
    ("teacher", "student", "reason"),
    [
        ([written(4, 10)], [written(4, 9)], "the teacher is never right"),
        ([written(5, 10, "length")], [written(4, 9)], "the teacher is never right"),
        ([written(5, 10)], [written(5, 9)], "the student is not clearly worse"),
        ([written(5, 10)], [written(4, 9, "length")], "every student completion is truncated or empty"),
        ([written(5, 30)], [written(4, 9)], "too different in length"),
        (
            [Completion((1,), (), "\\boxed{5}", "end", "model")],
            [written(4, 1)],
            "the teacher is right, but never in form",
        ),
    ],
)
def test_what_is_not_clear_is_dropped_by_name(
    teacher: list[Completion], student: list[Completion], reason: str
) -> None:
    assert pairs_of(candidates(teacher, student), PairRules()) == reason


def test_statistics_tell_what_went_in_and_out() -> None:
    found = candidates([written(5, 10), written(4, 10)], [written(4, 8)])
    pairs = pairs_of(found, PairRules())
    assert not isinstance(pairs, str)
    told = statistics([found], pairs, ["the teacher is never right"])
    assert (told["teacher_score"], told["student_score"], told["pairs"]) == (0.5, 0.0, 1)
    assert told["chosen_longer_share"] == 1.0
    assert told["dropped"] == {"the teacher is never right": 1}


def test_preference_pairs_fail_as_they_say() -> None:
    form = FormatVerifier()
    kinds: Counter[str] = Counter()
    shorter = 0
    for pair in preference_pairs(400, 3):
        kind = pair.rejected.policy.removeprefix("procedural: ")
        kinds[kind] += 1
        shorter += len(pair.rejected.text) < len(pair.chosen.text)
        assert pair.chosen.text != pair.rejected.text
        right = [verdict.score for verdict in AnswerVerifier().score(pair.problem, [pair.chosen, pair.rejected])]
        formed = [verdict.score for verdict in form.score(pair.problem, [pair.chosen, pair.rejected])]
        assert (right[0], formed[0]) == (1, 1)
        assert right[1] == (kind in ("padded", "repeated", "incomplete"))
        assert formed[1] == (kind not in ("unboxed", "unclosed"))
    assert set(kinds) == set(FAILURES)
    assert 160 < kinds["wrong"] < 240  # half of 400, standard deviation 10
    assert 40 < shorter < 200  # length alone tells nothing


@dataclass(frozen=True)
class Sometimes(Sampler):
    """Solves problem number i (its question) in the first i of its samples."""

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [
            [written(5 if sample < int(prompt[-1].content) else 4, 3) for sample in range(count)]
            for prompt in prompts
            if not isinstance(prompt, str)
        ]


def posed(rights: Sequence[int]) -> list[Problem]:
    return [Problem(f"p{right}", (Message("user", str(right)),), answer="5") for right in rights]


def test_the_histogram_accounts_for_every_problem() -> None:
    measured = measure(posed([0, 1, 2, 8, 16]), Sometimes(), AnswerVerifier(), Gate(), Limits(max_new_tokens=4))
    told = histogram(measured, Gate())
    # 0/16 and 1/16 = 0.0625 are too hard, 2/16 = 0.125 and 8/16 stay, 16/16 is too easy
    assert (told["kept"], told["dropped"]) == (2, {"too hard": 2, "too easy": 1})
    assert told["rates"] == {"0": 1, "0.0625": 1, "0.125": 1, "0.5": 1, "1": 1}


def test_impossible_gates_are_refused() -> None:
    with pytest.raises(UserError, match="low < high"):
        Gate(low=0.9, high=0.1)


@dataclass(frozen=True)
class Half(Verifier):
    """Scores between 0 and 1 are rates too."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(0.5, "half") for _ in group]


def test_graded_scores_are_averaged() -> None:
    measured = measure(posed([0]), Sometimes(), Half(), Gate(count=4), Limits(max_new_tokens=4))
    assert (measured[0].rate, measured[0].dropped) == (0.5, None)


def test_the_guard_balances_which_side_is_longer() -> None:
    def pair(chosen: int, rejected: int) -> Pair:
        return Pair(SUM, written(5, chosen), written(4, rejected))

    # four longer positives, one longer negative: bias 3 / 5
    pairs = [pair(12, 10), pair(18, 10), pair(11, 10), pair(15, 10), pair(10, 11)]
    assert length_bias(pairs) == pytest.approx(0.6)
    assert balanced(pairs, PairRules()) == (pairs, [])
    # without the most unequal one 2 / 4, without the two most unequal ones 1 / 3
    kept, dropped = balanced(pairs, PairRules(length_bias=0.4))
    assert [len(one.chosen.tokens) for one in kept] == [12, 11, 10]
    assert [len(one.chosen.tokens) for one in dropped] == [18, 15]
    turned = [Pair(SUM, one.rejected, one.chosen) for one in pairs]
    assert len(balanced(turned, PairRules(length_bias=0.0))[0]) == 2
    assert balanced([], PairRules(length_bias=0.0)) == ([], [])


def test_a_response_without_tokens_ends_where_it_was_not_cut_off() -> None:
    made = Tokenizer.train(["what is it? so, no"] * 9, 280, chat_template=CHATML)
    ended, cut = Completion((), (), "so", "end", "given"), Completion((), (), "no", "length", "given")
    encoded = encode_pair(made, Pair(Problem("p", (Message("user", "what is it?"),)), ended, cut))
    assert encoded.chosen == (*made.encode("so"), made.end_of_turn)
    assert encoded.rejected == tuple(made.encode("no"))
