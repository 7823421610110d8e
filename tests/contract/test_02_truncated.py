"""Contract 2: a truncated completion adds nothing to the RL loss, to what divides it, or to any figure.

Put back on purpose, each fails here: masking in the numerator only (trl#6369), and figures that still count masked
tokens (NeMo-RL#3957).
"""

from dataclasses import replace

import pytest
import torch
from objective_cases import cases, difference, one_step

from upweight.core.records import Completion
from upweight.objectives.grpo import Grpo, group_advantages

NAMES = ["Grpo", "Grpo by sequence", "Grpo off-policy", "Grpo tempered"]


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_completion_changes_nothing(name: str) -> None:
    case = cases()[name]
    whole = case.make(case.items, 256)
    junk = Completion(tuple(range(9)), (-3.0,) * 9, "", "end", "test")
    items = [*case.items, ((1, 2), junk, 5.0)]
    with_junk = case.make(items, 256)
    masked = replace(with_junk, truncated=torch.arange(1, 1 + len(with_junk.truncated)) == len(with_junk.truncated))
    expected, expected_weights = one_step(case, [whole])
    report, weights = one_step(case, [masked])
    assert difference(weights, expected_weights) < 2e-5
    assert report.weight == expected.weight
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    assert dict(report.terms) == pytest.approx(dict(expected.terms), rel=1e-5)
    counted, _ = one_step(case, [with_junk])  # the same completion counts where it is not truncated
    assert counted.weight != expected.weight


def test_truncated_completions_are_not_even_read() -> None:
    case = cases()["Grpo"]
    cut = [(prompt, replace(completion, stop="length"), 1.0) for prompt, completion, _ in case.items[:3]]
    (batch,) = Grpo().batches([*cut, *case.items[3:]], row_tokens=10_000)
    (only,) = Grpo().batches(case.items[3:], row_tokens=10_000)
    assert torch.equal(batch.sequences.tokens, only.sequences.tokens)


def test_without_the_mask_a_truncated_completion_counts_like_any_other() -> None:
    case = cases()["Grpo"]
    (prompt, completion, _), *others = case.items
    counted = Grpo(mask_truncated=False).batches(
        [(prompt, replace(completion, stop="length"), -1.0), *others], row_tokens=10_000
    )
    (expected,) = Grpo().batches([(prompt, completion, -1.0), *others], row_tokens=10_000)
    assert torch.equal(counted[0].sequences.weights, expected.sequences.weights)
    assert torch.equal(counted[0].advantages, expected.advantages)
    assert Grpo().mask_truncated  # the report's rule is the default


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_truncated_completions_alone_trains_nothing_and_says_so(name: str) -> None:
    case = cases()[name]
    cut = [(prompt, replace(completion, stop="length"), 1.0) for prompt, completion, _ in case.items]
    policy = case.policy()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    report, weights = one_step(case, Grpo().batches(cut, row_tokens=10_000), policy)
    assert report.skipped
    assert (report.weight, report.tokens) == (0, 0)
    assert difference(before, weights) == 0  # bit for bit


def test_the_baseline_is_one_documented_choice() -> None:
    rewards, cut = [1.0, 0.0, 0.0, 1.0], [False, False, True, True]
    # all four: mean 0.5; the first two alone: mean 0.5 as well, so shift one reward to tell them apart
    rewards[3] = 0.0
    assert group_advantages(rewards, truncated=cut).tolist() == [0.75, -0.25, 0, 0]  # mean 1/4
    assert group_advantages(rewards, truncated=cut, truncated_in_baseline=False).tolist() == [0.5, -0.5, 0, 0]
