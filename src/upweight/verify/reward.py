"""Which verifier judges, in plain values: a recipe, the gate, reinforcement and evaluation all say it alike.

A verifier may hold a warm sandbox or a reward model; `open_verifier` makes one for the length of a `with` block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.work import Machine
from upweight.model.heads import ScalarHead
from upweight.rollout.sandbox import Sandbox, SandboxLimits
from upweight.text.tokenizer import Tokenizer
from upweight.verify.answers import AnswerVerifier
from upweight.verify.code_tests import CodeVerifier
from upweight.verify.pairwise import PairwiseVerifier, RewardModelScorer


@dataclass(frozen=True)
class RewardConfig:
    """Attributes:
    kind: "answer" (equivalence with the reference answer), "code" (hidden tests in the sandbox) or "preference"
        (win rate within the group under the reward model of the input "reward").
    custom: a verifier of one's own, an instance of a frozen dataclass that implements Verifier; used instead of kind.
    limits: bounds of a program that the model wrote.
    """

    kind: Literal["answer", "code", "preference"] = "answer"
    custom: Verifier | None = None
    limits: SandboxLimits = field(default_factory=SandboxLimits)


@contextmanager
def open_verifier(config: RewardConfig, inputs: Mapping[str, Path], machine: Machine) -> Iterator[Verifier]:
    """The verifier that `config` asks for. Raises IsolationUnavailable where code cannot be run isolated."""
    if config.custom is not None:
        yield config.custom
    elif config.kind == "answer":
        yield AnswerVerifier()
    elif config.kind == "code":
        with Sandbox(workers=machine.workers, unsafe=machine.unsafe_execution) as pool:
            yield CodeVerifier(pool, limits=config.limits)
    else:
        if "reward" not in inputs:
            raise UserError(
                'reward kind "preference" needs an input named "reward": the artifact of a reward step. Add it to the '
                "inputs of this step"
            )
        source = inputs["reward"] / "model"
        head = ScalarHead.load(source, device=machine.device)
        yield PairwiseVerifier(RewardModelScorer(head, Tokenizer.load(source)))
