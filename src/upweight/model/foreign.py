"""Any other causal language model of transformers, wrapped so that every objective, loader and sampler here takes it.

Slower than model/transformer.py, and exact: the sequences of a packed batch are laid out one a row before the model
sees them, so that contract 3 (no attention across documents, positions from 0) holds whatever the architecture makes of
masks; decoding reads each sequence anew for every token. The hidden states go back to their packed places, so that
log-probabilities are taken in chunks from `unembedding` like everywhere.

What would make the loss wrong is refused when the model is opened: logits that are not unembedding x hidden (a cap, a
scale, a bias), and a model in which a token feels what follows it. Dropout is off.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from upweight.core.batches import PADDING
from upweight.core.errors import UserError
from upweight.core.hub import find_directory

PROBE_TOKENS = 7
TOLERANCE = 1e-3
"""Largest difference, as a share of the largest value, at which two ways to compute the same count as the same."""


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """What is known of a wrapped model.

    Attributes:
        architecture: the class in transformers.
        width: features of the hidden states.
        layers: how many it has; 0 where its config does not say.
        max_context: the longest sequence in tokens; a large number where it has no bound.
        rope_base: base of the rotary frequencies; 0 where it has none, or several.
        parameters: all of them, tied ones counted once.
    """

    architecture: str
    vocab_size: int
    width: int
    layers: int
    max_context: int
    rope_base: float
    parameters: int

    def parameter_count(self) -> int:
        """All parameters, tied ones counted once."""
        return self.parameters

    def flops_per_token(self, context: int) -> float:
        """About the floating-point operations of reading one token forwards, dense attention included."""
        return 2.0 * self.parameters + 2.0 * self.layers * self.width * context


class TokenCache:
    """The tokens of each row, read anew for every token that follows: the interface of model/cache.Cache."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = [0] * rows
        self.held: list[list[int]] = [[] for _ in range(rows)]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make each row of `targets` hold what the row of `sources` in its place holds."""
        for target, tokens in zip(targets, [list(self.held[source]) for source in sources], strict=True):
            self._set(target, tokens)

    def clear(self, rows: Sequence[int]) -> None:
        """Empty these rows for other sequences."""
        for row in rows:
            self._set(row, [])

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Add tokens to a row. Raises ValueError past the capacity."""
        whole = [*self.held[row], *tokens]
        if len(whole) > self.capacity:
            raise ValueError(f"a row would hold {len(whole)} tokens, but the cache was made for {self.capacity}")
        self._set(row, whole)

    def _set(self, row: int, tokens: list[int]) -> None:
        self.held[row], self.lengths[row] = tokens, len(tokens)


