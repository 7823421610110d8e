"""Which verifier judges, in plain values: a recipe, the gate, reinforcement and evaluation all say it alike.

A verifier may hold a warm sandbox or a reward model; `open_verifier` makes one for the length of a `with` block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Sampler, Verifier
from upweight.core.records import Completion, Problem, Verdict
from upweight.core.work import Machine
from upweight.model.heads import ScalarHead
from upweight.model.precision import Precision
from upweight.rollout.local import open_local
from upweight.rollout.sandbox import Sandbox, SandboxLimits
from upweight.text.tokenizer import Tokenizer
from upweight.verify.answers import AnswerVerifier
from upweight.verify.code_tests import CodeVerifier
from upweight.verify.compose import Part, WeightedVerifier
from upweight.verify.guard import GuardedVerifier
from upweight.verify.gym import GymVerifier
from upweight.verify.judge import JudgeVerifier
from upweight.verify.pairwise import PairwiseVerifier, RewardModelScorer
from upweight.verify.python_agent import PythonAgentVerifier


@runtime_checkable
class Opener(Protocol):
    """What describes a sampler in plain values: an endpoint."""

    def open(self) -> Sampler: ...


Checkable = Literal["answer", "code", "gym"]


def kind_of(problem: Problem) -> Checkable:
    """How a problem is judged: as reasoning-gym does if it is from there, by its tests if it has any, by its answer."""
    if problem.check is not None:
        return "gym"
    return "code" if problem.tests else "answer"


class CheckVerifier(Verifier):
    """Hands each problem to the verifier of its kind, which is opened when it is first needed."""

    def __init__(self, opening: Callable[[Checkable], Verifier]) -> None:
        self._opening = opening
        self._opened: dict[Checkable, Verifier] = {}

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return self.of(kind_of(problem)).score(problem, group)

    def of(self, kind: Checkable) -> Verifier:
        """The verifier of that kind, to open it before work begins that needs it."""
        if kind not in self._opened:
            self._opened[kind] = self._opening(kind)
        return self._opened[kind]


@dataclass(frozen=True)
class Weighted:
    """One part of a mixture of rewards. `name` leads its reason."""

    name: str
    weight: float
    reward: "RewardConfig"


@dataclass(frozen=True)
class RewardConfig:
    """Attributes:
    kind: "answer" (equivalence with the reference answer), "code" (hidden tests in the sandbox), "gym" (the problem's
        own verifier of reasoning-gym), "check" (whichever of these three the problem has, for problems of several
        domains together), "agent" (the answer by rules first, then by a model that writes and runs
        checks), "preference" (win rate within the group under the reward model of the input "reward") or "judge" (win
        rate by a language model that is asked in both orders).
    custom: a verifier of one's own, an instance of a frozen dataclass that implements Verifier; used instead of kind.
        One that raises, hangs or gives what is no verdict ends the run and is named.
    limits: bounds of a program that the model wrote.
    partial: for "code", "gym" and "check", marks between 0 and 1 instead of all or nothing.
    mixture: a weighted sum of rewards, used instead of kind and custom. Weights that add up to 1 keep it in 0-1.
    only_if_right: the part of the mixture without whose score above 0 the others pay nothing.
    seconds: how long a custom verifier may take for one group.
    judge: who plays the agent or the judge: a sampler of plain values, or an endpoint's description; None takes the
        model of the input "judge".
    judge_limits: how it decodes a turn.
    judge_dtype: what the weights of the input "judge" are held in: "bfloat16" is what GPUs are made for.
    """

    kind: Literal["answer", "code", "gym", "check", "agent", "preference", "judge"] = "answer"
    custom: Verifier | None = None
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    partial: bool = False
    mixture: tuple[Weighted, ...] = ()
    only_if_right: str | None = None
    seconds: float = 600.0
    judge: Sampler | Opener | None = None
    judge_limits: Limits = Limits(max_new_tokens=2048, temperature=0.0)  # noqa: RUF009 - frozen
    judge_dtype: Precision = "float32"

    @property
    def relative(self) -> bool:
        """Whether it is the win rate within a group, which always averages 1/2, or has that as a part."""
        if self.mixture:
            return any(part.reward.relative for part in self.mixture)
        return self.kind in ("preference", "judge") and self.custom is None


@contextmanager
def open_verifier(config: RewardConfig, inputs: Mapping[str, Path], machine: Machine) -> Iterator[Verifier]:
    """The verifier that `config` asks for. Raises IsolationUnavailable where code cannot be run isolated."""
    if config.mixture:
        with ExitStack() as opened:
            parts = tuple(
                Part(one.name, opened.enter_context(open_verifier(one.reward, inputs, machine)), one.weight)
                for one in config.mixture
            )
            yield WeightedVerifier(parts, config.only_if_right)
    elif config.custom is not None:
        yield GuardedVerifier(config.custom, config.seconds)
    elif config.kind == "answer":
        yield AnswerVerifier()
    elif config.kind == "gym":
        yield GymVerifier(partial=config.partial, unsafe=machine.unsafe_execution)
    elif config.kind == "code":
        with Sandbox(workers=machine.workers, unsafe=machine.unsafe_execution) as pool:
            yield CodeVerifier(pool, limits=config.limits, partial=config.partial)
    elif config.kind == "check":
        with ExitStack() as opened:
            yield CheckVerifier(
                lambda kind: opened.enter_context(open_verifier(replace(config, kind=kind), inputs, machine))
            )
    elif config.kind == "agent":
        agent = _judge(config, inputs, machine)
        with Sandbox(workers=1, unsafe=machine.unsafe_execution) as pool:
            yield PythonAgentVerifier(
                agent, lambda code: pool.run(code, limits=config.limits), limits=config.judge_limits
            )
    elif config.kind == "judge":
        yield JudgeVerifier(_judge(config, inputs, machine), limits=config.judge_limits)
    else:
        if "reward" not in inputs:
            raise UserError(
                'reward kind "preference" needs an input named "reward": the artifact of a reward step. Add it to the '
                "inputs of this step"
            )
        source = inputs["reward"] / "model"
        head = ScalarHead.load(source, device=machine.device)
        yield PairwiseVerifier(RewardModelScorer(head, Tokenizer.load(source)))


def _judge(config: RewardConfig, inputs: Mapping[str, Path], machine: Machine) -> Sampler:
    """Who plays the agent or the judge. Raises UserError where nobody does."""
    if config.judge is not None:
        return config.judge if isinstance(config.judge, Sampler) else config.judge.open()
    if "judge" not in inputs:
        raise UserError(
            f'reward kind "{config.kind}" needs a language model: give the step an input named "judge", an artifact '
            "with a model, or name one in RewardConfig.judge"
        )
    # what does not fit its context leaves it undecided, and says so: one long answer must not end a run
    return open_local(inputs["judge"] / "model", device=machine.device, dtype=config.judge_dtype, fits=True)
