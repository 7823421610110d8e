"""Byte-level BPE: any text becomes tokens and comes back as it was. Stored as transformers stores it.

Each digit is a token of its own, so that a number reads the same wherever it stands. Control tokens structure a
conversation; the marks of thinking and of tool calls are ordinary text that happens to be one token each, so that
documents can hold them.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from upweight.core.errors import UserError
from upweight.core.hub import TOKENIZER_FILES, find_directory
from upweight.core.records import Message
from upweight.text.template import render_text

END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the blank before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation up to the line's end
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # line breaks and blanks
)
"""Where a token must end. In the manner of GPT-4's pattern, with single digits."""

_TEMPLATE_NAME = "chat_template.jinja"
_BLANK = "\u2581"
"""What SentencePiece writes for a blank, and before a text."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        chat_template: the Jinja text that renders conversations, None for a base tokenizer without one.
        special_tokens: the named ones (bos_token, eos_token, ...) that templates refer to.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
        self._end_of_text = end_of_text
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._control = {
            token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = frozenset(self._control.values())

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        chat_template: str | None = None,
        control_tokens: Sequence[str] = CONTROL_TOKENS,
        marks: Sequence[str] = MARKS,
    ) -> "Tokenizer":
        """Learn merges from texts; the same texts in the same order give the same tokenizer.

        `vocab_size` counts everything: 256 bytes, control tokens, marks and merges. The first control token ends
        documents.
        """
        least = 256 + len(control_tokens) + len(marks)
        if vocab_size < least:
            raise UserError(
                f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the special tokens: >= {least}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        specials = [AddedToken(token, special=True, normalized=False) for token in control_tokens]
        ordinary = [AddedToken(token, special=False, normalized=False) for token in marks]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(marks),
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        names = (*control_tokens, *marks)
        backend.train_from_iterator((_without(text, names) for text in texts), trainer=trainer)
        backend.add_tokens(ordinary)
        return cls(
            backend,
            end_of_text=control_tokens[0],
            chat_template=chat_template,
            special_tokens={"eos_token": control_tokens[0], "pad_token": control_tokens[0]},
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a directory or a hub name: one of ours, or any of Hugging Face's with a tokenizer.json."""
        directory = find_directory(path, TOKENIZER_FILES)
        file = directory / "tokenizer.json"
        if not file.exists():
            raise UserError(f"{directory} has no tokenizer.json: save the tokenizer there in the fast format first")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise UserError(f"{file} is not a readable tokenizer: {error}") from error
        # what whoever saved it had asked for last: it would cut every text, or fill it up, without a word
        backend.no_truncation()
        backend.no_padding()
        settings = _read_json(directory / "tokenizer_config.json")
        named = {**_read_json(directory / "special_tokens_map.json"), **settings}
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in named.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        template = settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (directory / _TEMPLATE_NAME).exists():
            template = (directory / _TEMPLATE_NAME).read_text()
        end = _end_of_text(backend, special)
        if end is None:
            eos = special.get("eos_token")
            lacks = f" (its eos_token {eos} is not in the vocabulary)" if eos else ""
            raise UserError(
                f"{directory} names no token that ends a text{lacks}: set eos_token in tokenizer_config.json"
            )
        return cls(backend, end_of_text=end, chat_template=template, special_tokens=special)

    def save(self, path: str | Path) -> None:
        """Write the files that transformers' AutoTokenizer and vLLM open, the chat template among them.

        generation_config.json tells both at which tokens a completion ends; a model's config knows nothing of them.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        special = dict(self.special_tokens)
        special["eos_token"] = self.token_text(self.end_of_turn)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "end_of_text_token": self._end_of_text,
            "model_max_length": 10**9,
            **special,
        }
        if self.chat_template is not None:
            (directory / _TEMPLATE_NAME).write_text(self.chat_template)
        else:
            (directory / _TEMPLATE_NAME).unlink(missing_ok=True)
        ends = {"eos_token_id": sorted(self.stop_tokens), "pad_token_id": self.end_of_text}
        for name, value in (("tokenizer_config.json", settings), ("generation_config.json", ends)):
            (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def with_template(self, template: str | None) -> "Tokenizer":
        """The same tokens under another chat template."""
        return Tokenizer(
            self._backend,
            end_of_text=self._end_of_text,
            chat_template=template,
            special_tokens=self.special_tokens,
        )

    def encode(self, text: str, *, control: bool = True) -> list[int]:
        """Token ids of `text`, nothing added before or after.

        `control` False reads the names of control tokens as plain text: for documents and inputs of others, which must
        not be able to end a text or open a turn.

        Raises UserError for half of a surrogate pair, which JSON can hold and Unicode text cannot.
        """
        backend = self._backend if control else self._uncontrolled
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except TypeError:
            place = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if place is None:
                raise
            raise UserError(
                f"character {place} of a text is half of a surrogate pair (U+{ord(text[place]):04X}), which is no "
                "Unicode: remove it"
            ) from None

    def continued(self, text: str, last: int | None) -> list[int]:
        """Token ids of a text that goes on where another one has ended with the token `last`; None begins anew.

        They differ from `encode` where a tokenizer sets a blank before each text, as SentencePiece does: none stands
        within one.
        """
        if last is None or not text or not self._sets_blank_before:
            return self.encode(text)
        before = self.token_text(last) if last in self._special_ids else "\n"
        known, tokens = self.encode(before), self.encode(before + text)
        return tokens[len(known) :] if tokens[: len(known)] == known else self.encode(text)

    def encode_many(self, texts: Sequence[str], *, control: bool = True) -> list[list[int]]:
        """`encode` over many texts at once, on all threads."""
        backend = self._backend if control else self._uncontrolled
        return [list(encoding.ids) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; `skip_special` leaves control tokens out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to that of the tokens `before` them, which end with a whole character.

        Where a word's blank is part of its first token, as in Llama 2's and Mistral's tokenizers, a decoder drops it at
        the start of a text: so tokens that go on with a text cannot be decoded alone.
        """
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def one_text(self, number: int) -> str:
        """What one token is in the middle of a text."""
        return self.decode_after(self._letter, [number])

    @functools.cached_property
    def _letter(self) -> list[int]:
        return self.encode("a")[-1:]

    @functools.cached_property
    def vocab_size(self) -> int:
        """Token ids lie below this, added tokens included; some numbers below it may stand for none."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def check_fits(self, vocab_size: int, where: str) -> None:
        """Raises UserError where a model of `vocab_size` embeddings, found at `where`, has none for some of the tokens.

        A model may have more embeddings than there are tokens: many are padded to a round number.
        """
        if self.vocab_size > vocab_size:
            extra = [name for name, number in self._control.items() if number >= vocab_size]
            beyond = f", {', '.join(sorted(extra)[:3])} among those without one" if extra else ""
            raise UserError(
                f"the tokenizer has {self.vocab_size:,} tokens, but the model {where} has embeddings for "
                f"{vocab_size:,}{beyond}: use the tokenizer that the model was trained with, or enlarge its embedding"
            )

    @property
    def end_of_text(self) -> int:
        """The token that ends a document."""
        return self.token_id(self._end_of_text)

    @functools.cached_property
    def end_of_turn(self) -> int:
        """The token that ends an assistant's turn: what the chat template writes after it, else the end of text."""
        if self.chat_template is None:
            return self.end_of_text
        asked = [Message("user", "question"), Message("assistant", "reply")]
        written = render_text(self.chat_template, asked, special_tokens=self.special_tokens)
        after = [token for token in self.encode(written.rpartition("reply")[2]) if token in self._special_ids]
        return after[0] if after else self.end_of_text

    @functools.cached_property
    def control_names(self) -> re.Pattern[str]:
        """Matches the name of any control token."""
        return _any_of(self._control)

    @functools.cached_property
    def framing_names(self) -> re.Pattern[str]:
        """Matches the names of the control tokens that set turns and texts apart: those that the chat template writes
        between an assistant's turn and the next one, and those at which a completion has ended."""
        names = {self._end_of_text, self.token_text(self.end_of_turn)} & self._control.keys()
        if self.chat_template is not None:
            asked = [Message("user", "question"), Message("assistant", "reply"), Message("user", "next question")]
            written = render_text(self.chat_template, asked, special_tokens=self.special_tokens)
            between = written.rpartition("next question")[0].rpartition("reply")[2]
            names |= set(self.control_names.findall(between))
        return _any_of(names)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens at which a completion has ended."""
        return frozenset({self.end_of_text, self.end_of_turn})

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The control tokens by name."""
        return self._control

    def token_id(self, token: str) -> int:
        """The id of one token by its text. Raises UserError where there is none."""
        number = self._backend.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer has no token {token}")
        return int(number)

    def token_text(self, number: int) -> str:
        """The text under which the vocabulary lists one token: a control token's name, byte letters for others."""
        text = self._backend.id_to_token(number)
        if text is None:
            raise UserError(f"the tokenizer has no token number {number}")
        return str(text)

    def to_json(self) -> str:
        """All that turns text into ids, as tokenizer.json holds it."""
        return str(self._backend.to_str())

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what turns text into ids; the chat template does not count."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @functools.cached_property
    def _sets_blank_before(self) -> bool:
        return any(token.startswith(_BLANK) for token in self._backend.encode("a", add_special_tokens=False).tokens)

    @functools.cached_property
    def _uncontrolled(self) -> tokenizers.Tokenizer:
        """A second backend, because the switch is a state and encoding must be safe from several threads."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _without(text: str, names: Sequence[str]) -> str:
    """No merge may be spent on a text that is one token anyway."""
    for name in names:
        text = text.replace(name, "\n")
    return text


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    return dict(value)


def _end_of_text(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> str | None:
    """Chat models name the end of the turn as eos_token; documents end with a token of their own where there is one."""
    candidates = (special.get("end_of_text_token"), END_OF_TEXT, "<|end_of_text|>", special.get("eos_token"))
    return next((token for token in candidates if token and backend.token_to_id(token) is not None), None)
