"""Groups to learn from by reinforcement: sampled, with tools where they are asked for, and judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Sampler, Verifier
from upweight.core.records import Completion, Message, Problem, Rollout
from upweight.rollout.episode import Episode, Tool, python_tool, run_episodes, training_sequences
from upweight.rollout.sandbox import Sandbox, SandboxLimits
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tools:
    """Tools that the policy may call while it answers.

    Attributes:
        names: "python" is an interpreter in the sandbox.
        most_turns: replies of one episode; one that still calls tools then counts as truncated.
        limits: of one program.
    """

    names: tuple[Literal["python"], ...] = ("python",)
    most_turns: int = 4
    limits: SandboxLimits = SandboxLimits()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not self.names or self.most_turns < 1:
            raise UserError(f"tools {self.names} for {self.most_turns} turns: name a tool, and allow at least one turn")

    def opened(self, sandbox: Sandbox) -> list[Tool]:
        """The tools, whose programs run in `sandbox`."""
        return [python_tool(sandbox, self.limits) for _ in self.names]


@dataclass(frozen=True, slots=True)
class Sequenced:
    """What of a completion is trained: tokens after a prompt, and which of them the policy wrote."""

    prompt: tuple[int, ...]
    completion: Completion
    wrote: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A judged group, and for each of its completions the sequences to train on: one, or one for each turn of an
    episode whose prompt does not begin with the turns before it."""

    rollout: Rollout
    sequences: tuple[tuple[Sequenced, ...], ...]


def gather(
    sampler: Sampler,
    tokenizer: Tokenizer,
    verifier: Verifier,
    problems: Sequence[Problem],
    *,
    count: int,
    limits: Limits,
    tools: Sequence[Tool] = (),
    most_turns: int = 1,
    context: int = 0,
) -> list[Group]:
    """`count` completions of each problem by `sampler`, judged by `verifier` a group at a time.

    With tools, a completion is the last turn of an episode; what is trained are all of its turns.

    Args:
        context: tokens that the model reads and writes at most: an episode that leaves no room for another turn within
            them counts as truncated. 0 leaves that to the sampler.
    """
    prompts = [problem.messages for problem in problems]
    if tools:

        def fits(messages: Sequence[Message]) -> bool:
            return not context or len(render(tokenizer, messages)) + limits.max_new_tokens <= context

        told = run_episodes(sampler, prompts, tools=tools, limits=limits, count=count, most_turns=most_turns, fits=fits)
        completions = [[episode.completion for episode in episodes] for episodes in told]
        sequences = [[_of_episode(tokenizer, episode) for episode in episodes] for episodes in told]
    else:
        completions = sampler.sample(prompts, count=count, limits=limits)
        sequences = [
            [(_whole(prompt, completion),) for completion in group]
            for prompt, group in zip((tuple(render(tokenizer, one)) for one in prompts), completions, strict=True)
        ]
    return [
        Group(Rollout(problem, tuple(group), tuple(verifier.score(problem, group))), tuple(parts))
        for problem, group, parts in zip(problems, completions, sequences, strict=True)
    ]


def _whole(prompt: tuple[int, ...], completion: Completion) -> Sequenced:
    return Sequenced(prompt, completion, (True,) * len(completion.tokens))


def _of_episode(tokenizer: Tokenizer, episode: Episode) -> tuple[Sequenced, ...]:
    """Nothing of what tools returned is trained; an episode without an end is truncated in all of its parts."""
    last = episode.completion
    known = all(completion.logprobs for _, completion in episode.turns if completion.tokens)
    made = []
    for part in training_sequences(tokenizer, episode):
        start = part.trained.index(True) if any(part.trained) else len(part.tokens)
        logprobs = tuple(part.logprobs[start:]) if known else ()
        completion = Completion(tuple(part.tokens[start:]), logprobs, last.text, last.stop, last.policy)
        made.append(Sequenced(tuple(part.tokens[:start]), completion, tuple(part.trained[start:])))
    return tuple(made)
