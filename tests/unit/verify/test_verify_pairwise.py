import math
from collections.abc import Sequence

import pytest
import torch

from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Message, Problem
from upweight.model.config import ModelConfig
from upweight.model.heads import ScalarHead
from upweight.model.transformer import make_model
from upweight.stages import reward
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer
from upweight.verify.judge import JudgeVerifier, preference_of
from upweight.verify.pairwise import (
    PairwiseVerifier,
    RewardModelScorer,
    length_bias,
    symmetrised,
    win_probabilities,
    win_rates,
)

PROBLEM = Problem("p", (Message("user", "Say hello."),))


def completion(text: str, stop: str = "end", tokens: tuple[int, ...] = (1,)) -> Completion:
    return Completion(tokens=tokens, logprobs=(), text=text, stop=stop, policy="test")


def by_number(problem: Problem, group: Sequence[Completion]) -> list[float]:
    return [float(answer.text) for answer in group]


def test_win_rate_of_three() -> None:
    # r = 0, ln 3, -ln 3: sigmoid(ln 3) = 3/4, sigmoid(2 ln 3) = 9/10
    group = [completion(str(score)) for score in (0.0, math.log(3), -math.log(3))]
    scores = [verdict.score for verdict in PairwiseVerifier(by_number).score(PROBLEM, group)]
    # (1/4 + 3/4) / 2, (3/4 + 9/10) / 2, (1/4 + 1/10) / 2
    assert scores == pytest.approx([0.5, 0.825, 0.175])
    assert sum(scores) / 3 == pytest.approx(0.5)


def test_win_rates_do_not_move_with_an_offset_and_survive_large_rewards() -> None:
    assert win_rates(win_probabilities([1.0, 2.0])) == pytest.approx(win_rates(win_probabilities([1001.0, 1002.0])))
    assert win_rates(win_probabilities([5000.0, -5000.0])) == [1.0, 0.0]


def test_a_group_of_one_earns_a_half() -> None:
    assert PairwiseVerifier(by_number).score(PROBLEM, [completion("7")])[0].score == 0.5


def test_a_truncated_completion_loses_whatever_its_reward() -> None:
    group = [completion("9", "length"), completion("9", "length"), completion("0")]
    verdicts = PairwiseVerifier(by_number).score(PROBLEM, group)
    # truncated: a draw with the other and a loss, (1/2 + 0) / 2; the whole one beats both
    assert [verdict.score for verdict in verdicts] == [0.25, 0.25, 1.0]
    assert verdicts[0].reason == "truncated"


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")]])
def test_bad_scorers_are_named(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="the scorer gave"):
        PairwiseVerifier(lambda problem, group: scores).score(PROBLEM, [completion("1"), completion("2")])


def test_symmetrised_takes_out_the_favour_for_a_place() -> None:
    # both orders won by whoever stands first: (1 + 1 - 1) / 2
    assert symmetrised([[0.5, 1.0], [1.0, 0.5]]) == [[0.5, 0.5], [0.5, 0.5]]
    # 0 wins in both orders: (1 + 1 - 0) / 2
    assert symmetrised([[0.5, 1.0], [0.0, 0.5]])[0][1] == 1.0


def test_length_bias() -> None:
    assert length_bias([0.1, 0.2, 0.3], [10, 20, 30]) == pytest.approx(1.0)
    # deviations (-1, 0, 1) and (1, -2, 1): no correlation
    assert length_bias([1.0, 2.0, 3.0], [5, 2, 5]) == pytest.approx(0.0)
    assert length_bias([0.5, 0.5], [1, 2]) == 0.0
    assert length_bias([], []) == 0.0


def test_reward_model_reads_the_last_token_of_each_sequence() -> None:
    tokenizer = Tokenizer.train(["Say hello to all of them."] * 4, vocab_size=300).with_template(CHATML)
    model = make_model(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            width=16,
            layers=1,
            heads=2,
            kv_heads=1,
            head_size=8,
            ffn=32,
            rope_base=10000.0,
            max_context=128,
        ),
        seed=1,
    )
    head = ScalarHead(model)
    torch.nn.init.normal_(head.score.weight)
    group = [completion("a", tokens=(5,)), completion("b", tokens=(6, 7, 8)), completion("c", tokens=(9, 4))]
    found = RewardModelScorer(head, tokenizer, batch_rows=2)(PROBLEM, group)
    prompt = render(tokenizer, PROBLEM.messages)
    with torch.no_grad():  # one by one, without padding
        expected = [head(torch.tensor([prompt + list(one.tokens)])).item() for one in group]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_without_an_opinion_is_right_half_of_the_time() -> None:
    shape = ModelConfig(vocab_size=20, width=16, layers=1, heads=2, kv_heads=1, ffn=24, max_context=32)
    head = ScalarHead(make_model(shape, seed=1))  # its map is zero at first, so every pair is a tie
    figures = reward._measure(head, [((1, 2, 3), (1, 4)), ((1, 5), (1, 6))], reward.Config())
    assert (figures["heldout_accuracy"], figures["accuracy_where_chosen_is_longer"]) == (0.5, 0.5)


class _Judge(Sampler):
    """Prefers the answer that says good, else what stands first."""

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [[completion(self._reply(prompt))] for prompt in prompts]

    def _reply(self, prompt: Prompt) -> str:
        assert not isinstance(prompt, str)
        first, second = prompt[-1].content.split("=== Answer B ===")
        assert "secret thought" not in prompt[-1].content
        return "B" if "good" in second and "good" not in first else "A"


def test_judge_is_asked_in_both_orders() -> None:
    group = [completion("<think>secret thought</think>bad"), completion("good"), completion("poor")]
    scores = [verdict.score for verdict in JudgeVerifier(_Judge()).score(PROBLEM, group)]
    # good beats both; bad and poor each win when first, so they draw: (0 + 1/2) / 2
    assert scores == [0.25, 1.0, 0.25]
    assert JudgeVerifier(_Judge()).score(PROBLEM, group[:1])[0].score == 0.5


def test_preference_of() -> None:
    assert preference_of("A") == 1.0
    assert preference_of("<think>A or B?</think> Answer B is better: B.") == 0.0
    assert preference_of("T") == 0.5
    assert preference_of("both are nice") is None
    assert preference_of("The better answer is **A**.") == 1.0
    assert preference_of("A misreads the question.\n\nB") == 0.0
    assert preference_of("B is better than A") is None  # names both: no telling which it means
