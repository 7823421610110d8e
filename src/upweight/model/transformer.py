"""The decoder of the Llama family: Llama 2 and 3, SmolLM2, Qwen2 and 2.5, Qwen3 (dense), Mistral, Nanbeige4.

    x_0 = embedding[token]
    x  += W_o attention(rope(W_qkv norm(x)))           for each layer
    x  += W_down swiglu(W_gate_up norm(x))
    hidden = norm(x);  logits = unembedding hidden

The three projections into attention are one matrix, and so are the two into the feed-forward network. Rows of `qkv` are
ordered by key/value head: its query heads, its key, its value. model/weights.py converts to and from the names and the
order of Hugging Face.

`forward` stops at the hidden states. Logits of every position at once are most of the memory of a training step, so
objectives take log-probabilities in chunks from model/logprobs.py.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upweight.core.batches import PADDING
from upweight.model import context
from upweight.model.attention import Scope, attend, attend_cached, make_scope
from upweight.model.cache import Cache, StepWindow, Window
from upweight.model.config import ModelConfig
from upweight.model.layers import RmsNorm, swiglu
from upweight.model.logprobs import compute_dtype
from upweight.model.products import Linear, by_packed, linear, pack, packed, packs
from upweight.model.rope import RopeTable, rotate
from upweight.model.step_graphs import StepGraphs

__all__ = ["Block", "ModelConfig", "Transformer", "make_model"]


class Block(nn.Module):
    """One layer: attention, then the gated feed-forward network, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.kv_heads, self.slots, self.size = config.kv_heads, config.group + 2, config.head_size
        self.index = index
        slots = self.kv_heads * self.slots * self.size
        self.attention_norm = RmsNorm(config.width, config.norm_epsilon)
        self.qkv = Linear(config.width, slots, bias=config.qkv_bias)
        self.query_norm = RmsNorm(self.size, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RmsNorm(self.size, config.norm_epsilon) if config.qk_norm else None
        self.out = Linear(config.heads * self.size, config.width, bias=False)
        self.ffn_norm = RmsNorm(config.width, config.norm_epsilon)
        self.gate_up = Linear(config.width, 2 * config.ffn, bias=False)
        self.down = Linear(config.ffn, config.width, bias=False)

    def forward(
        self, x: Float[Tensor, "row time width"], scope: Scope, *, compiled: bool = False
    ) -> Float[Tensor, "row time width"]:
        # the hooks of FSDP run around this call, so what is compiled sees whole weights and no hooks
        layer = _compiled_layer() if compiled else Block.apply_to
        return layer(self, x, scope)

    def apply_to(self, x: Tensor, scope: Scope) -> Tensor:
        """What `forward` does: a function of its own, which the compiler reads once for all layers."""
        x = x + self.out(attend(self._project(x), scope))
        return self._feed_forward(x)

    def extend(
        self,
        x: Float[Tensor, "row time width"],
        rotations: Complex[Tensor, "row time 1 1 pair"],
        bias: Float[Tensor, "row time slot"],
        cache: Cache,
        window: Window | StepWindow,
    ) -> Float[Tensor, "row time width"]:
        """The same over new tokens of cached rows."""
        qkv = self._project(x)
        turned = rotate(qkv[:, :, :, :-1], rotations)
        key, value = cache.append(self.index, turned[:, :, -1], qkv[:, :, :, -1].transpose(1, 2), window)
        x = x + self.out(attend_cached(turned[:, :, :-1], key.to(x.dtype), value.to(x.dtype), bias))
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(swiglu(self.gate_up(self.ffn_norm(x))))
        return x + added

    def _project(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(self.attention_norm(x)).unflatten(-1, (self.kv_heads, self.slots, self.size))
        if self.query_norm is None or self.key_norm is None:
            return qkv
        query, key, value = qkv.split((self.slots - 2, 1, 1), dim=3)
        return torch.cat((self.query_norm(query), self.key_norm(key), value), dim=3)


class Transformer(nn.Module):
    """A causal language model up to its hidden states.

    Attributes:
        config: its shape; `set_rope_base` replaces it.
        recompute: activation checkpointing: the share, 0 to 1, of what the layers would keep for the gradient that is
            computed again instead. At 1 only the input of each layer is kept: about a third more work for a fraction
            of the memory. Compiled layers drop what is cheapest to compute again first; otherwise that share of the
            layers keeps its input alone.
        step_graphs: on CUDA, replay decoding steps as graphs (model/step_graphs.py).
        compiled: let the compiler fuse each layer where a gradient is taken; the same results up to rounding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = 0.0
        self.compiled = False
        self.step_graphs = True
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = RmsNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied else Linear(config.width, config.vocab_size, bias=False)
        self._rope = RopeTable(config.head_size, config.rope_base, config.rope_scaling)
        self._packed: Tensor | None = None

    def pack(self, rows: int) -> None:
        """Only sample from now on, some `rows` at once: put weights into the order in which products read them fastest.

        Where that gains nothing (model/products.py), nothing changes. Otherwise the model can no longer be trained,
        saved or copied; the embedding and the unembedding stay as they are.
        """
        if packs(self.unembedding):
            self._packed = packed(self.unembedding, rows)
        pack(self.layers, rows)

    @property
    def unembedding(self) -> Float[Tensor, "vocab width"]:
        """The matrix that turns hidden states into logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def new_cache(self, *, rows: int, capacity: int) -> Cache:
        """Room for the keys and values of `rows` sequences of up to `capacity` tokens."""
        weight = self.embedding.weight
        return Cache(self.config, rows=rows, capacity=capacity, device=weight.device, dtype=weight.dtype)

    def cache_bytes(self, capacity: int) -> int:
        """Memory of one row of a cache."""
        return self.config.held_values_per_token() * capacity * self.embedding.weight.element_size()

    def set_rope_base(self, base: float, *, max_context: int | None = None) -> None:
        """Continue at another RoPE base (ABF), and for another context length where one is given."""
        longest = self.config.max_context if max_context is None else max_context
        self.config = dataclasses.replace(self.config, rope_base=base, max_context=longest)
        self._rope = RopeTable(self.config.head_size, base, self.config.rope_scaling)

    def forward(
        self,
        tokens: Int[Tensor, "row time"],
        positions: Int[Tensor, "row time"] | None = None,
        segments: Int[Tensor, "row time"] | None = None,
        cache: Cache | None = None,
        *,
        prefixes: Int[Tensor, "row time"] | None = None,
        rows: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Float[Tensor, "row time width"]:
        """Hidden states after the final norm.

        Args:
            tokens: token ids.
            positions: places within their sequences; None counts from 0, or from the start of each segment.
            segments: sequence of each token; attention stays within it. None: each row is one sequence.
            prefixes: the segment that each token's own continues, which it may attend to as well; see TokenBatch. Needs
                positions.
            cache: append the tokens to what these rows hold, and attend to that. Without gradient.
            rows: which rows of the cache; None takes the first ones.
            counts: how many tokens of each row count, from the left; None takes all.

        Positions and segments do not go with a cache, which knows them.
        """
        if cache is not None:
            if positions is not None or segments is not None or prefixes is not None:
                raise ValueError("a cache keeps the positions of its rows: give neither positions nor segments")
            return self._extend(tokens, cache, rows, counts)
        held = None
        if (share := context.current()) is not None:
            held = context.Part(share, tokens.shape[1])
            tokens = held.pad(tokens, 0)
            positions = None if positions is None else held.pad(positions, 0)
            segments = None if segments is None else held.pad(segments, PADDING)
            prefixes = None if prefixes is None else held.pad(prefixes, PADDING)
        row, time = tokens.shape
        starts = None if segments is None else _starts(segments)
        if starts is not None and segments is not None and prefixes is not None:
            if positions is None:
                raise ValueError("segments that continue others need their positions")
            starts = _starts_of(prefixes, segments, starts)
        if positions is None:
            places = torch.arange(time, device=tokens.device).expand(row, time)
            positions = places if starts is None else places - starts
        if held is not None:
            tokens, positions = held.take(tokens), held.take(positions)
        x = self.embedding(tokens)
        trained = torch.is_grad_enabled()
        compiled = self.compiled and trained
        rotations = self._rope.rotations(positions, time)
        scope = make_scope(rotations, segments, starts, self.config.heads, compute_dtype(x), prefixes, held)
        again = round(self.recompute * len(self.layers)) if trained and not compiled else 0
        with _kept_share(1.0 - self.recompute) if compiled else contextlib.nullcontext():
            for index, layer in enumerate(self.layers):
                if index < again:
                    x = checkpoint(layer, x, scope, use_reentrant=False)
                else:
                    x = layer(x, scope, compiled=compiled)
        hidden = self._normed(x)
        return hidden if held is None else held.whole(hidden, axis=1)[:, : held.time].clone()  # FSDP wants no view

    def _extend(self, tokens: Tensor, cache: Cache, rows: Sequence[int] | None, counts: Sequence[int] | None) -> Tensor:
        with torch.no_grad():
            if self.step_graphs and tokens.is_cuda and tokens.shape[1] == 1 and rows is None and counts is None:
                cache.graphs = cache.graphs or StepGraphs(cache)
                return cache.graphs.step(self, tokens, cache)
            window = Window(cache, tokens.shape[1], tokens.shape[0], rows, counts)
            table = self.rotation_table(cache.capacity + tokens.shape[1])
            hidden = self.extend_by(tokens, window, table, cache)
            window.commit()
            return hidden

    def extend_by(
        self, tokens: Tensor, window: Window | StepWindow, table: Complex[Tensor, "place pair"], cache: Cache
    ) -> Float[Tensor, "row time width"]:
        """Read tokens [row time] into the rows of a window, which says where they stand; it is not committed."""
        x = self.embedding(tokens)
        bias = torch.zeros(window.visible.shape, dtype=x.dtype, device=x.device)
        bias.masked_fill_(~window.visible, float("-inf"))
        rotations = table[window.positions][:, :, None, None]
        for layer in self.layers:
            assert isinstance(layer, Block)
            x = layer.extend(x, rotations, bias, cache, window)
        return self._normed(x)

    def rotation_table(self, longest: int) -> Complex[Tensor, "place pair"]:
        """The rotation at each of at least the first `longest` positions."""
        return self._rope.table(self.device, longest)

    def _normed(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Float[Tensor, "*n width"]) -> Float[Tensor, "*n vocab"]:
        """The logits of some hidden states; for every position of a batch use model/logprobs.py instead."""
        if self._packed is not None:
            return by_packed(hidden, self._packed)
        return linear(hidden, self.unembedding)


@functools.cache
def _compiled_layer() -> Callable[[Block, Tensor, Scope], Tensor]:
    return torch.compile(Block.apply_to)


def _kept_share(share: float) -> contextlib.AbstractContextManager[None]:
    """While layers are compiled in it: how much of what the compiler would keep for the gradient it may keep."""
    # imported here because it loads the compiler, which takes seconds and which a CPU run never needs
    import torch._functorch.config as settings

    kept: contextlib.AbstractContextManager[None] = settings.patch(activation_memory_budget=share)
    return kept


def _starts(segments: Tensor) -> Tensor:
    """Where the run of equal segments that each token belongs to begins."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, places, 0).cummax(dim=1).values


def _starts_of(prefixes: Tensor, segments: Tensor, starts: Tensor) -> Tensor:
    """Where the segment that each token's own continues begins; the start of its own where it continues none."""
    begins = torch.zeros(int(segments.max()) + 2, dtype=starts.dtype, device=starts.device)
    begins.scatter_(0, (segments + 1).flatten(), starts.flatten())  # place 0 is that of padding
    return torch.where(segments == PADDING, starts, begins[prefixes + 1])


def make_model(config: ModelConfig, seed: int) -> Transformer:
    """A new model, the same for the same config and seed on every machine.

    Matrices are normal with standard deviation 1 / sqrt(inputs); those that write to the residual stream are smaller by
    sqrt(2 layers), so that its size at the start does not depend on the depth. The embedding has 0.02.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * config.layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                scale = 0.02 if name == "embedding.weight" else parameter.shape[1] ** -0.5
                scale *= depth if name.endswith(("out.weight", "down.weight")) else 1.0
                parameter.normal_(0.0, scale, generator=generator)
    return model
