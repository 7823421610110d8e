"""sft: what is trained of whose conversations, what is too long, what goes on after a kill, and what does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_models import checkpoint, work

import upweight.stages.sft as stage
from upweight.core.errors import UserError
from upweight.core.records import Conversation, Message
from upweight.core.work import Estimate
from upweight.model import weights
from upweight.stages import sft
from upweight.store.jsonl import write_jsonl
from upweight.text.conversations import ConversationFiles
from upweight.text.tokenizer import Tokenizer
from upweight.train.optimizer import OptimizerConfig

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "12 + 30?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "assistant", "content": "it is 42."},
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": "what is 1 + 1?"},
            {"role": "assistant", "content": "it is 3.", "weight": 0},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "it is 2."},
        ]
    },
]
CONFIG = sft.Config(
    data=(),
    epochs=3,
    context=384,
    batch_tokens=384,
    microbatch_tokens=384,
    learning_rate=0.01,
    optimizer=OptimizerConfig(kind="adamw"),
    save_every_steps=1,
)


@pytest.fixture
def chats(tmp_path: Path) -> ConversationFiles:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS * 3))
    return ConversationFiles(str(tmp_path / "chats.jsonl"), source="chats")


def test_tool_calls_tools_and_flawed_turns(tmp_path: Path, chats: ConversationFiles) -> None:
    model = checkpoint(tmp_path / "base")
    summary = sft.run(replace(CONFIG, data=(chats,)), work(tmp_path / "sft", {"model": model}))
    assert summary["conversations"] == {"chats": 6}
    assert summary["final_loss"] < summary["first_loss"]
    runs = summary["mask_example"]
    text = "".join(run["text"] for run in runs)
    assert json.dumps(TOOL) in text  # the functions that may be called stand in the prompt
    assert [run["text"] for run in runs if run["trained"]] == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call><|im_end|>',
        "it is 42.<|im_end|>",
    ]
    tokenizer = Tokenizer.load(tmp_path / "sft" / "model")
    # trained: twice three calls and answers, three times the second turn of the flawed ones
    lengths = [len(tokenizer.encode(run["text"])) for run in runs if run["trained"]]
    trained = 3 * sum(lengths) + 3 * len(tokenizer.encode("it is 2.<|im_end|>"))
    assert summary["trained_share"] == round(trained / summary["tokens_an_epoch"], 4)
    loaded, shape = weights.load(tmp_path / "sft" / "model")
    assert weights.fingerprint(loaded) == summary["weights"]
    assert shape.max_context == 384  # the model had 128: it stands for the longer context that it was tuned at
    assert not (tmp_path / "sft" / "encoded").exists()


def test_a_killed_run_goes_on_and_ends_the_same(
    tmp_path: Path, chats: ConversationFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, inputs = replace(CONFIG, data=(chats,)), {"model": checkpoint(tmp_path / "base")}
    straight = sft.run(config, work(tmp_path / "straight", inputs))
    killed = work(tmp_path / "killed", inputs)
    original = stage.train

    def dies(*arguments: Any, **options: Any) -> Any:
        for report in original(*arguments, **options):
            yield report
            if report.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        sft.run(config, killed)
    monkeypatch.setattr(stage, "train", original)
    monkeypatch.setattr(stage, "_encode", None)  # encoding again would be an error: the conversations are kept
    assert sft.run(config, killed) == straight  # the first loss too, which the second life did not see


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_too_long_conversations(tmp_path: Path, too_long: Any) -> None:
    short = Conversation((Message("user", "a"), Message("assistant", "b")), "s")
    long = Conversation((Message("user", "a"), Message("assistant", "b " * 90)), "s")
    late = Conversation((Message("user", "a " * 90), Message("assistant", "b")), "s")  # nothing trained before the cut
    given = tmp_path / "given"
    given.mkdir()
    write_jsonl(given / "c.jsonl", [short, long, late])
    config = replace(CONFIG, data=(sft.Part("chats/c.jsonl"),), context=64, too_long=too_long)
    inputs = {"model": checkpoint(tmp_path / "base"), "chats": given}
    summary = sft.run(config, work(tmp_path / "out", inputs))
    assert summary["too_long"] == 2
    tokenizer = Tokenizer.load(tmp_path / "out" / "model")
    alone = len(tokenizer.encode("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"))
    assert summary["tokens_an_epoch"] == alone + (64 if too_long == "cut" else 0)
    with pytest.raises(UserError, match="none of 2 conversations fits a context of 8 tokens; the shortest has"):
        sft.run(
            replace(config, context=8, too_long="drop", data=(sft.Part("chats/c.jsonl", most=2),)),
            work(tmp_path / "o2", inputs),
        )


def test_another_rope_base(tmp_path: Path, chats: ConversationFiles) -> None:
    config = replace(CONFIG, data=(chats,), epochs=1, rope_base=4e4)
    sft.run(config, work(tmp_path / "sft", {"model": checkpoint(tmp_path / "base")}))
    assert weights.read_config(tmp_path / "sft" / "model").rope_base == 4e4


def test_what_does_not_fit_is_refused(tmp_path: Path, chats: ConversationFiles) -> None:
    config = replace(CONFIG, data=(chats,))
    few = checkpoint(tmp_path / "few", extra=-5)
    with pytest.raises(UserError, match=r"290 tokens, but the model .*few/model has embeddings for 285"):
        sft.run(config, work(tmp_path / "o1", {"model": few}))
    # a tokenizer without the control tokens of the template: the end of a turn would be several tokens
    bare = checkpoint(tmp_path / "bare")
    Tokenizer.train(["what is it? 12"] * 9, 280, control_tokens=("<|endoftext|>",)).save(bare / "model")
    with pytest.raises(UserError, match=r"chats\.jsonl:1: message 1 .*no control token at the end of the turn"):
        sft.run(config, work(tmp_path / "o2", {"model": bare}))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    with pytest.raises(UserError, match=r"conversation .*chats\.jsonl:1: no turn of a conversation of 1 messages"):
        sft.run(config, work(tmp_path / "o3", {"model": checkpoint(tmp_path / "base")}))
    with pytest.raises(UserError, match="no input 'other'"):
        sft.run(replace(config, data=(sft.Part("other/c.jsonl"),)), work(tmp_path / "o4", {"model": tmp_path / "base"}))


def test_the_estimate_counts_what_the_artifact_can_hold() -> None:
    model, some = Estimate(parameters=1e6), Estimate(disk_bytes=50 * stage.BYTES_A_CONVERSATION)

    def count(part: sft.Part, **inputs: Estimate) -> float:
        found = sft.estimate(replace(CONFIG, data=(part,)), {"model": model, **inputs})
        return found.tokens / (CONFIG.epochs * CONFIG.context / 3)

    part = sft.Part("some/c.jsonl")
    assert count(part, some=some) == 50
    assert count(replace(part, most=20), some=some) == 20
    assert count(replace(part, most=80), some=some) == 50
    known = Estimate(disk_bytes=1e9, records={"c.jsonl": 70})
    assert (count(part, some=known), count(replace(part, most=20), some=known)) == (70, 20)
    assert count(part, some=Estimate()) == count(part) == stage.ASSUMED_CONVERSATIONS  # nobody knows
