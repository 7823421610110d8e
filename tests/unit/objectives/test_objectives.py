"""Objectives: ablations, invariances of their own, and what they refuse. Hand-computed values are in tests/golden."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from upweight.core.errors import Refusal, UserError
from upweight.core.identity import canonical_json
from upweight.core.packing import lay, strip
from upweight.core.records import Completion
from upweight.model.divergence import CachedTeacher
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.objectives.dpd import Dpd, EncodedPair, pair_batch, token_kl
from upweight.objectives.grpo import Grpo, RolloutBatch, Sampled, group_advantages

SHAPE = ModelConfig(vocab_size=20, width=16, layers=1, heads=2, kv_heads=1, ffn=32)
PAIRS = [
    EncodedPair((1, 2), (3, 4, 5), (6,), -9.0, -3.0),
    EncodedPair((7,), (8,), (9, 10, 11, 12), -3.0, -12.0),
    EncodedPair((1, 2, 3), (4, 5), (5, 4), -6.0, -6.0),
]


def model(seed: int) -> Transformer:
    made = make_model(SHAPE, seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def test_dpd_is_the_sum_of_its_parts() -> None:
    policy, teacher, batch = model(0), model(1), pair_batch(PAIRS, 16)
    parts = [
        Dpd(teacher, sequence=s, positive=p, negative=n)
        for s, p, n in [(2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 0.5)]
    ]
    summed = sum(float(part(policy, batch).total) for part in parts)
    whole = Dpd(teacher, sequence=2.0, positive=3.0, negative=0.5)(policy, batch)
    assert float(whole.total) == pytest.approx(summed, rel=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dpds_divergence_is_that_of_the_logits(direction: str, temperature: float) -> None:
    policy, teacher, batch = model(0), model(1), pair_batch(PAIRS, 16)
    options = {"direction": direction, "temperature": temperature}
    objective = Dpd(teacher, sequence=0.0, normalise="sequence", **options)  # type: ignore[arg-type]
    loss = objective(policy, batch)
    sequences = batch.sequences
    logits = [m.logits(sequences.read_by(m)) for m in (teacher, policy)]
    for name, members in (("positive", batch.chosen), ("negative", batch.rejected)):
        expected = 0.0
        for number in members:
            response = (sequences.segments == number) & (sequences.weights > 0)
            expected += float(token_kl(logits[0], logits[1], response, **options).sum())  # type: ignore[arg-type]
        assert float(loss.terms[name].total) == pytest.approx(expected, rel=1e-4)


def test_dpds_gradient_is_that_of_the_equation() -> None:
    policy, teacher, batch = model(0), model(1), pair_batch(PAIRS, 16)
    Dpd(teacher)(policy, batch).total.backward()
    found = {
        name: parameter.grad.clone() for name, parameter in policy.named_parameters() if parameter.grad is not None
    }
    policy.zero_grad()
    total = torch.zeros(())
    for pair in PAIRS:
        sums = []
        for response in (pair.chosen, pair.rejected):
            row = torch.tensor([[*pair.prompt, *response]])
            start = len(pair.prompt) - 1
            with torch.no_grad():
                log_t = teacher.logits(teacher(row))[0, start:-1].log_softmax(-1)
            log_p = policy.logits(policy(row))[0, start:-1].log_softmax(-1)
            sums.append(log_p.gather(1, torch.tensor(response)[:, None]).sum())
            total = total + (log_t.exp() * (log_t - log_p)).sum(-1).mean()
        margin = (sums[0] - pair.reference_chosen) - (sums[1] - pair.reference_rejected)
        total = total - torch.nn.functional.logsigmoid(0.1 * margin)
    total.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(found[name], parameter.grad, atol=1e-5), name


def test_a_cached_teacher_with_the_whole_vocabulary_is_the_live_one() -> None:
    policy, teacher, batch = model(0), model(1), pair_batch(PAIRS, 16)
    sequences = batch.sequences
    with torch.no_grad():
        hidden = sequences.read_by(teacher)[sequences.weights > 0]
        stored = teacher.logits(hidden).log_softmax(-1).topk(19)  # all but one token: the rest is that one
    live = Dpd(teacher)(policy, batch)
    cached = Dpd()(policy, replace(batch, cached=CachedTeacher(stored.indices, stored.values)))
    assert float(cached.total) == pytest.approx(float(live.total), rel=1e-4)


def test_dpd_settings() -> None:
    canonical_json(Dpd(model(1)).identity())  # the teacher is no part of it
    with pytest.raises(UserError, match="one has to be above"):
        Dpd(sequence=0.0, positive=0.0, negative=0.0)
    with pytest.raises(UserError, match="beta 0"):
        Dpd(beta=0.0)


def sampled(policy: Transformer, prompt: tuple[int, ...], tokens: tuple[int, ...], shift: float = 0.0) -> Completion:
    row = torch.tensor([[*prompt, *tokens]])
    log_p = policy.logits(policy(row))[0, len(prompt) - 1 : -1].log_softmax(-1)
    logprobs = log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0] + shift
    return Completion(tokens, tuple(logprobs.tolist()), "", "end", "test")


def test_on_policy_grpo_is_the_policy_gradient_and_logs_no_difference() -> None:
    policy = model(0)
    items = [((1, 2), sampled(policy, (1, 2), (3, 4)), 0.5), ((1, 2), sampled(policy, (1, 2), (5,)), -0.5)]
    loss = sum(batch.weight for batch in [Grpo()(policy, b) for b in Grpo().batches(items, row_tokens=64)])
    assert float(loss) == 3
    (batch,) = Grpo().batches(items, row_tokens=64)
    made = Grpo()(policy, batch)
    assert float(made.maxima["logprob_difference"]) < 1e-5
    assert float(made.terms["clip_share"].total) == 0
    assert float(made.total) == pytest.approx(-(2 * 0.5 - 0.5), rel=1e-4)  # ratios of 1
    made.total.backward()
    found = policy.embedding.weight.grad
    assert found is not None
    kept = found.clone()
    policy.zero_grad()
    gradient = torch.zeros(())
    for prompt, completion, advantage in items:
        row = torch.tensor([[*prompt, *completion.tokens]])
        log_p = policy.logits(policy(row))[0, len(prompt) - 1 : -1].log_softmax(-1)
        gradient = gradient - advantage * log_p.gather(1, torch.tensor(completion.tokens)[:, None]).sum()
    gradient.backward()
    assert policy.embedding.weight.grad is not None
    assert torch.allclose(kept, policy.embedding.weight.grad, atol=1e-4)


def test_a_sampler_that_disagrees_is_refused_with_the_figure() -> None:
    policy = model(0)
    items = [((1, 2), sampled(policy, (1, 2), (3, 4), shift=0.3), 0.5)]
    (fresh,) = Grpo().batches(items, row_tokens=64)
    with pytest.raises(Refusal, match=r"differ by 0\.3000 nats .* mismatch_bound 0\.1"):
        Grpo()(policy, fresh)
    Grpo(mismatch_bound=0.4)(policy, fresh)
    (stale,) = Grpo().batches(items, row_tokens=64, fresh=False)
    assert float(Grpo()(policy, stale).maxima["logprob_difference"]) == pytest.approx(0.3, abs=1e-4)
    # a temperature that the objective is not told of is such a disagreement
    with pytest.raises(Refusal, match="temperature"):
        Grpo(temperature=0.3)(policy, Grpo().batches([((1,), sampled(policy, (1,), (3, 4, 5)), 1.0)], row_tokens=9)[0])
    nan = replace(fresh, logprobs=fresh.logprobs * math.nan)
    with pytest.raises(Refusal):
        Grpo()(policy, nan)


def test_rollouts_become_microbatches() -> None:
    policy = model(0)
    items = [((1, 2), sampled(policy, (1, 2), (3,) * n), float(n)) for n in (1, 2, 3, 4, 5)]
    batches = Grpo().batches(items, row_tokens=8, share_prompts=False)
    assert sum(batch.token_count for batch in batches) == 10 + 15
    assert all(batch.token_count <= 8 for batch in batches)
    for batch in batches:
        for row, column in (batch.sequences.weights > 0).nonzero().tolist():
            sequence = int(batch.sequences.segments[row, column])
            n = int(batch.advantages[sequence])  # an advantage of n marks the completion of n tokens
            assert (batch.sequences.segments == sequence).sum() == 2 + n
    # neighbours share: the first two take 1 + (1 + 1) + (1 + 2) = 6 places; with the third it would be 10
    shared = Grpo().batches(items, row_tokens=8)
    assert sum(batch.token_count for batch in shared) == 6 + 5 + 6 + 7
    assert all(batch.token_count <= 8 for batch in shared)
    assert sum(float(batch.sequences.weights.sum()) for batch in shared) == 15
    silent = Completion((1,), (), "", "end", "some endpoint")
    with pytest.raises(UserError, match="'some endpoint' has no log-probabilities"):
        Grpo().batches([((1,), silent, 1.0)], row_tokens=8)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_completions_of_no_advantage_count_and_are_not_read(normalise: str) -> None:
    policy, objective = model(0), Grpo(normalise=normalise)  # type: ignore[arg-type]
    prompts = [(1, 2), (1, 2), (5, 6), (5, 6)]
    made = [sampled(policy, prompt, (3,) * n, 0.05) for n, prompt in enumerate(prompts, start=1)]
    items: list[Sampled] = [
        (*one, value) for one, value in zip(zip(prompts, made, strict=True), (0.5, -0.5, 0.0, 0.0), strict=True)
    ]
    (batch,) = objective.batches(items, row_tokens=64)
    assert batch.token_count == 1 + (1 + 1) + (1 + 2)
    found = objective(policy, batch)
    # as though they had been read: what is divided by is over all four of 1, 2, 3 and 4 tokens
    strips = [strip((*p, *c.tokens), [0.0, 0.0, *[1.0] * len(c.tokens)]) for p, c in zip(prompts, made, strict=True)]
    known = [strip((*p, *c.tokens), [0.0, 0.0, *c.logprobs]) for p, c in zip(prompts, made, strict=True)]
    rows = [[index] for index in range(4)]
    read = RolloutBatch(
        lay(strips, rows), torch.tensor([0.5, -0.5, 0, 0]), lay(known, rows).weights, torch.zeros(4, dtype=torch.bool)
    )
    expected = objective(policy, read)
    assert float(found.weight) == float(expected.weight) == (10 if normalise == "token" else 4)
    assert float(found.total) == pytest.approx(float(expected.total), rel=1e-5)
    for name, term in expected.terms.items():
        assert float(found.terms[name].total) == pytest.approx(float(term.total), rel=1e-4, abs=1e-6), name
        assert float(found.terms[name].weight) == float(term.weight), name
    # where no completion has one, nothing is read, and the weight is still that of all
    (idle,) = objective.batches(items[2:], row_tokens=64)
    nothing = objective(policy, idle)
    assert idle.token_count == 0
    assert (float(nothing.total), float(nothing.weight)) == (0, 7 if normalise == "token" else 2)


def test_group_advantages_refuse_what_is_not_finite() -> None:
    with pytest.raises(UserError, match="not all finite"):
        group_advantages([1.0, math.nan])
    assert group_advantages(torch.tensor([2.0, 4.0])).tolist() == [-1, 1]
    assert group_advantages([1.0], truncated=[True], truncated_in_baseline=False).tolist() == [0]


def test_rewards_that_agree_give_no_advantage_at_all() -> None:
    # whatever their value: 0.1 three times is 0.30000001 in float32, and a third of that is not 0.1
    for reward, count in itertools.product((0.1, 0.3, 0.7, 1 / 3, 1e8 + 1), range(1, 24)):
        assert group_advantages([reward] * count).tolist() == [0] * count
        assert group_advantages([reward] * count, divide_by_spread=True).tolist() == [0] * count
    # also where only those that count agree
    mixed = group_advantages([0.3, 0.3, 0.3, 0.0], truncated=[False] * 3 + [True], truncated_in_baseline=False)
    assert mixed.tolist() == [0] * 4


def test_what_an_error_cut_off_is_not_trained_on() -> None:
    policy = model(0)
    whole, broken = sampled(policy, (1, 2), (3, 4)), replace(sampled(policy, (1, 2), (5,)), stop="error")
    for mask in (True, False):
        (batch,) = Grpo(mask_truncated=mask).batches([((1, 2), whole, 0.5), ((1, 2), broken, -0.5)], row_tokens=64)
        assert float(Grpo()(policy, batch).weight) == 2


def test_truncated_weights_are_those_of_the_equation() -> None:
    policy = model(0)
    items = [((1, 2), sampled(policy, (1, 2), (3, 4), shift=-2.0), 0.5), ((1,), sampled(policy, (1,), (5,), 0.3), -1.0)]
    objective = Grpo(off_policy="truncate", truncation=2.0)
    (batch,) = objective.batches(items, row_tokens=64, fresh=False)
    loss = objective(policy, batch)
    # the sampler's log-probabilities are 2 too low, so the ratio e^2 = 7.4 counts as 2; e^-0.3 = 0.741 counts as it is
    assert float(loss.terms["clip_share"].total) == 2
    assert float(loss.maxima["largest_ratio"]) == pytest.approx(math.exp(2), rel=1e-3)
    # KL(sampler || policy) by ratio - 1 - log ratio: 2 (e^2 - 1 - 2) + (e^-0.3 - 1 + 0.3)
    assert float(loss.terms["sampler_kl"].total) == pytest.approx(
        2 * (math.exp(2) - 3) + math.exp(-0.3) - 0.7, rel=1e-3
    )
    loss.total.backward()
    assert policy.embedding.weight.grad is not None
    found = policy.embedding.weight.grad.clone()
    policy.zero_grad()
    expected = torch.zeros(())
    for (prompt, completion, advantage), weight in zip(items, (2.0, math.exp(-0.3)), strict=True):
        row = torch.tensor([[*prompt, *completion.tokens]])
        log_p = policy.logits(policy(row))[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected - weight * advantage * log_p.gather(1, torch.tensor(completion.tokens)[:, None]).sum()
    expected.backward()
    assert torch.allclose(found, policy.embedding.weight.grad, atol=1e-4)
    with pytest.raises(UserError, match="at least 1"):
        Grpo(off_policy="truncate", truncation=0.5)


def test_tokens_that_a_tool_wrote_are_read_and_never_trained() -> None:
    policy = model(0)
    whole = sampled(policy, (1, 2), (3, 4, 5, 6, 7))
    wrote = (True, True, False, False, True)
    (masked,) = Grpo().batches([((1, 2), whole, 1.0, wrote)], row_tokens=64)
    loss = Grpo()(policy, masked)
    assert float(loss.weight) == 3
    assert masked.token_count == 7
    # neighbours that share a prompt keep their masks
    pair = [((1, 2), whole, 1.0, wrote), ((1, 2), sampled(policy, (1, 2), (8, 9)), -1.0)]
    (shared,) = Grpo().batches(pair, row_tokens=64)
    assert float(Grpo()(policy, shared).weight) == 5
    loss.total.backward()
    assert policy.embedding.weight.grad is not None
    found = policy.embedding.weight.grad.clone()
    policy.zero_grad()
    log_p = policy.logits(policy(torch.tensor([[1, 2, 3, 4, 5, 6, 7]])))[0].log_softmax(-1)
    (-(log_p[1, 3] + log_p[2, 4] + log_p[5, 7])).backward()
    assert torch.allclose(found, policy.embedding.weight.grad, atol=1e-4)
