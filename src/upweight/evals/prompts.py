"""How questions are put, in one place, so that families that ask alike are asked alike."""

from collections.abc import Sequence
from string import ascii_uppercase

from upweight.core.records import Message

STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Please reason step by step, and put the letter of the right option within \\boxed{}."


def question(text: str, request: str = STEP_BY_STEP) -> tuple[Message, ...]:
    """A question and what form its answer is to have."""
    return (Message("user", f"{text.strip()}\n\n{request}"),)


def options(text: str, choices: Sequence[str]) -> tuple[Message, ...]:
    """A question with options named A, B, C and on."""
    listed = "\n".join(f"({letter}) {choice.strip()}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
    return question(f"{text.strip()}\n\n{listed}", LETTER)
