"""The decoder: packing, positions, the cache, initialisation, and its speed-minded layers against plain ones."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from upweight.core.batches import PADDING
from upweight.core.errors import UserError
from upweight.core.packing import lay, strip
from upweight.model import layers, tiled_attention, transformer
from upweight.model.cache import Cache
from upweight.model.config import ModelConfig
from upweight.model.layers import RmsNorm, swiglu
from upweight.model.logprobs import token_logprobs
from upweight.model.rope import RopeScaling, frequencies
from upweight.model.transformer import Transformer, make_model


def config(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "vocab_size": 61,
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 48,
        "max_context": 256,
    }
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def tokens(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, time), generator=torch.Generator().manual_seed(seed))


def test_parameter_count_by_hand() -> None:
    # width 8, 1 layer, 2 heads of 4, 1 kv head: qkv 8 x 16, out 8 x 8, gate_up 8 x 24, down 12 x 8, norms 2 x 8
    # = 128 + 64 + 192 + 96 + 16 = 496; embedding 10 x 8 = 80; last norm 8; tied 584; untied 664
    shape = ModelConfig(vocab_size=10, width=8, layers=1, heads=2, kv_heads=1, ffn=12)
    assert shape.parameter_count() == 584
    assert (
        ModelConfig(vocab_size=10, width=8, layers=1, heads=2, kv_heads=1, ffn=12, tied=False).parameter_count() == 664
    )


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"qkv_bias": True}, {"qk_norm": True}, {"head_size": 16}])
def test_parameter_count_is_that_of_the_module(changes: dict[str, object]) -> None:
    shape = config(**changes)
    assert shape.parameter_count() == sum(parameter.numel() for parameter in Transformer(shape).parameters())


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="do not divide"):
        config(heads=3, kv_heads=2, head_size=8)
    with pytest.raises(UserError, match="give head_size"):
        config(heads=6, kv_heads=2)
    with pytest.raises(UserError, match="even"):
        config(head_size=7)
    with pytest.raises(UserError, match="layers is 0"):
        config(layers=0)


def test_the_same_seed_makes_the_same_model() -> None:
    first, second, other = (make_model(config(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.qkv.weight"], other["layers.0.qkv.weight"])


def test_a_token_does_not_see_the_future() -> None:
    model, read = make_model(config(), 0), tokens(2, 90)
    changed = read.clone()
    changed[:, 70:] = (changed[:, 70:] + 1) % 61
    with torch.no_grad():
        assert torch.equal(model(read)[:, :70], model(changed)[:, :70])


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "qk_norm": True}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_decoding_with_a_cache_gives_what_one_pass_gives(changes: dict[str, object]) -> None:
    model, read = make_model(config(**changes), 0), tokens(3, 20)
    whole = model(read).detach()
    cache = Cache(model.config, rows=5, capacity=24)
    # prompts of 7, 5 and 3 tokens, padded to 7
    first = model(read[:, :7], cache=cache, counts=[7, 5, 3])
    torch.testing.assert_close(first[0], whole[0, :7])
    torch.testing.assert_close(first[2, :3], whole[2, :3])
    assert cache.lengths == [7, 5, 3, 0, 0]
    # one step of all rows, each at its own place
    step = torch.stack([read[0, 7], read[1, 5], read[2, 3]])[:, None]
    second = model(step, cache=cache)
    torch.testing.assert_close(second[:, 0], torch.stack([whole[0, 7], whole[1, 5], whole[2, 3]]))
    # several tokens more for one row, as after a tool's answer
    third = model(read[1:2, 6:12], cache=cache, rows=[1])
    torch.testing.assert_close(third[0], whole[1, 6:12])
    # a shared prefix goes on in another row
    cache.copy([1, 1], [4, 1])
    fourth = model(read[1:2, 12:13], cache=cache, rows=[4])
    torch.testing.assert_close(fourth[0], whole[1, 12:13])
    assert cache.lengths == [8, 12, 4, 0, 13]
    # rows change places at once
    cache.copy([2, 4], [4, 2])
    assert cache.lengths == [8, 12, 13, 0, 4]
    moved = model(torch.stack([read[1, 13:14], read[2, 4:5]]), cache=cache, rows=[2, 4])
    torch.testing.assert_close(moved[:, 0], torch.stack([whole[1, 13], whole[2, 4]]))
    # a refilled row forgets what it held
    cache.clear([0])
    fifth = model(read[2:3, :6], cache=cache, rows=[0])
    torch.testing.assert_close(fifth[0], whole[2, :6])


def test_a_cache_refuses_what_does_not_fit() -> None:
    model = make_model(config(), 0)
    cache = Cache(model.config, rows=2, capacity=4)
    with pytest.raises(ValueError, match="made for 4"):
        model(tokens(2, 5), cache=cache)
    with pytest.raises(ValueError, match="cache rows"):
        model(tokens(1, 2), cache=cache, rows=[2])
    with pytest.raises(ValueError, match="counts"):
        model(tokens(2, 2), cache=cache, counts=[3, 1])
    with pytest.raises(ValueError, match="neither positions nor segments"):
        model(tokens(1, 2), torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    assert cache.lengths == [0, 0]


def plain_attention(qkv: torch.Tensor, rotations: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The equations of attention one by one: [row time kv_head slot size] -> [row time features]."""
    size = qkv.shape[-1]
    pairs = torch.view_as_complex(qkv[:, :, :, :-1].unflatten(-1, (-1, 2))) * rotations
    turned = torch.view_as_real(pairs).flatten(-2)
    scores = torch.einsum("bqkgd,bskd->bkgqs", turned[:, :, :, :-1], turned[:, :, :, -1]) / size**0.5
    probabilities = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bkgqs,bskd->bqkgd", probabilities, qkv[:, :, :, -1]).flatten(2)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_tiles_compute_attention_and_its_gradient(monkeypatch: pytest.MonkeyPatch, keep: bool, packed: bool) -> None:
    monkeypatch.setattr(tiled_attention, "QUERIES", 8)
    monkeypatch.setattr(tiled_attention, "TILE_SCORES", 2 * 4 * 8 * 10)  # two rows a tile
    monkeypatch.setattr(tiled_attention, "KEPT_SCORES", 1 << 20 if keep else 0)
    generator = torch.Generator().manual_seed(0)
    row, time = 3, 21
    qkv = torch.randn(row, time, 2, 4, 6, generator=generator, dtype=torch.float32, requires_grad=True)
    rotations = torch.polar(torch.ones(row, time, 1, 1, 3), torch.randn(row, time, 1, 1, 3, generator=generator))
    lengths = [[5, 9, 7], [21], [1, 1, 19]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(part)), torch.tensor(part)) for part in lengths])
    starts = torch.stack(
        [torch.tensor([sum(part[:i]) for i in range(len(part))])[s] for part, s in zip(lengths, segments, strict=True)]
    )
    seen = torch.ones(time, time, dtype=torch.bool).tril().expand(row, time, time)
    if packed:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
        tiles = tiled_attention.tiles_of(row, time, 4, segments, starts)
    else:
        tiles = tiled_attention.tiles_of(row, time, 4, None, None)
    out = tiled_attention.attend_in_tiles(qkv, rotations, tiles)
    plain = plain_attention(qkv, rotations, seen)
    torch.testing.assert_close(out, plain)
    outer = torch.randn(out.shape, generator=generator)
    (ours,) = torch.autograd.grad(out, qkv, outer)
    (theirs,) = torch.autograd.grad(plain, qkv, outer)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if packed:  # 3 blocks of queries; row 1 is one document, so the tiles of rows 0 and 1 start at its beginning
        assert [tile.keys.start for tile in tiles] == [0, 0, 0, 0, 2, 2]


