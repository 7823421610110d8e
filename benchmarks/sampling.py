"""Decoding and reinforcement: ours, transformers' generate and TRL's GRPOTrainer on the same prompts.

Prompts are numbers written out, one a token, so that no tokenizer of a real model is needed. Nothing stops a completion
before its length but, in the uneven contests, any of ENDS tokens, so that lengths are geometric as those of a model's
answers are.
"""

import tempfile
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks import ours
from benchmarks.contest import Turns
from benchmarks.peers import _Held, _quiet, _tokenizer
from benchmarks.peers import _model as their_model
from benchmarks.work import LEARNING_RATE, Work, dtype
from upweight.core.protocols import Limits, Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.objectives.grpo import Grpo, group_advantages
from upweight.rollout.local import LocalSampler
from upweight.train.batching import Loader
from upweight.train.timeline import Setting, constant
from upweight.train.trainer import train

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 64
ENDS, LONGEST = 128, 256
"""Uneven lengths: with 128 of 4,096 tokens ending a completion, a random model writes 32 on average."""

GROUPS, GROUP = 8, 8
"""Of a GRPO step."""


class Numbers:
    """A tokenizer of texts that are token ids, with what a sampler asks of one."""

    chat_template = None

    def __init__(self, ends: Sequence[int] = ()) -> None:
        self.stop_tokens = frozenset(ends)
        self.end_of_text = self.end_of_turn = 0

    def encode(self, text: str) -> list[int]:
        return [int(part) for part in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def prompts(vocab_size: int, count: int = PROMPTS) -> list[list[int]]:
    """The same prompts for everyone."""
    draw = Random(0)
    return [[draw.randrange(1, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def ends(vocab_size: int) -> list[int]:
    """Tokens that end a completion of uneven length."""
    return sorted(Random(1).sample(range(1, vocab_size), ENDS * vocab_size // 4096))


def decode(turns: Turns, work: Work) -> None:
    """LocalSampler, as a stage uses it."""
    _decode(turns, work, [], NEW_TOKENS, PROMPTS, 1)


def decode_uneven(turns: Turns, work: Work) -> None:
    """The same with rows that end at any time: finished ones make room for others."""
    _decode(turns, work, ends(work.vocab_size), LONGEST, 2 * PROMPTS, 1)


def decode_group(turns: Turns, work: Work) -> None:
    """One prompt, sixteen completions."""
    _decode(turns, work, [], NEW_TOKENS, 1, 16)


def _decode(turns: Turns, work: Work, stops: Sequence[int], new: int, count: int, group: int) -> None:
    sampler: Any = LocalSampler(ours._model(work), Numbers(stops), batch_rows=PROMPTS, dtype=dtype())  # type: ignore[arg-type]
    texts = [" ".join(map(str, prompt)) for prompt in prompts(work.vocab_size, count)]
    for seed in range(10**6):
        groups = sampler.sample(texts, count=group, limits=Limits(new, seed=seed))
        if not turns.step(sum(len(one.tokens) for made in groups for one in made)):
            return


def hf_dynamic(turns: Turns, work: Work) -> None:
    """transformers' generate with its default cache."""
    _generate(turns, work, [], NEW_TOKENS, PROMPTS, 1)


def hf_static(turns: Turns, work: Work) -> None:
    """The same with a preallocated cache."""
    _generate(turns, work, [], NEW_TOKENS, PROMPTS, 1, cache_implementation="static")


def hf_uneven(turns: Turns, work: Work) -> None:
    """Batches of 64 that run until their longest row has ended."""
    _generate(turns, work, ends(work.vocab_size), LONGEST, 2 * PROMPTS, 1)


def hf_group(turns: Turns, work: Work) -> None:
    """One prompt, sixteen completions."""
    _generate(turns, work, [], NEW_TOKENS, 1, 16)


def _generate(turns: Turns, work: Work, stops: Sequence[int], new: int, count: int, group: int, **options: Any) -> None:
    kind = torch.bfloat16 if dtype() == "bfloat16" else torch.float32
    model: Any = their_model(work).eval().to(kind)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=list(stops) or None)
    rows = torch.tensor(prompts(work.vocab_size, count))
    asked = {"do_sample": True, "top_k": 0, "temperature": 1.0, "max_new_tokens": new, "num_return_sequences": group}
    while True:
        made = 0
        for part in rows.split(PROMPTS):
            with torch.inference_mode():
                out = model.generate(part, attention_mask=torch.ones_like(part), **asked, **options)
            made += _written(out[:, PROMPT_TOKENS:], stops)
        if not turns.step(made):
            return


def _written(tokens: torch.Tensor, stops: Sequence[int]) -> int:
    """Tokens up to and with the first that ends a row."""
    if not stops:
        return tokens.numel()
    ended = torch.isin(tokens, torch.tensor(stops))
    first = torch.where(ended.any(1), ended.float().argmax(1) + 1, tokens.shape[1])
    return int(first.sum())


class _Small(Verifier):
    """1 for a completion whose first token is small: half of them are."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(float(completion.tokens[0] < 2048), "") for completion in group]


class _Rollouts(Loader):
    def __init__(self, work: Work, model: Any) -> None:
        self.sampler: Any = LocalSampler(model, Numbers(), dtype=dtype())  # type: ignore[arg-type]
        self.prompts = prompts(work.vocab_size, 1024)
        self.objective = Grpo(mismatch_bound=5.0)
        self.steps = 0

    @property
    def consumed(self) -> int:
        return self.steps

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        raise NotImplementedError

    def next(self, setting: Setting) -> Sequence[Any]:
        start = self.steps * GROUPS % len(self.prompts)
        self.steps += 1
        some = self.prompts[start : start + GROUPS]
        texts = [" ".join(map(str, prompt)) for prompt in some]
        groups = self.sampler.sample(texts, count=GROUP, limits=Limits(NEW_TOKENS, seed=self.steps))
        items = []
        for prompt, group in zip(some, groups, strict=True):
            verdicts = _Small().score(Problem("", (Message("user", ""),)), group)
            advantages = group_advantages([verdict.score for verdict in verdicts])
            for one, advantage in zip(group, advantages, strict=True):
                # all of them are at the length limit, which TRL trains on: so do we here
                whole = Completion(one.tokens, one.logprobs, one.text, "end", one.policy)
                items.append((tuple(prompt), whole, float(advantage)))
        return self.objective.batches(items, row_tokens=8192)


def grpo(turns: Turns, work: Work) -> None:
    """Sampling, rewards and one update, as the stage does it."""
    model = ours._model(work)
    loader = _Rollouts(work, model)
    reports = train(
        model,
        objective=loader.objective,
        loader=loader,
        timeline=constant(total=ours.LONG, lr=LEARNING_RATE),
        optimizer=ours.ADAMW,
        dtype=dtype(),
    )
    for _ in reports:
        if not turns.step(GROUPS * GROUP):
            return


def trl_grpo(turns: Turns, work: Work) -> None:
    """TRL's GRPOTrainer with transformers' generate, no KL term, activation checkpointing off."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = _tokenizer(work)
    tokenizer.pad_token, tokenizer.padding_side = "<0>", "left"
    rows = ["".join(f"<{token}>" for token in prompt) for prompt in prompts(work.vocab_size, 1024)]

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(ids[0] < 2048) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as directory:
        arguments = GRPOConfig(
            directory,
            per_device_train_batch_size=GROUPS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=0.0,
            gradient_checkpointing=False,
            **_quiet(),
        )
        trainer = GRPOTrainer(
            their_model(work),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": row} for row in rows]),
            processing_class=tokenizer,
        )
        trainer.add_callback(_Held(turns, lambda: GROUPS * GROUP))
        trainer.train()
