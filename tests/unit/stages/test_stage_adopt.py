"""adopt: a checkpoint from outside becomes one of the run, with a tokenizer that fits it."""

import json
from pathlib import Path

import pytest
from small_models import checkpoint, work
from transformers import GPT2Config, GPT2LMHeadModel

from upweight.core.errors import UserError
from upweight.model.language_model import load
from upweight.stages import adopt, sft
from upweight.text.conversations import ConversationFiles
from upweight.text.tokenizer import Tokenizer
from upweight.train.optimizer import OptimizerConfig


def test_a_llama_is_adopted(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "theirs", extra=20, template="{{ messages }}") / "model"
    summary = adopt.run(adopt.Config(str(source)), work(tmp_path / "ours", {}))
    model, shape = load(tmp_path / "ours" / "model")
    assert summary["parameters"] == shape.parameter_count() == sum(p.numel() for p in model.parameters())
    assert (summary["vocabulary"], shape.vocab_size) == (290, 310)  # padded embeddings are no fault
    assert Tokenizer.load(tmp_path / "ours" / "model").chat_template == "{{ messages }}"
    assert adopt.estimate(adopt.Config(str(source)), {}).parameters == summary["parameters"]


def test_another_architecture_is_adopted_and_tuned(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "theirs") / "model"
    for file in ("config.json", "model.safetensors"):
        (source / file).unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(source)
    adopt.run(adopt.Config(str(source)), work(tmp_path / "ours", {}))
    chat = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it is 42."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    config = sft.Config(
        data=(ConversationFiles(str(tmp_path / "chats.jsonl")),),
        epochs=4,
        context=64,
        batch_tokens=64,
        microbatch_tokens=64,
        learning_rate=0.01,
        optimizer=OptimizerConfig(kind="adamw"),
    )
    summary = sft.run(config, work(tmp_path / "sft", {"model": tmp_path / "ours"}))
    assert summary["final_loss"] < summary["first_loss"]
    tuned = GPT2LMHeadModel.from_pretrained(tmp_path / "sft" / "model")  # transformers opens what was trained
    assert tuned.config.n_layer == 1
    with pytest.raises(UserError, match="keeps its own"):
        sft.run(
            sft.Config(data=config.data, context=128, batch_tokens=128, epochs=1),
            work(tmp_path / "long", {"model": tmp_path / "ours"}),
        )


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "theirs", extra=-1) / "model"
    with pytest.raises(UserError, match=r"290 tokens, but the model .* has embeddings for 289"):
        adopt.run(adopt.Config(str(source)), work(tmp_path / "ours", {}))


def test_sizes_of_hub_models_are_planned_by_name() -> None:
    for name, size in (("Qwen/Qwen3-0.6B", 0.6e9), ("x/SmolLM2-135M-Instruct", 135e6), ("x/y", 0.0)):
        assert adopt.estimate(adopt.Config(name), {}).parameters == size
