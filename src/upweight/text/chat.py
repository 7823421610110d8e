"""Messages to tokens and the loss mask, through the tokenizer's own chat template.

The mask is derived by rendering, not by searching for markers. For an assistant's turn i

    prompt_i = render(messages before i, with the generation prompt)
    full_i   = render(messages up to and with i)

and the model has to write what full_i adds to prompt_i, up to and with the token that ends the turn. The text is
encoded piece by piece, cut where the model begins and ends to write: so the tokens before a trained turn are exactly
those that the sampler would be prompted with.

What a message says cannot end its turn nor open another: the names of the control tokens that set turns apart are plain
text in it. Others (a mark of thinking that is a control token) only an assistant's turn and a system message may hold.

A template that breaks this is refused rather than trained with a wrong mask: where prompt_i does not begin full_i,
where nothing is left to write, where no token ends the turn. Some templates (Qwen3's) drop the thinking of earlier
turns from what follows; then no single sequence holds what the model wrote in each turn, and `encode_turns` makes
several, each turn as the model would see it when it wrote that turn.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from upweight.core.errors import UserError
from upweight.core.protocols import Prompt
from upweight.core.records import Completion, Message
from upweight.text.template import CHATML, PLAIN, render_text
from upweight.text.tokenizer import Tokenizer

__all__ = [
    "CHATML",
    "PLAIN",
    "EncodedConversation",
    "encode_conversation",
    "encode_reply",
    "encode_turns",
    "prompt_tokens",
    "render",
    "reply_tokens",
]

Tools = Sequence[Mapping[str, Any]]

BEGIN_PLAIN, END_PLAIN = "\ufdd0", "\ufdd1"
"""What stands around the name of a control token that is plain text, until it is encoded: no characters of Unicode."""


class EncodedConversation(NamedTuple):
    """Token ids, and for each whether the model is trained to write it."""

    tokens: list[int]
    trained: list[bool]


class _Turn(NamedTuple):
    """Where one assistant's turn lies in the text rendered up to it, in characters."""

    text: str
    begin: int
    end: int
    trained: bool


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None) -> list[int]:
    """The prompt for the next assistant's turn: the conversation and the template's generation prompt.

    What of the thinking of earlier turns a model is shown again is its template's affair.
    """
    messages, tools = _as_said(tokenizer, messages), _as_text(tools, tokenizer.control_names)
    prompt = _text(tokenizer, messages, tools, generation_prompt=True)
    return _encode(tokenizer, prompt, _turns(tokenizer, messages, tools, read=True), trained=[]).tokens


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """What a model is given to continue: a conversation rendered, or text as it is; never nothing."""
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else render(tokenizer, prompt)
    return tokens or [tokenizer.end_of_text]


def encode_reply(tokenizer: Tokenizer, prompt: Sequence[int], text: str, *, ended: bool = True) -> list[int]:
    """What the model would have written to say `text` after `prompt`: with the end of its turn where it `ended`."""
    last = prompt[-1] if prompt else None
    tokens = _tokens(tokenizer, _as_text(text, tokenizer.framing_names), last)
    return [*tokens, tokenizer.end_of_turn] if ended else tokens


def reply_tokens(tokenizer: Tokenizer, prompt: Sequence[int], reply: Completion) -> list[int]:
    """The tokens of a reply to `prompt`: those that were sampled where the record holds them, else those of its text
    and, unless it was cut off, the end of turn."""
    return list(reply.tokens) or encode_reply(tokenizer, prompt, reply.text, ended=not reply.truncated)


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None
) -> EncodedConversation:
    """One training sequence of the whole conversation; trained are the assistant's turns that say so.

    Raises UserError where the template rewrites earlier turns (use `encode_turns`), and where the mask would be empty
    or miss the end of a turn.
    """
    sequences = encode_turns(tokenizer, messages, tools=tools)
    if len(sequences) > 1:
        raise UserError(
            f"the chat template renders earlier turns differently once others follow, so that a conversation of "
            f"{len(messages)} messages is {len(sequences)} training sequences: use encode_turns"
        )
    return sequences[0]


def encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None
) -> list[EncodedConversation]:
    """The fewest training sequences in which each trained turn stands as the model would write it, in order.

    One, where the rendering of each turn begins the rendering of the next; else a sequence ends before the template
    rewrites it. A turn that is trained in one sequence is context in the others.
    """
    messages, tools = _as_said(tokenizer, messages), _as_text(tools, tokenizer.control_names)
    turns = _turns(tokenizer, messages, tools)
    if not any(turn.trained for turn in turns):
        raise UserError(
            f"no turn of a conversation of {len(messages)} messages is trained: it needs an assistant's turn that is "
            "not marked trained=False"
        )
    sequences = []
    run: list[_Turn] = []
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        run.append(turn)
        if following is None or not following.text.startswith(turn.text[: turn.end]):
            trained = [held for held in run if held.trained]
            if trained:
                sequences.append(_encode(tokenizer, turn.text[: turn.end], turns, trained))
            run = []
    return sequences


