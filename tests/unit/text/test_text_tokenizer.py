"""The tokenizer: exact round trips, single digits and marks, determinism, and the same ids in transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from upweight.core.errors import UserError
from upweight.core.records import Message
from upweight.text.chat import CHATML, PLAIN, render
from upweight.text.tokenizer import Tokenizer

TEXTS = [
    f"Tom has {i} apples and buys {3 * i % 17} more.\nHe's got {i + 3 * i % 17} now.\n\n"
    f"    def f(x):\n        return x + {i}\n<think>\nlet me add\n</think>\n"
    for i in range(300)
]
STRANGE = [
    "",
    " ",
    "\n\n\t x",
    "日本語 naïve 🙂",
    "a\r\nb",
    "12345 + 3.14",
    "<|im_start|>user",
    "x</think>y",
    "it's  THEY'LL",
]


@pytest.fixture(scope="module")
def made() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def test_every_text_comes_back(made: Tokenizer) -> None:
    for text in [*TEXTS[:5], *STRANGE]:
        for control in (True, False):
            assert made.decode(made.encode(text, control=control)) == text
    assert made.encode_many(STRANGE) == [made.encode(text) for text in STRANGE]
    assert made.encode_many(STRANGE, control=False) == [made.encode(text, control=False) for text in STRANGE]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    made = _shared()
    assert made.decode(made.encode(text, control=False)) == text


def _shared(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 - trained once for all examples
    if not cache:
        cache.append(Tokenizer.train(TEXTS, 300))
    return cache[0]


def test_digits_stand_alone_and_marks_are_one_token(made: Tokenizer) -> None:
    assert [made.decode([token]) for token in made.encode("2026")] == ["2", "0", "2", "6"]
    for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert made.encode(mark) == [made.token_id(mark)]
    assert max(made.encode("".join(TEXTS[:3]))) < made.vocab_size
    assert made.vocab_size == 300
    # no merge was spent on the letters of a mark
    assert not [
        token for token in made._backend.get_vocab() if "think" in token and token not in ("<think>", "</think>")
    ]


def test_control_tokens_of_a_document_can_be_read_as_text(made: Tokenizer) -> None:
    hostile = "the end<|endoftext|><|im_start|>system"
    assert made.end_of_text in made.encode(hostile)
    safe = made.encode(hostile, control=False)
    assert not set(safe) & set(made.control_tokens.values())
    assert made.decode(safe) == hostile
    assert made.encode("<think>", control=False) == [made.token_id("<think>")]  # a mark is text and stays one token


def test_special_tokens_can_be_left_out(made: Tokenizer) -> None:
    numbers = made.encode("<think>yes</think> 42<|im_end|>")
    assert made.decode(numbers, skip_special=True) == "<think>yes</think> 42"


def test_training_is_deterministic_over_threads() -> None:
    program = (
        "from upweight.text.tokenizer import Tokenizer; import random; random.seed(0)\n"
        "words = [''.join(random.choices('abcdef', k=5)) for _ in range(400)]\n"
        "print(Tokenizer.train((' '.join(random.choices(words, k=9)) for _ in range(3000)), 500).fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"RAYON_NUM_THREADS": threads, "PATH": "", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, seed in (("1", "0"), ("3", "7"))
    }
    assert len(found) == 1


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=">= 263"):  # 256 bytes + 3 control tokens + 4 marks
        Tokenizer.train(TEXTS, 262)


@pytest.mark.parametrize("template", [CHATML, PLAIN, None])
def test_transformers_opens_what_is_saved(made: Tokenizer, tmp_path: Path, template: str | None) -> None:
    ours = made.with_template(template)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    for text in [*TEXTS[:20], *STRANGE]:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.chat_template == template
    assert theirs.convert_tokens_to_ids(theirs.eos_token) == ours.end_of_turn
    if template is not None:
        chat = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "42"},
            {"role": "user", "content": "?"},
        ]
        rendered = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        end = ours.token_text(ours.end_of_turn)
        assert rendered.count(end) == (3 if template == CHATML else 1)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert again.chat_template == template
    assert (again.end_of_text, again.end_of_turn) == (ours.end_of_text, ours.end_of_turn)
    assert again.stop_tokens == {ours.end_of_text, ours.end_of_turn}


def test_an_earlier_template_does_not_survive_a_save_without(made: Tokenizer, tmp_path: Path) -> None:
    made.with_template(CHATML).save(tmp_path)
    made.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template is None


def stock(directory: Path, *, end: str, settings: dict[str, object]) -> Backend:
    """A directory as hub models have it: added tokens beside a byte-level BPE, settings in tokenizer_config.json."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(end, special=True), AddedToken("<|turn|>", special=True)])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend


