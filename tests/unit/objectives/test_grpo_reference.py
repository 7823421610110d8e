"""GRPO's loss and gradient against a reference in float64: a completion at a time, token by token."""

import itertools
import random
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from upweight.core.errors import UserError
from upweight.core.records import Completion
from upweight.model.config import ModelConfig
from upweight.model.transformer import Transformer, make_model
from upweight.objectives.grpo import Grpo, group_advantages

VOCABULARY = 23
WHOLE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
CUT = {"temperature": 0.7, "top_p": 0.9, "top_k": 12, "min_p": 0.02}


class Sample(NamedTuple):
    tokens: tuple[int, ...]
    reward: float
    cut_off: bool
    shifts: tuple[float, ...]  # of the sampler's log-probabilities against the policy's


CUT_OFF = {(0, 1), (1, 0), (1, 3)}


def groups() -> list[tuple[tuple[int, ...], list[Sample]]]:
    """Three problems of four completions: rewards of any value, ratios on both sides of both clips, some cut off."""
    chance = random.Random(5)
    made = []
    for problem in range(3):
        samples = []
        for place in range(4):
            tokens = tuple(chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 6)))
            shifts = tuple(chance.uniform(-1.2, 0.6) for _ in tokens)
            samples.append(Sample(tokens, round(chance.random(), 2), (problem, place) in CUT_OFF, shifts))
        made.append((tuple(chance.randrange(VOCABULARY) for _ in range(problem + 1)), samples))
    return made


GROUPS = groups()


def logprobs(policy: Transformer, prompt: Sequence[int], tokens: Sequence[int], shape: dict[str, Any]) -> list[Tensor]:
    """log p of each token under the tempered and truncated distribution; a token that was sampled counts as kept."""
    row = torch.tensor([[*prompt, *tokens]])
    logits = policy(row)[0, len(prompt) - 1 : -1] @ policy.unembedding.t() / shape["temperature"]
    found = []
    for z, token in zip(logits, tokens, strict=True):
        ranked = sorted(range(VOCABULARY), key=lambda number: -z[number].item())
        kept = ranked[: shape["top_k"]] if shape["top_k"] else ranked
        shares, so_far = torch.softmax(z[kept].detach(), 0).tolist(), 0.0
        nucleus = []
        for number, share in zip(kept, shares, strict=True):
            if so_far < shape["top_p"]:
                nucleus.append(number)
            so_far += share
        likely = torch.exp(z - z.max()).detach().tolist()
        nucleus = [number for number in nucleus if likely[number] >= shape["min_p"]]
        found.append(z[token] - torch.logsumexp(z[sorted({*nucleus, token})], 0))
    return found


def reference(
    policy: Transformer,
    shape: dict[str, Any],
    *,
    normalise: str,
    divide: bool,
    in_baseline: bool,
    off_policy: str,
) -> Tensor:
    """arXiv 2503.14476, equations 8 and 9 without the sum over prompts' own divisions, cut-off completions masked."""
    terms: list[list[Tensor]] = []
    for prompt, samples in GROUPS:
        baseline = [one.reward for one in samples if in_baseline or not one.cut_off]
        for one in samples:
            if one.cut_off:
                continue
            advantage = one.reward - fmean(baseline)
            if divide:
                advantage = advantage / pstdev(baseline) if pstdev(baseline) else 0.0
            row = []
            for now, shift in zip(logprobs(policy, prompt, one.tokens, shape), one.shifts, strict=True):
                ratio = torch.exp(now - (now.detach() + shift))
                if off_policy == "truncate":
                    row.append(min(ratio.item(), 2.0) * advantage * now)
                else:
                    clipped = torch.clamp(ratio, 0.8, 1.28)
                    row.append(torch.min(ratio * advantage, clipped * advantage))
            terms.append(row)
    if normalise == "sequence":
        return -torch.stack([torch.stack(row).mean() for row in terms]).mean()
    return -torch.stack([term for row in terms for term in row]).mean()


@pytest.mark.parametrize(
    ("normalise", "divide", "in_baseline", "off_policy"),
    [
        *itertools.product(("token", "sequence"), (False, True), (True,), ("clip", "truncate")),
        ("token", False, False, "clip"),
        ("sequence", True, False, "clip"),
    ],
)
@pytest.mark.parametrize("shape", [WHOLE, CUT], ids=["whole", "truncated"])
def test_loss_and_gradient_are_those_of_the_equation(
    shape: dict[str, Any], normalise: Any, divide: bool, in_baseline: bool, off_policy: Any
) -> None:
    policy = make_model(ModelConfig(vocab_size=VOCABULARY, width=16, layers=2, heads=2, kv_heads=1, ffn=32), 3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(2.0)
    policy = policy.double()
    wanted = reference(
        policy, shape, normalise=normalise, divide=divide, in_baseline=in_baseline, off_policy=off_policy
    )
    wanted.backward()
    expected = {name: one.grad.clone() for name, one in policy.named_parameters() if one.grad is not None}
    policy.zero_grad()
    objective = Grpo(normalise=normalise, off_policy=off_policy, **shape)
    items = []
    for prompt, samples in GROUPS:
        advantages = group_advantages(
            [one.reward for one in samples],
            truncated=[one.cut_off for one in samples],
            truncated_in_baseline=in_baseline,
            divide_by_spread=divide,
        )
        for one, advantage in zip(samples, advantages, strict=True):
            with torch.no_grad():
                known = logprobs(policy, prompt, one.tokens, shape)
            sampled = [float(now) + shift for now, shift in zip(known, one.shifts, strict=True)]
            stop = "length" if one.cut_off else "end"
            items.append((prompt, Completion(one.tokens, tuple(sampled), "", stop, "p"), advantage))
    parts = [objective(policy, batch) for batch in objective.batches(items, row_tokens=16, fresh=False)]
    assert len(parts) > 1
    weight = sum(float(part.weight) for part in parts)
    whole = [one for _, samples in GROUPS for one in samples if not one.cut_off]
    assert 0 < len(whole) < 12
    assert weight == (len(whole) if normalise == "sequence" else sum(len(one.tokens) for one in whole))
    found = torch.stack([part.total for part in parts]).sum() / weight
    # rewards and the sampler's log-probabilities are held in float32
    assert found.item() == pytest.approx(wanted.item(), abs=2e-6)
    found.backward()
    for name, one in policy.named_parameters():
        if name in expected:
            assert one.grad is not None
            assert torch.allclose(one.grad, expected[name], atol=5e-6), name
    stopped = sum(float(part.terms["clip_share"].total) for part in parts)
    assert 0 < stopped < sum(len(one.tokens) for one in whole)  # both branches were taken


def test_what_cannot_be_trained_on_is_refused() -> None:
    untold = Completion((), (), "4", "end", "an endpoint")
    with pytest.raises(UserError, match="'an endpoint' has a text and no tokens"):
        Grpo().batches([((1, 2), untold, 1.0)], row_tokens=16)
    (batch,) = Grpo().batches([((1, 2), Completion((), (), "", "length", "no room"), 0.0)], row_tokens=16)
    assert batch.token_count == 0
    # with the types of arguments checked, as here by default, it is refused for its type
    with pytest.raises((UserError, TypeCheckError), match="normalise"):
        Grpo(normalise="sequences")  # type: ignore[arg-type]
