"""The engine answers as the sampler does, whoever else is being answered, and stops when nobody listens."""

import queue
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import tokenizers
from tiny_checkpoint import tiny_checkpoint
from tokenizers import decoders, models

from upweight.app.engine import Drawn, Engine, Piece, Request
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.model.weights import load
from upweight.rollout.local import LocalSampler
from upweight.text.tokenizer import Tokenizer

LIMITS = Limits(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=3)
PROMPTS = ["Ann has 3", "Bob", "“Bob” has 5 more apples"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    directory = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    made = Engine(load(directory)[0], Tokenizer.load(directory), rows=2)
    yield made
    made.close()


def test_the_same_answer_as_the_sampler(engine: Engine) -> None:
    sampler = LocalSampler(engine.model, engine.tokenizer)
    for prompt in PROMPTS:
        wanted = sampler.sample([prompt], count=1, limits=LIMITS)[0][0]
        pieces = list(engine.stream(engine.tokenizer.encode(prompt), LIMITS))
        assert tuple(piece.token for piece in pieces) == wanted.tokens
        assert "".join(piece.text for piece in pieces) == wanted.text
        assert pieces[-1].stop == wanted.stop
        assert [piece.logprob for piece in pieces] == pytest.approx(list(wanted.logprobs), abs=1e-5)


def test_answers_do_not_depend_on_company(engine: Engine) -> None:
    alone = [[piece.token for piece in engine.stream(engine.tokenizer.encode(prompt), LIMITS)] for prompt in PROMPTS]
    together: list[list[int]] = [[] for _ in PROMPTS]

    def ask(index: int) -> None:
        together[index] = [piece.token for piece in engine.stream(engine.tokenizer.encode(PROMPTS[index]), LIMITS)]

    threads = [threading.Thread(target=ask, args=[index]) for index in range(len(PROMPTS))]  # three on two rows
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_stop_string_across_tokens_is_never_shown(engine: Engine) -> None:
    limits = replace(LIMITS, temperature=0.0)
    text = "".join(piece.text for piece in engine.stream(engine.tokenizer.encode("Bob"), limits))
    stop = text[4:7]
    pieces = list(engine.stream(engine.tokenizer.encode("Bob"), replace(limits, stop=(stop,))))
    assert pieces[-1].stop == "stop"
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]


def test_characters_of_several_tokens_come_whole(engine: Engine) -> None:
    request = Request([1], replace(LIMITS, max_new_tokens=10), deliver := queue.SimpleQueue().put, 60.0)
    shown = []
    request.deliver = lambda piece: shown.append(piece.text)
    tokens = engine.tokenizer.encode("a日b")  # three bytes, of which the tokenizer knows no merge
    assert len(tokens) == 5
    for token in tokens:
        request.take(Drawn(token, 0.0, ()), engine.tokenizer)
    assert shown == ["a", "", "", "日", "b"]
    assert deliver is not None


@pytest.mark.parametrize("text", ["日本語日本語日本", "a😀😀b", "a\N{REPLACEMENT CHARACTER}日"])
@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_tokens_may_end_one_character_and_begin_the_next(text: str, first: int, size: int) -> None:
    """Every merge of bytes is a token, so that one that ends within a character may be followed by more such."""
    letters = bytes_to_letters()
    content = text.encode()
    parts = [content[:first], *(content[place : place + size] for place in range(first, len(content), size))]
    names = ["".join(letters[byte] for byte in part) for part in parts]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(["</s>", *names]))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, end_of_text="</s>")
    pieces: list[Piece] = []
    request = Request([0], replace(LIMITS, max_new_tokens=len(names)), pieces.append, 60.0)
    for name in names:
        request.take(Drawn(vocabulary[name], 0.0, ()), tokenizer)
    assert "".join(piece.text for piece in pieces) == text
    cut: list[Piece] = []
    request = Request([0], replace(LIMITS, max_new_tokens=len(names) - 1), cut.append, 60.0)
    for name in names[:-1]:
        request.take(Drawn(vocabulary[name], 0.0, ()), tokenizer)
    assert "".join(piece.text for piece in cut) == tokenizer.decode([vocabulary[name] for name in names[:-1]])


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's: a byte that is a visible character of Latin-1 is that, the others are numbered from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def test_words_keep_their_blanks_where_a_decoder_drops_them_at_the_start() -> None:
    names = ["</s>", "▁to", "▁be", "fore", "<0xE6>", "<0x97>", "<0xA5>", "▁", "a"]  # in the manner of Llama 2
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(zip(names, count())), merges=[], byte_fallback=True))
    dropped = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), dropped])
    tokenizer = Tokenizer(backend, end_of_text="</s>")
    tokens = [1, 2, 3, 7, 4, 5, 6, 2, 1]
    pieces: list[Piece] = []
    request = Request([1], replace(LIMITS, max_new_tokens=len(tokens)), pieces.append, 60.0)
    for token in tokens:
        request.take(Drawn(token, 0.0, ()), tokenizer)
    assert [piece.text for piece in pieces] == ["to", " be", "fore", " ", "", "", "日", " be", " to"]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens)
    assert [tokenizer.one_text(token) for token in (1, 2, 3)] == [" to", " be", "fore"]


def test_leaving_early_frees_the_row(engine: Engine) -> None:
    for _ in range(5):  # more than there are rows
        for _piece in engine.stream(engine.tokenizer.encode("Bob"), replace(LIMITS, max_new_tokens=400)):
            break
    assert list(engine.stream(engine.tokenizer.encode("Bob"), LIMITS))[-1].stop is not None


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="the context is 512"):
        engine.submit([1] * 500, LIMITS, lambda piece: None)
    with pytest.raises(UserError, match="empty"):
        engine.submit([], LIMITS, lambda piece: None)


def test_closing_ends_every_answer(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    engine = Engine(load(directory)[0], Tokenizer.load(directory), rows=1)
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(3):
        engine.submit([5], replace(LIMITS, max_new_tokens=500), pieces.put)
    engine.close()
    stops = []
    while not pieces.empty():
        stops.append(pieces.get().stop)
    assert len([stop for stop in stops if stop is not None]) == 3
    with pytest.raises(UserError, match="stopped answering"):
        engine.submit([5], LIMITS, pieces.put)
