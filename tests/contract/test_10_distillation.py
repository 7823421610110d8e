"""Contract 10: a distillation term whose teacher is missing, mis-tokenised or constant is an error, never a zero.

Put back on purpose, each fails here: treating a missing teacher as a term of 0, letting a teacher of another vocabulary
broadcast or be cut (atropos#456 was such a no-op).
"""

from dataclasses import replace

import pytest
import torch
from objective_cases import cases, one_step, small
from torch import nn

from upweight.core.errors import UserError
from upweight.model.divergence import CachedTeacher
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.objectives.dpd import Dpd, EncodedPair, TeacherError, pair_batch

ITEMS = cases()["Dpd"].items
TERMS = [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


def broken(change: str) -> Transformer:
    teacher = small(9)
    with torch.no_grad():
        if change == "nan":
            teacher.norm.weight[0] = float("nan")
        elif change == "uniform":
            teacher.embedding.weight.zero_()
        elif change == "one distribution":
            teacher.norm.weight.zero_()
            teacher.norm = _Constant(teacher.config.width)  # type: ignore[assignment]
    return teacher


class _Constant(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand_as(x)


@pytest.mark.parametrize("weights", TERMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "no teacher"),
        ("vocabulary", "vocabulary has 41 tokens and the policy's 40"),
        ("nan", "NaN"),
        ("uniform", "constant"),
        ("one distribution", "constant"),
        ("the student itself", "the student's own"),
    ],
)
def test_a_teacher_that_cannot_teach(weights: tuple[float, float, float], change: str, message: str) -> None:
    shape = ModelConfig(vocab_size=41, width=16, layers=1, heads=2, kv_heads=1, ffn=16)
    teachers = {"missing": None, "vocabulary": make_model(shape, 1), "the student itself": small()}
    teacher = teachers[change] if change in teachers else broken(change)
    sequence, positive, negative = weights
    objective = Dpd(teacher, sequence=sequence, positive=positive, negative=negative)
    with pytest.raises(TeacherError, match=message):
        objective(small(), pair_batch(ITEMS, 64))


def test_a_cached_teacher_that_cannot_teach() -> None:
    batch = pair_batch(ITEMS, 64)
    count = int((batch.sequences.weights > 0).sum())
    tokens = torch.arange(4).repeat(count, 1)
    good = torch.randn(count, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1) - 0.1
    loss = Dpd()(small(), replace(batch, cached=CachedTeacher(tokens, good)))
    assert float(loss.terms["positive"].total) > 0
    for wrong, message in [
        (CachedTeacher(tokens, good.clone().fill_(float("nan"))), "NaN"),
        (CachedTeacher(tokens + 37, good), "names token 40"),
        (CachedTeacher(tokens, good[:1].repeat(count, 1)), "constant"),
        (CachedTeacher(tokens, torch.full_like(good, -3.0)), "constant"),
    ]:
        with pytest.raises(TeacherError, match=message):
            Dpd()(small(), replace(batch, cached=wrong))


def test_pure_dpo_needs_no_teacher() -> None:
    objective = Dpd(positive=0.0, negative=0.0)
    loss = objective(small(), pair_batch(ITEMS, 64))
    assert set(loss.terms) == {"dpo", "margin", "accuracy"}


def test_pairs_that_prefer_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="chosen response of a pair is empty"):
        EncodedPair((1,), (), (2,))
    with pytest.raises(UserError, match="rejected response of a pair is empty"):
        EncodedPair((1,), (2,), ())
    with pytest.raises(UserError, match="are the same"):
        EncodedPair((1,), (2, 3), (2, 3))
    with pytest.raises(UserError, match="empty prompt"):
        EncodedPair((), (2, 3), (2,))
    batch = pair_batch(ITEMS, 64)
    last = int(batch.rejected[-1])
    nothing = replace(batch.sequences, weights=batch.sequences.weights * (batch.sequences.segments != last))
    with pytest.raises(UserError, match=rf"sequences \[{last}\] .* empty response"):
        Dpd(small(5))(small(), replace(batch, sequences=nothing))
    with pytest.raises(UserError, match="no log-probabilities under the reference"):
        Dpd(small(5))(small(), pair_batch([EncodedPair((1,), (2,), (3,))], 64))
    with pytest.raises(UserError, match="batch of no pairs"):
        pair_batch([], 64)


def test_a_teacher_that_can_teach_moves_the_student() -> None:
    case = cases()["Dpd"]
    report, _ = one_step(case, [case.make(case.items, 256)])
    assert report.terms["positive"] > 0.01
    assert report.terms["negative"] > 0.01
