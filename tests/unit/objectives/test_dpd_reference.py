"""DPD, its gradient and its ablations against a reference in float64: one sequence at a time, with all logits."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from upweight.model.config import ModelConfig
from upweight.model.divergence import CachedTeacher, Direction
from upweight.model.transformer import Transformer, make_model
from upweight.objectives.dpd import Dpd, EncodedPair, PairBatch, pair_batch

VOCABULARY = 23
PAIRS = [
    EncodedPair((1, 2, 3), (4, 5), (6, 7, 8, 9), -5.25, -11.5),
    EncodedPair((2,), (9, 9, 1, 4, 4, 22), (3,), -16.125, -3.0),
    EncodedPair((5, 6), (7, 8, 10), (7, 8, 11), -8.75, -9.0),
    EncodedPair((20, 1, 0, 3), (12,), (13, 14), -2.5, -6.0),
]
ABLATIONS = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
DIRECTIONS: list[Direction] = ["forward", "reverse", "jensen_shannon"]


def model(seed: int, width: int = 16) -> Transformer:
    made = make_model(ModelConfig(vocab_size=VOCABULARY, width=width, layers=2, heads=2, kv_heads=1, ffn=32), seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.0)
    return made.double()


def logits_along(of: Transformer, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    row = torch.tensor([[*prompt, *response]])
    return (of(row)[0, len(prompt) - 1 : -1] @ of.unembedding.t())[: len(response)]


def reference(
    policy: Transformer,
    teacher: Transformer,
    pairs: Sequence[EncodedPair],
    weights: tuple[float, float, float],
    *,
    beta: float = 0.1,
    direction: str = "forward",
    temperature: float = 1.0,
    normalise: str = "token",
) -> Tensor:
    """The equation, term by term: mean over the pairs."""
    losses = []
    for pair in pairs:
        likelihood, divergence = [], []
        for response in (pair.chosen, pair.rejected):
            z = logits_along(policy, pair.prompt, response)
            with torch.no_grad():
                z_t = logits_along(teacher, pair.prompt, response)
            chosen = torch.softmax(z, -1)[torch.arange(len(response)), torch.tensor(response)]
            likelihood.append(torch.log(chosen).sum())
            p, t = torch.softmax(z / temperature, -1), torch.softmax(z_t / temperature, -1)
            if direction == "forward":
                d = (t * torch.log(t / p)).sum(-1)
            elif direction == "reverse":
                d = (p * torch.log(p / t)).sum(-1)
            else:
                m = (p + t) / 2
                d = ((t * torch.log(t / m)).sum(-1) + (p * torch.log(p / m)).sum(-1)) / 2
            divergence.append(d.mean() if normalise == "token" else d.sum())
        margin = (likelihood[0] - pair.reference_chosen) - (likelihood[1] - pair.reference_rejected)
        dpo = torch.log1p(torch.exp(-beta * margin))
        losses.append(weights[0] * dpo + weights[1] * divergence[0] + weights[2] * divergence[1])
    return torch.stack(losses).mean()


def gradients(policy: Transformer, loss: Tensor) -> list[Tensor]:
    policy.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def compared(objective: Dpd, policy: Transformer, batches: Sequence[PairBatch], expected: Tensor) -> None:
    wanted = gradients(policy, expected)
    parts = [objective(policy, batch) for batch in batches]
    weight = sum(float(part.weight) for part in parts)
    assert weight == len(PAIRS)
    found = torch.stack([part.total for part in parts]).sum() / weight
    assert found.dtype == torch.float64
    assert abs(found.item() - expected.item()) < 1e-9
    ours = gradients(policy, found)
    assert len(ours) == len(wanted)
    assert max(float((one - other).abs().max()) for one, other in zip(ours, wanted, strict=True)) < 1e-9


@pytest.mark.parametrize("weights", [*ABLATIONS, (1.0, 1.0, 1.0), (0.7, 1.3, 0.4)])
def test_every_ablation_is_its_textbook_loss(weights: tuple[float, float, float]) -> None:
    policy, teacher = model(0), model(5, 24)
    objective = Dpd(teacher, sequence=weights[0], positive=weights[1], negative=weights[2], beta=0.3)
    expected = reference(policy, teacher, PAIRS, weights, beta=0.3)
    compared(objective, policy, [pair_batch(PAIRS, 64)], expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("temperature", "normalise"), [(1.0, "token"), (1.0, "sequence"), (1.7, "token")])
def test_every_open_choice(direction: Direction, temperature: float, normalise: str) -> None:
    policy, teacher = model(0), model(5, 24)
    objective = Dpd(teacher, direction=direction, temperature=temperature, normalise=normalise)  # type: ignore[arg-type]
    expected = reference(
        policy, teacher, PAIRS, (1, 1, 1), direction=direction, temperature=temperature, normalise=normalise
    )
    compared(objective, policy, [pair_batch(PAIRS, 64)], expected)


def test_order_padding_packing_and_accumulation_change_nothing() -> None:
    policy, teacher = model(0), model(5, 24)
    objective, expected = Dpd(teacher), reference(model(0), teacher, PAIRS, (1, 1, 1))
    for batches in (
        [pair_batch(PAIRS[::-1], 64)],
        [pair_batch(PAIRS, 1, share_prompts=False)],  # a row for each sequence, padded to the longest
        [pair_batch(PAIRS, 1000, share_prompts=False)],  # all in one row
        [pair_batch([pair], 64) for pair in PAIRS],
        [pair_batch(PAIRS[:3], 8, share_prompts=False), pair_batch(PAIRS[3:], 40)],
    ):
        parts = [objective(policy, batch) for batch in batches]
        found = sum(float(part.total) for part in parts) / sum(float(part.weight) for part in parts)
        assert abs(found - float(expected)) < 1e-9


def test_small_chunks_and_kept_logits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, teacher = model(0), model(5, 24)
    for kept, chunk in ((0, 4 * VOCABULARY * 3), (1 << 20, 4 * VOCABULARY * 3), (0, 1 << 20)):
        monkeypatch.setattr("upweight.model.logprobs.KEPT_LOGITS", kept)
        monkeypatch.setattr("upweight.model.logprobs.CHUNK_LOGITS", chunk)
        expected = reference(policy, teacher, PAIRS, (1, 1, 1), temperature=1.5)
        compared(Dpd(teacher, temperature=1.5), policy, [pair_batch(PAIRS, 64)], expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_stored_teacher_merges_what_it_did_not_keep(direction: Direction) -> None:
    policy, teacher = model(0), model(5, 24)
    batch = pair_batch(PAIRS, 64)
    sequences = batch.sequences
    with torch.no_grad():
        hidden = sequences.read_by(teacher)[sequences.weights > 0]
        log_t = (hidden @ teacher.unembedding.t()).log_softmax(-1)
    top = log_t.topk(5)
    rest = (1 - top.values.exp().sum(-1)).log()
    stored = PairBatch(
        sequences, batch.chosen, batch.rejected, batch.reference, CachedTeacher(top.indices, top.values, 1.0, rest)
    )
    objective = Dpd(direction=direction, normalise="sequence")
    expected = torch.zeros((), dtype=torch.float64)
    policy_hidden = sequences.read_by(policy)[sequences.weights > 0]
    p = torch.softmax(policy_hidden @ policy.unembedding.t(), -1)
    for place in range(len(p)):
        known = top.indices[place]
        other = torch.tensor([v for v in range(VOCABULARY) if v not in known.tolist()])
        q = torch.cat((p[place, known], p[place, other].sum()[None]))
        t = torch.cat((log_t[place, known].exp(), log_t[place, other].exp().sum()[None]))
        if direction == "forward":
            expected = expected + (t * torch.log(t / q)).sum()
        elif direction == "reverse":
            expected = expected + (q * torch.log(q / t)).sum()
        else:
            m = (q + t) / 2
            expected = expected + ((t * torch.log(t / m)).sum() + (q * torch.log(q / m)).sum()) / 2
    wanted = gradients(policy, expected)
    loss = Dpd(direction=direction, normalise="sequence", sequence=0.0)(policy, stored)
    assert abs(float(loss.total) - float(expected)) < 1e-9
    ours = gradients(policy, loss.total)
    assert max(float((one - other).abs().max()) for one, other in zip(ours, wanted, strict=True)) < 1e-9
    # a lower bound of the whole divergence, never taken for it: what was left out is logged
    whole = Dpd(teacher, direction=direction, normalise="sequence")(policy, batch)
    sparse = objective(policy, stored)
    for name in ("positive", "negative"):
        assert float(sparse.terms[name].total) < float(whole.terms[name].total)
    tail = sparse.terms["teacher_tail"]
    assert math.isclose(float(tail.total / tail.weight), float(rest.exp().mean()), rel_tol=1e-9)
    assert "teacher_tail" not in whole.terms
    assert abs(float(sparse.terms["dpo"].total) - float(whole.terms["dpo"].total)) < 1e-9


def test_the_taught_share_is_over_all_tokens_however_a_step_is_cut() -> None:
    policy, teacher = model(0), model(5, 24)

    def part(pairs: Sequence[EncodedPair], untaught: int) -> dict[str, tuple[float, float]]:
        batch = pair_batch(pairs, 64)
        with torch.no_grad():
            hidden = batch.sequences.read_by(teacher)[batch.sequences.weights > 0]
            top = (hidden @ teacher.unembedding.t()).log_softmax(-1).topk(5)
        taught = torch.arange(len(hidden)) >= untaught
        cached = CachedTeacher(top.indices[taught], top.values[taught])
        members = batch.sequences, batch.chosen, batch.rejected, batch.reference
        terms = Dpd()(policy, PairBatch(*members, cached, taught if untaught else None)).terms
        return {name: (float(term.total), float(term.weight)) for name, term in terms.items()}

    # responses of 2 + 4 and 6 + 1 tokens, of which three have no distribution
    first, second = part(PAIRS[:1], 0), part(PAIRS[1:2], 3)
    assert first.keys() == second.keys()  # or else processes that have one of the two could not add them up
    assert (first["taught"], second["taught"]) == ((6, 6), (4, 7))


def test_embeddings_that_are_padded_differently_are_compared_over_the_tokenizer_s_tokens() -> None:
    policy = model(0)
    wide = make_model(ModelConfig(vocab_size=VOCABULARY + 9, width=24, layers=2, heads=2, kv_heads=1, ffn=32), 5)
    wide = wide.double()
    cut = model(5, 24)
    cut.load_state_dict(
        {name: value[:VOCABULARY] if "embedding" in name else value for name, value in wide.state_dict().items()}
    )
    batch = pair_batch(PAIRS, 64)
    expected = Dpd(cut)(policy, batch)
    found = Dpd(wide, vocabulary=VOCABULARY)(policy, batch)
    assert abs(float(found.total) - float(expected.total)) < 1e-9
    # and where it is the policy whose embedding has more rows: those beyond get no gradient from the divergence
    other = Dpd(policy, vocabulary=VOCABULARY, sequence=0.0)(wide, batch)
    other.total.backward()
    assert other.total.isfinite()
