"""Training speed on one CUDA device: tokens a second, the share of the peak (MFU) and peak memory.

    python benchmarks/gpu_training.py --out gpu_training.json [--only 3b 0.6b peer packed attention] [--seconds 240]

Every row goes through `upweight.train.trainer.train`: forward, chunked loss, backward, clipping, optimizer and all of
the loop's own work, with random tokens. Weights, gradients and optimizer state are float32, matrix products bfloat16.

    MFU = tokens/s x FLOPs per token / peak
    FLOPs per token = 6 x (matrix weights, the unembedding included, the embedding not) + 6 x layers x heads x head size
                      x (context + 1), the causal half of attention alone

What is computed again to save memory is not counted. The peak is measured here (bfloat16 product of 8192 x 8192
matrices of normal numbers); the nominal one of an H100 or H200 (989 TFLOP/s) is given beside it. In packed rows the
context of each document is its own length.

A row that does not fit the memory is said to, tried with more computed again, and left out then. Rows that would begin
after `--seconds` are skipped and named.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from upweight.core.batches import TokenBatch
from upweight.core.packing import Strip, lay, strip
from upweight.core.work import Machine
from upweight.model.config import ModelConfig
from upweight.model.transformer import Transformer
from upweight.objectives.next_token import NextToken
from upweight.train.batching import Loader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Setting, constant
from upweight.train.trainer import train

DEVICE = "cuda"
NOMINAL = 989e12
SPARE_BYTES = 2e9
"""Left free: the driver's own, and what falls between the allocator's blocks."""

BIG = ModelConfig(
    vocab_size=166_144, width=2560, layers=32, heads=20, kv_heads=4, ffn=10_496, head_size=128, tied=False,
    rope_base=500_000.0, max_context=32_768,
)  # fmt: skip
SMALL = ModelConfig(
    vocab_size=151_936, width=1024, layers=28, heads=16, kv_heads=8, ffn=3072, head_size=128, tied=True, qk_norm=True,
    rope_base=1_000_000.0, max_context=32_768,
)  # fmt: skip
PEER = ModelConfig(
    vocab_size=151_936, width=1024, layers=28, heads=16, kv_heads=8, ffn=3072, head_size=128, tied=True,
    rope_base=1_000_000.0, max_context=32_768,
)  # fmt: skip


class RandomRows(Loader):
    """The same microbatches of random tokens at every step."""

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        self.batches, self._steps = batches, 0

    @property
    def consumed(self) -> int:
        return self._steps

    def next(self, setting: Setting) -> Sequence[TokenBatch]:
        self._steps += 1
        return self.batches

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]


def rows(vocabulary: int, count: int, context: int, lengths: Sequence[int] = ()) -> TokenBatch:
    """`count` rows of `context` random tokens, each one sequence, or documents of `lengths` again and again."""
    random = np.random.default_rng(0)
    strips: list[Strip] = []
    placed: list[list[int]] = []
    number = 0
    for _ in range(count):
        row: list[int] = []
        left = context
        while left > 0:
            length = min(left, lengths[number % len(lengths)] if lengths else context)
            tokens = random.integers(0, vocabulary, length).tolist()
            row.append(len(strips))
            strips.append(strip(tokens, [1.0] * length))
            left, number = left - length, number + 1
        placed.append(row)
    return lay(strips, placed, context)


def flops(config: ModelConfig, batch: TokenBatch) -> float:
    """Of training on a batch: three times the forward pass, each sequence by its own length."""
    lengths = torch.bincount(batch.segments.flatten() + 1)[1:].double()
    fixed = config.flops_per_token(0)
    attention = config.flops_per_token(1) - fixed
    return float(3 * (fixed * lengths.sum() + attention * (lengths * (lengths + 1)).sum()))


def make(config: ModelConfig) -> Transformer:
    """A model of random weights, made on the device."""
    with torch.device(DEVICE):
        model = Transformer(config)
    torch.nn.init.normal_(model.embedding.weight, std=0.02)
    return model


def recompute_share(config: ModelConfig, tokens: int, state_bytes: int) -> float:
    """How much must be computed again for a microbatch of `tokens` to fit the memory; an estimate, on the safe side."""
    parameters = config.parameter_count()
    edge = config.vocab_size * config.width
    qkv = (config.heads + 2 * config.kv_heads) * config.head_size
    kept = 2 * (6 * config.width + 2 * qkv + 2 * config.heads * config.head_size + 3 * config.ffn) + 8 * config.width
    least = 4 * config.width
    working = tokens * (10 * config.ffn + 40 * config.width)
    fixed = parameters * (8 + state_bytes) + 8 * edge + working + 2.2e9 + SPARE_BYTES
    room = torch.cuda.get_device_properties(0).total_memory - fixed
    share = (room / (tokens * config.layers) - least) / (kept - least)
    return round(min(1.0, max(0.0, 1 - share)), 2)


def timed(name: str, steps: Iterator[Any], work: float, tokens: int, count: int, peak: float) -> dict[str, Any]:
    """Run a warm-up step and `count` steps of a generator; one row of the table."""
    begun = time.perf_counter()
    next(steps)
    torch.cuda.synchronize()
    warm = time.perf_counter() - begun
    torch.cuda.empty_cache()  # what the optimizer's state has not taken of the first step's blocks
    next(steps)
    torch.cuda.synchronize()
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        report = next(steps)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    middle = statistics.median(seconds)
    return {
        "row": name,
        "tokens_per_second": round(tokens / middle),
        "tflops": round(work / middle / 1e12, 1),
        "mfu_of_measured_peak": round(work / middle / peak, 4),
        "mfu_of_989": round(work / middle / NOMINAL, 4),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "step_seconds": [round(value, 4) for value in seconds],
        "first_step_seconds": round(warm, 1),
        "loss": round(float(report.loss), 3),
        "compiled_graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def ours(
    config: ModelConfig,
    batches: Sequence[TokenBatch],
    *,
    optimizer: str,
    recompute: float,
    compile_layers: str = "on",
    model: Transformer | None = None,
) -> Iterator[Any]:
    """Steps of our trainer."""
    return train(
        make(config) if model is None else model,
        objective=NextToken(),
        loader=RandomRows(batches),
        timeline=constant(total=10_000, lr=1e-4),
        optimizer=OptimizerConfig(kind=optimizer, weight_decay=0.1),  # type: ignore[arg-type]
        machine=Machine(device="cuda", compile=compile_layers, recompute=recompute),  # type: ignore[arg-type]
        dtype="bfloat16",
    )


def transformers_model(config: ModelConfig) -> Any:
    """transformers' model of the same shape with random weights, made on the device; torch's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_size,
        intermediate_size=config.ffn, tie_word_embeddings=config.tied, max_position_embeddings=config.max_context,
        attn_implementation="sdpa", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.device(DEVICE):
        return LlamaForCausalLM(shape)


