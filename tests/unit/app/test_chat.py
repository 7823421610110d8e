"""Chat answers each line of a pipe, dims the thinking and forgets the oldest turns first."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_checkpoint import tiny_checkpoint

from upweight.app.chat import Shown, Talker, _shown, chat, fitted
from upweight.app.engine import BROKEN_OFF, Engine, Piece, open_engine
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.core.work import Machine
from upweight.text.tokenizer import Tokenizer


def test_thinking_is_told_from_the_answer() -> None:
    pieces = ["<think>", "\nTwo", " plus", "</think>", "\nFive"]
    shown = Shown(thinking=True)
    assert [part for piece in pieces for part in shown.parts(piece)] == [
        ("\nTwo", True),
        (" plus", True),
        ("\nFive", False),
    ]
    hidden = Shown(thinking=False)
    assert [part for piece in pieces for part in hidden.parts(piece)] == [("\nFive", False)]
    assert list(Shown(thinking=True).parts("a<think>b</think>c")) == [("a", False), ("b", True), ("c", False)]


def test_marks_may_come_in_pieces_and_begin_in_the_prompt() -> None:
    shown = Shown(thinking=True)
    pieces = ["a <", "b <th", "ink>", "Two</", "thi", "nk>Five", " <thi"]
    assert [part for piece in pieces[:-1] for part in shown.parts(piece)] == [
        ("a ", False),
        ("<b ", False),
        ("Two", True),
        ("Five", False),
    ]
    assert list(shown.parts(pieces[-1], last=True)) == [(" <thi", False)]
    begun = Shown(thinking=False, inside=True)
    assert [part for piece in ("Two", "</think>", "Five") for part in begun.parts(piece)] == [("Five", False)]


def test_a_template_may_begin_the_thinking(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path)
    template = (directory / "chat_template.jinja").read_text()
    for text, inside in ((template, False), (template.replace("assistant\\n", "assistant\\n<think>\\n"), True)):
        (directory / "chat_template.jinja").write_text(text)
        engine = open_engine(str(directory), root=tmp_path)
        talker = Talker("tiny", engine, [Message("user", "Ann?")])
        assert list(_shown(talker, thinking=True).parts("Two")) == [("Two", inside)]
        engine.close()


def answered(folder: Path, monkeypatch: pytest.MonkeyPatch, piped: str, **given) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
    console = Console(file=io.StringIO(), width=200)
    directory = str(folder / "model")
    given = {"given": [directory], **given}
    chat(root=folder, limits=Limits(8, temperature=0.0), machine=Machine(), console=console, **given)
    return console.file.getvalue()


def test_a_pipe_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path)
    assert answered(tmp_path, monkeypatch, "Ann has 3\n\nBob?\n").count("cut off") == 1
    assert answered(tmp_path, monkeypatch, "\n") == ""


def test_each_line_of_a_pipe_may_be_a_question_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path)
    alone = answered(tmp_path, monkeypatch, "Bob?")
    printed = answered(tmp_path, monkeypatch, "Ann has 3\n\nBob?\n", each_line=True)
    assert printed.count("cut off") == 2
    assert printed.endswith(alone)  # nothing of the first question is left


def test_only_a_line_break_ends_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path)
    assert answered(tmp_path, monkeypatch, "Ann\u2028has\x0c3\r\nBob?", each_line=True).count("cut off") == 2


class Typed(io.StringIO):
    """What a person types, line by line."""

    def isatty(self) -> bool:
        return True


def test_a_message_that_is_too_long_does_not_end_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(UserError, match="shorten it"):
        answered(tmp_path, monkeypatch, "x" * 2000)
    monkeypatch.setattr(sys, "stdin", Typed(f"Ann has 3\n{'x' * 2000}\nBob?\n/quit\n"))
    console = Console(file=io.StringIO(), width=200)
    chat([str(tmp_path / "model")], root=tmp_path, limits=Limits(8), machine=Machine(), console=console)
    assert console.file.getvalue().count("cut off") == 2
    assert "longer than the model's context of 512 tokens: shorten it" in console.file.getvalue()


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path)
    monkeypatch.setattr(Engine, "stream", lambda *given: iter([Piece(1, 0.0, "Two"), BROKEN_OFF]))
    for models in ([str(tmp_path / "model")], [str(tmp_path / "model")] * 2):
        with pytest.raises(UserError, match="the model stopped answering"):
            answered(tmp_path, monkeypatch, "Ann?", given=models)


def test_two_models_answer_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (tiny_checkpoint(tmp_path / name, seed) for seed, name in enumerate("ab"))
    printed = answered(tmp_path, monkeypatch, "Ann has 3", given=[str(one), str(other)])
    assert printed.count("cut off") == 2
    assert str(one) in printed.splitlines()[0]
    assert str(other) in printed.splitlines()[0]


def test_the_oldest_turns_go_first(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_checkpoint(tmp_path))
    opening = Message("system", "Be brief.")
    turns = [Message("user" if i % 2 == 0 else "assistant", f"{i} " + "x" * 50) for i in range(11)]
    kept = fitted(tokenizer, [opening, *turns], 1, 250)
    assert kept[0] == opening
    assert kept[-1] == turns[-1]
    assert kept[1].role == "user"
    assert 2 <= len(kept) < 12
    with pytest.raises(UserError, match="shorten it"):
        fitted(tokenizer, [opening, Message("user", "x" * 400)], 1, 250)