class ForeignModel(nn.Module):
    """A causal language model of transformers up to its hidden states, with the interface of model/transformer.py."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model.eval()
        head = model.get_output_embeddings()
        fields = model.config.get_text_config()
        rope = getattr(fields, "rope_parameters", None) or {}
        self.config = ForeignConfig(
            architecture=type(model).__name__,
            vocab_size=int(head.weight.shape[0]) if head is not None else 0,
            width=int(head.weight.shape[1]) if head is not None else 0,
            layers=int(getattr(fields, "num_hidden_layers", 0)),
            max_context=int(getattr(fields, "max_position_embeddings", 0) or 1 << 20),
            rope_base=float(rope.get("rope_theta", 0.0)),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
        _check(self)

    @property
    def unembedding(self) -> Float[Tensor, "vocab width"]:
        """The matrix that turns hidden states into logits."""
        matrix: Tensor = self.model.get_output_embeddings().weight
        return matrix

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unembedding.device

    @property
    def layers(self) -> nn.ModuleList | None:
        """Its layers, which parallel.shard splits one by one; None where they do not stand in one list."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        return next((found for found in lists if len(found) == self.config.layers), None)

    def set_rope_base(self, base: float, *, max_context: int | None = None) -> None:
        """Only what it has already: raises UserError for another base, or for a context longer than its own."""
        longest = max_context or 0
        if base != self.config.rope_base or longest > self.config.max_context:
            raise UserError(
                f"a RoPE base of {base:g} and a context of {longest:,} were asked of a {self.config.architecture}, "
                f"which has {self.config.rope_base:g} and {self.config.max_context:,}: this architecture keeps its "
                "own; set rope_base=0 and a context within its own"
            )

    def forward(
        self,
        tokens: Int[Tensor, "row time"],
        positions: Int[Tensor, "row time"] | None = None,
        segments: Int[Tensor, "row time"] | None = None,
        cache: TokenCache | None = None,
        *,
        prefixes: Int[Tensor, "row time"] | None = None,
        rows: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ) -> Float[Tensor, "row time width"]:
        """Hidden states after the final norm; see Transformer.forward. Positions count from 0 within each segment."""
        if cache is not None:
            with torch.no_grad():
                return self._extend(tokens, cache, rows, counts)
        if segments is None:
            return self._hidden(tokens, None)
        places, before = _apart(segments, prefixes)
        lengths = torch.tensor([len(place) for place in places], device=tokens.device)
        columns = torch.arange(int(lengths.max()), device=tokens.device)
        mask = columns < lengths[:, None]
        read = tokens.flatten()[torch.cat(places)]
        hidden = self._hidden(tokens.new_zeros(mask.shape).masked_scatter(mask, read), mask)
        own = mask & (columns >= torch.tensor(before, device=tokens.device)[:, None])
        back = torch.cat([place[count:] for place, count in zip(places, before, strict=True)])
        packed = hidden.new_zeros(tokens.numel(), hidden.shape[-1])
        return packed.index_copy(0, back, hidden[own]).view(*tokens.shape, -1)

    def logits(self, hidden: Float[Tensor, "*n width"]) -> Float[Tensor, "*n vocab"]:
        """The logits of some hidden states."""
        return functional.linear(hidden, self.unembedding)

    def new_cache(self, *, rows: int, capacity: int) -> TokenCache:
        """Room for `rows` sequences of up to `capacity` tokens."""
        return TokenCache(rows, capacity)

    def cache_bytes(self, capacity: int) -> int:
        """Memory that one row of a cache stands for: here the hidden states of reading it anew."""
        return 4 * self.config.width * capacity

    def save(self, path: str | Path) -> None:
        """Write the directory that transformers opens."""
        self.model.save_pretrained(path)

    def hub_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and weights as `save` writes them: some architectures hold theirs otherwise, experts in one tensor."""
        from transformers.core_model_loading import revert_weight_conversion

        yield from revert_weight_conversion(self.model, dict(self.model.named_parameters())).items()

    def _hidden(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        read = torch.ones_like(tokens) if mask is None else mask.long()
        hidden: Tensor = self.model.base_model(input_ids=tokens, attention_mask=read, use_cache=False)[0]
        return hidden

    def _extend(
        self, tokens: Tensor, cache: TokenCache, rows: Sequence[int] | None, counts: Sequence[int] | None
    ) -> Tensor:
        """The hidden states of new tokens, each row read from its beginning."""
        chosen = list(range(len(tokens))) if rows is None else list(rows)
        new = [tokens.shape[1]] * len(chosen) if counts is None else list(counts)
        for row, added, count in zip(chosen, tokens.tolist(), new, strict=True):
            cache.append(row, added[:count])
        lengths = torch.tensor([cache.lengths[row] for row in chosen], device=tokens.device)
        mask = torch.arange(int(lengths.max()), device=tokens.device) < lengths[:, None]
        whole = torch.tensor([token for row in chosen for token in cache.held[row]], device=tokens.device)
        hidden = self._hidden(tokens.new_zeros(mask.shape).masked_scatter(mask, whole), mask)
        first = lengths - torch.tensor(new, device=tokens.device)
        places = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        places = places.clamp(max=hidden.shape[1] - 1)[:, :, None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, places)


def _apart(segments: Tensor, prefixes: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """The flat places of each segment, behind those of the segment that it continues, and how many these are.

    A batch of nothing but padding reads its first place, so that processes that share a model stay in step.
    """
    flat = segments.flatten()
    real = (flat != PADDING).nonzero()[:, 0]
    order = real[flat[real].argsort(stable=True)]
    numbers, counts = flat[order].unique_consecutive(return_counts=True)
    by_segment = dict(zip(numbers.tolist(), order.split(counts.tolist()), strict=True))
    if not by_segment:
        return [torch.zeros(1, dtype=torch.long, device=flat.device)], [0]
    continued = {} if prefixes is None else {s: int(prefixes.flatten()[p[0]]) for s, p in by_segment.items()}
    places, before = [], []
    for segment, own in by_segment.items():
        prefix = continued.get(segment, segment)
        shared = own[:0] if prefix == segment else by_segment[prefix]
        places.append(torch.cat((shared, own)))
        before.append(len(shared))
    return places, before


def load_foreign(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ForeignModel:
    """Any causal language model that this version of transformers has a class for.

    Raises UserError where it has none, where weights are missing, damaged or of another shape, and where the wrapped
    model would not keep the contract.
    """
    # imported here: models of the Llama family do without transformers, which takes seconds
    from transformers import AutoModelForCausalLM

    directory = find_directory(path)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        model, info = opened
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"{directory} cannot be opened, neither as a model of the Llama family nor by this version of "
            f"transformers: {str(error).strip().splitlines()[0]}"
        ) from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"{directory} holds quantized weights, which cannot be trained: save it dequantized first")
    lost = sorted([*info["missing_keys"], *(str(item) for item in info.get("mismatched_keys") or ())])
    if lost:
        raise UserError(
            f"{directory} lacks {len(lost)} weights of a {type(model).__name__} or has them in another shape, "
            f"{lost[0]} first: the model directory is incomplete or of another model"
        )
    return ForeignModel(model).to(device)


def _check(model: ForeignModel) -> None:
    """Raises UserError where logits are made otherwise than by `unembedding`, or hidden states feel what follows."""
    name = model.config.architecture
    if model.model.get_output_embeddings() is None:
        raise UserError(f"{name} has no output embedding, so it is no language model that can be trained here")
    tokens = torch.arange(PROBE_TOKENS, device=model.device)[None] * 13 % model.config.vocab_size
    with torch.no_grad():
        hidden = model(tokens)
        theirs = model.model(input_ids=tokens, use_cache=False).logits
        half = model(tokens[:, : PROBE_TOKENS // 2 + 1])
        segments = torch.tensor([[0] * (PROBE_TOKENS // 2 + 1) + [1] * (PROBE_TOKENS // 2)], device=model.device)
        packed = model(tokens, None, segments)
        ours = model.logits(hidden)
    if not _alike(ours, theirs):
        raise UserError(
            f"{name} makes its logits in another way than unembedding x hidden (a cap, a scale or a bias), and the "
            "losses here would not know of it: it cannot be trained"
        )
    length = half.shape[1]
    if not _alike(hidden[:, :length], half) or not _alike(packed[:, :length], half):
        raise UserError(
            f"in {name} a token feels what follows it or stands beside it in a batch, so it cannot be trained to "
            "predict the next one"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    largest = float(other.abs().max())
    return math.isfinite(largest) and float((one - other).abs().max()) <= TOLERANCE * max(largest, TOLERANCE)