def test_a_tile_within_one_sequence_masks_only_its_own_future(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_attention, "QUERIES", 4)
    segments = torch.tensor([[0] * 8 + [1] * 4 + [2] * 4])
    starts = torch.tensor([[0] * 8 + [8] * 4 + [12] * 4])
    tiles = tiled_attention.tiles_of(1, 16, 1, segments, starts)
    # queries 4-7 see keys 0-3 all, so the bias of their tile is that of the last 4 keys; none reaches back further
    assert [(tile.keys.start, tile.keys.stop, tile.bias.shape[-1]) for tile in tiles] == [
        (0, 4, 4),
        (0, 8, 4),
        (8, 12, 4),
        (12, 16, 4),
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_tiles_skip_what_stands_between_a_shared_prompt_and_its_continuations(
    monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    monkeypatch.setattr(tiled_attention, "QUERIES", 4)
    monkeypatch.setattr(tiled_attention, "KEPT_SCORES", 1 << 20 if keep else 0)
    # a prompt of 3 with continuations of 5, 6 and 2; a sequence of its own; a prompt of 2 with continuations of 3 and 4
    parts = [(3, 0), (5, 0), (6, 0), (2, 0), (4, 4), (2, 5), (3, 5), (4, 5)]
    strips = [strip(range(length), [1.0] * length) for length, _ in parts]
    batch = lay(strips, [range(8)], 31, follows={n: prefix for n, (_, prefix) in enumerate(parts) if n != prefix})
    assert batch.prefixes is not None
    own = batch.segments[:, :, None] == batch.segments[:, None, :]
    seen = (own | (batch.prefixes[:, :, None] == batch.segments[:, None, :])) & torch.ones(31, 31).tril().bool()
    starts = seen.float().argmax(-1)
    tiles = tiled_attention.tiles_of(1, 31, 4, batch.segments, starts, batch.prefixes)
    found = [
        (tile.queries.start, tile.shared.start, tile.shared.stop, tile.keys.start, tile.keys.stop) for tile in tiles
    ]
    assert found == [
        (0, 0, 0, 0, 4),
        (4, 0, 0, 0, 8),  # the first continuation stands right behind the prompt
        (8, 0, 3, 8, 12),  # places 3 to 7 are the first one's
        (12, 0, 3, 8, 16),  # the second and the third
        (16, 0, 0, 16, 20),
        (20, 0, 0, 20, 24),
        (24, 0, 0, 20, 28),
        (28, 20, 22, 25, 31),
    ]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 31, 2, 4, 6, generator=generator, requires_grad=True)
    rotations = torch.polar(torch.ones(1, 31, 1, 1, 3), torch.randn(1, 31, 1, 1, 3, generator=generator))
    out = tiled_attention.attend_in_tiles(qkv, rotations, tiles)
    real = (batch.segments >= 0)[0]
    plain = plain_attention(qkv, rotations, seen)
    torch.testing.assert_close(out[:, real], plain[:, real])
    outer = torch.randn(out.shape, generator=generator) * real[None, :, None]
    (ours,) = torch.autograd.grad(out, qkv, outer)
    (theirs,) = torch.autograd.grad(plain, qkv, outer)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_many_tiles_add_up_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # query t sees t + 1 keys alike, so a gradient of ones gives the first value 1/1 + 1/2 + ... + 1/512 = 6.8165; the
    # last tiles add 8/512 = 0.016, which a bfloat16 sum of 6.8, whose steps are 0.031, would not take up
    monkeypatch.setattr(tiled_attention, "QUERIES", 8)
    time = 512
    qkv = torch.zeros(1, time, 1, 3, 2, dtype=torch.bfloat16, requires_grad=True)
    tiles = tiled_attention.tiles_of(1, time, 1, None, None, dtype=torch.bfloat16)
    out = tiled_attention.attend_in_tiles(qkv, torch.ones(1, time, 1, 1, 1, dtype=torch.complex64), tiles)
    (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert gradient[0, 0, 0, 2, 0].item() == pytest.approx(6.8165, rel=0.005)


def test_layers_are_compiled_once_for_all_packings() -> None:
    # in a process of its own: the compiler would take minutes to read the checks that the test runner puts around all
    found = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, check=True).stdout
    counts = [int(line) for line in found.split()]
    assert counts[0] > 0
    assert counts == [counts[0]] * 3  # other tiles, the same graphs


COMPILES = """
import torch
from upweight.model import tiled_attention, transformer
from upweight.model.transformer import ModelConfig, make_model

graphs = []
layer = torch.compile(transformer.Block.apply_to, backend=lambda graph, inputs: graphs.append(graph) or graph)
transformer._compiled_layer = lambda: layer
tiled_attention.QUERIES = 4
model = make_model(ModelConfig(vocab_size=50, width=16, layers=2, heads=4, kv_heads=2, ffn=24), 0)
tokens = torch.arange(48).view(2, 24)
for length in (24, 9, 3):
    segments = (torch.arange(24) // length).expand(2, 24)
    model.compiled = False
    plain = model(tokens, None, segments)
    model.compiled = True
    torch.testing.assert_close(model(tokens, None, segments), plain)
    print(len(graphs))
"""


def test_padding_gives_no_nan_and_no_gradient_elsewhere() -> None:
    model, read = make_model(config(), 0), tokens(2, 12)
    segments = torch.zeros(2, 12, dtype=torch.int64)
    segments[1, 4:] = PADDING
    hidden = model(read, None, segments)
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[1, :4], model(read[1:, :4])[0])


