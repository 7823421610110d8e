"""Other trainers on the same work: plain loops over transformers models, its Trainer, TRL's SFTTrainer.

They are left at their defaults but for what the work says (rows, context, optimizer, no logging, no saving)
and for bfloat16, which is taken where the processor multiplies it natively and nowhere else, as on our side.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from benchmarks.work import (
    BLOCKS,
    CONTEXT,
    LEARNING_RATE,
    LONG_MEMBER,
    PAIRS,
    PAIRS_A_STEP,
    ROWS,
    SAMPLES,
    TEACHER,
    Work,
    blocks,
    dtype,
    preferences,
    samples,
)

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


def hf_loop(turns: Turns, work: Work) -> None:
    """The shortest loop around a transformers model."""
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


def trl_dpo(turns: Turns, work: Work) -> None:
    """TRL's DPOTrainer: the reference runs beside the policy, as it comes."""
    _dpo(turns, work, preferences(work.vocab_size, PAIRS), PAIRS_A_STEP, gradient_checkpointing=False)


def trl_dpo_long(turns: Turns, work: Work) -> None:
    """One pair of long members a step, with TRL's default of activation checkpointing."""
    _dpo(turns, work, preferences(work.vocab_size, 8, LONG_MEMBER), 1, max_length=LONG_MEMBER)


def trl_dpo_long_precomputed(turns: Turns, work: Work) -> None:
    """The same with the reference precomputed, which spares its weights."""
    pairs = preferences(work.vocab_size, 8, LONG_MEMBER)
    _dpo(turns, work, pairs, 1, max_length=LONG_MEMBER, precompute_ref_log_probs=True)


def trl_gkd(turns: Turns, work: Work) -> None:
    """TRL's GKDTrainer on given responses (lmbda=0), forward KL (beta=0), from a teacher of 21M."""
    # imported here because TRL is needed for these rows alone
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [
        {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
        for prompt, chosen, _ in preferences(work.vocab_size, PAIRS)
    ]

    def collate(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in features)
        padded = [(row, longest - len(row["input_ids"])) for row in features]
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * left for row, left in padded]),
            "labels": torch.tensor([row["labels"] + [-100] * left for row, left in padded]),
            "attention_mask": torch.tensor([[1] * (longest - left) + [0] * left for _, left in padded]),
        }

    with tempfile.TemporaryDirectory() as directory:
        settings = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "gradient_checkpointing": False, "max_length": None}
        arguments = GKDConfig(directory, per_device_train_batch_size=PAIRS_A_STEP, **_quiet(), **settings)
        trainer = GKDTrainer(
            _model(work),
            _model(replace(work, shape=TEACHER)),
            arguments,
            data_collator=collate,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(work),
        )
        trainer.add_callback(_Held(turns, lambda: PAIRS_A_STEP))
        trainer.train()


def _dpo(turns: Turns, work: Work, pairs: Sequence[Any], a_step: int, **settings: Any) -> None:
    # imported here because TRL is needed for these rows alone
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def words(tokens: Sequence[int]) -> str:
        return "".join(f"<{token}> " for token in tokens)

    rows = [{"prompt": words(a), "chosen": words(b), "rejected": words(c)} for a, b, c in pairs]
    with tempfile.TemporaryDirectory() as directory:
        arguments = DPOConfig(directory, per_device_train_batch_size=a_step, **_quiet(), **settings)
        reference = _model(work) if work.shape is not None else None  # a saved model's is loaded by the trainer
        trainer = DPOTrainer(
            _model(work), reference, arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(work)
        )
        trainer.add_callback(_Held(turns, lambda: a_step))
        trainer.train()


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
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype() == "bfloat16"):
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
        arguments = TrainingArguments(directory, per_device_train_batch_size=ROWS, **{**_quiet(), "bf16": bf16})
        trainer = Trainer(_model(work), arguments, train_dataset=data)
        trainer.add_callback(_Held(turns, lambda: ROWS * CONTEXT))
        trainer.train()


def _quiet() -> dict[str, Any]:
    return {
        "use_cpu": True,
        "bf16": dtype() == "bfloat16",
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
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {f"<{index}>": index for index in range(work.vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="<0>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<0>", eos_token="<0>", unk_token="<0>")
