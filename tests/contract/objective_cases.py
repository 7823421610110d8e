"""One small training step for every objective, cut into microbatches in any way: what contract lines 1 and 2 run over.

A new objective has no case here until its author adds one, and test_01 fails until then.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import upweight.objectives
from upweight.core.packing import best_fit, lay, pack, strip
from upweight.core.protocols import Objective
from upweight.core.records import Completion
from upweight.core.work import Machine
from upweight.model.heads import ScalarHead
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.objectives.bradley_terry import BradleyTerry, RankedBatch
from upweight.objectives.dpd import Dpd, EncodedPair, PairBatch, pair_batch
from upweight.objectives.grpo import Grpo
from upweight.objectives.next_token import NextToken
from upweight.objectives.tag_scores import UNSCORED, TagBatch, TagScores
from upweight.train.loader import Loader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Setting, constant
from upweight.train.trainer import StepReport, train

VOCABULARY = 40


@dataclass(frozen=True)
class Case:
    """An objective with the parts of one step.

    Attributes:
        make: turns some of the items into one microbatch whose rows have at most (about) so many tokens.
    """

    objective: Objective
    policy: Callable[[], nn.Module]
    items: Sequence[Any]
    make: Callable[[Sequence[Any], int], Any]


class OneStep(Loader):
    """Hands out the given microbatches as one step."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self._steps = batches, 0

    @property
    def consumed(self) -> int:
        return self._steps

    def next(self, setting: Setting) -> Sequence[Any]:
        self._steps += 1
        return self.batches

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]