@pytest.mark.parametrize("name", ["norm", "swiglu"])
def test_hand_written_gradients_are_those_of_torch(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 12, generator=generator, requires_grad=True)
    outer = torch.randn(5, 7, 12 if name == "norm" else 6, generator=generator)
    if name == "norm":
        norm = RmsNorm(12, 1e-5)
        norm.weight.data = torch.randn(12, generator=generator)
        ours, theirs = norm(x), functional.rms_norm(x, (12,), norm.weight, 1e-5)
        inputs = (x, norm.weight)
    else:
        gate, up = x.chunk(2, dim=-1)
        ours, theirs, inputs = swiglu(x), functional.silu(gate) * up, (x,)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer), strict=True
    ):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(norm(x) if name == "norm" else swiglu(x), theirs.detach())


def test_recomputing_layers_gives_the_same_gradient() -> None:
    model, read = make_model(config(), 0), tokens(2, 30)
    segments = (torch.arange(30) // 11).expand(2, 30)
    gradients = []
    for recompute in (0.0, 0.5, 1.0):
        model.recompute = recompute
        model.zero_grad()
        model(read, None, segments).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for again in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], again, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_what_the_compiler_reads_is_the_same_function(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # the plain form of every part, as it stands in compiled layers and on CUDA, without waiting for the compiler
    model, read = make_model(config(qk_norm=True), 0), tokens(2, 50)
    segments = (torch.arange(50) // 17).expand(2, 50) if packed else None
    found = []
    for compiled in (False, True):
        model.compiled = compiled
        if compiled:
            monkeypatch.setattr(transformer, "_compiled_layer", lambda: transformer.Block.apply_to)
            monkeypatch.setattr(layers, "by_hand", lambda x: False)
        model.zero_grad()
        hidden = model(read, None, segments)
        (hidden * torch.linspace(-1, 1, 32)).sum().backward()
        found.append([hidden.detach(), *(part.grad.clone() for part in model.parameters() if part.grad is not None)])
    assert len(found[1]) == 1 + len(list(model.parameters()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_a_new_rope_base_changes_frequencies_and_config() -> None:
    # head of 4: pair 1 turns by base^(-2/4): 10_000^-0.5 = 0.01, and 1_000_000^-0.5 = 0.001
    torch.testing.assert_close(frequencies(4, 10_000.0), torch.tensor([1.0, 0.01]))
    torch.testing.assert_close(frequencies(4, 1_000_000.0), torch.tensor([1.0, 0.001]))
    torch.testing.assert_close(frequencies(4, 10_000.0, RopeScaling("linear", 4.0)), torch.tensor([0.25, 0.0025]))
    model, read = make_model(config(), 0), tokens(1, 40)
    before = model(read).detach()
    model.set_rope_base(1_000_000.0, max_context=1024)
    after = model(read).detach()
    assert model.config.rope_base == 1_000_000.0
    assert model.config.max_context == 1024
    torch.testing.assert_close(after[:, 0], before[:, 0])  # the first position is not turned
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_bfloat16_runs_forwards_backwards_and_cached() -> None:
    model, read = make_model(config(), 0), tokens(2, 16)
    exact = model(read).detach()
    model = model.to(torch.bfloat16)
    hidden = model(read)
    hidden.float().square().sum().backward()
    assert hidden.dtype == torch.bfloat16
    assert model.embedding.weight.grad is not None
    cached = model(read, cache=Cache(model.config, rows=2, capacity=16, dtype=torch.bfloat16))
    for out in (hidden, cached):  # 8 bits of mantissa over a few roundings
        assert (out.float() - exact).abs().mean() < 0.05


def test_cached_steps_in_bfloat16_are_those_of_whole_reading() -> None:
    """Rows of uneven lengths, a token at a time, where keys stand first in their product with the queries."""
    model, read = make_model(config(), 0).to(torch.bfloat16), tokens(3, 12)
    with torch.no_grad():
        whole = model(read).float()
        cache = Cache(model.config, rows=3, capacity=12, dtype=torch.bfloat16)
        counts = [4, 7, 1]
        model(read[:, :7], cache=cache, rows=range(3), counts=counts)
        for step in range(5):
            one = torch.stack([read[row, count + step] for row, count in enumerate(counts)])[:, None]
            hidden = model(one, cache=cache).float()
            for row, count in enumerate(counts):
                assert (hidden[row, 0] - whole[row, count + step]).abs().mean() < 0.03


def test_autocast_stays_close_and_its_gradients_reach_every_weight() -> None:
    model, read = make_model(config(qk_norm=True), 0), tokens(2, 70)
    segments = (torch.arange(70) // 23).expand(2, 70)
    exact = token_logprobs(model(read, None, segments), model.unembedding, read).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = token_logprobs(model(read, None, segments), model.unembedding, read)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().mean() < 0.02 * exact.abs().mean()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
