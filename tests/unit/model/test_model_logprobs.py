"""Log-probabilities and divergences in chunks, against the same written out; truncation by hand."""

import math

import pytest
import torch

from upweight.model import logprobs
from upweight.model.divergence import CachedTeacher, Direction, LiveTeacher, chunked_kl
from upweight.model.logprobs import token_logprobs, token_scores, truncate

INFINITE = float("inf")


def problem(count: int = 13, width: int = 8, vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator, requires_grad=True)
    unembedding = torch.randn(vocab, width, generator=generator, requires_grad=True)
    return hidden, unembedding, torch.randint(0, vocab, (count,), generator=generator)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [None, 1, 5, 13])
def test_scores_and_gradients_are_those_of_whole_logits(
    temperature: float, chunk: int | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:  # the functions that are compiled on CUDA, without the compiler
        monkeypatch.setattr(logprobs, "_fuses", lambda hidden, settings: True)
        monkeypatch.setattr(logprobs, "_fused_scores", lambda: logprobs._scores_of_logits)
        monkeypatch.setattr(logprobs, "_fused_gradient", lambda: logprobs._gradient_by_logit)
    hidden, unembedding, targets = problem()
    scores = token_scores(hidden, unembedding, targets, temperature=temperature, chunk=chunk)
    logits = hidden @ unembedding.t() / temperature
    normaliser = logits.logsumexp(-1)
    chosen = logits.gather(1, targets[:, None])[:, 0] - normaliser
    torch.testing.assert_close(scores.logprobs, chosen)
    torch.testing.assert_close(scores.log_normaliser, normaliser)
    weights = torch.linspace(-1, 2, 13)
    ours = (scores.logprobs * weights + 0.1 * scores.log_normaliser.square()).sum()
    theirs = (chosen * weights + 0.1 * normaliser.square()).sum()
    inputs = (hidden, unembedding)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_kept_and_recomputed_probabilities_give_the_same_bits() -> None:
    hidden, unembedding, targets = problem()
    results = []
    for again in (False, True):
        logprobs = token_logprobs(hidden, unembedding, targets)
        gradients = torch.autograd.grad(logprobs.sum(), (hidden, unembedding), retain_graph=True)
        if again:  # the first backward pass used the kept probabilities up, the second computes them again
            gradients = torch.autograd.grad(logprobs.sum(), (hidden, unembedding))
        results.append((logprobs, *gradients))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_any_leading_shape() -> None:
    hidden, unembedding, targets = problem(12)
    flat = token_logprobs(hidden, unembedding, targets)
    packed = token_logprobs(hidden.view(3, 4, 8), unembedding, targets.view(3, 4))
    assert torch.equal(packed.flatten(), flat)
    assert token_logprobs(hidden[:0], unembedding, targets[:0]).shape == (0,)


def test_peak_memory_grows_with_the_chunk_alone() -> None:
    # 64 positions of 1,000 tokens: no float tensor of more than a chunk's 4 x 1,000 (the unembedding has 2,000 entries)
    hidden = torch.randn(64, 2, requires_grad=True)
    unembedding = torch.randn(1000, 2, requires_grad=True)
    saved: list[int] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        token_logprobs(hidden, unembedding, torch.zeros(64, dtype=torch.int64), chunk=4).sum().backward()
    assert max(saved) <= 2000


def test_far_logits_stay_exact() -> None:
    # logits 0 and 200: log p(0) = -200 - log(1 + e^-200) = -200, where the softmax itself is 0 in float32
    logprobs = token_logprobs(torch.ones(1, 1), torch.tensor([[0.0], [200.0]]), torch.tensor([0]))
    assert logprobs.item() == -200.0


def test_greedy_has_no_logprob() -> None:
    hidden, unembedding, targets = problem()
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, unembedding, targets, temperature=0.0)


def kept(logits: torch.Tensor, **settings: float) -> list[int]:
    return (truncate(logits, **settings) > -INFINITE).nonzero()[:, 0].tolist()  # type: ignore[arg-type]


def test_truncation_by_hand() -> None:
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept(shares) == [0, 1, 2, 3]
    assert kept(shares, top_k=2) == [1, 3]
    assert kept(shares, top_p=0.39) == [1]  # 0.4 reaches it
    assert kept(shares, top_p=0.5) == [1, 3]  # 0.4 falls short, 0.4 + 0.3 reaches it
    assert kept(shares, top_p=0.95) == [0, 1, 2, 3]
    assert kept(shares, min_p=0.6) == [1, 3]  # at least 0.6 x 0.4 = 0.24
    # of the two likeliest 0.4 / 0.7 = 0.57 is left to token 1: it alone reaches 0.5
    assert kept(shares, top_k=2, top_p=0.5) == [1]
    assert torch.equal(truncate(shares, top_p=0.5)[[1, 3]], shares[[1, 3]])


def test_ties_are_kept_together() -> None:
    assert kept(torch.zeros(5), top_k=2) == [0, 1, 2, 3, 4]
    assert kept(torch.tensor([1.0, 0.0, 0.0]), top_p=0.7) == [0, 1, 2]


