"""Other trainers on the same work: plain loops over transformers models, its Trainer, TRL's SFTTrainer.

They are left at their defaults but for what the work says (rows, context, optimizer, no logging, no saving).
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.contest import Turns
from benchmarks.work import BLOCKS, CONTEXT, LEARNING_RATE, ROWS, SAMPLES, Work, blocks, samples

SAMPLES_A_STEP = 8
"""Fine-tuning samples of one step where they are padded: the default batch size of transformers' Trainer."""

STEPS = 10**6
"""More steps than any contest takes."""


def hf_trainer(turns: Turns, work: Work) -> None:
    """transformers' Trainer at its defaults, which is float32 on a CPU."""
    _hf_trainer(turns, work, bf16=False)


def hf_trainer_bf16(turns: Turns, work: Work) -> None:
    """transformers' Trainer with bf16=True."""
    _hf_trainer(turns, work, bf16=True)


def hf_loop_bf16(turns: Turns, work: Work) -> None:
    """The shortest loop around a transformers model, under bfloat16 autocast."""
    model = _model(work)
    _loop(turns, work, model, model)


def hf_loop_compiled(turns: Turns, work: Work) -> None:
    """The same with the whole model compiled."""
    model = _model(work)
    _loop(turns, work, model, torch.compile(model))


def trl_padding(turns: Turns, work: Work) -> None:
    """TRL's SFTTrainer as it comes, but without activation checkpointing, which costs it speed."""
    _trl(turns, work, per_device_train_batch_size=SAMPLES_A_STEP, gradient_checkpointing=False)


def trl_padding_free(turns: Turns, work: Work) -> None:
    """The samples of a step one after another in one row."""
    _trl(
        turns,
        work,
        per_device_train_batch_size=SAMPLES_A_STEP,
        gradient_checkpointing=False,
        padding_free=True,
        max_length=None,
    )


def trl_packing(turns: Turns, work: Work) -> None:
    """Samples packed into rows of the context by best fit."""
    _trl(turns, work, per_device_train_batch_size=ROWS, gradient_checkpointing=False, packing=True)


def trl_packing_checkpointed(turns: Turns, work: Work) -> None:
    """The same with TRL's default of activation checkpointing, which saves memory."""
    _trl(turns, work, per_device_train_batch_size=ROWS, packing=True)


def _model(work: Work) -> nn.Module:
    torch.manual_seed(0)
    if work.shape is None:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
        return loaded
    shape = work.shape
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.max_context,
            rms_norm_eps=shape.norm_epsilon,
            tie_word_embeddings=shape.tied,
        )
    )


def _loop(turns: Turns, work: Work, model: nn.Module, called: Callable[..., Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for tokens in cycle(_rows(work)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = called(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not turns.step(tokens.numel()):
            return


def _rows(work: Work) -> Iterator[Tensor]:
    documents = blocks(work.vocab_size, BLOCKS)
    for start in range(0, BLOCKS - ROWS + 1, ROWS):
        yield torch.tensor(documents[start : start + ROWS])


class _Held(TrainerCallback):  # type: ignore[misc]
    """Stops a Trainer between its steps while others have their turn."""

    def __init__(self, turns: Turns, tokens: Callable[[], int]) -> None:
        self._turns, self._tokens = turns, tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = not self._turns.step(self._tokens())


def _hf_trainer(turns: Turns, work: Work, *, bf16: bool) -> None:
    data = [{"input_ids": block, "labels": block} for block in blocks(work.vocab_size, BLOCKS)]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(directory, per_device_train_batch_size=ROWS, bf16=bf16, **_quiet())
        trainer = Trainer(_model(work), arguments, train_dataset=data)
        trainer.add_callback(_Held(turns, lambda: ROWS * CONTEXT))
        trainer.train()


def _quiet() -> dict[str, Any]:
    return {
        "use_cpu": True,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _trl(turns: Turns, work: Work, **settings: Any) -> None:
    # imported here because TRL is needed for this row alone
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": tokens, "completion_mask": [int(part) for part in trained]}
        for tokens, trained in samples(work.vocab_size, SAMPLES)
    ]
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(directory, **{"max_length": CONTEXT, **_quiet(), **settings})
        trainer = SFTTrainer(
            _model(work), arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(work)
        )
        read: deque[int] = deque()  # the loader collates a batch ahead of the step
        collate = trainer.data_collator

        def counted(features: Sequence[Mapping[str, Any]]) -> Any:
            batch = collate(features)
            mask = batch.get("attention_mask")
            read.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        trainer.add_callback(_Held(turns, read.popleft))
        trainer.train()


def _tokenizer(work: Work) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{index}>": index for index in range(work.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<0>", unk_token="<0>"
    )