def theirs(config: ModelConfig, batches: Sequence[TokenBatch], *, checkpointing: bool) -> Iterator[Any]:
    """Steps of the transformers model: bfloat16 autocast, torch's attention, its own loss, fused AdamW, clipping."""
    model = transformers_model(config)
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    read = [batch.tokens.cuda() for batch in batches]
    while True:
        for tokens in read:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            (loss / len(read)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield argparse.Namespace(loss=loss.detach())


def measured_peak() -> float:
    """FLOP/s of a large bfloat16 product of normal numbers."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    rates = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            left @ right
        end.record()
        torch.cuda.synchronize()
        rates.append(10 * 2 * 8192**3 / (begin.elapsed_time(end) / 1e3))
    return statistics.median(rates)


def print_kernels(steps: Iterator[Any]) -> None:
    """Where the time of one step goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        next(steps)
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90), flush=True)


def growing_segments() -> bool:
    """Let the allocator's blocks grow, so that memory does not break up; whether this machine can."""
    try:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        torch.zeros(1 << 26, device="cuda").sum().item()
    except (AttributeError, RuntimeError) as error:
        print(f"no growing segments: {error}", flush=True)
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        return False
    torch.cuda.empty_cache()
    return True


class Bench:
    """The rows in order, printed and written as they come."""

    def __init__(self, out: Path | None, seconds: float, only: Sequence[str], *, profile: bool = False) -> None:
        self.out, self.seconds, self.only, self.profile = out, seconds, only, profile
        self.begun = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.peak = NOMINAL

    def wants(self, kind: str) -> bool:
        """Whether rows of this kind were asked for and there is time to begin one."""
        if self.only and kind not in self.only:
            return False
        if time.perf_counter() - self.begun < self.seconds:
            return True
        self.add({"row": kind, "skipped": f"{self.seconds:.0f} s were over"})
        return False

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row and write all of them."""
        row = {**row, "at_seconds": round(time.perf_counter() - self.begun, 1)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps({"peak": self.peak, "rows": self.rows}, indent=1))

    def attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` returns; None where it failed, which becomes a row of its own. Memory is as before afterwards."""
        try:
            torch.cuda.reset_peak_memory_stats()
            result = run()
        except torch.OutOfMemoryError as error:
            self.add({"row": name, "failed": f"out of memory: {str(error)[:200]}"})
            result = None
        except Exception as error:  # noqa: BLE001  # one row must not cost the others
            traceback.print_exc()
            self.add({"row": name, "failed": f"{type(error).__name__}: {str(error)[:400]}"})
            result = None
        gc.collect()
        torch.compiler.reset()  # other sizes are other programs, not one with unknown sizes
        torch.cuda.empty_cache()
        return result

    def training(
        self,
        name: str,
        config: ModelConfig,
        batches: Sequence[TokenBatch],
        *,
        optimizer: str = "adamw",
        state_bytes: int = 8,
        steps: int = 2,
    ) -> None:
        """A row of our trainer, with as much computed again as the memory asks for."""
        tokens = batches[0].tokens.numel()
        share = recompute_share(config, tokens, state_bytes)
        work = sum(flops(config, batch) for batch in batches)
        count = sum(batch.token_count for batch in batches)
        for again in dict.fromkeys((share, round(min(1.0, share + 0.2), 2), 1.0)):

            def run(again: float = again) -> dict[str, Any]:
                run_steps = ours(config, batches, optimizer=optimizer, recompute=again)
                try:
                    row = timed(name, run_steps, work, count, steps, self.peak)
                    if self.profile:
                        self.profile = False
                        self.attempt("kernels", lambda: print_kernels(run_steps))
                finally:
                    run_steps.close()  # type: ignore[attr-defined]
                about = {"optimizer": optimizer, "recompute": again, "microbatch_tokens": tokens, "step_tokens": count}
                return {**row, **about}

            row = self.attempt(f"{name}, recompute {again}", run)
            if row is not None:
                self.add(row)
                return
            if "out of memory" not in self.rows[-1]["failed"]:
                return

    def against_transformers(self, config: ModelConfig, batches: Sequence[TokenBatch]) -> None:
        """Our trainer and the transformers model, some steps each in turn, in one process."""
        work = sum(flops(config, batch) for batch in batches)
        count = sum(batch.token_count for batch in batches)

        def run() -> dict[str, Any]:
            sides = {
                "ours": ours(config, batches, optimizer="adamw", recompute=0.0),
                "transformers": theirs(config, batches, checkpointing=False),
            }
            times: dict[str, list[float]] = {side: [] for side in sides}
            memory: dict[str, float] = {}
            for turn in range(4):
                for side, steps in sides.items():
                    torch.cuda.synchronize()
                    held = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    for _ in range(3):
                        started = time.perf_counter()
                        next(steps)
                        torch.cuda.synchronize()
                        if turn:
                            times[side].append(time.perf_counter() - started)
                    memory[side] = (torch.cuda.max_memory_allocated() - held) / 1e9
            row: dict[str, Any] = {"row": "0.6B 4K against transformers, interleaved", "step_tokens": count}
            for side, values in times.items():
                middle = statistics.median(values)
                row[f"{side}_tokens_per_second"] = round(count / middle)
                row[f"{side}_mfu_of_measured_peak"] = round(work / middle / self.peak, 4)
                row[f"{side}_step_seconds"] = [round(value, 4) for value in values]
                row[f"{side}_activations_gb"] = round(memory[side], 2)
            row["ratio"] = round(row["ours_tokens_per_second"] / row["transformers_tokens_per_second"], 3)
            return row

        row = self.attempt("0.6B 4K against transformers", run)
        if row is not None:
            self.add(row)

    def attention(self, context: int) -> None:
        """Forward and backward of one attention of the 3B shape by each kernel that torch has."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        heads, kv_heads, size = BIG.heads, BIG.kv_heads, BIG.head_size
        query = torch.randn(1, context, heads, size, device="cuda", dtype=torch.bfloat16)
        key, value = (torch.randn(1, context, kv_heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        parts = [part.transpose(1, 2).requires_grad_() for part in (query, key, value)]
        gradient = torch.randn(1, context, heads, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

        def with_sdpa() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

        def with_flex() -> Callable[[], torch.Tensor]:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def causal(row: Any, head: Any, q: Any, k: Any) -> Any:
                return q >= k

            mask = create_block_mask(causal, None, None, context, context, device="cuda")
            compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
            return lambda: compiled(*parts, block_mask=mask, enable_gqa=True)

        def with_varlen() -> Callable[[], torch.Tensor]:
            import inspect

            from torch.nn.attention.varlen import varlen_attn

            ends = torch.tensor([0, context], device="cuda", dtype=torch.int32)
            names = inspect.signature(varlen_attn).parameters
            print("varlen_attn", list(names), flush=True)
            causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
            if "enable_gqa" in names:
                causal["enable_gqa"] = True
            call: Callable[..., torch.Tensor] = varlen_attn
            flat = [part.detach().transpose(1, 2)[0].requires_grad_() for part in parts]
            return lambda: call(*flat, ends, ends, context, context, **causal)[None].transpose(1, 2)

        def rate(call: Callable[[], torch.Tensor], backend: Any = None) -> dict[str, float]:
            def both() -> None:
                out = call()
                out.backward(gradient)

            def forward() -> None:
                with torch.no_grad():
                    call()

            found = {}
            work = 4 * heads * size * context * context / 2
            for label, function, factor in (("forward", forward, 1.0), ("both", both, 3.5)):
                for _ in range(3):
                    function()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(5):
                    function()
                end.record()
                torch.cuda.synchronize()
                found[f"{label}_tflops"] = round(factor * work * 5 / (begin.elapsed_time(end) / 1e3) / 1e12, 1)
            return found

        def of_backend(backend: Any) -> dict[str, float]:
            with sdpa_kernel(backend):
                return rate(with_sdpa)

        kinds: dict[str, Callable[[], dict[str, float]]] = {
            "sdpa, torch's choice": lambda: rate(with_sdpa),
            "sdpa flash": lambda: of_backend(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": lambda: of_backend(SDPBackend.CUDNN_ATTENTION),
            "flex": lambda: rate(with_flex()),
            "varlen": lambda: rate(with_varlen()),
        }
        for kind, run in kinds.items():
            found = self.attempt(f"attention {context} {kind}", run)
            if found is not None:
                self.add({"row": f"attention, {context} tokens, {kind} (backward counted 2.5x)", **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no row after so many")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step of the 3B row")
    parser.add_argument("--only", nargs="*", default=[], help="3b, 3b32k, muon, 0.6b, peer, packed, attention")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    bench = Bench(given.out, given.seconds, given.only, profile=given.profile)
    properties = torch.cuda.get_device_properties(0)
    growing = growing_segments()
    bench.peak = measured_peak()
    bench.add(
        {
            "row": "bfloat16 matrix product, 8192",
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "torch": torch.__version__,
            "tflops": round(bench.peak / 1e12, 1),
            "cudnn": torch.backends.cudnn.version(),
            "growing_segments": growing,
        }
    )
    roomy = properties.total_memory > 120e9
    if bench.wants("attention"):
        bench.attention(4096)
        bench.attention(32_768)
    if bench.wants("3b"):
        batch = rows(BIG.vocab_size, 4 if roomy else 2, 4096)
        bench.training("3B 4K", BIG, [batch] * (4 if roomy else 8))
    muon = [rows(BIG.vocab_size, 4 if roomy else 2, 4096)] * (4 if roomy else 8)
    if not roomy and bench.wants("muon"):
        bench.training("3B 4K with Muon", BIG, muon, optimizer="muon", state_bytes=5)
    if bench.wants("3b32k"):
        batch = rows(BIG.vocab_size, 1, 32_768)
        kind, state = ("adamw", 8) if roomy else ("muon", 5)  # AdamW's state in float32 leaves too little of 80 GB
        bench.training(f"3B 32K, {kind}", BIG, [batch] * 2, optimizer=kind, state_bytes=state)
    if bench.wants("peer"):
        bench.against_transformers(PEER, [rows(PEER.vocab_size, 2, 4096)] * 2)
    if bench.wants("0.6b"):
        bench.training("0.6B 8K", SMALL, [rows(SMALL.vocab_size, 2, 8192)] * 2, steps=4)
    if bench.wants("packed"):
        lengths = [int(value) for value in np.random.default_rng(1).integers(200, 2400, 64)]
        bench.training("0.6B 8K, documents of 200 to 2,400 tokens packed", SMALL,
                       [rows(SMALL.vocab_size, 2, 8192, lengths)] * 2, steps=4)  # fmt: skip
    if roomy and bench.wants("muon"):
        bench.training("3B 4K with Muon", BIG, muon, optimizer="muon", state_bytes=5)


if __name__ == "__main__":
    main()
