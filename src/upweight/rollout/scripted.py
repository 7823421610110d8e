"""A sampler that answers from a script: for tests, for roles that rules can play, and for trying a recipe dry."""

from collections.abc import Callable, Mapping, Sequence

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion
from upweight.text.tokenizer import Tokenizer

Script = Mapping[str, str | Sequence[str]] | Callable[[Prompt, int], str]
"""Replies by the prompt's last message (several are taken in turn by the samples), or a function of prompt and sample
number."""


class ScriptedSampler(Sampler):
    """Says what its script says, within the limits that a model would have.

    Args:
        script: the replies. A prompt that a mapping does not hold is refused, unless it holds "*".
        tokenizer: gives completions their tokens, the end of the turn included, and makes max_new_tokens bind; without
            one, completions have no tokens and no limit.
        policy: written into each completion.
    """

    def __init__(self, script: Script, *, tokenizer: Tokenizer | None = None, policy: str = "scripted") -> None:
        self.script = script
        self.tokenizer = tokenizer
        self.policy = policy

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [
            [self._completion(self._reply(prompt, sample), limits) for sample in range(count)] for prompt in prompts
        ]

    def _reply(self, prompt: Prompt, sample: int) -> str:
        if callable(self.script):
            return self.script(prompt, sample)
        asked = prompt if isinstance(prompt, str) else prompt[-1].content
        replies = self.script.get(asked, self.script.get("*"))
        if replies is None:
            raise UserError(f'the script has no reply to {asked[:200]!r}: add one, or one to "*" for all other prompts')
        return replies if isinstance(replies, str) else replies[sample % len(replies)]

    def _completion(self, text: str, limits: Limits) -> Completion:
        stop = "end"
        found = [text.find(wanted) for wanted in limits.stop if wanted in text]
        if found:
            text, stop = text[: min(found)], "stop"
        if self.tokenizer is None:
            return Completion((), (), text, stop, self.policy)
        tokens = self.tokenizer.encode(text, control=False)
        if stop == "end":
            tokens.append(self.tokenizer.end_of_turn)
        if len(tokens) > limits.max_new_tokens:
            tokens = tokens[: limits.max_new_tokens]
            text, stop = self.tokenizer.decode(tokens), "length"
        return Completion(tuple(tokens), (), text, stop, self.policy)