def small(seed: int = 0, width: int = 16) -> Transformer:
    model = make_model(ModelConfig(vocab_size=VOCABULARY, width=width, layers=2, heads=2, kv_heads=1, ffn=32), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # far enough from the start that losses are not all the same
    return model


def scorer() -> ScalarHead:
    model = ScalarHead(small())
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


class Tagger(nn.Module):
    """Features to [document dimension score]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3 * 10)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(2))

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features).unflatten(-1, (3, 10))


def _tokens(random: np.random.Generator, least: int, most: int) -> tuple[int, ...]:
    return tuple(int(token) for token in random.integers(0, VOCABULARY, int(random.integers(least, most))))


def _next_token() -> tuple[Sequence[Any], Callable[[Sequence[Any], int], Any]]:
    random = np.random.default_rng(0)
    items = []
    for _ in range(8):
        tokens = _tokens(random, 3, 20)
        items.append((tokens, [0.0] + [float(random.random() < 0.7) for _ in tokens[1:]]))
    return items, lambda chosen, row: pack([strip(*item) for item in chosen], row)


def _pairs() -> list[EncodedPair]:
    random = np.random.default_rng(1)
    return [
        EncodedPair(_tokens(random, 2, 6), _tokens(random, 1, 12), _tokens(random, 1, 12), -8.0 - n, -9.0 + n)
        for n in range(8)
    ]


def _completions(group: int = 1) -> list[tuple[tuple[int, ...], Completion, float]]:
    """Eight completions, `group` of each prompt."""
    random = np.random.default_rng(2)
    items = []
    for number in range(8):
        prompt = items[-1][0] if number % group else _tokens(random, 2, 6)
        tokens = _tokens(random, 2, 12)
        logprobs = tuple(float(value) for value in random.uniform(-4.2, -3.2, len(tokens)))
        completion = Completion(tokens, logprobs, "", "end", "test")
        items.append((prompt, completion, (number % 3 - 1.0) / 2))
    return items


def _rollouts(chosen: Sequence[Any], row: int) -> Any:
    return Grpo().batches(chosen, row_tokens=10_000, fresh=False)[0] if row > 64 else _narrow(chosen, row)


def _narrow(chosen: Sequence[Any], row: int) -> Any:
    """The same rollouts in rows of another width, each completion with a prompt of its own."""
    (batch,) = Grpo().batches(chosen, row_tokens=10_000, fresh=False)
    parts, sampled = [], []
    for prompt, completion, _ in chosen:
        marks = [0.0] * len(prompt) + [1.0] * len(completion.tokens)
        parts.append(strip((*prompt, *completion.tokens), marks))
        sampled.append(strip((*prompt, *completion.tokens), [0.0] * len(prompt) + list(completion.logprobs)))
    rows = best_fit([len(part.tokens) for part in parts], max(row, *(len(part.tokens) for part in parts)))
    advantages = torch.tensor([float(item[2]) for item in chosen])
    return type(batch)(
        lay(parts, rows, row + 40),
        advantages,
        lay(sampled, rows, row + 40).weights,
        torch.zeros(len(chosen), dtype=torch.bool),
        False,
    )


def _alone(chosen: Sequence[EncodedPair], row: int) -> PairBatch:
    return pair_batch(chosen, row, share_prompts=False)


def _mixed(chosen: Sequence[EncodedPair], row: int) -> PairBatch:
    """Prompts shared in wide rows, and each member with a prompt of its own in narrow ones."""
    return pair_batch(chosen, row, share_prompts=row > 64)


def _ranked(chosen: Sequence[EncodedPair], row: int) -> RankedBatch:
    batch = _alone(chosen, row)
    return RankedBatch(batch.sequences, batch.chosen, batch.rejected)


def _tagged() -> list[tuple[Tensor, list[int]]]:
    random = np.random.default_rng(3)
    return [
        (torch.tensor(random.normal(size=6), dtype=torch.float32), [n, UNSCORED if n % 2 else 3, 9 - n])
        for n in range(8)
    ]


def _tag_batch(chosen: Sequence[Any], row: int) -> TagBatch:
    return TagBatch(torch.stack([features for features, _ in chosen]), torch.tensor([scores for _, scores in chosen]))


def cases() -> dict[str, Case]:
    """A case for every objective and every way in which it normalises."""
    documents, packed = _next_token()
    completions = _completions()
    return {
        "NextToken": Case(NextToken(), small, documents, packed),
        "NextToken z": Case(NextToken(z_loss=0.1), small, documents, packed),
        "Dpd": Case(Dpd(small(5, 24)), small, _pairs(), _alone),
        "Dpd sharing prompts": Case(Dpd(small(5, 24)), small, _pairs(), _mixed),
        "Dpd sums": Case(Dpd(small(5, 24), normalise="sequence", direction="reverse"), small, _pairs(), pair_batch),
        "Dpd on negatives": Case(Dpd(small(5), sequence=0.0, positive=0.0), small, _pairs(), pair_batch),
        "Grpo": Case(Grpo(), small, completions, _rollouts),
        "Grpo sharing prompts": Case(Grpo(), small, _completions(group=4), _rollouts),
        "Grpo by sequence": Case(Grpo(normalise="sequence"), small, completions, _rollouts),
        "Grpo off-policy": Case(Grpo(off_policy="truncate"), small, completions, _rollouts),
        "Grpo tempered": Case(Grpo(temperature=0.7, top_p=0.9), small, completions, _rollouts),
        "BradleyTerry": Case(BradleyTerry(centre=0.01), scorer, _pairs(), _ranked),
        "TagScores": Case(TagScores(), Tagger, _tagged(), _tag_batch),
    }


def all_objectives() -> set[str]:
    """The names of every objective class in the package."""
    names = set()
    for module in pkgutil.iter_modules(upweight.objectives.__path__, "upweight.objectives."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Objective) and value is not Objective:
                names.add(value.__name__)
    return names


def one_step(
    case: Case,
    batches: Sequence[Any],
    policy: nn.Module | None = None,
    kind: Literal["adamw", "muon"] = "adamw",
    machine: Machine | None = None,
) -> tuple[StepReport, dict[str, Tensor]]:
    """Train one step on `batches` and return the report and the weights after it.

    AdamW with an epsilon of 1 moves a weight by about its gradient, so weights that agree had gradients that agree.
    """
    model = policy or case.policy()
    optimizer = OptimizerConfig(kind=kind, epsilon=1.0, clip_norm=0.0)
    steps = train(
        model,
        objective=case.objective,
        loader=OneStep(batches),
        timeline=constant(total=1, lr=1.0),
        optimizer=optimizer,
        machine=machine,
    )
    (report,) = steps
    return report, {name: value.detach().clone() for name, value in model.state_dict().items()}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of any two weights."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)
