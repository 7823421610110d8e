"""Decoding, a GRPO step and a DPD step on one CUDA device.

    python benchmarks/gpu_sampling.py --out gpu_sampling.json [--only decode uneven grpo dpd] [--seconds 240]

The shape is that of Qwen3-0.6B with random weights, in bfloat16 where a sampler reads them. Decoding goes against
transformers' `generate` of the same shape and prompts, a turn each in one process; a turn is one call, and ratios are
taken turn by turn. The GRPO step samples and trains (float32 weights, bfloat16 products). The DPD step is one pair of
two responses of `--member` tokens, with a live teacher and a stored reference, whose logits would take 2 x 16K x 152k
numbers.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_training import DEVICE, PEER, make, transformers_model
from benchmarks.sampling import GROUP, GROUPS, Numbers, _written
from upweight.core.protocols import Limits
from upweight.core.records import Completion
from upweight.core.work import Machine
from upweight.model.transformer import Transformer
from upweight.objectives.dpd import Dpd, EncodedPair, pair_batch
from upweight.objectives.grpo import Grpo, group_advantages
from upweight.rollout.local import LocalSampler
from upweight.synthesize.encoded import referenced
from upweight.train.batching import Loader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Setting, constant
from upweight.train.trainer import train

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 128, 256
LONGEST, MEAN = 1024, 64
"""Uneven lengths: of 1,024 tokens at most, 64 on average."""


def prompts(count: int) -> list[list[int]]:
    """The same prompts for everyone."""
    draw = Random(0)
    return [[draw.randrange(1, PEER.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def policy() -> Transformer:
    """The shape with random weights that make some tokens likelier than others."""
    model = make(PEER)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)
    return model


class Bench:
    """The rows, printed and written as they come."""

    def __init__(self, out: Path | None, seconds: float, only: Sequence[str]) -> None:
        self.out, self.seconds, self.only = out, seconds, only
        self.begun = time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    def attempt(self, kind: str, run: Callable[[], dict[str, Any]]) -> None:
        """One row, unless it was not asked for or there is no time left; a row that fails costs only itself."""
        if self.only and kind not in self.only:
            return
        if time.perf_counter() - self.begun > self.seconds:
            row: dict[str, Any] = {"skipped": f"{self.seconds:.0f} s were over"}
        else:
            torch.cuda.reset_peak_memory_stats()
            try:
                row = run()
            except Exception as error:  # noqa: BLE001  # one row must not cost the others
                traceback.print_exc()
                row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        row = {"row": kind, **row, "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)}
        self.rows.append({**row, "at_seconds": round(time.perf_counter() - self.begun, 1)})
        print(json.dumps(self.rows[-1]), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.rows, indent=1))
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def clocked(call: Callable[[], int]) -> tuple[int, float]:
    """Tokens made by one call, and its seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    made = call()
    torch.cuda.synchronize()
    return made, time.perf_counter() - started


def contest(sides: dict[str, Callable[[], int]], turns: int) -> dict[str, Any]:
    """Tokens a second of each side, a turn each; the first side's ratio to each other one, turn by turn."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns + 1):
        for side, call in sides.items():
            made, seconds = clocked(call)
            if turn:  # the first one compiles, records and fills caches
                rates[side].append(made / seconds)
    first = next(iter(rates.values()))
    row: dict[str, Any] = {}
    for side, values in rates.items():
        row[f"{side}, tokens/s"] = [round(value) for value in values]
        ratios = sorted(ours / theirs for ours, theirs in zip(first, values, strict=True))
        row[f"ratio to {side}"] = [round(value, 2) for value in (statistics.median(ratios), ratios[0], ratios[-1])]
    return row


def theirs(model: Transformer) -> Any:
    """transformers' model of the same shape; what its weights are does not change its speed."""
    from transformers import GenerationConfig

    peer = transformers_model(model.config)
    peer = peer.eval().to(torch.bfloat16)
    peer.generation_config = GenerationConfig(pad_token_id=0)
    return peer


def decode() -> dict[str, Any]:
    """64 rows of the same length: graphs, single launches, generate with its default cache."""
    model = policy().to(torch.bfloat16)
    peer = theirs(model)
    given = prompts(PROMPTS)
    texts = [" ".join(map(str, prompt)) for prompt in given]
    rows = torch.tensor(given, device=DEVICE)
    limits = Limits(NEW_TOKENS, seed=1)

    def ours(graphs: bool) -> int:
        model.step_graphs = graphs
        sampler = LocalSampler(model, Numbers(), batch_rows=PROMPTS)  # type: ignore[arg-type]
        return sum(len(group[0].tokens) for group in sampler.sample(texts, count=1, limits=limits))

    def generate() -> int:
        with torch.inference_mode():
            out = peer.generate(
                rows, attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS
            )
        return int(out[:, PROMPT_TOKENS:].numel())

    row = contest({"graphs": lambda: ours(True), "single launches": lambda: ours(False), "generate": generate}, turns=3)
    return {"what": f"{PROMPTS} prompts of {PROMPT_TOKENS}, {NEW_TOKENS} new tokens, bfloat16", **row}