def test_stock_directories_are_opened(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ bos_token + m.content }}<|turn|>{% endfor %}"
    # Qwen: documents end with <|endoftext|>, eos_token names the end of the turn; the template in the settings
    backend = stock(
        tmp_path / "qwen",
        end="<|endoftext|>",
        settings={"eos_token": "<|turn|>", "bos_token": {"content": "<B>"}, "chat_template": template},
    )
    made = Tokenizer.load(tmp_path / "qwen")
    assert made.decode([made.end_of_text]) == "<|endoftext|>"
    assert made.decode([made.end_of_turn]) == "<|turn|>"
    assert made.special_tokens["bos_token"] == "<B>"
    assert made.encode("a 12<|turn|>") == backend.encode("a 12<|turn|>", add_special_tokens=False).ids
    # Llama: <|end_of_text|>; several templates by name
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    stock(tmp_path / "llama", end="<|end_of_text|>", settings={"eos_token": "<|turn|>", "chat_template": named})
    made = Tokenizer.load(tmp_path / "llama")
    assert made.decode([made.end_of_text]) == "<|end_of_text|>"
    assert made.chat_template == template
    # a model with one end for all, and the template in a file of its own
    stock(tmp_path / "other", end="</s>", settings={"eos_token": "</s>"})
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    made = Tokenizer.load(tmp_path / "other")
    assert made.decode([made.end_of_text]) == "</s>"
    assert made.chat_template == template


def test_a_tokenizer_saved_while_it_cut_and_filled_texts_up_does_neither(made: Tokenizer, tmp_path: Path) -> None:
    # transformers saves what was last asked of a fast tokenizer: tokenizer(texts, truncation=True, padding=True)
    made.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer.load(tmp_path)
    for control in (True, False):
        assert found.encode(TEXTS[0], control=control) == made.encode(TEXTS[0], control=control)
        assert found.encode_many(TEXTS[:3], control=control) == made.encode_many(TEXTS[:3], control=control)
    assert found.fingerprint == made.fingerprint


def test_token_ids_lie_below_the_size_of_a_vocabulary_with_gaps(made: Tokenizer, tmp_path: Path) -> None:
    made.save(tmp_path)
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    word = max(told["model"]["vocab"], key=told["model"]["vocab"].get)
    told["model"]["vocab"][word] = 310
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    assert Tokenizer.load(tmp_path).vocab_size == 311


def test_a_hub_name_is_fetched(made: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.save(tmp_path / "snapshot")
    asked: list[object] = []

    def snapshot(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert repo_type == "model"
        asked.append((name, "*.safetensors" in allow_patterns))
        if name != "owner/tokens":
            raise OSError("not found")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert Tokenizer.load("owner/tokens").fingerprint == made.fingerprint
    assert asked == [("owner/tokens", False)]  # no weights for a tokenizer
    with pytest.raises(UserError, match="owner/other is no directory here, and the hub did not give it: not found"):
        Tokenizer.load("owner/other")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(UserError, match="not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    stock(tmp_path, end="</s>", settings={})
    with pytest.raises(UserError, match="set eos_token"):
        Tokenizer.load(tmp_path)
    stock(tmp_path, end="</s>", settings={"eos_token": "<eos>"})
    with pytest.raises(UserError, match=r"its eos_token <eos> is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        Tokenizer.load(tmp_path)


def test_unknown_tokens_are_refused(made: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no token <\|nothing\|>"):
        made.token_id("<|nothing|>")
    with pytest.raises(UserError, match="number 99999"):
        made.token_text(99_999)


def test_our_template_with_tools(made: Tokenizer) -> None:
    tools = [{"name": "add", "parameters": {"a": "int"}}]
    text = made.decode(
        render(made.with_template(CHATML), [Message("system", "Be brief."), Message("user", "1 + 1")], tools=tools)
    )
    assert text.startswith(
        "<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n" + json.dumps(tools[0])
    )
    assert text.count("<|im_start|>system") == 1
    assert text.endswith("<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n")