def _turns(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None, *, read: bool = False
) -> list[_Turn]:
    """Where each assistant's turn lies, checked; `read` where the turns are a prompt, and none is learned from."""
    turns = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _text(tokenizer, messages[:index], tools, generation_prompt=True)
        full = _text(tokenizer, messages[: index + 1], tools)
        where = f"message {index} (assistant)"
        if not full.startswith(prompt):
            raise UserError(
                f"{where}: the chat template does not write the prompt that the model is asked with at the start of "
                f"the finished turn: it asks with ...{prompt[-60:]!r} and writes ...{full[-120:]!r}"
            )
        end = _end_of_turn(tokenizer, full, len(prompt), where)
        _check_written(message, full[len(prompt) : end], where, read)
        turns.append(_Turn(full, len(prompt), end, message.trained))
    return turns


def _check_written(message: Message, written: str, where: str, read: bool) -> None:
    """The turn's answer, its thinking and its calls must be in what the template writes, wherever it sets them."""
    thinking, _, answer = message.content.rpartition("</think>")
    thinking, answer = thinking.strip().removeprefix("<think>").strip(), answer.strip()
    dropped = [call.name for call in message.tool_calls if call.name not in written]
    if dropped:
        raise UserError(f"{where}: the chat template leaves out its call of {dropped[0]}: it knows no tools")
    if answer not in written and not message.tool_calls:
        raise UserError(f"{where}: the chat template writes no text of it, the model would learn to say nothing")
    for kind, text in (("text", answer), ("thinking", thinking)):
        if text not in written and not (read and kind == "thinking"):
            raise UserError(
                f"{where}: the chat template leaves out its {kind} ({text[:40]!r}), so the model would never learn to "
                "write it: take it out of the conversation, or use a template that keeps it"
            )


def _end_of_turn(tokenizer: Tokenizer, full: str, begin: int, where: str) -> int:
    """The character after the token that ends the turn. Only blanks and control tokens may follow it."""
    written = full[begin:]
    if not written.strip():
        raise UserError(f"{where}: the chat template writes nothing for it, the loss mask would be empty")
    control = sorted(tokenizer.control_tokens, key=written.rfind)
    last = tokenizer.token_text(tokenizer.end_of_turn)
    if last not in written:
        last = control[-1] if control else ""
    end = written.rfind(last) + len(last) if last and last in written else 0
    rest = written[end:]
    for token in control:
        rest = rest.replace(token, "")
    if not end or rest.strip():
        raise UserError(
            f"{where}: the chat template writes no control token at the end of the turn (it ends with "
            f"{written[-40:]!r}), so the model would never learn to stop. The tokenizer's control tokens are "
            f"{', '.join(sorted(tokenizer.control_tokens)) or 'none'}: give it the template that belongs to it"
        )
    return begin + end


def _encode(tokenizer: Tokenizer, text: str, turns: Sequence[_Turn], trained: Sequence[_Turn]) -> EncodedConversation:
    """`text` encoded with a cut before and after each turn that stands in it as it was written."""
    tokens: list[int] = []
    mask: list[bool] = []
    at = 0
    for turn in turns:
        if turn.end <= at or not text.startswith(turn.text[: turn.end]):
            continue
        for piece, learn in ((text[at : turn.begin], False), (text[turn.begin : turn.end], turn in trained)):
            numbers = _tokens(tokenizer, piece, tokens[-1] if tokens else None)
            tokens += numbers
            mask += [learn] * len(numbers)
        at = turn.end
    rest = _tokens(tokenizer, text[at:], tokens[-1] if tokens else None)
    return EncodedConversation(tokens + rest, mask + [False] * len(rest))


def _tokens(tokenizer: Tokenizer, text: str, last: int | None) -> list[int]:
    """The tokens of rendered text that goes on after the token `last`."""
    tokens: list[int] = []
    at = 0
    for plain in re.finditer(f"{BEGIN_PLAIN}({tokenizer.control_names.pattern}){END_PLAIN}", text):
        tokens += tokenizer.continued(text[at : plain.start()], tokens[-1] if tokens else last)
        tokens += tokenizer.encode(plain[1], control=False)
        at = plain.end()
    return tokens + tokenizer.continued(text[at:], tokens[-1] if tokens else last)


def _as_said(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """The messages, in which control tokens are marked as plain text."""
    said = []
    for message in messages:
        names = tokenizer.framing_names if message.role in ("assistant", "system") else tokenizer.control_names
        calls = tuple(
            replace(call, name=_as_text(call.name, names), arguments=_as_text(call.arguments, names))
            for call in message.tool_calls
        )
        said.append(replace(message, content=_as_text(message.content, names), tool_calls=calls))
    return said


def _as_text(value: Any, names: re.Pattern[str]) -> Any:
    """The same with `names` marked as plain text in every string of it."""
    if isinstance(value, str):
        return names.sub(lambda found: f"{BEGIN_PLAIN}{found.group()}{END_PLAIN}", value)
    if isinstance(value, Mapping):
        return {_as_text(key, names): _as_text(item, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_text(item, names) for item in value]
    return value


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: give it one, tokenizer.with_template(CHATML)")
    return tokenizer.chat_template


def _text(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None, *, generation_prompt: bool = False
) -> str:
    return render_text(
        _template(tokenizer),
        messages,
        tools=tools,
        generation_prompt=generation_prompt,
        special_tokens=tokenizer.special_tokens,
    )
