"""Every objective against numbers worked out by hand on a policy whose logits are given.

The policy here is a table: the hidden state of a token is its row of logits, and the unembedding is the identity. So
log-probabilities are known in closed form: logits log(1), log(2), log(3), log(4) give 1/10, 2/10, 3/10, 4/10.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from upweight.core.packing import pack, strip
from upweight.core.records import Completion
from upweight.objectives.bradley_terry import BradleyTerry, RankedBatch
from upweight.objectives.dpd import Dpd, EncodedPair, pair_batch, sequence_loss, token_kl
from upweight.objectives.grpo import Grpo, group_advantages
from upweight.objectives.next_token import NextToken
from upweight.objectives.tag_scores import TagBatch, TagScores

FIRST = [0.1, 0.2, 0.3, 0.4]
SECOND = [0.4, 0.3, 0.2, 0.1]


class Table(nn.Module):
    """After tokens 0 and 1 the next one has the probabilities `even`, after 2 and 3 `odd`."""

    def __init__(self, low: list[float], high: list[float]) -> None:
        super().__init__()
        rows = torch.tensor([low, low, high, high]).log()
        self.table = nn.Parameter(rows)
        self.unembedding = torch.eye(4)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        return self.table[tokens]


def test_next_token() -> None:
    policy = Table(FIRST, SECOND)
    batch = pack([strip([0, 3, 1], [True, True, True]), strip([2, 2], [False, True])], 8)
    loss = NextToken()(policy, batch)
    # 3 after 0: 0.4; 1 after 3: 0.3; 2 after 2: 0.2
    assert loss.total.item() == pytest.approx(-math.log(0.4 * 0.3 * 0.2))
    assert loss.weight.item() == 3
    loss.total.backward()
    # d/dz of -log p(3 | 0) is p - onehot(3)
    assert policy.table.grad is not None
    assert policy.table.grad[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4 - 1], abs=1e-6)
    shifted = Table([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])  # Z = 10 everywhere
    penal = NextToken(z_loss=0.5)(shifted, batch)
    plain = NextToken()(shifted, batch)
    assert penal.total.item() - plain.total.item() == pytest.approx(0.5 * 3 * math.log(10) ** 2, rel=1e-5)


def test_dpo_alone() -> None:
    # y+ = 3 3 after 0: 0.4 * 0.1; y- = 0 after 0: 0.1; reference -2 and -3
    policy = Table(FIRST, SECOND)
    batch = pair_batch([EncodedPair((0,), (3, 3), (0,), -2.0, -3.0)], 8)
    loss = Dpd(beta=0.5, positive=0.0, negative=0.0)(policy, batch)
    margin = (math.log(0.04) + 2) - (math.log(0.1) + 3)
    expected = -math.log(1 / (1 + math.exp(-0.5 * margin)))
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.terms["margin"].total.item() == pytest.approx(margin, rel=1e-5)
    assert loss.terms["accuracy"].total.item() == 0
    direct = sequence_loss(
        torch.tensor([0.04]).log(), torch.tensor([0.1]).log(), torch.tensor([-2.0]), torch.tensor([-3.0]), 0.5
    )
    assert direct.item() == pytest.approx(expected, rel=1e-5)


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_dpd(normalise: str) -> None:
    teacher = [0.25] * 4
    other = [0.7, 0.1, 0.1, 0.1]
    policy = Table(FIRST, SECOND)
    batch = pair_batch([EncodedPair((0,), (3, 3), (0,), -2.0, -3.0)], 8)
    objective = Dpd(Table(teacher, other), beta=0.5, sequence=2.0, positive=3.0, negative=5.0, normalise=normalise)  # type: ignore[arg-type]
    loss = objective(policy, batch)
    # the positive's tokens are predicted after 0 and after 3, the negative's one after 0
    positive = kl(teacher, FIRST) + kl(other, SECOND)
    positive /= 2 if normalise == "token" else 1
    negative = kl(teacher, FIRST)
    margin = (math.log(0.04) + 2) - (math.log(0.1) + 3)
    dpo = math.log(1 + math.exp(-0.5 * margin))
    assert loss.total.item() == pytest.approx(2 * dpo + 3 * positive + 5 * negative, rel=1e-4)
    assert loss.weight.item() == 1
    assert loss.terms["positive"].total.item() == pytest.approx(positive, rel=1e-4)
    assert loss.terms["negative"].total.item() == pytest.approx(negative, rel=1e-4)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("forward", kl(SECOND, FIRST)),
        ("reverse", kl(FIRST, SECOND)),
        ("jensen_shannon", (kl(SECOND, [0.25] * 4) + kl(FIRST, [0.25] * 4)) / 2),  # their mean is 1/4 each
    ],
)
def test_token_kl(direction: str, expected: float) -> None:
    teacher, policy = (torch.tensor([[row, row, row]]).log() for row in (SECOND, FIRST))
    response = torch.tensor([[True, False, True]])
    found = token_kl(teacher, policy, response, direction=direction)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(2 * expected, rel=1e-5)  # two response tokens


def test_group_advantages() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0]).tolist() == [0.5, -0.5, -0.5, 0.5]
    # population deviation of 1, 0, 0, 0 is sqrt(3) / 4: 0.75 / 0.433 = sqrt(3), -0.25 / 0.433 = -1 / sqrt(3)
    scaled = group_advantages([1.0, 0.0, 0.0, 0.0], divide_by_spread=True)
    assert scaled.tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert group_advantages([0.1] * 3, divide_by_spread=True).tolist() == pytest.approx([0, 0, 0], abs=1e-7)


def test_grpo() -> None:
    policy = Table(FIRST, SECOND)
    # p(3 | 0) = 0.4, p(0 | 3) = 0.4; p(1 | 0) = 0.2
    good = Completion((3, 0), (math.log(0.4), math.log(0.2)), "", "end", "p")  # ratios 1 and 2
    bad = Completion((1,), (math.log(0.4),), "", "end", "p")  # ratio 0.5
    objective = Grpo(clip_low=0.2, clip_high=0.28)
    (batch,) = objective.batches([((0,), good, 0.5), ((0,), bad, -0.5)], row_tokens=16, fresh=False)
    loss = objective(policy, batch)
    # min(1 * 0.5, 0.5) + min(2 * 0.5, 1.28 * 0.5) + min(0.5 * -0.5, 0.8 * -0.5) = 0.5 + 0.64 - 0.4
    assert loss.total.item() == pytest.approx(-(0.5 + 0.64 - 0.4), rel=1e-5)
    assert loss.weight.item() == 3
    assert loss.terms["clip_share"].total.item() == 2  # the second and the third token
    assert loss.terms["ratio"].total.item() == pytest.approx(3.5, rel=1e-5)
    assert loss.maxima["logprob_difference"].item() == pytest.approx(math.log(2), rel=1e-5)
    loss.total.backward()
    assert policy.table.grad is not None
    # only the first token is within the clip: -A (onehot(3) - p) after token 0
    expected = [-0.5 * value for value in (-0.1, -0.2, -0.3, 1 - 0.4)]
    assert policy.table.grad[0].tolist() == pytest.approx(expected, abs=1e-6)
    by_sequence = Grpo(clip_low=0.2, clip_high=0.28, normalise="sequence")(policy, batch)
    assert by_sequence.total.item() == pytest.approx(-((0.5 + 0.64) / 2 - 0.4), rel=1e-5)
    assert by_sequence.weight.item() == 2


class Scores(nn.Module):
    """The score of a sequence is its first token."""

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        return tokens[(positions == 0) & (segments >= 0)][
            segments[(positions == 0) & (segments >= 0)].argsort()
        ].float()


def test_bradley_terry() -> None:
    batch = pack([strip([n, 0], [True, True]) for n in (3, 1, 2, 2)], 8)
    ranked = RankedBatch(batch, torch.tensor([0, 2]), torch.tensor([1, 3]))
    loss = BradleyTerry()(Scores(), ranked)
    assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(2), rel=1e-5)  # margins 2 and 0
    assert loss.terms["accuracy"].total.item() == 1.5  # right, and a tie
    centred = BradleyTerry(centre=0.1)(Scores(), ranked)
    assert (centred.total - loss.total).item() == pytest.approx(0.1 * (16 + 16), rel=1e-5)  # (3 + 1)^2, (2 + 2)^2


def test_tag_scores() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    logits = probabilities.log().expand(1, 2, 3)
    loss = TagScores()(lambda features: logits, TagBatch(torch.zeros(1, 1), torch.tensor([[0, -1]])))
    assert loss.total.item() == pytest.approx(math.log(2), rel=1e-5)
    assert loss.weight.item() == 1  # the second dimension has no label
    assert loss.terms["error"].total.item() == pytest.approx(0.75)  # expected score 0.25 + 0.5, label 0