def test_a_flat_distribution_takes_the_long_way_to_the_same_nucleus() -> None:
    # 1,000 tokens, slowly falling: the nucleus of 0.9 is beyond the first guess of 64
    logits = torch.linspace(1, 0, 1000).expand(3, 1000).clone()
    shares = logits[0].softmax(-1).double()
    expected = int((shares.cumsum(0) < 0.9).sum()) + 1
    found = (truncate(logits, top_p=0.9) > -INFINITE).sum(-1)
    assert (found - expected).abs().max() <= 1  # float32 against float64 at the edge
    # a row's nucleus does not depend on whether another row needs the long way
    peaked = torch.zeros(1, 1000)
    peaked[0, 7] = 20.0
    together = truncate(torch.cat((logits, peaked)), top_p=0.9)
    assert torch.equal(together[3:], truncate(peaked, top_p=0.9))


def test_the_trainer_scores_under_the_truncated_distribution() -> None:
    # shares 0.1 0.4 0.2 0.3, top_p 0.5 keeps 0.4 and 0.3: token 3 has 0.3 / 0.7
    hidden = torch.ones(2, 1, requires_grad=True)
    unembedding = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[:, None].requires_grad_()
    targets = torch.tensor([3, 2])
    logprobs = token_logprobs(hidden, unembedding, targets, top_p=0.5)
    # token 2 lies outside: it counts as kept, 0.2 / (0.4 + 0.3 + 0.2)
    expected = torch.tensor([math.log(0.3 / 0.7), math.log(0.2 / 0.9)])
    torch.testing.assert_close(logprobs, expected)
    (gradient,) = torch.autograd.grad(logprobs[0], unembedding)
    # d log p(3) = one_hot(3) - p, over the two that are kept: -0.4 / 0.7 and 1 - 0.3 / 0.7; nothing on the others
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.0, -4 / 7, 0.0, 4 / 7]))


def log_distributions(temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, unembedding, _ = problem()
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(13, 11, generator=generator)
    return (teacher / temperature).log_softmax(-1), (hidden @ unembedding.t() / temperature).log_softmax(-1)


def live() -> LiveTeacher:
    """A teacher of width 11 whose unembedding is the identity: its hidden states are its logits."""
    return LiveTeacher(torch.randn(13, 11, generator=torch.Generator().manual_seed(5)), torch.eye(11))


@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_divergences_of_a_live_teacher(direction: Direction, chunk: int | None) -> None:
    hidden, unembedding, _ = problem()
    ours = chunked_kl(hidden, unembedding, live(), temperature=0.7, direction=direction, chunk=chunk)
    log_t = log_distributions(0.7)[0]
    log_p = (hidden @ unembedding.t() / 0.7).log_softmax(-1)
    t, p = log_t.exp(), log_p.exp()
    mixed = ((t + p) / 2).log()
    theirs = {
        "forward": (t * (log_t - log_p)).sum(-1),
        "reverse": (p * (log_p - log_t)).sum(-1),
        "jensen_shannon": ((t * (log_t - mixed)).sum(-1) + (p * (log_p - mixed)).sum(-1)) / 2,
    }[direction]
    torch.testing.assert_close(ours, theirs)
    outer = torch.linspace(-1, 1, 13)
    inputs = (hidden, unembedding)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
def test_a_cached_teacher_bounds_the_live_one_from_below(direction: Direction) -> None:
    hidden, unembedding, _ = problem()
    whole = chunked_kl(hidden, unembedding, live(), direction=direction).detach()
    log_t, _ = log_distributions()
    before = torch.zeros(13)
    for count in (2, 6, 10):
        top = log_t.topk(count)
        part = chunked_kl(hidden, unembedding, CachedTeacher(top.indices, top.values), direction=direction, chunk=5)
        assert (part <= whole + 1e-5).all()
        assert (part >= before - 1e-5).all()
        before = part.detach()
    torch.testing.assert_close(before, whole, rtol=1e-3, atol=1e-4)  # ten of eleven tokens leave one in the rest


def test_a_cached_teacher_by_hand() -> None:
    # stored: token 0 with 0.5; the policy is even over 4: 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75)
    teacher = CachedTeacher(torch.tensor([[0]]), torch.tensor([[0.5]]).log())
    value = chunked_kl(torch.zeros(1, 2), torch.ones(4, 2), teacher)
    torch.testing.assert_close(value, torch.tensor([0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)]))


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    hidden, unembedding, _ = problem()
    with pytest.raises(ValueError, match="one vocabulary"):
        chunked_kl(hidden, unembedding, LiveTeacher(torch.zeros(13, 3), torch.zeros(12, 3)))
    with pytest.raises(ValueError, match="12 positions"):
        chunked_kl(hidden, unembedding, LiveTeacher(torch.zeros(12, 3), torch.zeros(11, 3)))
    stored = CachedTeacher(torch.full((13, 1), 11), torch.full((13, 1), -1.0))
    with pytest.raises(ValueError, match="token 11 of 11"):
        chunked_kl(hidden, unembedding, stored)
    with pytest.raises(ValueError, match="stored at temperature 1"):
        chunked_kl(hidden, unembedding, stored, temperature=2.0)


def test_a_product_is_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "ROWS_ADDED", 3)
    left, right = torch.arange(8.0).view(8, 1).bfloat16(), torch.tensor([[1.0, 2.0]]).bfloat16()
    total = torch.full((8, 2), 1000.25)
    logprobs.add_product(total, left, right)
    # row i: 1000.25 + i (1, 2); a bfloat16 total could not hold the quarter
    assert total.tolist() == [[1000.25 + i, 1000.25 + 2 * i] for i in range(8)]