def uneven() -> dict[str, Any]:
    """Rows that end at any time."""
    model = policy().to(torch.bfloat16)
    peer = theirs(model)
    given = prompts(2 * PROMPTS)
    ends = sorted(Random(1).sample(range(1, PEER.vocab_size), PEER.vocab_size // MEAN))
    texts = [" ".join(map(str, prompt)) for prompt in given]
    rows = torch.tensor(given, device=DEVICE)
    sampler = LocalSampler(model, Numbers(ends), batch_rows=PROMPTS)  # type: ignore[arg-type]

    def ours() -> int:
        groups = sampler.sample(texts, count=1, limits=Limits(LONGEST, seed=1))
        return sum(len(group[0].tokens) for group in groups)

    def generate() -> int:
        made = 0
        for part in rows.split(PROMPTS):
            with torch.inference_mode():
                out = peer.generate(
                    part, attention_mask=torch.ones_like(part), do_sample=True, top_k=0, max_new_tokens=LONGEST,
                    eos_token_id=ends,
                )[:, PROMPT_TOKENS:]  # fmt: skip
            made += _written(out.cpu(), ends)
        return made

    what = f"{2 * PROMPTS} prompts of {PROMPT_TOKENS}, 1 to {LONGEST} new tokens, {MEAN} on average, bfloat16"
    return {"what": what, **contest({"ours": ours, "generate": generate}, turns=2)}


class Given(Loader):
    """The steps that a function makes."""

    def __init__(self, make_step: Callable[[int], Sequence[Any]]) -> None:
        self.make_step, self.steps = make_step, 0

    @property
    def consumed(self) -> int:
        return self.steps

    def next(self, setting: Setting) -> Sequence[Any]:
        self.steps += 1
        return self.make_step(self.steps)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        raise NotImplementedError


def grpo() -> dict[str, Any]:
    """Sampling, advantages and one update, with the seconds of both halves."""
    model = policy()
    sampler = LocalSampler(model, Numbers(), dtype="bfloat16")  # type: ignore[arg-type]
    objective = Grpo(mismatch_bound=5.0)
    texts = [" ".join(map(str, prompt)) for prompt in prompts(GROUPS)]
    sampling: list[float] = []

    def step(number: int) -> Sequence[Any]:
        torch.cuda.synchronize()
        started = time.perf_counter()
        groups = sampler.sample(texts, count=GROUP, limits=Limits(NEW_TOKENS, seed=number))
        torch.cuda.synchronize()
        sampling.append(time.perf_counter() - started)
        items = []
        for text, group in zip(texts, groups, strict=True):
            scores = [float(one.tokens[0] < PEER.vocab_size / 2) for one in group]
            for one, advantage in zip(group, group_advantages(scores), strict=True):
                whole = Completion(one.tokens, one.logprobs, one.text, "end", one.policy)
                items.append((tuple(map(int, text.split())), whole, float(advantage)))
        return objective.batches(items, row_tokens=8192)

    steps = train(
        model,
        objective=objective,
        loader=Given(step),
        timeline=constant(total=100, lr=1e-6),
        optimizer=OptimizerConfig(kind="adamw"),
        machine=Machine(device=DEVICE, compile="on"),
        dtype="bfloat16",
    )
    seconds, terms = [], {}
    for _ in range(5):
        started = time.perf_counter()
        report = next(steps)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        terms = {name: round(float(value), 5) for name, value in report.terms.items()}
    return {
        "what": f"{GROUPS} x {GROUP} completions of {NEW_TOKENS}, prompts of {PROMPT_TOKENS}",
        "step_seconds": [round(value, 3) for value in seconds],
        "of_which_sampling": [round(value, 3) for value in sampling],
        "completions_per_second": round(GROUPS * GROUP / statistics.median(seconds[2:]), 1),
        "terms": terms,
    }


def dpd(member: int) -> dict[str, Any]:
    """One pair, all three terms."""
    model = policy()
    teacher = policy().to(torch.bfloat16).requires_grad_(False)
    draw = Random(2)
    one, other = ([draw.randrange(1, PEER.vocab_size) for _ in range(member)] for _ in range(2))
    pair = EncodedPair(tuple(prompts(1)[0]), tuple(one), tuple(other))
    with torch.autocast(DEVICE, torch.bfloat16):
        pairs = referenced(model, [pair], row_tokens=member + PROMPT_TOKENS)
    objective = Dpd(teacher)
    batch = pair_batch(pairs, member + PROMPT_TOKENS, None, objective.members)
    steps = train(
        model,
        objective=objective,
        loader=Given(lambda number: [batch]),
        timeline=constant(total=100, lr=1e-6),
        optimizer=OptimizerConfig(kind="adamw"),
        machine=Machine(device=DEVICE, compile="on", recompute=0.5),
        dtype="bfloat16",
    )
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        report = next(steps)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    logits = 2 * member * PEER.vocab_size * 4 / 1e9
    return {
        "what": f"DPD, one pair of 2 x {member} tokens, vocabulary {PEER.vocab_size:,}, live teacher of the same shape",
        "step_seconds": [round(value, 2) for value in seconds],
        "tokens_per_second": round(2 * member / statistics.median(seconds[2:])),
        "logits_of_one_side_gb": round(logits, 1),
        "loss": round(float(report.loss), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no row after so many")
    parser.add_argument("--member", type=int, default=16_384, help="tokens of each response of the DPD pair")
    parser.add_argument("--only", nargs="*", default=[], help="decode, uneven, grpo, dpd")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    print(torch.cuda.get_device_properties(0).name, torch.__version__, flush=True)
    bench = Bench(given.out, given.seconds, given.only)
    bench.attempt("decode", decode)
    bench.attempt("grpo", grpo)
    bench.attempt("dpd", lambda: dpd(given.member))
    bench.attempt("uneven", uneven)


if __name__ == "__main__":
    main()
