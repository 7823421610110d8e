"""Preference pairs for the reward model: a correct, complete, concise, well-formed chain over one that fails one way.

Half of the failures are wrong answers; the others are right answers told badly. Some failures are longer than what they
lose to, some shorter, so that length alone tells nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from random import Random

from upweight.core.records import Completion, Pair
from upweight.synthesize.stories import LARGEST_VALUE, Story, problem, story, thought, wrong_chain

FILLERS = ("Let me see.", "I have to think about this.", "So now we go on.", "That is fine.", "Let me check again.")


def _wrong(told: Story, random: Random) -> str:
    return thought(*wrong_chain(told, random))


def _padded(told: Story, random: Random) -> str:
    equations = told.chain.split(" ")
    parts = [part for equation in equations for part in (_pick(FILLERS, random), equation)]
    return thought(" ".join([*parts, _pick(FILLERS, random)]), told.answer)


def _repeated(told: Story, random: Random) -> str:
    equations = told.chain.split(" ")
    at = int(random.random() * len(equations))
    times = 3 + int(random.random() * 4)
    return thought(" ".join(equations[:at] + [equations[at]] * times + equations[at + 1 :]), told.answer)


def _incomplete(told: Story, random: Random) -> str:
    equations = told.chain.split(" ")
    return thought(" ".join(equations[: int(random.random() * len(equations))]), told.answer)


def _unboxed(told: Story, random: Random) -> str:
    return f"<think>\n{told.chain}\n</think>\n"


def _unclosed(told: Story, random: Random) -> str:
    return f"<think>\n{told.chain}\n\\boxed{{{told.answer}}}"


FAILURES: Mapping[str, Callable[[Story, Random], str]] = {
    "wrong": _wrong,
    "padded": _padded,
    "repeated": _repeated,
    "incomplete": _incomplete,
    "unboxed": _unboxed,
    "unclosed": _unclosed,
}
WRONG_SHARE = 0.5


def preference_pairs(
    count: int, seed: int, *, fewest_steps: int = 2, most_steps: int = 5, largest_value: int = LARGEST_VALUE
) -> Iterator[Pair]:
    """`count` pairs on stories of the stream `seed`; the rejected completion's policy names how it fails.

    The completions carry text and no tokens: whoever trains on them encodes them with its own tokenizer.
    """
    others = [name for name in FAILURES if name != "wrong"]
    for index in range(count):
        told = story(seed, index, fewest_steps=fewest_steps, most_steps=most_steps, largest_value=largest_value)
        random = Random((seed << 40) ^ index ^ (1 << 36))
        kind = "wrong" if random.random() < WRONG_SHARE else others[int(random.random() * len(others))]
        chosen = Completion((), (), thought(told.chain, told.answer), "end", "procedural: right")
        rejected = Completion((), (), FAILURES[kind](told, random), "end", f"procedural: {kind}")
        yield Pair(problem(told, source="preference"), chosen, rejected)


def _pick(choices: tuple[str, ...], random: Random) -> str:
    return choices[int(random.random() * len(choices))]
