"""The plan adds up, and larger work takes longer."""

import io
import socket
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_stages import Count, Total

from upweight.app import planner
from upweight.app.cluster import KNOWN, Cluster, describe
from upweight.app.find import find_recipe
from upweight.app.planner import HALF_SAMPLED, HALF_TRAINED, Speed, plan, print_plan
from upweight.app.recipe import Recipe, Step
from upweight.core.errors import UserError
from upweight.core.protocols import Limits
from upweight.core.work import Estimate, Machine
from upweight.model.cache import HOST_BYTES
from upweight.model.config import ModelConfig
from upweight.stages import evaluate, gate, sft
from upweight.synthesize.difficulty import Gate

NUMBERS = Step("numbers", Count, Count.Config(to=1000))
RECIPE = Recipe("r", Step("total", Total, Total.Config(), {"numbers": NUMBERS}))


@pytest.mark.parametrize("slower", [1.0, 4.0])
def test_seconds_are_flops_by_speed_and_overhead(slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beside the products gains the root of what these gain from a library so many times as fast as torch's."""
    speed = Speed(Machine())
    fast = speed.flops_per_second(1e6)
    monkeypatch.setattr(planner, "plain_flops_per_second", lambda *_: fast / slower)
    beside = slower**0.5
    assert fast > 1e8
    assert speed.flops_per_second(1e6) == fast  # measured once
    width = (1e6 / 0.6) ** (1 / 3)  # 119: a little less than half is attained
    trained = Estimate(flops=fast, seconds=2.0, parameters=1e6)
    assert speed.seconds(trained) == pytest.approx(1 + beside * HALF_TRAINED / width + 2.0)
    assert speed.seconds(Estimate()) == 0.0
    sampled = Estimate(flops=2 * fast, sampled_flops=fast, parameters=1e6)
    expected = 2 + beside * (HALF_TRAINED + HALF_SAMPLED) / width
    assert speed.seconds(sampled) == pytest.approx(expected)
    # a step that makes no model computes with one of its inputs
    assert speed.seconds(replace(sampled, parameters=0.0), 1e6) == pytest.approx(expected)


def test_the_speed_of_a_processor_is_that_of_its_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Speed(Machine()).flops_per_second(1e6)
        torch.set_num_threads(2)
        assert Speed(Machine()).flops_per_second(1e6) == 2 * one
    finally:
        torch.set_num_threads(before)


def test_what_a_step_reckons_with_is_what_its_inputs_will_hold() -> None:
    recipe = find_recipe("quickstart", {})
    planned = {item.step: item.estimate for item in plan(recipe, Machine())}
    # all 2,600 stories 16 times, each half of the 96 tokens; no more than 1,600 / 0.6 are measured
    assert planned["gate_rl_stem"].tokens == 2600 * 16 * 48
    # 3,000 gold conversations twice, each a third of 256 tokens
    assert planned["teacher"].tokens == 3000 * 2 * 256 / 3
    # 240 stories and 60 programs, 8 samples of 48 tokens by 8 checkpoints
    assert planned["evaluation"].tokens == 300 * 8 * 48 * 8
    # a third of 1,800 problems give a pair: 19 batches of 32, 2 x 32 x (60 + 96 / 2) tokens in 27 rows of 256, twice
    assert planned["dpd"].tokens == 19 * 27 * 256 * 2
    shape = recipe.step("base").config.shape
    token_bytes = 4 * (shape.layers * (14 * shape.width + 3 * shape.ffn) + shape.width)
    assert planned["dpd"].token_bytes == planned["rl_preference"].token_bytes == token_bytes


def test_estimates_flow_from_inputs() -> None:
    planned = {item.step: item.estimate for item in plan(RECIPE, Machine())}
    assert planned["numbers"].flops == 1e12
    assert planned["total"].tokens == planned["numbers"].tokens == 1000


def test_the_table() -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(RECIPE, Machine(), price_per_hour=3600.0, console=console)
    printed = console.file.getvalue()
    assert "1k" in printed
    assert "1T" in printed
    assert "total" in printed
    assert "at 3,600.00 an hour" in printed


LLAMA_8B = ModelConfig(128_256, width=4096, layers=32, heads=32, kv_heads=8, ffn=14_336, tied=False)
LLAMA_405B = ModelConfig(128_256, width=16_384, layers=126, heads=128, kv_heads=8, ffn=53_248, tied=False)


def test_memory_of_decoding_is_that_of_its_keys_and_values() -> None:
    # SmolLM2-135M: 30 layers of 3 heads of 64 keys and values, so 46,080 bytes of a token; 32 problems of 4 samples at
    # once and a row for the prompt, of 120 + 128 tokens. Measured (docs/log.md): 2.9 GB, 0.37 of it before it began
    shape = ModelConfig(vocab_size=49_152, width=576, layers=30, heads=9, kv_heads=3, ffn=1536)
    model = Estimate(parameters=shape.parameter_count(), held_bytes=4 * shape.held_values_per_token())
    assert model.held_bytes == 46_080
    limits = Limits(128)
    held = 129 * 248 * 46_080
    config = evaluate.Config({"gym": "gym.jsonl"}, samples=4, count=64, problems_a_block=32, limits=limits)
    cost = evaluate.estimate(config, {"problems": Estimate(records={"gym.jsonl": 72}), "sft": model})
    assert cost.memory_bytes == 4 * model.parameters + held + 5e8
    assert cost.memory_bytes + 0.37e9 == pytest.approx(2.9e9, rel=0.05)
    # no more rows than a sampler decodes at once, and no more memory than it may take
    many = evaluate.estimate(replace(config, samples=400), {"problems": Estimate(), "sft": model})
    assert many.memory_bytes == 4 * model.parameters + 257 * 248 * 46_080 + 5e8
    long = evaluate.estimate(replace(config, limits=Limits(4096)), {"problems": Estimate(), "sft": model})
    assert long.memory_bytes == 4 * model.parameters + HOST_BYTES + 5e8
    # the gate asks as many, and passes on nothing; SFT holds what its model does
    asked = gate.Config({"gym.jsonl": 0}, gate=Gate(count=8), limits=limits, block=16)
    assert gate.estimate(asked, {"problems": Estimate(), "model": model}).memory_bytes == cost.memory_bytes
    assert (
        sft.estimate(sft.Config(data=(sft.Part("solved/conversations.jsonl"),)), {"model": model}).held_bytes
        == model.held_bytes
    )


def test_parameters_and_flops_against_published_figures() -> None:
    # the checkpoint of Llama-3.1-8B has 8,030,261,248 parameters, that of the 405B 405,853,388,800
    assert LLAMA_8B.parameter_count() == 8_030_261_248
    assert LLAMA_405B.parameter_count() == 405_853_388_800
    # The Llama 3 Herd of Models (arXiv 2407.21783), section 3.2.1: 3.8e25 operations for 15.6T tokens at 8K
    assert 3 * LLAMA_405B.flops_per_token(8192) * 15.6e12 == pytest.approx(3.8e25, rel=0.1)


def test_throughput_against_published_figures() -> None:
    # torchtitan, Llama-3.1-8B at 8K on 8 H100 with FSDP: 5,762 tokens a second and GPU, compiled 6,667
    seconds_a_token = 3 * LLAMA_8B.flops_per_token(8192) / KNOWN["H100"].training_flops_per_second()
    assert 1 / seconds_a_token == pytest.approx(6667, rel=0.3)
    assert 1 / seconds_a_token == pytest.approx(5762, rel=0.3)


def test_the_report_s_recipe_on_23_trillion_tokens() -> None:
    recipe = find_recipe("nanbeige4_3b", {})
    cluster = describe("H100", count=512, price_per_hour=2.0)
    machine = Machine(sharding="fsdp", recompute=1.0)
    base = next(item for item in plan(recipe, machine, cluster) if item.step == "base")
    # 2 x 166,144 x 2560, 32 layers of 2560 x (48 x 128 + 3 x 10496 + 2), and the last norm of 2560
    assert base.estimate.parameters == 3_933_637_120
    assert base.estimate.tokens == 23e12
    # six operations a parameter that multiplies and token, and attention of 4K and 64K on top
    multiplying = base.estimate.parameters - 166_144 * 2560
    assert 6 * multiplying * 23e12 < base.estimate.flops < 1.5 * 6 * multiplying * 23e12
    # recomputation adds a third of the training's operations
    assert base.seconds == pytest.approx(base.estimate.flops * 4 / 3 / (512 * 0.38 * 989e12), rel=1e-6)
    assert base.estimate.memory_bytes < 80e9
    whole = next(item for item in plan(recipe, Machine(), describe("H100")) if item.step == "base")
    assert whole.estimate.memory_bytes > 80e9


def test_the_plan_of_a_model_from_the_hub_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    recipe = find_recipe("smollm2", {"scale": 0.05})
    planned = {item.step: item.estimate for item in plan(recipe, Machine())}
    assert [*planned] == [step.name for step in recipe.steps()]
    trained = {name for name, estimate in planned.items() if estimate.parameters == 135e6}
    assert trained == {"base", "sft", "teacher", "dpd", "rl"}
    # 12 conversations, each a third of 256 tokens, although the part of the artifact says no number
    assert planned["sft"].tokens == planned["teacher"].tokens == pytest.approx(12 * 256 / 3)
    assert all(planned[name].tokens > 0 for name in ("solved", "pairs", "dpd", "evaluation", "gate", "rl", "transfer"))


def test_a_machine_of_ones_own() -> None:
    mine = describe("mine", count=4, tflops=100, memory_gb=24, bandwidth_gb=900, link_gb=30)
    assert mine == Cluster("mine", 100e12, 24e9, 900e9, 30e9, count=4)
    # a step reads all weights once: 16 rows x 2 operations for each 2 bytes read at 70% of 900 GB/s
    assert mine.sampling_flops_per_second(16) == pytest.approx(4 * 16 * 0.7 * 900e9)
    assert mine.sampling_flops_per_second(1000) == mine.training_flops_per_second()
    assert describe("H100", tflops=500).flops_per_second == 500e12
    with pytest.raises(UserError, match="the GPU 'mine' is none of A100"):
        describe("mine", tflops=100)
    with pytest.raises(UserError, match="count above 0"):
        describe("H100", count=0)


def test_what_does_not_fit_is_said() -> None:
    console = Console(file=io.StringIO(), width=200)
    small = describe("RTX4090", count=2, price_per_hour=0.4)
    print_plan(find_recipe("nanbeige4_3b", {}), Machine(), cluster=small, console=console)
    printed = console.file.getvalue()
    assert "2 x RTX4090" in printed
    assert "GPU-hours at 38% of the peak" in printed
    assert "base, cold_start, sft: more than the 24 GB of a RTX4090" in printed
